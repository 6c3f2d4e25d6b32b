"""Annotations to labels, against transformers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.processing import SMALL, Theirs, assert_equal_features, compare, pixels

from cdetr_fast.images import (
    ConditionalDetrImageProcessor,
)


def polygon(box) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h / 3, x + w / 2, y + h, x, y + h / 2]


def detection_annotation(height: int, width: int, count: int = 5, seed: int = 0) -> dict:
    """Objects in the image, one across its border, one empty."""
    generator = np.random.default_rng(seed)
    objects = []
    for _ in range(count):
        x, y = generator.uniform(0, width * 0.7), generator.uniform(0, height * 0.7)
        w, h = generator.uniform(2, width * 0.5), generator.uniform(2, height * 0.5)
        objects.append([x, y, w, h])
    objects += [[width - 5.5, height - 4.25, 30, 30], [3, 3, 0, 10]]
    return {
        "image_id": 7 + seed,
        "annotations": [
            {
                "bbox": box,
                "category_id": i,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": [polygon(box), polygon([1, 1, 8, 8])],
            }
            for i, box in enumerate(objects)
        ],
    }


SIZES = [(97, 131), (120, 80)]


def detection_batch() -> tuple[list, list]:
    images = [Image.fromarray(pixels(*hw, seed=i)) for i, hw in enumerate(SIZES)]
    return images, [detection_annotation(*hw, seed=i) for i, hw in enumerate(SIZES)]


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_convert_annotations": False},
        {"do_pad": False, "size": {"height": 50, "width": 60}},
        {"do_normalize": False},
        {"pad_size": 120},
    ],
    ids=str,
)
def test_detection_annotations(settings, masks):
    images, annotations = detection_batch()
    ours = compare(images, settings, annotations=annotations, return_segmentation_masks=masks)
    assert len(ours.labels[0].class_labels) == 6  # the empty box is left out


def test_annotations_without_resizing():
    images, annotations = detection_batch()
    call = {"annotations": annotations, "return_segmentation_masks": True}
    ours = ConditionalDetrImageProcessor(do_resize=False)(images, **call)
    theirs = Theirs(do_resize=False)(images, return_tensors="pt", **call)
    for label in theirs["labels"]:
        label["masks"] = label["masks"].bool()  # uint8 there unless they are resized
    assert_equal_features(ours, theirs)


def test_photo_annotations(photo, data_folder):
    annotation = detection_annotation(480, 640)
    if data_folder:
        content = json.loads((data_folder / "coco_sample" / "instances.json").read_text())
        annotation = {"image_id": 39769, "annotations": content["annotations"]}
    compare(photo, {"size": None}, annotations=annotation)


def test_one_dict_for_one_image_and_empty_lists():
    image = Image.fromarray(pixels(97, 131))
    ours = compare(image, annotations={"image_id": 3, "annotations": []})
    assert ours.labels[0].boxes.shape == (0, 4)
    label = ConditionalDetrImageProcessor(size=SMALL)(
        image, annotations={"image_id": 3, "annotations": []}, return_segmentation_masks=True
    ).labels[0]
    assert label.masks.shape == (0, 64, 86)
    assert label.masks.dtype == torch.bool


def test_crowds_are_skipped_with_their_masks():
    images, annotations = detection_batch()
    expected = ConditionalDetrImageProcessor(size=SMALL)(
        images, annotations=annotations, return_segmentation_masks=True
    )
    crowd = {"size": [97, 131], "counts": [0, 97 * 131]}
    crowd = {"bbox": [0, 0, 9, 9], "category_id": 1, "area": 9, "segmentation": crowd, "iscrowd": 1}
    annotations[0]["annotations"].insert(1, crowd)
    ours = ConditionalDetrImageProcessor(size=SMALL)(
        images, annotations=annotations, return_segmentation_masks=True
    )
    assert_equal_features(ours, expected)
    with pytest.raises(IndexError):  # transformers selects among all masks with a shorter index
        Theirs(size=SMALL)(images, annotations=annotations, return_segmentation_masks=True)


def test_run_length_masks():
    from pycocotools import mask as coco_mask

    mask = np.zeros((97, 131), dtype=np.uint8)
    mask[10:40, 20:60] = 1
    compressed = coco_mask.encode(np.asfortranarray(mask))
    text = compressed | {"counts": compressed["counts"].decode()}
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    plain = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    processor = ConditionalDetrImageProcessor(do_resize=False)
    for runs in (compressed, text, {"size": [97, 131], "counts": plain}):
        annotation = detection_annotation(97, 131, count=1)
        annotation["annotations"][0]["segmentation"] = runs
        label = processor(
            pixels(97, 131), annotations=annotation, return_segmentation_masks=True
        ).labels[0]
        assert np.array_equal(label.masks[0].numpy(), mask.astype(bool))
    annotation["annotations"][0]["segmentation"] = plain_of_other_size = {"size": [9, 9]}
    with pytest.raises(ValueError, match=r"segmentation: .*\[97, 131\], got \[9, 9\]"):
        processor(pixels(97, 131), annotations=annotation, return_segmentation_masks=True)
    assert plain_of_other_size == {"size": [9, 9]}


def test_keypoints():
    image = Image.fromarray(pixels(97, 131))
    annotation = detection_annotation(97, 131)
    for i, item in enumerate(annotation["annotations"]):
        item["keypoints"] = [i, 2, 2, 5, 6, 1]
    compare(image, annotations=annotation)


def test_missing_pycocotools(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    processor, annotation = ConditionalDetrImageProcessor(), detection_annotation(97, 131)
    with pytest.raises(ImportError, match="pip install pycocotools"):
        processor(pixels(97, 131), annotations=annotation, return_segmentation_masks=True)
    assert "boxes" in processor(pixels(97, 131), annotations=annotation).labels[0]


def panoptic_files(folder) -> list[dict]:
    """Writes a panoptic PNG per image and returns the annotations; one segment is a crowd."""
    annotations = []
    for i, (height, width) in enumerate(SIZES):
        ids = np.zeros((height, width), dtype=np.int64)
        segments = []
        for n in range(4):
            segment_id = 70_000 * n + 300 * n + 5
            top, left = 7 + 20 * n, 11 + 13 * n
            ids[top : top + 17 + n, left : left + 23] = segment_id
            segments.append(
                {"id": segment_id, "category_id": n, "area": 100 + n, "iscrowd": int(n == 2)}
            )
        rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(folder / f"{i}.png")
        annotations.append({"image_id": i, "file_name": f"{i}.png", "segments_info": segments})
    return annotations


@pytest.mark.parametrize("masks", [None, False, True])
def test_panoptic_annotations(tmp_path, masks):
    images, _ = detection_batch()
    ours = compare(
        images,
        {"format": "coco_panoptic"},
        annotations=panoptic_files(tmp_path),
        masks_path=tmp_path,
        return_segmentation_masks=masks,
    )
    assert ("masks" in ours.labels[0]) == (masks is not False)
    assert ours.labels[0].iscrowd.tolist() == [0, 0, 1, 0]


def test_panoptic_errors(tmp_path):
    images, _ = detection_batch()
    processor = ConditionalDetrImageProcessor(format="coco_panoptic")
    annotations = panoptic_files(tmp_path)
    with pytest.raises(ValueError, match="masks_path: expected the folder"):
        processor(images, annotations)
    with pytest.raises(FileNotFoundError, match=r"7.png: cannot be read \(No such file"):
        processor(images[0], annotations[0] | {"file_name": "7.png"}, masks_path=tmp_path)
    annotations[0]["segments_info"][1]["id"] = 12345
    with pytest.raises(ValueError, match=r"segments \[12345\] have no pixel in 0.png"):
        processor(images, annotations, masks_path=tmp_path)


def test_pad_of_one_image_and_of_a_list():
    processor, theirs = ConditionalDetrImageProcessor(), Theirs()
    image = torch.rand(3, 20, 30)
    annotation = {"boxes": torch.rand(2, 4), "masks": torch.rand(2, 20, 30) > 0.5}

    def copy():
        return {key: value.clone() for key, value in annotation.items()}

    padded, mask, target = processor.pad(image, (25, 40), copy(), fill=3)
    their_padded, their_mask, their_target = theirs.pad(image, (25, 40), copy(), fill=3)
    assert torch.equal(padded, their_padded)
    assert torch.equal(mask, their_mask)
    assert torch.equal(target["boxes"], their_target["boxes"])
    assert torch.equal(target["masks"], their_target["masks"])
    assert processor.pad(image[None], (25, 40))[1].shape == (1, 25, 40)

    _, _, masks_alone = processor.pad(image, (25, 40), {"masks": torch.ones(2, *image.shape[1:])})
    assert masks_alone["masks"].shape == (2, 25, 40)
    features = processor.pad([image, torch.rand(3, 25, 10)], return_tensors="pt")
    assert features.pixel_values.shape == (2, 3, 25, 30)
    assert features.pixel_mask.flatten(1).sum(1).tolist() == [600, 250]
    with pytest.raises(ValueError, match=r"at least \[20, 30\], got \[10, 40\]"):
        processor.pad(image, (10, 40))
