"""`optimize()` of transformers' models: their classes and numbers, this package's engine."""

import copy
import inspect

import pytest
import torch
import transformers
from support.oracle import CLASSES, TINY, assert_same, padded_images, randomise

from cdetr_fast import optimize

HF_RESNET = {
    "use_timm_backbone": False,
    "backbone": None,
    "backbone_config": transformers.ResNetConfig(
        depths=[2, 2, 2, 2],
        layer_type="basic",
        hidden_sizes=[64, 128, 256, 512],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
}
VARIANTS = {
    "base": ("base", {"auxiliary_loss": True}),
    "detection": ("detection", {"backbone": "resnet18"}),
    "mobilenet": ("detection", {"backbone": "tf_mobilenetv3_small_075"}),
    "auxiliary": ("detection", {"auxiliary_loss": True}),
    "hf-resnet": ("detection", HF_RESNET),
    "segmentation": ("segmentation", {}),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def their_model(task="detection", seed=0, **config):
    settings = TINY | {"backbone": "test_resnet"} | config
    model = getattr(transformers, CLASSES[task])(transformers.ConditionalDetrConfig(**settings))
    randomise(model, seed)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_outputs_and_interface(variant):
    task, config = VARIANTS[variant]
    model, images = their_model(task, **config), padded_images()
    fast = optimize(model)
    assert_same(fast(*images), model(*images))
    assert_same(fast(images[0]), model(images[0]))
    assert fast.runner.fallback_reason is None
    assert type(fast).__name__ == type(model).__name__
    assert isinstance(fast, type(model))
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    state = model.state_dict(keep_vars=True)
    shared = {name: tensor.data_ptr() for name, tensor in fast.state_dict(keep_vars=True).items()}
    assert shared == {name: tensor.data_ptr() for name, tensor in state.items()}
    got, expected = (x(*images, output_hidden_states=True) for x in (fast, model))
    assert fast.runner.fallback_reason == "output_hidden_states is given"
    torch.testing.assert_close(got.to_tuple(), expected.to_tuple(), rtol=0, atol=1e-4)
    assert_same(fast(*images), model(*images))  # transformers' recorders hinder nobody
    assert fast.runner.fallback_reason is None
    assert isinstance(fast(*images, return_dict=False), tuple)


def test_saved_files_are_those_of_the_model(tmp_path):
    model, images = their_model(), padded_images()
    fast = optimize(model)
    fast.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert_same(again(*images), model(*images), 1e-6)


def test_follows_weights():
    model, other, images = their_model(), their_model(seed=4), padded_images()
    fast = optimize(model)
    model.model.backbone.model.layer2[0].bn1.running_mean.add_(1)
    assert_same(fast(*images), model(*images))
    expected = model(*images)
    fast.load_state_dict(other.state_dict())
    assert_same(fast(*images), other(*images))
    assert_same(model(*images), expected, 0)
    assert_same(copy.deepcopy(fast)(*images), other(*images))


SETTINGS = {
    "model.encoder.layers.0.self_attn": ("scaling", 0.7),
    "model.position_embedding": ("temperature", 20),
    "model.backbone.model.layer1.0.conv2": ("padding_mode", "circular"),
    "model.backbone.model.maxpool": ("padding", 0),
    "model.decoder.layernorm": ("eps", 0.1),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_not_of_the_configuration(name):
    """They would be lost, as the engine's model is built by the configuration."""
    model, images = their_model(), padded_images()
    fast = optimize(model)
    before = fast(*images)
    setting, value = SETTINGS[name]
    for x in (model, fast):
        setattr(x.get_submodule(name), setting, value)
    expected = model(*images)
    assert (expected.logits - before.logits).abs().max() > 1e-3
    assert_same(fast(*images), expected)
    assert fast.runner.fallback_reason.startswith(f"{name}.{setting} is {value!r}, not ")
    with pytest.raises(ValueError, match=rf"cannot optimize: {name}.{setting} is .*; make it what"):
        optimize(model)


def test_settings_of_training_are_free():
    model, images = their_model(), padded_images()
    for module in model.modules():
        for setting in ("p", "dropout", "attention_dropout", "activation_dropout"):
            if setting in vars(module):
                setattr(module, setting, 0.37)
    model.gradient_checkpointing_enable()
    assert_same(optimize(model)(*images), model(*images))


def test_a_head_that_is_replaced_later_takes_effect():
    model, images = their_model(), padded_images()
    fast = optimize(model)
    fast(*images)
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(model.config.d_model, 4), torch.nn.Tanh()).eval()
    fast.class_labels_classifier = head
    expected = type(model).forward(fast, *images)
    assert_same(fast(*images), expected)
    assert fast.runner.fallback_reason.startswith("class_labels_classifier is a Sequential")


def test_detections_of_a_pipeline(photo):
    model = their_model()
    model.class_labels_classifier.weight.mul_(3)  # scores apart from each other
    processor = transformers.ConditionalDetrImageProcessor(size={"height": 160, "width": 192})
    results = [
        transformers.pipeline("object-detection", model=m, image_processor=processor)(
            [photo, photo.rotate(90, expand=True)], threshold=0.3
        )
        for m in (model, optimize(model))
    ]
    for expected, got in zip(*results, strict=True):
        assert len(expected) > 3
        assert [x["score"] for x in got] == pytest.approx([x["score"] for x in expected], abs=1e-5)
        for x in got:
            # Rounding may swap scores that are closer than that. Pipelines cut to whole pixels.
            same = next(
                y
                for y in expected
                if x["label"] == y["label"]
                and x["score"] == pytest.approx(y["score"], abs=1e-5)
                and all(abs(x["box"][side] - y["box"][side]) <= 1 for side in y["box"])
            )
            expected.remove(same)


def test_backbones_of_transformers_run_as_they_are():
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=8, depths=[1, 1], num_heads=[1, 1], out_features=["stage2"]
    )
    model = their_model(use_timm_backbone=False, backbone=None, backbone_config=swin)
    images = padded_images()
    fast = optimize(model)
    assert_same(fast(*images), model(*images))
    assert fast.runner.fallback_reason is None
