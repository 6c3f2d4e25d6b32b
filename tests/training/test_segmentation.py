"""Segmentation from panoptic data: masks follow boxes, the mask head trains, runs end."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.html import mask_levels, read_page

from cdetr_fast import ConditionalDetrForSegmentation
from cdetr_fast.training import DataError, TrainingConfig, evaluate, train
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.dataset import Collate, DetectionDataset
from cdetr_fast.training.data.sampling import ImageRequest
from cdetr_fast.training.data.transforms import EvaluationTransform, TrainingTransform
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.run.log import read_rows
from cdetr_fast.training.run.signals import StopSignals

HEIGHT, WIDTH = 64, 80
COLOURS = ((220, 40, 40), (40, 60, 230))
CATEGORIES = [
    {"id": 3, "name": "plate", "isthing": 1},
    {"id": 7, "name": "disc", "isthing": 1},
    {"id": 90, "name": "ground", "isthing": 0},
]


def draw_panoptic(folder, count, seed):
    """Plates and discs on ground; every pixel belongs to one segment, every third image has a
    crowd."""
    rng = np.random.default_rng(seed)
    (folder / "masks").mkdir(parents=True)
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    for image_id in range(count):
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        owner = np.full((HEIGHT, WIDTH), 70_000)  # ids of three bytes
        kinds = {70_000: 90}
        for k, (left, top) in enumerate(((4, 4), (42, 30))):
            left, top = left + rng.integers(0, 8), top + rng.integers(0, 6)
            inside = (x >= left) & (x < left + 26) & (y >= top) & (y < top + 22)
            category = 3
            if rng.random() < 0.5:
                inside = ((x - left - 13) / 13) ** 2 + ((y - top - 11) / 11) ** 2 < 1
                category = 7
            number = 300 + 1000 * k
            owner[inside], kinds[number] = number, category
            pixels[inside] = COLOURS[0 if category == 3 else 1]
        segments = []
        for number, category in kinds.items():
            rows, columns = np.nonzero(owner == number)
            top, left = rows.min(), columns.min()
            segments.append(
                {
                    "id": number,
                    "category_id": category,
                    "bbox": [int(v) for v in (left, top, np.ptp(columns) + 1, np.ptp(rows) + 1)],
                    "area": len(rows),
                    "iscrowd": int(image_id % 3 == 2 and number == 1300),
                }
            )
        name = f"{image_id:03d}"
        Image.fromarray(pixels).save(folder / f"{name}.png")
        colours = np.stack([owner % 256, owner // 256 % 256, owner // 256**2], -1)
        Image.fromarray(colours.astype(np.uint8)).save(folder / "masks" / f"{name}.png")
        content["images"].append(
            {"id": image_id, "file_name": f"{name}.png", "width": WIDTH, "height": HEIGHT}
        )
        content["annotations"].append(
            {"image_id": image_id, "file_name": f"{name}.png", "segments_info": segments}
        )
    (folder / "panoptic.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("panoptic")
    draw_panoptic(folder / "train", 6, 0)
    draw_panoptic(folder / "val", 3, 1)
    return folder


@pytest.fixture
def configuration(settings, panoptic):
    def make(**changes):
        # d_model + heads in groups of 8, and a smallest map of d_model / 16 channels
        options = settings()["model_options"] | {"encoder_attention_heads": 8}
        values = {
            "task": "segmentation",
            "train_annotations": str(panoptic / "train" / "panoptic.json"),
            "train_masks": str(panoptic / "train" / "masks"),
            "model_options": options,
            "batch_size": 3,
            "epochs": 1,
        }
        return TrainingConfig(**settings(**values | changes))

    return make


def extent(mask):
    rows, columns = torch.nonzero(mask, as_tuple=True)
    edges = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    return [edge.item() for edge in edges]


@pytest.mark.parametrize("seed", range(6))
def test_masks_follow_boxes(panoptic, seed):
    """Through flip, crop, scale and padding."""
    index = read_coco(panoptic / "train" / "panoptic.json", masks=panoptic / "train" / "masks")
    assert index.classes == ("plate", "disc", "ground")
    transform = TrainingTransform((48, 64), 96, 0.5, 0.7, (64,), (40, 64))
    dataset = DetectionDataset(index, transform)
    items = [dataset[ImageRequest(i, (seed, i), (seed,))] for i in range(3)]
    # of the third image, a segment is a crowd
    for item, count in zip(items, (3, 3, 2), strict=True):
        assert len(item["label"]["class_labels"]) <= count
    batch = Collate(32)(items)
    compared = 0
    for image, label, item in zip(batch.pixels, batch.labels, items, strict=True):
        height, width = item["pixels"].shape[1:]
        assert label["masks"].shape[1:] == batch.pixels.shape[2:]
        assert not label["masks"][:, height:].any()
        assert not label["masks"][:, :, width:].any()
        assert label["masks"].sum(0).max() == 1  # segments do not overlap
        centre, size = label["boxes"][:, :2], label["boxes"][:, 2:]
        boxes = torch.cat([centre - size / 2, centre + size / 2], 1)
        boxes = boxes * torch.tensor([width, height] * 2)
        for box, mask, kind in zip(boxes, label["masks"], label["class_labels"], strict=True):
            if kind != 2:  # what is cut off the ground may leave its box too large
                assert box.tolist() == pytest.approx(extent(mask), abs=2.5)
                colour = image[:, mask].float().mean(1).tolist()
                assert colour == pytest.approx(COLOURS[int(kind)], abs=30)
                compared += 1
    assert compared >= 3


@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"batch_size": 1, "accumulate": 3, "gradient_checkpointing": True}],
)
def test_trains(configuration, panoptic, changes):
    config = configuration(
        val_annotations=str(panoptic / "val" / "panoptic.json"),
        val_masks=str(panoptic / "val" / "masks"),
        **changes,
    )
    result = train(config)
    assert result["step"] == 2
    assert 0 <= result["AP"] <= 1
    run = config.output
    rows = [row for row in read_rows(Path(run) / "metrics.jsonl") if row["kind"] == "train"]
    for row in rows:
        assert row["skipped"] == 0
        assert np.isfinite([row["loss"], row["loss_mask"], row["loss_dice"]]).all()
        assert row["loss_mask"] > 0 < row["loss_dice"]
    model = ConditionalDetrForSegmentation.from_pretrained(Path(run) / "model", strict=True)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 64, 64)).pred_masks.shape == (1, 12, 16, 16)


def test_evaluates_boxes_and_segments_of_a_checkpoint(configuration, panoptic, tmp_path):
    val, masks = panoptic / "val" / "panoptic.json", panoptic / "val" / "masks"
    config = configuration(val_annotations=str(val), val_masks=str(masks))
    trained = train(config)
    table = (Path(config.output) / "evaluation" / "classes.csv").read_text().splitlines()
    assert table[0] == "class,objects,AP,AP50,AR100,PQ,SQ,RQ"
    model = Path(config.output) / "model"
    options = {"device": "cpu", "num_workers": 0, "batch_size": 2}
    found = evaluate(model, val, panoptic / "val", masks=masks, **options)
    assert {"PQ", "SQ_things", "RQ_stuff", "AP", "AR100"} <= set(found.stats)
    expected = {name: trained[name] for name in found.stats}
    assert found.stats == pytest.approx(expected, abs=1e-6, nan_ok=True)

    boxes = json.loads(val.read_text())
    items = [
        {"image_id": a["image_id"]} | segment
        for a in boxes["annotations"]
        for segment in a["segments_info"]
    ]
    boxes["annotations"] = [item | {"id": k} for k, item in enumerate(items, 1)]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes))
    found = evaluate(model, path, panoptic / "val", **options)
    assert "PQ" not in found.stats
    assert found.stats["AP"] == pytest.approx(trained["AP"], abs=1e-6)

    detector = json.loads((model / "config.json").read_text())
    detector["architectures"] = ["ConditionalDetrForObjectDetection"]
    (tmp_path / "config.json").write_text(json.dumps(detector))
    with pytest.raises(DataError, match="is not a segmentation checkpoint"):
        evaluate(tmp_path, val, panoptic / "val", masks=masks, **options)


def test_mask_head_trains(configuration):
    config = configuration(
        epochs=12, batch_size=6, crop_probability=0.0, flip_probability=0.0, scales=[64]
    )
    engine = Engine(config, StopSignals())
    model = engine.accelerator.unwrap_model(engine.model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.run()
    same = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    same = {name for name in same if name.startswith(("mask_head", "bbox_attention"))}
    assert same <= {"bbox_attention.k_proj.bias"}  # the softmax takes it out
    rows = list(read_rows(Path(config.output) / "metrics.jsonl"))
    assert rows[-1]["loss_mask"] < 0.85 * rows[0]["loss_mask"]


def test_bad_masks_are_named(configuration, panoptic, tmp_path):
    with pytest.raises(DataError, match="train_masks: expected the folder of panoptic PNG files"):
        Engine(configuration(train_masks=None), StopSignals())
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in (panoptic / "train" / "masks").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    victim = folder / "001.png"
    index = read_coco(panoptic / "train" / "panoptic.json", masks=folder)
    dataset = DetectionDataset(index, TrainingTransform((48,), 96))
    Image.open(victim).resize((40, 32), Image.NEAREST).save(victim)
    assert (
        "001.png (masks of image id 1): expected 80 x 64 pixels"
        in dataset[ImageRequest(1, (0,), (0,))]
    )
    Image.new("RGB", (WIDTH, HEIGHT)).save(victim)
    message = dataset[ImageRequest(1, (0,), (0,))]
    assert "001.png (masks of image id 1): no pixel of segments 70000, 300, 1300" in message
    victim.unlink()
    assert "001.png (masks of image id 1): cannot be read" in dataset[ImageRequest(1, (0,), (0,))]


def test_missing_masks_are_found_before_the_first_step(configuration, panoptic, tmp_path):
    with pytest.raises(DataError, match=r"masks of .*: expected a folder of .*, got nowhere"):
        Engine(configuration(train_masks="nowhere", bad_images="skip"), StopSignals())
    shutil.copytree(panoptic / "train" / "masks", tmp_path / "masks")
    (tmp_path / "masks" / "001.png").unlink()
    config = configuration(train_masks=str(tmp_path / "masks"), bad_images="skip")
    with pytest.raises(DataError, match=r"1 images without a panoptic PNG file in .*, ids \(1\)"):
        Engine(config, StopSignals())
    index = Engine(dataclasses.replace(config, bad_labels="drop"), StopSignals()).train_index
    assert index.image_ids.tolist() == [0, 2, 3, 4, 5]
    assert index.mask_names == [f"{i:03d}.png" for i in index.image_ids]


def test_masks_overfit_a_scene(configuration):
    """Dice stays flat until the boxes have settled, as queries change hands before; then falls."""
    engine = Engine(configuration(), StopSignals())
    model = engine.model
    model.eval().conditional_detr.model.freeze_backbone()  # no drop-out
    dataset = DetectionDataset(engine.train_index, EvaluationTransform({"shortest_edge": 64}))
    inputs = Collate(32)([dataset[ImageRequest(0)]]).model_inputs(model.device, *engine.statistics)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, fused=True)
    dice = []
    for _ in range(200):
        outputs = model(**inputs)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        dice.append(outputs.loss_dict["loss_dice"].item())
    assert dice[0] > 0.65
    assert np.mean(dice[-10:]) < 0.45


@pytest.fixture
def covering(configuration, panoptic, tmp_path):
    """A checkpoint whose boxes and masks are all of the image, of the class of the ground."""
    from cdetr_fast.training.initial_weights import build_model
    from cdetr_fast.training.setup import make_processor

    config = configuration()
    model = build_model(config, ("plate", "disc", "ground")).eval()
    with torch.no_grad():
        model.conditional_detr.class_labels_classifier.bias[2] = 3.0
        model.mask_head.output_conv.bias += 10.0
        detector = model.conditional_detr
        for last in (
            detector.model.decoder.ref_point_head.layers[-1],
            detector.bbox_predictor.layers[-1],
        ):
            last.weight.zero_()
            last.bias.zero_()
        detector.bbox_predictor.layers[-1].bias[2:] = 5.0
    model.save_pretrained(tmp_path / "covering")
    make_processor(config, model).save_pretrained(tmp_path / "covering")
    return tmp_path / "covering"


# Evaluations one after the other, in a group of processes that the last one ends.
PROGRAM = """
import json, os, sys
from unittest import mock
from cdetr_fast.cli import main
from cdetr_fast.training.run import launch

*others, last = json.loads(sys.argv[1])
with mock.patch.object(launch, "end_process_group"):
    for arguments in others:
        try:
            main(arguments)
        except SystemExit as end:
            assert not end.code
        if os.environ["RANK"] == "0":
            print("NEXT", file=sys.stderr, flush=True)
main(last)
"""


def test_processes_evaluate_as_one(covering, tmp_path, root):
    """The same figures, also where a process has an image that cannot be read, and none left."""
    options = {"batch_size": 2, "num_workers": 0, "model": covering, "device": "cpu"}
    folders = {
        "two": tmp_path / "set",
        "skip two": tmp_path / "broken",
        "stop": tmp_path / "broken",
    }
    for folder in folders.values():
        if not folder.exists():
            draw_panoptic(folder, 7, 5)
    (tmp_path / "broken" / "004.png").write_text("no picture")

    def data(folder):
        return {
            "annotations": folder / "panoptic.json",
            "images": folder,
            "masks": folder / "masks",
        }

    runs = []
    for name, folder in folders.items():
        flags = options | data(folder) | {"output": tmp_path / name}
        if name == "skip two":
            flags["bad_images"] = "skip"
        pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in flags.items())
        runs.append(["evaluate", *itertools.chain.from_iterable(pairs)])
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--no-python"),
            *(sys.executable, "-c", PROGRAM, json.dumps(runs)),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )

    def figures(name):
        content = json.loads((tmp_path / name / "metrics.json").read_text())
        return content["images"], content["stats"], content["classes"]

    evaluate(**options, **data(tmp_path / "set"), output=tmp_path / "one")
    assert (tmp_path / "two" / "metrics.json").exists(), done.stderr[-3000:]
    for name in ("one", "two"):  # each pixel is of one labelled segment; one covers all in turn
        page = read_page(tmp_path / name / "report.html")
        labels, found = (mask_levels(page, i, (480, 384)) for i in (0, 1))
        assert (np.sum([mask > 0 for mask in labels], axis=0) == 1).all()
        assert len(labels) == 3
        assert [(mask > 0).all() for mask in found] == [True]
    (images, stats, classes), single = figures("two"), figures("one")
    assert images == single[0] == 7
    assert stats == pytest.approx(single[1], abs=1e-6)
    for one, other in zip(classes, single[2], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert stats["PQ"] > 0.1
    assert stats["AP50"] > 0

    skipping = {"output": tmp_path / "skip one", "bad_images": "skip"}
    evaluate(**options, **data(tmp_path / "broken"), **skipping)
    _, skipped, stopped = done.stderr.split("NEXT\n")
    assert skipped.count("1 of 7 images could not be read") == 1
    (images, stats, _), single = figures("skip two"), figures("skip one")
    assert images == single[0] == 6
    assert stats == pytest.approx(single[1], abs=1e-6)
    assert done.returncode == 1
    assert stopped.count("004.png (image id 4): cannot be read") == 1
    assert "cdetr-fast: 1 of 7 images could not be read" in stopped
    assert not (tmp_path / "stop" / "metrics.json").exists()
