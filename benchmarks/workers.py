"""Worker processes of a service: files to boxes with a thread each, and the memory of each."""

import contextlib
import functools
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

import cdetr_fast
from benchmarks.case import Case, Within
from benchmarks.detections import LIMITS, Found, detection_errors
from benchmarks.inputs import write_photographs
from benchmarks.memory import memory_of
from benchmarks.suite import folder

TRANSFORMERS, OURS, OPENVINO = "transformers sdpa", "optimize(cdetr_fast)", 'engine="openvino"'
FORKED = f"{OURS}, forked"
PROVIDERS = (TRANSFORMERS, OURS, FORKED, OPENVINO)

Work = Callable[[], list[Any]]


def cases(
    counts: list[int], backbone: str, edges: tuple[int, int], images: int, providers: list[str]
) -> Iterator[tuple[int, Case]]:
    """Compare services of some numbers of workers.

    All processes are there throughout and wait while others are timed. Memory is read before, when
    only the workers of one service are there, besides the process that starts them.

    Args:
        counts: Numbers of workers.
        backbone: Of the model.
        edges: Shortest and longest edge of a resized image.
        images: Files of 640x480 for each worker in a call.
        providers: Of `PROVIDERS`.
    """
    with tempfile.TemporaryDirectory() as place, contextlib.ExitStack() as stack:
        paths = [str(path) for path in write_photographs(Path(place), images)]
        checkpoint = _save_model(Path(place, "model"), backbone, edges)
        memory: dict[tuple[int, str], dict[str, float]] = {}
        for count in counts:
            for name in providers:
                with Workers(name, count, checkpoint, paths) as workers:
                    workers()
                    memory[count, name] = workers.memory()
        for count in counts:
            services = {
                name: stack.enter_context(Workers(name, count, checkpoint, paths))
                for name in providers
            }
            yield (
                count,
                Case(
                    work="files to boxes",
                    shape=f"{backbone}, files of 640x480 at {edges[0]}, workers: {count}",
                    providers=services,
                    gate=Within(detection_errors, LIMITS),
                    warmup=1,
                    columns={"workers": count, "images": images * count},
                    derive=functools.partial(_figures, memory, count),
                ),
            )


def _figures(
    memory: dict[tuple[int, str], dict[str, float]], count: int, row: dict[str, Any]
) -> dict[str, float]:
    sizes = memory[count, row["provider"]]
    return {
        "images/s": 1e3 * row["images"] / row["ms"],
        **{f"{name} MiB": size for name, size in sizes.items()},
    }


def _save_model(place: Path, backbone: str, edges: tuple[int, int]) -> str:
    _, ours = folder.make_models(backbone)
    size = dict(zip(("shortest_edge", "longest_edge"), edges, strict=True))
    ours.image_processor = cdetr_fast.ConditionalDetrImageProcessor(size=size)
    ours.save_pretrained(place)
    ours.image_processor.save_pretrained(place)
    return str(place)


class Workers:
    """Processes that turn files into boxes when they are called, and wait between the calls.

    Args:
        provider: Of `PROVIDERS`.
        count: Number of processes.
        checkpoint: Folder of the model.
        paths: The files, which each of them takes.
    """

    def __init__(self, provider: str, count: int, checkpoint: str, paths: list[str]) -> None:
        self._arguments = provider, checkpoint, paths
        self._groups = [count] if provider == FORKED else [1] * count
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self.identities: list[int] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        for group in self._groups:
            pipes = [context.Pipe() for _ in range(group)]
            its = [pipe[1] for pipe in pipes]
            process = context.Process(target=_work, args=(its, *self._arguments))
            process.start()
            self._processes.append(process)
            for ours, end in pipes:
                end.close()
                self._connections.append(ours)
        self.identities = [self._answer(one) for one in self._connections]
        return self

    def __call__(self) -> list[Any]:
        """Run all of them, and return the findings of each in order."""
        for connection in self._connections:
            connection.send(None)
        return [
            {"scores": scores, "labels": labels, "boxes": boxes}
            for connection in self._connections
            for scores, labels, boxes in (
                map(torch.from_numpy, x) for x in self._answer(connection)
            )
        ]

    def memory(self) -> dict[str, float]:
        """Return the mean memory of a process; see `memory_of`."""
        sizes = [memory_of(identity) for identity in self.identities]
        return {name: statistics.mean(size[name] for size in sizes) for name in sizes[0]}

    def __exit__(self, *_: object) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join()

    def _answer(self, connection: Connection) -> Any:
        try:
            return connection.recv()
        except EOFError:
            codes = [process.exitcode for process in self._processes]
            raise RuntimeError(f"a worker has ended; exit codes: {codes}") from None


def _work(connections: list[Connection], provider: str, checkpoint: str, paths: list[str]) -> None:
    """Load a model, and serve the connection; of several each in a process forked from this one."""
    torch.set_num_threads(1)
    work = _load(provider, checkpoint, paths)
    if len(connections) == 1:
        _serve(connections[0], work)
        return
    work()  # what is prepared by the first call is shared, too
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_serve, args=(one, work)) for one in connections]
    for child in children:
        child.start()
    for connection in connections:
        connection.close()
    for child in children:
        child.join()


def _load(provider: str, checkpoint: str, paths: list[str]) -> Work:
    if provider == TRANSFORMERS:
        import transformers

        theirs = transformers.ConditionalDetrForObjectDetection.from_pretrained(checkpoint).eval()
        processor = transformers.ConditionalDetrImageProcessor.from_pretrained(checkpoint)
        detect = folder.with_their_processor(theirs, dict(processor.size), 0.0)
        return lambda: detect(paths)
    model = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(
        checkpoint, dtype=torch.float32
    )
    engine = "openvino" if provider == OPENVINO else "torch"
    fast = cdetr_fast.optimize(model, engine=engine)
    del model
    return lambda: [fast.predict(path, 0.0) for path in paths]


def _serve(connection: Connection, work: Work) -> None:
    connection.send(os.getpid())
    with contextlib.suppress(EOFError):  # the service ends
        while True:
            connection.recv()
            connection.send([[x.numpy() for x in Found.of(found)] for found in work()])
