"""Calls and comparisons of transformers' models, patched and not."""

import torch
import transformers
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

from cdetr_fast.integrations import patching
from support.oracle import leaves, padded_images, random_labels

SWITCHES = list(patching._TECHNIQUES)
"""Keywords of `patch_transformers`."""


def only(*names: str) -> dict[str, bool]:
    return {switch: switch in names for switch in SWITCHES}


def forward(model, task="detection", dtype=torch.float32, **kwargs):
    pixel_values, pixel_mask = padded_images(dtype)
    labels = random_labels(masks=task == "segmentation")
    for label in labels:
        label["boxes"] = label["boxes"].to(dtype)
    return model(pixel_values, pixel_mask, labels=labels, **kwargs)


def predict(model):
    model.eval()
    with torch.no_grad():
        return model(*padded_images())


def assert_same_outputs(got, expected):
    got, expected = leaves(got), leaves(expected)
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].shape == value.shape
        scale = max(1.0, value.abs().max().item() if "loss" in name else 1.0)
        torch.testing.assert_close(
            got[name], value, rtol=0, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


def snapshot() -> dict:
    """Every attribute that could have been replaced, by where it is."""
    found = {("modeling", name): value for name, value in vars(modeling).items()}
    for owner in vars(modeling).values():
        if isinstance(owner, type):
            found |= {(owner, name): value for name, value in vars(owner).items()}
    for registry in (
        LOSS_MAPPING,
        AttentionInterface._global_mapping,
        AttentionMaskInterface._global_mapping,
        transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS._local_mapping,
    ):
        found |= {(id(registry), name): value for name, value in registry.items()}
    return found


def differences(before: dict, after: dict) -> list:
    return [key for key in before.keys() | after.keys() if before.get(key) is not after.get(key)]
