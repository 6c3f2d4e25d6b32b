"""Loading and saving: transformers 4 and 5, the authors' files, and what can go wrong."""

import argparse
import json
import os
import re
import warnings
from collections import OrderedDict

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from support import oracle

import cdetr_fast
from cdetr_fast.checkpoints import save
from cdetr_fast.checkpoints.key_maps import (
    from_authors,
    level_of,
    to_authors,
    to_level,
    to_v4,
    to_v5,
)
from cdetr_fast.models.auto import class_of_checkpoint

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
RESNET = {
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
}
CASES = {
    "base": ("base", {}),
    "detection": ("detection", {}),
    "segmentation": ("segmentation", {}),
    "learned": ("detection", {"position_embedding_type": "learned"}),
    "dc5": ("detection", {"dilation": True}),
    "own resnet": ("detection", RESNET),
    "auxiliary loss": ("detection", {"auxiliary_loss": True}),
    "mobilenet": ("detection", {"backbone": "tf_mobilenetv3_small_075"}),
}


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws norms, biases and statistics, which else are ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            # large variances keep a MobileNet without activations from growing out of fp32's reach
            low = 1.5 if name.endswith("running_var") else 0.5
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)


def _ours(task: str = "detection", seed: int = 0, **config) -> torch.nn.Module:
    model = oracle.make_ours(task, **(SMALL | config)).eval()
    _randomise(model, seed)
    return model


def _theirs(task: str = "detection", **config) -> torch.nn.Module:
    config = transformers.ConditionalDetrConfig(**(oracle.TINY | SMALL | config))
    model = getattr(transformers, oracle.CLASSES[task])(config).eval()
    _randomise(model)
    return model


def _class(task: str) -> type:
    return getattr(cdetr_fast, oracle.CLASSES[task])


@torch.no_grad()
def _outputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    images, mask = oracle.padded_images(model.dtype)
    output = model(images, pixel_mask=mask)
    names = ("last_hidden_state", "logits", "pred_boxes", "pred_masks")
    return {name: output[name] for name in names if name in output}


def _assert_equal_outputs(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 1e-4) -> None:
    expected = _outputs(b)
    for name, value in _outputs(a).items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0, msg=name)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def quiet():
    """Turns every warning into a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# Key maps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_disk_names_are_those_of_transformers(case, tmp_path):
    task, config = CASES[case]
    theirs = _theirs(task, **config)
    theirs.save_pretrained(tmp_path)
    disk = safetensors.torch.load_file(tmp_path / "model.safetensors")
    ours = _ours(task, **config).state_dict()
    assert to_v4(ours).keys() == disk.keys()
    assert to_v5(disk).keys() == ours.keys()
    assert theirs.state_dict().keys() == ours.keys()
    there_and_back = to_v5(to_v4(ours))
    assert list(there_and_back) == list(ours)
    assert all(there_and_back[key] is ours[key] for key in ours)
    assert to_v5(ours).keys() == ours.keys()


def test_v4_names_of_learned_positions():
    keys = {"model.backbone.position_embedding.row_embeddings.weight": torch.zeros(1)}
    assert list(to_v5(keys)) == ["model.position_embedding.row_embeddings.weight"]


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
    model = _ours()
    authors = _authors_state_dict(model)
    ours = model.state_dict()
    for converted, expected in [(to_authors(ours), authors), (from_authors(authors), ours)]:
        assert converted.keys() == expected.keys()
        assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_authors_segmentation_names_both_ways():
    ours = _ours("segmentation").state_dict()
    authors = to_authors(ours)
    assert {key.split(".")[0] for key in authors} == {"detr", "mask_head", "bbox_attention"}
    assert {"detr.query_embed.weight", "mask_head.lay5.weight", "mask_head.gn1.bias"} <= set(
        authors
    )
    back = from_authors(authors)
    assert back.keys() == ours.keys()
    assert all(torch.equal(back[key], ours[key]) for key in ours)


@pytest.mark.parametrize("source", oracle.CLASSES)
@pytest.mark.parametrize("target", oracle.CLASSES)
def test_levels(source, target):
    models = {task: _ours(task).state_dict() for task in (source, target)}
    moved = to_level(models[source], level_of(models[target]))
    depth = list(oracle.CLASSES)
    smaller = min((source, target), key=depth.index)
    shared = set(moved) & set(models[target])
    expected = len(_ours(smaller).state_dict())
    assert len(shared) == expected
    assert all(moved[key].shape == models[target][key].shape for key in shared)


# transformers ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:this config.json was written by transformers")
@pytest.mark.parametrize("case", CASES)
def test_transformers_and_back(case, tmp_path):
    task, config = CASES[case]
    theirs = _theirs(task, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = _class(task).from_pretrained(tmp_path / "theirs")
    assert not ours.training
    assert ours.config.architectures == [oracle.CLASSES[task]]
    assert ours.config.name_or_path == str(tmp_path / "theirs")
    _assert_equal_outputs(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    a, b = (
        safetensors.torch.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("theirs", "ours")
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    back, info = getattr(transformers, oracle.CLASSES[task]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _assert_equal_outputs(back.eval(), theirs)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["dtype"], written["architectures"]) == ("float32", [oracle.CLASSES[task]])
    again = _class(task).from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    _assert_equal_outputs(again, ours, 1e-6)


def test_base_and_head_models_load_each_other(tmp_path):
    detector = _ours()
    detector.save_pretrained(tmp_path / "detector")
    with pytest.warns(
        UserWarning, match=r"8 weights in the checkpoint, not in the model"
    ) as caught:
        base = _class("base").from_pretrained(tmp_path / "detector")
    assert "class_labels_classifier.weight" in str(caught[0].message)
    images, mask = oracle.padded_images()
    with torch.no_grad():
        a, b = (m(images, pixel_mask=mask).last_hidden_state for m in (base, detector))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="8 weights not in the checkpoint, left at their"):
        _, info = _class("detection").from_pretrained(tmp_path / "base", output_loading_info=True)
    assert len(info["missing_keys"]) == 8
    assert not info["unexpected_keys"]
    with pytest.warns(UserWarning, match=r"mask_head\.conv1\.conv\.weight"):
        segmenter = _class("segmentation").from_pretrained(tmp_path / "detector")
    state = detector.state_dict()
    for key, tensor in segmenter.conditional_detr.state_dict().items():
        assert torch.equal(tensor, state[key]), key


# The authors -------------------------------------------------------------------------------------


def _save_authors(model: torch.nn.Module, path, **content) -> None:
    torch.save({"model": _authors_state_dict(model), "epoch": 49} | content, path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("learned", [False, True], ids=["sine", "learned"])
def test_authors_file(learned, tmp_path):
    model = _ours(position_embedding_type="learned" if learned else "sine")
    path = tmp_path / "ConditionalDETR_r18_epoch50.pth"
    if learned:
        torch.save({"model": to_authors(model.state_dict()), "args": _arguments()}, path)
    else:
        args = _arguments(lr=1e-4, backbone="resnet18", masks=False, output_dir="")
        _save_authors(model, path, args=args, optimizer={"state": {}, "param_groups": []})
    loaded = _class("detection").from_pretrained(path)
    for field in ("d_model", "num_queries", "num_labels", "encoder_layers", "decoder_ffn_dim"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    assert loaded.config.backbone == "resnet18"
    assert loaded.config.compat == "paper"
    _assert_equal_outputs(loaded, model, 1e-6)
    names = _class("detection").from_pretrained(path, id2label={i: f"c{i}" for i in range(7)})
    assert names.config.id2label[6] == "c6"
    given = _class("detection").from_pretrained(path, config=model.config, auxiliary_loss=True)
    assert given.config.auxiliary_loss is True
    dilated = _class("detection").from_pretrained(path, dilation=True)
    assert dilated.config.backbone_config.output_stride == 16


def _arguments(**others) -> argparse.Namespace:
    """The authors' command line, as far as the configuration depends on it."""
    return argparse.Namespace(**({"dilation": False, "nheads": 8, "dropout": 0.1} | others))


@pytest.mark.usefixtures("quiet")
def test_authors_command_line_counts(tmp_path):
    """Fields that weights do not determine: dilation (DC5) and heads."""
    path = tmp_path / "dc5.pth"
    args = _arguments(dilation=True, nheads=4, dropout=0.0)
    _save_authors(_ours(), path, args=args)
    config = _class("detection").from_pretrained(path).config
    assert config.backbone_config.output_stride == 16
    assert config.encoder_attention_heads == config.decoder_attention_heads == 4
    assert config.dropout == 0.0
    given = _class("detection").from_pretrained(path, dilation=False, encoder_attention_heads=2)
    assert given.config.backbone_config.output_stride is None
    assert given.config.encoder_attention_heads == 2


def test_authors_file_without_a_command_line(tmp_path):
    path = tmp_path / "dc5.pth"
    _save_authors(_ours(), path)
    with pytest.warns(UserWarning, match=r"dc5\.pth: does not say .* dilated.*save_pretrained"):
        _class("detection").from_pretrained(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _class("detection").from_pretrained(path, dilation=True)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_class_of_a_checkpoint(task, tmp_path):
    model = _ours(task)
    model.save_pretrained(tmp_path)
    torch.save({"model": to_authors(model.state_dict())}, tmp_path / "x.pth")
    for source in (tmp_path, tmp_path / "model.safetensors", tmp_path / "x.pth"):
        assert class_of_checkpoint(source) is _class(task)
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
    _save_authors(_ours(), path)
    with pytest.raises(ValueError, match=message):
        _class("detection").from_pretrained(path, **fields)
    config = cdetr_fast.ConditionalDetrConfig(**(oracle.TINY | SMALL))
    with pytest.raises(ValueError, match=message):
        _class("detection").from_pretrained(path, config=config, **fields)


def test_authors_file_with_other_classes(tmp_path):
    path = tmp_path / "r18.pth"
    _save_authors(_ours(), path)
    with pytest.warns(UserWarning, match=r"class_labels_classifier\.bias: expected \[3\], got \[7"):
        model = _class("detection").from_pretrained(
            path, num_labels=3, ignore_mismatched_sizes=True
        )
    assert model.config.num_labels == 3


def test_code_in_a_checkpoint_is_refused(tmp_path):
    torch.save({"model": {}, "args": re.compile("x")}, tmp_path / "code.pth")
    with pytest.raises(OSError, match=r"code\.pth: .*not a file of plain weights"):
        _class("detection").from_pretrained(tmp_path / "code.pth")


# Keys and shapes ---------------------------------------------------------------------------------


def test_shapes_that_do_not_fit(tmp_path):
    _ours().save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="num_labels=3"),
        pytest.raises(
            ValueError, match=r"class_labels_classifier\.weight: expected \[3, 64\], got"
        ),
    ):
        _class("detection").from_pretrained(tmp_path, num_labels=3)
    with pytest.warns(UserWarning, match="2 weights of another shape, left at their") as caught:
        model, info = _class("detection").from_pretrained(
            tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
        )
    message = str(caught[-1].message)
    assert "class_labels_classifier.bias: expected [3], got [7]" in message
    assert "bbox_predictor" not in message
    assert info["mismatched_keys"] == [
        ("class_labels_classifier.weight", (7, 64), (3, 64)),
        ("class_labels_classifier.bias", (7,), (3,)),
    ]
    # the initial value of the paper, not zero and not the checkpoint's
    torch.testing.assert_close(
        model.class_labels_classifier.bias, torch.full((3,), -torch.tensor(99.0).log().item())
    )


def test_missing_and_unexpected_are_all_listed(tmp_path):
    model = _ours()
    state = model.state_dict()
    removed = [key for key in state if ".mlp.fc" in key]
    kept = {key: tensor for key, tensor in state.items() if key not in removed}
    counter = {"model.backbone.model.bn1.num_batches_tracked": torch.tensor(3)}
    model.save_pretrained(tmp_path, state_dict=kept | counter | {"extra.weight": torch.zeros(2)})
    with pytest.warns(UserWarning, match="not all weights went into") as caught:
        _, info = _class("detection").from_pretrained(tmp_path, output_loading_info=True)
    message = str(caught[0].message)
    assert len(caught) == 1
    assert all(key in message for key in [*removed, "extra.weight"])
    assert "num_batches_tracked" not in message
    assert info == {
        "missing_keys": removed,
        "unexpected_keys": ["extra.weight"],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    with pytest.raises(ValueError, match=r"expected exactly the weights of .*(\n.*)*extra\.weight"):
        _class("detection").from_pretrained(tmp_path, strict=True)


# Files -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["50GB", "20MB"], ids=["whole", "sharded"])
def test_file_layouts(safe, variant, shard, tmp_path):
    model = _ours()
    options = {"variant": variant, "safe_serialization": safe, "max_shard_size": shard}
    model.save_pretrained(tmp_path, **options)
    files = {path.name for path in tmp_path.iterdir()}
    assert ("50GB" in shard) == (len(files) == 2)
    loaded = _class("detection").from_pretrained(tmp_path, variant=variant, use_safetensors=safe)
    _assert_equal_outputs(loaded, model, 1e-6)
    if safe:  # transformers' own reader for the same layout
        theirs = transformers.ConditionalDetrForObjectDetection.from_pretrained(
            tmp_path, variant=variant
        )
        _assert_equal_outputs(theirs.eval(), model)
    with pytest.raises(FileNotFoundError, match="expected one of "):
        _class("detection").from_pretrained(tmp_path, variant=variant, use_safetensors=not safe)


@pytest.mark.usefixtures("quiet")
def test_saving_over_another_layout_leaves_no_older_weights(tmp_path):
    layouts = [
        {"max_shard_size": "20MB"},
        {},
        {"safe_serialization": False},
        {"max_shard_size": "25MB"},
        {"max_shard_size": "20MB"},
    ]
    for seed, options in enumerate(layouts):
        model = _ours(seed=seed)
        model.save_pretrained(tmp_path, **options)
        _assert_equal_outputs(_class("detection").from_pretrained(tmp_path), model, 1e-6)
    shards = {path.name for path in tmp_path.glob("model-*")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert shards == set(index["weight_map"].values())


@pytest.mark.parametrize("failure", ["first rename", "second rename", "while writing"])
@pytest.mark.parametrize("shard", ["50GB", "20MB"], ids=["whole", "sharded"])
def test_interrupted_write_leaves_the_old_model(failure, shard, tmp_path, monkeypatch):
    old = _ours()
    old.save_pretrained(tmp_path, max_shard_size=shard)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = _ours(num_queries=33)
    replace, save_file = os.replace, safetensors.torch.save_file
    calls = []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == (1 if failure == "first rename" else 2):
            raise KeyboardInterrupt
        replace(*args)

    def write_half(tensors, path, **kwargs):
        save_file(tensors, path, **kwargs)
        os.truncate(path, os.path.getsize(path) // 2)
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        if failure == "while writing":
            patch.setattr("safetensors.torch.save_file", write_half)
        else:
            patch.setattr("os.replace", fail_once)
        with pytest.raises((KeyboardInterrupt, OSError)):
            new.save_pretrained(tmp_path, max_shard_size=shard)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    _assert_equal_outputs(_class("detection").from_pretrained(tmp_path), old, 1e-6)
    new.save_pretrained(tmp_path, max_shard_size=shard)
    _assert_equal_outputs(_class("detection").from_pretrained(tmp_path), new, 1e-6)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("fraction", [0.0, 0.5], ids=["empty", "half"])
def test_broken_file_is_named(name, fraction, tmp_path):
    _ours().save_pretrained(tmp_path, safe_serialization=name.endswith("safetensors"))
    path = tmp_path / name
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(OSError, match=re.escape(str(path)) + ": broken"):
        _class("detection").from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        _class("detection").from_pretrained(tmp_path)
    model = _ours()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected one of model\.safetensors, "):
        _class("detection").from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    shard = next(tmp_path.glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(shard.name)):
        _class("detection").from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        _class("detection").from_pretrained("no/such/model")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config: expected one"):
        _class("detection").from_pretrained(tmp_path / "alone.safetensors")
    with pytest.raises(NotADirectoryError, match="save_directory"):
        model.save_pretrained(tmp_path / "alone.safetensors")


def test_subfolder_and_single_file(tmp_path):
    model = _ours()
    model.save_pretrained(tmp_path / "last")
    for loaded in (
        _class("detection").from_pretrained(tmp_path, subfolder="last"),
        _class("detection").from_pretrained(tmp_path / "last" / "model.safetensors"),
        _class("detection").from_pretrained(tmp_path / "last", config=tmp_path / "last"),
    ):
        _assert_equal_outputs(loaded, model, 1e-6)


# The hub -----------------------------------------------------------------------------------------


def _put_in_cache(model: torch.nn.Module, cache, name: str, revision: str, **options) -> None:
    """Lays a model into a folder as huggingface_hub keeps downloads."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = f"{len(revision):040d}"
    model.save_pretrained(repository / "snapshots" / commit, **options)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.mark.parametrize(
    "options", [{}, {"max_shard_size": "20MB"}, {"safe_serialization": False}], ids=str
)
def test_hub_names_and_revisions(options, tmp_path):
    main, dev = _ours(), _ours(num_queries=33)
    _put_in_cache(main, tmp_path, "someone/cats", "main", **options)
    _put_in_cache(dev, tmp_path, "someone/cats", "dev", **options)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    load = _class("detection").from_pretrained
    _assert_equal_outputs(load("someone/cats", **where), main, 1e-6)
    _assert_equal_outputs(load("someone/cats", revision="dev", **where), dev, 1e-6)
    with pytest.raises(FileNotFoundError, match=r"someone/cats: .*no config\.json from the hub"):
        load("someone/cats", revision="gone", **where)
    with pytest.raises(FileNotFoundError, match=r"someone/cats: expected one of model\.fp16\.saf"):
        load("someone/cats", variant="fp16", **where)
    with pytest.raises(FileNotFoundError, match="someone/dogs"):
        load("someone/dogs", **where)


# Options -----------------------------------------------------------------------------------------


def test_dtype(tmp_path):
    model = _ours()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert model.config.dtype is None  # saving changes nothing in the model

    def dtype_of(**options):
        loaded = _class("detection").from_pretrained(tmp_path, **options)
        assert loaded.config.dtype == loaded.dtype
        theirs = transformers.ConditionalDetrForObjectDetection.from_pretrained(tmp_path, **options)
        assert loaded.dtype == theirs.dtype
        return loaded.dtype

    assert dtype_of() == torch.bfloat16
    assert dtype_of(dtype="auto") == torch.bfloat16
    assert dtype_of(dtype="float32") == torch.float32
    assert dtype_of(torch_dtype=torch.float16) == torch.float16
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert dtype_of() == torch.bfloat16  # from the weights
    with pytest.raises(ValueError, match=r"dtype: .*'float31'"):
        _class("detection").from_pretrained(tmp_path, dtype="float31")


def test_options(tmp_path):
    _ours().save_pretrained(tmp_path)
    load = _class("detection").from_pretrained
    assert load(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert load(tmp_path, device_map={"": "cpu"}).device.type == "cpu"
    assert load(tmp_path, output_attentions=True).config.output_attentions is True
    with pytest.raises(
        (ImportError, ValueError), match=r"attn_implementation: .*'flash_attention_2'"
    ):
        load(tmp_path, attn_implementation="flash_attention_2")
    with pytest.raises(TypeError, match="'num_querys'; did you mean 'num_queries'"):
        load(tmp_path, num_querys=3)


def test_weights_that_are_given(tmp_path):
    model = _ours()
    load = _class("detection").from_pretrained
    _assert_equal_outputs(load(None, config=model.config, state_dict=model.state_dict()), model, 0)
    on_disk = to_v4(model.state_dict())
    _assert_equal_outputs(load(None, config=model.config, state_dict=on_disk), model, 0)
    model.save_pretrained(tmp_path)
    other = _ours(seed=1)
    _assert_equal_outputs(load(tmp_path, state_dict=other.state_dict()), other, 0)
    with pytest.raises(TypeError, match="state_dict: expected one"):
        load(None, config=model.config)
    with pytest.raises(TypeError, match="config: expected one"):
        load(None, state_dict=model.state_dict())


def test_key_mapping(tmp_path):
    model = _ours()
    named = {f"net.{key}".replace("fc1", "first"): x for key, x in model.state_dict().items()}
    mapping = {r"^net\.": "", r"mlp\.first\.": "mlp.fc1."}
    for cls in (_class("detection"), transformers.ConditionalDetrForObjectDetection):
        config = model.config
        if cls is not _class("detection"):
            config = transformers.ConditionalDetrConfig.from_dict(config.to_dict())
        loaded = cls.from_pretrained(
            None, config=config, state_dict=named, key_mapping=mapping
        ).eval()
        _assert_equal_outputs(loaded, model)
    with pytest.raises(ValueError, match="key_mapping: expected different names"):
        _class("detection").from_pretrained(
            None, config=model.config, state_dict=named, key_mapping={r".*": "x"}
        )


def test_device_map(tmp_path):
    model = _ours()
    model.save_pretrained(tmp_path)
    load = _class("detection").from_pretrained
    parts = {"model": "cpu", "class_labels_classifier": "cpu", "bbox_predictor": "cpu"}
    for device_map in ("auto", "balanced", "sequential", "cpu", torch.device("cpu"), parts):
        loaded = load(tmp_path, device_map=device_map)
        _assert_equal_outputs(loaded, model, 0)
        assert loaded.hf_device_map.keys() == (parts if device_map is parts else {"": 0}).keys()
    _assert_equal_outputs(load(tmp_path, device_map="auto", max_memory={"cpu": "4GB"}), model, 0)
    on_disk = parts | {"bbox_predictor": "disk"}
    spread = load(tmp_path, device_map=on_disk, offload_folder=tmp_path / "offload")
    _assert_equal_outputs(spread, model)  # layers with weights elsewhere compute on their own
    assert any((tmp_path / "offload").iterdir())
    for wrong, message in (
        ("gpu", "device_map: .*'gpu'"),
        ({"": "cpu", "modell": "cpu"}, "names of modules of .*'modell'"),
        ({"model": "cpu"}, "a device for every module, also for that of class_labels"),
    ):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, device_map=wrong)
    with pytest.raises(ValueError, match="max_memory: expected None"):
        load(tmp_path, max_memory={"cpu": "4GB"})


FOREIGN = {
    "swin": {
        "model_type": "swin",
        "image_size": 64,
        "embed_dim": 8,
        "depths": [1, 1, 1, 1],
        "num_heads": [1, 1, 2, 2],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "convnext": {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4},
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "image_size": 70,
        "num_attention_heads": 2,
        "out_features": ["stage2"],
    },
    "dinov3_vit": {
        "model_type": "dinov3_vit",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 64,
        "intermediate_size": 32,
    },
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_backbones_of_transformers_both_ways(kind, tmp_path):
    settings = oracle.TINY | SMALL | {"backbone_config": FOREIGN[kind], "backbone": None}
    theirs = transformers.ConditionalDetrForObjectDetection(
        transformers.ConditionalDetrConfig(**settings)
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, report = _class("detection").from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(report[key] for key in report)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    _assert_equal_outputs(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    for cls in (_class("detection"), transformers.ConditionalDetrForObjectDetection):
        again, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(report[key] for key in report)
        _assert_equal_outputs(again.eval(), theirs)
    # What only finer maps than the one that is read depend on does not train.
    ours.train()(torch.randn(1, 3, 64, 64)).logits.sum().backward()
    unread = [n for n, p in ours.named_parameters() if p.requires_grad and p.grad is None]
    assert all("bbox_predictor" in name for name in unread)


def test_backbone_of_no_library_is_refused():
    config = cdetr_fast.ConditionalDetrConfig(backbone_config={"model_type": "swim"})
    with pytest.raises(ValueError, match=r"model_type: .*'swim'; did you mean 'swin'"):
        cdetr_fast.ConditionalDetrModel(config)
    config = cdetr_fast.ConditionalDetrConfig(
        backbone_config={"model_type": "swin", "depths": "two"}
    )
    with pytest.raises(ValueError, match=r"'swin'.*depths"):
        cdetr_fast.ConditionalDetrModel(config)


def test_resnet_by_timms_names_and_back():
    timm_named = _ours()
    fields = RESNET | {"use_timm_backbone": False}
    config = cdetr_fast.ConditionalDetrConfig(**(oracle.TINY | SMALL | fields))
    load = _class("detection").from_pretrained
    native = load(None, config=config, state_dict=timm_named.state_dict())
    _assert_equal_outputs(native, timm_named, 1e-5)
    back = load(None, config=timm_named.config, state_dict=native.state_dict())
    _assert_equal_outputs(back, timm_named, 0)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    _ours().save_pretrained(tmp_path)
    (tmp_path / "ordinary").touch()
    for path in tmp_path.iterdir():
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode, path.name


def test_options_of_transformers_that_ask_for_nothing(tmp_path):
    model = _ours()
    # Accelerate's idiom, and transformers' order of arguments.
    model.save_pretrained(tmp_path, True, None, False, save_function=torch.save, token=None)
    neutral = {
        "trust_remote_code": False,
        "weights_only": True,
        "quantization_config": None,
        "state_dict": None,
        "max_memory": None,
        "key_mapping": None,
        "tp_plan": None,
        "use_kernels": False,
        "device_mesh": None,
        "experts_implementation": None,
        "from_tf": False,
        "generation_config": None,
        "mirror": None,
        "offload_state_dict": False,
    }
    _assert_equal_outputs(_class("detection").from_pretrained(tmp_path, **neutral), model, 0)
    for name, value in {"quantization_config": {"bits": 4}, "tp_plan": "auto"}.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*None"):
            _class("detection").from_pretrained(tmp_path, **{name: value})
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("task", "config", "words"),
    [
        ("detection", {"auxiliary_loss": True}, "layer-normed state"),
        ("segmentation", {}, "reference points"),
        ("detection", {"backbone": "tf_mobilenetv3_small_075"}, "activations"),
    ],
)
def test_saving_what_transformers_computes_otherwise_says_so(task, config, words, tmp_path):
    with pytest.warns(UserWarning, match=f"other numbers.*{words}"):
        _ours(task, **config).save_pretrained(tmp_path / "paper")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        _ours(task, compat="transformers", **config).save_pretrained(tmp_path / "transformers")
        _ours().save_pretrained(tmp_path / "plain")


def test_loading_never_fetches_backbone_weights(tmp_path, monkeypatch):
    _ours().save_pretrained(tmp_path)
    asked = []
    build = _class("detection").__init__

    def record(self, config):
        asked.append(config.use_pretrained_backbone)
        build(self, config)

    monkeypatch.setattr(_class("detection"), "__init__", record)
    model = _class("detection").from_pretrained(tmp_path, use_pretrained_backbone=True)
    assert asked == [False]
    assert model.config.use_pretrained_backbone is True


class FakeHub:
    """Stands in for `huggingface_hub.HfApi`."""

    calls: list

    def __init__(self, token=None):
        self.calls.append(("token", token))

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", repo_id, options))
        return argparse.Namespace(repo_id=f"me/{repo_id}")

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", repo_id, options))

    def upload_folder(self, folder_path, allow_patterns, **options):
        self.calls.append(("upload", sorted(allow_patterns), options))
        return "commit"


def _no_card(*args, **kwargs):
    raise huggingface_hub.errors.EntryNotFoundError("none")


def test_push_to_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(FakeHub, "calls", [], raising=False)
    monkeypatch.setattr(save, "HfApi", FakeHub)
    files = ["config.json", "model.safetensors"]
    model = _ours()
    assert model.push_to_hub("cats", private=True, token="t", revision="dev") == "commit"
    token, repo, branch, upload = FakeHub.calls
    assert token == ("token", "t")
    assert repo == ("create_repo", "cats", {"private": True, "exist_ok": True})
    assert branch == ("create_branch", "me/cats", {"branch": "dev", "exist_ok": True})
    assert upload[1] == files
    assert upload[2]["repo_id"] == "me/cats"
    assert upload[2]["revision"] == "dev"

    FakeHub.calls.clear()
    (tmp_path / "dogs").mkdir()
    (tmp_path / "dogs" / "notes.txt").write_text("not for the hub")
    model.save_pretrained(tmp_path / "dogs", push_to_hub=True, commit_message="trained")
    assert FakeHub.calls[-1][1] == files
    assert FakeHub.calls[-1][2]["repo_id"] == "me/dogs"
    assert FakeHub.calls[-1][2]["commit_message"] == "trained"
    FakeHub.calls.clear()
    cards = []
    monkeypatch.setattr("huggingface_hub.ModelCard.load", _no_card)
    monkeypatch.setattr("huggingface_hub.ModelCard.save", lambda card, path: cards.append(card))
    model.add_model_tags("small")
    model.push_to_hub("cats", tags=["cats", "small"])
    assert FakeHub.calls[-1][1] == ["README.md", *files]
    assert cards[-1].data.tags == ["small", "cats"]
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    model.config.push_to_hub("cats")
    model.config.save_pretrained(tmp_path / "dogs", push_to_hub=True, tags="dogs")
    assert [call[1] for call in FakeHub.calls if call[0] == "upload"][-2:] == [
        ["config.json"],
        ["README.md", "config.json"],
    ]
    with pytest.raises(TypeError, match="'comit_message'"):
        model.config.save_pretrained(tmp_path / "dogs", comit_message="trained")
    with pytest.raises(TypeError, match="'comit_message'"):
        model.save_pretrained(tmp_path / "dogs", comit_message="trained")


# The public checkpoint ---------------------------------------------------------------------------

PUBLIC = "microsoft/conditional-detr-resnet-50"


@pytest.mark.network
@pytest.mark.slow
def test_public_checkpoint(photo, data_folder):
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(PUBLIC, timeout=5)
    except Exception as error:  # whatever keeps the hub from being reached
        pytest.skip(f"the hub cannot be reached: {type(error).__name__}")
    if data_folder is None:
        pytest.skip("needs the photograph")
    model, info = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(
        PUBLIC, output_loading_info=True
    )
    assert not any(info.values())
    processor = cdetr_fast.ConditionalDetrImageProcessor.from_pretrained(PUBLIC)
    inputs = processor(images=photo, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    logits = [
        [-10.4371, -5.7565, -8.6765],
        [-10.5413, -5.8700, -8.0589],
        [-10.6824, -6.3477, -8.3927],
    ]
    boxes = [[0.7733, 0.6576, 0.4496], [0.5171, 0.1184, 0.9095], [0.8846, 0.5647, 0.2486]]
    tolerance = {"atol": 2e-4, "rtol": 0}
    torch.testing.assert_close(output.logits[0, :3, :3], torch.tensor(logits), **tolerance)
    torch.testing.assert_close(output.pred_boxes[0, :3, :3], torch.tensor(boxes), **tolerance)
    found = processor.post_process_object_detection(
        output, threshold=0.3, target_sizes=[photo.size[::-1]]
    )[0]
    scores = torch.tensor([0.8330, 0.8315, 0.8039, 0.6829, 0.5354])
    torch.testing.assert_close(found["scores"], scores, **tolerance)
    assert found["labels"].tolist() == [75, 17, 17, 75, 63]
    corner = torch.tensor([38.3089, 72.1023, 177.6292, 118.4514])
    torch.testing.assert_close(found["boxes"][0], corner, atol=2e-2, rtol=0)
