"""The configuration against transformers', field by field, and what it refuses."""

import copy
import json
import pickle
import warnings

import pytest
import torch
import transformers

from cdetr_fast.config.model import ACTIVATION_NAMES, BackboneConfig, ConditionalDetrConfig
from cdetr_fast.models.activations import ACTIVATIONS

# Fields that transformers' classes carry for its own bookkeeping
BOOKKEEPING = {"transformers_version", "_name_or_path"}
# What transformers writes into a backbone's dict, though no backbone reads it
COMMON = {
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
}
RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "depths": [2, 2, 2, 2],
    "hidden_sizes": [64, 128, 256, 512],
    "out_features": ["stage4"],
}
KEYWORDS = [
    {},
    {"num_labels": 5},
    {"id2label": {0: "cat", 1: "dog", 2: "cup"}, "label2id": {"cat": 0, "dog": 1, "cup": 2}},
    {"backbone": "resnet101", "dilation": True, "num_channels": 1},
    {"use_timm_backbone": False},
    {"backbone_config": RESNET},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"}},
    {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3},
    {"activation_function": "gelu", "position_embedding_type": "learned"},
    {"torch_dtype": "float16", "output_attentions": True, "output_hidden_states": True},
    {"class_cost": 1, "bbox_cost": 7, "cls_loss_coefficient": 3, "focal_alpha": 0.5},
    {"dropout": 0, "encoder_layerdrop": 0.25, "return_dict": False, "init_std": 0.1},
]


def theirs_with(**fields) -> transformers.ConditionalDetrConfig:
    """transformers' configuration; 5.17 asks the hub for the sizes of its own ResNet."""
    try:
        return transformers.ConditionalDetrConfig(**copy.deepcopy(fields))
    except Exception as error:
        if "Connect" not in type(error).__name__:  # the class depends on the hub's client
            raise
        pytest.skip(f"the hub cannot be reached: {type(error).__name__}")


def _comparable(fields: dict) -> dict:
    fields = {k: v for k, v in fields.items() if k not in BOOKKEEPING | {"compat"}}
    # transformers reads this and does nothing with it, so its own files may leave it out
    backbone = {"use_pretrained_backbone": False} | fields["backbone_config"]
    fields["backbone_config"] = {k: v for k, v in backbone.items() if k not in COMMON}
    return fields


@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda k: ",".join(k) or "default")
def test_fields_equal_transformers(keywords):
    theirs = theirs_with(**keywords)
    ours = ConditionalDetrConfig(**copy.deepcopy(keywords))
    assert _comparable(ours.to_dict()) == _comparable(theirs.to_dict())
    for alias in ("hidden_size", "num_attention_heads", "num_hidden_layers", "num_labels"):
        assert getattr(ours, alias) == getattr(theirs, alias)
    assert ours.dtype == theirs.dtype
    assert ours.torch_dtype == theirs.dtype
    assert ours.use_return_dict == theirs.return_dict


def test_class_attributes_equal_transformers():
    for name in ("model_type", "attribute_map"):
        expected = getattr(transformers.ConditionalDetrConfig, name)
        assert getattr(ConditionalDetrConfig, name) == expected


@pytest.mark.parametrize("keywords", KEYWORDS, ids=lambda k: ",".join(k) or "default")
def test_round_trip_through_transformers_file(keywords, tmp_path):
    theirs = theirs_with(**keywords)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ConditionalDetrConfig.from_pretrained(tmp_path / "theirs")
    assert _comparable(ours.to_dict()) == _comparable(theirs.to_dict())

    ours.save_pretrained(tmp_path / "ours")
    assert ConditionalDetrConfig.from_pretrained(tmp_path / "ours") == ours
    back = transformers.ConditionalDetrConfig.from_pretrained(tmp_path / "ours")
    assert _comparable(back.to_dict()) == _comparable(theirs.to_dict())
    assert back.compat == "paper"
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    expected = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert written.keys() - expected.keys() == {"compat"}
    # The version tells that transformers wrote the file; it is not carried over into ours.
    assert expected.keys() - written.keys() == {"transformers_version"}


# As transformers 4.57 writes it; older files have torch_dtype and no backbone_kwargs.
V4_FILE = {
    "activation_function": "relu",
    "architectures": ["ConditionalDetrForObjectDetection"],
    "auxiliary_loss": False,
    "backbone": "resnet101",
    "backbone_config": None,
    "backbone_kwargs": {"in_chans": 3, "out_indices": [1, 2, 3, 4], "output_stride": 16},
    "classifier_dropout": 0.0,
    "d_model": 128,
    "dilation": True,
    "encoder_layers": 4,
    "id2label": {"0": "N/A", "1": "person", "2": "bicycle"},
    "label2id": {"N/A": 0, "person": 1, "bicycle": 2},
    "is_encoder_decoder": True,
    "max_position_embeddings": 1024,
    "model_type": "conditional_detr",
    "num_hidden_layers": 6,
    "scale_embedding": False,
    "torch_dtype": "float32",
    "transformers_version": "4.57.1",
    "use_pretrained_backbone": True,
    "use_timm_backbone": True,
    "written_by_someone": [1, 2],
}


def test_reads_v4_file():
    config = ConditionalDetrConfig.from_dict(V4_FILE)
    backbone = config.backbone_config
    assert (backbone.model_type, backbone.backbone) == ("timm_backbone", "resnet101")
    assert (backbone.output_stride, backbone.out_indices) == (16, [1, 2, 3, 4])
    assert config.use_pretrained_backbone is True
    assert config.use_timm_backbone is True
    assert config.backbone == "resnet101"
    assert config.backbone_kwargs == V4_FILE["backbone_kwargs"]
    assert config.dtype == torch.float32
    # v4 builds encoder_layers, whatever it left in num_hidden_layers; transformers 5 builds 6 here
    assert config.encoder_layers == config.num_hidden_layers == 4
    assert config.id2label[2] == "bicycle"
    assert config.written_by_someone == [1, 2]
    assert config.to_dict()["written_by_someone"] == [1, 2]
    assert config.max_position_embeddings == 1024
    assert ConditionalDetrConfig.from_dict(config.to_dict()) == config


def test_reads_v4_file_of_own_resnet():
    file = V4_FILE | {
        "backbone": None,
        "backbone_kwargs": None,
        "backbone_config": RESNET,
        "dilation": None,
        "use_timm_backbone": None,
    }
    config = ConditionalDetrConfig.from_dict(file)
    assert config.backbone_config.out_indices == [4]
    assert config.backbone_config.stage_names == ["stem", "stage1", "stage2", "stage3", "stage4"]
    assert config.use_timm_backbone is False
    assert config.backbone is None
    assert config.backbone_kwargs is None
    assert config.dilation is False


def test_backbone_config_forms():
    fields = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": (1, 2, 3, 4)}
    from_dict = ConditionalDetrConfig(backbone_config=dict(fields)).backbone_config
    from_ours = ConditionalDetrConfig(backbone_config=BackboneConfig(**fields)).backbone_config
    theirs = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[1, 2, 3, 4])
    from_theirs = ConditionalDetrConfig(backbone_config=theirs).backbone_config
    assert from_dict == from_ours
    assert from_theirs.to_dict().items() >= from_dict.to_dict().items()
    assert from_dict != BackboneConfig(**(fields | {"backbone": "resnet34"}))
    kept = BackboneConfig(**fields, something_else=3)
    assert kept.something_else == kept.to_dict()["something_else"] == 3


# compat ------------------------------------------------------------------------------------------


def test_new_configuration_is_paper():
    config = ConditionalDetrConfig(auxiliary_loss=True, backbone="tf_mobilenetv3_small_075")
    assert config.compat == "paper"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"auxiliary_loss": True}, "auxiliary_loss=True"),
        ({"backbone": "tf_mobilenetv3_small_075"}, "tf_mobilenetv3_small_075"),
        ({"backbone": "tf_efficientnet_lite0"}, "activations"),
        ({"backbone": "nasnetalarge"}, "epsilon"),  # 1e-3, and no activation inside
        ({"architectures": ["ConditionalDetrForSegmentation"]}, "reference points"),
    ],
)
def test_files_of_transformers_that_need_its_departures(fields, reason, tmp_path):
    transformers.ConditionalDetrConfig(**fields).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=reason):
        config = ConditionalDetrConfig.from_pretrained(tmp_path)
    assert config.compat == "transformers"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explicit = ConditionalDetrConfig.from_pretrained(tmp_path, compat="paper")
        config.save_pretrained(tmp_path)
        again = ConditionalDetrConfig.from_pretrained(tmp_path)
    assert explicit.compat == "paper"
    assert again.compat == "transformers"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"backbone": "resnet50.a1_in1k"},
        {"backbone": "resnet50d"},
        {"use_timm_backbone": False},
        # timm freezes these itself, and keeps activations and epsilon
        {
            "backbone_config": {
                "model_type": "timm_backbone",
                "backbone": "tf_mobilenetv3_small_075",
                "freeze_batch_norm_2d": True,
            }
        },
    ],
)
def test_other_files_of_transformers_load_as_paper(fields, tmp_path):
    theirs_with(**fields).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # an override says nothing of how the weights were trained
        config = ConditionalDetrConfig.from_pretrained(tmp_path, auxiliary_loss=True)
    assert config.compat == "paper"
    assert config.auxiliary_loss is True


def test_unknown_timm_model_in_file_is_refused():
    with pytest.raises(ValueError, match=r"backbone_config.backbone: .*'resnet5000'"):
        ConditionalDetrConfig.from_dict({"backbone": "resnet5000"})


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"compat": "huggingface"}, ValueError, "compat: .*'paper', 'transformers'.*'huggingface'"),
        ({"position_embedding_type": "sin"}, ValueError, "position_embedding_type: .*'sin'"),
        ({"activation_function": "rleu"}, ValueError, "activation_function: .*'rleu'"),
        ({"model_type": "detr"}, ValueError, "model_type: .*'conditional_detr'.*'detr'"),
        ({"num_queries": -1}, ValueError, "num_queries: .*>= 1, got -1"),
        ({"encoder_layers": -2}, ValueError, "encoder_layers: .*-2"),
        ({"decoder_ffn_dim": 0}, ValueError, "decoder_ffn_dim: .*0"),
        ({"num_labels": 0}, ValueError, "num_labels: .*0"),
        ({"d_model": "256"}, TypeError, "d_model: .*'256'"),
        ({"num_queries": True}, TypeError, "num_queries: .*True"),
        ({"d_model": 36}, ValueError, "d_model: .*encoder_attention_heads=8, got 36"),
        ({"d_model": 24, "decoder_attention_heads": 5}, ValueError, "decoder_attention_heads=5"),
        (
            {"d_model": 6, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
            ValueError,
            "d_model: expected a multiple of 4 .*, got 6",
        ),
        ({"dropout": 1.5}, ValueError, r"dropout: .*\[0, 1\], got 1.5"),
        ({"attention_dropout": -0.1}, ValueError, "attention_dropout: .*-0.1"),
        ({"encoder_layerdrop": float("nan")}, ValueError, "encoder_layerdrop: .*nan"),
        ({"giou_cost": -1}, ValueError, "giou_cost: .*-1"),
        ({"init_std": float("inf")}, ValueError, "init_std: .*inf"),
        ({"auxiliary_loss": 1}, TypeError, "auxiliary_loss: .*1"),
        ({"dtype": "float31"}, ValueError, "dtype: .*'float31'"),
        ({"id2label": ["cat"]}, TypeError, "id2label: .*cat"),
        ({"encoder_layer": 3}, TypeError, "unknown field 'encoder_layer'.*'encoder_layers'"),
        ({"hidden_size": 64, "d_model": 128}, ValueError, "hidden_size: .*128 as d_model.*64"),
        ({"backbone_config": {"backbone": "resnet18"}}, ValueError, "backbone_config.model_type"),
        ({"backbone_config": "resnet18"}, TypeError, "backbone_config: .*'resnet18'"),
        ({"backbone_config": {"model_type": 3}}, TypeError, "model_type: .*got 3"),
        ({"backbone_kwargs": {"out_indices": 3}}, TypeError, "out_indices: .*got 3"),
        ({"backbone_kwargs": {"output_stride": 7}}, ValueError, "output_stride: .*got 7"),
        ({"backbone": "resnet18", "use_timm_backbone": False}, ValueError, "backbone: .*resnet18"),
        (
            {"backbone": "resnet18", "backbone_config": BackboneConfig(backbone="resnet34")},
            ValueError,
            "backbone: .*'resnet34' as in backbone_config, got 'resnet18'",
        ),
        (
            {"use_timm_backbone": True, "backbone_config": RESNET},
            ValueError,
            "use_timm_backbone: .*'resnet'",
        ),
        (
            {"backbone_config": RESNET | {"out_features": ["layer4"]}},
            ValueError,
            "out_features: .*layer4",
        ),
        (
            {"backbone_config": RESNET | {"hidden_sizes": [64]}},
            ValueError,
            "hidden_sizes: .*4 channel counts",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_refused(keywords, error, message):
    with pytest.raises(error, match=message):
        ConditionalDetrConfig(**keywords)


def test_assignment_is_checked():
    config = ConditionalDetrConfig()
    with pytest.raises(ValueError, match="dropout"):
        config.dropout = 2.0
    with pytest.raises(ValueError, match=r"backbone_config\.model_type: "):
        config.backbone_config.model_type = "swin"
    config.hidden_size = 128
    assert config.d_model == 128
    with pytest.raises(ValueError, match="d_model"):
        config.update({"dropout": 0.5, "d_model": 100})
    assert (config.d_model, config.dropout) == (128, 0.1)
    config.d_model = 100
    with pytest.raises(ValueError, match=r"d_model: .*got 100"):
        config.save_pretrained("never-made")


def test_dilation_without_effect_warns():
    with pytest.warns(UserWarning, match="dilation"):
        ConditionalDetrConfig(dilation=True, backbone_config=BackboneConfig(backbone="resnet18"))


# Labels ------------------------------------------------------------------------------------------


def test_labels_stay_consistent():
    config = ConditionalDetrConfig(id2label={"0": "cat", "1": "dog"})
    assert config.label2id == {"cat": 0, "dog": 1}
    assert ConditionalDetrConfig(label2id={"cat": 0, "dog": 1}).id2label == config.id2label
    config.num_labels = 2
    assert config.id2label == {0: "cat", 1: "dog"}
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert config.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}


def test_contradicting_labels_warn_and_the_number_wins_as_in_transformers():
    keywords = {"num_labels": 4, "id2label": {0: "cat"}}
    theirs = transformers.ConditionalDetrConfig(**keywords)
    with pytest.warns(UserWarning, match="num_labels=4 does not fit the 1 names"):
        ours = ConditionalDetrConfig(**keywords)
    assert (ours.id2label, ours.label2id) == (theirs.id2label, theirs.label2id)


def test_label_overrides_of_a_file():
    with pytest.warns(UserWarning, match="num_labels=5"):
        assert ConditionalDetrConfig.from_dict(V4_FILE, num_labels=5).num_labels == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        named = ConditionalDetrConfig.from_dict(V4_FILE, num_labels=1, id2label={0: "cell"})
    assert (named.id2label, named.label2id) == ({0: "cell"}, {"cell": 0})


# Reading and writing -----------------------------------------------------------------------------


def test_overrides_of_a_file():
    config = ConditionalDetrConfig.from_dict(
        V4_FILE, hidden_size=64, backbone="resnet18", dilation=False, use_pretrained_backbone=False
    )
    backbone = config.backbone_config
    assert config.d_model == 64
    assert (backbone.backbone, backbone.output_stride) == ("resnet18", None)
    assert backbone.use_pretrained_backbone is False
    partial = ConditionalDetrConfig.from_dict(V4_FILE, backbone_config={"output_stride": 8})
    assert partial.backbone_config.output_stride == 8
    assert partial.backbone == "resnet101"
    whole = ConditionalDetrConfig.from_dict(V4_FILE, backbone_config=RESNET)
    assert whole.backbone_config == BackboneConfig(**RESNET)
    with pytest.raises(TypeError, match="'drpout'; did you mean 'dropout'"):
        ConditionalDetrConfig.from_dict(V4_FILE, drpout=0.5)
    with pytest.raises(ValueError, match="model_type"):
        ConditionalDetrConfig.from_dict(V4_FILE, model_type="detr")
    config, unused = ConditionalDetrConfig.from_dict(
        V4_FILE, return_unused_kwargs=True, dropout=0.5, colour="red"
    )
    assert config.dropout == 0.5
    assert unused == {"colour": "red"}


def test_from_pretrained_sources(tmp_path):
    config = ConditionalDetrConfig(num_queries=7)
    config.save_pretrained(tmp_path / "outer" / "inner")
    file = tmp_path / "outer" / "inner" / "config.json"
    assert ConditionalDetrConfig.from_pretrained(tmp_path / "outer", subfolder="inner") == config
    assert ConditionalDetrConfig.from_pretrained(file) == config
    assert ConditionalDetrConfig.from_json_file(file) == config
    fields, rest = ConditionalDetrConfig.get_config_dict(tmp_path / "outer" / "inner", colour=1)
    assert fields["num_queries"] == 7
    assert rest == {"colour": 1}
    with pytest.raises(FileNotFoundError, match=r"outer: .*config\.json"):
        ConditionalDetrConfig.from_pretrained(tmp_path / "outer")
    with pytest.raises(FileNotFoundError, match="no/such/folder"):
        ConditionalDetrConfig.from_pretrained("no/such/folder")
    file.write_text("{")
    with pytest.raises(OSError, match=r"config\.json: expected a JSON file"):
        ConditionalDetrConfig.from_pretrained(file)
    with pytest.raises(NotADirectoryError, match="save_directory"):
        config.save_pretrained(file)


def test_copies_and_text():
    config = ConditionalDetrConfig(dtype="bfloat16", num_labels=3)
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
    changed = copy.deepcopy(config)
    changed.backbone_config.backbone = "resnet18"
    assert changed != config
    assert config != {"num_labels": 3}
    assert json.loads(config.to_json_string()) == json.loads(str(config).partition(" ")[2])
    assert json.loads(config.to_json_string())["dtype"] == "bfloat16"
    assert "problem_type" not in config.to_diff_dict()
    assert config.to_dict()["problem_type"] is None


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    old = ConditionalDetrConfig(num_queries=7)
    old.save_pretrained(tmp_path)

    def fail(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        ConditionalDetrConfig(num_queries=8).save_pretrained(tmp_path)
    assert ConditionalDetrConfig.from_pretrained(tmp_path) == old
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_activations_equal_transformers():
    assert sorted(ACTIVATIONS) == sorted(ACTIVATION_NAMES)
    x = torch.linspace(-12, 12, 1001)
    for name, make in ACTIVATIONS.items():
        expected = transformers.activations.ACT2FN[name](x)
        torch.testing.assert_close(make()(x), expected, atol=2e-6, rtol=1e-5, msg=name)


def test_a_file_that_transformers_wrote_anew_was_trained_there(tmp_path):
    """transformers keeps our `compat` in the file, but not what it stands for."""
    ours = ConditionalDetrConfig(auxiliary_loss=True)
    ours.save_pretrained(tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ConditionalDetrConfig.from_pretrained(tmp_path / "ours").compat == "paper"
    transformers.ConditionalDetrConfig.from_pretrained(tmp_path / "ours").save_pretrained(
        tmp_path / "theirs"
    )
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["compat"] == "paper"
    with pytest.warns(UserWarning, match="layer-normed state"):
        back = ConditionalDetrConfig.from_pretrained(tmp_path / "theirs")
    assert back.compat == "transformers"
    assert ConditionalDetrConfig.from_dict(back.to_dict()).compat == "transformers"
    kept = ConditionalDetrConfig.from_pretrained(tmp_path / "theirs", compat="paper")
    assert kept.compat == ConditionalDetrConfig.from_dict(kept.to_dict()).compat == "paper"
