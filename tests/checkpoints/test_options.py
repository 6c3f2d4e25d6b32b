"""Options of `from_pretrained` and `save_pretrained`, backbones of others, and `push_to_hub`."""

import argparse
import json
import warnings

import huggingface_hub
import pytest
import torch
import transformers
from support import oracle
from support.checkpoints import (  # fixtures
    RESNET,
    SMALL,
    assert_equal_outputs,
    class_of,
    our_model,
)

import cdetr_fast
from cdetr_fast.checkpoints import save
from cdetr_fast.checkpoints.key_maps import to_authors, to_v4
from cdetr_fast.integrations.inheritance import inherit_all


def test_dtype(tmp_path):
    model = our_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    assert model.config.dtype is None  # saving changes nothing in the model

    def dtype_of(**options):
        loaded = class_of("detection").from_pretrained(tmp_path, **options)
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
        class_of("detection").from_pretrained(tmp_path, dtype="float31")


def test_options(tmp_path):
    our_model().save_pretrained(tmp_path)
    load = class_of("detection").from_pretrained
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
    model = our_model()
    load = class_of("detection").from_pretrained
    assert_equal_outputs(load(None, config=model.config, state_dict=model.state_dict()), model, 0)
    on_disk = to_v4(model.state_dict())
    assert_equal_outputs(load(None, config=model.config, state_dict=on_disk), model, 0)
    model.save_pretrained(tmp_path)
    other = our_model(seed=1)
    assert_equal_outputs(load(tmp_path, state_dict=other.state_dict()), other, 0)
    with pytest.raises(TypeError, match="state_dict: expected one"):
        load(None, config=model.config)
    with pytest.raises(TypeError, match="config: expected one"):
        load(None, state_dict=model.state_dict())


def test_key_mapping(tmp_path):
    model = our_model()
    named = {f"net.{key}".replace("fc1", "first"): x for key, x in model.state_dict().items()}
    mapping = {r"^net\.": "", r"mlp\.first\.": "mlp.fc1."}
    for cls in (class_of("detection"), transformers.ConditionalDetrForObjectDetection):
        config = model.config
        if cls is not class_of("detection"):
            config = transformers.ConditionalDetrConfig.from_dict(config.to_dict())
        loaded = cls.from_pretrained(
            None, config=config, state_dict=named, key_mapping=mapping
        ).eval()
        assert_equal_outputs(loaded, model)
    with pytest.raises(ValueError, match="key_mapping: expected different names"):
        class_of("detection").from_pretrained(
            None, config=model.config, state_dict=named, key_mapping={r".*": "x"}
        )


def test_loading_in_inference_mode(tmp_path):
    our_model().save_pretrained(tmp_path)
    with torch.inference_mode():
        loaded = class_of("detection").from_pretrained(tmp_path)
    loaded(torch.rand(1, 3, 64, 64)).logits.sum().backward()
    assert loaded.class_labels_classifier.bias.grad is not None


def test_device_map(tmp_path):
    model = our_model()
    model.save_pretrained(tmp_path)
    load = class_of("detection").from_pretrained
    parts = {"model": "cpu", "class_labels_classifier": "cpu", "bbox_predictor": "cpu"}
    for device_map in ("auto", "balanced", "sequential", "cpu", torch.device("cpu"), parts):
        loaded = load(tmp_path, device_map=device_map)
        assert_equal_outputs(loaded, model, 0)
        assert loaded.hf_device_map.keys() == (parts if device_map is parts else {"": 0}).keys()
    assert_equal_outputs(load(tmp_path, device_map="auto", max_memory={"cpu": "4GB"}), model, 0)
    on_disk = parts | {"bbox_predictor": "disk"}
    spread = load(tmp_path, device_map=on_disk, offload_folder=tmp_path / "offload")
    assert_equal_outputs(spread, model)  # layers with weights elsewhere compute on their own
    assert any((tmp_path / "offload").iterdir())
    spread.save_pretrained(tmp_path / "again")
    assert_equal_outputs(load(tmp_path / "again"), model, 0)
    with pytest.raises(RuntimeError, match="meta device"):
        our_model().to("meta").save_pretrained(tmp_path / "none")
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
    ours, report = class_of("detection").from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(report[key] for key in report)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert_equal_outputs(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    for cls in (class_of("detection"), transformers.ConditionalDetrForObjectDetection):
        again, report = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
        assert not any(report[key] for key in report)
        assert_equal_outputs(again.eval(), theirs)
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
    timm_named = our_model()
    fields = RESNET | {"use_timm_backbone": False}
    config = cdetr_fast.ConditionalDetrConfig(**(oracle.TINY | SMALL | fields))
    load = class_of("detection").from_pretrained
    native = load(None, config=config, state_dict=timm_named.state_dict())
    assert_equal_outputs(native, timm_named, 1e-5)
    back = load(None, config=timm_named.config, state_dict=native.state_dict())
    assert_equal_outputs(back, timm_named, 0)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    our_model().save_pretrained(tmp_path)
    (tmp_path / "ordinary").touch()
    for path in tmp_path.iterdir():
        assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode, path.name


def test_options_of_transformers_that_ask_for_nothing(tmp_path):
    model = our_model()
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
    assert_equal_outputs(class_of("detection").from_pretrained(tmp_path, **neutral), model, 0)
    for name, value in {"quantization_config": {"bits": 4}, "tp_plan": "auto"}.items():
        with pytest.raises(ValueError, match=f"{name}: expected .*None"):
            class_of("detection").from_pretrained(tmp_path, **{name: value})
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
        our_model(task, **config).save_pretrained(tmp_path / "paper")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        our_model(task, compat="transformers", **config).save_pretrained(tmp_path / "transformers")
        our_model().save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("source", ["folder", "file", "path", "object", "authors"])
def test_class_of_the_configuration(source, tmp_path):
    """As in transformers: the model's `config_class`; an object is of its own class."""
    inherit_all()  # transformers' bases make dataclasses of what is derived from them

    class OwnConfig(cdetr_fast.ConditionalDetrConfig):
        temperature: float = 1.0

    class OwnModel(cdetr_fast.ConditionalDetrForObjectDetection):
        config_class = OwnConfig

    config = OwnConfig(**(oracle.TINY | SMALL), temperature=2.0)
    config.note = "kept"
    OwnModel(config).save_pretrained(tmp_path)
    authors = tmp_path / "authors.pth"
    args = argparse.Namespace(dilation=False, nheads=8)
    torch.save({"model": to_authors(OwnModel(config).state_dict()), "args": args}, authors)
    load, place, options = {
        "folder": (OwnModel, tmp_path, {}),
        "file": (OwnModel, tmp_path / "model.safetensors", {}),
        "path": (OwnModel, tmp_path, {"config": tmp_path / "config.json"}),
        "object": (class_of("detection"), tmp_path, {"config": config}),
        "authors": (OwnModel, authors, {"temperature": 2.0}),
    }[source]
    found = load.from_pretrained(place, **options).config
    assert type(found) is OwnConfig
    assert found.temperature == 2.0
    assert source == "authors" or found.note == "kept"
    changed = load.from_pretrained(place, **(options | {"temperature": 3.0})).config
    assert (type(changed), changed.temperature, config.temperature) == (OwnConfig, 3.0, 2.0)
    with pytest.raises(TypeError, match="'temperatur'; did you mean 'temperature'"):
        load.from_pretrained(place, **options, temperatur=3.0)


def test_loading_never_fetches_backbone_weights(tmp_path, monkeypatch):
    our_model().save_pretrained(tmp_path)
    asked = []
    build = class_of("detection").__init__

    def record(self, config):
        asked.append(config.use_pretrained_backbone)
        build(self, config)

    monkeypatch.setattr(class_of("detection"), "__init__", record)
    model = class_of("detection").from_pretrained(tmp_path, use_pretrained_backbone=True)
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
    model = our_model()
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
