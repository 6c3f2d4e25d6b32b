"""Conditional attention in plain PyTorch.

    score[b,n,i,j] = scale * (q_content[b,i,n] . k_content[b,j,n]
                              + q_spatial[b,i,n] . k_spatial[b,j,n])
    out[b,i,n]     = sum_j softmax_j(score[b,n,i])[j] * value[b,j,n]

In fp32 the content and the spatial halves are not concatenated: two products add up into one score.
Softmax statistics are in fp32 (fp64 for fp64 inputs). A row whose keys are all masked gives 0,
never NaN.

Source: Meng et al., "Conditional DETR for Fast Training Convergence", section 3.3.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_tracing  # type: ignore[attr-defined]  # public, but not in its __all__

from cdetr_kernels.ops.conditional_attention import concatenated

# Bytes of spatial scores at a time, where torch's fused attention takes them as a bias on a CPU:
# two images of 800x1333. Pieces of 8 to 20 MiB take the same time (Zen 4), one of 24 a tenth more,
# one of 40 half as long again, as glibc gives memory of that size back to the system.
_PIECE = 20 * 2**20

# From this many queries on, torch's fused attention takes 256 of them at a time on a CPU, below 32
# or 64, which makes its gradients slow in half precision: see `_fused`.
_LARGE_BLOCKS = 768


class SpatialScores(NamedTuple):
    """Scores [B, N, Q, S] that are computed when and where they are needed.

    Attributes:
        parts: What they are computed from, each [B, N, ...].
        combine: Computes the scores of some images and heads from these of each part, into `out` if
            it is given, in shape [b, n, Q, *map_shape].
        map_shape: Shape of the map of S positions.
    """

    parts: tuple[Tensor, ...]
    combine: Callable[..., Tensor]
    map_shape: tuple[int, ...]

    def all(self) -> Tensor:
        """Return those of all images and heads, [B, N, Q, S]."""
        return self.combine(*self.parts).flatten(3)


def conditional_attention(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int | None,
    return_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """Define `cdetr_kernels.conditional_attention`; see there for shapes."""
    if concatenated.is_taken(q_content, seed, return_attention):
        halves = (q_content, q_spatial, k_content, k_spatial)
        return concatenated.conditional_attention(*halves, value, key_mask, scale, dropout_p), None
    if q_spatial is None and not return_attention and seed is None:
        # Without a spatial half this is torch's fused attention, which knows masked rows.
        mask = None if key_mask is None else _over_queries(key_mask)
        return _fused(q_content, k_content, value, mask, scale, dropout_p), None
    spatial_scores = None
    if q_spatial is not None and k_spatial is not None:
        tensors = (q_content, q_spatial, k_content, k_spatial, value)
        if joins_halves(tensors, dropout_p, return_attention):
            q_content, k_content = concatenated.join(q_content, q_spatial, k_content, k_spatial)
        else:
            query = q_spatial * scale
            keys = k_spatial.expand(query.shape[0], -1, -1, -1)
            parts = (query.transpose(1, 2), keys.permute(0, 2, 3, 1))
            spatial_scores = SpatialScores(parts, torch.matmul, k_spatial.shape[1:2])
    options = (key_mask, scale, dropout_p, seed, return_attention)
    return attend(q_content, k_content, value, spatial_scores, *options)


def attend(
    q_content: Tensor,
    k_content: Tensor,
    value: Tensor,
    spatial_scores: SpatialScores | None,
    key_mask: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: int | None,
    return_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """Add the content scores to the spatial ones, already scaled, and attend."""
    if spatial_scores is not None and _takes_a_bias(
        (q_content, k_content, value, *spatial_scores.parts), dropout_p, return_attention
    ):
        return _attend_with_bias(q_content, k_content, value, spatial_scores, key_mask, scale), None

    scores = dot(q_content * scale, k_content)
    if spatial_scores is not None:
        scores = scores + spatial_scores.all()
    if key_mask is not None:
        # A finite fill keeps softmax and its gradient free of NaN where a whole row is masked.
        masked = ~_over_queries(key_mask)
        scores = scores.masked_fill_(masked, torch.finfo(scores.dtype).min)
    # Its statistics are in fp32 without copies of half-precision scores in fp32. Autocast may make
    # it fp32 altogether.
    attention = torch.softmax(scores, dim=-1).to(value.dtype)
    if dropout_p > 0.0:
        attention = attention * _dropout_multiplier(attention, dropout_p, seed)
    any_key = None
    if key_mask is not None:
        # Without a key the result is zero. (Elsewhere softmax has made masked keys zero already.)
        any_key = key_mask.any(dim=-1)[:, None, None, None].to(value.dtype)
        if return_attention:  # the output comes from the map that is returned, as gradients do
            attention = attention * any_key
    output = (attention @ value.transpose(1, 2)).transpose(1, 2)
    if any_key is not None and not return_attention:
        output = output * any_key
    return output, attention if return_attention else None


def joins_halves(tensors: Sequence[Tensor], dropout_p: float, return_attention: bool) -> bool:
    """Return whether scores are one product of concatenated halves.

    In half precision that is faster than to add scores, forward and backward, and the sum is
    rounded once instead of three times.

    Args:
        tensors: Queries, keys and values.
        dropout_p: As in `conditional_attention`.
        return_attention: Likewise.
    """
    is_half = tensors[0].element_size() < 4
    return is_half and not _takes_a_bias(tensors, dropout_p, return_attention)


def _takes_a_bias(tensors: Sequence[Tensor], dropout_p: float, return_attention: bool) -> bool:
    """Return whether torch's fused attention takes the spatial scores as a bias.

    On CPUs it does, in half of the time or less (300 queries, 850 keys, 8 heads of 32), but it has
    no gradient for the bias.
    """
    # A traced graph may be differentiated.
    if return_attention or dropout_p > 0.0 or not tensors[0].is_cpu or is_tracing():
        return False
    return not _needs_gradients(tensors)


def _needs_gradients(tensors: Iterable[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _attend_with_bias(
    q_content: Tensor,
    k_content: Tensor,
    value: Tensor,
    spatial_scores: SpatialScores,
    key_mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Attend some images, or heads of one, at a time: as many as have `_PIECE` bytes of scores."""
    batch, queries, heads, _ = q_content.shape
    keys = k_content.shape[1]
    parts, combine, map_shape = spatial_scores
    tensors = [*(x.transpose(1, 2) for x in (q_content, k_content, value)), *parts]
    if key_mask is not None:
        # The logarithm is 0 or minus infinity. It is added, as `masked_fill_` takes four times as
        # long.
        fill = _over_queries(key_mask.to(parts[0].dtype).log_())
        tensors.append(fill.expand(-1, heads, -1, -1))

    def attend_piece(
        query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, out: Tensor | None = None
    ) -> Tensor:
        """Return [b, Q, n, D] of inputs [b, n, ...]."""
        bias = combine(*rest[: len(parts)], out=out).flatten(3)
        if key_mask is not None:
            bias = bias.add_(rest[-1])
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale)
        return output.transpose(1, 2)

    heads_at_once = max(1, _PIECE // max(1, queries * keys * value.element_size()))
    # A compiled graph is one for all batches and sizes.
    if torch.compiler.is_compiling() or heads_at_once >= batch * heads:
        return attend_piece(*tensors)
    images_at_once, heads_at_once = max(1, heads_at_once // heads), min(heads_at_once, heads)
    buffer = parts[0].new_empty(images_at_once, heads_at_once, queries, *map_shape)

    def part_of_buffer(query: Tensor) -> Tensor:
        size = query.shape[:2]
        return buffer if size == buffer.shape[:2] else buffer[: size[0], : size[1]]

    outputs = []
    for images in _pieces(tensors, images_at_once, dim=0):
        of_heads = [
            attend_piece(*piece, out=part_of_buffer(piece[0]))
            for piece in _pieces(images, heads_at_once, dim=1)
        ]
        outputs.append(_joined(of_heads, dim=2))
    return _joined(outputs, dim=0)


def _pieces(tensors: Sequence[Tensor], size: int, dim: int) -> Iterable[Sequence[Tensor]]:
    """Split tensors of one length along a dimension into pieces of `size`."""
    if tensors[0].shape[dim] <= size:
        return [tensors]
    return zip(*(x.split(size, dim) for x in tensors), strict=True)


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _over_queries(key_mask: Tensor) -> Tensor:
    """Return [B, S] as [B, 1, 1, S]."""
    batch, keys = key_mask.shape
    return key_mask.view(batch, 1, 1, keys)  # one view, not an index of two


def dot(query: Tensor, key: Tensor) -> Tensor:
    """Return the products of [B, Q, N, D] and [B|1, S, N, D], [B, N, Q, S]."""
    return query.transpose(1, 2) @ key.permute(0, 2, 3, 1)


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask_or_bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Call the fused attention of torch, in this package's order of axes.

    Gradients of few queries in half precision are computed in fp32. torch multiplies small blocks
    of them, and in half precision each product is a call of oneDNN: forward and backward of 300
    queries and keys in bf16 takes 1.4 times as long as in fp32, of 100 three times (8 heads of 32).
    """
    is_half, is_short = query.element_size() < 4, query.shape[1] < _LARGE_BLOCKS
    is_graph = is_tracing() or torch.compiler.is_compiling()  # which serves other sizes, too
    if is_half and is_short and not is_graph and _needs_gradients((query, key, value)):
        with torch.autocast(query.device.type, enabled=False):
            output = _fused(
                query.float(), key.float(), value.float(), mask_or_bias, scale, dropout_p
            )
            return output.to(query.dtype)
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask_or_bias,
        dropout_p=dropout_p,
        scale=scale,
    )
    return output.transpose(1, 2)


def _dropout_multiplier(attention: Tensor, dropout_p: float, seed: int | None) -> Tensor:
    generator = None
    if seed is not None:
        generator = torch.Generator(device=attention.device).manual_seed(seed)
    kept = torch.rand(attention.shape, generator=generator, device=attention.device) >= dropout_p
    return kept.to(attention.dtype) / (1.0 - dropout_p)
