"""`optimize()` on a GPU: CUDA graphs, fused convolutions, half precision."""

import pytest
import torch
from support.oracle import make_ours, padded_images, randomise
from support.threads import in_threads

from cdetr_fast import optimize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TASKS = ["base", "detection", "segmentation"]


@pytest.fixture(autouse=True)
def exact_fp32():
    """Convolutions in TF32 are off by more than the tolerance."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    with torch.no_grad():
        yield
    torch.backends.cudnn.allow_tf32 = before


def random_model(task="detection", seed=0, **config):
    model = make_ours(task, **config)
    randomise(model, seed)
    return model.cuda().eval()


def images(dtype=torch.float32):
    pixel_values, pixel_mask = padded_images(dtype)
    return pixel_values.cuda(), pixel_mask.cuda()


def error(got, expected):
    return max((got[k].float() - expected[k].float()).abs().max().item() for k in expected)


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_outputs_agree(task, cuda_graphs):
    model = random_model(task)
    fast = optimize(model, cuda_graphs=cuda_graphs)
    pixel_values, pixel_mask = images()
    for inputs in [(pixel_values, pixel_mask), (pixel_values[:1], None)] * 3:
        assert error(fast(*inputs), model(*inputs)) <= 1e-4
        pixel_values.mul_(0.9)
    assert "no graph" not in fast.explain()
    assert ("graph            2 x 97 x 131" in fast.explain()) == cuda_graphs


@pytest.mark.parametrize("backbone", ["resnet50", "tf_mobilenetv3_small_075"])
def test_backbones_are_fused(backbone):
    model = random_model(backbone=backbone)
    fast = optimize(model)
    assert error(fast(*images()), model(*images())) <= 1e-4
    assert "off by" not in fast.explain()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model = random_model()
    expected = model(*images())
    plain = random_model().to(dtype)(*images(dtype))
    got = optimize(model, dtype=dtype)(*images(dtype))
    assert got.pred_boxes.dtype == torch.float32
    for name in ("logits", "pred_boxes"):
        own = (plain[name].float() - expected[name]).abs().mean()
        assert (got[name].float() - expected[name]).abs().mean() <= 2 * own + 1e-2


def test_graphs_run_without_synchronising():
    fast = optimize(random_model())
    inputs = images()
    fast(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_streams_and_threads(cuda_graphs):
    """Each thread has a stream of its own, and the constants of a map size are made in one."""
    model = random_model()
    fast = optimize(model, cuda_graphs=cuda_graphs, max_graphs=2)
    inputs = [torch.randn(1, 3, size, 96, device="cuda") for size in (64, 96, 128)]
    expected = [model(x) for x in inputs]
    torch.cuda.synchronize()
    wrong = []

    def work(start):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            for i in range(20):
                index = (start + i) % 3
                if error(fast(inputs[index]), expected[index]) > 1e-4:
                    wrong.append(index)

    in_threads(work, 4)
    assert not wrong


def test_results_last_unless_asked():
    model = random_model()
    fast = optimize(model)
    first, copy = fast(*images()), fast(*images())
    fast(images()[0] * 2, images()[1])
    assert error(first, copy) == 0
    static = optimize(model, static_outputs=True)
    assert static(*images()).logits.data_ptr() == static(*images()).logits.data_ptr()


def test_follows_weights():
    model, other = random_model(), random_model(seed=5)
    fast = optimize(model)
    fast(*images())
    model.model.backbone.model.layer1[0].bn1.weight.mul_(2)
    assert error(fast(*images()), model(*images())) <= 1e-4
    fast.load_state_dict(other.state_dict())
    assert error(fast(*images()), other(*images())) <= 1e-4


def test_a_call_that_cannot_be_captured_runs_without(monkeypatch):
    fast = optimize(random_model())
    forward = fast.runner.prepared.forward

    def synchronising(pixel_values, pixel_mask):
        pixel_values.sum().item()
        return forward(pixel_values, pixel_mask)

    expected = fast.runner.prepared(*images())
    monkeypatch.setattr(fast.runner.prepared, "forward", synchronising)
    for _ in range(2):
        assert error(fast(*images()), expected) <= 1e-5
    assert "no graph         2 x 97 x 131" in fast.explain()


def test_moves_between_devices():
    model = make_ours()
    randomise(model)
    model.eval()
    fast = optimize(model, device="cuda")
    assert next(model.parameters()).device.type == "cpu"
    expected = model(*padded_images())
    assert error({k: v.cpu() for k, v in fast(*images()).items()}, expected) <= 1e-4
    with pytest.raises(ValueError, match="pixel_values: expected cuda:0 as the model, got cpu"):
        fast(*padded_images())
    assert error(fast.cpu()(*padded_images()), expected) <= 1e-4
