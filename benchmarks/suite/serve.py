"""Requests to `cdetr-fast serve`: rate and latency at several numbers of clients.

    python -m benchmarks serve --requests 200
    python -m benchmarks serve --model runs/first/best --requests 32

The server is a process of its own, which shares the CPU with the clients of this one. Each client
sends a photograph of 640x480 and waits for the answer before it sends the next. The reference is
`predict` of the optimised model without HTTP, image by image. Every answer is compared with its.
"""

import argparse
import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch

import cdetr_fast
from benchmarks.case import Case, GateFailed, Within
from benchmarks.detections import LIMITS, detection_errors
from benchmarks.inputs import write_photographs
from cdetr_fast.demo import DEMO
from cdetr_fast.images.results import DetectionResult

LOST = "answers lost"
PHOTOGRAPHS = 8
REFERENCE = "predict, no HTTP"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=DEMO, help="folder; by default the demo's")
    parser.add_argument("--requests", type=int, default=200, help="of all clients together")
    parser.add_argument("--clients", type=int, nargs="+", default=(1, 4, 16))
    parser.add_argument("--batch", type=int, default=8)
    parser.set_defaults(repeats=3)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    name = "demo" if options.model == DEMO else options.model.name
    with tempfile.TemporaryDirectory() as folder:
        model = cdetr_fast.optimize(
            cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(
                options.model, dtype=torch.float32
            )
        )
        edges = model.image_processor.size
        contents = [path.read_bytes() for path in write_photographs(Path(folder), PHOTOGRAPHS)]
        sent = [contents[i % PHOTOGRAPHS] for i in range(options.requests)]
        answers: dict[str, list[DetectionResult]] = {}
        latencies: dict[str, list[float]] = {}

        def predict_each() -> None:
            found = latencies[REFERENCE] = []
            answers[REFERENCE] = [timed(found, model.predict, content, 0.0) for content in sent]

        with server(options) as url:

            def request(provider: str, clients: int) -> None:
                load = send(url, sent, clients, model.config.id2label)
                answers[provider], latencies[provider] = asyncio.run(load)

            providers: dict[str, Callable[[], Any]] = {REFERENCE: predict_each}
            for clients in options.clients:
                provider = f"serve, {clients} client{'s' * (clients > 1)}"
                providers[provider] = functools.partial(request, provider, clients)
            yield Case(
                work="photographs to boxes over HTTP",
                shape=f"{name}, {options.requests} files of 640x480 at {edges['shortest_edge']}",
                providers=providers,
                gate=Within(errors, {LOST: 0, **LIMITS}),
                result=answers.__getitem__,
                gate_after=True,
                columns={"requests": options.requests, "most in a batch": options.batch},
                derive=lambda row: {
                    "requests/s": 1e3 * options.requests / row["ms"],
                    "p50 latency, ms": percentile(latencies[row["provider"]], 50),
                    "p95 latency, ms": percentile(latencies[row["provider"]], 95),
                },
            )


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[str]:
    """Run the command, and yield its URL."""
    command = [sys.executable, "-m", "cdetr_fast", "serve", "--model", str(options.model), "--port",
               "0", "--batch", str(options.batch), "--top-k", "100"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "it is a pipe"
        try:
            for line in process.stdout:
                if line.startswith("http"):
                    yield line.split()[0]
                    break
            else:
                raise RuntimeError("cdetr-fast serve has not started")
        finally:
            process.send_signal(signal.SIGTERM)


async def send(
    url: str, sent: list[bytes], clients: int, id2label: dict[int, str]
) -> tuple[list[DetectionResult], list[float]]:
    """Send the files, shared between clients; return the answers in order, and milliseconds."""
    answers: dict[int, DetectionResult] = {}
    latencies: list[float] = []
    waiting = iter(enumerate(sent))
    headers = {"Content-Type": "image/jpeg"}

    async def work() -> None:
        async with httpx2.AsyncClient(base_url=url, timeout=60) as client:
            for i, content in waiting:
                began = time.perf_counter()
                response = await client.post(
                    "/v1/detect?threshold=0", content=content, headers=headers
                )
                latencies.append(1e3 * (time.perf_counter() - began))
                if response.status_code == 200:
                    answers[i] = as_result(response.json(), id2label)

    await asyncio.gather(*(work() for _ in range(clients)))
    return [answers[i] for i in sorted(answers)], latencies


def as_result(answer: dict[str, Any], id2label: dict[int, str]) -> DetectionResult:
    """Return what an answer says as a result of `predict`."""
    found = answer["detections"]
    return DetectionResult(
        torch.tensor([item["score"] for item in found]),
        torch.tensor([item["label"] for item in found], dtype=torch.int64),
        torch.tensor([item["box_xyxy"] for item in found]).reshape(-1, 4),
        (answer["height"], answer["width"]),
        id2label,
    )


def timed(latencies: list[float], call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function, and note its milliseconds."""
    began = time.perf_counter()
    result = call(*arguments)
    latencies.append(1e3 * (time.perf_counter() - began))
    return result


def errors(got: list[DetectionResult], expected: list[DetectionResult]) -> dict[str, float]:
    """Return the errors of the answers' detections; refuse if there are fewer answers."""
    if len(got) < len(expected):
        raise GateFailed(f"{len(expected) - len(got)} of {len(expected)} requests got no answer")
    return {LOST: 0.0, **detection_errors(got, expected)}


def percentile(values: list[float], percent: float) -> float:
    """Return a percentile."""
    return float(np.percentile(values, percent))
