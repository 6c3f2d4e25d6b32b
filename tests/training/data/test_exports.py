"""Folders as Roboflow exports them go into training as they are: COCO, YOLO, VOC."""

import json

import numpy as np
import pytest
from PIL import Image

from cdetr_fast.training import DataError, TrainingConfig
from cdetr_fast.training.data.conversion import convert
from cdetr_fast.training.data.dataset import read_image
from cdetr_fast.training.data.exports import COCO_NAME, read_set
from cdetr_fast.training.setup import read_data

WIDTH, HEIGHT = 40, 30
COUNTS = {"train": 3, "valid": 2, "test": 1}
BOX = [10, 6, 20, 12]  # left, top, width, height
VOC = """<annotation><folder></folder><filename>{}</filename><path>{}</path>
<size><width>40</width><height>30</height><depth>3</depth></size>
<object><name>{}</name><truncated>0</truncated><difficult>0</difficult>
<bndbox><xmin>11</xmin><xmax>30</xmax><ymin>7</ymin><ymax>18</ymax></bndbox></object></annotation>"""


def write_export(root, kind, placeholder="cells"):
    """Write an export; classes are "cell" in even images and "dot" in odd ones."""
    for split, count in COUNTS.items():
        folder = root / split
        images = folder / "images" if kind == "yolo" else folder
        images.mkdir(parents=True)
        coco = {"info": {}, "licenses": [], "images": [], "annotations": []}
        for i in range(count):
            name = f"{split}_{i}_jpg.rf.0123.jpg"
            Image.new("RGB", (WIDTH, HEIGHT)).save(images / name)
            label = i % 2
            if kind == "voc":
                (folder / name).with_suffix(".xml").write_text(
                    VOC.format(name, name, ("cell", "dot")[label])
                )
            elif kind == "yolo":
                (folder / "labels").mkdir(exist_ok=True)
                (folder / "labels" / name).with_suffix(".txt").write_text(f"{label} .5 .4 .5 .4")
            coco["images"].append({"id": i, "file_name": name, "width": WIDTH, "height": HEIGHT})
            coco["annotations"].append(
                {"id": i, "image_id": i, "category_id": label + 1, "bbox": BOX, "area": 240,
                 "segmentation": [], "iscrowd": 0}
            )  # fmt: skip
        if kind == "coco":
            names = (placeholder, "cell", "dot")
            coco["categories"] = [
                {"id": k, "name": n, "supercategory": placeholder if k else "none"}
                for k, n in enumerate(names)
            ]
            (folder / COCO_NAME).write_text(json.dumps(coco))
    if kind == "yolo":
        (root / "data.yaml").write_text(
            "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n"
            "nc: 2\nnames: ['cell', 'dot']\nroboflow:\n  workspace: x\n"
        )
    return root


@pytest.fixture(params=["coco", "yolo", "voc"])
def export(request, tmp_path):
    return write_export(tmp_path / "export", request.param)


@pytest.mark.parametrize("by", ["root", "split"])
def test_training_takes_the_folder(export, by):
    values = {"train_annotations": str(export)}
    if by == "split":
        values = {
            "train_annotations": str(export / "train"),
            "val_annotations": str(export / "valid"),
        }
    train, val, reports = read_data(TrainingConfig(**values))
    assert (len(train), len(val)) == (3, 2)
    assert train.classes == val.classes == ("cell", "dot")
    assert [report.bad for report in reports] == [{}, {}]
    for index in (train, val):
        assert index.boxes_xywh.tolist() == [BOX] * len(index)
        assert index.labels.tolist() == [0, 1, 0][: len(index)]
        assert read_image(index, 1).shape == (3, HEIGHT, WIDTH)


def test_a_test_split_is_read_for_evaluation(export):
    index = read_set(export / "test")
    assert len(index) == 1
    with pytest.raises(DataError, match=r"expected the folder of one split, such as .*test"):
        read_set(export)


@pytest.mark.parametrize("placeholder", ["cells", "cell"])
def test_the_placeholder_category_is_left_out(tmp_path, placeholder):
    """It is often named like a class, and names must be unique."""
    root = write_export(tmp_path / "export", "coco", placeholder)
    assert read_set(root / "train").classes == ("cell", "dot")
    path = root / "train" / COCO_NAME
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 0  # in use: it is a class
    path.write_text(json.dumps(content))
    if placeholder == "cell":
        with pytest.raises(DataError, match="category name 'cell' comes twice"):
            read_set(root / "train")
    else:
        assert read_set(root / "train").classes == ("cells", "cell", "dot")


def test_a_lone_training_split(tmp_path):
    root = write_export(tmp_path / "export", "coco")
    for name in ("valid", "test"):
        (root / name).rename(tmp_path / name)
    train, val, _ = read_data(TrainingConfig(train_annotations=str(root)))
    assert (len(train), val) == (3, None)
    with pytest.raises(DataError, match="export: expected a folder for split 'val'"):
        read_set(root, split="val")
    written = convert("coco", root / "train", tmp_path / "out", [0.6, 0.4])
    assert {k: len(json.loads(v.read_text())["images"]) for k, v in written.items()} == {
        "train": 2, "val": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("val", "count"), [("images/val", 2), ("[images/val]", 2), ("val.txt", 2), ("", None)]
)
def test_folders_that_data_yaml_names(tmp_path, val, count):
    """Ultralytics: images/train, not train/images."""
    for split, number in (("train", 3), ("val", 2)):
        images, labels = tmp_path / "images" / split, tmp_path / "labels" / split
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for i in range(number):
            Image.new("RGB", (WIDTH, HEIGHT)).save(images / f"{i}.jpg")
            (labels / f"{i}.txt").write_text(f"{i % 2} .5 .4 .5 .4")
    (tmp_path / "val.txt").write_text("images/val/0.jpg\nimages/val/1.jpg\n")
    (tmp_path / "data.yaml").write_text(f"train: images/train\nval: {val}\nnames: [cell, dot]\n")
    train, found, _ = read_data(TrainingConfig(train_annotations=str(tmp_path)))
    assert (len(train), train.labels.tolist()) == (3, [0, 1, 0])
    assert (found and len(found)) == count


def test_conversion_of_the_same_layouts(tmp_path):
    for kind in ("yolo", "voc"):
        written = convert(kind, write_export(tmp_path / kind, kind), tmp_path / f"{kind}_out")
        assert list(written) == ["train", "val", "test"]
        content = json.loads(written["val"].read_text())
        assert [item["bbox"] for item in content["annotations"]] == [BOX] * 2
        assert (tmp_path / kind / content["images"][0]["file_name"]).is_file()


def test_other_folders_are_refused(tmp_path):
    (tmp_path / "train").mkdir()
    for path in (tmp_path, tmp_path / "train"):
        with pytest.raises(DataError, match=r"expected a COCO JSON file, or a folder of Roboflow"):
            read_data(TrainingConfig(train_annotations=str(path)))
    root = write_export(tmp_path / "export", "voc")
    for path in (root / "valid").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="expected images in split 'val', got none"):
        read_data(TrainingConfig(train_annotations=str(root)))


def test_polygons_of_an_export_are_masks(tmp_path):
    root = write_export(tmp_path / "export", "yolo")
    for path in root.glob("*/labels/*.txt"):
        path.write_text("0 .25 .2 .75 .2 .75 .6 .25 .6")
    index = read_set(root / "train", segments=True)
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[6:18, 10:30] = True
    assert np.array_equal(index.mask(0, 0).numpy(), expected)
