"""Every backbone of transformers: its names, its numbers, what freezes, or why it is refused."""

import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

import cdetr_fast

SIZES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_queries": 5,
    "num_labels": 3,
    "backbone": None,
    "use_timm_backbone": False,
}
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "image_size": 64,
    "patch_size": 16,
    "out_features": ["stage2"],
}
STAGES = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "out_features": ["stage4"]}
WINDOWS = {
    "image_size": 64,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "out_features": ["stage4"],
}
RESNET = STAGES | {"embedding_size": 8, "layer_type": "basic"}
TEXT = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
}
LCNET = {
    "block_configs": [[[3, 8, 8, stride, stride == 1]] for stride in (1, 2, 2, 2, 2)],
    "stem_channels": 8,
    "out_features": ["stage5"],
}

# Fields of a small one, and the parts up to stride 4, which do not train. ViTs have none.
RUN = {
    "beit": (VIT | {"use_relative_position_bias": True}, ""),
    "bit": (
        RESNET | {"layer_type": "bottleneck", "num_groups": 4},
        "bit.embedder bit.encoder.stages.0",
    ),
    "convnext": (STAGES, "embeddings encoder.stages.0"),
    "convnextv2": (STAGES, "embeddings encoder.stages.0"),
    "dinov2": (VIT, ""),
    "dinov2_with_registers": (VIT, ""),
    "dinov3_convnext": (STAGES, "model.stages.0"),
    "dinov3_vit": (VIT, ""),
    "focalnet": (  # its first stage ends at stride 8
        STAGES | {"embed_dim": 8, "hidden_sizes": [8, 16, 32, 64], "image_size": 64},
        "focalnet.embeddings",
    ),
    "hgnet_v2": (
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16, 16, 16],
            "depths": [1, 1, 1, 1],
            "stem_channels": [3, 8, 8],
            "stage_in_channels": [8, 8, 16, 16],
            "stage_mid_channels": [8, 8, 8, 8],
            "stage_out_channels": [8, 16, 16, 16],
            "stage_num_blocks": [1, 1, 1, 1],
            "stage_numb_of_layers": [1, 1, 1, 1],
            "out_features": ["stage4"],
        },
        "embedder encoder.stages.0",
    ),
    "hiera": (WINDOWS | {"image_size": [64, 64]}, "embeddings encoder.stages.0"),
    "lw_detr_vit": (VIT | {"num_windows": 4}, ""),
    "maskformer-swin": (WINDOWS, "model.embeddings model.encoder.layers.0.blocks"),
    "pixio": (VIT, ""),
    "pp_lcnet": (LCNET, "encoder.convolution encoder.blocks.0 encoder.blocks.1"),
    "pp_lcnet_v3": (LCNET, "encoder.convolution encoder.blocks.0 encoder.blocks.1"),
    "pp_lcnet_v4": (
        {"out_features": ["stage4"]},
        "encoder.convolution encoder.blocks.0 encoder.blocks.1",
    ),
    "pvt_v2": (
        STAGES | {"image_size": 64, "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2] * 4},
        "encoder.layers.0",
    ),
    "resnet": (RESNET, "embedder encoder.stages.0"),
    "rf_detr_dinov2": (VIT | {"num_windows": 2}, ""),
    "rt_detr_resnet": (RESNET, "embedder encoder.stages.0"),
    "sapiens2": (VIT | {"num_key_value_attention_heads": 2}, ""),
    "swin": (WINDOWS, "swin.embeddings swin.encoder.layers.0.blocks"),
    "swinv2": (WINDOWS, "embeddings encoder.layers.0.blocks"),
    "textnet": (
        {
            "hidden_sizes": [8, 8, 16, 16, 16],
            "stem_out_channels": 8,
            "conv_layer_kernel_sizes": [[[3, 3]]] * 4,
            "conv_layer_strides": [[2]] * 4,
            "out_features": ["stage4"],
        },
        "textnet.stem textnet.encoder.stages.0",
    ),
    "tipsv2": ({"vision_config": VIT, "text_config": TEXT}, ""),
    "tipsv2_vision_model": (VIT, ""),
    "vitdet": (VIT, ""),
}
# Those that transformers' own model fails with, and what is said when ours is built.
REFUSED = {
    "uvdoc_backbone": ({}, r"got UVDocBackbone, which returns \[\(1, 128, "),
    "vitpose_backbone": (
        VIT | {"image_size": [64, 48], "patch_size": [16, 16]},
        r"got VitPoseBackbone, which returns \[\(1, 12, 16\)\]",
    ),
}
WITH_LIBRARY = {"dinat"}  # natten, whose name is in transformers' error


def settings_of(name, fields):
    return SIZES | {"backbone_config": CONFIG_MAPPING[name](**fields)}


def test_every_backbone_is_here():
    every = {*RUN, *REFUSED, *WITH_LIBRARY, "timm_backbone"}
    assert set(MODEL_FOR_BACKBONE_MAPPING_NAMES) <= every


@pytest.mark.parametrize("name", RUN)
def test_a_backbone_of_transformers(name):
    fields, early = RUN[name]
    settings = settings_of(name, fields)
    theirs = transformers.ConditionalDetrModel(transformers.ConditionalDetrConfig(**settings))
    ours = cdetr_fast.ConditionalDetrModel(cdetr_fast.ConditionalDetrConfig(**settings))
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor += 0.1 * torch.randn(tensor.shape)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    named = {name: p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == named

    own_size = ours.backbone._image_size
    for height, width in ((64, 96), (64, 64)) if own_size is None else (own_size,):
        images = torch.randn(2, 3, height, width, dtype=torch.float64)
        mask = torch.ones(2, height, width)
        mask[1, :, width // 2 :] = 0
        with torch.no_grad():
            expected = theirs.double().eval()(images, mask).last_hidden_state
        got = ours.double().eval()(images, mask).last_hidden_state
        torch.testing.assert_close(got.detach(), expected, atol=1e-5, rtol=0)

    got.pow(2).sum().backward()
    backbone = ours.backbone.model
    trains = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert all(backbone.get_parameter(name).grad is not None for name in trains)
    frozen = {name for name, _ in backbone.named_parameters()} - trains
    parts = tuple(part + "." for part in early.split())
    expected = {name for name, _ in backbone.named_parameters() if name.startswith(parts)}
    assert frozen - ours.backbone._unread == expected - ours.backbone._unread
    assert expected <= frozen


@pytest.mark.parametrize("name", REFUSED)
def test_a_backbone_that_transformers_cannot_run(name):
    fields, message = REFUSED[name]
    settings = settings_of(name, fields)
    theirs = transformers.ConditionalDetrModel(transformers.ConditionalDetrConfig(**settings))
    with pytest.raises(RuntimeError):
        theirs(torch.zeros(1, 3, 64, 48))
    with pytest.raises(ValueError, match=message):
        cdetr_fast.ConditionalDetrModel(cdetr_fast.ConditionalDetrConfig(**settings))
