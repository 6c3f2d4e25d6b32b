"""A backbone that was traced at one image size is right at every other."""

import pytest
import torch
from torch import fx, nn

import cdetr_fast
from cdetr_fast.inference.backbone import FusedBackbone
from cdetr_fast.models.backbone import ConditionalDetrConvEncoder

SHALLOW = {"depths": (1, 1, 1, 1)}
FAMILIES = {
    "convnext_atto": SHALLOW,
    "edgenext_xx_small": SHALLOW,
    "eva02_tiny_patch14_224": {"depth": 2},
    "hrnet_w18_small": {},
    "maxvit_rmlp_pico_rw_256": SHALLOW,
    "mobilevit_xxs": {},
    "mvitv2_tiny": {},
    "pvt_v2_b0": SHALLOW,
    "swin_tiny_patch4_window7_224": SHALLOW,
    "swinv2_tiny_window8_256": SHALLOW,
    "twins_svt_small": SHALLOW,
    "vit_small_patch14_dinov2": {"depth": 2},
    "vit_tiny_patch16_224": {"depth": 2},
}


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_timm(name):
    torch.manual_seed(0)
    fields = {"model_type": "timm_backbone", "backbone": name, "out_indices": [-1]}
    config = cdetr_fast.ConditionalDetrConfig(backbone_config=fields | FAMILIES[name])
    encoder = ConditionalDetrConvEncoder(config).eval()
    for parameter in encoder.parameters():
        parameter += 0.02 * torch.randn(parameter.shape)
    plain, fast = encoder.model, FusedBackbone(encoder.model)
    for size in ((97, 131), (64, 160), (224, 224)):
        images = torch.randn(1, 3, *size)
        expected = encoder(images, None).maps[-1]
        encoder.model = fast
        found = encoder(images, None).maps[-1]
        encoder.model = plain
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


class Constant(nn.Module):
    """Takes its width from somewhere that tracing does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        width = 3 if isinstance(x, fx.Proxy) else x.shape[-1] // 32  # 3 at the size of the trace
        return [nn.functional.adaptive_avg_pool2d(self.conv(x), (2, width))]


@torch.no_grad()
def test_a_size_that_tracing_made_a_number_is_noticed():
    module = Constant().eval()
    fast = FusedBackbone(module)
    assert fast.body is module
    assert any("backbone runs as it is" in note for note in fast.notes)
    images = torch.randn(1, 3, 64, 160)
    torch.testing.assert_close(fast(images)[0], module(images)[0])
