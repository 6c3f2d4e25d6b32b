"""The model on a CUDA device: the numbers of the CPU, and how often the host waits for it."""

import pytest
import torch
from support.oracle import make_ours, padded_images, random_labels, randomise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def ieee_products():
    """fp32 products without TF32, which convolutions have by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("ieee_products")
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_outputs_and_gradients_equal_those_of_the_cpu(task):
    model = make_ours(task, "paper", auxiliary_loss=True)
    randomise(model)
    pixel_values, pixel_mask = padded_images()
    labels = random_labels(masks=task == "segmentation")
    expected = model(pixel_values, pixel_mask, labels=labels)
    expected.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.cuda()
    got = model(pixel_values.cuda(), pixel_mask.cuda(), labels=labels)
    got.loss.backward()
    torch.testing.assert_close(got.logits.cpu(), expected.logits, rtol=0, atol=1e-3)
    torch.testing.assert_close(got.pred_boxes.cpu(), expected.pred_boxes, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.loss.cpu(), expected.loss, rtol=1e-3, atol=0)
    largest = max(gradient.norm() for gradient in gradients.values())
    for name, parameter in model.named_parameters():
        if name in gradients:
            error = (parameter.grad.cpu() - gradients[name]).norm()
            assert error <= 1e-2 * gradients[name].norm() + 1e-4 * largest, name


def test_a_forward_pass_does_not_wait_for_the_device():
    model = make_ours("segmentation", "paper").eval().cuda()
    pixel_values, pixel_mask = (x.cuda() for x in padded_images())
    with torch.no_grad():
        model(pixel_values, pixel_mask)  # libraries initialise themselves in the first call
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(pixel_values, pixel_mask)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_forward_pass_can_be_captured():
    model = make_ours("detection", "paper").eval().cuda()
    pixel_values, pixel_mask = (x.cuda() for x in padded_images())
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                expected = model(pixel_values, pixel_mask).logits
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(pixel_values, pixel_mask).logits
        captured.zero_()
        graph.replay()
    torch.testing.assert_close(captured, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains_and_keeps_boxes_in_single_precision(dtype):
    model = make_ours("detection", "paper", auxiliary_loss=True).cuda()
    pixel_values, pixel_mask = (x.cuda() for x in padded_images())
    with torch.autocast("cuda", dtype):
        outputs = model(pixel_values, pixel_mask, labels=random_labels())
    assert outputs.pred_boxes.dtype == torch.float32
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
