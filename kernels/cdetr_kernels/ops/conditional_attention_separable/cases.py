"""Inputs of `conditional_attention_separable` for tests, benchmarks and the audit."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cdetr_kernels.ops.conditional_attention import cases as general
from cdetr_kernels.ops.conditional_attention_separable import conditional_attention_separable
from cdetr_kernels.testing.case import Case, Function, Inputs, RandomTensors, Sizes, count_bytes

if TYPE_CHECKING:
    from cdetr_kernels.testing.machine_code import Audit, Audited

_GENERAL = general.SIZES["conditional_attention"]
SIZES = {
    "conditional_attention_separable": Sizes(
        smallest=_GENERAL.smallest,
        # Without a mask: scratch memory of lines that are all padding is never written.
        small=_GENERAL.small | {"mask": None},
        medium=_GENERAL.medium,
        typical=[sizes for sizes in general.typical((1, 8), (1050,)) if sizes["mask"] is not None],
        called=[*general.typical((1, 8), (1050,)), general.DROPOUT, general.MAP],
    )
}


def make(
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
    queries: int = 300,
    height: int = 25,
    width: int = 42,
    mask: str | None = None,
    heads: int = 8,
    size: int = 32,
    value_size: int | None = None,
    shared: tuple[str, ...] = (),
    seed: int = 0,
    dropout_p: float = 0.0,
    returns_map: bool = False,
) -> Case:
    """Return `conditional_attention`'s case with the spatial keys of rows and of columns.

    Args:
        dtype: dtype of the inputs.
        device: Device of the inputs.
        batch: Images.
        queries: Queries.
        height: Rows of the map.
        width: Columns of the map.
        mask: Kind of the key mask.
        heads: Heads.
        size: Size of each half of a head.
        value_size: Size of a head of the values; None is `size`.
        shared: Names of the keys and codes that the batch shares.
        seed: Seed of the inputs.
        dropout_p: Dropout of weights, as in the general form.
        returns_map: Whether the attention map is a second output.
    """
    whole = general.make(
        dtype, device, batch, queries, height, width, mask, heads, size, value_size,
        shared=tuple(name for name in shared if name == "k_content"), seed=seed,
    )  # fmt: skip
    random = RandomTensors(device, dtype, seed + 1)
    codes = {"k_rows": height, "k_columns": width}
    inputs: Inputs = {name: whole.inputs[name] for name in ("q_content", "q_spatial", "k_content")}
    for name, count in codes.items():
        inputs[name] = random.normal(1 if name in shared else batch, count, heads, size)
    inputs["value"] = whole.inputs["value"]
    defined = general.definition(dropout_p, returns_map)
    # The spatial scores of h + w keys replace those of all keys.
    forward, both = whole.flops
    saved = 2 * batch * heads * size * queries * (height * width - height - width)
    moved = count_bytes(*inputs.values(), whole.inputs["key_mask"], inputs["q_content"])
    return Case(
        "conditional_attention_separable",
        f"B={batch} Q={queries} h={height} w={width}{f' {mask}' if mask else ''}"
        f"{' dropout' if dropout_p else ''}{' map' if returns_map else ''}",
        dtype,
        inputs | {"key_mask": whole.inputs["key_mask"]},
        conditional_attention_separable,
        general.options(dropout_p, returns_map),
        gradients=tuple(inputs),
        flops=(forward - saved, both - 4 * saved),
        bytes_moved=(moved, 3 * moved),
        per_image=not shared and not dropout_p,
        definition=None if defined is None else _with_spatial_keys(defined),
        peers={
            f"all keys, {name}": functools.partial(_of_all_keys, make)
            for name, make in whole.peers.items()
            if not (dropout_p or returns_map) and "compiled" not in name and "flex" not in name
        },
    )


def _of_all_keys(make_general: Callable[[], Function]) -> Function:
    return _with_spatial_keys(make_general())


def _with_spatial_keys(function: Function) -> Function:
    """Add the codes up to all spatial keys, in the times of those that need them."""

    def attend(k_rows: Tensor, k_columns: Tensor, **others: Any) -> Any:
        k_spatial = (k_rows[:, :, None] + k_columns[:, None]).flatten(1, 2)
        return function(k_spatial=k_spatial, **others)

    return attend


def audits() -> "list[Audit]":
    """Return the calls whose kernels are compiled, as in the general form."""
    from cdetr_kernels.testing.machine_code import Audit

    return [
        Audit("half 32", functools.partial(audited, "half", 32, 0.0)),
        *general.audits_of_all_heads(
            audited,
            {
                "plain": {"dropout_p": 0.0},
                "unmasked": {"dropout_p": 0.0, "mask": None},
                "unmasked dropout": {"mask": None},
            },
        ),
    ]


def audited(
    precision: str,
    size: int,
    dropout_p: float = 0.1,
    mask: str | None = "padded",
    half: torch.dtype = torch.bfloat16,
) -> "dict[str, Audited]":
    """Return the launches for one precision and size of a head, by name."""
    from cdetr_kernels.ops.conditional_attention_separable.triton import ATTENTION
    from cdetr_kernels.testing.machine_code import Audited

    dtype = half if precision == "half" else torch.float32
    case = make(dtype, "meta", 8, mask=mask, size=size, shared=("k_rows", "k_columns"))
    *tensors, attended = (case.inputs[name] for name in case.inputs)
    query, value = tensors[0], tensors[5]
    batch, queries, heads, _ = query.shape
    seed = query.new_empty(1, dtype=torch.int64) if dropout_p else None
    logsumexp = query.new_empty(batch, heads, queries, dtype=torch.float32)
    inputs = (*tensors, attended, seed, 0.1, dropout_p)
    gradients = ATTENTION.gradient_buffers(*tensors)
    backward = ATTENTION.backward_launches(query, *inputs, query, logsumexp, *gradients)
    attention = query.new_empty(batch, heads, queries, value.shape[1])
    map_launch = ATTENTION.map_launch(
        *tensors[:5], attended, seed, logsumexp, 0.1, dropout_p, attention
    )
    tensor_cores = {"tensor"} if precision != "ieee" else set()
    products = frozenset({"load16"} | tensor_cores)
    launches = {
        "separable_forward": ATTENTION.forward_launch(*inputs, query, logsumexp),
        **dict(
            zip(("separable_backward_queries", "separable_backward_keys"), backward, strict=False)
        ),
        "separable_attention_map": map_launch,
    }
    codes = dict(
        zip(("separable_backward_rows", "separable_backward_columns"), backward[2:], strict=True)
    )
    return {
        **{name: Audited(launch, products) for name, launch in launches.items()},
        # It gathers: no loads of 16 bytes.
        **{name: Audited(launch, frozenset(tensor_cores)) for name, launch in codes.items()},
    }
