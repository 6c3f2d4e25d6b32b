"""`FusedBackbone`: unfusable parts stay as they are."""

import pytest
import torch
from torch import nn

from cdetr_fast.inference.backbone import FusedBackbone
from cdetr_fast.models.backbone import freeze_batch_norm

pytestmark = pytest.mark.usefixtures("no_gradients")


def test_unusual_activations_and_dropped_paths_of_a_backbone():
    """Unfusable parts stay, and a map that is read twice is not overwritten."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(8)
            self.second = nn.Conv2d(8, 8, 1)
            self.third = nn.Conv2d(8, 8, 3, padding="same", groups=4)
            self.act = nn.ELU()

        def forward(self, x):
            y = self.act(self.norm(self.first(x)))
            z = self.second(y)
            w = torch.relu(self.third(z) + z)
            return [y * 2, torch.relu(z + w), w + y.mean((2, 3), keepdim=True)]

    backbone = Odd().eval()
    freeze_batch_norm(backbone)
    randomised = [backbone.norm.running_mean, backbone.norm.bias]
    for tensor in randomised:
        tensor.normal_()
    fast = FusedBackbone(backbone)
    assert not fast.notes
    image = torch.randn(2, 3, 16, 24)
    before = image.clone()
    for got, expected in zip(fast(image), backbone(image), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert torch.equal(image, before)


def test_a_backbone_that_cannot_be_traced_runs_as_it_is():
    class Branching(nn.Conv2d):
        pass

    class Data(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = Branching(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            return [y if y.sum() > 0 else -y]

    backbone = Data().eval()
    fast = FusedBackbone(backbone)
    assert "TraceError" in fast.notes[0]
    image = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(fast(image), backbone(image))
