"""The drop-in on triton's kernels, in the interpreter: its own tests, and the numbers.

The tests run in a process of their own, as triton decides at import whether it interprets. Whole
`tests/models` under both backends, in more than an hour:

    TRITON_INTERPRET=1 CDETR_FAST_BACKEND=triton python -m pytest tests/models
"""

import copy
from unittest import mock

import pytest
import torch
from support.interpreter import run_in_the_interpreter
from support.kernels import in_this_process, interpreted_only
from support.oracle import TINY, leaves, make_ours, padded_images, random_labels, randomise

from cdetr_kernels import dispatch

pytest.importorskip("triton")

# Of the drop-in's tests those that take seconds there.
QUICK = (
    "test_own_encoder_outputs or test_without_a_mask"
    " or (test_outputs_and_losses and resnet18-aux-detection)"
    " or test_positions_that_the_training_example_reads"
    " or test_return_dict_of_the_configuration"
    " or test_onnx"
)


@in_this_process
def test_the_numbers_in_the_interpreter(root):
    run_in_the_interpreter(root, __file__)


@in_this_process
def test_the_drop_in_on_kernels(root):
    files = [f"tests/models/test_{name}.py" for name in ("parity", "outputs", "export")]
    run_in_the_interpreter(root, *files, "-k", QUICK, CDETR_FAST_BACKEND="triton")


SMALL = TINY | {
    "d_model": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 7,
}


def step(model, dtype, backend):
    """Outputs and gradients of a training step by name, in fp64."""
    pixel_values, pixel_mask = padded_images(dtype)
    labels = random_labels()
    for label in labels:
        label["boxes"] = label["boxes"].to(dtype)
    with mock.patch.object(dispatch, "PREFERRED", backend):
        outputs = model(pixel_values, pixel_mask, labels=labels, output_hidden_states=True)
        outputs.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = {name: x.detach().double() for name, x in leaves(outputs).items()}
    return found, {name: x.double() for name, x in gradients.items()}


@interpreted_only
def test_outputs_and_gradients_against_double_precision():
    """At most twice the error of the references, plus some roundings."""
    model = make_ours("detection", "paper", **SMALL, auxiliary_loss=True)
    randomise(model)
    exact = step(copy.deepcopy(model).double(), torch.float64, "torch")
    references = step(copy.deepcopy(model), torch.float32, "torch")
    kernels = step(model, torch.float32, "triton")
    assert any(not torch.equal(kernels[1][name], x) for name, x in references[1].items())
    for got, torchs, expected in zip(kernels, references, exact, strict=True):
        assert got.keys() == torchs.keys() == expected.keys()
        largest = max(x.norm() for x in expected.values())
        for name, x in expected.items():
            floor = 1e-6 * x.norm() + 1e-7 * largest
            assert (got[name] - x).norm() <= 2 * (torchs[name] - x).norm() + floor, name
