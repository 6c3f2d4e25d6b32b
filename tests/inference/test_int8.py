"""`optimize(int8_calibration=...)`: the backbone in 8 bits, on CPUs that can."""

import pytest
import torch
import torch.nn.functional as F
from support.oracle import make_ours, padded_images, random_model
from timm.layers import Conv2dSame
from torch import nn

from cdetr_fast import ConditionalDetrForObjectDetection, optimize
from cdetr_fast.demo import DEMO
from cdetr_fast.demo.scenes import TRAIN_SEED, draw_scene
from cdetr_fast.inference import int8
from cdetr_fast.inference.convolution import RELU, Activation, FusedConv2d, has_onednn
from cdetr_fast.inference.int8_linear import Int8Linear
from cdetr_fast.inference.linear import FusedLinear

needs_int8 = pytest.mark.skipif(
    int8.int8_unsupported_reason() is not None, reason=f"no int8: {int8.int8_unsupported_reason()}"
)
CODES, RESIDUAL = int8.Codes(0.02, 3, (2, 6, 9, 11)), int8.Codes(0.5, 120, (2, 8, 9, 11))


pytestmark = pytest.mark.usefixtures("no_gradients")


def calibration(count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, 96, 128, generator=generator) for _ in range(count)]


def code_image(codes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, codes.shape, generator=generator, dtype=torch.uint8)
    return x.contiguous(memory_format=torch.channels_last)


def as_double(codes, x):
    return codes.scale * (x.double() - codes.zero)


SWISH, RELU6 = Activation("swish"), Activation("hardtanh", (0.0, 6.0))


@needs_int8
@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize(
    ("activation", "residual", "leaves_codes"),
    [
        *((activation, None, False) for activation in (None, RELU, RELU6, SWISH)),
        *((activation, None, True) for activation in (None, RELU, RELU6)),
        *((a, residual, False) for a in (None, RELU) for residual in ("codes", "numbers")),
        (RELU, "codes", True),
    ],
)
def test_a_convolution_is_that_of_its_rounded_weights(activation, residual, leaves_codes, kind):
    torch.manual_seed(0)
    conv = FusedConv2d(kind(6, 8, 3, padding=0 if kind is Conv2dSame else 1), None)
    conv.activation = activation
    result = int8.Codes(0.01, 0 if activation else 128, ()) if leaves_codes else None
    add = {None: None, "codes": code_image(RESIDUAL), "numbers": torch.randn(2, 8, 9, 11)}[residual]
    in_codes = residual == "codes"
    quantized = int8.Int8Conv2d(conv, CODES, RESIDUAL if in_codes else None, result)
    x = code_image(CODES)
    step = conv.weight.double().abs().amax((1, 2, 3), keepdim=True) / 127
    weight = (conv.weight / step).round() * step
    expected = F.conv2d(as_double(CODES, x), weight, conv.bias.double(), padding=1)
    if add is not None:
        expected += as_double(RESIDUAL, add) if in_codes else add
    if activation is not None:
        expected = activation.apply_(expected)
    before = None if add is None else add.clone()
    got = quantized(x, add)
    assert (got.dtype == torch.uint8) == leaves_codes
    if leaves_codes:
        limits = (-result.scale * result.zero, result.scale * (255 - result.zero))
        error = (as_double(result, got) - expected.clamp(*limits)).abs().max()
        assert error <= 0.501 * result.scale
    else:
        assert (got - expected).abs().max() <= 1e-4
    if before is not None:
        assert not in_codes or torch.equal(add, before)  # not overwritten unless `in_place`


@needs_int8
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["codes", "numbers"])
@pytest.mark.parametrize(
    ("relu", "leaves_codes", "state"),
    [(True, True, None), (True, False, None), (False, False, None),
     *((False, False, state) for state in ("batch", "shared", "strided"))],
)  # fmt: skip
def test_a_linear_layer_is_that_of_its_rounded_weights(dtype, given, relu, leaves_codes, state):
    torch.manual_seed(0)
    source = int8.Codes(0.02, 100, (2, 5, 24))
    result = int8.Codes(0.01, 0, (2, 5, 16)) if leaves_codes else None
    linear = FusedLinear(torch.randn(16, 24).to(dtype), torch.randn(16).to(dtype), relu)
    quantized = Int8Linear(linear, source, result)
    codes = torch.randint(0, 256, (2, 5, 24), dtype=torch.uint8)
    x = codes
    if given == "numbers":
        x = source.numbers(codes).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        codes = source.of(x.float())
    weight = linear.weight.double()
    step = weight.abs().amax(1, keepdim=True) / 127
    weight = (weight / step).round() * step
    expected = F.linear(as_double(source, codes), weight, linear.bias.double())
    added = {
        None: None,
        "batch": torch.randn(2, 5, 16).to(dtype),
        "shared": torch.randn(1, 5, 16).to(dtype),
        "strided": torch.randn(2, 16, 5).to(dtype).transpose(1, 2),
    }[state]
    if added is not None:
        expected += added
    if relu:
        expected = expected.relu()
    before = None if added is None else added.clone()
    got = quantized(x, added)
    if leaves_codes:
        assert got.dtype == torch.uint8
        highest = 255 * result.scale
        error = (as_double(result, got) - expected.clamp(0, highest)).abs().max()
        assert error <= 0.501 * result.scale
    else:
        assert got.dtype == dtype
        assert (got - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.abs().max()
    assert before is None or torch.equal(added, before)


@needs_int8
@pytest.mark.parametrize(("activation", "count"), [("relu", 5), ("gelu", 0)])
def test_feed_forward_blocks(activation, count):
    model = make_ours(
        "detection", "paper", backbone="test_resnet", activation_function=activation
    ).eval()
    fast = optimize(model, int8_calibration=calibration())
    layers = [m for m in fast.runner.prepared.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 2 * count
    assert f"{count} feed-forward blocks" in fast.explain()
    assert "none yet" in fast.explain()  # map sizes: those of the calibration are not kept
    for shape in ((1, 3, 96, 128), (2, 3, 70, 101)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        got, expected = fast(x).last_hidden_state, model(x).last_hidden_state
        assert (got - expected).norm() <= 0.15 * expected.norm()


@needs_int8
@pytest.mark.parametrize("backbone", ["test_resnet", "tf_efficientnet_lite0"])
def test_the_last_map_is_near(backbone):
    # as initialised: random norms let a deep backbone amplify every error
    model = make_ours("detection", "paper", backbone=backbone).eval()
    fast = optimize(model, int8_calibration=calibration())
    generator = torch.Generator().manual_seed(2)
    for shape in ((1, 3, 96, 128), (2, 3, 70, 101)):
        x = torch.randn(shape, generator=generator)
        expected = optimize(model).runner.prepared.base.backbone.model(x)[-1]
        maps = fast.runner.prepared.base.backbone.model(x)
        assert len(maps) == 1
        assert (maps[-1] - expected).norm() <= 0.15 * expected.norm()  # 1 and more if it is wrong
    assert "convolutions of the backbone" in fast.explain()
    assert " int8" in fast.explain().splitlines()[1]


@needs_int8
@pytest.mark.skipif(not has_onednn(torch.bfloat16), reason="no bf16 convolutions")
def test_the_rest_in_bf16():
    """The backbone is the same to the last bit but for the rounding of its weights and maps."""
    model = make_ours("detection", "paper", backbone="test_resnet").eval()
    fast = optimize(model, torch.bfloat16, int8_calibration=calibration())
    single = optimize(model, int8_calibration=calibration())
    x = calibration(1)[0]
    ours, theirs = (m.runner.prepared.base.backbone.model for m in (fast, single))
    (got,), (expected,) = ours(x.bfloat16()), theirs(x)
    assert got.dtype == torch.bfloat16
    assert (got - expected).norm() <= 0.05 * expected.norm()
    outputs, wanted = fast(x.bfloat16()), model(x)
    assert outputs.logits.dtype == torch.bfloat16
    assert (outputs.logits - wanted.logits).norm() <= 0.1 * wanted.logits.norm()
    assert fast.get_parameter("class_labels_classifier.weight").dtype == torch.bfloat16
    assert model.get_parameter("class_labels_classifier.weight").dtype == torch.float32


@needs_int8
def test_detections_stay():
    model = ConditionalDetrForObjectDetection.from_pretrained(DEMO, dtype=torch.float32)
    process = model.image_processor
    scenes = [draw_scene(TRAIN_SEED + i)[0] for i in range(8)]
    images = [process([scene], return_tensors="pt")["pixel_values"] for scene in scenes]
    fast = optimize(model, int8_calibration=images)
    for seed in range(4):
        scene, _ = draw_scene(seed)
        expected, got = model.predict(scene, 0.4), fast.predict(scene, 0.3)
        for box, label in zip(expected.boxes_xyxy, expected.labels, strict=True):
            distance = (got.boxes_xyxy - box).abs().amax(1)
            assert distance[got.labels == label].min() < 4


@needs_int8
def test_masks_and_padding():
    model = random_model("segmentation")
    fast = optimize(model, int8_calibration=calibration())
    images = padded_images()
    got, expected = fast(*images), model(*images)
    assert fast.runner.fallback_reason is None
    for name in ("logits", "pred_boxes", "pred_masks"):
        assert (got[name] - expected[name]).norm() <= 0.3 * expected[name].norm()


@needs_int8
def test_follows_new_weights():
    model = random_model()
    fast = optimize(model, int8_calibration=calibration())
    (image,) = calibration(1)
    before = fast(image).logits
    for parameter in model.model.backbone.parameters():
        parameter.mul_(1.1)
    after = fast(image).logits
    fresh = optimize(model, int8_calibration=calibration())(image).logits
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"int8_calibration": torch.zeros(1, 3, 64, 64)}, TypeError, "expected a list of batches"),
        ({"int8_calibration": []}, TypeError, "expected a list of batches"),
        ({"int8_calibration": [[1]]}, TypeError, "expected floating-point tensors, got list"),
        ({"int8_calibration": [torch.zeros(3, 64, 64)]}, ValueError, r"got \[3, 64, 64\]"),
        (
            {"int8_calibration": [torch.full((1, 3, 64, 64), torch.nan)]},
            ValueError,
            "expected finite pixels",
        ),
        ({"dtype": torch.float16}, ValueError, "expected a model in float32 or bfloat16"),
        ({"compile": True}, ValueError, "expected compile=False, got True"),
    ],
)
def test_wrong_calibration_is_refused(options, kind, message):
    images = {"int8_calibration": [torch.zeros(1, 3, 64, 64)]}
    with pytest.raises(kind, match=f"int8_calibration: .*{message}"):
        optimize(random_model(), **(images | options))


def test_a_cpu_that_cannot_says_so(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(RuntimeError, match="int8_calibration: this CPU has no VNNI"):
        optimize(random_model(), int8_calibration=[torch.zeros(1, 3, 64, 64)])
