"""Padding as timm's, whose size in an exported program stays short."""

import pytest
import torch
from timm.layers import Conv2dSame
from timm.layers import padding as theirs
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn

from cdetr_fast.inference.convolution import FusedConv2d
from cdetr_fast.inference.padding import SamePool2d, pad_same


@pytest.mark.parametrize("kernel", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("dilation", [1, 2])
def test_as_timm(kernel, stride, dilation):
    for height in range(1, 19):
        x = torch.rand(1, 2, height, 23 - height)
        windows = [kernel, kernel + 1], [stride, 1 + stride % 3], [dilation, dilation]
        assert torch.equal(pad_same(x, *windows), theirs.pad_same(x, *windows))
        ours, other = pad_same(x, *windows, value=7.0), theirs.pad_same(x, *windows, value=7.0)
        assert torch.equal(ours, other)


@pytest.mark.parametrize("kernel", [1, 2, 3, (3, 2)])
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 3)])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_pools_as_timm(kernel, stride, ceil_mode):
    pools = (
        AvgPool2dSame(kernel, stride, ceil_mode=ceil_mode),
        AvgPool2dSame(kernel, stride, ceil_mode=ceil_mode, count_include_pad=False),
        MaxPool2dSame(kernel, stride, ceil_mode=ceil_mode),
    )
    for height in range(3, 16):
        x = torch.rand(1, 2, height, 20 - height) - 0.5
        for pool in pools:
            assert torch.equal(SamePool2d(pool)(x), pool(x))


def test_dilated_pools_stay_timms():
    """Its versions pad them differently."""
    for dilation in (2, (1, 2)):
        assert not SamePool2d.replaces(MaxPool2dSame(3, 2, dilation=dilation))
        with pytest.raises(TypeError, match=r"pool: expected .* without dilation"):
            SamePool2d(MaxPool2dSame(3, 2, dilation=dilation))


def test_a_file_averages_with_its_padding():
    """ONNX Runtime up to 1.24 fuses both, and divided by the pixels that are not padding."""
    pool = SamePool2d(AvgPool2dSame(2, 1, ceil_mode=True, count_include_pad=False))
    program = torch.export.export(pool, (torch.rand(1, 2, 5, 7),))
    (node,) = (x for x in program.graph.nodes if "avg_pool2d" in str(x.target))
    assert list(node.args[3:]) == []  # torch's own: no padding, no ceil_mode, padding is counted


def test_sizes_of_an_exported_program_stay_short():
    """Each of five strides tripled timm's expression, which a backbone's users then simplify."""
    layers = [FusedConv2d(Conv2dSame(3, 3, 3 + 2 * (i % 2), 2), None) for i in range(5)]
    axes = {2: torch.export.Dim("height", min=33), 3: torch.export.Dim("width", min=33)}
    program = torch.export.export(
        nn.Sequential(*layers), (torch.rand(2, 3, 70, 90),), dynamic_shapes=(axes,)
    )
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    height, width = output.args[0][0].meta["val"].shape[2:]
    for size in (height, width):
        assert len(size.node.expr.free_symbols) == 1
        assert size.node.expr.count(*size.node.expr.free_symbols) == 1
        assert size.node.expr.count_ops() < 15
