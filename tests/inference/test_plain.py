"""Every layer x everything that can be attached to it: the model's own result, or a refusal."""

import copy

import pytest
import torch
from support.oracle import padded_images, random_model
from torch import nn

from cdetr_fast import optimize
from cdetr_fast.models.backbone import FrozenBatchNorm2d
from cdetr_fast.models.modeling import ConditionalDetrForObjectDetection

LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, FrozenBatchNorm2d)


pytestmark = pytest.mark.usefixtures("no_gradients")


def positions():
    """One of each kind of layer: encoder layer 0, decoder layers 0 and 1, two convolutions."""
    skipped = ("encoder.layers.1", "decoder.layers.2", "layer1", "layer2", "layer3", "layer4.1")
    return [
        name
        for name, module in random_model().named_modules()
        if isinstance(module, LAYERS) and not any(part in name for part in skipped)
    ]


def put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


class Scaled(nn.Module):
    """A module of the user's that contains the layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        if hasattr(base, "weight"):
            self.weight = base.weight  # read by checks of dtypes

    def forward(self, *args):
        return 1.25 * self.base(*args)


def subclass(model, name):
    layer = model.get_submodule(name)
    kind = type(layer)
    layer.__class__ = type("Special", (kind,), {"forward": lambda s, x: 1.25 * kind.forward(s, x)})
    layer.__class__.__module__ = __name__


def parametrize(model, name):
    layer = model.get_submodule(name)
    if isinstance(layer, FrozenBatchNorm2d):
        pytest.skip("has no parameters")
    nn.utils.parametrize.register_parametrization(layer, "bias" if layer.bias is not None
                                                  else "weight", Twice())  # fmt: skip


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda _, inputs, output: 1.25 * output)


def pre_hook(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: (1.25 * inputs[0],))


def own_forward(model, name):
    layer = model.get_submodule(name)
    layer.forward = lambda x: 1.25 * type(layer).forward(layer, x)


def lora(model, name):
    peft = pytest.importorskip("peft")
    layer = model.get_submodule(name)
    if not isinstance(layer, (nn.Linear, nn.Conv2d)):
        return
    adapters = peft.LoraConfig(r=2, target_modules=[name], init_lora_weights=False)
    peft.inject_adapter_in_model(adapters, model)
    assert type(model.get_submodule(name)).__module__.startswith("peft")


def replaced(model, name):
    put(model, name, Scaled(model.get_submodule(name)))


ATTACHMENTS = [subclass, parametrize, hook, pre_hook, own_forward, lora]


@pytest.mark.parametrize("attach", ATTACHMENTS)
def test_attachments_are_refused_by_name(attach):
    original = random_model()
    for name in positions():
        if attach is parametrize and isinstance(original.get_submodule(name), FrozenBatchNorm2d):
            continue  # has no parameters
        if attach is lora and not isinstance(original.get_submodule(name), (nn.Linear, nn.Conv2d)):
            continue
        model = copy.deepcopy(original)
        attach(model, name)
        model.eval()
        with pytest.raises(ValueError, match=f"cannot optimize: {name} .*; ") as error:
            optimize(model)
        if attach is lora:
            assert "merge" in str(error.value)


def test_replaced_modules_run_as_they_are():
    original, images = random_model(), padded_images()
    before = original(*images)
    for name in positions():
        model = copy.deepcopy(original)
        replaced(model, name)
        model.eval()
        expected = model(*images)
        fast = optimize(model)
        for given, wanted in ((images, expected), (images[:1], model(images[0]))):
            got = fast(*given)
            for field in ("logits", "pred_boxes"):
                error = (got[field] - wanted[field]).abs().max().item()
                assert error <= 1e-5 * max(1, wanted[field].abs().max().item()), (name, error)
        assert fast.runner.fallback_reason is None, name
        assert "not done" in fast.explain() or "backbone.model" in name, name
        if "decoder.layers.0.self_attn" in name:
            continue  # the state is zero, so queries and keys play no part
        assert any(not torch.equal(before[f], expected[f]) for f in ("logits", "pred_boxes")), name


@pytest.mark.parametrize(
    "padding", [{"padding": 1, "padding_mode": "reflect"}, {"padding": "same"}], ids=str
)
@pytest.mark.parametrize("name", ["model.input_projection", "model.backbone.model.layer4.0.conv2"])
def test_convolutions_that_pad_otherwise(name, padding):
    """Not with zeros, or more at one side than at the other: no fused operator does that."""
    model, images = random_model(), padded_images()
    conv = model.get_submodule(name)
    size = 3 if padding["padding"] == 1 else 2
    put(model, name, nn.Conv2d(conv.in_channels, conv.out_channels, size, **padding))
    model.eval()
    expected, fast = model(*images), optimize(model)
    got = fast(*images)
    for field in ("logits", "pred_boxes"):
        assert (got[field] - expected[field]).abs().max() <= 1e-5
    assert "runs as it is" not in fast.explain() or name == "model.input_projection"


@pytest.mark.parametrize("attach", [hook, pre_hook, own_forward, lora, replaced])
@pytest.mark.parametrize(
    "name",
    ["model.encoder.layers.0.self_attn.q_proj", "model.decoder.layers.0.self_attn.v_proj",
     "model.decoder.layers.1.mlp.fc1", "class_labels_classifier", "model.input_projection"],
)  # fmt: skip
def test_what_is_attached_later_takes_effect(attach, name):
    fast, images = optimize(random_model()), padded_images()
    before = fast(*images)
    attach(fast, name)
    fast.eval()
    expected = ConditionalDetrForObjectDetection.forward(fast, *images)
    got = fast(*images)
    assert (got.logits - expected.logits).abs().max() <= 1e-5
    assert not torch.equal(before.logits, expected.logits)


@pytest.mark.parametrize(
    "name",
    ["model.backbone.model.layer2.0.conv1.weight", "model.backbone.model.bn1.running_var",
     "model.encoder.layers.0.mlp.fc1.weight"],
)  # fmt: skip
def test_weights_of_a_training_that_diverged(name):
    """Fused ReLUs make 0 of NaN, and the detections would look sound."""
    model, images = random_model(), padded_images()
    fast = optimize(model)
    fast(*images)
    tensor = dict([*model.named_parameters(), *model.named_buffers()])[name]
    with torch.no_grad():
        tensor[0] = torch.nan
    assert model(*images).logits.isnan().all()
    assert fast(*images).logits.isnan().all()
    assert fast.runner.fallback_reason.startswith(f"{name} has NaN; ")
    with pytest.raises(ValueError, match=f"cannot optimize: {name} has NaN; "):
        optimize(model)
