"""Annotation files: what is read, what is refused, what is left out."""

import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdetr_fast.training import DataError
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.dataset import read_image
from cdetr_fast.training.data.label_checks import check_labels
from cdetr_fast.training.evaluation.detection import Detections, evaluate_detections

GOOD = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": 40, "height": 30},
        {"id": 3, "file_name": "b.png", "width": 20, "height": 30},
    ],
    "annotations": [
        {"id": 1, "image_id": 3, "category_id": 90, "bbox": [1, 2, 5, 6], "area": 30},
        {"id": 2, "image_id": 7, "category_id": 5, "bbox": [10, 10, 10, 10], "iscrowd": 1},
        {"id": 3, "image_id": 7, "category_id": 17, "bbox": [0, 0, 4, 4]},
    ],
    "categories": [
        {"id": 90, "name": "dog"},
        {"id": 5, "name": "cat"},
        {"id": 17, "name": "fox"},
    ],
}


@pytest.fixture
def write(tmp_path):
    for name, size in (("a", (40, 30)), ("b", (20, 30))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")

    def call(change=None):
        content = copy.deepcopy(GOOD)
        if change is not None:
            content = change(content) or content
        path = tmp_path / "labels.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return call


def test_reads(write):
    index = read_coco(write())
    assert index.classes == ("cat", "fox", "dog")
    assert index.category_ids.tolist() == [5, 17, 90]  # gaps are fine
    assert index.image_ids.tolist() == [7, 3]
    assert index.labels[index.objects(0)].tolist() == [0, 1]
    assert index.crowd.tolist() == [True, False, False]
    assert index.boxes_xywh[index.objects(1)].tolist() == [[1, 2, 5, 6]]
    assert index.areas.tolist() == [100, 16, 30]
    assert index.sizes_hw.tolist() == [[30, 40], [30, 20]]
    kept, report = check_labels(index)
    assert len(kept) == 2
    assert report.bad == {}
    assert "gaps in the category ids, after ids" in report.notes


def test_labels_in_the_order_of_a_model(write):
    index = read_coco(write()).with_classes(["dog", "cow", "fox", "cat"], "model m")
    assert index.labels.tolist() == [3, 2, 0]
    with pytest.raises(DataError, match=r"labels.json: classes 'dog' are not among the 2 of m"):
        read_coco(write()).with_classes(["cat", "fox"], "m")


def test_sizes_and_folders_are_found(write, tmp_path):
    def without_sizes(content):
        for image in content["images"]:
            del image["width"]

    assert read_coco(write(without_sizes)).sizes_hw.tolist() == [[30, 40], [30, 20]]
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(GOOD))
    assert read_coco(path).images == tmp_path
    (tmp_path / "train").mkdir()
    for name in "ab":
        (tmp_path / f"{name}.png").rename(tmp_path / "train" / f"{name}.png")
    assert read_coco(path).images == tmp_path / "train"
    with pytest.raises(DataError, match="expected a folder, got nowhere"):
        read_coco(path, "nowhere")


NULL = object()  # None takes the key away


def test_size_of_an_absurdly_large_image(write, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"image 7 has no width and height, and .*a.png: cannot be"):
        read_coco(write(put("images", 0, "width", None)))


def put(*path_and_value):
    *path, key, value = path_and_value

    def change(content):
        for step in path:
            content = content[step]
        if value is None:
            del content[key]
        else:
            content[key] = None if value is NULL else value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: '{"images": [', r"labels.json: broken JSON"),
        (
            lambda c: "[]",
            r"labels.json: expected a mapping, got \[\]; a COCO file has the lists 'images'",
        ),
        (put("annotations", None), r"annotations: expected a list, got nothing; a COCO file has"),
        (
            put("images", {"id": 7}),
            r"images: expected a list with .*, got \{'id': 7\}; a COCO file",
        ),
        (put("images", []), r"images: expected a list with at least one entry, got \[\]"),
        (put("images", 0, "id", 3), "image id 3 comes twice"),
        (
            put("images", 0, "file_name", None),
            "image 7: file_name: expected text, got nothing; correct the file",
        ),
        (put("images", 0, "id", "7"), r"image at position 0 .*: id: expected a whole .*got '7'"),
        (put("images", 0, "height", "30"), "image 7: height: expected a whole number.* got '30'"),
        (put("images", 0, "height", NULL), "image 7: height: expected a whole number.* got None"),
        (put("images", 0, "width", 2**40), "image 7: width: expected a whole number of pixels"),
        (put("images", 0, "width", 0), r"images without a size, ids \(7\)"),
        (put("images", 0, [1, 2]), r"image at position 0 .*: expected a mapping, got \[1, 2\]"),
        (put("images", 0, "file_name", 3), "image 7: file_name: expected text, got 3"),
        (put("images", 1, "file_name", "c.png"), r"1 images without a file in .*, ids \(3\)"),
        (put("categories", 0, "id", 5), "category id 5 comes twice"),
        (put("categories", 0, "name", "cat"), "category name 'cat' comes twice"),
        (
            put("categories", 0, "id", "a"),
            "category at position 0 .*: id: .* whole number, got 'a'",
        ),
        (put("categories", 0, "name", NULL), "category 90: name: expected text, got None"),
        (put("categories", 0, "name", "\ud800"), "category 90: name: expected text, got "),
        (put("categories", 1, "dog"), "category at position 1 .*: expected a mapping, got 'dog'"),
        (
            put("annotations", 1, "cat"),
            "annotation at position 1 .*: expected a mapping, got 'cat'",
        ),
        (put("annotations", 1, "id", 1), r"an id that came before, annotation ids \(1\)"),
        (put("annotations", 1, "id", True), "annotation at position 1 .*: id: .* number, got True"),
        (put("annotations", 0, "image_id", [3]), r"annotation 1: image_id: .* number, got \[3\]"),
        (
            put("annotations", 0, "image_id", 2**64),
            "annotation 1: image_id: expected a whole number",
        ),
        (put("annotations", 0, "category_id", "5"), "annotation 1: category_id: .*number, got '5'"),
        (
            put("annotations", 0, "bbox", None),
            r"annotation 1: bbox: expected \[left, .*, got nothing",
        ),
        (
            put("annotations", 0, "bbox", [1, 2]),
            r"annotation 1: bbox: expected \[left.*got \[1, 2\]",
        ),
        (put("annotations", 0, "bbox", list("1234")), r"annotation 1: bbox: .*got \['1', '2', "),
        (put("annotations", 0, "bbox", "1 2 3 4"), "annotation 1: bbox: .*got '1 2 3 4'"),
        (put("annotations", 0, "bbox", [10**400, 2, 3, 4]), "annotation 1: bbox: expected "),
        (
            put("annotations", 0, "bbox", [float("nan"), 2, 3, 4]),
            r"not finite, annotation ids \(1\)",
        ),
        (put("annotations", 0, "area", "30"), "annotation 1: area: expected a number, got '30'"),
        (put("annotations", 0, "iscrowd", "0"), "annotation 1: iscrowd: expected 0 or 1, got '0'"),
        (lambda c: "[" * 100_000, "labels.json: broken JSON"),
        (lambda c: '{"images": ' + "9" * 5000 + "}", "labels.json: broken JSON"),
        (put("annotations", 0, "image_id", 8), r"images that the file does not list, ids \(1\)"),
        (put("annotations", 0, "category_id", 6), r"does not list, annotation ids \(1\)"),
        (put("annotations", 0, "bbox", [1, 2, 0, 6]), r"zero area, annotation ids \(1\)"),
        (put("annotations", 0, "bbox", [9, 2, -3, 6]), r"negative width.*ids \(1\)"),
        (put("annotations", 0, "bbox", [1e999, 2, 3, 6]), r"not finite, annotation ids \(1\)"),
        (put("annotations", 0, "bbox", [20, 2, 3, 6]), r"outside of their image.*ids \(1\)"),
    ],
)
def test_bad_files_are_named(write, change, message):
    path = write(change)
    with pytest.raises(DataError, match=message) as caught:
        check_labels(read_coco(path, path.parent))
    assert "labels.json" in str(caught.value)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 100)
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a.png", "b.png", "masks", "1", "\0", "\ud800", "x" * 300]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["id", "bbox", "name", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def nodes(content, path=()):
    """Paths to everything in a JSON value."""
    for key in content if isinstance(content, dict) else range(len(content)):
        yield (*path, key)
        if isinstance(content[key], (dict, list)):
            yield from nodes(content[key], (*path, key))


PANOPTIC = GOOD | {
    "annotations": [
        {
            "image_id": image,
            "file_name": "a.png",
            "segments_info": [
                {"id": k, "category_id": 5, "bbox": [1, 2, 5, 6], "area": 30, "iscrowd": 0}
                for k in (1, 2)
            ],
        }
        for image in (7, 3)
    ],
}


@pytest.mark.parametrize("panoptic", [False, True])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_files_are_read_or_refused(panoptic, data):
    """Whatever stands in any place of a file: it is read, or a DataError names the file."""
    content = copy.deepcopy(PANOPTIC if panoptic else GOOD)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, key = data.draw(st.sampled_from(list(nodes(content))))
        place = content
        for step in path:
            place = place[step]
        if data.draw(st.booleans()):
            place[key] = data.draw(JSON)
        else:
            del place[key]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.png", "b.png"):
            Image.new("RGB", (40, 30)).save(Path(folder, name))
        path = Path(folder, "labels.json")
        path.write_text(json.dumps(content))
        try:
            index = read_coco(path, folder, folder if panoptic else None)
            kept, report = check_labels(index, data.draw(st.sampled_from(["stop", "drop"])))
        except DataError as error:
            refusal = str(error)
        else:
            refusal = None
            "\n".join(report.lines()).encode()
            assert len(kept.labels) == kept.num_objects == kept.offsets[-1] <= index.num_objects
            assert np.isfinite(kept.boxes_xywh).all()
            assert (kept.sizes_hw > 0).all()
    assert refusal is None or refusal.startswith(str(path))


def test_repeated_ids_are_dropped(write):
    def change(content):
        content["annotations"][2]["id"] = 1
        content["annotations"].append(content["annotations"][0] | {"bbox": [1, 2, 0, 0]})
        for item in content["annotations"][1], content["annotations"][-1]:
            del item["id"]  # none is not the same

    kept, report = check_labels(read_coco(write(change)), "drop")
    assert kept.image_ids.tolist() == [7, 3]
    assert kept.object_ids.tolist() == [-1, 1]  # image 7 comes first in the file
    assert report.bad == {
        "boxes of zero area, annotation ids": ["one of image 3"],
        "annotations with an id that came before, annotation ids": [1],
    }


def test_ids_beyond_fp64(write):
    """They are exact in labels, and evaluation does not confuse them."""
    large = 2**60

    def change(content):
        for image in content["images"]:
            image["id"] += large
        for item in content["annotations"]:
            item["image_id"] += large

    index = read_coco(write(change))
    assert index.image_ids.tolist() == [large + 7, large + 3]
    boxes = index.boxes_xywh.astype(np.float32)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.ones(3, np.float32)
    found = Detections(index.image_of_object(), index.labels, scores, boxes, [], np.arange(2))
    assert evaluate_detections(index, found).stats["AP"] == 1


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none.json: No such file"):
        read_coco(tmp_path / "none.json")


def test_bad_labels_are_dropped(write):
    def change(content):
        content["annotations"][0]["bbox"] = [1, 2, 0, 6]
        content["images"][0]["file_name"] = "none.png"

    kept, report = check_labels(read_coco(write(change)), "drop")
    assert kept.image_ids.tolist() == [3]
    assert len(kept.labels) == 0
    assert len(report.bad) == 2
    assert "images without objects, ids" not in report.notes or report.lines()
    with pytest.raises(DataError, match="--bad-labels drop"):
        check_labels(read_coco(write(change)))


def test_overshooting_boxes_are_noted(write):
    kept, report = check_labels(read_coco(write(put("annotations", 0, "bbox", [1, 2, 50, 6]))))
    assert report.notes["boxes that extend beyond their image and are clipped, ids"] == [1]
    assert len(kept.labels) == 3


def test_turned_photographs(write, tmp_path):
    """Boxes may be drawn on the turned picture or on the stored one: the size tells."""
    picture = Image.fromarray(np.arange(600, dtype=np.uint8).reshape(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    picture.save(tmp_path / "b.png", exif=exif)
    turned = read_image(read_coco(write()), 1)
    assert turned.shape == (3, 30, 20)
    stored = read_image(
        read_coco(
            write(put("images", 1, {"id": 3, "file_name": "b.png", "width": 30, "height": 20}))
        ),
        1,
    )
    assert stored.shape == (3, 20, 30)
    assert turned[0].numpy().tolist() == np.rot90(stored[0].numpy(), -1).tolist()
    wrong = put("images", 1, {"id": 3, "file_name": "b.png", "width": 31, "height": 20})
    with pytest.raises(DataError, match=r"b.png \(image id 3\): expected 31 x 20 pixels"):
        read_image(read_coco(write(wrong)), 1)


def test_pixels_of_16_bits_are_refused(write, tmp_path):
    """PIL would make all of them white."""
    path = write()
    Image.fromarray(np.full((30, 40), 3000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(
        DataError,
        match=r"a.png \(image id 7\): .*8 bits per channel, got PIL mode 'I(;16)?'; scale",
    ):
        read_image(read_coco(path), 0)


def test_file_with_a_byte_order_mark(scenes, tmp_path):
    source = scenes / "val" / "annotations.json"
    path = tmp_path / "annotations.json"
    path.write_text(source.read_text(), encoding="utf-8-sig")
    assert read_coco(path, scenes / "val").file_names == read_coco(source).file_names
