"""Panoptic quality as hotcoco has it, which follows COCO's panopticapi; batches and padding."""

import contextlib
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.dataset import Collate, DetectionDataset
from cdetr_fast.training.data.sampling import ImageRequest
from cdetr_fast.training.evaluation.panoptic import PanopticQuality, PanopticScorer

CATEGORIES = [
    {"id": 2, "name": "cup", "isthing": 1},
    {"id": 3, "name": "cat", "isthing": 1},
    {"id": 7, "name": "sky", "isthing": 0},
    {"id": 9, "name": "sea", "isthing": 0},
    {"id": 11, "name": "unicorn", "isthing": 1},  # neither there nor found
]
IDS = [category["id"] for category in CATEGORIES]


def random_map(rng, height, width, count):
    """Rectangles over each other, ids from 1; 0 where there is none."""
    segments = np.zeros((height, width), np.int64)
    for number in range(1, count + 1):
        top, left = rng.integers(0, height), rng.integers(0, width)
        segments[top : top + rng.integers(3, 30), left : left + rng.integers(3, 30)] = number
    return segments


def shaken(rng, segments):
    """A map of segments that a model might find: shifted, merged, split, missed."""
    found = np.roll(segments, rng.integers(-2, 3, 2), (0, 1))
    found[rng.random(found.shape) < 0.1] = 0
    present = np.unique(found)[1:]
    for number in present:
        if rng.random() < 0.2:
            found[found == number] = rng.choice(present)
    return found


def described(segments, label_of, crowd):
    infos = []
    for number in np.unique(segments[segments > 0]).tolist():
        rows, columns = np.nonzero(segments == number)
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        infos.append(
            {
                "id": number,
                "category_id": IDS[label_of[number]],
                "iscrowd": int(number in crowd),
                "area": len(rows),
                "bbox": [int(v) for v in box],
            }
        )
    return infos


def write(folder, name, images):
    """Writes panoptic maps `{image: (segments, infos)}` as COCO does."""
    (folder / name).mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image, (segments, infos) in enumerate(images):
        colours = np.stack([segments % 256, segments // 256 % 256, segments // 65536], -1)
        file_name = f"{image}.png"
        Image.fromarray(colours.astype(np.uint8)).save(folder / name / file_name)
        height, width = segments.shape
        record = {"id": image, "file_name": file_name, "height": height, "width": width}
        content["images"].append(record)
        content["annotations"].append(
            {"image_id": image, "file_name": file_name, "segments_info": infos}
        )
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


def make_sets(folder, images, seed):
    """True and found maps: segments of all classes, void, at most one crowd a class and image."""
    rng = np.random.default_rng(seed)
    true, found = [], []
    for _ in range(images):
        height, width = rng.integers(30, 60, 2)
        segments = random_map(rng, height, width, rng.integers(0, 9)) * 1000
        numbers = np.unique(segments[segments > 0]).tolist()
        label_of = {number: int(rng.integers(0, 4)) for number in numbers}
        crowd = {label_of[n]: n for n in numbers if rng.random() < 0.3}.values()
        true.append((segments, described(segments, label_of, set(crowd))))
        guess = shaken(rng, segments)
        label_of |= {n: int(rng.integers(0, 4)) for n in numbers if rng.random() < 0.2}
        found.append((guess, described(guess, label_of, ())))
    return write(folder, "true", true), write(folder, "found", found), true, found


@pytest.mark.parametrize("seed", range(3))
def test_figures_are_those_of_another_implementation(tmp_path, seed):
    panoptic = pytest.importorskip("hotcoco.panoptic")
    true_path, found_path, true, found = make_sets(tmp_path, 12, seed)
    with contextlib.redirect_stdout(io.StringIO()):
        expected = panoptic.pq_compute(str(true_path), str(found_path))
    halves = [PanopticQuality(5), PanopticQuality(5)]  # of two processes
    for image, ((true_map, true_infos), (found_map, found_infos)) in enumerate(
        zip(true, found, strict=True)
    ):
        halves[image % 2].add(
            true_map,
            [info["id"] for info in true_infos],
            [IDS.index(info["category_id"]) for info in true_infos],
            [bool(info["iscrowd"]) for info in true_infos],
            found_map,
            [info["id"] for info in found_infos],
            [IDS.index(info["category_id"]) for info in found_infos],
        )
    quality = PanopticQuality(5)
    quality.counts = halves[0].counts + halves[1].counts
    assert (quality.counts[:, :4].sum(1) > 0).all()
    stats = quality.stats(np.array([False, False, True, True, False]))
    for suffix, theirs in (("", "All"), ("_things", "Things"), ("_stuff", "Stuff")):
        for name in ("PQ", "SQ", "RQ"):
            value = expected[theirs][name.lower()]
            assert stats[name + suffix] == pytest.approx(value, abs=1e-9), (name, theirs)
    for name, values in quality.per_class().items():
        theirs = [expected["per_class"][i][name.lower()] for i in IDS]
        assert np.nan_to_num(values, nan=-1).tolist() == pytest.approx(theirs, abs=1e-9)
        assert np.isnan(values[4])


def test_nothing_found_nothing_there():
    quality = PanopticQuality(2)
    empty = np.zeros((4, 5), np.int64)
    quality.add(empty, [], [], [], empty, [], [])
    assert np.isnan(quality.stats(np.array([False, True]))["PQ"])
    quality.add(empty + 1, [1], [0], [False], empty - 1, [], [])
    stats = quality.stats(np.array([False, True]))
    assert stats["PQ"] == stats["RQ_things"] == 0
    assert np.isnan(stats["PQ_stuff"])


def test_padded_batches_are_scored_at_the_images_own_size(tmp_path):
    """Perfect masks of a batch of two sizes get 1; a false one is noticed, a filler is not."""
    _, _, true, _ = make_sets(tmp_path / "maps", 6, 5)
    true = [image for image in true if len(image[1]) >= 2][:3]
    path = write(tmp_path / "set", "true", true)
    for image, (segments, _) in enumerate(true):
        picture = np.repeat(segments[..., None] // 50, 3, 2).astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "set" / f"{image}.png")
    index = read_coco(path, tmp_path / "set", tmp_path / "set" / "true")
    assert index.stuff == {"sky", "sea"}
    dataset = DetectionDataset(index, lambda sample, *seeds: sample, with_maps=True)
    draws = [ImageRequest(0), ImageRequest(1), ImageRequest(2), ImageRequest(0, counted=False)]
    batch = Collate(32)([dataset[draw] for draw in draws])
    height, width = batch.pixels.shape[2:]
    assert len(set(batch.sizes_hw())) > 1
    masks = torch.full((4, 9, height, width), 9.0)  # the padding belongs to everything
    logits = torch.full((4, 9, 5), -9.0)
    for row, (image, size) in enumerate(zip(batch.indices, batch.sizes_hw(), strict=True)):
        segments = true[image][0]
        masks[row, :, : size[0], : size[1]] = -9.0
        for query, info in enumerate(true[image][1]):
            mask = torch.from_numpy(segments == info["id"])
            masks[row, query, : size[0], : size[1]][mask] = 9.0
            logits[row, query, IDS.index(info["category_id"])] = 3.0

    def quality():
        scorer = PanopticScorer(index)
        scorer(batch, SimpleNamespace(logits=logits, pred_masks=masks))
        return scorer.stats()

    logits[3] = logits[3].flip(0)
    found = quality()
    assert found["PQ_things"] == 1
    # two true segments of one stuff class are one found
    assert 0 < found["PQ_stuff"] <= 1
    logits[1] = -9.0
    assert quality()["PQ_things"] < 1
