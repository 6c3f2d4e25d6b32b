"""What the microbenchmarks measure: calls of the operators, and the same functions by others.

`WORKS` has an entry for each operator. An entry makes a `Work` from a shape, a dtype and a device:
random inputs, providers of the function (ours by backend, then others'), its definition for the
check of accuracy, and what it has to compute and to move.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from unittest import mock

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cdetr_kernels
from cdetr_kernels import dispatch, registry

Function = Callable[..., Tensor | Sequence[Tensor]]
HEADS, SIZE, CLASSES, LAYERS = 8, 32, 91, 6


@dataclasses.dataclass(frozen=True)
class Work:
    """One call of an operator.

    Args:
        op: Name of the operator.
        shape: Its sizes, for the reader.
        dtype: dtype of the inputs.
        inputs: Tensors by name (None: absent). Those in floating point are rounded to `dtype`.
        exact: The definition; called on fp64 copies of the inputs.
        providers: Makes each provider's function; what that raises says why it cannot run.
        operations: Multiplications and additions, forward and then forward and backward.
        moved: Bytes to read and write once, forward and then forward and backward.
        gradients: Names of the inputs that have a gradient.
        per_image: The first axis of inputs and outputs is the image, so few images are checked.
        uncapturable: Providers that wait for the device.
        plain: The definition in the work's dtype, where that is not `exact` on the inputs.
    """

    op: str
    shape: str
    dtype: torch.dtype
    inputs: dict[str, Tensor | None]
    exact: Function
    providers: dict[str, Callable[[], Function]]
    operations: tuple[float, float]
    moved: tuple[float, float]
    gradients: tuple[str, ...] = ()
    per_image: bool = False
    uncapturable: tuple[str, ...] = ()
    plain: Function | None = None

    @property
    def device(self) -> torch.device:
        return next(x for x in self.inputs.values() if x is not None).device


def own_backends(op: str, tensor: Tensor) -> list[str]:
    """Returns the backends that can run an operator where a tensor is."""
    implementations = registry.operator(op).implementations
    return [name for name, x in implementations.items() if x.unsupported_reason(tensor) is None]


def _own(op: str, tensor: Tensor, call: Callable[..., Function]) -> dict[str, Callable]:
    return {
        f"cdetr_fast {name}": lambda name=name: functools.partial(call, backend=name)
        for name in own_backends(op, tensor)
    }


def _compiled(function: Function) -> Callable[[], Function]:
    return lambda: torch.compile(function, dynamic=False)


def _bytes(*tensors: Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def _draw(device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Returns normal(*shape) and uniform(*shape), the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    def uniform(*shape):
        return torch.rand(shape, generator=generator).to(device, dtype)

    return normal, uniform


def rectangles(batch: int, height: int, width: int, device: torch.device) -> Tensor:
    """Key mask of a padded batch: three quarters of the height, then of the width, then all."""
    mask = torch.ones(batch, height, width, dtype=torch.bool, device=device)
    mask[0::3, height * 3 // 4 :] = False
    mask[1::3, :, width * 3 // 4 :] = False
    return mask


# ----------------------------------------------------------------------- conditional attention


def _concatenated(q_content, q_spatial, k_content, k_spatial):
    """Queries and keys `[B, N, rows, 2D]` as the paper writes them (or of D, without halves)."""
    query, key = q_content, k_content
    if q_spatial is not None:
        query = torch.cat((q_content, q_spatial), -1)
        key = torch.cat((k_content, k_spatial), -1)
    return query.transpose(1, 2), key.transpose(1, 2)


def concat_and_sdpa(q_content, q_spatial, k_content, k_spatial, value, key_mask):
    query, key = _concatenated(q_content, q_spatial, k_content, k_spatial)
    mask = None if key_mask is None else key_mask[:, None, None, :]
    value = value.transpose(1, 2)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask
    ).transpose(1, 2)


def _sdpa(backend: SDPBackend, padded: bool = False) -> Callable[[], Function]:
    """Concatenation and one backend; flash attention needs values as wide as the queries."""

    def attend(q_content, q_spatial, k_content, k_spatial, value, key_mask):
        width = value.shape[-1]
        if padded and q_spatial is not None:
            value = torch.nn.functional.pad(value, (0, 2 * q_content.shape[-1] - width))
        with sdpa_kernel(backend):
            output = concat_and_sdpa(q_content, q_spatial, k_content, k_spatial, value, key_mask)
        return output[..., :width]

    return lambda: attend


def _eager(q_content, q_spatial, k_content, k_spatial, value, key_mask):
    """Attention in plain operations, for torch.compile."""
    query, key = _concatenated(q_content, q_spatial, k_content, k_spatial)
    score = query @ key.mT * query.shape[-1] ** -0.5
    if key_mask is not None:
        score = score.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return (score.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)


def _flex(key_mask: Tensor | None, queries: int, keys: int) -> Callable[[], Function]:
    """FlexAttention; its block mask is made once, outside of the times."""

    def make():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        block_mask = None
        if key_mask is not None:
            block_mask = create_block_mask(
                lambda b, h, q, k: key_mask[b, k],
                len(key_mask), None, queries, keys, device=key_mask.device,
            )  # fmt: skip

        def attend(q_content, q_spatial, k_content, k_spatial, value, key_mask):
            query, key = _concatenated(q_content, q_spatial, k_content, k_spatial)
            output = flex_attention(query, key, value.transpose(1, 2), block_mask=block_mask)
            return output.transpose(1, 2)

        return torch.compile(attend, dynamic=False)

    return make


def conditional_attention(
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    queries: int | None = 300,
    height: int = 25,
    width: int = 42,
    masked: bool = False,
) -> Work:
    """Cross-attention of a decoder layer; with `queries=None` self-attention of the encoder."""
    normal, _ = _draw(device, dtype)
    keys, spatial = height * width, queries is not None
    queries = queries or keys
    rows = {"q_content": queries, "q_spatial": queries, "k_content": keys, "k_spatial": keys,
            "value": keys}  # fmt: skip
    inputs: dict[str, Tensor | None] = {
        name: normal(batch, count, HEADS, SIZE) for name, count in rows.items()
    }
    if not spatial:
        inputs |= {"q_spatial": None, "k_spatial": None}
    mask = rectangles(batch, height, width, device).flatten(1) if masked else None
    halves = 2 if spatial else 1
    pairs = HEADS * queries * (batch * keys if mask is None else int(mask.sum()))
    # Backward has the scores again, then the gradients of queries, keys, probabilities and values.
    forward = 2 * pairs * SIZE * (halves + 1)
    backward = 2 * pairs * SIZE * (3 * halves + 2)
    read = _bytes(*inputs.values(), mask)
    written = _bytes(inputs["q_content"])
    on_gpus = {} if device.type != "cuda" else {
        "sdpa cudnn": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": _sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa flash, padded values": _sdpa(SDPBackend.FLASH_ATTENTION, padded=True),
        "flex attention": _flex(mask, queries, keys),
    }  # fmt: skip
    kind = "cross" if spatial else "encoder self"
    return Work(
        "conditional_attention",
        f"{kind} B={batch} Q={queries} S={keys}{' masked' if masked else ''}",
        dtype,
        inputs | {"key_mask": mask},
        _sdpa(SDPBackend.MATH)(),
        {
            **_own(
                "conditional_attention",
                inputs["value"],
                cdetr_kernels.conditional_attention,
            ),
            "sdpa math": _sdpa(SDPBackend.MATH),
            **on_gpus,
            "compiled eager": _compiled(_eager),
        },
        (forward, forward + backward),
        (read + written, 2 * (read + written) + written),
        tuple(name for name, x in inputs.items() if x is not None),
        per_image=True,
    )


def conditional_attention_separable(
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    height: int = 25,
    width: int = 42,
    masked: bool = False,
    queries: int = 300,
) -> Work:
    """Spatial keys of rows and columns; who needs all of them adds them up, in its times."""
    whole = conditional_attention(dtype, device, batch, queries, height, width, masked)
    normal, _ = _draw(device, dtype, seed=1)
    inputs = {name: x for name, x in whole.inputs.items() if name != "k_spatial"}
    inputs |= {
        "k_rows": normal(batch, height, HEADS, SIZE),
        "k_columns": normal(batch, width, HEADS, SIZE),
    }

    def with_all_keys(function):
        def attend(k_rows, k_columns, **others):
            k_spatial = (k_rows[:, :, None] + k_columns[:, None]).flatten(1, 2)
            return function(k_spatial=k_spatial, **others)

        return attend

    # The spatial scores of h + w keys in place of those of all keys.
    forward, both = whole.operations
    saved = 2 * batch * HEADS * SIZE * queries * (height * width - height - width)
    moved = _bytes(*inputs.values(), inputs["q_content"])
    return Work(
        "conditional_attention_separable",
        f"B={batch} Q={queries} h={height} w={width}{' masked' if masked else ''}",
        dtype,
        inputs,
        with_all_keys(whole.exact),
        {
            **_own(
                "conditional_attention_separable",
                inputs["value"],
                cdetr_kernels.conditional_attention_separable,
            ),
            **{
                f"all keys, {name}": lambda make=make: with_all_keys(make())
                for name, make in whole.providers.items()
                if "compiled" not in name and "flex" not in name
            },
        },
        (forward - saved, both - 4 * saved),
        (moved, 3 * moved),
        tuple(name for name in inputs if name != "key_mask"),
        per_image=True,
    )


def cross_attention_module(
    dtype: torch.dtype,
    device: torch.device,
    batch: int = 1,
    height: int = 25,
    width: int = 42,
    masked: bool = False,
    queries: int = 300,
) -> Work:
    """The decoder's cross-attention module with its projections, against transformers'."""
    from cdetr_fast.models.attention import ConditionalDetrDecoderCrossAttention

    normal, _ = _draw(device, dtype)
    channels, keys = HEADS * SIZE, height * width
    inputs: dict[str, Tensor | None] = {
        "hidden_states": normal(batch, queries, channels),
        "memory": normal(batch, keys, channels),
        "query_sine": normal(batch, queries, channels),
        "position": normal(batch, keys, channels),
    }
    mask = rectangles(batch, height, width, device).flatten(1) if masked else None
    torch.manual_seed(0)
    module = ConditionalDetrDecoderCrossAttention(channels, HEADS, 0.0, is_first=False)
    weights = {name: x.to(dtype) for name, x in module.state_dict().items()}
    modules = {}
    for kind in (dtype, torch.float64):
        module = ConditionalDetrDecoderCrossAttention(channels, HEADS, 0.0, is_first=False)
        module.load_state_dict(weights)
        modules[kind] = module.to(device, kind).requires_grad_(False)

    def run(hidden_states, memory, query_sine, position, key_mask, backend="torch"):
        module = modules[hidden_states.dtype]
        with mock.patch.object(dispatch, "PREFERRED", backend):
            stored = module.project_memory(memory, position)
            return module(hidden_states, query_sine, None, stored, key_mask)[0]

    def theirs(implementation):
        import transformers
        from transformers.models.conditional_detr import modeling_conditional_detr as modeling

        config = transformers.ConditionalDetrConfig(backbone="resnet18")
        config._attn_implementation = implementation
        module = modeling.ConditionalDetrDecoderCrossAttention(config, channels, HEADS)
        missing, unexpected = module.load_state_dict(weights, strict=False)
        # They have the first layer's additional projection in every layer.
        if unexpected or any(not name.startswith("q_pos_proj") for name in missing):
            raise RuntimeError(f"weights do not fit: {missing}, {unexpected}")
        module = module.to(device, dtype).requires_grad_(False)

        def attend(hidden_states, memory, query_sine, position, key_mask):
            mask = None
            if key_mask is not None:
                mask = key_mask[:, None, None, :].expand(-1, 1, queries, -1)
                if implementation == "eager":
                    mask = hidden_states.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
            return module(hidden_states, memory, query_sine, position, attention_mask=mask)[0]

        return attend

    forward = 2 * batch * channels**2 * (3 * queries + 3 * keys)
    attention = 2 * batch * HEADS * SIZE * queries * keys
    moved = _bytes(*inputs.values(), mask, inputs["hidden_states"])
    return Work(
        "cross_attention_module",
        f"B={batch} Q={queries} S={keys}{' masked' if masked else ''}",
        dtype,
        inputs | {"key_mask": mask},
        run,
        {
            **_own("conditional_attention", inputs["memory"], run),
            "transformers sdpa": lambda: theirs("sdpa"),
            "transformers eager": lambda: theirs("eager"),
            "transformers compiled": lambda: torch.compile(theirs("sdpa"), dynamic=False),
        },
        (forward + 3 * attention, 2 * forward + 11 * attention),
        (moved, 3 * moved),
        tuple(inputs),
        per_image=True,
    )


# ------------------------------------------------------------------------------ position codes


def sine_position_2d(
    dtype: torch.dtype, device: torch.device, batch: int = 1, height: int = 25, width: int = 42
) -> Work:
    channels = HEADS * SIZE
    mask = rectangles(batch, height, width, device)

    def run(mask, backend="torch", double=False):
        # The mask has no dtype to go by: the definition is computed in fp64.
        kind = torch.float64 if double else dtype
        return cdetr_kernels.sine_position_2d(mask, channels, dtype=kind, backend=backend)

    def theirs():
        from transformers.models.conditional_detr.modeling_conditional_detr import (
            ConditionalDetrSinePositionEmbedding,
        )

        module = ConditionalDetrSinePositionEmbedding(channels // 2, normalize=True)

        def code(mask):
            # A new view each time, as the module keeps the code of the mask that it saw last.
            out = module((batch, channels, height, width), mask.device, dtype, mask.view_as(mask))
            return out.flatten(2).transpose(1, 2).contiguous()

        return code

    written = batch * height * width * channels * torch.finfo(dtype).bits // 8
    return Work(
        "sine_position_2d",
        f"B={batch} h={height} w={width} C={channels}",
        dtype,
        {"mask": mask},
        functools.partial(run, double=True),
        {
            **_own("sine_position_2d", mask, run),
            "compiled eager": _compiled(run),
            "transformers": theirs,
        },
        (0, 0),
        (_bytes(mask) + written,) * 2,
        per_image=True,
        plain=run,
    )


def sine_query(
    dtype: torch.dtype, device: torch.device, batch: int = 1, queries: int = 300
) -> Work:
    channels = HEADS * SIZE
    normal, uniform = _draw(device)
    inputs: dict[str, Tensor | None] = {
        "points": uniform(1, queries, 2).to(dtype),
        "query_scale": normal(batch, queries, channels).to(dtype),
    }

    def run(points, query_scale, backend="torch"):
        return cdetr_kernels.sine_query(points, channels, query_scale, backend=backend)

    def theirs():
        from transformers.models.conditional_detr.modeling_conditional_detr import (
            encode_sinusoidal_position_embedding,
        )

        return lambda points, query_scale: (
            encode_sinusoidal_position_embedding(points, channels // 2) * query_scale
        )

    moved = _bytes(*inputs.values(), inputs["query_scale"])
    return Work(
        "sine_query",
        f"B={batch} Q={queries} C={channels}",
        dtype,
        inputs,
        run,
        {
            **_own("sine_query", inputs["points"], run),
            "compiled eager": _compiled(run),
            "transformers": theirs,
        },
        (0, 0),
        (moved, 2 * moved + _bytes(inputs["query_scale"])),
        tuple(inputs),
    )


# ---------------------------------------------------------------------------------- layer norm


def add_then_layer_norm(x, residual, weight, bias):
    return torch.nn.functional.layer_norm(residual + x, weight.shape, weight, bias)


def residual_layer_norm(
    dtype: torch.dtype, device: torch.device, batch: int = 1, rows: int = 300
) -> Work:
    channels = HEADS * SIZE
    normal, _ = _draw(device)
    inputs: dict[str, Tensor | None] = {
        name: normal(*shape).to(dtype)
        for name, shape in (
            ("x", (batch, rows, channels)),
            ("residual", (batch, rows, channels)),
            ("weight", (channels,)),
            ("bias", (channels,)),
        )
    }

    def run(x, residual, weight, bias, backend="torch"):
        return cdetr_kernels.residual_layer_norm(x, residual, weight, bias, backend=backend)

    return Work(
        "residual_layer_norm",
        f"B={batch} rows={rows} C={channels}",
        dtype,
        inputs,
        run,
        {
            **_own("residual_layer_norm", inputs["x"], run),
            "add, then layer_norm": lambda: add_then_layer_norm,
            "compiled eager": _compiled(add_then_layer_norm),
        },
        (0, 0),
        (_bytes(*inputs.values(), inputs["x"]),) * 2,
    )
