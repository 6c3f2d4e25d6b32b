"""Files and folders of a checkpoint, and revisions on the hub."""

import json
import os
import re

import pytest
import safetensors.torch
import torch
import transformers
from support.checkpoints import (  # fixtures
    assert_equal_outputs,
    class_of,
    our_model,
)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("shard", ["50GB", "20MB"], ids=["whole", "sharded"])
def test_file_layouts(safe, variant, shard, tmp_path):
    model = our_model()
    options = {"variant": variant, "safe_serialization": safe, "max_shard_size": shard}
    model.save_pretrained(tmp_path, **options)
    files = {path.name for path in tmp_path.iterdir()}
    assert ("50GB" in shard) == (len(files) == 2)
    loaded = class_of("detection").from_pretrained(tmp_path, variant=variant, use_safetensors=safe)
    assert_equal_outputs(loaded, model, 1e-6)
    if safe:  # transformers' own reader for the same layout
        theirs = transformers.ConditionalDetrForObjectDetection.from_pretrained(
            tmp_path, variant=variant
        )
        assert_equal_outputs(theirs.eval(), model)
    with pytest.raises(FileNotFoundError, match="expected one of "):
        class_of("detection").from_pretrained(tmp_path, variant=variant, use_safetensors=not safe)


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
        model = our_model(seed=seed)
        model.save_pretrained(tmp_path, **options)
        assert_equal_outputs(class_of("detection").from_pretrained(tmp_path), model, 1e-6)
    shards = {path.name for path in tmp_path.glob("model-*")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert shards == set(index["weight_map"].values())


@pytest.mark.parametrize("failure", ["first rename", "second rename", "while writing"])
@pytest.mark.parametrize("shard", ["50GB", "20MB"], ids=["whole", "sharded"])
def test_interrupted_write_leaves_the_old_model(failure, shard, tmp_path, monkeypatch):
    old = our_model()
    old.save_pretrained(tmp_path, max_shard_size=shard)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    new = our_model(num_queries=33)
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
    assert_equal_outputs(class_of("detection").from_pretrained(tmp_path), old, 1e-6)
    new.save_pretrained(tmp_path, max_shard_size=shard)
    assert_equal_outputs(class_of("detection").from_pretrained(tmp_path), new, 1e-6)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("fraction", [0.0, 0.5], ids=["empty", "half"])
def test_broken_file_is_named(name, fraction, tmp_path):
    our_model().save_pretrained(tmp_path, safe_serialization=name.endswith("safetensors"))
    path = tmp_path / name
    os.truncate(path, int(path.stat().st_size * fraction))
    with pytest.raises(OSError, match=re.escape(str(path)) + ": broken"):
        class_of("detection").from_pretrained(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder with config\.json"):
        class_of("detection").from_pretrained(tmp_path)
    model = our_model()
    model.config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected one of model\.safetensors, "):
        class_of("detection").from_pretrained(tmp_path)
    model.save_pretrained(tmp_path, max_shard_size="20MB")
    shard = next(tmp_path.glob("model-00002-*"))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(shard.name)):
        class_of("detection").from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no/such/model"):
        class_of("detection").from_pretrained("no/such/model")
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "alone.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config: expected one"):
        class_of("detection").from_pretrained(tmp_path / "alone.safetensors")
    with pytest.raises(NotADirectoryError, match="save_directory"):
        model.save_pretrained(tmp_path / "alone.safetensors")


def test_subfolder_and_single_file(tmp_path):
    model = our_model()
    model.save_pretrained(tmp_path / "last")
    for loaded in (
        class_of("detection").from_pretrained(tmp_path, subfolder="last"),
        class_of("detection").from_pretrained(tmp_path / "last" / "model.safetensors"),
        class_of("detection").from_pretrained(tmp_path / "last", config=tmp_path / "last"),
    ):
        assert_equal_outputs(loaded, model, 1e-6)


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
    main, dev = our_model(), our_model(num_queries=33)
    _put_in_cache(main, tmp_path, "someone/cats", "main", **options)
    _put_in_cache(dev, tmp_path, "someone/cats", "dev", **options)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    load = class_of("detection").from_pretrained
    assert_equal_outputs(load("someone/cats", **where), main, 1e-6)
    assert_equal_outputs(load("someone/cats", revision="dev", **where), dev, 1e-6)
    named = load("someone/cats", config="someone/cats", revision="dev", **where)
    assert_equal_outputs(named, dev, 1e-6)
    with pytest.raises(FileNotFoundError, match=r"someone/cats: .*no config\.json from the hub"):
        load("someone/cats", revision="gone", **where)
    with pytest.raises(FileNotFoundError, match=r"someone/cats: expected one of model\.fp16\.saf"):
        load("someone/cats", variant="fp16", **where)
    with pytest.raises(FileNotFoundError, match="someone/dogs"):
        load("someone/dogs", **where)
