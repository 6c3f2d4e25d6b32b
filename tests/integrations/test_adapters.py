"""Numbers of patched models: outputs, losses, gradients, half precision, Trainer and pipeline."""

import contextlib
import copy

import pytest
import torch
import transformers
from packaging import version
from support.oracle import leaves, make_theirs, padded_images, random_labels
from support.patching import SWITCHES, assert_same_outputs, forward, only, predict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cdetr_fast
from cdetr_fast.integrations import adapters, attention

pytestmark = pytest.mark.usefixtures("unpatched")

CASES = [
    ("detection", "eager", {"auxiliary_loss": True}),
    ("detection", "sdpa", {}),
    ("detection", "sdpa", {"position_embedding_type": "learned", "auxiliary_loss": True}),
    ("segmentation", "eager", {}),
    ("segmentation", "sdpa", {"auxiliary_loss": True}),
]


@pytest.mark.parametrize(("task", "implementation", "config"), CASES)
def test_outputs_and_losses(task, implementation, config):
    model = make_theirs(task, implementation, **config)
    requests = {"output_hidden_states": True}
    if implementation == "eager":
        requests["output_attentions"] = True
    expected = forward(model, task, **requests)
    with cdetr_fast.patch_transformers():
        assert_same_outputs(forward(model, task, **requests), expected)
    expected = predict(model)
    with cdetr_fast.patch_transformers():
        assert_same_outputs(predict(model), expected)


@pytest.mark.parametrize(("task", "implementation", "config"), CASES)
def test_gradients(task, implementation, config):
    """In double precision, where a gradient that is zero in theory cannot hide a wrong one."""
    model = make_theirs(task, implementation, **config).double()
    forward(model, task, torch.float64).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    with cdetr_fast.patch_transformers():
        forward(model, task, torch.float64).loss.backward()
    total = sum(grad.norm() ** 2 for grad in expected.values() if grad is not None).sqrt()
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
            continue
        error = (parameter.grad - expected[name]).norm()
        # Position codes of transformers have fp32 angles in double models too.
        assert error <= 1e-4 * expected[name].norm() + 1e-8 * total, (name, error)


def test_labels_that_only_transformers_takes():
    """Boxes that leave the image, more objects than queries, masks of other values than 0 and 1."""
    model = make_theirs("segmentation", "sdpa", num_queries=4, auxiliary_loss=True)
    labels = random_labels((6, 2), masks=True)
    labels[0]["boxes"] += 0.5
    generator = torch.Generator().manual_seed(0)
    for label in labels:
        label["masks"] = torch.rand(label["masks"].shape, generator=generator)
    expected = model(*padded_images(), labels=labels)
    with cdetr_fast.patch_transformers():
        assert_same_outputs(model(*padded_images(), labels=labels), expected)


OPERATORS = {
    # name: (switch, calls of one training step of segmentation, of what)
    "conditional_attention": ("attention", 2 + 3 + 3),  # a layer each
    "sine_position_2d": ("position_codes", 1),
    "sine_query": ("position_codes", 1),
    "_without_overflow": ("overflow_clamp", 2),
    "segmentation_loss": ("losses", 1),
    "mask_logits": ("mask_head", 1),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_operators_are_called(implementation, monkeypatch):
    """Once per layer or per step, padded and in training; and only under their switch."""
    counts = dict.fromkeys(OPERATORS, 0)

    def counted(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            counts[name] += 1
            return original(*args, **kwargs)

        return call

    for name in OPERATORS:
        module = attention if name == "conditional_attention" else adapters
        monkeypatch.setattr(module, name, counted(module, name))
    model = make_theirs("segmentation", implementation)
    for switch in SWITCHES:
        counts.update(dict.fromkeys(OPERATORS, 0))
        with cdetr_fast.patch_transformers(**only(switch)):
            forward(model, "segmentation").loss.backward()
        assert counts == {
            name: number if of == switch else 0 for name, (of, number) in OPERATORS.items()
        }


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traced_with_gradients_on():
    model, images = make_theirs("detection", "sdpa").eval(), padded_images()
    with cdetr_fast.patch_transformers():
        traced = torch.jit.trace(model, images, strict=False)
    got, expected = traced(*images)["logits"], model(*images).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


class ScalarReads(TorchDispatchMode):
    """Counts where the host waits for one number of a tensor."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "cdetr_fast"])
def test_no_host_synchronisation(implementation, monkeypatch):
    """As on a GPU, where nobody looks at a mask."""
    monkeypatch.setattr(attention, "is_unpadded", lambda mask: False)
    with cdetr_fast.patch_transformers(**only("attention_interface")):
        model = make_theirs("segmentation", implementation, auxiliary_loss=True)
    with ScalarReads() as theirs, contextlib.suppress(KeyError):
        forward(model, "segmentation").loss.backward()
    with cdetr_fast.patch_transformers(), ScalarReads() as ours:
        forward(model, "segmentation").loss.backward()
    # Older ones draw a number for each decoder layer, on the host, and read it.
    drawn = 0 if version.parse(transformers.__version__) >= version.parse("5.23") else 3
    assert ours.count == drawn
    assert theirs.count > 10 or implementation == "cdetr_fast"


def test_gradient_checkpointing_still_recomputes():
    model = make_theirs(implementation="eager", attention_dropout=0.3)
    calls = []
    norm = model.model.encoder.layers[0].self_attn_layer_norm
    norm.register_forward_hook(lambda *_: calls.append("norm"))

    def gradients(**kwargs):
        torch.manual_seed(0)
        model.zero_grad()
        forward(model).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with cdetr_fast.patch_transformers():
        expected = gradients()
        assert len(calls) == 1
        for reentrant in (False, True):
            calls.clear()
            arguments = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
            for got, value in zip(gradients(), expected, strict=True):
                torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-4)
            assert len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_overflow_clamp(dtype):
    largest = torch.finfo(dtype).max
    finite = torch.tensor([1.0, -largest / 2, largest / 2, -2.0], dtype=dtype)
    overflown = torch.tensor([1.0, -float("inf"), float("inf"), float("nan")], dtype=dtype)

    def theirs(x):
        if not torch.isfinite(x).all():
            limit = torch.finfo(x.dtype).max - 1000
            x = torch.clamp(x, min=-limit, max=limit)
        return x

    for values in (finite, overflown):
        x, y = values.clone().requires_grad_(), values.clone().requires_grad_()
        expected, got = theirs(x), adapters._without_overflow(y)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        weights = torch.arange(1, 5, dtype=dtype)
        expected.backward(weights)
        got.backward(weights)
        torch.testing.assert_close(y.grad, x.grad, rtol=0, atol=0)


class Wrapped(nn.Module):
    """A layer with something attached."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias, self.in_channels = (
            base.weight,
            base.bias,
            getattr(base, "in_channels", None),
        )

    def forward(self, x):
        return self.base(x).abs()


@pytest.mark.parametrize(
    "name",
    [
        "mask_head.conv1.conv",
        "mask_head.fpn_stages.1.refine.conv",
        "conditional_detr.model.encoder.layers.0.self_attn.q_proj",
        "conditional_detr.model.decoder.layers.1.encoder_attn.k_pos_proj",
    ],
)
def test_attachments_take_effect(name):
    model = make_theirs("segmentation", "sdpa")
    parent, _, child = name.rpartition(".")
    parent = model.get_submodule(parent)
    plain = predict(model)
    setattr(parent, child, Wrapped(getattr(parent, child)))
    expected = predict(model)
    changes = [
        (leaves(expected)[name] - value).abs().max() for name, value in leaves(plain).items()
    ]
    assert max(changes) > 1e-3
    with cdetr_fast.patch_transformers():
        assert_same_outputs(predict(model), expected)


def test_half_precision_is_no_worse():
    """Under autocast and as a bf16 model, against double precision."""
    model = make_theirs(implementation="sdpa", auxiliary_loss=True).eval()
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = exact(*padded_images(torch.float64))

    def errors(model, dtype, autocast):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(*padded_images(dtype))
        return {
            name: (output[name].double() - exact[name]).abs().mean()
            for name in ("logits", "pred_boxes")
        }

    for half, dtype, autocast in (
        (model, torch.float32, True),
        (copy.deepcopy(model).bfloat16(), torch.bfloat16, False),
    ):
        theirs = errors(half, dtype, autocast)
        with cdetr_fast.patch_transformers():
            ours = errors(half, dtype, autocast)
        for name, error in theirs.items():
            assert ours[name] <= 2 * error + 1e-4, name


class Scenes(torch.utils.data.Dataset):
    """Padded images and labels, as Trainer takes them."""

    def __init__(self):
        self.pixel_values, self.pixel_mask = padded_images()
        self.labels = random_labels((2, 1))

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return self.pixel_values[index], self.pixel_mask[index], self.labels[index]


def collate(samples):
    pixel_values, pixel_mask, labels = zip(*samples, strict=True)
    images = {"pixel_values": torch.stack(pixel_values), "pixel_mask": torch.stack(pixel_mask)}
    return images | {"labels": list(labels)}


def train(model, folder):
    """Two steps of Trainer; the losses, and the model as its folder loads.

    With SGD: Adam divides a small gradient by its own size, which makes rounding as large as a
    step.
    """
    settings = transformers.TrainingArguments(
        str(folder), max_steps=2, logging_steps=1, save_steps=2, report_to="none", use_cpu=True,
        per_device_train_batch_size=2, remove_unused_columns=False, seed=0,
        learning_rate=0.01, optim="sgd",
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=Scenes(), data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, type(model).from_pretrained(folder / "checkpoint-2")


def test_trainer_and_pipeline(tmp_path, photo):
    model = make_theirs(implementation="sdpa", auxiliary_loss=True)
    expected, trained = train(copy.deepcopy(model), tmp_path / "plain")
    processor = transformers.ConditionalDetrImageProcessor(size={"height": 96, "width": 128})

    def detect():
        pipeline = transformers.pipeline(
            "object-detection", model=trained.eval(), image_processor=processor, device="cpu"
        )
        return pipeline(photo, threshold=0.0)

    found = detect()
    with cdetr_fast.patch_transformers():
        losses, patched = train(model, tmp_path / "patched")
        again = detect()
    assert losses == pytest.approx(expected, rel=1e-4)
    assert_same_outputs(predict(patched), predict(trained))
    assert len(found) > 10
    assert [x["score"] for x in again] == pytest.approx([x["score"] for x in found], abs=1e-4)
    assert again[0]["label"] == found[0]["label"]
    assert again[0]["box"] == pytest.approx(found[0]["box"], abs=1)  # whole pixels, cut off
