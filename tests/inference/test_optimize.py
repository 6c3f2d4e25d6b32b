"""`optimize()`: the same outputs and the same interface; what it refuses."""

import copy
import inspect
import pickle

import pytest
import torch
from support.oracle import assert_same, random_model
from torch import nn

import cdetr_fast
from cdetr_fast import optimize

pytestmark = pytest.mark.usefixtures("no_gradients")

# Numbers ------------------------------------------------------------------------------------------

VARIANTS = {
    "resnet50": {"backbone": "resnet50"},
    "dc5": {"backbone": "resnet50", "dilation": True},
    "mobilenet": {"backbone": "tf_mobilenetv3_small_075"},
    "learned": {"position_embedding_type": "learned"},
    "auxiliary": {"auxiliary_loss": True},
    "gelu": {"activation_function": "gelu"},
    "one-layer": {"encoder_layers": 1, "decoder_layers": 1},
    "convnext": {"backbone": "convnext_atto"},
}


@pytest.mark.parametrize(
    ("variant", "compat"),
    [(variant, "paper") for variant in VARIANTS]
    + [(variant, "transformers") for variant in ("mobilenet", "auxiliary")],
)
def test_outputs_agree(variant, compat, images):
    model = random_model(compat=compat, **VARIANTS[variant])
    fast = optimize(model)
    assert not fast.runner.prepared.base.backbone.model.notes
    pixel_values, pixel_mask = images
    assert_same(fast(pixel_values, pixel_mask), model(pixel_values, pixel_mask))
    for _ in range(2):  # the second call has the map's constants at hand
        assert_same(fast(pixel_values[:1]), model(pixel_values[:1]))
    assert fast.runner.fallback_reason is None


@pytest.mark.parametrize("task", ["base", "segmentation"])
@pytest.mark.parametrize("auxiliary_loss", [True, False])
@pytest.mark.parametrize("compat", ["paper", "transformers"])
def test_other_tasks_agree(task, auxiliary_loss, compat, images):
    model = random_model(task, compat, auxiliary_loss=auxiliary_loss)
    fast = optimize(model)
    assert_same(fast(*images), model(*images))
    assert_same(fast(images[0]), model(images[0]))


@pytest.mark.parametrize("compat", ["paper", "transformers"])
def test_predicted_segments_are_those_of_the_prepared_copy(compat, images):
    model = random_model("segmentation", compat)
    fast = optimize(model)
    scores = model(*images).logits
    scores = (
        scores.sigmoid().amax(-1) if compat == "paper" else scores.softmax(-1)[..., :-1].amax(-1)
    )
    scores = scores.flatten().sort().values
    gap = scores.diff().argmax()  # rounding takes no query over the middle of the widest gap
    for threshold in (scores[gap : gap + 2].mean().item(), 1.0):
        expected = model.forward_kept(*images, threshold)
        got = fast.forward_kept(*images, threshold)
        if threshold < 1:
            assert_same(got, expected)
        assert fast.runner.fallback_reason is None
    assert got.pred_masks.shape == expected.pred_masks.shape
    assert got.pred_masks.shape[1] == 0
    picture = torch.randint(0, 256, (3, 60, 90), dtype=torch.uint8)
    got = fast.predict(picture, 0.1)
    assert fast.runner.fallback_reason is None
    expected = model.predict(picture, 0.1)
    assert got.segment_ids == expected.segment_ids
    assert (got.segmentation != expected.segmentation).float().mean() < 0.01
    in_parts = optimize(model, max_batch=1)
    in_parts.forward_kept(*images, 0.5)
    assert "different numbers of queries" in in_parts.runner.fallback_reason


def test_masks_that_are_no_rectangle(model, images):
    pixel_values, pixel_mask = images
    pixel_mask[0, 40:60, 40:90] = 0
    pixel_mask[1] = 0
    assert_same(optimize(model)(pixel_values, pixel_mask), model(pixel_values, pixel_mask))


def test_error_is_that_of_the_model(images):
    """In a deep backbone that amplifies rounding, at most twice the model's own error."""
    model = random_model(backbone="tf_efficientnet_lite0")
    exact = copy.deepcopy(model).double()
    expected = exact(images[0].double(), images[1])
    own = model(*images)
    got = optimize(model)(*images)
    for name in expected:
        limit = 2 * (own[name] - expected[name]).abs().max() + 1e-5
        assert (got[name] - expected[name]).abs().max() <= limit, name


def test_double_precision(model, images):
    fast = optimize(model, dtype=torch.float64)
    exact = copy.deepcopy(model).double()
    pixel_values = images[0].double()
    assert_same(fast(pixel_values, images[1]), exact(pixel_values, images[1]), tolerance=1e-9)
    assert next(model.parameters()).dtype == torch.float32


def test_half_precision(model, images):
    expected = model(*images)
    fast = optimize(model, dtype="bfloat16")
    got = fast(images[0].bfloat16(), images[1])
    assert got.logits.dtype == torch.bfloat16
    assert got.pred_boxes.dtype == torch.float32
    plain = copy.deepcopy(model).bfloat16()(images[0].bfloat16(), images[1])
    for name in ("logits", "pred_boxes"):
        own = (plain[name] - expected[name]).abs().mean()
        assert (got[name] - expected[name]).abs().mean() <= 2 * own + 1e-2, name


# The same model from outside ----------------------------------------------------------------------


def test_looks_like_the_model(model, images, tmp_path):
    tensors = {n: (t.data_ptr(), t._version) for n, t in model.state_dict(keep_vars=True).items()}
    fast = optimize(model)
    assert type(model) is cdetr_fast.ConditionalDetrForObjectDetection
    assert isinstance(fast, cdetr_fast.ConditionalDetrForObjectDetection)
    assert type(fast).__name__ == "ConditionalDetrForObjectDetection"
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    state = fast.state_dict(keep_vars=True)
    assert {n: (t.data_ptr(), t._version) for n, t in state.items()} == tensors  # shared
    fast(*images)
    now = model.state_dict(keep_vars=True)
    assert {n: (t.data_ptr(), t._version) for n, t in now.items()} == tensors  # untouched
    fast.save_pretrained(tmp_path)
    again = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(tmp_path)
    assert_same(fast(*images), again(*images))
    assert isinstance(fast(*images, return_dict=False), tuple)
    assert fast.eval() is fast


def test_in_place(model, images):
    expected = model(*images)
    assert optimize(model, inplace=True) is model
    assert_same(model(*images), expected)
    assert "convolutions" in model.explain()


def test_copies_and_pickles(model, images):
    fast = optimize(model)
    expected = fast(*images)
    assert_same(copy.deepcopy(fast)(*images), expected, 0)
    assert_same(pickle.loads(pickle.dumps(fast))(*images), expected, 0)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"cuda_graphs": True}, RuntimeError, "cuda_graphs: expected a CUDA device"),
        ({"cuda_graphs": "yes"}, ValueError, "cuda_graphs: expected"),
        ({"dtype": torch.int8}, ValueError, "dtype: expected"),
        ({"dtype": "float17"}, ValueError, "dtype: expected"),
        ({"device": "cuda:77"}, RuntimeError, "device: 'cuda:77' cannot be used"),
        ({"compile": "fast"}, ValueError, "compile: expected"),
        ({"device": "meta"}, ValueError, "device: expected one that computes"),
        ({"bucket": 48}, ValueError, "bucket: expected 32, 64"),
        ({"bucket": 64.0}, ValueError, "bucket: expected 32, 64"),
        ({"max_batch": 0}, ValueError, "max_batch: expected"),
        ({"max_graphs": 0}, ValueError, "max_graphs: expected"),
        ({"static_outputs": "yes"}, (TypeError, ValueError), "static_outputs: expected"),
    ],
)
@pytest.mark.parametrize("inplace", [True, False])
def test_options_are_checked(model, images, options, kind, message, inplace):
    expected = model(*images)
    with pytest.raises(kind, match=message):
        optimize(model, inplace=inplace, **options)
    assert type(model) is cdetr_fast.ConditionalDetrForObjectDetection
    assert_same(model(*images), expected, 0)


def test_inplace_is_checked(model):
    with pytest.raises((TypeError, ValueError), match="inplace: expected"):
        optimize(model, inplace="no")
    assert type(model) is cdetr_fast.ConditionalDetrForObjectDetection


@pytest.mark.parametrize(
    ("shapes", "kind"),
    [((1, 64, 64), ValueError), ([(True, 64, 64)], ValueError), ([(1, 64)], ValueError),
     ([(1, 0, 64)], ValueError), (5, TypeError)],
)  # fmt: skip
def test_shapes_to_warm_up_are_checked(model, shapes, kind):
    with pytest.raises(kind, match="shapes: expected"):
        optimize(model).warmup(shapes)


def test_models_are_checked(model):
    with pytest.raises(TypeError, match=r"model: expected ConditionalDetrModel.*got torch"):
        optimize(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="not optimised yet"):
        optimize(optimize(model))

    class Mine(cdetr_fast.ConditionalDetrForObjectDetection):
        pass

    with pytest.raises(TypeError, match="model: expected"):
        optimize(Mine(model.config).eval())
    with pytest.raises(ValueError, match=r"model: expected one in eval mode.*model.eval\(\)"):
        optimize(model.train())
    model.eval()
    handle = model.model.encoder.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"model.encoder.layers.0 has a forward hook"):
        optimize(model)
    handle.remove()
    model.bbox_predictor.layers[0] = torch.nn.utils.parametrizations.weight_norm(
        model.bbox_predictor.layers[0]
    ).eval()
    with pytest.raises(ValueError, match=r"bbox_predictor.layers.0 is a torch ParametrizedLinear"):
        optimize(model)


def test_failure_in_the_middle_leaves_the_model(model, images, monkeypatch):
    expected = model(*images)

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("cdetr_fast.inference.prepare.join_decoder", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimize(model, dtype=torch.float64, inplace=True)
    assert type(model) is cdetr_fast.ConditionalDetrForObjectDetection
    assert not hasattr(model, "runner")
    assert_same(model(*images), expected, 0)


def test_bad_images_are_refused_as_by_the_model(model):
    fast = optimize(model)
    with pytest.raises(ValueError, match=r"pixel_values: expected \[B, 3, H, W\]"):
        fast(torch.zeros(2, 4, 64, 64))
    with pytest.raises(TypeError, match=r"pixel_values: expected torch.float32"):
        fast(torch.zeros(1, 3, 64, 64).double())
    with pytest.raises(ValueError, match="pixel_mask: expected"):
        fast(torch.zeros(1, 3, 64, 64), torch.ones(1, 64, 32))
    with pytest.raises(TypeError, match="pixel_values: expected a tensor"):
        fast("photo.jpg")
