"""The lines of "What differs" in docs/guides/transformers.md, each with its test."""

import inspect
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import randomized, tiny_config

import cdetr_fast
from cdetr_fast.images.batch_feature import BatchFeature

transformers = pytest.importorskip("transformers")

IMAGES = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
LABELS = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
SIZE = {"shortest_edge": 64, "longest_edge": 96}
LINES = {}


def line(name):
    def add(check):
        LINES[name] = check
        return check

    return add


PICTURE = Image.new("RGB", (70, 50))


def make(**changes):
    config = tiny_config(**({"decoder_layers": 2} | changes))
    return randomized(cdetr_fast.ConditionalDetrForObjectDetection(config))


def theirs(**changes):
    config = transformers.ConditionalDetrConfig.from_dict(tiny_config(**changes).to_dict())
    return transformers.ConditionalDetrForObjectDetection(config)


def processor(**changes):
    return cdetr_fast.ConditionalDetrImageProcessor(size=SIZE, **changes)


@line("`compat`")
def _():
    assert cdetr_fast.ConditionalDetrConfig(use_pretrained_backbone=False).compat == "paper"


@line("unknown keywords of configuration, processor and `forward`")
def _():
    with pytest.raises(TypeError, match="did you mean 'num_queries'"):
        cdetr_fast.ConditionalDetrConfig(num_query=3)
    with pytest.raises(TypeError, match="did you mean 'do_resize'"):
        cdetr_fast.ConditionalDetrImageProcessor(do_rezise=False)
    with pytest.raises(TypeError, match="did you mean 'do_resize'"):
        processor()(PICTURE, do_rezise=False)
    with pytest.raises(TypeError, match="did you mean 'output_attentions'"):
        make()(IMAGES, output_attention=True)
    assert transformers.ConditionalDetrConfig(num_query=3).num_query == 3
    assert "cross_attentions" not in theirs()(IMAGES, output_attention=True)


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


@line("backbones that run at one image size")
def _():
    fields = {"model_type": "timm_backbone", "backbone": "levit_128", "out_indices": [2]}
    config = tiny_config().to_dict() | {"backbone_config": fields}
    with pytest.raises(ValueError, match=r"'levit_128', which runs at 224x224 alone"):
        cdetr_fast.ConditionalDetrModel(cdetr_fast.ConditionalDetrConfig.from_dict(config))


def without_gradient(model):
    model.train()(IMAGES, labels=LABELS).loss.backward()
    named = model.named_parameters()
    return [name for name, p in named if p.requires_grad and p.grad is None]


@line("parameters that get no gradient")
def _():
    assert without_gradient(make(decoder_layers=1)) == []
    assert all("query_scale" in name for name in without_gradient(theirs(decoder_layers=1)))


@line("`accepts_loss_kwargs`")
def _():
    assert make().accepts_loss_kwargs is False
    assert not hasattr(theirs(), "accepts_loss_kwargs")


@line("`post_init` and `init_weights`")
def _():
    class Derived(cdetr_fast.ConditionalDetrForObjectDetection):
        def __init__(self, config):
            super().__init__(config)
            self.extra = torch.nn.Linear(2, 2)
            torch.nn.init.constant_(self.extra.weight, 7.0)
            self.post_init()
            self.init_weights()

        def _init_weights(self, module):
            raise AssertionError

    assert (Derived(tiny_config()).extra.weight == 7.0).all()


@line("`get_input_embeddings`")
def _():
    assert make().get_input_embeddings() is None
    with pytest.raises(NotImplementedError):
        theirs().get_input_embeddings()


@line("`enable_input_require_grads`")
def _():
    model = make().requires_grad_(False)
    assert not model(IMAGES).logits.requires_grad
    model.enable_input_require_grads()
    assert model(IMAGES).logits.requires_grad


@line("`every_n_layers` and `offload` of checkpointing")
def _():
    for name, value in {"every_n_layers": 2, "offload": True}.items():
        with pytest.raises(ValueError, match=f"{name}: expected"):
            make().activation_checkpointing_enable(**{name: value})


@line("`max_memory` without `device_map`")
def _():
    model = make()
    given = {"config": model.config, "state_dict": model.state_dict(), "max_memory": {"cpu": "1GB"}}
    with pytest.raises(ValueError, match="max_memory: expected None without device_map"):
        type(model).from_pretrained(None, **given)


@line("the adapter of another model")
def _():
    peft = pytest.importorskip("peft")
    other = make(decoder_layers=1)
    config = peft.LoraConfig(r=2, target_modules=["v_proj"])
    other.add_adapter(config)
    weights = other.get_adapter_state_dict()
    model = make()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match="expected the weights of an adapter for"):
        model.load_adapter(peft_config=config, adapter_state_dict=weights)
    assert list(model.state_dict()) == before


@line("`GradientCheckpointingLayer` and `_keep_in_fp32_modules`")
def _():
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = make().train()
    assert not any(isinstance(x, GradientCheckpointingLayer) for x in model.modules())
    assert any(isinstance(x, GradientCheckpointingLayer) for x in theirs().modules())
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    half = make().bfloat16().eval()
    half._keep_in_fp32_modules = ["bbox_predictor"]
    outputs = half(IMAGES.bfloat16())
    assert half.bbox_predictor.layers[0].weight.dtype == torch.bfloat16
    assert outputs.pred_boxes.dtype == torch.float32


@line("PIL images with an EXIF orientation")
def _():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    stored = Image.fromarray(np.rot90(pixels).copy())  # turned to the left
    stored.getexif()[0x0112] = 6  # "turn it to the right"
    with pytest.warns(UserWarning, match="turned upright by its EXIF orientation 6"):
        found = processor()(stored)["pixel_values"]
    assert torch.equal(found, processor()(pixels)["pixel_values"])


@line("floats from 0 to 1")
def _():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    floats = pixels.astype(np.float32) / 255
    with pytest.warns(UserWarning, match="expected pixels from 0 to 255, got float32"):
        processor()(floats)
    model = make()
    model.image_processor = processor()
    found, expected = (model.predict(image, threshold=0.0) for image in (floats, pixels))
    torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=1e-5)


@line("integers of more than 8 bits")
def _():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint16)
    for image in (257 * pixels, Image.fromarray(257 * pixels[..., 0])):
        with pytest.raises(ValueError, match=r"expected (pixels from 0 to 255|8 bits)"):
            processor()(image)
    scaled = processor(rescale_factor=1 / 65535)(257 * pixels)["pixel_values"]
    expected = processor()(pixels.astype(np.uint8))["pixel_values"]
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-4)


@line("None as a setting of the image processor")
def _():
    ours = processor(do_resize=None, image_mean=None)
    assert ours.do_resize is True
    assert ours.image_mean == processor().image_mean
    their = transformers.ConditionalDetrImageProcessor(do_resize=None, image_mean=None)
    assert their.do_resize is their.image_mean is None


@line("images of four channels")
def _():
    pixels = np.zeros((64, 96, 4), dtype=np.uint8)
    assert processor()(pixels)["pixel_values"].shape[1] == 3
    four = {"image_mean": [0.5] * 4, "image_std": [0.5] * 4, "size": SIZE}
    with pytest.raises(ValueError, match=r"image_mean: expected 3 values \(channels\), got 4"):
        cdetr_fast.ConditionalDetrImageProcessor(**four)(pixels)
    kept = transformers.ConditionalDetrImageProcessor(**four)(
        pixels, return_tensors="pt", input_data_format="channels_last"
    )
    assert kept["pixel_values"].shape[1] == 4


@line("bad segmentations and fields of annotations")
def _():
    good = {"id": 9, "bbox": [1, 2, 30, 20], "area": 600, "category_id": 1, "iscrowd": 0}
    good["segmentation"] = [[1, 2, 31, 2, 31, 22]]
    for key, value in {"segmentation": [[1, 2, 3, 4]], "bbox": [1, 2, 3]}.items():
        content = {"image_id": 3, "annotations": [good | {key: value}]}
        with pytest.raises(ValueError, match=rf"image id 3, annotation id 9\): {key}: expected"):
            processor()(PICTURE, annotations=content, return_segmentation_masks=True)


@line("a panoptic PNG of another size than its image")
def _(folder):
    Image.new("RGB", (35, 25), (7, 0, 0)).save(folder / "a.png")
    segment = {"id": 7, "category_id": 1, "area": 875, "iscrowd": 0}
    content = {"image_id": 1, "file_name": "a.png", "segments_info": [segment]}
    with pytest.warns(UserWarning, match=r"a.png: expected \[50, 70\], the size of the image"):
        found = processor(format="coco_panoptic")(PICTURE, annotations=content, masks_path=folder)
    assert found["labels"][0]["class_labels"].tolist() == [1]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", LINES)
def test_line(name, tmp_path):
    check = LINES[name]
    check(*[tmp_path] * len(inspect.signature(check).parameters))


def test_every_line_is_here(root):
    text = (root / "docs" / "guides" / "transformers.md").read_text(encoding="utf-8")
    section = text.partition("## What differs")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
    assert rows == list(LINES)
