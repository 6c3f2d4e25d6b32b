"""Where transformers departs from the paper's authors in the numbers that a model computes.

Weights that were trained with a departure are only right with `compat="transformers"`.
"""

import functools
import re

import torch

from cdetr_fast.common.validation import refuse
from cdetr_fast.config.backbone import BackboneConfig


def departure_of(
    auxiliary_loss: bool, architectures: list[str] | None, backbone: BackboneConfig
) -> str | None:
    """Return how transformers departs from the authors for these fields, or None."""
    if auxiliary_loss:
        return "with auxiliary_loss=True the decoder feeds the layer-normed state to the next layer"
    if "ConditionalDetrForSegmentation" in (architectures or ()):
        return "a segmentation model predicts boxes without reference points"
    # freeze_batch_norm_2d freezes through timm, which keeps activations and epsilon
    is_timm = backbone.model_type == "timm_backbone" and backbone.backbone is not None
    if is_timm and not backbone.freeze_batch_norm_2d and _changed_by_freezing(backbone.backbone):
        return f"{backbone.backbone!r} loses its activations (or epsilon) with the batch norms"
    return None


@functools.cache
def _changed_by_freezing(backbone: str) -> bool:
    """Return whether batch norms of this timm model have an activation or another epsilon."""
    if re.fullmatch(r"resnet(18|34|50|101|152)(\..*)?", backbone):  # known: no need to build them
        return False
    import timm  # 1 s to import, and only some backbones need it
    from timm.layers.norm_act import BatchNormAct2d

    if not timm.is_model(backbone):
        refuse("backbone_config.backbone", "the name of a timm model", backbone)
    with torch.device("meta"):
        model = timm.create_model(backbone, features_only=True)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    return any(
        norm.eps != 1e-5
        or (isinstance(norm, BatchNormAct2d) and not isinstance(norm.act, torch.nn.Identity))
        for norm in norms
    )
