"""Host side that both attention operators share: arguments of launches, registration, autograd.

An operator has n tensors of queries and keys (n is 4 in the general form, 5 in the separable one),
then values. Registered are the forward, which gives the output `[B, Q, N, Dv]` and the log-sum-exp
of each row `[B, N, Q]` (fp32, to base 2, +inf for a row without keys), its backward, and the
attention map, which is made from the log-sum-exp.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from cdetr_kernels.gpu import configurations, launching, random
from cdetr_kernels.gpu.attention_kernels import merge_kernel
from cdetr_kernels.gpu.launching import Launch, shared_strides
from cdetr_kernels.gpu.registration import refuse_second_derivative, register
from cdetr_kernels.gpu.tiles import Tile

LOG2_E = 1.0 / math.log(2.0)
MERGED_ROWS = 32


def query_arguments(
    q_content: Tensor,
    q_spatial: Tensor | None,
    key_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
) -> dict[str, Any]:
    """Return queries, their strides and sizes, dropout, and what is absent."""
    return {
        "p_qc": q_content,
        "p_qs": q_spatial,
        "p_mask": key_mask,
        "p_seed": seed,
        **shared_strides("qc", "bqnd", q_content),
        **shared_strides("qs", "bqnd", q_spatial),
        "N": q_content.shape[2],
        "Q": q_content.shape[1],
        "threshold": random.threshold(dropout_p),
        "inverse_keep": 1.0 / (1.0 - dropout_p),
        "MASKED": key_mask is not None,
        "DROPOUT": dropout_p > 0.0,
        "PRECISION": launching.dot_precision(q_content.dtype),
    }


def size_arguments(q_content: Tensor, value: Tensor | None) -> dict[str, int]:
    """Return the sizes of a head, and the powers of two that they are padded to."""
    size = q_content.shape[-1]
    sizes = {"D": size, "BD": configurations.padded(size)}
    if value is not None:
        sizes |= {"DV": value.shape[-1], "BV": configurations.padded(value.shape[-1])}
    return sizes


def gradient_arguments(
    grad_output: Tensor, logsumexp: Tensor, scale: float, dropout_p: float
) -> dict[str, Any]:
    """Return what all kernels of backward share, memory for delta and dropout included."""
    streams = None
    if dropout_p > 0.0:
        streams = logsumexp.new_empty(*logsumexp.shape, 2, dtype=torch.int32)
    return {
        **shared_strides("do", "bqnd", grad_output),
        "p_do": grad_output,
        "p_lse": logsumexp,
        "p_delta": torch.empty_like(logsumexp),
        "p_streams": streams,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
    }


def merge_launch(part: Tensor, part_logsumexp: Tensor, output: Tensor, logsumexp: Tensor) -> Launch:
    """Merge what a forward launch computed for each part of the keys."""
    batch, queries, heads, value_size = output.shape
    rows = batch * queries * heads
    arguments = {
        "p_part": part,
        "p_part_lse": part_logsumexp,
        "p_out": output,
        "p_lse": logsumexp,
        "rows": rows,
        "N": heads,
        "Q": queries,
        "splits": len(part) // max(batch, 1),
        "DV": value_size,
        "BV": configurations.padded(value_size),
        "BR": MERGED_ROWS,
        "PRECISION": launching.dot_precision(output.dtype),
    }
    tile = Tile(MERGED_ROWS, 1, stages=1)
    return Launch(merge_kernel, triton.cdiv(rows, MERGED_ROWS), arguments, tile)


@dataclass(frozen=True)
class AttentionOperator:
    """Launchers of an attention operator, and their registration with torch.

    Args:
        name: Name in `torch.ops.cdetr_fast`.
        inputs: Schema of queries and keys.
        count: Their number n.
        forward_launch: Takes all inputs, the output and the log-sum-exp.
        backward_launches: Takes the gradient of the output, all inputs, output, log-sum-exp, and
            memory for the gradient of each tensor that is present.
        map_launch: Takes queries, keys, mask, seed, log-sum-exp, options, and the map.
        parts: Returns into how many parts forward splits the keys, given all inputs.
        score_gradients: Returns the gradients of queries and keys, given those of the scores.
        fp32_gradients: Positions of the tensors whose gradients are summed in fp32.
    """

    name: str
    inputs: str
    count: int
    forward_launch: Callable[..., Launch]
    backward_launches: Callable[..., Sequence[Launch]]
    map_launch: Callable[..., Launch]
    parts: Callable[..., int]
    score_gradients: Callable[..., tuple[Tensor | None, ...]]
    fp32_gradients: tuple[int, ...] = ()

    def register(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Define the operator, its backward and its map; return calls of the first and the last."""
        options = "Tensor? key_mask, Tensor? seed"
        attend = register(
            f"{self.name}({self.inputs}, Tensor value, {options}, float scale, float dropout_p) "
            "-> (Tensor, Tensor)",
            self.forward,
            self.forward_outputs,
            self._gradients,
            _save_for_backward,
        )
        # Gradients of the tensors that are present, in their order.
        register(
            f"{self.name}_backward(Tensor grad_output, {self.inputs}, Tensor value, {options}, "
            "float scale, float dropout_p, Tensor output, Tensor logsumexp) -> Tensor[]",
            self._backward,
            self._backward_outputs,
            refuse_second_derivative(f"{self.name}_backward"),
        )
        attention_map = register(
            f"{self.name}_map({self.inputs}, {options}, Tensor logsumexp, float scale, "
            "float dropout_p) -> Tensor",
            self._map,
            self._map_output,
            self._map_gradients,
            _save_for_map_backward,
        )
        return attend, attention_map

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Launch forward, in parts and with their merge where one launch would not fill a GPU."""
        output, logsumexp = self.forward_outputs(*inputs)
        launching.run(self.forward_launches, *inputs, output, logsumexp)
        return output, logsumexp

    def forward_launches(self, *arguments: Any) -> Sequence[Launch]:
        """Return the launches of forward, given all inputs, the output and the log-sum-exp."""
        *inputs, output, logsumexp = arguments
        parts = self.parts(*inputs)
        if parts == 1:
            return (self.forward_launch(*arguments),)
        batch, heads, queries = logsumexp.shape
        part = output.new_empty(parts * batch, *output.shape[1:], dtype=torch.float32)
        part_logsumexp = logsumexp.new_empty(parts * batch, heads, queries)
        return (
            self.forward_launch(*inputs, part, part_logsumexp),
            merge_launch(part, part_logsumexp, output, logsumexp),
        )

    def forward_outputs(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        """Return memory for the output and the log-sum-exp."""
        q_content, value = inputs[0], inputs[self.count]
        batch, queries, heads, _ = q_content.shape
        output = q_content.new_empty(batch, queries, heads, value.shape[-1])
        return output, q_content.new_empty(batch, heads, queries, dtype=torch.float32)

    def gradient_buffers(self, *tensors: Tensor | None) -> list[Tensor]:
        """Return memory for the gradients of the tensors that are present.

        What the batch shares has a gradient per image first, so that none is added atomically.
        """
        batch = tensors[0].shape[0]
        return [
            _gradient_buffer(x, batch, torch.float32 if i in self.fp32_gradients else x.dtype)
            for i, x in enumerate(tensors)
            if x is not None
        ]

    def _backward(self, grad_output: Tensor, *inputs: Any) -> list[Tensor]:
        tensors = inputs[: self.count + 1]
        gradients = self.gradient_buffers(*tensors)
        launching.run(self.backward_launches, grad_output, *inputs, *gradients)
        present = (x for x in tensors if x is not None)
        return [_gradient_of(x, buffer) for buffer, x in zip(gradients, present, strict=True)]

    def _backward_outputs(self, grad_output: Tensor, *inputs: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in inputs[: self.count + 1] if x is not None]

    def _gradients(self, ctx: Any, grad_output: Tensor | None, _: None) -> tuple[Any, ...]:
        if grad_output is None:
            return (None,) * (self.count + 5)
        *tensors, output, logsumexp = ctx.saved_tensors
        backward = getattr(torch.ops.cdetr_fast, f"{self.name}_backward").default
        found = iter(backward(grad_output, *tensors, ctx.scale, ctx.dropout_p, output, logsumexp))
        gradients = (None if x is None else next(found) for x in tensors[: self.count + 1])
        return (*gradients, None, None, None, None)

    def _map(self, *inputs: Any) -> Tensor:
        attention = self._map_output(*inputs)
        launching.run(self.map_launch, *inputs, attention)
        return attention

    def _map_output(self, q_content: Tensor, _: Any, k_content: Tensor, *__: Any) -> Tensor:
        batch, queries, heads, _size = q_content.shape
        return q_content.new_empty(batch, heads, queries, k_content.shape[1])

    def _map_gradients(self, ctx: Any, grad_attention: Tensor) -> tuple[Any, ...]:
        """Compute the gradients in plain torch: what comes in is as large as the map."""
        *tensors, key_mask, _, logsumexp, attention = ctx.saved_tensors
        undropped = attention
        if ctx.dropout_p > 0.0:
            attention_map = getattr(torch.ops.cdetr_fast, f"{self.name}_map").default
            undropped = attention_map(*tensors, key_mask, None, logsumexp, ctx.scale, 0.0)
        weighted = attention.float() * grad_attention.float()  # [B, N, Q, S]
        dscore = (weighted - undropped.float() * weighted.sum(-1, keepdim=True)) * ctx.scale
        return (*self.score_gradients(dscore, *tensors), None, None, None, None, None)


def _gradient_buffer(x: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    if x.shape[0] != batch:
        return x.new_empty(batch, *x.shape[1:], dtype=dtype)
    # In half of the time of `new_empty`.
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _gradient_of(x: Tensor, buffer: Tensor) -> Tensor:
    """Return the gradient of a tensor, given that of each image."""
    if buffer.shape[0] != x.shape[0]:
        buffer = buffer.sum(0, keepdim=True)
    return buffer if buffer.dtype == x.dtype else buffer.to(x.dtype)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _save_for_map_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale, ctx.dropout_p = inputs
    ctx.save_for_backward(*tensors, output)


def product_gradients(dscore: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of queries `[B, Q, N, D]` and keys, given that of their products."""
    dscore = dscore.to(query.dtype)
    dquery = (dscore @ key.transpose(1, 2)).transpose(1, 2)
    dkey = (dscore.mT @ query.transpose(1, 2)).transpose(1, 2)
    return dquery, dkey if len(key) == len(dkey) else dkey.sum(0, keepdim=True)


def seed_tensor(seed: int | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """Return the seed of dropout, drawn from torch's generator if it is None."""
    if dropout_p == 0.0:
        return None
    # On the device: a captured graph draws again at each replay, and nothing waits.
    if seed is None:
        return torch.randint(2**63 - 1, (1,), device=device)
    return torch.full((1,), seed, dtype=torch.int64, device=device)
