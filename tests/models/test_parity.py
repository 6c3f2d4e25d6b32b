"""Same weights, same inputs: the numbers of transformers."""

import pytest
import torch
from support.oracle import leaves, make_pair, padded_images, random_labels

CASES = {
    "resnet18": {"backbone": "resnet18"},
    "resnet18-aux": {"backbone": "resnet18", "auxiliary_loss": True},
    "resnet18-learned-gelu": {
        "backbone": "resnet18",
        "position_embedding_type": "learned",
        "activation_function": "gelu",
        "auxiliary_loss": True,
    },
    "resnet50": {"backbone": "resnet50"},
    "resnet50-dc5": {"backbone": "resnet50", "dilation": True, "auxiliary_loss": True},
    "head-dim-4": {"d_model": 32, "encoder_attention_heads": 8, "decoder_attention_heads": 8},
    "head-dim-32": {"d_model": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "mobilenet": {"backbone": "tf_mobilenetv3_small_075"},
}
SEGMENTATION = ("resnet18-aux", "resnet50", "resnet18-learned-gelu")
BOTH = [(name, "detection") for name in CASES] + [(name, "segmentation") for name in SEGMENTATION]


def forward(model, task, dtype=torch.float32):
    pixel_values, pixel_mask = padded_images(dtype)
    labels = random_labels(masks=task == "segmentation")
    for label in labels:
        label["boxes"] = label["boxes"].to(dtype)
    return model(
        pixel_values,
        pixel_mask,
        labels=labels,
        output_attentions=True,
        output_hidden_states=True,
    )


@pytest.mark.parametrize(("case", "task"), BOTH)
def test_outputs_and_losses(case, task):
    theirs, ours = make_pair(task, **CASES[case])
    expected, got = forward(theirs, task), forward(ours, task)
    assert list(got) == list(expected)
    expected_leaves, got_leaves = leaves(expected), leaves(got)
    assert list(got_leaves) == list(expected_leaves)
    for name, value in expected_leaves.items():
        # Absolute on states and logits; losses of large value are compared relatively.
        tolerance = 1e-4 * max(1.0, value.abs().max().item() if "loss" in name else 1.0)
        torch.testing.assert_close(
            got_leaves[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize(("case", "task"), BOTH)
def test_gradients(case, task):
    """In double precision, where a gradient that is zero in theory cannot hide a wrong one."""
    theirs, ours = make_pair(task, **CASES[case])
    for model in (theirs.double(), ours.double()):
        forward(model, task, torch.float64).loss.backward()
    got = {name: p.grad for name, p in ours.named_parameters()}
    total = sum(p.grad.norm() ** 2 for p in theirs.parameters() if p.grad is not None).sqrt()
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is None:
            assert got[name] is None, name
            continue
        error = (got[name] - parameter.grad).norm()
        # Position codes have fp32 angles in transformers' double model: an error of 1e-7 of its
        # own.
        assert error <= 1e-4 * parameter.grad.norm() + 1e-8 * total, (name, error)
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_gradients_in_single_precision(task):
    theirs, ours = make_pair(task, auxiliary_loss=True)
    exact, _ = make_pair(task, auxiliary_loss=True)
    for model, dtype in (
        (theirs, torch.float32),
        (ours, torch.float32),
        (exact.double(), torch.float64),
    ):
        forward(model, task, dtype).loss.backward()
    our_gradients = {name: p.grad for name, p in ours.named_parameters()}
    their_gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in exact.named_parameters():
        if parameter.grad is None:
            continue
        our_error = (our_gradients[name] - parameter.grad).norm()
        their_error = (their_gradients[name] - parameter.grad).norm()
        assert our_error <= 2 * their_error + 1e-5 * parameter.grad.norm() + 1e-6, name


@pytest.mark.parametrize("case", ["resnet18", "resnet50", "resnet50-dc5", "resnet18-learned-gelu"])
def test_paper_mode_gives_the_same_predictions_without_auxiliary_loss(case):
    """Every checkpoint that was not trained with transformers' auxiliary loss is read the same."""
    theirs, ours = make_pair("detection", "paper", **(CASES[case] | {"auxiliary_loss": False}))
    pixel_values, pixel_mask = padded_images()
    with torch.no_grad():
        expected = theirs.eval()(pixel_values, pixel_mask)
        got = ours.eval()(pixel_values, pixel_mask)
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)


def test_without_a_mask():
    theirs, ours = make_pair("base")
    pixel_values, _ = padded_images()
    with torch.no_grad():
        expected, got = theirs.eval()(pixel_values), ours.eval()(pixel_values)
    assert list(got) == list(expected)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-4)


def test_own_encoder_outputs():
    theirs, ours = make_pair("detection")
    theirs, ours = theirs.eval(), ours.eval()
    pixel_values, pixel_mask = padded_images()
    memory = torch.randn(2, 4 * 5, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = theirs(pixel_values, pixel_mask, encoder_outputs=(memory,))
        got = ours(pixel_values, pixel_mask, encoder_outputs=(memory,))
    torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)


def test_gradient_of_a_trained_dropout_model_is_finite_and_random():
    _, ours = make_pair("detection", "paper", dropout=0.1, attention_dropout=0.1)
    first, second = forward(ours, "detection"), forward(ours, "detection")
    assert (first.logits - second.logits).abs().max() > 1e-3
    first.loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)
