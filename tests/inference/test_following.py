"""Changes of weights: loaded, trained, written past torch, with shared memory and without."""

import copy
import gc
import weakref

import pytest
import torch
from support.oracle import TINY, assert_same, largest_error, padded_images, random_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from cdetr_fast import optimize

pytestmark = pytest.mark.usefixtures("no_gradients")


def predictions(model, images):
    dtype = next(model.parameters()).dtype
    output = model(images[0].to(dtype), images[1])
    return torch.cat([output.logits.flatten(), output.pred_boxes.flatten()]).float()


def difference(a, b, images):
    return (predictions(a, images) - predictions(b, images)).abs().max().item()


def scaled_through_data(model):
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.mul_(1.1)


def scaled_through_numpy(model):
    for parameter in model.parameters():
        parameter.detach().numpy()[...] *= 1.1


def scaled_in_inference_mode(model):
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def trained(model, **options):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.002, **options)
    with torch.enable_grad():
        model(*padded_images()).logits.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


WRITES = {
    "data": scaled_through_data,
    "numpy": scaled_through_numpy,
    "inference mode": scaled_in_inference_mode,
    "fused optimiser": lambda model: trained(model, fused=True),
    "optimiser": lambda model: trained(model, foreach=True),
    "loaded": lambda model: model.load_state_dict(random_model(seed=5).state_dict()),
    "assigned": lambda model: model.load_state_dict(random_model(seed=5).state_dict(), assign=True),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("dtype", [None, "float64"])
def test_follows_the_original(write, dtype):
    model, images = random_model(), padded_images()
    fast = optimize(model, dtype=dtype)
    before = predictions(fast, images)
    for _ in range(2):  # after new tensors the two share no memory
        WRITES[write](model)
        assert difference(fast, model, images) <= 1e-4
    assert (predictions(fast, images) - before).abs().max() > 1e-3
    refreshed = fast.runner.refreshed
    fast(images[0].to(next(fast.parameters()).dtype))
    assert fast.runner.refreshed == refreshed


def test_a_fused_step_is_seen_without_a_look_at_values(monkeypatch):
    """As on a GPU, where looking would wait."""
    monkeypatch.setattr("cdetr_fast.inference.following._sample", lambda tensor: None)
    model, images = random_model(), padded_images()
    fast = optimize(model)
    trained(model, fused=True)
    assert difference(fast, model, images) <= 1e-4
    fast.refresh()
    scaled_through_data(model)
    assert difference(fast, model, images) > 1e-3  # that is what refresh() is for
    fast.refresh()
    assert difference(fast, model, images) <= 1e-4


@pytest.mark.parametrize("called", [True, False])
def test_a_result_that_was_converted_later_follows(called):
    model, images = random_model(), padded_images()
    fast = optimize(model)
    fast.double()
    if called:
        predictions(fast, images)
    scaled_through_data(model)
    model.load_state_dict(random_model(seed=5).state_dict())  # the norms' statistics as well
    assert difference(fast, copy.deepcopy(model).double(), images) <= 1e-4
    assert {x.dtype for x in fast.state_dict().values() if x.is_floating_point()} == {torch.float64}


def test_an_original_that_was_converted_keeps_its_precision():
    model, images = random_model(), padded_images()
    fast = optimize(model)
    before = predictions(fast, images)
    model.bfloat16()
    assert torch.equal(predictions(fast, images), before)
    model.to("meta")
    assert torch.equal(predictions(fast, images), before)


def test_loaded_weights_are_followed_no_more():
    model, other, images = random_model(), random_model(seed=5), padded_images()
    fast = optimize(model, dtype=torch.float64)
    fast.load_state_dict(other.state_dict())
    scaled_through_data(model)
    assert difference(fast, other, images) <= 1e-4
    refreshed = fast.runner.refreshed
    scaled_through_data(model)
    assert difference(fast, other, images) <= 1e-4
    assert fast.runner.refreshed == refreshed  # nothing is prepared for an original of the past


def test_a_copy_does_not_follow():
    model, images = random_model(), padded_images()
    duplicate = copy.deepcopy(optimize(model))
    before = predictions(duplicate, images)
    scaled_through_data(model)
    assert torch.equal(predictions(duplicate, images), before)


def test_other_shapes_are_refused():
    model, images = random_model(), padded_images()
    fast = optimize(model)
    fast(*images)
    model.class_labels_classifier = nn.Linear(64, 3)
    message = r"class_labels_classifier.weight: .* \[7, 64\] .* \[3, 64\] now; call optimize\(\)"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            fast(*images)


def test_the_original_is_not_kept():
    model, images = random_model(), padded_images()
    fast = optimize(model, dtype=torch.float64)
    before = predictions(fast, images)
    weight = weakref.ref(model.class_labels_classifier.weight)
    del model
    gc.collect()
    assert weight() is None
    assert torch.equal(predictions(fast, images), before)


def test_follows_the_training_of_the_original(model, images):
    fast = optimize(model)
    before = fast(*images)
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        output = model(*images)
        (output.logits.square().mean() + output.pred_boxes.mean()).backward()
        optimizer.step()
    assert largest_error(fast(*images), before) > 1e-3
    assert_same(fast(*images), model(*images))
    model.model.backbone.model.layer1[0].bn1.weight.mul_(2)  # a folded buffer
    assert_same(fast(*images), model(*images))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("part", ["all", "model.backbone", "model.decoder"])
def test_follows_loaded_weights(model, images, assign, part):
    fast, other, original = optimize(model), random_model(seed=5), model(*images)
    expected = copy.deepcopy(model)
    for target in (fast, expected):
        module, source = target, other
        if part != "all":
            module, source = target.get_submodule(part), other.get_submodule(part)
        module.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert largest_error(fast(*images), original) > 1e-2
    assert_same(fast(*images), expected(*images))
    assert_same(model(*images), original, 0)  # the original keeps its weights


def test_follows_changes_of_other_kinds(model, images):
    fast = optimize(model)
    fast.double()
    exact = copy.deepcopy(model).double()
    pixel_values = images[0].double()
    assert_same(fast(pixel_values), exact(pixel_values), 1e-9)
    fast.float()
    fast.config.auxiliary_loss = model.config.auxiliary_loss = True
    fast.config.compat = model.config.compat = "transformers"
    assert_same(fast(*images), model(*images))
    for x in (fast, model):
        torch.manual_seed(0)
        x.class_labels_classifier = nn.Linear(TINY["d_model"], 3)
    assert_same(fast(*images), model(*images))
    for x in (fast, model):
        x.bbox_predictor.layers[0].weight.data = x.bbox_predictor.layers[0].weight.data * 2
    assert_same(fast(*images), model(*images))


def set_epsilon(model):
    model.model.encoder.layers[0].final_layer_norm.eps = 0.5


def set_epsilon_of_a_folded_norm(model):
    model.model.backbone.model.bn1.eps = 0.5


def set_stride(model):
    model.model.backbone.model.maxpool.stride = 1


def set_activation(model):
    model.bbox_predictor.activation_fn = nn.LeakyReLU(0.5).eval()


def add_bias(model):
    head = model.class_labels_classifier
    head.bias = nn.Parameter(torch.arange(float(len(head.weight))))


@pytest.mark.parametrize(
    "change",
    [set_epsilon, set_epsilon_of_a_folded_norm, set_stride, set_activation, add_bias],
)
def test_follows_settings_of_the_result(model, images, change):
    model.class_labels_classifier.bias = None
    fast = optimize(model)
    before = model(*images)
    assert_same(fast(*images), before)
    for x in (fast, model):
        change(x)
    expected = model(*images)
    assert largest_error(expected, before) > 1e-3
    assert_same(fast(*images), expected)


def test_another_class_of_module_in_the_original_is_refused(model, images):
    fast = optimize(model)
    fast(*images)
    set_activation(model)
    message = r"bbox_predictor.activation_fn: .* had a ReLU here and has a LeakyReLU now; call opt"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            fast(*images)
    set_activation(fast)  # it no longer follows there
    assert_same(fast(*images), model(*images))


def test_compiled_graphs_see_loaded_weights(model, images):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast, other = optimize(model), random_model(seed=5)
    compiled = torch.compile(fast, fullgraph=True, backend=counter)
    assert_same(compiled(*images), model(*images))
    fast.load_state_dict(other.state_dict())
    assert_same(compiled(*images), other(*images))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiled_engine_follows_its_weights(images, monkeypatch):
    """`optimize(compile=True)`, by a compiler that takes no minute."""
    torch._dynamo.reset()
    compiler, counter = torch.compile, CompileCounterWithBackend("aot_eager")

    def quick(engine, *, mode, **options):
        assert mode == "default"
        return compiler(engine, backend=counter, **options)

    monkeypatch.setattr(torch, "compile", quick)
    model, other = random_model(), random_model(seed=5)
    fast = optimize(model, compile=True)
    assert_same(fast(*images), model(*images))
    assert counter.frame_count == 1
    fast.load_state_dict(other.state_dict())
    assert_same(fast(*images), other(*images))
    torch._dynamo.reset()
