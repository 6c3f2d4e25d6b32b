"""Backbones: transformers' ResNet of any size, timm's with their arguments, what trains of them."""

import pytest
import timm
import torch
import transformers
from support import oracle
from torch import nn

import cdetr_fast
from cdetr_fast.config.backbone import BackboneConfig
from cdetr_fast.models.backbone import ConditionalDetrConvEncoder

SIZES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
    "num_labels": 3,
}
RESNETS = {
    "basic": {"layer_type": "basic"},
    "bottleneck": {"layer_type": "bottleneck", "hidden_sizes": [16, 32, 48, 64]},
    "strides": {
        "layer_type": "bottleneck",
        "hidden_sizes": [16, 32],
        "depths": [2, 1],
        "downsample_in_first_stage": True,
        "downsample_in_bottleneck": True,
        "out_features": ["stage1", "stage2"],
    },
    "gelu": {"layer_type": "basic", "hidden_act": "gelu", "out_features": ["stem", "stage2"]},
}


def resnet(**changes) -> dict:
    fields = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 24, 32]}
    return fields | {"depths": [1, 1, 1, 1], "out_features": ["stage4"]} | changes


def encoder(compat: str = "paper", **backbone) -> ConditionalDetrConvEncoder:
    torch.manual_seed(0)
    config = cdetr_fast.ConditionalDetrConfig(compat=compat, **SIZES, **backbone)
    return ConditionalDetrConvEncoder(config).eval()


def of_timm(name: str, out_indices=(-1,), **arguments) -> ConditionalDetrConvEncoder:
    fields = {"model_type": "timm_backbone", "backbone": name, "out_indices": list(out_indices)}
    return encoder(backbone_config=fields | arguments)


def trained(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("case", RESNETS)
def test_resnet_is_that_of_transformers(case):
    config = transformers.ResNetConfig(
        **{k: v for k, v in resnet(**RESNETS[case]).items() if k != "model_type"}
    )
    settings = SIZES | {"backbone": None, "use_timm_backbone": False, "backbone_config": config}
    theirs = transformers.ConditionalDetrModel(transformers.ConditionalDetrConfig(**settings))
    oracle.randomise(theirs)
    ours = cdetr_fast.ConditionalDetrModel(cdetr_fast.ConditionalDetrConfig(**settings))
    ours.load_state_dict(theirs.state_dict())
    named = {name: p.shape for name, p in theirs.named_parameters()}
    assert {name: p.shape for name, p in ours.named_parameters()} == named
    images = oracle.padded_images()
    with torch.no_grad():
        got, expected = (model.eval()(*images).last_hidden_state for model in (ours, theirs))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "stride"),
    [
        ("swin_tiny_patch4_window7_224", 32),
        ("vit_tiny_patch16_224", 16),
        ("vit_small_patch14_dinov2", 14),
        ("eva02_tiny_patch14_224", 14),
        ("hrnet_w18_small", 32),
        ("maxvit_rmlp_pico_rw_256", 32),
    ],
)
def test_models_of_a_fixed_size_run_at_others(name, stride):
    model, size = of_timm(name), (97, 131)
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(1, *size)
    mask[:, :, size[1] // 2 :] = 0
    with torch.no_grad():
        maps, kept = model(images, mask)
    assert maps[-1].shape[1] == model.intermediate_channel_sizes[-1]
    assert tuple(maps[-1].shape[2:]) == tuple(-(-length // stride) for length in size)
    assert kept.any()
    assert not kept.all()


def test_at_its_own_size_it_is_the_model_of_timm():
    model = of_timm("vit_tiny_patch16_224", (2, 5))
    theirs = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(2, 5))
    theirs.load_state_dict(model.model.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model(images, None).maps, theirs.eval()(images))


def test_arguments_reach_timm():
    model = of_timm("vit_tiny_patch16_224", (0,), img_size=(64, 96), embed_dim=48, num_heads=3)
    assert model.model.model.patch_embed.img_size == (64, 96)
    assert model.intermediate_channel_sizes == [48]
    fixed = of_timm("levit_128", img_size=(64, 96))
    assert fixed(torch.zeros(1, 3, 64, 96), None).maps[-1].shape[-1] > 0
    with pytest.raises(ValueError, match=r"pixel_values: expected images of 64x96 .*got 96x64"):
        fixed(torch.zeros(1, 3, 96, 64), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backbone": "levit_128"}, "'levit_128', which runs at 224x224 alone"),
        ({"backbone": "vit_tiny_patch16_224", "dynamic_size": 1}, "vit_tiny.*dynamic_size"),
        ({"backbone": "resnet18", "widen": 2}, "resnet18.*widen"),
        ({"backbone": "resnet18", "out_indices": [7]}, "resnet18.*7"),
        ({"backbone": "resnet5000"}, "resnet5000"),
    ],
)
def test_what_cannot_run_is_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=f"(?s)backbone: .*{message}"):
        of_timm(fields.pop("backbone"), **fields)


def test_fields_of_every_configuration_are_no_arguments_of_timm():
    theirs = transformers.TimmBackboneConfig(backbone="resnet18").to_dict()
    assert BackboneConfig.of(theirs).timm_arguments == {}
    kept = BackboneConfig.of(theirs | {"img_size": [64, 96]})
    assert kept.timm_arguments == {"img_size": [64, 96]}
    assert BackboneConfig.of(kept.to_dict()) == kept


@pytest.mark.parametrize(
    ("name", "frozen", "free"),
    [
        ("hrnet_w18_small", {"conv1", "layer1"}, {"stage2", "stage4"}),
        ("legacy_xception", {"body.conv1", "body.block1"}, {"body.block3"}),
        ("mvitv2_tiny", {"model.patch_embed", "model.stages.0"}, {"model.stages.1"}),
        ("twins_svt_small", {"model.patch_embeds.0", "model.blocks.0"}, {"model.blocks.1"}),
        ("hiera_tiny_224", {"model.patch_embed"}, {"model.blocks.11"}),
        ("swin_tiny_patch4_window7_224", {"patch_embed", "layers_0"}, {"layers_2"}),
    ],
)
def test_up_to_stride_4_nothing_trains(name, frozen, free):
    arguments = {"img_size": (64, 96)} if "hiera" in name else {}
    model = of_timm(name, **arguments).model
    names = trained(model)
    for part in frozen:
        assert not any(parameter.startswith(part + ".") for parameter in names), part
    for part in free:
        assert any(parameter.startswith(part + ".") for parameter in names), part


@pytest.mark.parametrize(
    "backbone",
    [
        {"backbone": "resnet18"},
        {"backbone": "resnet18", "decoder_layers": 1},
        {"backbone": "hrnet_w18_small"},
        {"backbone": "vit_tiny_patch16_224", "backbone_kwargs": {"out_indices": [1]}},
        {"backbone": "tf_mobilenetv3_small_075", "compat": "transformers"},
        {"backbone": "tf_mobilenetv3_small_075", "backbone_kwargs": {"out_indices": [1, 2]}},
        {"backbone_config": resnet(out_features=["stage2"]), "position_embedding_type": "learned"},
        {"backbone_config": resnet(), "compat": "transformers", "auxiliary_loss": True},
    ],
    ids=lambda value: value.get("backbone", "resnet"),
)
@pytest.mark.parametrize("unfrozen", [False, True])
def test_what_trains_has_a_gradient(backbone, unfrozen):
    model = cdetr_fast.ConditionalDetrForObjectDetection(
        cdetr_fast.ConditionalDetrConfig(**(SIZES | backbone))
    ).train()
    if unfrozen:
        model.model.unfreeze_backbone()
    labels = oracle.random_labels((1, 2), classes=3)
    model(torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_finer_maps_train_for_segmentation():
    settings = SIZES | {"backbone": "hrnet_w18_small", "encoder_attention_heads": 8}
    config = cdetr_fast.ConditionalDetrConfig(**settings)
    detector = cdetr_fast.ConditionalDetrForObjectDetection(config)
    segmenter = cdetr_fast.ConditionalDetrForSegmentation(config).train()
    fewer = trained(detector.model.backbone.model)
    more = trained(segmenter.conditional_detr.model.backbone.model)
    assert fewer < more
    labels = oracle.random_labels((1, 2), classes=3, masks=True)
    segmenter(torch.randn(2, 3, 64, 64), labels=labels).loss.backward()
    named = segmenter.named_parameters()
    assert [n for n, p in named if p.requires_grad and p.grad is None] == []


@torch.no_grad()
def test_segmentation_reads_three_maps_without_the_finest():
    fields = resnet(out_features=["stage2", "stage3", "stage4"])
    settings = SIZES | {"encoder_attention_heads": 8, "backbone_config": fields}
    settings |= {"backbone": None, "use_timm_backbone": False}
    theirs = transformers.ConditionalDetrForSegmentation(
        transformers.ConditionalDetrConfig(**settings)
    ).eval()
    oracle.randomise(theirs)
    config = cdetr_fast.ConditionalDetrConfig(compat="transformers", **settings)
    ours = cdetr_fast.ConditionalDetrForSegmentation(config).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(1, 3, 64, 96)
    expected = theirs(images).pred_masks
    assert expected.shape[-2:] == (8, 12)
    for model in (ours, cdetr_fast.optimize(ours)):
        torch.testing.assert_close(model(images).pred_masks, expected, atol=1e-4, rtol=1e-4)
    fields["out_features"] = ["stage3", "stage4"]
    with pytest.raises(ValueError, match="expected three feature maps or more"):
        cdetr_fast.ConditionalDetrForSegmentation(
            cdetr_fast.ConditionalDetrConfig(**settings | {"backbone_config": fields})
        )
