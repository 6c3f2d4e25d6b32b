"""Peers of the operators that need transformers, and the decoder's cross-attention module."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from cdetr_kernels import dispatch
from cdetr_kernels.testing.case import (
    Case,
    Function,
    Inputs,
    RandomTensors,
    Sizes,
    count_bytes,
    key_mask,
)


def providers(case: Case) -> dict[str, Callable[[], Function]]:
    """Return makers of the functions that are measured: ours by backend, then others."""
    own = {f"cdetr_fast {name}": lambda name=name: case.function(name) for name in case.backends()}
    compiled = {"compiled eager": lambda: torch.compile(case.function("torch"), dynamic=False)}
    theirs = TRANSFORMERS.get(case.op, {})
    return own | compiled | case.peers | {name: lambda f=f: f(case) for name, f in theirs.items()}


def _sine_position_2d(case: Case) -> Function:
    from transformers.models.conditional_detr.modeling_conditional_detr import (
        ConditionalDetrSinePositionEmbedding,
    )

    channels = case.options["channels"]
    module = ConditionalDetrSinePositionEmbedding(channels // 2, normalize=True)

    def code(mask: Tensor) -> Tensor:
        batch, height, width = mask.shape
        # A new view each time, as the module keeps the code of the mask that it saw last.
        shape = (batch, channels, height, width)
        out = module(shape, mask.device, case.dtype, mask.view_as(mask))
        return out.flatten(2).transpose(1, 2).contiguous()

    return code


def _sine_query(case: Case) -> Function:
    from transformers.models.conditional_detr.modeling_conditional_detr import (
        encode_sinusoidal_position_embedding,
    )

    return lambda reference_points, query_scale: (
        encode_sinusoidal_position_embedding(reference_points, query_scale.shape[-1] // 2)
        * query_scale
    )


def _their_labels(labels: Tensor, boxes: Tensor, counts: Tensor) -> list[dict[str, Tensor]]:
    return [
        {"class_labels": one[:count], "boxes": box[:count]}
        for one, box, count in zip(labels, boxes, counts.tolist(), strict=True)
    ]


def _matching_cost(case: Case) -> Function:
    """Return their matcher without its solver, one layer after another; it copies to the CPU."""
    from transformers.loss import loss_deformable_detr as module

    matcher = module.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    nothing: tuple[list[int], list[int]] = ([], [])

    def costs(
        logits: Tensor,
        boxes_cxcywh: Tensor,
        target_labels: Tensor,
        target_boxes_cxcywh: Tensor,
        target_counts: Tensor,
    ) -> Tensor:
        labels = _their_labels(target_labels, target_boxes_cxcywh, target_counts)
        found = []

        def solver(cost: Any) -> tuple[list[int], list[int]]:
            found.append(cost)
            return nothing

        with mock.patch.object(module, "linear_sum_assignment", solver):
            for layer in zip(logits, boxes_cxcywh, strict=True):
                matcher(dict(zip(("logits", "pred_boxes"), layer, strict=True)), labels)
        width = target_labels.shape[1]
        return torch.stack([F.pad(cost, (0, width - cost.shape[1])) for cost in found])

    return costs


def _set_loss(case: Case) -> Function:
    from transformers.loss.loss_deformable_detr import DeformableDetrImageLoss

    wanted = ["labels", "boxes", "cardinality"]
    logits, counts = case.inputs["logits"], case.inputs["target_counts"]
    criterion = DeformableDetrImageLoss(lambda *_: None, logits.shape[-1], 0.25, wanted)
    labels = _their_labels(case.inputs["target_labels"], case.inputs["target_boxes_cxcywh"], counts)
    indices = [
        [
            (one[:count].cpu(), torch.arange(count))
            for one, count in zip(layer, counts.tolist(), strict=True)
        ]
        for layer in case.inputs["matches"]
    ]
    number = float(counts.sum())

    def compute(logits: Tensor, boxes_cxcywh: Tensor, **_: Tensor) -> list[Tensor]:
        found = []
        for i in range(len(logits)):
            outputs = {"logits": logits[i], "pred_boxes": boxes_cxcywh[i]}
            one: dict[str, Tensor] = {}
            for loss in wanted:
                one |= criterion.get_loss(loss, outputs, labels, indices[i], number)
            found.append(one)
        return [
            torch.stack([one[name] for one in found])
            for name in ("loss_ce", "loss_bbox", "loss_giou")
        ]

    return compute


def _detection_topk(case: Case) -> Function:
    """Return their post-processing, with a threshold that keeps all detections."""
    import transformers

    processor = transformers.ConditionalDetrImageProcessor()
    sizes, k = case.options["target_sizes"], case.options["k"]

    def process(logits: Tensor, boxes_cxcywh: Tensor) -> list[Tensor]:
        outputs = SimpleNamespace(logits=logits, pred_boxes=boxes_cxcywh)
        found = processor.post_process_object_detection(outputs, 0.0, sizes, top_k=k)
        return [
            torch.stack([image[name].to(logits.dtype) for image in found])
            for name in ("scores", "labels", "boxes")
        ]

    return process


TRANSFORMERS: dict[str, dict[str, Callable[[Case], Function]]] = {
    "sine_position_2d": {"transformers": _sine_position_2d},
    "sine_query": {"transformers": _sine_query},
    "matching_cost": {"transformers, to the CPU": _matching_cost},
    "set_loss": {"transformers": _set_loss},
    "detection_topk": {"transformers": _detection_topk},
}
# They wait for the device.
UNCAPTURABLE = (
    ("matching_cost", "transformers, to the CPU"),
    ("set_loss", "transformers"),
    ("detection_topk", "transformers"),
)

MODULE_SIZES = Sizes(
    smallest={"batch": 1, "queries": 2, "height": 2, "width": 2},
    small={"batch": 1, "queries": 20, "height": 5, "width": 8, "mask": "padded"},
    medium={"batch": 3, "queries": 67, "height": 13, "width": 21, "mask": "padded"},
    typical=[{"batch": batch, "mask": "padded"} for batch in (1, 8, 32)],
)


def cross_attention_module(
    dtype: torch.dtype,
    device: torch.device | str,
    batch: int = 1,
    queries: int = 300,
    height: int = 25,
    width: int = 42,
    mask: str | None = None,
) -> Case:
    """Make the decoder's cross-attention module with its projections, against transformers'."""
    from cdetr_fast.models.attention import ConditionalDetrDecoderCrossAttention
    from cdetr_fast.models.position import MapPosition

    random = RandomTensors(device, dtype)
    heads, size = 8, 32
    channels, keys = heads * size, height * width
    inputs: Inputs = {
        "hidden_states": random.normal(batch, queries, channels),
        "memory": random.normal(batch, keys, channels),
        "query_sine": random.normal(batch, queries, channels),
        "position": random.normal(batch, keys, channels),
    }
    attended = key_mask(mask, batch, height, width, device)
    torch.manual_seed(0)
    module = ConditionalDetrDecoderCrossAttention(channels, heads, 0.0, is_first=False)
    weights = {name: x.to(dtype) for name, x in module.state_dict().items()}
    modules = {}
    for kind in (dtype, torch.float64):
        module = ConditionalDetrDecoderCrossAttention(channels, heads, 0.0, is_first=False)
        module.load_state_dict(weights)
        modules[kind] = module.to(device, kind).requires_grad_(False)

    def run(
        hidden_states: Tensor,
        memory: Tensor,
        query_sine: Tensor,
        position: Tensor,
        key_mask: Tensor | None,
        backend: str = "torch",
    ) -> Tensor:
        module = modules[hidden_states.dtype]
        with mock.patch.object(dispatch, "PREFERRED", backend):
            stored = module.project_memory(memory, MapPosition(position))
            return module(hidden_states, query_sine, None, stored, key_mask)[0]

    def theirs(implementation: str) -> Function:
        import transformers
        from transformers.models.conditional_detr import modeling_conditional_detr as modeling

        make_config: Any = transformers.ConditionalDetrConfig  # its fields come by inheritance
        config = make_config(backbone="resnet18")
        config._attn_implementation = implementation
        module = modeling.ConditionalDetrDecoderCrossAttention(config, channels, heads)
        missing, unexpected = module.load_state_dict(weights, strict=False)
        # They have the first layer's additional projection in every layer.
        if unexpected or any(not name.startswith("q_pos_proj") for name in missing):
            raise RuntimeError(f"weights do not fit: {missing}, {unexpected}")
        module = module.to(device, dtype).requires_grad_(False)

        def attend(
            hidden_states: Tensor,
            memory: Tensor,
            query_sine: Tensor,
            position: Tensor,
            key_mask: Tensor | None,
        ) -> Tensor:
            mask = None
            if key_mask is not None:
                mask = key_mask[:, None, None, :].expand(-1, 1, queries, -1)
                if implementation == "eager":
                    mask = hidden_states.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
            return module(hidden_states, memory, query_sine, position, attention_mask=mask)[0]

        return attend

    forward = 2 * batch * channels**2 * (3 * queries + 3 * keys)
    attention = 2 * batch * heads * size * queries * keys
    moved = count_bytes(*inputs.values(), attended, inputs["hidden_states"])
    return Case(
        "conditional_attention",
        f"B={batch} Q={queries} S={keys}{f' {mask}' if mask else ''}",
        dtype,
        inputs | {"key_mask": None if attended is None else attended.flatten(1)},
        run,
        gradients=tuple(inputs),
        flops=(forward + 3 * attention, 2 * forward + 11 * attention),
        bytes_moved=(moved, 3 * moved),
        per_image=True,
        peers={
            "transformers sdpa": lambda: theirs("sdpa"),
            "transformers eager": lambda: theirs("eager"),
            "transformers compiled": lambda: torch.compile(theirs("sdpa"), dynamic=False),
        },
    )
