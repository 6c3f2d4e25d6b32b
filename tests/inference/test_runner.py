"""Runs of an optimised model: dispatches, parts and buckets of a batch, threads, own forward."""

import copy
import threading

import pytest
import torch
from support.oracle import assert_same, largest_error, padded_images, random_model
from support.threads import in_threads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_fast import optimize
from cdetr_fast.inference.convolution import FusedConv2d, has_onednn

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_rare_arguments_take_the_own_forward(model, images):
    fast = optimize(model)
    got = fast(*images, output_attentions=True, output_hidden_states=True)
    expected = model(*images, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(got.to_tuple(), expected.to_tuple())
    assert "output_attentions" in fast.explain()
    labels = [{"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}] * 2
    torch.testing.assert_close(
        fast(*images, labels=labels).loss, model(*images, labels=labels).loss
    )
    with torch.enable_grad():
        pixel_values = images[0].clone().requires_grad_()
        fast(pixel_values).logits.sum().backward()
    assert pixel_values.grad.abs().sum() > 0


def test_autocast_leaves_boxes_alone(model, images):
    fast = optimize(model)
    expected = fast(*images)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(fast(*images), expected, 1e-6)


@pytest.mark.parametrize("written", [True, False], ids=["prepared again", "optimised"])
def test_prepared_under_autocast(model, images, written):
    expected = optimize(model)
    with torch.autocast("cpu", torch.bfloat16):
        fast = optimize(model)
        if written:
            fast.refresh()
        assert_same(fast(*images), expected(*images), 1e-6)
    assert_same(fast(*images), expected(*images), 1e-6)


def test_another_default_device(model, images):
    """Torch makes new tensors there; a call makes them on the device of its images."""
    with torch.device("meta"):
        fast = optimize(model)
        got = fast(*images), fast(images[0])
        assert "runs as it is" not in fast.explain()
    assert_same(got[0], model(*images))
    assert_same(got[1], model(images[0]))


def test_configuration_that_asks_for_more(model, images):
    """The call says that it wants less, and the copy computes no more."""
    expected = model(*images)
    model.config.output_attentions = model.config.output_hidden_states = True
    fast = optimize(model)
    fast.warmup([(1, 64, 96)])
    got = fast(*images, output_attentions=False, output_hidden_states=False)
    assert fast.runner.fallback_reason is None
    assert got.keys() == expected.keys()
    assert_same(got, expected)
    assert fast(*images).cross_attentions is not None


def test_weights_of_inference_mode(images):
    with torch.inference_mode():
        model = random_model()
    assert_same(optimize(model)(*images), model(*images))


def test_layers_without_bias(model, images):
    """Where no operator fuses the ReLU, too: oneDNN does not run fp64."""
    model.double()
    model.model.encoder.layers[0].mlp.fc1.bias = None
    model.bbox_predictor.layers[0].bias = None
    images = images[0].double(), images[1]
    assert_same(optimize(model)(*images), model(*images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_masks_of_any_dtype(model, images, dtype):
    fast, expected = optimize(model), model(*images)
    for run in (model, fast):
        assert_same(run(images[0], images[1].to(dtype)), expected, 1e-4)
        assert_same(run(images[0], torch.ones_like(images[1]).to(dtype)), model(images[0]), 1e-4)


def test_inference_mode_first(model, images):
    fast = optimize(model)
    with torch.inference_mode():
        fast(images[0])
    assert_same(fast(images[0]), model(images[0]))


def test_hooks_are_called(model, images):
    fast, seen = optimize(model), []
    fast.model.encoder.register_forward_hook(lambda *_: seen.append(1))
    assert_same(fast(*images), model(*images))
    assert seen
    assert "hook" in fast.explain()


def test_hooks_while_the_copy_is_prepared_again(model, images):
    fast, seen = optimize(model), []
    own = fast.register_forward_hook(lambda *_: seen.append("own"))
    fast.refresh()
    assert_same(fast(*images), model(*images))
    assert fast.runner.fallback_reason is None
    assert seen == ["own"]
    inner = fast.model.encoder.register_forward_hook(lambda *_: seen.append("inner"))
    fast.refresh()
    fast(*images)
    assert seen == ["own", "inner", "own"]
    assert "model.encoder has a forward hook" in fast.runner.fallback_reason
    inner.remove()
    own.remove()
    assert_same(fast(*images), model(*images))
    assert fast.runner.fallback_reason is None
    assert len(seen) == 3


def test_the_copy_has_no_runner(images):
    """In which it would keep the images of the calibration once more."""
    for task in ("base", "detection", "segmentation"):
        fast = optimize(random_model(task))
        fast.refresh()
        for made in (fast, copy.deepcopy(fast)):
            made(*images)
            assert not hasattr(made.runner.prepared.model, "runner")
            assert made.runner.fallback_reason is None


def test_training_is_refused(model):
    fast = optimize(model)
    with pytest.raises(RuntimeError, match="train: expected mode=False"):
        fast.train()
    assert not any(module.training for module in fast.modules())
    fast.model.encoder.train()  # then dropout counts, and the own forward runs
    fast(padded_images()[0])
    assert "training" in fast.runner.fallback_reason


def test_packed_convolutions(model, images):
    """A size that comes again is packed for, and not mixed up with others or with old weights."""
    fast = optimize(model)
    convolutions = [m for m in fast.runner.prepared.modules() if isinstance(m, FusedConv2d)]
    sizes = [images[0][:1], images[0][:1, :, :64, :80]]
    first = [fast(x).logits for x in sizes]
    assert all(conv._packed is None for conv in convolutions)
    for x, expected in zip(sizes, first, strict=True):
        for _ in range(3):
            assert torch.equal(fast(x).logits, expected)
    if has_onednn(torch.float32):
        assert all(conv._packed is not None for conv in convolutions)
    for parameter in model.model.backbone.parameters():
        parameter.mul_(1.1)
    assert_same(fast(sizes[1]), model(sizes[1]))
    assert not torch.equal(fast(sizes[1]).logits, first[1])


class Counter(TorchDispatchMode):
    """Counts operators, and those that wait for a device."""

    def __init__(self):
        super().__init__()
        self.total, self.syncs = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.total += 1
        name = str(operator)
        self.syncs += any(x in name for x in ("_local_scalar_dense", "nonzero", "item"))
        return operator(*args, **(kwargs or {}))


PAPER_LAYERS = {"encoder_layers": 6, "decoder_layers": 6, "backbone": "resnet50"}


def test_dispatches_and_syncs():
    """The size of the paper: transformers makes 1,989 dispatches and 2 syncs."""
    fast = optimize(random_model(num_queries=300, **PAPER_LAYERS))
    pixel_values, pixel_mask = padded_images()
    for mask in (torch.ones_like(pixel_mask), pixel_mask):
        fast(pixel_values, mask)
        with Counter() as counter:
            fast(pixel_values, mask)
        assert counter.total <= 700
        assert counter.syncs == 0


def test_dispatches_of_a_padded_batch_of_full_size():
    """Large maps take more operators: attention goes by some images at a time."""
    fast = optimize(random_model(num_queries=300, **PAPER_LAYERS))
    pixel_values = torch.randn(4, 3, 800, 1066)
    pixel_mask = torch.ones(4, 800, 1066, dtype=torch.int64)
    pixel_mask[1:, 600:] = 0
    for _ in range(2):  # the second call packs the weights for the size
        fast(pixel_values, pixel_mask)
    with Counter() as counter:
        fast(pixel_values, pixel_mask)
    assert counter.total <= 700
    assert counter.syncs == 0


@pytest.mark.parametrize("task", ["base", "segmentation"])
def test_large_batches_in_parts(task, images):
    model = random_model(task, auxiliary_loss=True)
    batch = [torch.cat([x, x.flip(0), x[:1]]) for x in images]
    assert_same(optimize(model, max_batch=2)(*batch), model(*batch))


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_buckets(task, images):
    """The result is that of the model on images padded by hand."""
    model = random_model(task)
    fast = optimize(model, bucket=64)
    pixel_values, pixel_mask = images
    padded = (
        nn.functional.pad(pixel_values, (0, 61, 0, 31)),
        nn.functional.pad(pixel_mask, (0, 61, 0, 31)),
    )
    expected, got = model(*padded), fast(pixel_values, pixel_mask)
    assert largest_error(got, expected) <= 1e-4
    if task == "segmentation":
        size = model(pixel_values, pixel_mask).pred_masks.shape
        assert got.pred_masks.shape == size
        difference = got.pred_masks - expected.pred_masks[..., : size[-2], : size[-1]]
        assert difference.abs().max() <= 1e-4
    even = torch.randn(1, 3, 64, 128)
    assert_same(fast(even), model(even))


def test_threads(model, images):
    fast = optimize(model)
    sizes = [(97, 131), (64, 64), (70, 100)]
    inputs = [torch.randn(1, 3, *size) for size in sizes]
    expected = [model(x) for x in inputs]
    failures = []

    def work(start):
        for i in range(6):
            index = (start + i) % 3
            with torch.no_grad():
                if largest_error(fast(inputs[index]), expected[index]) > 1e-4:
                    failures.append(index)

    in_threads(work, 4)
    assert not failures


def test_other_threads_are_left_alone_while_engines_are_prepared(model, images):
    """fx patches `nn.Module` for the whole process while it traces."""
    fast, expected = optimize(model), model(*images)
    call, stop, failures, noted = nn.Module.__call__, threading.Event(), [], []

    def run(index):
        with torch.no_grad():
            try:
                if index < 2:
                    while not stop.is_set():
                        assert largest_error((fast, model)[index](*images), expected) <= 1e-4
                    return
                for _ in range(5):
                    fast.refresh() if index == 2 else noted.extend(
                        optimize(model).runner.prepared.base.backbone.model.notes
                    )
            except Exception as failure:
                failures.append(failure)
            finally:
                if index >= 2:
                    stop.set()

    in_threads(run, 4)
    assert not failures
    assert not noted  # none fell back to the backbone as it is
    assert nn.Module.__call__ is call


def test_few_map_sizes_are_kept(model):
    fast = optimize(model)
    for i in range(12):
        fast(torch.randn(1, 3, 32 * (i + 1), 32))
    assert len(fast.runner.prepared.constants()) == 8
    assert "12x1" in fast.explain()
