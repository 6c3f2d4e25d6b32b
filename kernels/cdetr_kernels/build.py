"""Build of the extension's C++ and CUDA parts, for `setup.py` and `cdetr-fast build-native`.

Each part is one shared library on torch's stable ABI, made by one call of a compiler: it serves
every torch from `OLDEST_TORCH` on and any Python. Nothing is downloaded, and no GPU is asked.

CDETR_FAST_NATIVE      auto (default): parts with a compiler; 0: nothing; 1: the C++ part at
                       least, or an error
TORCH_CUDA_ARCH_LIST   architectures of the CUDA part, as in torch: "8.0;9.0+PTX"
CXX, CUDA_HOME         the compilers, if not the usual ones
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

OLDEST_TORCH = (2, 11)
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG"]
PARTS = {"cpu": "C++", "cuda": "CUDA"}
_FOLDER = Path(__file__).resolve().parent


class BuildError(RuntimeError):
    """A part cannot be built; the message says why."""


def mode() -> str:
    """Return what CDETR_FAST_NATIVE asks for.

    Raises:
        BuildError: It is none of auto, 0 and 1.
    """
    value = os.environ.get("CDETR_FAST_NATIVE", "auto")
    if value not in ("auto", "0", "1"):
        raise BuildError(f"CDETR_FAST_NATIVE: expected auto, 0 or 1, got {value!r}")
    return value


def build(folder: Path = _FOLDER, say: Callable[[str], object] = print) -> list[str]:
    """Build what CDETR_FAST_NATIVE asks for.

    Args:
        folder: Where the libraries go.
        say: Takes a line about each part.

    Returns:
        The parts that were built.

    Raises:
        BuildError: CDETR_FAST_NATIVE=1 and the C++ part cannot be built, or a compiler that is
            there fails under it.
    """
    wanted = mode()
    if wanted == "0":
        return []
    built = []
    for part, name in PARTS.items():
        start = time.perf_counter()
        try:
            file = build_part(part, folder)
        except BuildError as error:
            if wanted == "1" and part == "cpu":
                raise
            say(f"cdetr-fast: without the {name} part of the extension: {error}")
            if part == "cpu":  # what the CUDA part needs too: torch's headers, a C++ compiler
                break
        else:
            say(f"cdetr-fast: built {file.name} in {time.perf_counter() - start:.0f} s")
            built.append(part)
    return built


def build_part(part: str, folder: Path) -> Path:
    """Build one part, "cpu" or "cuda", into a folder and return the library.

    Beside the CUDA library is ptxas's report on each kernel: registers, shared memory, spills.

    Raises:
        BuildError: A compiler, torch or the sources are missing, or the compiler fails.
    """
    target = folder / f"_native_{part}.so"
    # A name of this process: several may build at once.
    partial = folder / f"_native_{part}.{os.getpid()}.partial.so"
    try:
        output = _run([*command(part), "-o", str(partial)])
        os.replace(partial, target)  # a process that has loaded the old one keeps it
    finally:
        partial.unlink(missing_ok=True)
    if part == "cuda":
        target.with_suffix(".txt").write_text(output, encoding="utf-8")
    return target


def command(part: str) -> list[str]:
    """Return the compiler's command line of one part, without the output file."""
    sources = source_folder()
    torch_folder = _torch_folder()
    major, minor = OLDEST_TORCH
    torch_flags = [
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        "-isystem",
        str(torch_folder / "include"),
    ]
    libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    compiler = cxx()
    if part == "cpu":
        own = ["-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
        return [
            *compiler,
            *FLAGS,
            *own,
            *torch_flags,
            str(sources / "bindings_cpu.cpp"),
            *libraries,
        ]
    if not (torch_folder / "lib" / "libtorch_cuda.so").is_file():
        raise BuildError("this torch is built without CUDA")
    return [
        *nvcc(),
        *FLAGS,
        *["-ccbin", compiler[0], "-Xcompiler", "-fPIC,-fvisibility=hidden", "-shared"],
        *["--threads", str(min(os.cpu_count() or 1, len(ARCHITECTURES))), "-Xptxas", "-v"],
        *[f"-gencode={code}" for code in architectures()],
        *torch_flags,
        str(sources / "detection_topk.cu"),
        str(sources / "bindings_cuda.cpp"),
        *libraries,
        "-ltorch_cuda",
    ]


def source_folder() -> Path:
    """Return csrc: of the checkout, or the copy in an installed package."""
    for folder in (_FOLDER.parents[1] / "csrc", _FOLDER / "csrc"):
        if (folder / "bindings_cpu.cpp").is_file():
            return folder
    raise BuildError("the sources (csrc) are missing from this installation")


def cxx() -> list[str]:
    """Return the C++ compiler."""
    if "CXX" in os.environ:
        return shlex.split(os.environ["CXX"])
    found = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        raise BuildError("no C++ compiler (g++ or clang++) is on the PATH")
    return [found]


def nvcc() -> list[str]:
    """Return CUDA's compiler: that of CUDA_HOME if it is set, else that of the PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    path = f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin"
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else path)
    if found is None:
        raise BuildError(f"no nvcc {f'in {home}/bin' if home else 'on the PATH'}")
    return [found]


def architectures() -> list[str]:
    """Return nvcc's code-generation arguments: TORCH_CUDA_ARCH_LIST, or all that it knows of ours.

    The newest also comes as PTX, which later GPUs compile when they load it.
    """
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if asked:
        codes = []
        for item in asked:
            match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", item)
            if match is None:
                raise BuildError(
                    f'TORCH_CUDA_ARCH_LIST: expected the form "8.0;9.0+PTX", got {item!r}'
                )
            number = "".join(match.group(1, 2, 3))
            codes += _codes(number, ptx=match[4] is not None)
        return codes
    known = set(re.findall(r"compute_(\d+)\b", _run([*nvcc(), "--list-gpu-arch"])))
    numbers = [str(number) for number in ARCHITECTURES if str(number) in known]
    return [code for n in numbers for code in _codes(n, ptx=n == numbers[-1])]


def _codes(number: str, ptx: bool) -> list[str]:
    codes = [f"arch=compute_{number},code=sm_{number}"]
    return [*codes, f"arch=compute_{number},code=compute_{number}"] if ptx else codes


def _torch_folder() -> Path:
    try:
        import torch
    except ImportError:
        raise BuildError(
            "torch cannot be imported here (pip builds in an environment of its own): "
            "run `cdetr-fast build-native` after the installation"
        ) from None
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise BuildError(f"torch {oldest} or newer is needed, this is {torch.__version__}")
    return Path(torch.__file__).parent


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{command[0]}: {error}") from None
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)} failed:\n{output[-4000:]}")
    return output


def main() -> int:
    """Build in place; 1 if CDETR_FAST_NATIVE asks for what cannot be built."""
    try:
        build()
    except BuildError as error:
        print(f"cdetr-fast: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
