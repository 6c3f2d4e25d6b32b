"""Writes to weights that count no version, and originals that the result shares no memory with."""

import copy
import gc
import weakref

import pytest
import torch
from support.oracle import make_ours, padded_images, randomise
from torch import nn

from cdetr_fast import optimize


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def random_model(seed=0):
    torch.manual_seed(0)
    model = make_ours(backbone="test_resnet")
    randomise(model, seed)
    return model.eval()


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
    "loaded": lambda model: model.load_state_dict(random_model(5).state_dict()),
    "assigned": lambda model: model.load_state_dict(random_model(5).state_dict(), assign=True),
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


def test_a_result_that_was_converted_later_follows():
    model, images = random_model(), padded_images()
    fast = optimize(model)
    fast.double()
    scaled_in_inference_mode(model)
    assert difference(fast, model, images) <= 1e-4


def test_an_original_that_was_converted_keeps_its_precision():
    model, images = random_model(), padded_images()
    fast = optimize(model)
    before = predictions(fast, images)
    model.bfloat16()
    assert torch.equal(predictions(fast, images), before)
    model.to("meta")
    assert torch.equal(predictions(fast, images), before)


def test_loaded_weights_are_followed_no_more():
    model, other, images = random_model(), random_model(5), padded_images()
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
