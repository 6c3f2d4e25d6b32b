"""Evidence of what kernels do on a device: records of qualifications, and what follows from them.

A record is a JSON file in the user's cache, written by `cdetr_kernels.qualify` on the machine, or
one that ships with the package. It holds for one GPU, driver, torch, triton and state of the
kernels' sources; a file with another key, or one that cannot be read, is ignored, with a reason.

The evidence of a device is read at the first call that asks for it, and then fixed for the
process: the numerics of a run never change in the middle of it.
"""

import functools
import hashlib
import importlib.util
import json
import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

FORMAT = 2
FORWARD, BACKWARD = MODES = "forward", "forward and backward"
Choice = tuple[int, int, int, int, int, int]
"""A tile of attention: rows of queries and of keys, warps, stages, `fill` and `depth` of parts."""
RIGHT = "right"
"""The verdict of a kernel that may be dispatched to; every other one says what is wrong."""

LOGGER = logging.getLogger("cdetr_kernels")
_PACKAGE = Path(__file__).parent
SHIPPED = _PACKAGE / "records"


class RecordError(Exception):
    """A record that cannot be used, with the reason."""


@dataclass(frozen=True)
class Key:
    """Machine, versions and sources that a record holds for.

    Args:
        device: Name of the GPU.
        capability: Compute capability, or the name of the architecture (AMD).
        driver: Version of the driver.
        torch: Version of torch.
        triton: Version of triton.
        sources: Hash of the kernels' sources.
    """

    device: str
    capability: str
    driver: str
    torch: str
    triton: str
    sources: str

    @property
    def slug(self) -> str:
        """Return the device's name as a part of a file's name."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    @property
    def file_name(self) -> str:
        """Return the name of the file of the record."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return f"{self.slug}-{digest[:12]}.json"

    def difference(self, other: "Key") -> str:
        """Return in which parts two keys differ."""
        mine, others = asdict(self), asdict(other)
        return ", ".join(
            f"{name} {others[name]} instead of {mine[name]}"
            for name in mine
            if mine[name] != others[name]
        )


@dataclass(frozen=True)
class Finding:
    """One finding about a path of an operator, for one kind of calls.

    Args:
        operator: Name of the operator.
        path: Name of the backend.
        dtype: Of the first tensor, as "bfloat16".
        calls: Class of the calls, as `Operator.classify` returns it without the dtype.
        mode: Of `MODES`.
        verdict: `RIGHT`, or what is wrong.
        reason: Details of the verdict.
        ms: Time of the path in milliseconds.
        torch_ms: Time of the path "torch".
        label: Sizes that were measured, for the reader.
        level: Level of the qualification.
        date: When it was found.
    """

    operator: str
    path: str
    dtype: str
    calls: tuple[int | bool | str, ...]
    mode: str
    verdict: str
    reason: str = ""
    ms: float | None = None
    torch_ms: float | None = None
    label: str = ""
    level: str = "quick"
    date: str = ""

    @property
    def speed_up(self) -> float | None:
        """Return how many times as fast as "torch" the path is, None where it was not timed."""
        return None if not self.ms or not self.torch_ms else self.torch_ms / self.ms

    @property
    def is_taken(self) -> bool:
        """Return whether "auto" may take the path: right, and faster than torch's."""
        speed_up = self.speed_up
        return self.verdict == RIGHT and speed_up is not None and speed_up > 1.0


@dataclass(frozen=True)
class Record:
    """The findings on one device, and the tiles that were fastest there.

    Args:
        key: What it holds for.
        findings: Each once.
        tiles: Those of attention's kernels, by "precision width kernel", and with
            `gpu.configurations.MANY` at the end for calls with many rows.
    """

    key: Key
    findings: tuple[Finding, ...] = ()
    tiles: Mapping[str, Choice] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the text of the file."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps(content, indent=1) + "\n"

    def updated(self, other: "Record") -> "Record":
        """Return this record, with what another one knows about the operators that it has."""
        known = {finding.operator for finding in other.findings}
        kept = tuple(x for x in self.findings if x.operator not in known)
        # Findings hold with the tiles that they were made with.
        tiles = {name: x for name, x in self.tiles.items() if operator_of_tile(name) not in known}
        return replace(self, findings=(*kept, *other.findings), tiles={**tiles, **other.tiles})


def operator_of_tile(name: str) -> str:
    """Return the operator whose kernel a tile of a record is for."""
    return f"conditional_attention{'_separable' * (' separable_' in name)}"


def parse(text: str) -> Record:
    """Return the record that a file's text holds.

    Raises:
        RecordError: It is not a record of this format.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise RecordError(f"has format {content['format']}, expected {FORMAT}")
        findings = tuple(
            Finding(**{**row, "calls": tuple(row["calls"])}) for row in content["findings"]
        )
        tiles = {name: _tile(sizes) for name, sizes in content["tiles"].items()}
        for finding in findings:
            _check_figures(finding)
        return Record(Key(**content["key"]), findings, tiles)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"cannot be read ({type(error).__name__}: {error})") from error


def _tile(numbers: Any) -> Choice:
    queries, keys, warps, stages, fill, depth = map(int, numbers)
    return queries, keys, warps, stages, fill, depth


def _check_figures(finding: Finding) -> None:
    is_dtype = isinstance(getattr(torch, finding.dtype, None), torch.dtype)
    if not is_dtype or finding.mode not in MODES:
        raise ValueError(f"dtype {finding.dtype!r}, mode {finding.mode!r}")
    for figure in (finding.ms, finding.torch_ms):
        if figure is not None and not isinstance(figure, int | float):
            raise TypeError(f"a time of {figure!r}")
    hash(finding.calls)


def user_folder() -> Path:
    """Return the folder of the user's records.

    Raises:
        OSError: It would be in a home folder that the user does not have.
    """
    own = os.environ.get("CDETR_FAST_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME")
    try:
        if own:
            return Path(own).expanduser() / "records"
        base = Path(shared) if shared and os.path.isabs(shared) else Path.home() / ".cache"
    except RuntimeError as error:  # as in a container with a user that has no name
        raise OSError(
            "there is no home folder for records (CDETR_FAST_CACHE names another one)"
        ) from error
    return base / "cdetr_fast" / "records"


def read(path: Path, expected: Key) -> Record:
    """Return the record in a file.

    Raises:
        RecordError: It cannot be read, or is not about what is expected.
    """
    try:
        record = parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read ({error})") from error
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error
    if record.key != expected:
        raise RecordError(f"{path}: is about {expected.difference(record.key)}")
    return record


def find(expected: Key) -> tuple[Record | None, str]:
    """Return the record of a key and its file, or None and why no file can be used."""
    reasons = []
    for find_folder in (user_folder, lambda: SHIPPED):
        try:
            folder = find_folder()
            path = folder / expected.file_name
            if path.is_file():
                return read(path, expected), str(path)
            stale = _latest(folder, expected.slug)
        except (RecordError, OSError) as error:
            reasons.append(str(error))
            continue
        if stale is not None:
            try:
                read(stale, expected)
            except RecordError as error:
                reasons.append(str(error))
    return None, "; ".join(reasons) or "there is no record of this device"


def _latest(folder: Path, slug: str) -> Path | None:
    """Return the newest record of a device, whatever else it is about."""
    pattern = re.compile(rf"{re.escape(slug)}-[0-9a-f]{{12}}\.json")
    files = [x for x in folder.glob(f"{slug}-*.json") if pattern.fullmatch(x.name)]
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def key(device: torch.device) -> Key:
    """Return what a record about a device has to hold for; a CPU stands for the interpreter."""
    name, capability, driver = "triton's interpreter", "-", "-"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, driver = properties.name, _driver()
        capability = f"{properties.major}.{properties.minor}"
        if torch.version.hip:
            capability = properties.gcnArchName
    version = str(torch.__version__)
    return Key(name, capability, driver, version, _triton_version(), sources_hash())


@functools.cache
def sources_hash() -> str:
    """Return a hash of the kernels, their launchers, references and cases."""
    digest = hashlib.sha256()
    files = [*_PACKAGE.glob("gpu/*.py"), *_PACKAGE.glob("ops/*/*.py")]
    for path in (*sorted(files), _PACKAGE / "_native_cuda.so"):
        if path.is_file():
            digest.update(path.relative_to(_PACKAGE).as_posix().encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache
def _triton_version() -> str:
    """Read it from the package, whatever its distribution is called, without importing it."""
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        return "-"
    text = Path(found.origin).read_text(encoding="utf-8")
    version = re.search(r"__version__ = ['\"]([^'\"]+)", text)
    return version[1] if version else "unknown"


@functools.cache
def _driver() -> str:
    """Return the version of the driver, or that of the CUDA it was made for."""
    if torch.version.hip:
        module = Path("/sys/module/amdgpu/version")
        return module.read_text().strip() if module.is_file() else f"ROCm {torch.version.hip}"
    file = Path("/proc/driver/nvidia/version")
    if file.is_file() and (found := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", file.read_text())):
        return found[0]
    number: int = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined] # not in its stubs
    return f"CUDA {number}"


# ---------------------------------------------------------------------------- of this process


@dataclass(frozen=True)
class Evidence:
    """The record that this process goes by on a device.

    Args:
        record: The record, if there is one.
        source: Its file, or why there is none.
    """

    record: Record | None
    source: str

    def taken(self, operator: str) -> dict[tuple[Any, ...], Finding]:
        """Return the fastest path that may be taken, by mode, dtype and class of calls."""
        found: dict[tuple[Any, ...], Finding] = {}
        for x in self.findings(operator):
            call = (x.mode == BACKWARD, getattr(torch, x.dtype), x.calls)
            best = found.get(call)
            if x.is_taken and (best is None or (x.ms or 0.0) < (best.ms or 0.0)):
                found[call] = x
        return found

    def findings(self, operator: str) -> list[Finding]:
        """Return what was found about an operator."""
        return [x for x in (self.record.findings if self.record else ()) if x.operator == operator]

    def constant(self, operator: str, dtype: torch.dtype, backward: bool) -> str | None:
        """Return the path for calls of any size: right in all that were tried, and faster overall.

        torch.compile and torch.export take it, as a graph has one path whatever the sizes are.
        """
        mode, name = MODES[backward], str(dtype).removeprefix("torch.")
        rows = [x for x in self.findings(operator) if (x.dtype, x.mode) == (name, mode)]
        best: tuple[float, str] | None = None
        for path in dict.fromkeys(x.path for x in rows):
            own = [x for x in rows if x.path == path]
            ratios = [x.speed_up for x in own if x.verdict == RIGHT and x.speed_up]
            if len(ratios) == len(own):
                overall = functools.reduce(lambda a, b: a * b, ratios, 1.0) ** (1 / len(ratios))
                if overall > 1.0 and (best is None or overall > best[0]):
                    best = overall, path
        return best and best[1]


_FIXED: dict[int, Evidence] = {}
_LOCK = threading.Lock()
_SAID: set[str] = set()


def of(device: torch.device) -> Evidence:
    """Return the evidence of a device, read at the first call of this process."""
    index = _index(device)
    found = _FIXED.get(index)
    if found is None:
        with _LOCK:
            found = _FIXED.get(index)
            if found is None:
                found = _FIXED[index] = _read(device)
    return found


def _read(device: torch.device) -> Evidence:
    if device.type == "cuda" and not torch.cuda.is_available():  # tensors without memory
        return Evidence(None, "torch sees no GPU")
    return Evidence(*find(key(device)))


def peek(device: torch.device) -> Evidence:
    """Return the evidence of a device without fixing it for the process."""
    return _FIXED.get(_index(device)) or _read(device)


def is_fixed(device: torch.device) -> bool:
    """Return whether a call of this process has fixed the evidence of a device."""
    return _index(device) in _FIXED


def fix(device: torch.device, evidence: Evidence) -> None:
    """Make this process use this evidence instead of the files'; before its first call."""
    _FIXED[_index(device)] = evidence


def say_once(line: str) -> None:
    """Log a line, once in this process."""
    if line not in _SAID:
        _SAID.add(line)
        LOGGER.warning(line)


def _index(device: torch.device) -> int:
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index
