"""Photographs turned by EXIF: labels are on the picture that the annotation file means."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.conversion import convert, image_folder
from cdetr_fast.training.data.dataset import read_image
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.shards import read_shards, write_shards

# How a camera stores a picture that has to be turned by each orientation: PIL's inverse of it.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
SIZES = {"square": (48, 48), "wide": (64, 48)}
WHITE = (6, 4, 30, 20)  # left, top, right, bottom of what is labelled, in the upright picture


def stored(image, orientation):
    return image if orientation == 1 else image.transpose(STORED[orientation])


def photograph(path, orientation, size):
    """Write a photograph with a white plate; return the plate's boxes xywh, upright and stored."""
    upright = Image.new("RGB", size)
    upright.paste("white", WHITE)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = stored(upright, orientation)
    image.save(path, exif=exif)
    boxes = []
    for one in (upright, image):
        left, top, right, bottom = one.getbbox()
        boxes.append([left, top, right - left, bottom - top])
    return boxes, (upright.size, image.size)


def coco_file(folder, convention, cases, with_sizes=True):
    """Write photographs and their annotation file; `cases` are orientations and sizes."""
    content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "plate"}]}
    which = ("upright", "stored").index(convention)
    for i, (orientation, size) in enumerate(cases):
        name = f"{i}.png"
        boxes, sizes = photograph(folder / name, orientation, size)
        width, height = sizes[which]
        image = {"id": i, "file_name": name}
        if with_sizes:
            image |= {"width": width, "height": height}
        content["images"].append(image)
        content["annotations"].append(
            {"id": i, "image_id": i, "category_id": 1, "bbox": boxes[which]}
        )
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def lies_on_the_plate(index: CocoIndex, image: int) -> bool:
    left, top, width, height = index.boxes_xywh[image].astype(int).tolist()
    pixels = read_image(index, image)
    expected = torch.zeros_like(pixels)
    expected[:, top : top + height, left : left + width] = 255
    return torch.equal(pixels, expected)


@pytest.mark.parametrize("convention", ["upright", "stored"])
@pytest.mark.parametrize("with_sizes", [True, False])
@pytest.mark.parametrize("shape", list(SIZES))
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_in_both_conventions(
    tmp_path, orientation, shape, with_sizes, convention
):
    path = coco_file(tmp_path, convention, [(orientation, SIZES[shape])], with_sizes)
    assert lies_on_the_plate(read_coco(path, exif=convention), 0)
    tells = convention == "upright" or (with_sizes and shape == "wide" and orientation > 4)
    if tells or orientation == 1:
        assert lies_on_the_plate(read_coco(path), 0)
    if tells and with_sizes and shape == "wide" and orientation > 4:  # the size is believed first
        assert lies_on_the_plate(read_coco(path, exif="upright"), 0)
        assert lies_on_the_plate(read_coco(path, exif="stored"), 0)


@pytest.mark.parametrize("convention", ["upright", "stored"])
def test_auto_follows_the_images_whose_size_tells(tmp_path, convention):
    cases = [(o, size) for size in SIZES.values() for o in range(1, 9)]
    index = read_coco(coco_file(tmp_path, convention, cases))
    assert index.exif == convention
    assert all(lies_on_the_plate(index, i) for i in range(len(cases)))


def test_unreadable_files_do_not_disturb_the_look_at_headers(tmp_path):
    path = coco_file(tmp_path, "stored", [(3, (48, 48)), (6, (64, 48)), (8, (64, 48))])
    (tmp_path / "1.png").write_bytes(b"nothing")
    index = read_coco(path, tmp_path)
    assert index.exif == "stored"
    assert lies_on_the_plate(index, 0)


@pytest.mark.parametrize("convention", ["upright", "stored"])
def test_shards_remember_which_picture_it_was(tmp_path, convention):
    from cdetr_fast.training.data.shard_stream import ShardStream
    from cdetr_fast.training.data.transforms import EvaluationTransform

    cases = [(o, (48, 48)) for o in range(1, 9)]
    path = coco_file(tmp_path, convention, cases)
    where = write_shards(path, tmp_path / "shards", exif=convention)
    shards = read_shards(str(where))
    assert shards.exif == convention
    stream = ShardStream(
        shards, EvaluationTransform({"shortest_edge": 48}), 8, 1, 0, 1, 0, 1, seed=0
    )
    batch = next(iter(stream))
    assert not batch.failures
    for pixels, label in zip(batch.pixels, batch.labels, strict=True):
        x, y, w, h = (label["boxes"][0] * 48).round().int().tolist()
        expected = torch.zeros_like(pixels)
        expected[:, y - h // 2 : y - h // 2 + h, x - w // 2 : x - w // 2 + w] = 255
        assert torch.equal(pixels, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", list(SIZES))
def test_yolo_labels_are_on_the_upright_picture(tmp_path, orientation, shape):
    size = SIZES[shape]
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    (box, _), _ = photograph(tmp_path / "images" / "a.png", orientation, size)
    x, y, w, h = np.array(box) / np.array([*size, *size])
    (tmp_path / "labels" / "a.txt").write_text(f"0 {x + w / 2} {y + h / 2} {w} {h}")
    (tmp_path / "data.yaml").write_text("names: [plate]\ntrain: images")
    path = convert("yolo", tmp_path, tmp_path / "coco")["train"]
    assert lies_on_the_plate(read_coco(path, image_folder("yolo", tmp_path)), 0)
