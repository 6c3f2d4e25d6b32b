"""`attn_implementation`, gradients of maps and states, and torch.jit.trace."""

import pytest
import torch
from support.tiny import randomized, tiny_config
from torch.nn import functional as F

import cdetr_fast
from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrForSegmentation
from cdetr_fast.models.backbone import frozen_batch_norm

DETECTION, SEGMENTATION = ConditionalDetrForObjectDetection, ConditionalDetrForSegmentation
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 64, 96, dtype=torch.int64)
MASK[1, :, 60:] = 0


def make(cls=DETECTION, **changes):
    config = tiny_config(**changes)
    config.decoder_layers = 2
    return randomized(cls(config))


@pytest.mark.parametrize("mask", [None, MASK], ids=["unpadded", "padded"])
@pytest.mark.parametrize("position", ["sine", "learned"])
def test_implementations_agree(position, mask, monkeypatch):
    model = make(position_embedding_type=position)
    with torch.no_grad():
        expected = model(IMAGES, mask, output_attentions=True)
    fused = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: fused.append(1) or original(*args, **kwargs),
    )
    for name, calls in (("eager", 0), ("sdpa", 5), ("cdetr_fast", None), (None, None)):
        fused.clear()
        model.config._attn_implementation = name
        got = model(IMAGES, mask)
        assert calls is None or len(fused) == calls, name
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)
        with_maps = model(IMAGES, mask, output_attentions=True)
        for map_, known in zip(with_maps.cross_attentions, expected.cross_attentions, strict=True):
            torch.testing.assert_close(map_, known, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", None])
@pytest.mark.parametrize("position", ["sine", "learned"])
def test_an_image_that_is_all_padding_attends_to_nothing(position, implementation):
    """It neither gives NaN nor depends on what is in it; the other image is as before."""
    model = make(position_embedding_type=position, attn_implementation=implementation)
    mask = MASK.clone()
    mask[1] = 0
    with torch.no_grad():
        memory = torch.randn(2, 6, model.config.d_model)
        logits = [
            model(IMAGES, mask, encoder_outputs=(memory + shift,)).logits
            for shift in (0.0, torch.tensor([0.0, 1.0])[:, None, None])
        ]
    assert logits[0].isfinite().all()
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("implementation", ["eager", "sdpa", None])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("fields", [{}, {"auxiliary_loss": True, "compat": "transformers"}])
def test_maps_and_states_are_in_the_graph(fields, padded, implementation, batch):
    model = make(attn_implementation=implementation, **fields)
    mask = MASK[-batch:] if padded else None
    out = model(IMAGES[-batch:], mask, output_attentions=True, output_hidden_states=True)
    kept = (
        *out.encoder_attentions,
        *out.encoder_hidden_states,
        *out.decoder_attentions,
        *out.cross_attentions,
        # Where the normed states are fed back, the states before the norm are returned.
        *out.decoder_hidden_states[1:],
    )
    for tensor in kept:
        tensor.retain_grad()
    out.logits.square().sum().backward()
    assert all(tensor.grad is not None for tensor in kept)


def test_eager_has_second_derivatives():
    model = make(attn_implementation="eager")
    images = IMAGES.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        model(images, MASK).logits.sigmoid().sum(), images, create_graph=True
    )
    gradient.square().sum().backward()
    assert images.grad.isfinite().all()
    assert images.grad.abs().sum() > 0


def test_second_derivatives_of_frozen_batch_norm():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    mean, var, weight, bias = torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.5

    def function(x):
        return frozen_batch_norm(x, mean, var, weight, bias, 1e-5).square()

    assert torch.autograd.gradgradcheck(function, (x,))


REFUSED = {
    "flash_attention_2": (ImportError, "flash_attn is not installed"),
    "flex_attention": (ValueError, "expected one of 'eager', 'sdpa', 'cdetr_fast' or None"),
    "paged|eager": (ValueError, "expected one of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused(name, tmp_path):
    make().save_pretrained(tmp_path)
    error, text = REFUSED[name]
    with pytest.raises(error, match=text):
        DETECTION.from_pretrained(tmp_path, attn_implementation=name)
    with pytest.raises(error, match=text):
        make().config._attn_implementation = name


def test_a_dict_names_that_of_the_model(tmp_path):
    make().save_pretrained(tmp_path)
    implementation = {"": "eager", "backbone_config": "sdpa"}
    model = DETECTION.from_pretrained(tmp_path, attn_implementation=implementation)
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="'text_config'"):
        DETECTION.from_pretrained(tmp_path, attn_implementation={"text_config": "eager"})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("cls", "gradients"),
    [(DETECTION, False), (DETECTION, True), (SEGMENTATION, True), (cdetr_fast.optimize, True)],
)
def test_a_trace_serves_other_batches_and_gradients(cls, gradients):
    model = make(DETECTION if cls is cdetr_fast.optimize else cls)
    if cls is cdetr_fast.optimize:
        model = cls(model)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, (IMAGES[1:], MASK[1:]), strict=False)
    for images, mask in ((IMAGES[1:], MASK[1:]), (IMAGES, MASK)):
        got, expected = traced(images, mask), model(images, mask)
        for name in ("logits", "pred_boxes"):
            torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-4)
    got["logits"].sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("context", [lambda: torch.device("meta"), "init_empty_weights"])
def test_a_model_without_weights_is_not_loaded(context, tmp_path):
    make().save_pretrained(tmp_path)
    if context == "init_empty_weights":
        context = pytest.importorskip("accelerate").init_empty_weights
    with context(), pytest.raises(RuntimeError, match="cannot be loaded on the meta device"):
        DETECTION.from_pretrained(tmp_path)
