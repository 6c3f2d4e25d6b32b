"""Names of weights in every kind of checkpoint, as tables that are read in both directions.

- "v5": the state_dict of transformers 5 in memory; ours is the same.
- "v4": what transformers 4 and 5 both write to disk.
- "authors": the .pth files of the authors.
- "HF ResNet": a backbone of transformers' own ResNet class, where a checkpoint has timm's names.

Source: transformers/conversion_mapping.py and models/conditional_detr/convert_*.py; the authors'
models/transformer.py, models/conditional_detr.py and models/backbone.py.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Tensor]
# (their name, our name): whole parts of a dotted key; {n} is the number of a layer
Table = list[tuple[str, str]]

V4_TABLE: Table = [
    ("backbone.conv_encoder.", "backbone."),
    ("encoder.layers.{n}.self_attn.out_proj.", "encoder.layers.{n}.self_attn.o_proj."),
    ("encoder.layers.{n}.fc1.", "encoder.layers.{n}.mlp.fc1."),
    ("encoder.layers.{n}.fc2.", "encoder.layers.{n}.mlp.fc2."),
    ("decoder.layers.{n}.self_attn.out_proj.", "decoder.layers.{n}.self_attn.o_proj."),
    ("decoder.layers.{n}.encoder_attn.out_proj.", "decoder.layers.{n}.encoder_attn.o_proj."),
    ("decoder.layers.{n}.fc1.", "decoder.layers.{n}.mlp.fc1."),
    ("decoder.layers.{n}.fc2.", "decoder.layers.{n}.mlp.fc2."),
    *(
        (f"decoder.layers.{{n}}.{there}_proj.", f"decoder.layers.{{n}}.{here}_proj.")
        for there, here in [
            ("sa_qcontent", "self_attn.q_content"),
            ("sa_qpos", "self_attn.q_pos"),
            ("sa_kcontent", "self_attn.k_content"),
            ("sa_kpos", "self_attn.k_pos"),
            ("sa_v", "self_attn.v"),
            ("ca_qcontent", "encoder_attn.q_content"),
            ("ca_qpos", "encoder_attn.q_pos"),
            ("ca_kcontent", "encoder_attn.k_content"),
            ("ca_kpos", "encoder_attn.k_pos"),
            ("ca_v", "encoder_attn.v"),
            ("ca_qpos_sine", "encoder_attn.q_pos_sine"),
        ]
    ),
    ("bbox_attention.q_linear.", "bbox_attention.q_proj."),
    ("bbox_attention.k_linear.", "bbox_attention.k_proj."),
    ("mask_head.lay1.", "mask_head.conv1.conv."),
    ("mask_head.gn1.", "mask_head.conv1.norm."),
    ("mask_head.lay2.", "mask_head.conv2.conv."),
    ("mask_head.gn2.", "mask_head.conv2.norm."),
    ("mask_head.adapter1.", "mask_head.fpn_stages.0.fpn_adapter."),
    ("mask_head.lay3.", "mask_head.fpn_stages.0.refine.conv."),
    ("mask_head.gn3.", "mask_head.fpn_stages.0.refine.norm."),
    ("mask_head.adapter2.", "mask_head.fpn_stages.1.fpn_adapter."),
    ("mask_head.lay4.", "mask_head.fpn_stages.1.refine.conv."),
    ("mask_head.gn4.", "mask_head.fpn_stages.1.refine.norm."),
    ("mask_head.adapter3.", "mask_head.fpn_stages.2.fpn_adapter."),
    ("mask_head.lay5.", "mask_head.fpn_stages.2.refine.conv."),
    ("mask_head.gn5.", "mask_head.fpn_stages.2.refine.norm."),
    ("mask_head.out_lay.", "mask_head.output_conv."),
]

# transformers 4 kept learned positions in the backbone; transformers 5 neither reads nor writes
# that name, so this is for reading only.
_V4_READ_ONLY: Table = [("backbone.position_embedding.", "position_embedding.")]

# Authors' detection model -> v4; the packed `in_proj` of the encoder is split by the functions
AUTHORS_TABLE: Table = [
    ("backbone.0.body.", "model.backbone.conv_encoder.model."),
    ("backbone.1.row_embed.", "model.position_embedding.row_embeddings."),
    ("backbone.1.col_embed.", "model.position_embedding.column_embeddings."),
    ("input_proj.", "model.input_projection."),
    ("query_embed.", "model.query_position_embeddings."),
    ("class_embed.", "class_labels_classifier."),
    ("bbox_embed.", "bbox_predictor."),
    ("transformer.decoder.norm.", "model.decoder.layernorm."),
    ("transformer.decoder.query_scale.", "model.decoder.query_scale."),
    ("transformer.decoder.ref_point_head.", "model.decoder.ref_point_head."),
    *(
        (f"transformer.{stack}.layers.{{n}}.{there}.", f"model.{stack}.layers.{{n}}.{here}.")
        for stack, there, here in [
            ("encoder", "self_attn.q_proj", "self_attn.q_proj"),
            ("encoder", "self_attn.k_proj", "self_attn.k_proj"),
            ("encoder", "self_attn.v_proj", "self_attn.v_proj"),
            ("encoder", "self_attn.out_proj", "self_attn.out_proj"),
            ("encoder", "linear1", "fc1"),
            ("encoder", "linear2", "fc2"),
            ("encoder", "norm1", "self_attn_layer_norm"),
            ("encoder", "norm2", "final_layer_norm"),
            ("decoder", "self_attn.out_proj", "self_attn.out_proj"),
            ("decoder", "cross_attn.out_proj", "encoder_attn.out_proj"),
            ("decoder", "linear1", "fc1"),
            ("decoder", "linear2", "fc2"),
            ("decoder", "norm1", "self_attn_layer_norm"),
            ("decoder", "norm2", "encoder_attn_layer_norm"),
            ("decoder", "norm3", "final_layer_norm"),
            *(
                ("decoder", f"{name}_proj", f"{name}_proj")
                for name in [
                    "sa_qcontent",
                    "sa_qpos",
                    "sa_kcontent",
                    "sa_kpos",
                    "sa_v",
                    "ca_qcontent",
                    "ca_qpos",
                    "ca_kcontent",
                    "ca_kpos",
                    "ca_v",
                    "ca_qpos_sine",
                ]
            ),
        ]
    ),
]

# HF ResNet -> timm; {n} is the block. Counts there start at 0, here at 1.
HF_RESNET_TABLE: Table = [
    ("backbone.model.embedder.embedder.convolution.", "backbone.model.conv1."),
    ("backbone.model.embedder.embedder.normalization.", "backbone.model.bn1."),
    *(
        (
            f"backbone.model.encoder.stages.{stage}.layers.{{n}}.{there}.",
            f"backbone.model.layer{stage + 1}.{{n}}.{here}.",
        )
        for stage in range(4)
        for there, here in [
            ("layer.0.convolution", "conv1"),
            ("layer.0.normalization", "bn1"),
            ("layer.1.convolution", "conv2"),
            ("layer.1.normalization", "bn2"),
            ("layer.2.convolution", "conv3"),
            ("layer.2.normalization", "bn3"),
            ("shortcut.convolution", "downsample.0"),
            ("shortcut.normalization", "downsample.1"),
        ]
    ),
]

# Prefix of the base model's weights in itself, in the detection and in the segmentation model.
_LEVELS = ("", "model.", "conditional_detr.model.")
_CLASSES = (
    "ConditionalDetrModel",
    "ConditionalDetrForObjectDetection",
    "ConditionalDetrForSegmentation",
)


def to_v5(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Rename the keys of v4, of any model; those of v5 stay as they are."""
    return rename_keys(state_dict, V4_TABLE + _V4_READ_ONLY)


def to_v4(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Rename the keys of v5, of any model, to those on disk."""
    return rename_keys(state_dict, inverse(V4_TABLE))


def match_resnet(state_dict: StateDict, wanted: Collection[str]) -> StateDict:
    """Rename a ResNet backbone between timm's names and transformers', as a model has them.

    Args:
        state_dict: Weights, v5 names.
        wanted: Names of the model's weights.
    """
    theirs, ours = (re.compile(rf"(^|.*\.){re.escape(row)}") for row in HF_RESNET_TABLE[0])
    if any(map(theirs.match, wanted)) and any(map(ours.match, state_dict)):
        return rename_keys(state_dict, inverse(HF_RESNET_TABLE))
    if any(map(ours.match, wanted)) and any(map(theirs.match, state_dict)):
        return rename_keys(state_dict, HF_RESNET_TABLE)
    return state_dict


def is_authors(keys: Iterable[str]) -> bool:
    """Return whether these are the authors' names."""
    return any(re.match(r"(detr\.|conditional_detr\.)?transformer\.", key) for key in keys)


def from_authors(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Rename the authors' keys to v5, detection or segmentation, and split in_proj in q, k, v."""
    renamed = {}
    for key, tensor in state_dict.items():
        # the segmentation model has the detection model in `detr`; a fork calls it conditional_detr
        bare = key.removeprefix("conditional_detr.").removeprefix("detr.")
        prefix = "" if bare == key else "conditional_detr."
        packed = re.fullmatch(r"(transformer\.encoder\..*\.)in_proj_(weight|bias)", bare)
        if packed:
            stem, kind = packed.groups()
            parts = {
                f"{stem}{name}_proj.{kind}": part
                for name, part in zip("qkv", tensor.chunk(3), strict=True)
            }
        else:
            parts = {bare: tensor}
        for name, part in rename_keys(parts, AUTHORS_TABLE).items():
            renamed[prefix + name] = part
    return to_v5(renamed)


def to_authors(state_dict: Mapping[str, Tensor]) -> StateDict:
    """Rename v5 keys of a detection or segmentation model to the authors', and pack q, k, v."""
    renamed: StateDict = {}
    for key, tensor in to_v4(state_dict).items():
        bare = key.removeprefix("conditional_detr.")
        name = next(iter(rename_keys({bare: tensor}, inverse(AUTHORS_TABLE))))
        renamed[("" if bare == key else "detr.") + name] = tensor
    for key in [key for key in renamed if re.search(r"encoder\..*\.q_proj\.(weight|bias)$", key)]:
        stem, kind = key.split("q_proj.")
        parts = [renamed.pop(f"{stem}{name}_proj.{kind}") for name in "qkv"]
        renamed[f"{stem}in_proj_{kind}"] = torch.cat(parts)
    return renamed


def level_of(keys: Iterable[str]) -> str:
    """Return the prefix of the base model's weights, "", "model." or "conditional_detr.model."."""
    found = [level for key in keys for level in _LEVELS[1:] if key.startswith(level)]
    return found[0] if found else ""


def class_of_level(level: str) -> str:
    """Return the name of the class whose weights have a prefix that `level_of` returns."""
    return dict(zip(_LEVELS, _CLASSES, strict=True))[level]


def to_level(state_dict: Mapping[str, Tensor], target: str) -> StateDict:
    """Move weights between the base, detection and segmentation model; v5 keys.

    Args:
        state_dict: Of any of the models.
        target: Prefix as `level_of` returns it. Weights that do not exist there keep their names.
    """
    source = level_of(state_dict)
    if source == target:
        return dict(state_dict)
    moved = {}
    for key, tensor in state_dict.items():
        # by way of the names of the detection model
        key = f"model.{key}" if source == "" else key.removeprefix("conditional_detr.")
        if target == "":
            key = key.removeprefix("model.")
        elif target == _LEVELS[2] and not key.startswith(("bbox_attention.", "mask_head.")):
            key = f"conditional_detr.{key}"
        moved[key] = tensor
    return moved


def fields_of(state_dict: StateDict) -> dict[str, Any]:
    """Return the configuration fields that weights (v5 names) determine.

    The number of heads, dilation, dropout and the weights of the loss are not among them.

    Raises:
        ValueError: The encoder or the decoder has no layer.
        TypeError: A weight is a number.
    """
    state_dict = to_level(state_dict, "model.")
    sizes = {
        "d_model": "model.input_projection.weight",
        "num_queries": "model.query_position_embeddings.weight",
        "num_labels": "class_labels_classifier.weight",
        "encoder_ffn_dim": "model.encoder.layers.0.mlp.fc1.weight",
        "decoder_ffn_dim": "model.decoder.layers.0.mlp.fc1.weight",
    }
    learned = "model.position_embedding.row_embeddings.weight" in state_dict
    fields = {
        **{field: len(state_dict[key]) for field, key in sizes.items() if key in state_dict},
        "encoder_layers": _count(state_dict, r"model\.encoder\.layers\.\d+\."),
        "decoder_layers": _count(state_dict, r"model\.decoder\.layers\.\d+\."),
        "position_embedding_type": "learned" if learned else "sine",
    }
    for stack in ("encoder", "decoder"):
        if fields[f"{stack}_layers"] == 0:
            raise ValueError(f"the {stack} has no layer")
    stages = [rf"model\.backbone\.model\.layer{stage}\.\d+\." for stage in (1, 2, 3, 4)]
    blocks = tuple(_count(state_dict, stage) for stage in stages)
    wide = "model.backbone.model.layer1.0.conv3.weight" in state_dict
    if (wide, blocks) in _RESNETS:
        fields["backbone"] = _RESNETS[wide, blocks]
    return fields


# (three convolutions per block, blocks) of the ResNets that the authors take from torchvision
_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}


def _count(state_dict: StateDict, pattern: str) -> int:
    return len({match[0] for key in state_dict if (match := re.match(pattern, key))})


def inverse(table: Table) -> Table:
    """Return a table for the other direction."""
    return [(here, there) for there, here in table]


def rename_keys(state_dict: Mapping[str, Tensor], *tables: Table) -> StateDict:
    """Apply tables one after the other; the first row of each that fits a key counts."""
    rules = [[_rule(there, here) for there, here in table] for table in tables]
    renamed = {}
    for key, tensor in state_dict.items():
        for table in rules:
            key = next((new for rule in table if (new := _apply(rule, key)) is not None), key)
        renamed[key] = tensor
    return renamed


def _rule(there: str, here: str) -> tuple[re.Pattern[str], str]:
    pattern = re.escape(there).replace(r"\{n\}", r"(\d+)")
    return re.compile(r"(^|.*?\.)" + pattern + "(.+)"), here.replace("{n}", r"\2")


def _apply(rule: tuple[re.Pattern[str], str], key: str) -> str | None:
    pattern, replacement = rule
    match = pattern.fullmatch(key)
    return match and match[1] + match.expand(replacement) + match[match.re.groups]
