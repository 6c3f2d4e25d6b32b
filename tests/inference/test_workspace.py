"""Maps that are written to memory which is kept: the same numbers, and nobody else's."""

import copy
import pickle

import pytest
import torch
from support.oracle import random_model
from support.threads import in_threads
from torch import nn

from cdetr_fast import optimize
from cdetr_fast.inference import workspace
from cdetr_fast.inference.backbone import FusedBackbone
from cdetr_fast.inference.convolution import FusedConv2d, has_onednn
from cdetr_fast.inference.int8 import Int8Conv2d, int8_unsupported_reason, quantize
from cdetr_fast.inference.pooling import KeptMaxPool2d
from cdetr_fast.inference.workspace import Workspace

pytestmark = pytest.mark.skipif(not has_onednn(torch.float32), reason="no oneDNN convolutions")


@pytest.fixture(autouse=True)
def _for_small_maps(monkeypatch):
    monkeypatch.setattr(workspace, "_SMALLEST", 0)
    with torch.no_grad():
        yield


def without_slots(fast):
    for module in fast.modules():
        if isinstance(module, (FusedConv2d, Int8Conv2d, KeptMaxPool2d)):
            module.slot = None
    return fast


def convolutions(backbone):
    return [m for m in backbone.modules() if isinstance(m, FusedConv2d)]


@pytest.mark.parametrize("all_maps", [True, False])
@pytest.mark.parametrize(
    "backbone", ["resnet50", "test_resnet", "tf_mobilenetv3_small_075", "tf_efficientnet_lite0"]
)
def test_maps_are_bitwise_the_same(backbone, all_maps):
    model = random_model(backbone=backbone)
    timm_model = model.model.backbone.model
    fast = FusedBackbone(timm_model, all_maps)
    plain = without_slots(FusedBackbone(timm_model, all_maps))
    assert not fast.notes
    slots = {conv.slot for conv in convolutions(fast)} - {None}
    if "resnet" in backbone:
        assert slots
    kept = []
    for size in ((64, 96), (33, 47), (64, 96)):  # smaller ones use a part
        image = torch.randn(2, 3, *size)
        got, expected = fast(image), plain(image)
        kept.append((got, expected))
        assert len(got) == (len(timm_model.feature_info.channels()) if all_maps else 1)
    for got, expected in kept:  # later calls wrote over none of the earlier results
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.skipif(int8_unsupported_reason() is not None, reason="no int8")
def test_codes_are_bitwise_the_same():
    images = [torch.randn(1, 3, 64, 96)]
    model = random_model(backbone="resnet50").model.backbone.model
    fast, plain = FusedBackbone(model, False), without_slots(FusedBackbone(model, False))
    for backbone in (fast, plain):
        quantize(backbone, images)
    without_slots(plain)
    (space,) = {m.workspace for m in fast.modules() if isinstance(m, Int8Conv2d)} - {None}
    for image in (*images, torch.randn(2, 3, 33, 47)):
        for a, b in zip(fast(image), plain(image), strict=True):
            assert torch.equal(a, b)
    assert space.pieces


def test_memory_is_used_again(monkeypatch):
    fast = FusedBackbone(random_model(backbone="resnet50").model.backbone.model, False)
    (space,) = {conv.workspace for conv in convolutions(fast)} - {None}
    fast(torch.randn(1, 3, 96, 96))
    before = {slot: piece.data_ptr() for slot, piece in space.pieces.items()}
    assert len(before) == 3  # what a block reads, and what its first two convolutions write
    fast(torch.randn(1, 3, 64, 64))
    assert {slot: piece.data_ptr() for slot, piece in space.pieces.items()} == before
    fast(torch.randn(1, 3, 128, 128))
    sizes = {slot: piece.numel() for slot, piece in space.pieces.items()}
    monkeypatch.setattr(workspace, "_LARGEST", 1)
    fast(torch.randn(1, 3, 256, 256))
    assert {slot: piece.numel() for slot, piece in space.pieces.items()} == sizes


def test_a_map_that_is_read_later_keeps_its_memory():
    """Slots by the graph's order: the first map outlives three others."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))

        def forward(self, x):
            first = self.convs[0](x)
            y = first
            for conv in self.convs[1:5]:
                y = torch.relu(conv(y))
            return [self.convs[5](first), y + first.flip(3)]

    module = Late().eval()
    fast = FusedBackbone(module)
    assert not fast.notes
    first, *others = [conv.slot for conv in convolutions(fast)]
    assert first is None  # a flip need not copy
    assert len(set(others) - {None}) == 2
    image = torch.randn(2, 4, 16, 24)
    for got, expected in zip(fast(image), module(image), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_threads_have_memory_of_their_own():
    model = random_model(backbone="resnet50")
    fast = optimize(model)
    images = [torch.randn(1, 3, 64, 64) for _ in range(3)]
    expected = [fast(image).logits for image in images]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(8):
                if not torch.equal(fast(images[index]).logits, expected[index]):
                    wrong.append(index)

    in_threads(work, 3)
    assert not wrong


def test_copies_start_empty():
    space = Workspace()
    space.zeros(0, (1, 2, 3, 4), torch.float32)
    for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
        assert isinstance(other, Workspace)
        assert not other.pieces
    assert space.pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zeros(dtype):
    space = Workspace()
    space.zeros(1, (2, 3, 5, 7), dtype).fill_(1)
    again = space.zeros(1, (1, 6, 5, 7), dtype)
    assert again.dtype == dtype
    assert again.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(again, torch.zeros(1, 6, 5, 7, dtype=dtype))
