"""Shards: what is written comes back, the same order in each run, split among processes."""

import io
import json
import re
import sys
import tarfile
from types import SimpleNamespace

import pytest
import torch

from cdetr_fast.cli import main
from cdetr_fast.training import DataError, TrainingConfig, TrainingStopped, train
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.dataset import DetectionDataset
from cdetr_fast.training.data.sampling import ImageRequest
from cdetr_fast.training.data.shards import read_shard, read_shards, write_shards
from cdetr_fast.training.run.log import read_rows
from cdetr_fast.training.setup import training_loader


@pytest.fixture(scope="module")
def shards(scenes, tmp_path_factory):
    """The 14 scenes in shards of 4."""
    folder = tmp_path_factory.mktemp("shards")
    source = scenes / "train" / "annotations.json"
    with pytest.raises(SystemExit, match="0"):
        main(["convert", "shards", str(source), "--output", str(folder), "--images-per-shard", "4"])
    return folder


@pytest.fixture
def batches(settings, shards):
    """Batches of one process in one epoch."""

    def make(rank=0, processes=1, epoch=0, step=0, **changes):
        values = {"train_annotations": str(shards / "shards.json"), "batch_size": 2}
        config = TrainingConfig(**settings(**(values | changes)))
        where = SimpleNamespace(
            process_index=rank, num_processes=processes, device=torch.device("cpu")
        )
        stream, loader = training_loader(config, read_shards(config.train_annotations), where)
        stream.start_at(epoch, step)
        return list(loader)

    return make


def same(one, other):
    assert one.image_ids == other.image_ids
    assert torch.equal(one.pixels, other.pixels)
    for a, b in zip(one.labels, other.labels, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("class_labels", "boxes"))


def test_images_and_boxes_are_those_of_the_json_file(scenes, shards):
    index = read_coco(scenes / "train" / "annotations.json")
    found = read_shards(str(shards / "shards.json"))
    assert (len(found), found.classes, found.images) == (14, index.classes, [4, 4, 4, 2])
    assert found.num_objects == index.num_objects
    dataset = DetectionDataset(index, lambda sample, *seeds: sample)
    place = {int(image): i for i, image in enumerate(index.image_ids)}
    seen = []
    for name in found.names:
        for sample in read_shard(found.place + name):
            content = json.loads(sample["json"])
            image = place[content["image_id"]]
            seen.append(image)
            assert sample["png"] == index.image_path(image).read_bytes()
            labels = [found.label_of[o["category_id"]] for o in content["annotations"]]
            expected = dataset[ImageRequest(image, (0,), (0,))]["label"]
            assert labels == expected["class_labels"].tolist()
    assert sorted(seen) == list(range(14))
    assert seen != sorted(seen)


def test_labels_are_those_of_the_json_file(scenes, batches):
    """Through the stream, without augmentation."""
    index = read_coco(scenes / "train" / "annotations.json")
    dataset = DetectionDataset(index, lambda sample, *seeds: sample)
    place = {int(image): i for i, image in enumerate(index.image_ids)}
    plain = {"flip_probability": 0.0, "crop_probability": 0.0, "scales": [64]}
    for batch in batches(**plain):
        for image, label in zip(batch.image_ids, batch.labels, strict=True):
            expected = dataset[ImageRequest(place[image], (0,), (0,))]["label"]
            assert torch.equal(label["class_labels"], expected["class_labels"])
            torch.testing.assert_close(label["boxes"], expected["boxes"])


@pytest.mark.parametrize("workers", [0, 2])
def test_order(batches, workers):
    """The same again, another in the next epoch, and resumable in the middle."""
    options = {"num_workers": workers, "accumulate": 1 + workers // 2}
    whole = batches(**options)
    assert len(whole) == -(-14 // (2 * options["accumulate"])) * options["accumulate"]
    ids = [i for batch in whole for i in batch.image_ids]
    assert len(set(ids)) >= 12
    for one, other in zip(batches(**options), whole, strict=True):
        same(one, other)
    rest = batches(step=2, **options)
    for one, other in zip(rest, whole[2 * options["accumulate"] :], strict=True):
        same(one, other)
    later = [i for batch in batches(epoch=1, **options) for i in batch.image_ids]
    assert later != ids


def test_processes_share_the_shards(batches):
    """As many steps each, other images each, and together about all."""
    parts = [batches(rank=rank, processes=2) for rank in range(2)]
    assert [len(part) for part in parts] == [4, 4]
    first, second = ({i for batch in part for i in batch.image_ids} for part in parts)
    assert not first & second
    assert len(first | second) >= 12


def test_trains_and_resumes_bitwise(settings, shards, tmp_path, monkeypatch):
    from cdetr_fast.training.step import TrainingStep

    options = {
        "train_annotations": str(shards / "shards.json"),
        "num_workers": 1,
        "save_every": 1,
        "epochs": 1,
    }
    whole = TrainingConfig(**settings(**options, output=str(tmp_path / "whole")))
    assert train(whole)["step"] == 4
    original = TrainingStep.__call__

    def crash(self, number, *args):
        if number == 2:
            raise RuntimeError("crash")
        original(self, number, *args)

    monkeypatch.setattr(TrainingStep, "__call__", crash)
    broken = settings(**options, output=str(tmp_path / "broken"))
    with pytest.raises(RuntimeError, match="crash"):
        train(TrainingConfig(**broken))
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"loading workers: 1 before, 2 now"):
        train(TrainingConfig(**(broken | {"resume": True, "num_workers": 2})))
    train(TrainingConfig(**(broken | {"resume": True})))
    losses = [
        [row["loss"] for row in read_rows(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]
    card = (tmp_path / "whole" / "model" / "README.md").read_text()
    assert "| shards.json | 14 |" in card


def rewrite(path, change):
    """Writes a tar file again, its members `{name: bytes}` changed."""
    with tarfile.open(path) as tar:
        members = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def copies(shards, tmp_path):
    folder = tmp_path / "copies"
    folder.mkdir()
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def damage_json(members):
    members[min(n for n in members if n.endswith("json"))] = b"{"


def damage_image(members):
    members[min(n for n in members if n.endswith("png"))] = b"no image"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_json, r"train-000001.tar: sample 000000004: expected an image and a json"),
        (damage_image, r"train-000001.tar: sample 000000004 \(image id \d+\): cannot be read"),
        (None, r"train-000001.tar: cannot be read to its end"),
    ],
)
def test_broken_samples_are_named(settings, batches, copies, change, message):
    victim = next(copies.glob("*-000001.tar"))
    victim.rename(copies / "train-000001.tar")
    index = json.loads((copies / "shards.json").read_text())
    index["shards"][1]["name"] = "train-000001.tar"
    (copies / "shards.json").write_text(json.dumps(index))
    if change is None:
        content = (copies / "train-000001.tar").read_bytes()
        (copies / "train-000001.tar").write_bytes(content[:700])
    else:
        rewrite(copies / "train-000001.tar", change)
    found = batches(train_annotations=str(copies / "shards.json"))
    failures = [failure for batch in found for failure in batch.failures]
    assert re.search(message, failures[0])
    assert len(found) == 7
    if change is None:
        options = settings(train_annotations=str(copies / "shards.json"), epochs=1)
        with pytest.raises(TrainingStopped, match=message):
            train(TrainingConfig(**options))


def test_patterns_and_what_is_missing(copies, monkeypatch):
    names = sorted(path.name for path in copies.glob("*.tar"))
    stem = names[0].removesuffix("000000.tar")
    some = read_shards(f"{copies}/{stem}{{000001..000002}}.tar")
    assert (some.names, len(some)) == (names[1:3], 8)
    assert read_shards(f"file:{copies}/{names[0]}").images == [4]
    with pytest.raises(DataError, match=r"000009.tar: expected one of the 4 shards of"):
        read_shards(f"{copies}/{stem}000009.tar")
    (copies / names[1]).unlink()
    with pytest.raises(DataError, match=rf"{names[1]}: 1 of 4 shards of .* are missing"):
        read_shards(str(copies / "shards.json"))
    with pytest.raises(DataError, match=r"nowhere/shards.json: expected the index"):
        read_shards("nowhere/shards.json")
    index = json.loads((copies / "shards.json").read_text())
    index["shards"][0]["name"] = "pipe:touch hacked"
    (copies / "shards.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="plain names"):
        read_shards(str(copies / "shards.json"))
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match=r"need webdataset: pip install 'cdetr-fast\[train\]'"):
        read_shards(str(copies / "shards.json"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: [], r"shards.json: expected a mapping, got \[\]"),
        (
            lambda c: c | {"shards": [3]},
            r"shards\[0\]: expected a mapping, got 3; write the shards again",
        ),
        (
            lambda c: c | {"shards": [{"name": "a.tar", "images": "4"}]},
            r"shards\[0\].images: expected a whole",
        ),
        (
            lambda c: c | {"categories": [{"id": [1], "name": "x"}]},
            r"categories\[0\].id: expected a whole number, got \[1\]",
        ),
        (
            lambda c: c | {"categories": [{"id": 1}]},
            r"categories\[0\].name: expected text, got nothing",
        ),
        (lambda c: c | {"categories": []}, "expected the index"),
    ],
)
def test_broken_index(copies, change, message):
    path = copies / "shards.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(DataError, match=message) as caught:
        read_shards(str(path))
    assert f"{path}: expected the index that `cdetr-fast convert shards`" in str(caught.value)


def test_broken_pattern(copies):
    with pytest.raises(DataError, match=r"train-\{0\.\.: expected a pattern as train-\{000000"):
        read_shards(f"{copies}/train-{{0..")


def test_too_few_shards(batches):
    with pytest.raises(DataError, match="at least one shard for each loading process, 3 x 2, got"):
        batches(processes=3, num_workers=2)


def test_equal_sets_make_equal_files(scenes, shards, tmp_path):
    write_shards(scenes / "train" / "annotations.json", tmp_path, images_per_shard=4)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (shards / path.name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 5
