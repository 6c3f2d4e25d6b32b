"""Records of engines: what `cdetr-fast benchmark` has measured on this machine.

A record is a JSON file in the user's cache. It holds for one processor, number of threads, versions
of torch and OpenVINO, and state of this package's sources; a record of something else, or one that
cannot be read, is ignored, with a reason.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.common.files import write_text
from cdetr_fast.common.machine import installed_version, processor_name
from cdetr_fast.common.validation import first_problem
from cdetr_kernels import dispatch, evidence, native
from cdetr_kernels.qualification.store import locked

FORMAT = 1
RIGHT = "right"
"""The verdict of an engine that "auto" may take; every other one says what is wrong."""

Engine = Literal["torch", "openvino"]
Precision = Literal["fp32", "bf16", "int8", "int8-bf16"]
DEFAULT: Engine = "torch"

_PACKAGE = Path(__file__).parents[1]
_ADVICE = "run cdetr-fast benchmark"


@dataclasses.dataclass(frozen=True)
class Machine:
    """Key of a record: machine, versions and sources that it holds for.

    Attributes:
        processor: Name of the CPU.
        instructions: Those that decide which code runs.
        kernels: State of the extension, and the backend that `CDETR_FAST_BACKEND` names.
        threads: Of an operation.
        torch: Version.
        openvino: Version; None if it is not installed.
        nncf: Version; None if it is not installed.
        sources: Hash of this package's inference, models and kernels.
    """

    processor: str
    instructions: str
    kernels: str
    threads: int
    torch: str
    openvino: str | None
    nncf: str | None
    sources: str

    @property
    def file(self) -> Path:
        """The file of the record."""
        digest = hashlib.sha256(json.dumps(dataclasses.asdict(self)).encode()).hexdigest()
        return folder() / f"cpu-{digest[:12]}.json"

    def difference(self, other: "Machine") -> str:
        """Return in which parts another machine differs."""
        mine, others = dataclasses.asdict(self), dataclasses.asdict(other)
        return ", ".join(
            f"{name} {others[name]} instead of {mine[name]}"
            for name in mine
            if mine[name] != others[name]
        )


@dataclasses.dataclass(frozen=True)
class Finding:
    """Result of one engine, for one model, precision and shape.

    Attributes:
        model: From `architecture`.
        precision: Of the whole model; or int8, and that of the rest if it is not fp32.
        shape: Of the images, as `Shape` writes it.
        engine: Name of the engine.
        verdict: `RIGHT`, or what is wrong.
        ms: Median time of a call in milliseconds; None if the engine did not run.
        min_ms: The fastest call.
        logits_error: Error against the model in fp32, relative to the norm.
        boxes_error: Likewise, of the boxes.
        date: When it was found.
    """

    model: str
    precision: Precision
    shape: str
    engine: Engine
    verdict: str
    ms: float | None = None
    min_ms: float | None = None
    logits_error: float | None = None
    boxes_error: float | None = None
    date: str = ""

    @property
    def work(self) -> tuple[str, str, str]:
        """Model, precision and shape."""
        return self.model, self.precision, self.shape


@dataclasses.dataclass(frozen=True)
class Record:
    """Content of a file."""

    format: int
    machine: Machine
    findings: tuple[Finding, ...]


class Choice(NamedTuple):
    """An engine, and why it was chosen."""

    engine: Engine
    reason: str


def folder() -> Path:
    """Return the folder of the user's records."""
    return evidence.user_folder().with_name("engines")


def machine() -> Machine:
    """Return what a record has to hold for to be used by this process."""
    return Machine(
        processor_name(),
        _instructions(),
        _kernels(),
        torch.get_num_threads(),
        str(torch.__version__),
        installed_version("openvino"),
        installed_version("nncf"),
        _sources_hash(),
    )


def architecture(model: nn.Module) -> str:
    """Return what decides how long a model takes, as a line; weights and classes do not.

    Args:
        model: One of this package's models.
    """
    config: Any = model.config
    backbone = config.backbone_config
    name = getattr(backbone, "backbone", None) or backbone.model_type
    parts = [
        f"{path} {part!r}"
        for path, part in model.named_modules()
        if not list(part.children()) and "class_labels_classifier" not in path
    ]
    heads = config.encoder_attention_heads, config.decoder_attention_heads
    digest = hashlib.sha256(json.dumps([parts, heads]).encode()).hexdigest()
    return (
        f"{name}, {config.encoder_layers} + {config.decoder_layers} layers, "
        f"{config.num_queries} queries ({digest[:8]})"
    )


def read(wanted: Machine) -> tuple[tuple[Finding, ...], str]:
    """Return the findings on a machine and their file, or none and why."""
    try:
        path = wanted.file
        if path.is_file():
            return _parse(path, wanted).findings, str(path)
        stale = max(folder().glob("cpu-*.json"), key=lambda x: x.stat().st_mtime, default=None)
        if stale is not None:
            _parse(stale, wanted)
    except (OSError, ValueError) as error:
        return (), first_line(error)
    return (), f"there is no record of this machine; {_ADVICE}"


def _parse(path: Path, wanted: Machine) -> Record:
    """Read a file; raise ValueError or OSError with the reason why it cannot be used."""
    from pydantic import TypeAdapter, ValidationError

    text = path.read_text(encoding="utf-8")
    try:
        record = TypeAdapter(Record).validate_json(text)
    except ValidationError as error:
        try:
            content = json.loads(text)
        except ValueError as invalid:
            raise ValueError(f"{path}: cannot be read ({invalid})") from error
        problem = first_problem(error, Record, content)
        raise ValueError(problem.line(f"{path}")) from error
    if record.format != FORMAT:
        raise ValueError(f"{path}: has format {record.format}, expected {FORMAT}")
    if record.machine != wanted:
        difference = wanted.difference(record.machine)
        raise ValueError(f"{path}: is about {difference}; {_ADVICE} again")
    return record


def write(wanted: Machine, findings: Iterable[Finding]) -> Path:
    """Add findings to the record of a machine; return the file.

    Older findings about the same work are replaced.

    Raises:
        OSError: The folder cannot be written.
    """
    findings = tuple(findings)
    path = wanted.file
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.with_suffix(".lock"), seconds=60.0):
        known: tuple[Finding, ...] = ()
        with contextlib.suppress(OSError, ValueError):  # nothing, or nothing that can be used
            known = _parse(path, wanted).findings
        works = {finding.work for finding in findings}
        kept = (finding for finding in known if finding.work not in works)
        record = Record(FORMAT, wanted, (*kept, *findings))
        write_text(path, json.dumps(dataclasses.asdict(record), indent=1) + "\n")
    return path


def choose(model: str, precision: str) -> Choice:
    """Return the engine that the record of this machine speaks for.

    It is OpenVINO if that was right for every shape that was measured, and faster over all of them
    (geometric mean).

    Args:
        model: From `architecture`.
        precision: As in `Finding`.
    """
    findings, source = read(machine())
    if not findings:
        return Choice(DEFAULT, source)
    return choices(findings).get(
        (model, precision),
        Choice(DEFAULT, f"nothing is recorded of {model} in {precision}; {_ADVICE}"),
    )


def choices(findings: Iterable[Finding]) -> dict[tuple[str, str], Choice]:
    """Return the choice of each model and precision that findings are about."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.model, finding.precision), []).append(finding)
    return {work: _choice(group) for work, group in groups.items()}


def _choice(findings: list[Finding]) -> Choice:
    """Choose for one model and precision."""
    default = {x.shape: x for x in findings if x.engine == DEFAULT}
    others = [x for x in findings if x.engine != DEFAULT]
    if not others:
        return Choice(DEFAULT, f"no other engine was measured; {_ADVICE} with openvino installed")
    ratios, figures = [], []
    for other in others:
        its = default.get(other.shape)
        if other.verdict != RIGHT:
            return Choice(
                DEFAULT, f"{other.engine} at {other.shape}: {other.verdict} ({other.date})"
            )
        if its is None or not its.ms or not other.ms:
            return Choice(DEFAULT, f"{other.shape} has not two times to compare; {_ADVICE}")
        ratios.append(its.ms / other.ms)
        figures.append(
            f"{other.engine} takes {other.ms:.3g} ms, {DEFAULT} {its.ms:.3g} ms at {other.shape} "
            f"({other.date})"
        )
    is_faster = math.prod(ratios) > 1
    return Choice(others[0].engine if is_faster else DEFAULT, "; ".join(figures))


@functools.cache
def _sources_hash() -> str:
    digest = hashlib.sha256()
    digest.update(evidence.sources_hash().encode())
    for path in (
        *sorted(_PACKAGE.glob("inference/*.py")),
        *sorted(_PACKAGE.glob("models/*.py")),
        *native.FOLDER.glob("_native_cpu.so"),
    ):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _instructions() -> str:
    has = {
        "vnni": torch.cpu._is_vnni_supported,
        "bf16": torch.cpu._is_avx512_bf16_supported,
        "amx": torch.cpu._is_amx_tile_supported,
    }
    parts = [torch.backends.cpu.get_cpu_capability(), *(name for name in has if has[name]())]
    if limit := os.environ.get("ONEDNN_MAX_CPU_ISA"):
        parts.append(f"oneDNN at most {limit}")
    return ", ".join(parts)


def _kernels() -> str:
    state = "without" if native.UNAVAILABLE["cpu"] else "with"
    return f"{state} the C++ extension, backend {dispatch.PREFERRED}"
