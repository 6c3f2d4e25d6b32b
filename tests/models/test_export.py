"""`torch.export`, ONNX and `torch.compile` take the whole model as one graph."""

import pytest
import torch
from support.oracle import SMALL_MODEL, random_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export

from cdetr_fast.inference.export import module_of

DYNAMIC = {
    "pixel_values": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC},
    "pixel_mask": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC},
}
OTHER_SIZES = [(1, 70, 130), (3, 101, 64)]


@pytest.fixture(scope="module", params=["detection", "segmentation"])
def model(request):
    return random_model(request.param, **SMALL_MODEL)


@pytest.fixture(scope="module")
def detector():
    return random_model(**SMALL_MODEL)


@pytest.fixture(autouse=True)
def without_traces_of_other_tests():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def inputs(batch=2, height=64, width=96, seed=0):
    """Images and a mask; all but the first image are padded."""
    generator = torch.Generator().manual_seed(seed)
    pixel_mask = torch.ones(batch, height, width, dtype=torch.int64)
    pixel_mask[1:, height // 2 :] = 0
    pixel_mask[1:, :, width - 20 :] = 0
    return torch.randn(batch, 3, height, width, generator=generator), pixel_mask


def assert_same(got, expected, tolerance=1e-5):
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    torch.testing.assert_close(got.to_tuple(), expected.to_tuple(), rtol=0, atol=tolerance)


@torch.no_grad()
def test_static_export(model):
    exported = export(model, inputs()).module()
    other = inputs(seed=1)
    assert_same(exported(*other), model(*other))


@torch.no_grad()
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no-mask"])
def test_dynamic_export(model, masked):
    pixel_values, pixel_mask = inputs()
    arguments = {"pixel_mask": pixel_mask} if masked else {}
    shapes = {name: DYNAMIC[name] for name in ("pixel_values", *arguments)}
    program = export(model, (pixel_values,), arguments, dynamic_shapes=shapes)
    exported = module_of(program)
    for size in OTHER_SIZES:
        pixel_values, pixel_mask = inputs(*size)
        arguments = {"pixel_mask": pixel_mask} if masked else {}
        assert_same(exported(pixel_values, **arguments), model(pixel_values, **arguments))


@torch.no_grad()
@pytest.mark.slow
def test_onnx(detector, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pixel_values, pixel_mask = inputs()
    program = torch.onnx.export(
        detector,
        (pixel_values,),
        kwargs={"pixel_mask": pixel_mask},
        dynamo=True,
        dynamic_shapes=DYNAMIC,
        output_names=["logits", "pred_boxes"],
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    assert [i.name for i in session.get_inputs()] == ["pixel_values", "pixel_mask"]
    for size in OTHER_SIZES:
        pixel_values, pixel_mask = inputs(*size)
        logits, boxes_cxcywh = session.run(
            ["logits", "pred_boxes"],
            {"pixel_values": pixel_values.numpy(), "pixel_mask": pixel_mask.numpy()},
        )
        expected = detector(pixel_values, pixel_mask)
        torch.testing.assert_close(torch.tensor(logits), expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            torch.tensor(boxes_cxcywh), expected.pred_boxes, rtol=0, atol=1e-5
        )


@torch.no_grad()
def test_compile_makes_one_graph(model):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    assert_same(compiled(*inputs()), model(*inputs()))
    other = inputs(seed=1)
    assert_same(compiled(*other), model(*other))
    assert counter.frame_count == 1  # neither a break nor a second compilation


def test_compile_for_training():
    """One graph, and the gradients of eager mode, dropout included."""
    counter = CompileCounterWithBackend("aot_eager")
    model = random_model(**SMALL_MODEL, dropout=0.1, attention_dropout=0.1).train()
    gradients = []
    for forward in (model, torch.compile(model, fullgraph=True, backend=counter)):
        model.zero_grad()
        for seed in (0, 1):
            torch.manual_seed(seed)
            output = forward(*inputs(seed=seed))
            (output.logits.square().sum() + output.pred_boxes.sum()).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        )
    assert counter.frame_count == 1
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)
