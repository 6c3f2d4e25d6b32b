"""The build for the Hugging Face Hub: loaded by `kernels`, put into transformers by `kernelize`."""

import ast
import base64
import functools
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from support.kernels import DEVICE, assert_accurate, in_this_process, needs_kernels
from torch import nn

from cdetr_kernels import evidence, registry
from cdetr_kernels.testing.case import registered
from hub.build import _relocated, build

# Where it is not installed, the folder kernels/ of the checkout goes by its name.
kernels = pytest.importorskip("kernels")
if not hasattr(kernels, "get_local_kernel") and os.environ.get("CI") != "true":
    pytest.skip("needs the package `kernels`", allow_module_level=True)

from support.oracle import leaves, make_theirs, padded_images, random_labels  # noqa: E402
from transformers.models.conditional_detr import modeling_conditional_detr as modeling  # noqa: E402

# Before 0.14 the name was not read from the metadata.
NAMED = {}
if "package_name" in inspect.signature(kernels.get_local_kernel).parameters:
    NAMED = {"package_name": "cdetr_kernels"}
LAYERS = (
    "ConditionalDetrSelfAttention",
    "ConditionalDetrDecoderSelfAttention",
    "ConditionalDetrDecoderCrossAttention",
    "ConditionalDetrSinePositionEmbedding",
)
CASES = registered()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="module")
def variant(folder):
    return folder / "build" / "torch-universal"


@pytest.fixture(scope="module")
def hub(folder):
    return kernels.get_local_kernel(folder, **NAMED)


@pytest.fixture
def kernelized(folder):
    """Return a function that puts the layers into a model, as the card says."""
    (code,) = re.findall(
        r"```python\n(import kernels\n.*?)```", (folder / "README.md").read_text(), re.S
    )
    if NAMED:
        code = code.replace("layer_name=", 'package_name="cdetr_kernels", layer_name=')

    def kernelize(model, mode="INFERENCE"):
        on_the_cpu = code.replace('"cuda"', '"cpu"').replace("Mode.INFERENCE", f"Mode.{mode}")
        exec(on_the_cpu, {"folder": folder, "model": model})
        return model

    yield kernelize
    for name in LAYERS:
        for attribute in ("kernel_layer_name", "kernel_condition"):
            if attribute in vars(getattr(modeling, name)):
                delattr(getattr(modeling, name), attribute)


@pytest.fixture
def calls(hub, monkeypatch):
    """Return the list of the operators that layers call."""
    found = []
    for name in ("conditional_attention", "sine_position_2d"):
        operator = getattr(hub, name)

        def counted(*args, name=name, operator=operator, **kwargs):
            found.append(name)
            return operator(*args, **kwargs)

        monkeypatch.setattr(hub.layers, name, counted)
    return found


def module(hub, name):
    """Import a module of the hub's copy of the package."""
    package, _, _ = hub.conditional_attention.__module__.partition(".ops.")
    return importlib.import_module(f"{package}.{name}")


def case_of(registered, name, device="cpu"):
    """Return a kind of call of an operator, small."""
    make, sizes = registered[name]
    return make(sizes.dtypes[0], device, **sizes.small)


def test_all_operators_and_layers_are_there(hub, variant):
    assert set(hub.__all__) == {*registry.NAMES, "qualify", "layers"}
    assert all(callable(getattr(hub, name)) for name in registry.NAMES)
    assert set(hub.layers.__all__) == set(LAYERS)
    assert kernels.get_local_kernel(variant.parent.parent, **NAMED).layers is hub.layers


@in_this_process
@pytest.mark.parametrize("name", CASES)
def test_operators_are_those_of_the_package(hub, name):
    case = case_of(CASES, name)
    copied = case_of(module(hub, "testing.case").registered(), name)
    assert module(hub, "registry").operator(case.op) is not registry.operator(case.op)
    expected = case.torchs()(**case.inputs)
    for backend in ("torch", "auto"):
        got = copied.function(backend)(**copied.inputs)
        for x, y in zip(leaves([got]).values(), leaves([expected]).values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("name", CASES)
def test_kernels(hub, variant, name):
    case = case_of(module(hub, "testing.case").registered(), name, DEVICE)
    if "triton" in case.backends():
        assert_accurate(case, "triton")
        namespace = json.loads((variant / "metadata.json").read_text())["id"]
        found = dir(getattr(torch.ops, namespace))
        assert any(case.op in x for x in found), found


@needs_kernels
def test_kernels_qualify(hub, variant, tmp_path, monkeypatch):
    """The child processes find the copy, not the package that is installed."""
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path))
    report = hub.qualify(DEVICE, "residual_layer_norm")
    assert report.record.findings
    assert not report.rejected, report.rejected
    (file,) = (tmp_path / "records").glob("*.json")
    sources = json.loads(file.read_text())["key"]["sources"]
    assert str(variant) == module(hub, "qualification.children")._LIBRARIES
    assert sources == module(hub, "evidence").sources_hash() != evidence.sources_hash()


def test_metadata(variant):
    metadata = json.loads((variant / "metadata.json").read_text())
    assert metadata["name"].replace("-", "_") == "cdetr_kernels"
    assert metadata["id"].isidentifier()
    files = {x.relative_to(variant).as_posix() for x in variant.rglob("*.py")}
    assert set(metadata["digest"]["files"]) == files
    for name, digest in metadata["digest"]["files"].items():
        found = hashlib.sha256((variant / name).read_bytes()).digest()
        assert digest == base64.b64encode(found).decode(), name


def test_imports_are_relative_or_of_torch(variant):
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in variant.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {x.name.partition(".")[0] for x in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.partition(".")[0] in allowed, path


def test_two_builds_are_the_same_and_none_is_overwritten(folder, variant, tmp_path):
    again = build(tmp_path / "again") / "build" / "torch-universal"
    assert (again / "metadata.json").read_bytes() == (variant / "metadata.json").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty: name a new folder"):
        build(folder)


def test_an_import_that_cannot_be_relative_is_refused():
    with pytest.raises(ValueError, match=r"a/b\.py:2: write `from cdetr_kernels"):
        _relocated("import os\nimport cdetr_kernels.ops\n", Path("a/b.py"), "_x")


def predict(model, masked=True, **kwargs):
    pixel_values, pixel_mask = padded_images()
    with torch.no_grad():
        return model.eval()(pixel_values, pixel_mask if masked else None, **kwargs)


def assert_same(got, expected):
    got, expected = leaves(got), leaves(expected)
    assert list(got) == list(expected)
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=0, atol=1e-4, msg=lambda m, n=name: n + m)


@in_this_process
@pytest.mark.parametrize("masked", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_transformers_model(kernelized, calls, task, masked):
    model = make_theirs(task, "sdpa")
    expected = predict(model, masked)
    assert_same(predict(kernelized(model), masked), expected)
    # Two layers of the encoder, and two attentions in each of the three of the decoder.
    assert calls.count("conditional_attention") == 2 + 3 * 2
    assert calls.count("sine_position_2d") == 1


@in_this_process
def test_eager_attention_with_a_mask_and_maps_are_left_to_transformers(kernelized, calls):
    model = make_theirs("detection", "eager")
    expected = predict(model), predict(model, output_attentions=True)
    kernelized(model)
    assert_same(predict(model), expected[0])
    # Its masks are numbers, which are added to the scores; the decoder's queries have none.
    assert calls.count("conditional_attention") == 3
    assert_same(predict(model, output_attentions=True), expected[1])
    assert calls.count("conditional_attention") == 3


@in_this_process
def test_a_mask_that_differs_between_queries_is_left_to_transformers(kernelized, calls):
    model = make_theirs("detection", "sdpa").eval()
    states, mask = torch.randn(2, 6, 64), torch.rand(2, 1, 6, 6) > 0.5
    mask[..., 0] = True
    layer = model.model.encoder.layers[0].self_attn
    expected = layer(states, mask)[0]
    kernelized(model)
    torch.testing.assert_close(layer(states, mask)[0], expected)
    assert calls == []
    mask[:] = mask[:, :, :1].clone()
    expected = type(layer).forward(layer, states, mask)[0]
    torch.testing.assert_close(layer(states, mask)[0], expected)
    assert calls == ["conditional_attention"]


@in_this_process
def test_training(kernelized, calls):
    """In double precision, where a gradient that is zero in theory cannot hide a wrong one."""
    model = make_theirs("detection", "sdpa", attention_dropout=0.0).double()
    pixel_values, pixel_mask = padded_images(torch.float64)
    labels = [{k: v.double() if k == "boxes" else v for k, v in x.items()} for x in random_labels()]

    def gradients():
        model.zero_grad()
        model(pixel_values, pixel_mask, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    kernelized(model.train(), "TRAINING")
    got = gradients()
    assert calls
    total = sum(x.norm() ** 2 for x in expected.values()).sqrt()
    assert list(got) == list(expected)
    for name, x in expected.items():
        assert (got[name] - x).norm() <= 1e-4 * (x.norm() + 1e-4 * total), name


@in_this_process
def test_layers_compile_to_one_graph(kernelized, calls):
    model = make_theirs("detection", "sdpa").eval()
    kernelized(model, "INFERENCE | kernels.Mode.TORCH_COMPILE")
    layer = model.model.decoder.layers[0]
    queries, memory = torch.randn(2, 20, 64), torch.randn(2, 12, 64)
    for call in (
        functools.partial(model.model.encoder.layers[0].self_attn, memory),
        functools.partial(layer.self_attn, queries, queries),
        functools.partial(layer.encoder_attn, queries, memory, queries, memory, queries),
    ):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled()[0], call()[0])


def test_no_other_class_of_the_model_can_take_a_kernel():
    """transformers' registry names no layer of this model, so users name them as above."""
    named = [
        x for x in vars(modeling).values()
        if isinstance(x, type) and issubclass(x, nn.Module) and hasattr(x, "kernel_layer_name")
    ]  # fmt: skip
    assert named == []
