"""Build of the operators as a kernel of the Hugging Face Hub: `python kernels/hub/build.py FOLDER`.

The `kernels` library loads the folder (`kernels.get_local_kernel(Path(FOLDER))`), or a repository
with these files, whatever else is installed: imports inside it are relative, and its operators are
in a namespace of torch of their own, which a hash of the sources names. It is Python alone, so it
is one build for all machines; the operators written in C++ and CUDA run in PyTorch there.
"""

import argparse
import ast
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

HUB = Path(__file__).parent
PACKAGE = HUB.parent / "cdetr_kernels"
NAME = "cdetr-kernels"
# Of the kernel's interface. 0 is what the Hub's convention calls a kernel that may still change.
VERSION = 0
# Compiling C++ is not for a folder that is loaded as it is.
LEFT_OUT = ("build.py",)

TOP = '''\
"""The operators of Conditional DETR, and layers for transformers' model."""

from .cdetr_kernels import *
from .cdetr_kernels import __all__ as _operators
from .cdetr_kernels import layers

__all__ = [*_operators, "layers"]
'''


def build(folder: Path) -> Path:
    """Write the kernel's repository into a folder; return it.

    Args:
        folder: Where to; it must not exist, or be empty.

    Raises:
        FileExistsError: There is something in the folder.
        ValueError: A module imports the package in a way that cannot be made relative.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder")
    sources = _sources()
    digest = hashlib.sha256()
    for path, text in sources.items():
        digest.update(f"{path}\0{text}\0".encode())
    namespace = f"_{NAME.replace('-', '_')}_universal_{digest.hexdigest()[:12]}"
    variant = folder / "build" / "torch-universal"
    files = {Path("__init__.py"): TOP}
    for path, text in sources.items():
        files["cdetr_kernels" / path] = _relocated(text, path, namespace)
    for path, text in files.items():
        (variant / path).parent.mkdir(parents=True, exist_ok=True)
        (variant / path).write_text(text, "utf-8")
    metadata = {
        "id": namespace,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        # No type stands for all; machines are chosen by the name of the folder.
        "backend": {"type": "cuda"},
        "digest": {
            "algorithm": "sha256",
            "files": {path.as_posix(): _base64(text) for path, text in files.items()},
        },
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")
    shutil.copy(HUB / "README.md", folder)
    return folder


def _sources() -> dict[Path, str]:
    """Return the modules by their path in the package, the layers among them."""
    found = {
        path.relative_to(PACKAGE): path.read_text("utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name not in LEFT_OUT
    }
    return found | {Path("layers.py"): (HUB / "layers.py").read_text("utf-8")}


def _relocated(text: str, path: Path, namespace: str) -> str:
    """Return a module with relative imports, and its operators in another namespace of torch."""
    root = "." * len(path.parts)
    text = re.sub(r"(?m)^(\s*from )cdetr_kernels\.(?=\w)", rf"\g<1>{root}", text)
    text = re.sub(r"(?m)^(\s*from )cdetr_kernels(?= import)", rf"\g<1>{root}", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [x.name for x in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        else:
            continue
        if any(x.partition(".")[0] == PACKAGE.name for x in names):
            raise ValueError(f"{path}:{node.lineno}: write `from {PACKAGE.name}... import ...`")
    return re.sub(r'\bcdetr_fast(?=::)|(?<=torch\.ops\.)cdetr_fast\b|(?<=Library\(")cdetr_fast\b',
                  namespace, text)  # fmt: skip


def _base64(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to; it must not exist, or be empty")
    print(build(parser.parse_args().folder))
