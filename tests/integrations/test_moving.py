"""The lines of "What differs" in docs/guides/transformers.md, each with its test."""

import re

import pytest
import torch
from support.tiny import randomized, tiny_config

import cdetr_fast
from cdetr_fast.images.batch_feature import BatchFeature

transformers = pytest.importorskip("transformers")

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LINES = {}


def line(name):
    def add(check):
        LINES[name] = check
        return check

    return add


def make(**changes):
    config = tiny_config(**changes)
    config.decoder_layers = 2
    return randomized(cdetr_fast.ConditionalDetrForObjectDetection(config))


@line("`compat`")
def _():
    assert cdetr_fast.ConditionalDetrConfig(use_pretrained_backbone=False).compat == "paper"


@line("unknown configuration keyword")
def _():
    with pytest.raises(TypeError, match="did you mean 'num_queries'"):
        cdetr_fast.ConditionalDetrConfig(num_query=3)
    assert transformers.ConditionalDetrConfig(num_query=3).num_query == 3


@line("`inputs_embeds`")
def _():
    with pytest.raises(ValueError, match="inputs_embeds: expected None"):
        make()(IMAGES, inputs_embeds=torch.zeros(1, 4, 32))


@line("`decoder_attention_mask`")
def _():
    model = make()
    mask = torch.ones(1, 7, dtype=torch.int64)
    mask[0, 3:] = 0
    with torch.no_grad():
        got, expected = model(IMAGES, decoder_attention_mask=mask), model(IMAGES)
    assert (got.logits - expected.logits).abs().max() > 1e-4


@line("`decoder_inputs_embeds`")
def _():
    model = make()
    with torch.no_grad():
        got = model(IMAGES, decoder_inputs_embeds=torch.ones(1, 7, 32).cumsum(-1))
        assert (got.logits - model(IMAGES).logits).abs().max() > 1e-4


@line("boxes of a bf16 model")
def _():
    with torch.no_grad():
        out = make().bfloat16()(IMAGES.bfloat16())
    assert (out.logits.dtype, out.pred_boxes.dtype) == (torch.bfloat16, torch.float32)


@line("default attention")
def _():
    assert make().config._attn_implementation is None


@line('maps with "sdpa"')
def _():
    with torch.no_grad():
        out = make(attn_implementation="sdpa")(IMAGES, output_attentions=True)
    assert [tuple(x.shape) for x in out.cross_attentions] == [(1, 8, 7, 4)] * 2


@line('"flash_attention_2" and "flex_attention"')
def _():
    with pytest.raises((ImportError, ValueError), match="flash_attention_2"):
        tiny_config(attn_implementation="flash_attention_2")
    with pytest.raises(ValueError, match="flex_attention"):
        tiny_config(attn_implementation="flex_attention")


@line("names on disk in `load_state_dict`")
def _():
    from cdetr_fast.checkpoints.key_maps import to_v4

    model, other = make(), make()
    on_disk = to_v4(model.state_dict())
    assert on_disk.keys() != model.state_dict().keys()
    with torch.no_grad():
        other.class_labels_classifier.weight.zero_()
    other.load_state_dict(on_disk)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@line("`BatchFeature.to`")
def _():
    content = {"pixel_values": IMAGES, "labels": [{"boxes": torch.zeros(1, 4)}]}
    ours = {**content, "labels": [BatchFeature(content["labels"][0])]}
    assert BatchFeature(ours).to("meta")["labels"][0]["boxes"].is_meta
    theirs = transformers.BatchFeature(content).to("meta")
    assert not theirs["labels"][0]["boxes"].is_meta


@line("`torch.jit.trace` of an optimised model")
def _():
    fast = cdetr_fast.optimize(make())
    with torch.no_grad():
        torch.jit.trace(fast, IMAGES, strict=False, check_trace=False)
    assert "torch.jit.trace" in fast.runner.fallback_reason


@line("`train()` of an optimised model")
def _():
    with pytest.raises(RuntimeError, match="optimised for inference"):
        cdetr_fast.optimize(make()).train()


@line("`AutoImageProcessor.register`")
def _():
    from transformers.image_processing_utils import BaseImageProcessor

    cdetr_fast.ConditionalDetrImageProcessor()
    assert issubclass(cdetr_fast.ConditionalDetrImageProcessor, BaseImageProcessor)


@line("a configuration object of the other package")
def _():
    ours = tiny_config()
    theirs = transformers.ConditionalDetrConfig.from_dict(ours.to_dict())
    assert theirs.num_queries == ours.num_queries
    with pytest.raises(TypeError, match="expected cdetr_fast"):
        cdetr_fast.ConditionalDetrModel(theirs)
    assert cdetr_fast.ConditionalDetrConfig.from_dict(theirs.to_dict()).d_model == ours.d_model


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LINES)
def test_line(name):
    LINES[name]()


def test_every_line_is_here(root):
    text = (root / "docs" / "guides" / "transformers.md").read_text(encoding="utf-8")
    section = text.partition("## What differs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
    assert rows == list(LINES)
