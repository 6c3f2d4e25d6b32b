"""`optimize()`: the same outputs, never stale, never half done."""

import copy
import inspect
import pickle
import threading

import pytest
import torch
from support.oracle import TINY, make_ours, padded_images, randomise
from support.threads import in_threads
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import cdetr_fast
from cdetr_fast import optimize
from cdetr_fast.inference.backbone import FusedBackbone
from cdetr_fast.inference.convolution import FusedConv2d, has_onednn
from cdetr_fast.models.backbone import freeze_batch_norm


def random_model(task="detection", compat="paper", **config):
    torch.manual_seed(0)  # some weights amplify rounding
    model = make_ours(task, compat, **({"backbone": "test_resnet"} | config))
    randomise(model)
    return model.eval()


@pytest.fixture
def model():
    return random_model()


@pytest.fixture
def images():
    return padded_images()


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def assert_same(got, expected, tolerance=1e-4):
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    for name in expected:
        error = (got[name] - expected[name]).abs().max().item()
        assert error <= tolerance, f"{name} is off by {error}"


def error(got, expected):
    return max((got[k] - expected[k]).abs().max().item() for k in ("logits", "pred_boxes"))


# Numbers -----------------------------------------------------------------------------------------

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


def test_unusual_activations_and_dropped_paths_of_a_backbone():
    """Unfusable parts stay, and a map that is read twice is not overwritten."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.second = nn.Conv2d(8, 8, 1)
            self.third = nn.Conv2d(8, 8, 3, padding="same", groups=4)
            self.act = nn.ELU()

        def forward(self, x):
            y = self.act(self.norm(self.first(x)))
            z = self.second(y)
            w = torch.relu(self.third(z) + z)
            return [y * 2, torch.relu(z + w), w + y.mean((2, 3), keepdim=True)]

    backbone = Odd().eval()
    freeze_batch_norm(backbone)
    randomised = [backbone.norm.running_mean, backbone.norm.bias]
    for tensor in randomised:
        tensor.normal_()
    fast = FusedBackbone(backbone)
    assert not fast.notes
    image = torch.randn(2, 3, 16, 24)
    before = image.clone()
    for got, expected in zip(fast(image), backbone(image), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(image, before)


def test_a_backbone_that_cannot_be_traced_runs_as_it_is():
    class Branching(nn.Conv2d):
        pass

    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Branching(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return [y if y.sum() > 0 else -y]

    backbone = Data().eval()
    fast = FusedBackbone(backbone)
    assert "TraceError" in fast.notes[0]
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(fast(image), backbone(image))


# The same model from outside ---------------------------------------------------------------------


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


def test_inference_mode_first(model, images):
    fast = optimize(model)
    with torch.inference_mode():
        fast(images[0])
    assert_same(fast(images[0]), model(images[0]))


# Never stale -------------------------------------------------------------------------------------


def other_weights():
    other = make_ours(backbone="test_resnet")
    randomise(other, seed=5)
    return other.eval()


def test_follows_the_training_of_the_original(model, images):
    fast = optimize(model)
    before = fast(*images)
    with torch.enable_grad():
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        output = model(*images)
        (output.logits.square().mean() + output.pred_boxes.mean()).backward()
        optimizer.step()
    assert error(fast(*images), before) > 1e-3
    assert_same(fast(*images), model(*images))
    model.model.backbone.model.layer1[0].bn1.weight.mul_(2)  # a folded buffer
    assert_same(fast(*images), model(*images))


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("part", ["all", "model.backbone", "model.decoder"])
def test_follows_loaded_weights(model, images, assign, part):
    fast, other, original = optimize(model), other_weights(), model(*images)
    expected = copy.deepcopy(model)
    for target in (fast, expected):
        module, source = target, other
        if part != "all":
            module, source = target.get_submodule(part), other.get_submodule(part)
        module.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    assert error(fast(*images), original) > 1e-2
    assert_same(fast(*images), expected(*images))
    assert_same(model(*images), original, 0)  # the original keeps its weights


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


def test_hooks_are_called(model, images):
    fast, seen = optimize(model), []
    fast.model.encoder.register_forward_hook(lambda *_: seen.append(1))
    assert_same(fast(*images), model(*images))
    assert seen
    assert "hook" in fast.explain()


def test_training_is_refused(model):
    fast = optimize(model)
    with pytest.raises(RuntimeError, match="train: expected mode=False"):
        fast.train()
    assert not any(module.training for module in fast.modules())
    fast.model.encoder.train()  # then dropout counts, and the own forward runs
    fast(padded_images()[0])
    assert "training" in fast.runner.fallback_reason


def test_compiled_graphs_see_loaded_weights(model, images):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    fast, other = optimize(model), other_weights()
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
    model, other = random_model(), other_weights()
    fast = optimize(model, compile=True)
    assert_same(fast(*images), model(*images))
    assert counter.frame_count == 1
    fast.load_state_dict(other.state_dict())
    assert_same(fast(*images), other(*images))
    torch._dynamo.reset()


# Refusals ----------------------------------------------------------------------------------------


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


# How it runs -------------------------------------------------------------------------------------


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
    assert error(got, expected) <= 1e-4
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
                if error(fast(inputs[index]), expected[index]) > 1e-4:
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
                        assert error((fast, model)[index](*images), expected) <= 1e-4
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
