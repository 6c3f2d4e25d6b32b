"""A small random model that OpenVINO runs, its inputs, and a comparison."""

import importlib.util

import pytest
import torch

from cdetr_fast.inference import openvino
from support.oracle import SMALL_MODEL, make_ours, randomise

_INSTALLED = importlib.util.find_spec("openvino") is not None
needs_bf16 = pytest.mark.skipif(
    not (_INSTALLED and "BF16" in openvino._capabilities()),
    reason="this CPU has no bf16 instructions",
)


def random_model(task="detection"):
    model = make_ours(task, **SMALL_MODEL)
    randomise(model)
    return model.eval()


def images(batch=2, height=64, width=96, padded=True):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(batch, 3, height, width, generator=generator)
    mask = torch.ones(batch, height, width, dtype=torch.int64)
    if padded:
        mask[1:, height * 3 // 4 :] = 0
        mask[1:, :, width * 2 // 3 :] = 0
    return pixel_values, mask


def assert_same(got, expected, atol=1e-4):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=atol)
