"""COCO's instance masks, polygons and run lengths: read, trained on, and scored by mask AP."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from support.html import mask_levels, read_page

from cdetr_fast.images.draw import class_colour
from cdetr_fast.training import DataError, TrainingConfig, evaluate, train
from cdetr_fast.training.data.dataset import Collate, DetectionDataset
from cdetr_fast.training.data.exports import read_set
from cdetr_fast.training.data.label_checks import check_labels
from cdetr_fast.training.data.sampling import ImageRequest
from cdetr_fast.training.data.transforms import EvaluationTransform, TrainingTransform
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.evaluation.detection import Detections, evaluate_detections
from cdetr_fast.training.evaluation.pictures import draw_images
from cdetr_fast.training.evaluation.report import Report, write_report
from cdetr_fast.training.evaluation.scored import Scored
from cdetr_fast.training.evaluation.segments import MaskScorer, segment_scorer
from cdetr_fast.training.run.signals import StopSignals

HEIGHT, WIDTH = 64, 80
COLOURS = ((220, 40, 40), (40, 60, 230))
CATEGORIES = [{"id": 3, "name": "plate"}, {"id": 7, "name": "disc"}]


def runs_of(mask):
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    return [0, *runs] if flat[0] else runs


def write_set(folder, count, seed):
    """Plates as polygons, discs as run lengths in both forms; every third image has a crowd."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    content = {"images": [], "annotations": [], "categories": CATEGORIES}
    for image in range(count):
        pixels = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
        for k, (left, top) in enumerate(((4, 4), (42, 30))):
            left, top = int(left + rng.integers(0, 8)), int(top + rng.integers(0, 6))
            box = [left, top, 26, 22]
            if k == 0:
                right, bottom = left + 26, top + 22
                shape = [[left, top, right, top, right, bottom, left, bottom]]
                inside = (x >= left) & (x < right) & (y >= top) & (y < bottom)
            else:
                inside = ((x - left - 13) / 13) ** 2 + ((y - top - 11) / 11) ** 2 < 1
                shape = {"size": [HEIGHT, WIDTH], "counts": runs_of(inside)}
                if image % 2:
                    shape = coco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))
                    shape["counts"] = shape["counts"].decode()
            pixels[inside] = COLOURS[k]
            content["annotations"].append(
                {
                    "id": 10 * image + k + 1,
                    "image_id": image,
                    "category_id": (3, 7)[k],
                    "bbox": box,
                    "area": int(inside.sum()),
                    "iscrowd": int(image % 3 == 2 and k == 1),
                    "segmentation": shape,
                }
            )
        name = f"{image:03d}.png"
        Image.fromarray(pixels).save(folder / name)
        content["images"].append({"id": image, "file_name": name, "width": WIDTH, "height": HEIGHT})
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instances")
    return write_set(folder / "train", 6, 0), write_set(folder / "val", 3, 1)


@pytest.fixture
def configuration(settings, sets):
    def make(**changes):
        options = settings()["model_options"] | {"encoder_attention_heads": 8}
        values = {
            "task": "segmentation",
            "train_annotations": str(sets[0]),
            "val_annotations": str(sets[1]),
            "model_options": options,
            "batch_size": 3,
            "epochs": 1,
        }
        return TrainingConfig(**settings(**values | changes))

    return make


def test_masks_are_on_what_is_labelled(sets):
    index, report = check_labels(read_set(sets[0], segments=True))
    assert report.bad == {}
    dataset = DetectionDataset(index, EvaluationTransform({"shortest_edge": HEIGHT}))
    for i in range(len(index)):
        item = dataset[ImageRequest(i)]
        masks, labels = item["label"]["masks"], item["label"]["class_labels"]
        assert labels.tolist() == ([0] if i % 3 == 2 else [0, 1])
        assert masks.dtype == torch.bool
        for mask, label in zip(masks, labels, strict=True):
            colour = torch.tensor(COLOURS[int(label)])
            assert torch.equal(mask, (item["pixels"] == colour[:, None, None]).all(0))


@pytest.mark.parametrize("seed", range(4))
def test_masks_follow_boxes(sets, seed):
    """Through flip, crop, scale and padding."""
    index = read_set(sets[0], segments=True)
    transform = TrainingTransform((48, 64), 96, 0.5, 0.7, (64,), (40, 64))
    dataset = DetectionDataset(index, transform)
    batch = Collate(32)([dataset[ImageRequest(i, (seed, i), (seed,))] for i in range(3)])
    for image, label in zip(batch.pixels, batch.labels, strict=True):
        assert len(label["masks"]) == len(label["boxes"])
        for mask, kind in zip(label["masks"], label["class_labels"], strict=True):
            colour = image[:, mask].float().mean(1).tolist()
            assert colour == pytest.approx(COLOURS[int(kind)], abs=35)


def test_without_segments_nothing_is_read(sets):
    index = read_set(sets[0])
    assert index.segmentation_text is None
    assert segment_scorer(index) is None
    assert (
        "masks"
        not in DetectionDataset(index, EvaluationTransform({"shortest_edge": 64}))[ImageRequest(0)][
            "label"
        ]
    )


@pytest.mark.parametrize(
    ("segmentation", "kind"),
    [
        (None, "objects without a segmentation"),
        ([], "objects without a segmentation"),
        ([[1, 2, 3, 4]], "segmentations that are neither"),
        ([1, 2, 3, 4, 5, 6], "segmentations that are neither"),
        ({"size": [HEIGHT, WIDTH], "counts": [7]}, "segmentations that are neither"),
        ({"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]}, "segmentations that are neither"),
        ("polygon", "segmentations that are neither"),
    ],
)
def test_bad_segmentations_are_named_or_dropped(sets, tmp_path, segmentation, kind):
    content = json.loads(sets[0].read_text())
    content["annotations"][3]["segmentation"] = segmentation
    path = tmp_path / "labels.json"
    path.write_text(json.dumps(content))
    index = read_set(path, sets[0].parent, segments=True)
    with pytest.raises(DataError, match=rf"bad: 1 {kind}.*, annotation ids \(12 of image 1\)"):
        check_labels(index)
    kept, _ = check_labels(index, "drop")
    assert kept.num_objects == index.num_objects - 1
    check_labels(read_set(path, sets[0].parent))  # of boxes alone nobody reads it


def test_trains_and_evaluates(configuration, sets):
    config = configuration()
    trained = train(config)
    assert trained["step"] == 2
    assert 0 <= trained["mask_AP"] <= 1
    run = Path(config.output)
    assert (run / "best" / "config.json").exists()
    head = (run / "evaluation" / "classes.csv").read_text().splitlines()[0]
    assert head == "class,objects,AP,AP50,AR100,mask_AP,mask_AP50"
    options = {"device": "cpu", "num_workers": 0, "batch_size": 2}
    found = evaluate(run / "model", sets[1], **options)
    expected = {name: trained[name] for name in found.stats}
    assert {"AP", "mask_AP", "mask_AP50", "mask_AR100"} <= set(expected)
    assert found.stats == pytest.approx(expected, abs=1e-6, nan_ok=True)

    content = json.loads(sets[1].read_text())
    for item in content["annotations"]:
        del item["segmentation"]
    path = run / "boxes.json"
    path.write_text(json.dumps(content))
    boxes = evaluate(run / "model", path, sets[1].parent, **options)
    assert "mask_AP" not in boxes.stats
    assert boxes.stats["AP"] == pytest.approx(trained["AP"], abs=1e-6)
    with pytest.raises(DataError, match="objects without a segmentation"):
        Engine(configuration(train_annotations=str(path), train_images=str(sets[1].parent),
                             output=str(run / "other")), StopSignals())  # fmt: skip


def outputs_for(index, rows, generator):
    """Logits, boxes and masks of 6 queries: the truth moved a little, and noise."""
    queries, shape = 6, (HEIGHT // 4, WIDTH // 4)
    logits = torch.randn(len(rows), queries, 2, generator=generator) - 2
    masks = torch.randn(len(rows), queries, *shape, generator=generator) - 1
    boxes = torch.rand(len(rows), queries, 4, generator=generator) / 2 + 0.2
    for row, image in enumerate(rows):
        for k, item in enumerate(range(*index.objects(image).indices(10**6))):
            mask = index.mask(item, image).roll(3 * k - image, 1).float()[None, None]
            small = torch.nn.functional.adaptive_avg_pool2d(mask, shape)[0, 0]
            masks[row, k] = 8 * small - 4
            logits[row, k, index.labels[item]] = 2.0 - k
    return SimpleNamespace(logits=logits, pred_masks=masks, pred_boxes=boxes)


def test_mask_ap_equals_pycocotools(sets):
    index = read_set(sets[0], segments=True)
    scorer = segment_scorer(index)
    assert isinstance(scorer, MaskScorer)
    dataset = DetectionDataset(
        index, EvaluationTransform({"shortest_edge": HEIGHT}), with_maps=True
    )
    generator = torch.Generator().manual_seed(0)
    read = [[0, 1, 2], [3, 4]]  # the last image could not be read
    for rows in read:
        batch = Collate(1)([dataset[ImageRequest(i)] for i in rows])
        scorer(batch, outputs_for(index, rows, generator))
    batch = Collate(1)([dataset[ImageRequest(0, counted=False)]])  # fills up a batch
    scorer(batch, outputs_for(index, [0], generator))
    scorer.gather(None)
    stats, per_class = scorer.figures()
    assert 0.05 < stats["mask_AP"] < 1

    content = json.loads(sets[0].read_text())
    truth = COCO()
    truth.dataset = copy.deepcopy(content) | {"info": {}}
    for key, number in (("images", "id"), ("annotations", "image_id")):
        truth.dataset[key] = [item for item in truth.dataset[key] if item[number] < 5]
    truth.createIndex()
    ids = [category["id"] for category in CATEGORIES]
    results = [
        entry | {"category_id": ids[entry["category_id"]]}
        for entry in copy.deepcopy(scorer.results)
    ]
    theirs = COCOeval(truth, truth.loadRes(results), "segm")
    theirs.evaluate()
    theirs.accumulate()
    theirs.summarize()
    ours = [-1 if np.isnan(value) else value for value in stats.values()]
    assert ours == pytest.approx(theirs.stats.tolist(), abs=1e-9)
    precision = theirs.eval["precision"][..., 0, -1]
    assert per_class["mask_AP"] == pytest.approx(precision.mean((0, 1)), abs=1e-9)


def test_reports_show_masks(sets, tmp_path):
    """Labels and detections of one image; the one before it could not be read."""
    index = read_set(sets[0], segments=True)
    scorer = MaskScorer(index)
    dataset = DetectionDataset(
        index, EvaluationTransform({"shortest_edge": HEIGHT}), with_maps=True
    )
    batches = [Collate(1)([dataset[ImageRequest(i)]]) for i in (0, 3)]
    outputs = [outputs_for(index, [i], torch.Generator().manual_seed(i)) for i in (0, 3)]
    for batch, output in zip(batches, outputs, strict=True):
        scorer(batch, output)
    scorer.gather(None)
    read = np.array([i in (0, 3) for i in range(len(index))])
    read_index = index.select(read, np.ones(index.num_objects, bool))
    nothing = np.zeros(0, np.int64)
    found = Detections(
        nothing, nothing, nothing, np.zeros((0, 4), np.float32), [], np.arange(len(read_index))
    )
    evaluation = evaluate_detections(read_index, found, scorer)
    scored = Scored(read_index, found, evaluation, 0.5, scorer)
    shown = scored.shown(1)
    entries = [one for one in scorer.results if one["image_id"] == 3 and one["score"] >= 0.5]
    assert len(shown.labels) == len(entries) >= 2
    for i, entry in enumerate(entries):
        code = entry["segmentation"] | {"counts": entry["segmentation"]["counts"].encode()}
        assert np.array_equal(shown.mask_of(i), coco_mask.decode(code).astype(bool))
        assert shown.scores[i] == np.float32(entry["score"])

    write_report(Report("t", {}, torch.device("cpu"), [], scored), tmp_path / "report.html")
    page = read_page(tmp_path / "report.html")
    names = [text for text in page.texts["figcaption"] if ".png" in text]
    position = 2 * [text.startswith("003.png") for text in names].index(True)
    zoom = 480 // WIDTH
    labels = mask_levels(page, position, (480, HEIGHT * zoom))
    assert len(labels) == 2
    for drawn, item in zip(labels, range(*index.objects(3).indices(10**6)), strict=True):
        truth = np.kron(index.mask(item, 3).numpy(), np.ones((zoom, zoom), bool))
        assert np.array_equal(drawn > 0, truth)
    assert len(mask_levels(page, position + 1, (480, HEIGHT * zoom))) == len(entries)

    draw_images(scored, [1], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    inside = sheet[10 : 10 + HEIGHT * zoom, 10:490][labels[0] == 1].astype(int)
    tint = np.median(inside, axis=0)
    expected = (np.array(COLOURS[0]) + class_colour(0)) / 2
    assert np.abs(tint - expected).max() < 8
