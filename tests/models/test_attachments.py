"""Attachments of a layer are never passed over, although layers are computed together."""

import pytest
import torch
from support.oracle import make_ours, make_pair, padded_images, random_labels
from torch import nn

PROJECTIONS = [
    "model.encoder.layers.0.self_attn.q_proj",
    "model.encoder.layers.1.self_attn.v_proj",
    "model.decoder.layers.1.self_attn.k_content_proj",
    "model.decoder.layers.1.self_attn.q_pos_proj",
    "model.decoder.layers.1.encoder_attn.k_content_proj",
    "model.decoder.layers.2.encoder_attn.v_proj",
    "model.decoder.layers.0.encoder_attn.k_pos_proj",
    "model.decoder.ref_point_head.layers.0",
    "bbox_predictor.layers.0",
    "bbox_predictor.layers.2",
]


class Adapter(nn.Module):
    """A low-rank addition, as PEFT wraps layers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)
        torch.manual_seed(0)
        nn.init.normal_(self.up.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def replace_module(model: nn.Module, name: str, make) -> None:
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    setattr(parent, child, make(getattr(parent, child)))


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_takes_effect(name, dtype):
    theirs, ours = (model.eval().to(dtype) for model in make_pair("detection"))
    pixel_values, pixel_mask = padded_images(dtype)
    with torch.no_grad():
        before = ours(pixel_values, pixel_mask)
        for model in (theirs, ours):
            torch.manual_seed(1)
            replace_module(model, name, Adapter)
        expected, got = theirs(pixel_values, pixel_mask), ours(pixel_values, pixel_mask)
    changes = [(got[key] - before[key]).abs().max() for key in ("logits", "pred_boxes")]
    assert max(changes) > 1e-4
    if dtype == torch.float32:
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_hooks_and_patched_forwards_are_called(name):
    model = make_ours("detection")
    layer = model.get_submodule(name)
    calls = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("before")),
        layer.register_forward_hook(lambda *_: calls.append("after")),
        layer.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    model(*padded_images(), labels=random_labels()).loss.backward()
    for handle in handles:
        handle.remove()
    assert calls == ["before", "after", "backward"]
    layer.forward = lambda x: (calls.append("patched"), type(layer).forward(layer, x))[1]
    model(*padded_images())
    assert calls.count("patched") == 1


@pytest.mark.parametrize("name", ["bbox_predictor", "model.decoder.ref_point_head"])
def test_hooks_on_a_head_are_called(name):
    model = make_ours("detection").eval()
    calls = []
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append(name))
    model(*padded_images())
    assert calls == [name]


def test_a_head_can_be_replaced():
    model = make_ours("detection").eval()
    model.bbox_predictor = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        outputs = model(*padded_images())
    assert outputs.pred_boxes.shape == (2, 20, 4)


def test_the_auxiliary_loss_can_be_switched_on_after_loading():
    theirs, ours = make_pair("detection", auxiliary_loss=False)
    for model in (theirs, ours):
        model.config.auxiliary_loss = True
    expected = theirs(*padded_images(), labels=random_labels())
    got = ours(*padded_images(), labels=random_labels())
    assert list(got.loss_dict) == list(expected.loss_dict)
    assert len(got.auxiliary_outputs) == 2
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-4, atol=0)


def test_a_model_can_be_built_without_memory():
    accelerate = pytest.importorskip("accelerate")
    with accelerate.init_empty_weights():
        model = make_ours("segmentation")
    assert all(parameter.is_meta for parameter in model.parameters())
