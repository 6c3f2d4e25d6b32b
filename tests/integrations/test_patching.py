"""`patch_transformers()`: the numbers of transformers by our operators, and back again."""

import contextlib
import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from packaging import version
from support.oracle import leaves, make_theirs, padded_images, random_labels
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import cdetr_fast
from cdetr_fast.integrations import adapters, attention, patching, versions

transformers = pytest.importorskip("transformers")
from transformers.loss.loss_utils import LOSS_MAPPING  # noqa: E402
from transformers.masking_utils import AttentionMaskInterface  # noqa: E402
from transformers.modeling_utils import AttentionInterface  # noqa: E402
from transformers.models.conditional_detr import modeling_conditional_detr as modeling  # noqa: E402

SWITCHES = list(patching._TECHNIQUES)
CASES = [
    ("detection", "eager", {"auxiliary_loss": True}),
    ("detection", "sdpa", {}),
    ("detection", "sdpa", {"position_embedding_type": "learned", "auxiliary_loss": True}),
    ("segmentation", "eager", {}),
    ("segmentation", "sdpa", {"auxiliary_loss": True}),
]


@pytest.fixture(autouse=True)
def _unpatched():
    yield
    cdetr_fast.unpatch_transformers()


def only(*names: str) -> dict[str, bool]:
    return {switch: switch in names for switch in SWITCHES}


def forward(model, task="detection", dtype=torch.float32, **kwargs):
    pixel_values, pixel_mask = padded_images(dtype)
    labels = random_labels(masks=task == "segmentation")
    for label in labels:
        label["boxes"] = label["boxes"].to(dtype)
    return model(pixel_values, pixel_mask, labels=labels, **kwargs)


def predict(model):
    model.eval()
    with torch.no_grad():
        return model(*padded_images())


def assert_same_outputs(got, expected):
    got, expected = leaves(got), leaves(expected)
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        scale = max(1.0, value.abs().max().item() if "loss" in name else 1.0)
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def snapshot() -> dict:
    """Every attribute that could have been replaced, by where it is."""
    found = {("modeling", name): value for name, value in vars(modeling).items()}
    for owner in vars(modeling).values():
        if isinstance(owner, type):
            found |= {(owner, name): value for name, value in vars(owner).items()}
    for registry in (
        LOSS_MAPPING,
        AttentionInterface._global_mapping,
        AttentionMaskInterface._global_mapping,
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping,
    ):
        found |= {(id(registry), name): value for name, value in registry.items()}
    return found


def differences(before: dict, after: dict) -> list:
    return [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]


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


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_technique_alone(switch):
    model = make_theirs("segmentation", "sdpa", auxiliary_loss=True)
    expected = forward(model, "segmentation")
    before = snapshot()
    with cdetr_fast.patch_transformers(**only(switch)) as patch:
        assert patch.switches == only(switch)
        assert len(differences(before, snapshot())) == len(patching._TECHNIQUES[switch].replaced)
        assert_same_outputs(forward(model, "segmentation"), expected)


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


def test_undone_exactly():
    model = make_theirs(implementation="sdpa")
    before, expected = snapshot(), leaves(predict(model))
    bound = model.model.encoder.forward
    cdetr_fast.patch_transformers()
    changed = differences(before, snapshot())
    assert len(changed) == sum(len(t.replaced) for t in patching._TECHNIQUES.values())
    assert model.model.encoder.forward != bound
    predict(model)
    cdetr_fast.unpatch_transformers()
    assert differences(before, snapshot()) == []
    assert model.model.encoder.forward == bound
    for name, value in leaves(predict(model)).items():
        assert torch.equal(value, expected[name]), name
    cdetr_fast.unpatch_transformers()  # does nothing
    assert differences(before, snapshot()) == []


def test_switches_are_checked():
    with pytest.raises(TypeError, match="losses: expected True or False, got 'no'"):
        cdetr_fast.patch_transformers(losses="no")


def test_twice_is_once():
    clean = snapshot()
    cdetr_fast.patch_transformers()
    once = snapshot()
    with cdetr_fast.patch_transformers():
        assert differences(once, snapshot()) == []
    assert differences(once, snapshot()) == []  # the inner call had changed nothing
    with cdetr_fast.patch_transformers(losses=False, attention=False):
        changed = set(differences(clean, snapshot()))
        assert len(set(differences(clean, once)) - changed) == 6  # four of attention, two losses
    assert set(differences(clean, snapshot())) == set(differences(clean, once))
    cdetr_fast.unpatch_transformers()
    assert differences(clean, snapshot()) == []
    with pytest.raises(ZeroDivisionError), cdetr_fast.patch_transformers():
        1 / 0  # noqa: B018
    assert differences(clean, snapshot()) == []


def test_before_transformers_is_imported():
    script = (
        "import sys, cdetr_fast\n"
        "assert 'transformers' not in sys.modules\n"
        "cdetr_fast.patch_transformers\n"
        "assert 'transformers' not in sys.modules\n"
        "cdetr_fast.patch_transformers()\n"
        "from transformers.models.conditional_detr.modeling_conditional_detr import *\n"
        "print(ConditionalDetrModel.__init__.__module__)\n"
        "from transformers.models.conditional_detr import modeling_conditional_detr as m\n"
        "print(m.ConditionalDetrEncoder.forward.__code__.co_filename)\n"
    )
    run = [sys.executable, "-c", script]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert lines[-1].endswith("attention.py")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "cdetr-fast\[transformers\]"'):
        cdetr_fast.patch_transformers()


def test_pickles_and_files_hold_nothing_of_it(tmp_path):
    plain = make_theirs(implementation="sdpa")
    expected = predict(plain)
    plain.save_pretrained(tmp_path / "plain")
    with cdetr_fast.patch_transformers():
        patched = make_theirs(implementation="sdpa").eval()
        patched.load_state_dict(plain.state_dict())
        content = pickle.dumps(patched)
        patched.save_pretrained(tmp_path / "patched")
        buffer = io.BytesIO()
        torch.save(patched, buffer)
        assert_same_outputs(predict(copy.deepcopy(patched)), expected)
        loaded = type(patched).from_pretrained(tmp_path / "plain")
        assert_same_outputs(predict(loaded), expected)
    assert b"cdetr_fast" not in content
    assert b"cdetr_fast" not in buffer.getvalue()
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / file.name).read_bytes() == file.read_bytes(), file.name
    for name, value in leaves(predict(pickle.loads(content))).items():
        assert torch.equal(value, leaves(expected)[name]), name


@pytest.mark.parametrize("release", ["4.57.6", "5.16.1", "5.25.0.dev0", "6.0.0", "main"])
def test_other_versions_are_refused(release, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", release)
    before = snapshot()
    with pytest.raises(RuntimeError, match=rf"expected 5\.17 to 5\.24, got {release}"):
        cdetr_fast.patch_transformers()
    assert differences(before, snapshot()) == []


def test_other_code_is_refused(monkeypatch, tmp_path):
    """Nothing is changed, also not what an earlier call had put in place."""
    source = tmp_path / "changed.py"
    source.write_text("def forward(self, x):\n    return x + self.bias\n")
    code = {}
    exec(compile(source.read_text(), source, "exec"), code)
    cdetr_fast.patch_transformers(**only("losses", "attention"))
    before = snapshot()
    norm = modeling.ConditionalDetrFrozenBatchNorm2d
    monkeypatch.setattr(norm, "forward", code["forward"])
    with pytest.raises(RuntimeError, match=r"ConditionalDetrFrozenBatchNorm2d.*batch_norm=False"):
        cdetr_fast.patch_transformers()
    assert differences(before, snapshot()) == [(norm, "forward")]
    cdetr_fast.patch_transformers(batch_norm=False)


def test_fingerprints_tell_code_from_comments(tmp_path):
    def define(text):
        path = tmp_path / f"f{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        scope = {}
        exec(compile(text, path, "exec"), scope)
        return scope["f"]

    first = define("def f(x, y=1):\n    return x * y\n")
    same = define('def f(x: int, y: int = 1) -> int:\n    """Multiply."""\n    return x * y  # !\n')
    other = define("def f(x, y=2):\n    return x * y\n")
    assert versions.fingerprint(first) == versions.fingerprint(same)
    assert versions.fingerprint(first) != versions.fingerprint(other)
    versions.check_signature("f", first, same)
    with pytest.raises(RuntimeError, match=r"expected f\(x\), got f\(x, y\)"):
        versions.check_signature("f", first, lambda x: x)


def test_what_others_replaced_since_is_left_alone(monkeypatch):
    cdetr_fast.patch_transformers()
    monkeypatch.setattr(modeling.ConditionalDetrConvEncoder, "forward", lambda self, *x: x)
    before = snapshot()
    with pytest.raises(RuntimeError, match=r"ConditionalDetrConvEncoder\.forward: expected what"):
        cdetr_fast.unpatch_transformers()
    assert differences(before, snapshot()) == []
    monkeypatch.undo()
    cdetr_fast.unpatch_transformers()


def test_threads():
    """A model may run while others patch: any mix of replacements gives its numbers."""
    model = make_theirs(implementation="eager")
    before, expected = snapshot(), leaves(predict(model))
    stop, errors = threading.Event(), []

    def patch_and_unpatch():
        while not stop.is_set():
            cdetr_fast.patch_transformers()
            cdetr_fast.patch_transformers(attention=False)
            cdetr_fast.unpatch_transformers()

    def run():
        try:
            for _ in range(5):
                for name, value in leaves(predict(model)).items():
                    torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    patchers = [threading.Thread(target=patch_and_unpatch) for _ in range(2)]
    runners = [threading.Thread(target=run) for _ in range(2)]
    for thread in (*patchers, *runners):
        thread.start()
    for thread in runners:
        thread.join()
    stop.set()
    for thread in patchers:
        thread.join()
    assert errors == []
    cdetr_fast.unpatch_transformers()
    assert differences(before, snapshot()) == []


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
