"""Sine code of reference points times the scale of the decoder state, forward and backward.

    code[r] = [sin(y s/t_0), cos(y s/t_0), sin(y s/t_1), ..., x likewise, then width, height]
    out     = code * lambda
    t_i     = temperature ** (2 i / features),   features = C / coordinates

A program owns BR rows and the features of one coordinate, in both directions. A coordinate's
gradient comes from its own features only, so it has one owner and one order: no atomic additions.

    dlambda = dout code
    dpoint  = s sum over i of (dout lambda)_sin cos(a_i) / t_i - (dout lambda)_cos sin(a_i) / t_i

The angles are recomputed in backward: two numbers per query are read instead of C.

Names: A x R rows, of which points and lambda may have 1 in either place; tiles of BR rows and BI
pairs. Source: Meng et al., equations 1 and 4; the authors' gen_sineembed_for_position.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cdetr_kernels.gpu import launching, waves
from cdetr_kernels.gpu.arithmetic import rounded
from cdetr_kernels.gpu.launching import Launch
from cdetr_kernels.gpu.registration import refuse_second_derivative, register
from cdetr_kernels.gpu.waves import frequencies, frequency_step, sine_and_cosine

ROWS = 8


@triton.jit
def _coordinate(p_points, b_a, b_r, m_rows, points_a, points_r, points_c, COORDINATES):
    """Load a coordinate of the rows; also return its index, and that of its features."""
    i_k = tl.program_id(0) % COORDINATES
    i_c = tl.where(i_k < 2, 1 - i_k, i_k)  # y, x, width, height
    b_x = tl.load(p_points + b_a * points_a + b_r * points_r + i_c * points_c, m_rows, other=0.0)
    return b_x.to(tl.float32), i_c, i_k


@triton.jit
def _rows(BR: tl.constexpr, R, rows, COORDINATES):
    """Return the number of each row, its two indices, and whether there is such a row."""
    o_row = (tl.program_id(0) // COORDINATES) * BR + tl.arange(0, BR)
    return o_row.to(tl.int64), (o_row // R).to(tl.int64), (o_row % R).to(tl.int64), o_row < rows


@triton.jit(do_not_specialize=["R", "rows"])
def forward_kernel(
    p_points,  # [A, R, COORDINATES]
    p_lambda,  # [A, R, C]
    p_out,  # [A, R, C], contiguous
    points_a, points_r, points_c,
    lambda_a, lambda_r, lambda_c,
    R, rows,
    scale,
    step_high, step_low,
    C: tl.constexpr, COORDINATES: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the features of one coordinate of BR rows."""
    o_row, b_a, b_r, m_rows = _rows(BR, R, rows, COORDINATES)
    b_x, _, i_k = _coordinate(p_points, b_a, b_r, m_rows, points_a, points_r, points_c, COORDINATES)
    b_x = b_x * scale
    FEATURES: tl.constexpr = C // COORDINATES
    for first in range(0, FEATURES // 2, BI):
        b_frequency = frequencies(first + tl.arange(0, BI), step_high, step_low)
        b_sine, b_cosine = sine_and_cosine(b_x[:, None] * b_frequency[None, :])
        b_code = tl.interleave(b_sine, b_cosine)  # [BR, 2 * BI]
        o_f = 2 * first + tl.arange(0, 2 * BI)
        m_code = m_rows[:, None]
        if FEATURES % (2 * BI) != 0:
            m_code = m_code & (o_f < FEATURES)[None, :]
        o_c = i_k * FEATURES + o_f
        if SCALED:
            p_rows = p_lambda + (b_a * lambda_a + b_r * lambda_r)[:, None]
            b_lambda = tl.load(p_rows + o_c.to(tl.int64)[None, :] * lambda_c, m_code, other=0.0)
            b_code = b_code * b_lambda.to(tl.float32)
        b_code = rounded(b_code, p_out.dtype.element_ty, PRECISION)
        tl.store(p_out + o_row[:, None] * C + o_c[None, :], b_code, m_code)


@triton.jit(do_not_specialize=["R", "rows"])
def backward_kernel(
    p_do,  # [A, R, C]
    p_points,  # [A, R, COORDINATES]
    p_lambda,  # [A, R, C]
    p_dpoints,  # [A, R, COORDINATES], contiguous
    p_dlambda,  # [A, R, C], contiguous
    do_a, do_r, do_c,
    points_a, points_r, points_c,
    lambda_a, lambda_r, lambda_c,
    R, rows,
    scale,
    step_high, step_low,
    C: tl.constexpr, COORDINATES: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of a coordinate of BR rows, and of the lambda that scales it."""
    o_row, b_a, b_r, m_rows = _rows(BR, R, rows, COORDINATES)
    b_x, i_c, i_k = _coordinate(
        p_points, b_a, b_r, m_rows, points_a, points_r, points_c, COORDINATES
    )
    b_x = b_x * scale
    FEATURES: tl.constexpr = C // COORDINATES
    b_dx = tl.zeros([BR], tl.float32)
    for first in range(0, FEATURES // 2, BI):
        b_frequency = frequencies(first + tl.arange(0, BI), step_high, step_low)[None, :]
        b_sine, b_cosine = sine_and_cosine(b_x[:, None] * b_frequency)
        o_f = 2 * first + tl.arange(0, 2 * BI)
        m_code = m_rows[:, None]
        if FEATURES % (2 * BI) != 0:
            m_code = m_code & (o_f < FEATURES)[None, :]
        o_c = (i_k * FEATURES + o_f).to(tl.int64)[None, :]
        p_do_rows = p_do + (b_a * do_a + b_r * do_r)[:, None]
        b_do = tl.load(p_do_rows + o_c * do_c, m_code, other=0.0).to(tl.float32)  # [BR, 2 * BI]
        if SCALED:
            b_dlambda = rounded(
                b_do * tl.interleave(b_sine, b_cosine), p_dlambda.dtype.element_ty, PRECISION
            )
            tl.store(p_dlambda + o_row[:, None] * C + o_c, b_dlambda, m_code)
            p_rows = p_lambda + (b_a * lambda_a + b_r * lambda_r)[:, None]
            b_do *= tl.load(p_rows + o_c * lambda_c, m_code, other=0.0).to(tl.float32)
        b_slope = tl.interleave(b_cosine * b_frequency, -b_sine * b_frequency)
        b_dx += tl.sum(b_do * b_slope, 1)
    b_dx = rounded(b_dx * scale, p_dpoints.dtype.element_ty, PRECISION)
    tl.store(p_dpoints + o_row * COORDINATES + i_c, b_dx, m_rows)


def forward_launch(
    reference_points: Tensor,
    query_scale: Tensor | None,
    temperature: float,
    scale: float,
    output: Tensor,
) -> Launch:
    """Compute the code into `output`."""
    return _launch(
        forward_kernel,
        {"p_out": output},
        (reference_points, query_scale, temperature, scale),
        output,
        registers=64,
    )


def backward_launch(
    grad_output: Tensor,
    reference_points: Tensor,
    query_scale: Tensor | None,
    temperature: float,
    scale: float,
    dpoints: Tensor,
    dlambda: Tensor | None,
) -> Launch:
    """Compute a gradient for each row (shared points or scales are summed afterwards)."""
    return _launch(
        backward_kernel,
        {
            "p_do": grad_output,
            "p_dpoints": dpoints,
            "p_dlambda": dlambda,
            **_strides("do", grad_output),
        },
        (reference_points, query_scale, temperature, scale),
        grad_output,
        registers=80,
    )


def _launch(kernel, own_arguments: dict, inputs, like: Tensor, registers: int) -> Launch:
    reference_points, query_scale, temperature, scale = inputs
    count, rows_each, channels = like.shape
    coordinates = reference_points.shape[-1]
    features = channels // coordinates
    step_high, step_low = frequency_step(temperature, features)
    tile = waves.tile(ROWS, features // 2, registers)
    arguments = {
        **own_arguments,
        "p_points": reference_points,
        "p_lambda": query_scale,
        **_strides("points", reference_points),
        **_strides("lambda", query_scale),
        "R": rows_each,
        "rows": count * rows_each,
        "scale": float(scale),
        "step_high": step_high,
        "step_low": step_low,
        "C": channels,
        "COORDINATES": coordinates,
        "BR": tile.queries,
        "BI": tile.keys,
        "SCALED": query_scale is not None,
        # Nothing is multiplied here, but results are rounded, and that has a variant in bf16.
        "PRECISION": launching.dot_precision(torch.bfloat16),
    }
    programs = triton.cdiv(count * rows_each, tile.queries) * coordinates
    return Launch(kernel, programs, arguments, tile)


def _strides(name: str, tensor: Tensor | None) -> dict[str, int]:
    """Return strides, 0 for a size of 1: the others' rows share it, so no step is taken."""
    if tensor is None:
        return {f"{name}_{axis}": 0 for axis in "arc"}
    shared = (len(tensor) == 1, tensor.shape[1] == 1, False)
    return {
        f"{name}_{axis}": 0 if is_shared else stride
        for axis, stride, is_shared in zip("arc", tensor.stride(), shared, strict=True)
    }


def _forward(reference_points, query_scale, channels, temperature, scale, dtype) -> Tensor:
    output = _output(reference_points, query_scale, channels, temperature, scale, dtype)
    launching.run(forward_launch, reference_points, query_scale, temperature, scale, output)
    return output


def _output(reference_points, query_scale, channels, temperature, scale, dtype) -> Tensor:
    rows = _row_sizes(reference_points, query_scale)
    return reference_points.new_empty(*rows, channels, dtype=dtype)


def _backward(grad_output, reference_points, query_scale, temperature, scale) -> list[Tensor]:
    inputs = [x for x in (reference_points, query_scale) if x is not None]
    rows = grad_output.shape[:2]
    # What rows share has a gradient per row first, not yet rounded, so that none is added
    # atomically.
    per_row = [
        x.new_empty(*rows, x.shape[-1], dtype=x.dtype if x.shape[:2] == rows else torch.float32)
        for x in inputs
    ]
    dpoints, dlambda = (*per_row, None)[:2]
    launching.run(
        backward_launch,
        *(grad_output, reference_points, query_scale, temperature, scale, dpoints, dlambda),
    )
    return [
        gradient if x.shape == gradient.shape else gradient.sum_to_size(x.shape).to(x.dtype)
        for gradient, x in zip(per_row, inputs, strict=True)
    ]


def _backward_outputs(
    grad_output, reference_points, query_scale, temperature, scale
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (reference_points, query_scale) if x is not None]


def _save_for_backward(ctx, inputs, output) -> None:
    reference_points, query_scale, _, ctx.temperature, ctx.scale, _ = inputs
    ctx.save_for_backward(reference_points, query_scale)


def _gradients(ctx, grad_output):
    gradients = _sine_query_backward(grad_output, *ctx.saved_tensors, ctx.temperature, ctx.scale)
    dpoints, dlambda = (*gradients, None)[:2]
    return dpoints, dlambda, None, None, None, None


_sine_query = register(
    "sine_query(Tensor reference_points, Tensor? query_scale, int channels, float temperature, "
    "float scale, ScalarType dtype) -> Tensor",
    _forward,
    _output,
    _gradients,
    _save_for_backward,
)
# Gradients of the tensors that are present, in their order.
_sine_query_backward = register(
    "sine_query_backward(Tensor grad_output, Tensor reference_points, Tensor? query_scale, "
    "float temperature, float scale) -> Tensor[]",
    _backward,
    _backward_outputs,
    refuse_second_derivative("sine_query_backward"),
)


def sine_query(
    reference_points: Tensor,
    channels: int,
    query_scale: Tensor | None,
    temperature: float,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """Run the path "triton" of `cdetr_kernels.sine_query`; see there for shapes.

    Angles (points times `scale`) are accurate up to 12,000 in size.

    Raises:
        ValueError: `temperature` or `channels` is out of the kernels' range.
    """
    rows = _row_sizes(reference_points, query_scale)
    points = _in_three_dimensions(reference_points, rows)
    lambda_ = None if query_scale is None else _in_three_dimensions(query_scale, rows)
    code = _sine_query(points, lambda_, channels, temperature, scale, dtype)
    return code if len(rows) == 2 else code.reshape(*rows, channels)


def _row_sizes(reference_points: Tensor, query_scale: Tensor | None) -> torch.Size:
    """Return all sizes of the code but the last."""
    rows = reference_points.shape[:-1]
    if query_scale is None or query_scale.shape[:-1] == rows:
        return rows
    return torch.broadcast_shapes(rows, query_scale.shape[:-1])


def _in_three_dimensions(x: Tensor, rows: torch.Size) -> Tensor:
    """Fold rows into two sizes, a view where they have two at most; sizes of 1 stay."""
    rank = max(len(rows), 2) + 1
    if x.ndim == rank == 3:
        return x
    x = x[(None,) * (rank - x.ndim)]
    if rank == 3:
        return x
    if x.shape[:-2] != rows[:-1]:
        x = x.float().expand(*rows[:-1], *x.shape[-2:])  # gradients are summed before rounding
    return x.flatten(0, -3)
