"""Which transformers `patch_transformers()` replaces functions of, and how it makes sure.

The version has to be a known one, and so has the code that a replacement stands for: its
fingerprint is a hash of the source without comments, docstrings and annotations.
"""

import ast
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

# The tests ran on 5.17, 5.23 and 5.24; the releases between have the code of the one or the other.
FIRST, LAST = (5, 17), (5, 24)

_LEFT_ASIDE = ("annotation", "returns", "decorator_list", "ctx", "kind", "type_comment", "simple")


def check_version(version: str) -> None:
    """Raises unless the version of transformers is one that was tried.

    Raises:
        RuntimeError: It is older or newer.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is not None and FIRST <= (int(found[1]), int(found[2])) <= LAST:
        return
    first, last = (".".join(map(str, bound)) for bound in (FIRST, LAST))
    raise RuntimeError(
        f"transformers: expected {first} to {last}, got {version}. Install one of those, or a "
        "newer cdetr_fast; its own ConditionalDetr classes work without transformers"
    )


@functools.cache
def fingerprint(*parts: Any) -> str:
    """Returns a hash of the source of functions, and of classes' methods; one for all Pythons."""
    digest = hashlib.sha256()
    for function in (function for part in parts for function in _functions(part)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        digest.update(repr(_bare(tree)).encode())
    return digest.hexdigest()[:12]


def _functions(part: Any) -> list[Callable]:
    if not inspect.isclass(part):
        return [inspect.unwrap(part)]
    members = (getattr(member, "__func__", member) for _, member in sorted(vars(part).items()))
    return [inspect.unwrap(member) for member in members if inspect.isfunction(member)]


def check_structure(name: str, parts: dict[str, Any], known: tuple[str, ...]) -> None:
    """Raises if the code behind a technique is not that of a supported version.

    Where no source is at hand (a frozen application) the version has to do.

    Args:
        name: The switch of the technique.
        parts: Functions and classes of transformers by their names.
        known: Fingerprints of them.

    Raises:
        RuntimeError: The fingerprint is another.
    """
    try:
        found = fingerprint(*parts.values())
    except OSError:
        return
    if found not in known:
        raise RuntimeError(
            f"transformers: expected the code of a release in {', '.join(parts)}, got other code "
            f"({found}). Install a release of transformers, or leave it alone with {name}=False"
        )


def check_signature(name: str, original: Callable, replacement: Callable) -> None:
    """Raises unless a function takes the parameters that its replacement takes.

    Raises:
        RuntimeError: Their names or kinds differ.
    """
    wanted = _parameters(inspect.unwrap(original))
    # transformers itself wraps the `forward` of layers, so a replacement may be a wrapper, too.
    taken = _parameters(inspect.unwrap(replacement, stop=lambda f: f.__wrapped__ is original))
    if wanted != taken:
        raise RuntimeError(
            f"transformers: expected {name}({', '.join(taken)}), got {name}({', '.join(wanted)}). "
            "Install a release of transformers"
        )


def _parameters(function: Callable) -> list[str]:
    marks = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    return [marks.get(parameter.kind, "") + parameter.name for parameter in parameters]


def _bare(node: Any) -> Any:
    """A syntax tree as tuples, without what does not change what the code does."""
    if isinstance(node, list):
        return [_bare(item) for item in node if not _is_docstring(item)]
    if not isinstance(node, ast.AST):
        return node
    fields = [value for name, value in ast.iter_fields(node) if name not in _LEFT_ASIDE]
    return (type(node).__name__, *(_bare(value) for value in fields if value not in (None, [])))


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
