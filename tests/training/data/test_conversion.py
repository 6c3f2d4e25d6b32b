"""Pascal VOC and YOLO folders become COCO files that training reads; boxes worked out by hand."""

import json
import shutil

import pytest
from PIL import Image

from cdetr_fast.training import DataError
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.conversion import convert, image_folder
from cdetr_fast.training.data.dataset import DetectionDataset
from cdetr_fast.training.data.label_checks import check_labels
from cdetr_fast.training.data.sampling import ImageRequest
from cdetr_fast.training.data.transforms import EvaluationTransform

OBJECT = """<object><name>{}</name><truncated>{}</truncated><difficult>{}</difficult>
<bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox>
<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox>
</part></object>"""
FILE = """<annotation><filename>{}</filename>
<size><width>40</width><height>30</height><depth>3</depth></size>{}</annotation>"""


def content(path):
    return json.loads(path.read_text())


def boxes(path):
    """Of each image: file name, and its objects as class, box and crowd."""
    coco = content(path)
    names = {c["id"]: c["name"] for c in coco["categories"]}
    result = {image["file_name"]: [] for image in coco["images"]}
    files = {image["id"]: image["file_name"] for image in coco["images"]}
    for item in coco["annotations"]:
        row = (names[item["category_id"]], item["bbox"], item["iscrowd"])
        result[files[item["image_id"]]].append(row)
    return result


def items(path, images):
    """Return the checked items that training makes of the images of a file."""
    index, report = check_labels(read_coco(path, images))
    dataset = DetectionDataset(index, EvaluationTransform({"shortest_edge": 30}))
    return [dataset[ImageRequest(i, (0,), (0,), True)] for i in range(len(index))], report


@pytest.fixture
def voc(tmp_path):
    """Two photographs: one with a whole, a truncated and a difficult object; one with none."""
    folder = tmp_path / "voc"
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    objects = (
        OBJECT.format("dog", 0, 0, 1, 1, 40, 30),  # the whole image, counted from 1
        OBJECT.format("cat", 1, 0, 11, 6, 20, 10),
        OBJECT.format("dog", 0, 1, 3, 4, 3, 4),  # one pixel
    )
    files = {"a": FILE.format("a.jpg", "".join(objects)), "b": FILE.format("other.png", "")}
    for stem, text in files.items():
        (folder / "Annotations" / f"{stem}.xml").write_text(text)
        Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / f"{stem}.jpg")
    lists = folder / "ImageSets" / "Main"
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "small_val.txt").write_text("a\n")
    (lists / "dog_train.txt").write_text("a  1\nb -1\n")
    return folder


def test_voc(voc, tmp_path):
    written = convert("voc", voc, tmp_path / "coco")
    assert set(written) == {"train", "small_val"}
    assert written["train"] == tmp_path / "coco" / "instances_train.json"
    assert boxes(written["train"]) == {
        "a.jpg": [
            ("dog", [0, 0, 40, 30], 0),
            ("cat", [10, 5, 10, 5], 0),
            ("dog", [2, 3, 1, 1], 1),  # difficult: ignored in evaluation, not trained on
        ],
        "b.jpg": [],  # the file's own name, not the one that the annotation gives
    }
    coco = content(written["train"])
    assert coco["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    assert [a["area"] for a in coco["annotations"]] == [1200, 50, 1]
    assert [a["id"] for a in coco["annotations"]] == [1, 2, 3]
    assert content(written["small_val"])["categories"] == coco["categories"]

    (first, second), report = items(written["train"], image_folder("voc", voc))
    assert report.bad == {}
    assert report.notes["crowds, not trained on, ids"] == [3]
    assert first["label"]["class_labels"].tolist() == [1, 0]
    assert first["label"]["boxes"].tolist() == [
        pytest.approx([0.5, 0.5, 1, 1]),
        pytest.approx([0.375, 0.25, 0.25, 1 / 6]),
    ]
    assert second["label"]["boxes"].shape == (0, 4)


def test_voc_without_lists(voc, tmp_path):
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    written = convert("voc", voc, tmp_path)
    assert list(written) == ["all"]
    assert list(boxes(written["all"])) == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize(
    ("annotations", "images"), [("annotations", "images"), ("Annotations", "images"), (".", ".")]
)
def test_voc_in_other_folders(voc, tmp_path, annotations, images):
    """As on Kaggle, and as labelling tools write it: one folder with images and XML files."""
    expected = [*boxes(convert("voc", voc, tmp_path / "first")["train"]).values()]
    folder = tmp_path / "other"
    for old, new in (("Annotations", annotations), ("JPEGImages", images)):
        shutil.copytree(voc / old, folder / new, dirs_exist_ok=True)
    written = convert("voc", folder, tmp_path / "coco", split=(0.5, 0.5))
    assert sorted(written) == ["train", "val"]
    found = boxes(written["train"]) | boxes(written["val"])
    assert [found["a.jpg"], found["b.jpg"]] == expected
    place = image_folder("voc", folder)
    assert place == folder / images
    loaded, _ = items(written["train"], place)
    assert len(loaded) == 1


def test_an_undivided_set_names_the_way_to_divide_it(voc, tmp_path, run):
    shutil.rmtree(voc / "ImageSets")
    done = run("convert", "voc", voc, "--output", tmp_path / "coco")
    assert done.code == 0, done.err
    assert done.out.splitlines() == [
        "all: 2 images, 3 objects",
        "not divided: --split 0.8 0.2 writes a file to train on and one to validate on",
    ]
    done = run("train", "--train-annotations", voc, "--output", tmp_path / "run")
    assert done.code == 1
    assert f"cdetr-fast convert voc {voc} --output annotations --split 0.8 0.2" in done.err


def test_voc_image_is_missing(voc, tmp_path):
    """The annotation is enough to convert; training tells which image it lacks."""
    (voc / "JPEGImages" / "a.jpg").unlink()
    written = convert("voc", voc, tmp_path)
    with pytest.raises(DataError, match=r"1 images without a file in .*JPEGImages, ids \(1\)"):
        items(written["train"], image_folder("voc", voc))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("</annotation>", "", r"a.xml: expected an annotation of Pascal VOC .*no element found"),
        (
            "<width>40</width>",
            "",
            r"a.xml: size.width: expected a whole .*, got nothing",
        ),
        (
            "<width>40</width>",
            "<width>wide</width>",
            r"a.xml: size.width: expected a whole number of pixels, got 'wide'",
        ),
        (
            "<name>cat</name>",
            "",
            r"a.xml: object\[1\].name: expected the name of a class, got nothing",
        ),
        ("<xmax>20</xmax>", "", r"a.xml: object\[1\].bndbox.xmax: expected a number of .*nothing"),
        (
            "<xmax>20</xmax>",
            "<xmax>x</xmax>",
            r"a.xml: object\[1\].bndbox.xmax: expected a number of .*got 'x'",
        ),
    ],
)
def test_broken_xml(voc, tmp_path, old, new, message):
    path = voc / "Annotations" / "a.xml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=message):
        convert("voc", voc, tmp_path / "coco")
    assert not (tmp_path / "coco").exists()


def test_inverted_voc_box_is_found_by_the_label_check(voc, tmp_path):
    path = voc / "Annotations" / "a.xml"
    path.write_text(path.read_text().replace("<xmax>20</xmax>", "<xmax>5</xmax>"))
    written = convert("voc", voc, tmp_path / "coco")
    with pytest.raises(DataError, match=r"negative width or height, annotation ids \(2\)"):
        items(written["train"], image_folder("voc", voc))


def test_voc_folder_lacks_something(voc, tmp_path):
    (voc / "ImageSets" / "Main" / "train.txt").write_text("a\nnone\n")
    with pytest.raises(DataError, match=r"none.xml: .*No such file"):
        convert("voc", voc, tmp_path)
    with pytest.raises(DataError, match="expected the folders Annotations and JPEGImages"):
        convert("voc", tmp_path, tmp_path)
    with pytest.raises(DataError, match="source: expected a folder, got nowhere"):
        convert("voc", "nowhere", tmp_path)
    with pytest.raises(DataError, match="kind: expected 'voc', 'yolo' or 'coco', got 'kitti'"):
        convert("kitti", voc, tmp_path)
    (voc / "ImageSets" / "Main" / "train.txt").write_text("b\n")
    (voc / "ImageSets" / "Main" / "small_val.txt").unlink()
    with pytest.raises(DataError, match="expected annotations with objects, got none"):
        convert("voc", voc, tmp_path)


@pytest.fixture
def yolo(tmp_path):
    """A train split with a box, a polygon, an empty label file and none; a val split."""
    folder = tmp_path / "yolo"
    for split, stems in (("train", "abc"), ("val", "d")):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for stem in stems:
            Image.new("RGB", (40, 30)).save(folder / "images" / split / f"{stem}.png")
    labels = folder / "labels"
    (labels / "train" / "a.txt").write_text(
        "1 0.5 0.5 0.25 0.2\n\n0 0.1 0.2 0.6 0.1 0.3 0.9 0.2 0.4\n"
    )
    (labels / "train" / "b.txt").write_text("")
    (labels / "val" / "d.txt").write_text("1.0 0.25 0.5 0.5 1\n")
    (folder / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\ntest:\nnames:\n  0: dog\n  1: cat\n"
    )
    return folder


def test_yolo(yolo, tmp_path):
    written = convert("yolo", yolo, tmp_path / "coco")
    assert set(written) == {"train", "val"}
    assert boxes(written["train"]) == {
        "images/train/a.png": [
            ("cat", [15, 12, 10, 6], 0),
            ("dog", [4, 3, 20, 24], 0),  # x from 0.1 to 0.6, y from 0.1 to 0.9
        ],
        "images/train/b.png": [],
        "images/train/c.png": [],
    }
    assert boxes(written["val"]) == {"images/val/d.png": [("cat", [0, 0, 20, 30], 0)]}
    categories = [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert content(written["train"])["categories"] == categories
    found, report = items(written["train"], image_folder("yolo", yolo))
    assert report.bad == {}
    assert report.notes["images without objects, ids"] == [2, 3]
    assert found[0]["label"]["class_labels"].tolist() == [1, 0]
    assert found[0]["label"]["boxes"].tolist() == [
        pytest.approx([0.5, 0.5, 0.25, 0.2]),
        pytest.approx([0.35, 0.5, 0.5, 0.8]),
    ]


@pytest.mark.parametrize(
    "settings",
    [
        "train: ../images/train\nval: [images/val]\nnames: [dog, cat]",
        "train: train.txt\nval: images/val\nnames: [dog, cat]",
        "path: /nowhere\ntrain: images/train\nval: images/val\nnames: [dog, cat]",
    ],
)
def test_yolo_settings(yolo, tmp_path, settings):
    expected = {k: boxes(v) for k, v in convert("yolo", yolo, tmp_path / "one").items()}
    (yolo / "train.txt").write_text("".join(f"images/train/{stem}.png\n" for stem in "abc"))
    (yolo / "data.yaml").write_text(settings)
    found = convert("yolo", yolo, tmp_path / "two")
    assert {k: boxes(v) for k, v in found.items()} == expected


def test_yolo_classes_with_gaps(yolo, tmp_path):
    settings = yolo / "data.yaml"
    settings.write_text(settings.read_text().replace("1: cat", "7: cat"))
    for name in ("train/a.txt", "val/d.txt"):
        path = yolo / "labels" / name
        path.write_text("7" + path.read_text()[1:])
    written = convert("yolo", yolo, tmp_path / "coco")
    assert [c["name"] for c in content(written["train"])["categories"]] == ["dog", "cat"]
    assert boxes(written["train"])["images/train/a.png"][0][0] == "cat"


def test_byte_order_marks(yolo, tmp_path):
    """Editors on Windows write them."""
    plain = convert("yolo", yolo, tmp_path)["train"].read_text()
    labels = yolo / "labels" / "train" / "a.txt"
    labels.write_text(labels.read_text(), "utf-8-sig")
    assert convert("yolo", yolo, tmp_path)["train"].read_text() == plain


def test_yolo_labels_are_on_the_turned_photograph(yolo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (40, 30)).save(yolo / "images" / "train" / "a.png", exif=exif)
    written = convert("yolo", yolo, tmp_path / "coco")
    assert boxes(written["train"])["images/train/a.png"][0] == ("cat", [11.25, 16, 7.5, 8], 0)
    found, _ = items(written["train"], image_folder("yolo", yolo))
    assert found[0]["orig_size_hw"] == (40, 30)
    assert found[0]["label"]["boxes"][0].tolist() == pytest.approx([0.5, 0.5, 0.25, 0.2])


@pytest.mark.parametrize(
    "line",
    [
        "2 0.5 0.5 0.2 0.2",
        "-1 0.5 0.5 0.2 0.2",
        "0.5 0.5 0.5 0.2 0.2",
        "dog 0.5 0.5 0.2 0.2",
        "0 0.5 0.5 0.2",
        "0 0.5 0.5 0.2 0.2 0.9",
        "0 0.5 nan 0.2 0.2",
        "0 20 15 10 6",
        "0",
    ],
)
def test_bad_yolo_lines(yolo, tmp_path, line):
    (yolo / "labels" / "train" / "b.txt").write_text(f"0 0.5 0.5 0.2 0.2\n{line}\n")
    with pytest.raises(DataError, match=r"b.txt, line 2: expected class \(0 to 1\)") as caught:
        convert("yolo", yolo, tmp_path)
    assert repr(line) in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("train: images/train", r"data.yaml: expected 'names', a list of classes, got None"),
        ("names: [dog, cat]", r"data.yaml: expected a folder for 'train', 'val' or 'test'"),
        (
            "names: [dog]\ntrain: none",
            r"data.yaml: train: expected a folder or a list .*, got none",
        ),
        ("names: [dog", r"data.yaml: expected a YAML file"),
        ("names: [dog]\ntrain: labels", r"expected label files"),
        ("names: [dog, cat]\ntrain: list.txt", r"none.png: cannot be read"),
        ("names: [dog, cat]\ntrain: images\nval: labels", r"expected images in split 'val'"),
    ],
)
def test_bad_yolo_settings(yolo, tmp_path, settings, message):
    (yolo / "data.yaml").write_text(settings)
    (yolo / "list.txt").write_text("images/train/none.png\n")
    with pytest.raises(DataError, match=message):
        convert("yolo", yolo, tmp_path)


def test_bad_yolo_files(yolo, tmp_path):
    (yolo / "labels" / "train" / "a.txt").write_bytes(b"\xff\xfe0")
    with pytest.raises(DataError, match=r"a.txt: expected a text file"):
        convert("yolo", yolo, tmp_path)
    (yolo / "images" / "train" / "a.png").write_bytes(b"half of it")
    with pytest.raises(DataError, match=r"a.png: cannot be read .*; replace the file"):
        convert("yolo", yolo, tmp_path)
    (yolo / "data.yaml").unlink()
    with pytest.raises(DataError, match=r"expected a data.yaml with the class names"):
        convert("yolo", yolo, tmp_path)


def test_absurdly_large_image(yolo, tmp_path, monkeypatch):
    """PIL refuses it by an error that is not an OSError."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"\.png: cannot be read \(Image size .* exceeds limit"):
        convert("yolo", yolo, tmp_path)


def test_output_cannot_be_made(yolo, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"output: .*coco cannot be made .Not a directory"):
        convert("yolo", yolo, tmp_path / "file" / "coco")


@pytest.mark.parametrize("kind", ["voc", "yolo"])
def test_command(kind, request, tmp_path, run):
    source = request.getfixturevalue(kind)
    done = run("convert", kind, source, "--output", tmp_path / "coco")
    assert done.code == 0, done.err
    path = tmp_path / "coco" / "instances_train.json"
    count = {"voc": "2 images, 3 objects", "yolo": "3 images, 2 objects"}[kind]
    assert f"train: {count}" in done.out
    flags = f"--train-annotations {path} --train-images {image_folder(kind, source)}"
    assert flags in done.out
    read_coco(path, image_folder(kind, source))
    done = run("convert", kind, "nowhere", "--output", tmp_path)
    assert done.code == 1
    assert done.err == "cdetr-fast: source: expected a folder, got nowhere\n"


def test_yolo_names_that_come_twice(tmp_path):
    (tmp_path / "data.yaml").write_text("names: {0: cat, 1: dog, 2: cat}\ntrain: images")
    with pytest.raises(DataError, match=r"data.yaml: names: 'cat' comes twice; give class 2"):
        convert("yolo", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("shape", "points"),
    [
        ([5, 2], ".45 .4 .55 .4 .5 .5 .45 .6 .55 .6"),
        ([3, 3], ".45 .4 2 .55 .4 1 0 0 0"),  # x, y, visibility
        ([1, 2], "-3 7"),  # points may lie outside: they are not read
        ([4, 2], ""),
    ],
)
def test_yolo_poses(yolo, tmp_path, shape, points):
    settings = yolo / "data.yaml"
    settings.write_text(settings.read_text() + f"kpt_shape: {shape}\n")
    for name in ("train/a.txt", "val/d.txt"):
        (yolo / "labels" / name).write_text(f"0 .5 .5 .2 .3  {points}\n")
    written = convert("yolo", yolo, tmp_path / "coco")
    assert boxes(written["val"])["images/val/d.png"] == [("dog", [16, 10.5, 8, 9], 0)]


@pytest.mark.parametrize(
    ("shape", "line", "message"),
    [
        ([2, 2], "0 .5 .5 .2 .3 .1 .2 .3", "a.txt, line 1: .* and 4 numbers of keypoints"),
        ([2, 2], "0 .5 .5 .2 .3 .1 .2 .3 nan", "a.txt, line 1: "),
        ([2, 2], "0 .5 .5 .2 30 .1 .2 .3 .4", "a.txt, line 1: "),
        ([2], "0 .5 .5 .2 .3", r"kpt_shape: expected \[points, 2 or 3\], got \[2\]"),
        ([2, 4], "0 .5 .5 .2 .3", "kpt_shape: expected"),
        ("two", "0 .5 .5 .2 .3", "kpt_shape: expected"),
        ([0, 2], "0 .5 .5 .2 .3", "kpt_shape: expected"),
    ],
)
def test_bad_poses(yolo, tmp_path, shape, line, message):
    settings = yolo / "data.yaml"
    settings.write_text(settings.read_text() + f"kpt_shape: {shape}\n")
    (yolo / "labels" / "train" / "a.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        convert("yolo", yolo, tmp_path / "coco")


def test_polygons_are_kept_for_masks(yolo, tmp_path):
    path = convert("yolo", yolo, tmp_path / "coco")["train"]
    first, second = content(path)["annotations"]
    assert "segmentation" not in first
    assert second["segmentation"] == [[4, 6, 24, 3, 12, 27, 8, 12]]


def test_hidden_files_are_no_data(yolo, voc, tmp_path):
    expected = {k: v.read_text() for k, v in convert("yolo", yolo, tmp_path / "a").items()}
    checkpoints = yolo / "images" / "train" / ".ipynb_checkpoints"
    checkpoints.mkdir()
    for path in (checkpoints / "a-checkpoint.png", yolo / "images" / "train" / "._a.png"):
        path.write_bytes(b"no picture")
    found = {k: v.read_text() for k, v in convert("yolo", yolo, tmp_path / "b").items()}
    assert found == expected
    expected = {k: v.read_text() for k, v in convert("voc", voc, tmp_path / "c").items()}
    (voc / "ImageSets" / "Main" / "._train.txt").write_bytes(b"\xff")
    found = {k: v.read_text() for k, v in convert("voc", voc, tmp_path / "d").items()}
    assert found == expected
    for path in (voc / "ImageSets" / "Main").iterdir():
        path.unlink()
    (voc / "Annotations" / "._a.xml").write_bytes(b"no XML")
    assert len(boxes(convert("voc", voc, tmp_path / "e")["all"])) == 2
