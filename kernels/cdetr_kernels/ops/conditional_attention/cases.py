"""Inputs of `conditional_attention` for tests, benchmarks and the audit."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cdetr_kernels.ops.conditional_attention import conditional_attention
from cdetr_kernels.testing.case import (
    Case,
    Function,
    Inputs,
    RandomTensors,
    Sizes,
    count_bytes,
    key_mask,
)

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

MAPS = {1050: {"height": 25, "width": 42}, 4200: {"height": 50, "width": 84}}


def typical(batches: tuple[int, ...], keys: tuple[int, ...]) -> list[dict[str, Any]]:
    """Return the sizes of the model, without padding first."""
    return [
        {"batch": batch, **MAPS[count], "mask": mask}
        for mask in (None, "padded")
        for batch in batches
        for count in keys
    ]


# With dropout in attention, and with the map: a training step of a batch, and one image.
DROPOUT: dict[str, Any] = {
    "batch": 2,
    "height": 25,
    "width": 42,
    "mask": "padded",
    "dropout_p": 0.1,
}
MAP: dict[str, Any] = {"batch": 1, "height": 25, "width": 42, "returns_map": True}
_DECODER: dict[str, Any] = {"queries": None, "height": 12, "width": 25, "mask": None}
_SMALLEST = {"batch": 1, "queries": 2, "height": 2, "width": 2, "heads": 1, "size": 4}
_SMALL = {"batch": 2, "queries": 37, "height": 7, "width": 9, "heads": 2, "mask": "padded"}
SIZES = {
    "conditional_attention": Sizes(
        smallest=_SMALLEST,
        small=_SMALL,
        medium={"batch": 3, "queries": 67, "height": 13, "width": 21, "mask": "padded"},
        typical=typical((1, 8, 32), (1050, 4200)),
        called=[*typical((1, 8), (1050,)), DROPOUT, MAP],
    ),
    "encoder_self_attention": Sizes(
        smallest=_SMALLEST | {"queries": None},
        small={"batch": 1, "queries": None, "height": 7, "width": 9, "heads": 2},
        medium={"batch": 2, "queries": None, "height": 13, "width": 21},
        typical=[
            {**sizes, "queries": None}
            for sizes in typical((1, 8), (1050,)) + typical((1,), (4200,))
        ],
        # Of the encoder, and of the decoder, whose queries are never padded.
        called=[
            *({**sizes, "queries": None} for sizes in typical((1, 8), (1050,))),
            *({"batch": batch} | _DECODER for batch in (1, 8)),
            *(options | {"queries": None} for options in (DROPOUT, MAP)),
            *(options | _DECODER for options in (DROPOUT, MAP)),
        ],
    ),
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
    queries: int | None = 300,
    height: int = 25,
    width: int = 42,
    mask: str | None = None,
    heads: int = 8,
    size: int = 32,
    value_size: int | None = None,
    spatial: bool = True,
    shared: tuple[str, ...] = (),
    seed: int = 0,
    dropout_p: float = 0.0,
    returns_map: bool = False,
) -> Case:
    """Make cross-attention of a decoder layer, or self-attention of the encoder.

    Args:
        dtype: dtype of the inputs.
        device: Device of the inputs.
        batch: Images.
        queries: Queries; None is self-attention, with a query for each key and no spatial half.
        height: Rows of the map.
        width: Columns of the map.
        mask: Kind of the key mask, as `testing.case.key_mask` knows them.
        heads: Heads.
        size: Size of each half of a head.
        value_size: Size of a head of the values; None is `size`.
        spatial: Whether there is a spatial half.
        shared: Names of the keys that the batch shares.
        seed: Seed of the inputs.
        dropout_p: Dropout of weights, seeded; what is compared with leaves out the same weights.
        returns_map: Whether the attention map is a second output.
    """
    spatial = spatial and queries is not None
    keys = height * width
    queries = keys if queries is None else queries
    random = RandomTensors(device, dtype, seed)
    rows = {"q_content": queries, "q_spatial": queries, "k_content": keys, "k_spatial": keys}
    inputs: Inputs = {
        name: random.normal(1 if name in shared else batch, count, heads, size)
        for name, count in rows.items()
    }
    inputs["value"] = random.normal(batch, keys, heads, value_size or size)
    if not spatial:
        inputs |= {"q_spatial": None, "k_spatial": None}
    attended = key_mask(mask, batch, height, width, "cpu")
    halves = 2 if spatial else 1
    pairs = heads * queries * (batch * keys if attended is None else int(attended.sum()))
    # Backward has the scores again, then the gradients of queries, keys, probabilities and values.
    forward = 2 * pairs * size * (halves + 1)
    backward = 2 * pairs * size * (3 * halves + 2)
    read = count_bytes(*inputs.values(), attended)
    written = count_bytes(inputs["q_content"])
    return Case(
        "conditional_attention",
        f"{'cross' if spatial else 'encoder self'} B={batch} Q={queries} S={keys}"
        f"{f' {mask}' if mask else ''}"
        f"{' dropout' if dropout_p else ''}{' map' if returns_map else ''}",
        dtype,
        inputs | {"key_mask": None if attended is None else attended.flatten(1).to(device)},
        conditional_attention,
        options(dropout_p, returns_map),
        gradients=tuple(name for name, x in inputs.items() if x is not None),
        flops=(forward, forward + backward),
        bytes_moved=(read + written, 2 * (read + written) + written),
        per_image=not shared and not dropout_p,
        definition=definition(dropout_p, returns_map),
        peers={} if dropout_p or returns_map else _peers(torch.device(device)),
    )


def options(dropout_p: float, returns_map: bool) -> dict[str, Any]:
    """Return the options of a call that differ from those of inference."""
    dropout = {"dropout_p": dropout_p, "seed": 1} if dropout_p else {}
    return {**dropout, **({"return_attention": True} if returns_map else {})}


def definition(dropout_p: float, returns_map: bool) -> Function | None:
    """Return what a call is compared with; None is the backend "torch"."""
    if dropout_p:
        return functools.partial(_dropped, dropout_p)
    return None if returns_map else sdpa(SDPBackend.MATH)()


def _dropped(
    dropout_p: float,
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    """Attend without the weights that the kernels drop: they go by seed and position alone."""
    with torch.no_grad():
        same = torch.zeros_like(q_content, dtype=torch.float32)
        keys = torch.zeros_like(k_content, dtype=torch.float32).expand(len(same), -1, -1, -1)
        _, kept = conditional_attention(
            same, None, keys, None, keys, dropout_p=dropout_p, seed=1, backend="triton",
            return_attention=True,
        )  # fmt: skip
    query, key = concatenated(q_content, q_spatial, k_content, k_spatial)
    score = query @ key.mT * query.shape[-1] ** -0.5
    if key_mask is not None:
        score = score.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    weights = score.softmax(-1) * (kept != 0).to(score.dtype) / (1.0 - dropout_p)
    return (weights @ value.transpose(1, 2)).transpose(1, 2)


# --------------------------------------------------------------------------------------- peers


def concatenated(
    q_content: Tensor, q_spatial: Tensor | None, k_content: Tensor, k_spatial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return queries and keys `[B, N, rows, 2D]` as the paper writes them (of D if plain)."""
    query, key = q_content, k_content
    if q_spatial is not None and k_spatial is not None:
        batch = len(q_content)
        query = torch.cat((q_content, q_spatial), -1)
        key = torch.cat([x.expand(batch, -1, -1, -1) for x in (k_content, k_spatial)], -1)
    return query.transpose(1, 2), key.transpose(1, 2)


def sdpa(backend: SDPBackend, padded: bool = False) -> Callable[[], Function]:
    """Return a maker of concatenation and one backend of torch's attention.

    Args:
        backend: The backend.
        padded: Pad values to the width of the queries, which flash attention needs.
    """

    def attend(
        q_content: Tensor,
        q_spatial: Tensor | None,
        k_content: Tensor,
        k_spatial: Tensor | None,
        value: Tensor,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        width = value.shape[-1]
        query, key = concatenated(q_content, q_spatial, k_content, k_spatial)
        if padded:
            value = F.pad(value, (0, query.shape[-1] - width))
        mask = None if key_mask is None else key_mask[:, None, None, :]
        with sdpa_kernel(backend):
            output = F.scaled_dot_product_attention(
                query, key, value.transpose(1, 2), attn_mask=mask
            )
        return output.transpose(1, 2)[..., :width]

    return lambda: attend


def _eager(
    q_content: Tensor,
    q_spatial: Tensor | None,
    k_content: Tensor,
    k_spatial: Tensor | None,
    value: Tensor,
    key_mask: Tensor | None,
) -> Tensor:
    """Attend in plain operations, for torch.compile."""
    query, key = concatenated(q_content, q_spatial, k_content, k_spatial)
    score = query @ key.mT * query.shape[-1] ** -0.5
    if key_mask is not None:
        score = score.masked_fill(~key_mask[:, None, None, :], -torch.inf)
    return (score.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)


def _flex() -> Function:
    """Make FlexAttention; the block mask of the first call is kept, outside of the times."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    block_masks: dict[int, Any] = {}

    def attend(
        q_content: Tensor,
        q_spatial: Tensor | None,
        k_content: Tensor,
        k_spatial: Tensor | None,
        value: Tensor,
        block_mask: Any,
    ) -> Tensor:
        query, key = concatenated(q_content, q_spatial, k_content, k_spatial)
        output: Tensor = flex_attention(query, key, value.transpose(1, 2), block_mask=block_mask)
        return output.transpose(1, 2)

    compiled = torch.compile(attend, dynamic=False)

    def call(key_mask: Tensor | None, **tensors: Any) -> Tensor:
        if key_mask is not None and id(key_mask) not in block_masks:
            queries = tensors["q_content"].shape[1]
            block_masks[id(key_mask)] = create_block_mask(
                lambda b, h, q, k: key_mask[b, k],
                len(key_mask), None, queries, key_mask.shape[1], device=key_mask.device,
            )  # fmt: skip
        return compiled(**tensors, block_mask=block_masks.get(id(key_mask)))

    return call


def _peers(device: torch.device) -> dict[str, Callable[[], Function]]:
    on_gpus = {
        "sdpa cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "sdpa efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa flash, padded values": sdpa(SDPBackend.FLASH_ATTENTION, padded=True),
        "flex attention": _flex,
    }
    return {
        "sdpa math": sdpa(SDPBackend.MATH),
        **(on_gpus if device.type == "cuda" else {}),
        "compiled eager": lambda: torch.compile(_eager, dynamic=False),
    }


# --------------------------------------------------------------------------------------- audit


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled: a training step at 800x1066, and the map."""
    from cdetr_kernels.testing.machine_code import Audit

    return [
        Audit("half 32", functools.partial(audited, "half", 32, 0.0)),
        Audit("half 32 plain", functools.partial(audited, "half", 32, 0.0, spatial=False)),
        *audits_of_all_heads(
            audited,
            {
                "unmasked": {"dropout_p": 0.0, "mask": None},
                "plain": {"dropout_p": 0.0, "spatial": False},
                "plain unmasked dropout": {"spatial": False, "mask": None},
            },
        ),
    ]


def audits_of_all_heads(
    audited: "Callable[..., dict[str, Audited]]", variants: dict[str, dict[str, Any]]
) -> "list[Audit]":
    """Return the calls of each precision and width with dropout, which needs the most registers.

    Args:
        audited: Returns the launches of a call.
        variants: Options of the other calls, by name; each pair of options is in one of them.
    """
    from cdetr_kernels.gpu.configurations import WIDTHS
    from cdetr_kernels.testing.machine_code import Audit

    sizes = [(precision, size) for precision in ("half", "tf32", "ieee") for size in WIDTHS]
    dropout = [
        Audit(
            f"{precision} {size} dropout",
            functools.partial(audited, precision, size),
            precision,
            brief=precision == "half" and size == 32,
        )
        for precision, size in sizes
    ]
    others = [
        Audit(
            f"{precision} {size} {name}",
            functools.partial(audited, precision, size, **options),
            precision,
            brief=False,
            documented=False,
        )
        for precision, size in sizes
        for name, options in {**variants, "fp16": {"half": torch.float16}}.items()
        if (precision, size) == ("half", 32) or name != "fp16"
    ]
    return [*dropout, *others]


def audited(
    precision: str,
    size: int,
    dropout_p: float = 0.1,
    spatial: bool = True,
    mask: str | None = "padded",
    half: torch.dtype = torch.bfloat16,
) -> "dict[str, Audited]":
    """Return the launches for one precision and size of a head, by name."""
    from cdetr_kernels.gpu.attention import merge_launch
    from cdetr_kernels.ops.conditional_attention.triton import ATTENTION
    from cdetr_kernels.testing.machine_code import Audited

    dtype = half if precision == "half" else torch.float32
    case = make(dtype, "meta", 8, mask=mask, size=size, spatial=spatial, shared=("k_spatial",))
    *tensors, attended = (case.inputs[name] for name in case.inputs)
    query, value = tensors[0], tensors[4]
    batch, queries, heads, _ = query.shape
    seed = query.new_empty(1, dtype=torch.int64) if dropout_p else None
    logsumexp = query.new_empty(batch, heads, queries, dtype=torch.float32)
    inputs = (*tensors, attended, seed, 0.1, dropout_p)
    gradients = ATTENTION.gradient_buffers(*tensors)
    over_queries, over_keys = ATTENTION.backward_launches(
        query, *inputs, query, logsumexp, *gradients
    )
    part = query.new_empty(3 * batch, queries, heads, value.shape[-1], dtype=torch.float32)
    part_logsumexp = logsumexp.new_empty(3 * batch, heads, queries)
    attention = query.new_empty(batch, heads, queries, value.shape[1])
    map_launch = ATTENTION.map_launch(
        *tensors[:4], attended, seed, logsumexp, 0.1, dropout_p, attention
    )
    products = frozenset({"load16"} | ({"tensor"} if precision != "ieee" else set()))
    return {
        "forward": Audited(ATTENTION.forward_launch(*inputs, query, logsumexp), products),
        "backward_queries": Audited(over_queries, products),
        "backward_keys": Audited(over_keys, products),
        "attention_map": Audited(
            map_launch,
            products,
        ),
        "merge": Audited(
            merge_launch(part, part_logsumexp, query, logsumexp), frozenset({"load16"})
        ),
    }
