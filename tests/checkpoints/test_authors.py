"""The authors' files: names of their weights, and what their command line tells."""

import argparse
import re
import warnings
from collections import OrderedDict

import pytest
import torch
from support import oracle
from support.checkpoints import (  # fixtures
    SMALL,
    assert_equal_outputs,
    class_of,
    our_model,
)

import cdetr_fast
from cdetr_fast.checkpoints.key_maps import (
    from_authors,
    to_authors,
    to_v4,
)
from cdetr_fast.models.auto import class_of_checkpoint

# From the authors' models/transformer.py and conditional_detr.py: module -> v4 name of it.
AUTHORS_MODULES = {
    "class_embed": "class_labels_classifier",
    "bbox_embed.layers.0": "bbox_predictor.layers.0",
    "bbox_embed.layers.1": "bbox_predictor.layers.1",
    "bbox_embed.layers.2": "bbox_predictor.layers.2",
    "input_proj": "model.input_projection",
    "transformer.decoder.norm": "model.decoder.layernorm",
    "transformer.decoder.query_scale.layers.0": "model.decoder.query_scale.layers.0",
    "transformer.decoder.query_scale.layers.1": "model.decoder.query_scale.layers.1",
    "transformer.decoder.ref_point_head.layers.0": "model.decoder.ref_point_head.layers.0",
    "transformer.decoder.ref_point_head.layers.1": "model.decoder.ref_point_head.layers.1",
}
AUTHORS_ENCODER_LAYER = {
    "self_attn.out_proj": "self_attn.out_proj",
    "linear1": "fc1",
    "linear2": "fc2",
    "norm1": "self_attn_layer_norm",
    "norm2": "final_layer_norm",
}
AUTHORS_DECODER_LAYER = {
    "self_attn.out_proj": "self_attn.out_proj",
    "cross_attn.out_proj": "encoder_attn.out_proj",
    "linear1": "fc1",
    "linear2": "fc2",
    "norm1": "self_attn_layer_norm",
    "norm2": "encoder_attn_layer_norm",
    "norm3": "final_layer_norm",
}
for _name in ("qcontent", "qpos", "kcontent", "kpos", "v"):
    AUTHORS_DECODER_LAYER |= {f"{a}_{_name}_proj": f"{a}_{_name}_proj" for a in ("sa", "ca")}
AUTHORS_DECODER_LAYER["ca_qpos_sine_proj"] = "ca_qpos_sine_proj"


def _authors_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict that the authors' detection model would have with these weights."""
    v4 = to_v4(model.state_dict())
    modules = dict(AUTHORS_MODULES)
    for layer in range(model.config.encoder_layers):
        for there, here in AUTHORS_ENCODER_LAYER.items():
            modules[f"transformer.encoder.layers.{layer}.{there}"] = (
                f"model.encoder.layers.{layer}.{here}"
            )
    for layer in range(model.config.decoder_layers):
        for there, here in AUTHORS_DECODER_LAYER.items():
            if there == "ca_qpos_proj" and layer > 0:  # the authors set it to None
                continue
            modules[f"transformer.decoder.layers.{layer}.{there}"] = (
                f"model.decoder.layers.{layer}.{here}"
            )
    state = OrderedDict()
    for there, here in modules.items():
        for kind in ("weight", "bias"):
            state[f"{there}.{kind}"] = v4.pop(f"{here}.{kind}")
    state["query_embed.weight"] = v4.pop("model.query_position_embeddings.weight")
    for layer in range(model.config.encoder_layers):
        for kind in ("weight", "bias"):
            stem = f"model.encoder.layers.{layer}.self_attn."
            parts = [v4.pop(f"{stem}{name}_proj.{kind}") for name in "qkv"]
            state[f"transformer.encoder.layers.{layer}.self_attn.in_proj_{kind}"] = torch.cat(parts)
    body = "model.backbone.conv_encoder.model."
    for key in [key for key in v4 if key.startswith(body)]:
        state["backbone.0.body." + key.removeprefix(body)] = v4.pop(key)
    assert not v4
    return state


def test_authors_names_both_ways():
    model = our_model()
    authors = _authors_state_dict(model)
    ours = model.state_dict()
    for converted, expected in [(to_authors(ours), authors), (from_authors(authors), ours)]:
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_authors_segmentation_names_both_ways():
    ours = our_model("segmentation").state_dict()
    authors = to_authors(ours)
    assert {key.split(".")[0] for key in authors} == {"detr", "mask_head", "bbox_attention"}
    assert {"detr.query_embed.weight", "mask_head.lay5.weight", "mask_head.gn1.bias"} <= set(
        authors
    )
    back = from_authors(authors)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


def _save_authors(model: torch.nn.Module, path, **content) -> None:
    torch.save({"model": _authors_state_dict(model), "epoch": 49} | content, path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("learned", [False, True], ids=["sine", "learned"])
def test_authors_file(learned, tmp_path):
    model = our_model(position_embedding_type="learned" if learned else "sine")
    path = tmp_path / "ConditionalDETR_r18_epoch50.pth"
    if learned:
        torch.save({"model": to_authors(model.state_dict()), "args": _arguments()}, path)
    else:
        args = _arguments(lr=1e-4, backbone="resnet18", masks=False, output_dir="")
        _save_authors(model, path, args=args, optimizer={"state": {}, "param_groups": []})
    loaded = class_of("detection").from_pretrained(path)
    for field in ("d_model", "num_queries", "num_labels", "encoder_layers", "decoder_ffn_dim"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    assert loaded.config.backbone == "resnet18"
    assert loaded.config.compat == "paper"
    assert_equal_outputs(loaded, model, 1e-6)
    names = class_of("detection").from_pretrained(path, id2label={i: f"c{i}" for i in range(7)})
    assert names.config.id2label[6] == "c6"
    given = class_of("detection").from_pretrained(path, config=model.config, auxiliary_loss=True)
    assert given.config.auxiliary_loss is True
    dilated = class_of("detection").from_pretrained(path, dilation=True)
    assert dilated.config.backbone_config.output_stride == 16


def _arguments(**others) -> argparse.Namespace:
    """The authors' command line, as far as the configuration depends on it."""
    return argparse.Namespace(**({"dilation": False, "nheads": 8, "dropout": 0.1} | others))


@pytest.mark.usefixtures("quiet")
def test_authors_command_line_counts(tmp_path):
    """Fields that weights do not determine: dilation (DC5) and heads."""
    path = tmp_path / "dc5.pth"
    args = _arguments(dilation=True, nheads=4, dropout=0.0)
    _save_authors(our_model(), path, args=args)
    config = class_of("detection").from_pretrained(path).config
    assert config.backbone_config.output_stride == 16
    assert config.encoder_attention_heads == config.decoder_attention_heads == 4
    assert config.dropout == 0.0
    given = class_of("detection").from_pretrained(path, dilation=False, encoder_attention_heads=2)
    assert given.config.backbone_config.output_stride is None
    assert given.config.encoder_attention_heads == 2


def test_authors_file_without_a_command_line(tmp_path):
    path = tmp_path / "dc5.pth"
    _save_authors(our_model(), path)
    with pytest.warns(UserWarning, match=r"dc5\.pth: does not say .* dilated.*save_pretrained"):
        class_of("detection").from_pretrained(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        class_of("detection").from_pretrained(path, dilation=True)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_class_of_a_checkpoint(task, tmp_path):
    model = our_model(task)
    model.save_pretrained(tmp_path)
    torch.save({"model": to_authors(model.state_dict())}, tmp_path / "x.pth")
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "x.pth"):
        assert class_of_checkpoint(source) is class_of(task)
    with pytest.raises(OSError, match="nowhere"):
        class_of_checkpoint(tmp_path / "nowhere")


@pytest.mark.filterwarnings("ignore:num_labels=91 does not fit")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_layers": 6}, "encoder_layers: expected 1 as in the weights of .*pth.*, got 6"),
        ({"d_model": 128}, "d_model: expected 64 .*, got 128"),
        ({"num_labels": 91}, "num_labels: expected 7 .*, got 91"),
        ({"num_queries": 300}, "num_queries: expected 20 .*, got 300"),
        ({"backbone": "resnet50"}, "backbone: expected 'resnet18' .*, got 'resnet50'"),
        ({"position_embedding_type": "learned"}, "position_embedding_type: expected 'sine'"),
    ],
)
def test_authors_file_against_the_configuration(fields, message, tmp_path):
    path = tmp_path / "r18.pth"
    _save_authors(our_model(), path)
    with pytest.raises(ValueError, match=message):
        class_of("detection").from_pretrained(path, **fields)
    config = cdetr_fast.ConditionalDetrConfig(**(oracle.TINY | SMALL))
    with pytest.raises(ValueError, match=message):
        class_of("detection").from_pretrained(path, config=config, **fields)


def test_authors_file_with_other_classes(tmp_path):
    path = tmp_path / "r18.pth"
    _save_authors(our_model(), path)
    with pytest.warns(UserWarning, match=r"class_labels_classifier\.bias: expected \[3\], got \[7"):
        model = class_of("detection").from_pretrained(
            path, num_labels=3, ignore_mismatched_sizes=True
        )
    assert model.config.num_labels == 3


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"model": {}, "args": re.compile("x")}, tmp_path / "code.pth")
    with pytest.raises(OSError, match=r"code\.pth: .*not a file of plain weights"):
        class_of("detection").from_pretrained(tmp_path / "code.pth")
