"""Checks that transformers is one whose functions `patch_transformers()` knows to replace.

The version has to be supported, and so has the code that a replacement stands for: its fingerprint
is a hash of the source without comments, docstrings and annotations.
"""

import ast
import functools
import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

# The tests ran on 5.17, 5.23 and 5.24; the releases between have the code of one of these.
FIRST, LAST = (5, 17), (5, 24)

_WITHOUT_EFFECT = (
    "annotation",
    "returns",
    "decorator_list",
    "ctx",
    "kind",
    "type_comment",
    "simple",
)


def check_version(version: str) -> None:
    """Check that the version of transformers is supported.

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
    """Return a hash of the source of functions and of classes' methods, the same on all Pythons."""
    digest = hashlib.sha256()
    for function in (function for part in parts for function in _functions(part)):
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        digest.update(repr(_bare(tree)).encode())
    return digest.hexdigest()[:12]


def _functions(part: Any) -> list[Function]:
    if not inspect.isclass(part):
        return [inspect.unwrap(part)]
    members = (getattr(member, "__func__", member) for _, member in sorted(vars(part).items()))
    return [inspect.unwrap(member) for member in members if inspect.isfunction(member)]


def check_structure(name: str, parts: dict[str, Any], known: tuple[str, ...]) -> None:
    """Check that the code behind a technique is that of a supported version.

    Where the source is not available (a frozen application) the version has to suffice.

    Args:
        name: The switch of the technique.
        parts: Functions and classes of transformers by name.
        known: Their fingerprints in the supported versions.

    Raises:
        RuntimeError: The fingerprint is none of these.
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


def check_signature(name: str, original: Function, replacement: Function) -> None:
    """Check that a function takes the parameters that its replacement takes.

    Raises:
        RuntimeError: Their names or kinds differ.
    """
    wanted = _parameters(inspect.unwrap(original))
    # transformers itself wraps the `forward` of layers, so a replacement may be a wrapper too.
    unwrapped = inspect.unwrap(
        replacement, stop=lambda f: getattr(f, "__wrapped__", None) is original
    )
    taken = _parameters(unwrapped)
    if wanted != taken:
        raise RuntimeError(
            f"transformers: expected {name}({', '.join(taken)}), got {name}({', '.join(wanted)}). "
            "Install a release of transformers"
        )


def _parameters(function: Function) -> list[str]:
    signature = inspect.signature(function, follow_wrapped=False)
    return [
        str(x.replace(annotation=x.empty, default=x.empty)) for x in signature.parameters.values()
    ]


def _bare(node: Any) -> Any:
    """Return a syntax tree as tuples, without fields that do not change what the code does."""
    if isinstance(node, list):
        return [_bare(item) for item in node if not _is_docstring(item)]
    if not isinstance(node, ast.AST):
        return node
    fields = [value for name, value in ast.iter_fields(node) if name not in _WITHOUT_EFFECT]
    return (type(node).__name__, *(_bare(value) for value in fields if value not in (None, [])))


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )
