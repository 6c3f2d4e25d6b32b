"""Which models compute other numbers in transformers than the paper's authors have it.

Their weights, if trained there, are only right with `compat="transformers"`.
"""

import functools
import re
from typing import TYPE_CHECKING

import torch

from cdetr_fast.common import validation as check

if TYPE_CHECKING:
    from cdetr_fast.config.model import ConditionalDetrConfig


def departure_of(config: "ConditionalDetrConfig") -> str | None:
    """Says what transformers does otherwise with a model of this configuration, or returns None."""
    if config.auxiliary_loss:
        return "with auxiliary_loss=True the decoder feeds the layer-normed state to the next layer"
    if "ConditionalDetrForSegmentation" in (config.architectures or ()):
        return "a segmentation model predicts boxes without reference points"
    backbone = config.backbone_config
    # freeze_batch_norm_2d freezes through timm, which keeps activations and epsilon
    timm_freezes = backbone.model_type != "timm_backbone" or backbone.freeze_batch_norm_2d
    if not timm_freezes and _changed_by_freezing(backbone.backbone):
        return f"{backbone.backbone!r} loses its activations (or epsilon) with the batch norms"
    return None


@functools.cache
def _changed_by_freezing(backbone: str) -> bool:
    """Whether batch norms of this timm model have an activation inside, or another epsilon."""
    if re.fullmatch(r"resnet(18|34|50|101|152)(\..*)?", backbone):  # known: no need to build them
        return False
    import timm  # 1 s to import, and only some backbones need it
    from timm.layers import BatchNormAct2d

    if not timm.is_model(backbone):
        check.refuse("backbone_config.backbone", "the name of a timm model", backbone)
    with torch.device("meta"):
        model = timm.create_model(backbone, features_only=True)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return any(
        norm.eps != 1e-5
        or (isinstance(norm, BatchNormAct2d) and not isinstance(norm.act, torch.nn.Identity))
        for norm in norms
    )
