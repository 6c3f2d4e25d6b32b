"""Division of sets: every image once, sizes exact, classes spread, the same again."""

import io
import json
import random
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdetr_fast import cli
from cdetr_fast.training import DataError
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.conversion import convert
from cdetr_fast.training.data.splitting import stratified

FRACTIONS = ([0.8, 0.1, 0.1], [0.7, 0.3], [0.5, 0.25, 0.25], [0.9, 0.0, 0.1], [1 / 3] * 3)


@settings(max_examples=150, deadline=None)
@given(
    classes=st.lists(st.sets(st.integers(0, 6), max_size=4), min_size=3, max_size=80),
    fractions=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 3),
)
def test_parts_have_their_sizes(classes, fractions, seed):
    parts = stratified(classes, fractions, seed)
    counts = np.bincount(parts, minlength=len(fractions))
    assert counts.sum() == len(classes)
    for count, fraction in zip(counts, fractions, strict=True):
        assert (count == 0) == (fraction == 0)
        assert abs(count - fraction * len(classes)) < 2
    assert np.array_equal(parts, stratified(classes, fractions, seed))


def test_every_class_is_divided_as_the_images_are():
    rng = random.Random(0)
    chances = [0.9, 0.5, 0.2, 0.1, 0.05]
    classes = [{k for k, p in enumerate(chances) if rng.random() < p} for _ in range(1000)]
    parts = stratified(classes, [0.8, 0.1, 0.1], 0)
    for label in range(len(chances)):
        own = [part for part, found in zip(parts, classes, strict=True) if label in found]
        shares = np.bincount(own, minlength=3) / len(own)
        assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    assert not np.array_equal(parts, stratified(classes, [0.8, 0.1, 0.1], 1))


def coco(folder, count=40, panoptic=False):
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i in range(count):
        images.append({"id": 100 + i, "file_name": f"{i}.png", "width": 40, "height": 30, "x": i})
        labels = [2] if i % 10 == 0 else [5, 5] if i % 3 else []
        items = [
            {"id": 1000 * i + k, "category_id": c, "bbox": rng.uniform(1, 9, 4).tolist(), "area": 4}
            for k, c in enumerate(labels, 1)
        ]
        if panoptic:
            entry = {"image_id": 100 + i, "file_name": f"{i}.png", "segments_info": items}
            annotations.append(entry)
        else:
            annotations += [item | {"image_id": 100 + i, "note": "kept"} for item in items]
    Image.new("RGB", (40, 30)).save(folder / "0.png")
    categories = [{"id": 2, "name": "rare"}, {"id": 5, "name": "common"}]
    content = {"info": {"year": 2026}, "licenses": [], "images": images}
    content |= {"annotations": annotations, "categories": categories}
    path = folder / "all.json"
    path.write_text(json.dumps(content))
    return path, content


@pytest.mark.parametrize("panoptic", [False, True])
def test_coco_files(tmp_path, panoptic):
    path, content = coco(tmp_path, panoptic=panoptic)
    written = convert("coco", path, tmp_path / "out", [0.8, 0.1, 0.1], seed=3)
    assert list(written) == ["train", "val", "test"]
    parts = {name: json.loads(file.read_text()) for name, file in written.items()}
    assert [len(part["images"]) for part in parts.values()] == [32, 4, 4]
    for key, number in (("images", "id"), ("annotations", "image_id")):
        joined = [item for part in parts.values() for item in part[key]]
        assert sorted(joined, key=lambda x: (x[number], x.get("id", 0))) == content[key]
    for part in parts.values():
        assert part["info"] == {"year": 2026}
        assert part["categories"] == content["categories"]
        own = {image["id"] for image in part["images"]}
        assert {item["image_id"] for item in part["annotations"]} <= own
    if not panoptic:
        assert sum(read_coco(file, tmp_path).num_objects for file in written.values()) == len(
            content["annotations"]
        )
        labels = {k: read_coco(v, tmp_path).labels for k, v in written.items()}
        rare = {k: int((v == 0).sum()) for k, v in labels.items()}
        assert rare == {"train": 3, "val": 1, "test": 0}  # of 4 images

    # The order in the file does not matter, and neither does the run.
    shuffled = content | {k: content[k][::-1] for k in ("images", "annotations")}
    path.write_text(json.dumps(shuffled))
    for name, file in convert("coco", path, tmp_path / "again", [0.8, 0.1, 0.1], seed=3).items():
        again = {image["id"] for image in json.loads(file.read_text())["images"]}
        assert again == {image["id"] for image in parts[name]["images"]}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ([0.8], "split: expected two or three fractions"),
        ([0.8, 0.1], "add up to 1, got 0.8 0.1"),
        ([0.4, 0.3, 0.2, 0.1], "split: expected two or three"),
        ([0.0, 1.0], "split: expected"),
        ([1.5, -0.5], "split: expected"),
        ([0.8, float("nan"), 0.1], "split: expected"),
        ([], "split: expected fractions for a COCO file"),
    ],
)
def test_fractions_that_are_none(tmp_path, fractions, message):
    path, _ = coco(tmp_path)
    with pytest.raises(DataError, match=message):
        convert("coco", path, tmp_path / "out", fractions)
    assert not (tmp_path / "out").exists()


def test_sets_that_cannot_be_divided(tmp_path):
    path, content = coco(tmp_path, count=2)
    with pytest.raises(DataError, match="at least one image for each part, got 2 images"):
        convert("coco", path, tmp_path / "out", [0.8, 0.1, 0.1])
    content["annotations"][0]["image_id"] = 9
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"all.json: image 9 of an annotation is not in the file"):
        convert("coco", path, tmp_path / "out", [0.5, 0.5])
    content["annotations"][0]["category_id"] = "x"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"image 9, annotation 1: category_id: expected a whole"):
        convert("coco", path, tmp_path / "out", [0.5, 0.5])


def test_the_file_itself_is_not_overwritten(tmp_path):
    path, _ = coco(tmp_path)
    path = path.rename(tmp_path / "instances_train.json")
    before = path.read_text()
    with pytest.raises(DataError, match="is the file to divide; name another folder"):
        convert("coco", path, tmp_path, [0.8, 0.2])
    assert path.read_text() == before
    assert not (tmp_path / "instances_val.json").exists()


def test_yolo_and_voc_sets_without_splits(tmp_path):
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for i in range(10):
        Image.new("RGB", (40, 30)).save(tmp_path / "images" / f"{i}.png")
        (tmp_path / "labels" / f"{i}.txt").write_text(f"{i % 2} .5 .5 .2 .2")
    (tmp_path / "data.yaml").write_text("names: [a, b]\ntrain: images")
    written = convert("yolo", tmp_path, tmp_path / "out", [0.8, 0.2])
    counts = {k: len(json.loads(v.read_text())["images"]) for k, v in written.items()}
    assert counts == {"train": 8, "val": 2}
    labels = [a["category_id"] for a in json.loads(written["val"].read_text())["annotations"]]
    assert sorted(labels) == [1, 2]
    (tmp_path / "data.yaml").write_text("names: [a, b]\ntrain: images\nval: images")
    with pytest.raises(DataError, match="is divided already, into train, val"):
        convert("yolo", tmp_path, tmp_path / "out", [0.8, 0.2])


def test_images_are_looked_for_before_anything_is_written(tmp_path, capsys):
    (tmp_path / "labels").mkdir()
    path, _ = coco(tmp_path / "labels")
    elsewhere = path.rename(tmp_path / "alone.json")
    words = ["convert", "coco", str(elsewhere), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--split", "0.8", "0.2"])
    assert ended.value.code == 1
    assert "images of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_paths_with_letters_that_stdout_lacks(tmp_path, monkeypatch):
    path, _ = coco(tmp_path)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    with pytest.raises(SystemExit) as ended:
        cli.main(
            ["convert", "coco", str(path), "--output", str(tmp_path / "ü"), "--split", "0.8", "0.2"]
        )
    assert ended.value.code in (0, None)
    stdout.flush()
    assert rb"/\xfc/instances_train.json" in stdout.buffer.getvalue()


def test_command(tmp_path, capsys):
    path, _ = coco(tmp_path)
    out = tmp_path / "out"
    words = ["convert", "coco", str(path), "--output", str(out), "--split", "0.8", "0.1", "0.1"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--seed", "1"])
    assert ended.value.code in (0, None)
    printed = capsys.readouterr().out
    assert "train: 32 images" in printed
    assert (
        f"--train-annotations {out / 'instances_train.json'} --train-images {tmp_path}" in printed
    )
