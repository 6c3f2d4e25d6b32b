"""Inputs of `sine_query` for tests, benchmarks and the audit."""

import functools
from typing import TYPE_CHECKING

import torch

from cdetr_kernels.ops.sine_query import sine_query
from cdetr_kernels.testing.case import Case, Inputs, RandomTensors, Sizes, count_bytes

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

SIZES = {
    "sine_query": Sizes(
        smallest={"batch": 1, "queries": 2, "channels": 8},
        small={"batch": 2, "queries": 13},
        medium={"batch": 3, "queries": 67},
        typical=[{"batch": batch} for batch in (1, 8, 32)],
        # The first decoder layer has no scale.
        called=[*({"batch": batch} for batch in (1, 8, 32)), {"batch": 1, "scaled": False}],
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
    queries: int = 300,
    channels: int = 256,
    points: tuple[int, ...] | None = None,
    rows: tuple[int, ...] | None = None,
    scaled: bool = True,
) -> Case:
    """Make the points of the queries, which the batch shares, and their scale.

    Args:
        dtype: dtype of the inputs.
        device: Device of the inputs.
        batch: Images.
        queries: Queries.
        channels: Width of the code.
        points: Shape of the points; None is `(1, queries, 2)`.
        rows: Shape of the scale without its channels; None is `(batch, queries)`.
        scaled: Whether there is a scale.
    """
    random = RandomTensors(device, dtype)
    inputs: Inputs = {
        "reference_points": random.uniform(*(points or (1, queries, 2))),
        "query_scale": None,
    }
    if scaled:
        scale_rows = (batch, queries) if rows is None else rows
        inputs["query_scale"] = random.normal(*scale_rows, channels)

    moved = count_bytes(*inputs.values(), inputs["query_scale"])
    return Case(
        "sine_query",
        f"B={batch} Q={queries} C={channels}",
        dtype,
        inputs,
        sine_query,
        {"channels": channels},
        gradients=tuple(name for name, x in inputs.items() if x is not None),
        bytes_moved=(moved, 2 * moved + count_bytes(inputs["query_scale"])),
    )


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled: a training step, of points and of boxes."""
    from cdetr_kernels.testing.machine_code import Audit

    return [
        Audit(
            f"sine {precision} {coordinates}",
            functools.partial(_audited, dtype, coordinates),
            brief=precision == "half",
        )
        for precision, dtype in (("half", torch.bfloat16), ("single", torch.float32))
        for coordinates in (2, 4)
    ]


def _audited(dtype: torch.dtype, coordinates: int) -> "dict[str, Audited]":
    from cdetr_kernels.ops.sine_query.triton import backward_launch, forward_launch
    from cdetr_kernels.testing.machine_code import Audited

    # As in the decoder: fp32 points that the batch shares, with a gradient for each image.
    points = torch.empty(1, 300, coordinates, device="meta")
    dpoints = torch.empty(8, 300, coordinates, device="meta")
    code = torch.empty(8, 300, 256, dtype=dtype, device="meta")
    options = (10000.0, 6.28)
    instructions = frozenset({"load16", "store16"})
    return {
        "sine_query": Audited(forward_launch(points, code, *options, code), instructions),
        "sine_query_backward": Audited(
            backward_launch(code, points, code, *options, dpoints, code), instructions
        ),
    }
