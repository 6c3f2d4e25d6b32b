"""Growth of time and peak memory with image size, batch, queries, targets, threads and processes.

    python -m benchmarks growth --axis size --output cpu_growth_size
    python -m benchmarks growth --axis batch --values 1 2 4 --only optimize

One axis grows, the rest stays. transformers (sdpa), `optimize(model)` and OpenVINO, which gets
transformers' model exported with open sizes, run in turns in fp32. Peak memory is that of a process
for each of them beyond what it has with its model at rest. What would not fit into memory is not
tried: its row says so.

The axis "queries" has two more works that depend on them, the mask head and the way from outputs to
detections; "targets" is matching and loss with their gradients, of 6 layers and 8 images.

"workers" are processes with a thread each that turn JPEG files into boxes, each with a model of its
own, or forked from one that has it. Their memory is that of a process, on average: RSS, PSS, and
PSS without files, in which weights that are shared count once.

`python -m benchmarks.report` fits the exponents.
"""

import argparse
import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import cdetr_fast
from benchmarks import workers
from benchmarks.case import Case, GateFailed, Within
from benchmarks.exported import on_openvino, require
from benchmarks.inputs import ERRORS, model_pair, output_errors, random_images
from benchmarks.memory import available_mib, peaks_mib_of_process
from benchmarks.suite import loss, mask_head, topk

TRANSFORMERS, OURS, OPENVINO = "transformers sdpa", "optimize(cdetr_fast)", "OpenVINO"
AXES: dict[str, tuple[int, ...]] = {
    "size": (320, 480, 640, 800, 1120, 1600),
    "batch": (1, 2, 4, 8, 16, 32),
    "queries": (100, 200, 300, 600, 900),
    "targets": (1, 3, 10, 30, 100, 300),
    "threads": (1, 2),
    "workers": (1, 2),
}
"""Values of each axis."""
MOST = 0.8
"""Share of the memory that is available, which the processes may take."""
MASK_SIZE = (160, 208)
BATCH = 8
"""Images whose outputs become detections, or are matched with targets."""
CAUTION = 1.25
"""Factor on the memory that is expected of the next value."""

Shape = tuple[int, int, int]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--axis", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--values", nargs="+", type=int, help="of the axis, instead of its own")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and the decoder")
    parser.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="instead of that of the axis"
    )
    parser.add_argument("--images", type=int, default=3, help="of each worker in a timed call")
    parser.add_argument(
        "--only", default="", metavar="REGEX", help="works and providers to measure"
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help=f"to use at most; {MOST * 100:.0f} %% of what is free",
    )
    parser.set_defaults(repeats=5)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    makers: dict[str, Callable[[Axis], Iterator[Case]]] = {
        "size": _sizes,
        "batch": _batches,
        "queries": _queries,
        "targets": _targets,
        "threads": _threads,
        "workers": _workers,
    }
    for name in options.axis:
        yield from makers[name](Axis(options, name))
        torch.set_num_threads(options.threads)


class Axis:
    """An axis with its values, and the memory that they may take.

    Args:
        options: Of the command.
        name: Of `AXES`.
    """

    def __init__(self, options: argparse.Namespace, name: str) -> None:
        self.options, self.name = options, name
        self.values = sorted(options.values or AXES[name])
        self.most_mib = MOST * available_mib()
        if options.memory is not None:
            self.most_mib = 1024 * options.memory

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return the size of images, which an option may replace."""
        return tuple(self.options.size or (height, width))

    def wanted(self, work: str, providers: Iterable[str]) -> list[str]:
        """Return the providers of a work that are to be measured."""
        return [x for x in providers if re.search(self.options.only, f"{work}, {x}")]

    def case(self, value: int, peaks: dict[str, float | str], case: Case) -> Case:
        """Add value and memory to a case, and leave out what does not fit.

        Args:
            value: On the axis.
            peaks: Memory of each provider in MiB, or why it is not to be tried.
            case: The comparison.
        """
        reasons = {name: peak for name, peak in peaks.items() if isinstance(peak, str)}
        sizes = {name: peak for name, peak in peaks.items() if not isinstance(peak, str)}
        total = 0.0
        for name in sorted(sizes, key=sizes.__getitem__):  # all models are in one process now
            total += sizes[name]
            try:
                self._check(total)
            except GateFailed as error:
                reasons[name] = f"with those that take less memory {error}"
        providers = {name: case.providers[name] for name in sizes if name not in reasons}
        return dataclasses.replace(
            case,
            providers=providers,
            reference=next(iter(providers), None),
            refused=reasons,
            memory=sizes.__getitem__,
            columns={**case.columns, "axis": self.name, "value": value},
        )

    def peaks(
        self, work: str, make: Callable[..., Any], providers: Iterable[str], *settings: Any,
        count: Callable[[int], float] = float, values: Iterable[int] | None = None,
    ) -> dict[str, dict[int, float | str]]:  # fmt: skip
        """Measure the memory of each provider at each value, as far as it fits.

        Args:
            work: What is done.
            make: As of `peaks_mib_of_process`; called with the provider and `settings`.
            providers: Their names.
            *settings: Of `make`.
            count: Returns the amount of work at a value.
            values: Those of the axis if None.
        """
        values = self.values if values is None else list(values)
        found: dict[str, dict[int, float | str]] = {}
        for name in self.wanted(work, providers):
            try:
                require(*(["openvino"] if name == OPENVINO else []))
            except GateFailed as error:
                found[name] = dict.fromkeys(values, str(error))
                continue
            known: dict[int, float] = {}
            reason = ""
            with contextlib.closing(peaks_mib_of_process(make, values, name, *settings)) as peaks:
                for value in values:
                    try:
                        self._check(_expected(known, value, count))
                        known[value] = next(peaks)
                        self._check(known[value])
                    except (RuntimeError, GateFailed) as error:
                        reason = str(error)
                        known.pop(value, None)
                        break
            found[name] = {value: known.get(value, reason) for value in values}
        return found

    def _check(self, mib: float) -> None:
        if mib > self.most_mib:
            raise GateFailed(
                f"needs about {mib / 1024:.1f} GiB, more than the {self.most_mib / 1024:.1f} that "
                "may be used"
            )


def _expected(known: dict[int, float], value: int, count: Callable[[int], float]) -> float:
    """Return the memory that a value is expected to take, from those before it."""
    if not known:
        return 0.0
    *rest, last = known
    if not rest:
        return CAUTION * known[last] * count(value) / count(last)
    slope = (known[last] - known[rest[-1]]) / (count(last) - count(rest[-1]))
    return CAUTION * (known[last] + slope * (count(value) - count(last)))


# ---------------------------------------------------------------------------- whole model


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of a model, for a process of its own."""

    backbone: str
    layers: int
    queries: int
    threads: int


def make_forward(provider: str, settings: Settings) -> Callable[[Shape], Callable[[], Any]]:
    """Return a function from the shape of a batch to a call of a provider's model."""
    torch.set_num_threads(settings.threads)
    theirs, ours = model_pair(
        backbone=settings.backbone,
        encoder_layers=settings.layers,
        decoder_layers=settings.layers,
        num_queries=settings.queries,
        num_labels=91,
    )
    makers: dict[str, Callable[[], Callable[[Tensor], Any]]] = {
        TRANSFORMERS: lambda: theirs,
        OURS: lambda: cdetr_fast.optimize(ours),
        OPENVINO: lambda: on_openvino(theirs, settings.threads),
    }
    model = makers[provider]()

    def prepare(shape: Shape) -> Callable[[], Any]:
        batch, height, width = shape
        pixel_values, _ = random_images(batch, (height, width))
        return torch.no_grad()(functools.partial(model, pixel_values))

    return prepare


def _forward(
    axis: Axis,
    shapes: dict[int, Shape],
    settings: Callable[[int], Settings],
    is_one_model: bool = True,
) -> Iterator[Case]:
    """Compare whole models at each value.

    Args:
        axis: What grows.
        shapes: Of the batch, by value.
        settings: Of the model, by value.
        is_one_model: Whether one model serves all values.
    """
    work = "forward"
    names = (TRANSFORMERS, OURS, OPENVINO)
    pixels = {
        value: float(batch * height * width) for value, (batch, height, width) in shapes.items()
    }
    peaks: dict[str, dict[int, float | str]] = {}
    for group in [axis.values] if is_one_model else [[value] for value in axis.values]:
        some = settings(group[0])
        for name, found in axis.peaks(
            work, _make_forward_of, names, some, shapes, count=pixels.__getitem__, values=group
        ).items():
            peaks.setdefault(name, {}).update(found)
    models: dict[tuple[str, Settings], Callable[[Shape], Callable[[], Any]]] = {}
    for value in axis.values if peaks else []:
        some, (batch, height, width) = settings(value), shapes[value]
        torch.set_num_threads(some.threads)
        calls = {}
        for name in peaks:
            if not isinstance(peaks[name][value], str):
                if (name, some) not in models:
                    models[name, some] = make_forward(name, some)
                calls[name] = models[name, some](shapes[value])
        yield axis.case(
            value,
            {name: found[value] for name, found in peaks.items()},
            Case(
                work=work,
                shape=f"{axis.options.backbone} {height}x{width} B={batch} Q={some.queries}, "
                f"threads: {some.threads}",
                providers=calls,
                gate=Within(
                    output_errors((height, width)), dict(zip(ERRORS, (1e-3, 0.1), strict=True))
                ),
                warmup=1,
                columns={"batch": batch},
                derive=_rate,
            ),
        )
        if not is_one_model:
            models.clear()


def _rate(row: dict[str, Any]) -> dict[str, float]:
    return {"images/s": 1e3 * row["batch"] / row["ms"]}


def _make_forward_of(
    provider: str, settings: Settings, shapes: dict[int, Shape]
) -> Callable[[int], Callable[[], Any]]:
    prepare = make_forward(provider, settings)
    return lambda value: prepare(shapes[value])


def _settings(axis: Axis, **changes: int) -> Settings:
    options = axis.options
    values = {"queries": 300, "threads": options.threads} | changes
    return Settings(options.backbone, options.layers, **values)


def _sizes(axis: Axis) -> Iterator[Case]:
    shapes = {value: (1, value, value) for value in axis.values}
    return _forward(axis, shapes, lambda value: _settings(axis))


def _batches(axis: Axis) -> Iterator[Case]:
    shapes = {value: (value, *axis.size(480, 640)) for value in axis.values}
    return _forward(axis, shapes, lambda value: _settings(axis))


def _threads(axis: Axis) -> Iterator[Case]:
    shapes = {value: (1, *axis.size(800, 1066)) for value in axis.values}
    return _forward(axis, shapes, lambda value: _settings(axis, threads=value), False)


# ---------------------------------------------------------------------------- parts


def _queries(axis: Axis) -> Iterator[Case]:
    shapes = {value: (1, *axis.size(640, 640)) for value in axis.values}
    yield from _forward(axis, shapes, lambda value: _settings(axis, queries=value), False)
    names = ("transformers", "cdetr_fast")
    work = "mask head"
    height, width = MASK_SIZE
    threads = axis.options.threads
    peaks = axis.peaks(work, _make_masks, names, (height, width), threads)
    for value in axis.values if peaks else []:
        options = argparse.Namespace(size=MASK_SIZE, queries=value, threads=threads)
        (case,) = mask_head.cases(options)
        yield axis.case(value, {name: found[value] for name, found in peaks.items()}, case)
    work = "outputs to detections"
    peaks = axis.peaks(work, _make_detections, names, threads)
    for value in axis.values if peaks else []:
        case = _detections(value)
        found = {name: found[value] for name, found in peaks.items()}
        yield axis.case(value, found, dataclasses.replace(case, work=work))


def _make_masks(
    provider: str, size: tuple[int, int], threads: int
) -> Callable[[int], Callable[[], Any]]:
    return lambda queries: mask_head.make_call(provider, *size, queries, threads)


def _detections(queries: int) -> Case:
    case, _ = topk.cases_of_size(BATCH, queries, 91, 100)
    return case


def _make_detections(provider: str, threads: int) -> Callable[[int], Callable[[], Any]]:
    torch.set_num_threads(threads)
    return lambda queries: _detections(queries).providers[provider]


def _targets(axis: Axis) -> Iterator[Case]:
    names = ("transformers", "cdetr_fast")
    peaks = axis.peaks("matching and loss", _make_loss, names, axis.options.threads)
    for value in axis.values if peaks else []:
        found = {name: found[value] for name, found in peaks.items()}
        yield axis.case(value, found, dataclasses.replace(_loss(value), warmup=1))


def _loss(targets: int) -> Case:
    (case,) = loss.cases(argparse.Namespace(device="cpu", batch=BATCH, targets=[targets]))
    return case


def _make_loss(provider: str, threads: int) -> Callable[[int], Callable[[], Any]]:
    torch.set_num_threads(threads)
    return lambda targets: _loss(targets).providers[provider]


def _workers(axis: Axis) -> Iterator[Case]:
    providers = axis.wanted("files to boxes", workers.PROVIDERS)
    options = axis.options
    shortest, longest = axis.size(800, 1333)
    for count, case in workers.cases(
        axis.values, options.backbone, (shortest, longest), options.images, providers
    ):
        columns = {**case.columns, "axis": axis.name, "value": count}
        yield dataclasses.replace(case, columns=columns)
