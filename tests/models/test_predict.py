"""`predict`: every kind of image in, the results of processor, model and post-processing out."""

import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from support.tiny import NAMES, randomized, tiny_config

from cdetr_fast import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
    ConditionalDetrImageProcessor,
)
from cdetr_fast.images.results import DetectionResult, SegmentationResult

SIZE = {"shortest_edge": 64, "longest_edge": 96}


@pytest.fixture(scope="module")
def detector():
    model = randomized(ConditionalDetrForObjectDetection(tiny_config()))
    model.image_processor = ConditionalDetrImageProcessor(size=SIZE)
    return model


@pytest.fixture(scope="module", params=["paper", "transformers"])
def segmenter(request):
    model = randomized(ConditionalDetrForSegmentation(tiny_config(compat=request.param)))
    if request.param == "transformers":  # which drops queries of the last class
        model.conditional_detr.class_labels_classifier.bias.data[2] = -40
    model.image_processor = ConditionalDetrImageProcessor(size=SIZE, compat=request.param)
    return model


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


PICTURES = [picture(80, 60), picture(50, 90, 1), picture(64, 64, 2)]


def by_hand(model, image: Image.Image, threshold: float, top_k: int = 100) -> dict:
    processor = model.image_processor
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    sizes = [(image.height, image.width)]
    return processor.post_process_object_detection(outputs, threshold, sizes, top_k)[0]


def assert_equal(result: DetectionResult, expected: dict | DetectionResult, atol=0.0) -> None:
    if isinstance(expected, dict):
        expected = DetectionResult(
            expected["scores"], expected["labels"], expected["boxes"], result.image_hw, NAMES
        )
    assert torch.equal(result.labels, expected.labels)
    torch.testing.assert_close(result.scores, expected.scores, rtol=0, atol=atol)
    torch.testing.assert_close(result.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=100 * atol)
    assert result.image_hw == expected.image_hw


def encoded(image: Image.Image, form: str) -> bytes:
    stream = BytesIO()
    image.save(stream, form)
    return stream.getvalue()


# --- images in ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", ["path", "str", "bytes", "bytearray", "stream", "PIL", "hwc", "chw", "grey"]
)
def test_one_image_of_any_kind(detector, kind, tmp_path):
    image = PICTURES[0].convert("L").convert("RGB") if kind == "grey" else PICTURES[0]
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image, "PNG"))
    pixels = np.array(image)
    given = {
        "path": path,
        "str": str(path),
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "stream": BytesIO(path.read_bytes()),
        "PIL": image,
        "hwc": pixels,
        "chw": torch.from_numpy(pixels).permute(2, 0, 1),
        "grey": pixels[..., 0],
    }[kind]
    result = detector.predict(given, threshold=0.3)
    assert isinstance(result, DetectionResult)
    assert result.image_hw == (60, 80)
    assert 0 < len(result) < 21
    assert_equal(result, by_hand(detector, image, 0.3))


def test_jpeg_files_and_their_orientation(detector, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    PICTURES[0].save(tmp_path / "a.jpg", exif=exif)
    result = detector.predict(tmp_path / "a.jpg", threshold=0.0)
    assert result.image_hw == (80, 60)
    with Image.open(tmp_path / "a.jpg") as image:
        upright = ImageOps.exif_transpose(image)
    assert_equal(result, by_hand(detector, upright, 0.0))


def test_several_images_give_a_list(detector):
    expected = [by_hand(detector, image, 0.4) for image in PICTURES]
    for images in (PICTURES, tuple(PICTURES)):
        results = detector.predict(images, threshold=0.4)
        assert isinstance(results, list)
        for result, each in zip(results, expected, strict=True):
            assert_equal(result, each)
    batch = np.stack([np.array(PICTURES[0])] * 2)
    for images in (batch, torch.from_numpy(batch), [PICTURES[0]] * 2):
        for result in detector.predict(images, threshold=0.4):
            assert_equal(result, expected[0])
    assert len(detector.predict([PICTURES[0]])) == 1
    assert detector.predict([]) == []


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_batches_of_one_size_change_nothing(detector, batch_size):
    images = [picture(80, 60, seed) for seed in range(5)]
    for result, image in zip(
        detector.predict(images, 0.4, batch_size=batch_size), images, strict=True
    ):
        assert_equal(result, by_hand(detector, image, 0.4), atol=1e-5)


def test_results_come_one_by_one_from_any_iterable(detector):
    read = []

    def images():
        for i in range(6):
            read.append(i)
            yield PICTURES[i % 3]

    results = detector.predict_each(images(), threshold=0.4)
    assert read == []
    first = next(results)
    assert_equal(first, by_hand(detector, PICTURES[0], 0.4))
    assert len(read) <= 2  # one ahead
    results.close()
    assert len(read) <= 2
    assert len(list(detector.predict_each(images(), threshold=0.4, batch_size=4))) == 6


@pytest.mark.parametrize("broken", [b"nothing", encoded(PICTURES[0], "JPEG")[:200]])
def test_a_broken_file_is_named(detector, broken, tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.jpg", "c.png")]
    for path in paths:
        path.write_bytes(encoded(PICTURES[0], "PNG"))
    paths[1].write_bytes(broken)
    with pytest.raises(OSError, match=r"b\.jpg: "):
        detector.predict(paths)
    results = detector.predict_each(paths)
    next(results)
    with pytest.raises(OSError, match=r"b\.jpg: "):
        next(results)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        detector.predict(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("images", "options", "error", "message"),
    [
        (3, {}, TypeError, "images: expected PIL images"),
        (None, {}, TypeError, "images: expected PIL images"),
        ({"image": PICTURES[0]}, {}, TypeError, "images: expected PIL images"),
        ([PICTURES[0], 3], {}, TypeError, "images: expected PIL images"),
        (np.zeros((5, 6, 7)), {}, ValueError, r"images\[0\]: expected 1, 3 or 4 channels"),
        ([PICTURES[0], np.zeros(4)], {}, ValueError, r"images\[1\]: expected \[H, W\]"),
        (PICTURES, {"threshold": 1.5}, ValueError, r"threshold: expected a number in \[0, 1\]"),
        (PICTURES, {"threshold": "high"}, TypeError, "threshold: expected a number"),
        (PICTURES, {"top_k": 0}, ValueError, "top_k: expected an integer >= 1, got 0"),
        (PICTURES, {"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        (PICTURES, {"batch_size": 2.0}, TypeError, "batch_size: expected an integer"),
    ],
)
def test_bad_input(detector, images, options, error, message):
    with pytest.raises(error, match=message):
        detector.predict(images, **options)
    if options:  # refused at once, not at the first result
        with pytest.raises(error, match=message):
            detector.predict_each(images, **options)


# --- the model's state ----------------------------------------------------------------------------


def test_modes_are_restored_and_nothing_is_tracked(detector):
    model = ConditionalDetrForObjectDetection(tiny_config(dropout=0.5))
    model.load_state_dict(detector.state_dict())
    model.image_processor = detector.image_processor
    model.train()
    model.model.backbone.eval()
    before = {name: module.training for name, module in model.named_modules()}
    result = model.predict(PICTURES[0], threshold=0.0)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert any(before.values())
    assert not all(before.values())
    assert_equal(result, by_hand(detector, PICTURES[0], 0.0))  # without dropout
    for tensor in (result.scores, result.boxes_xyxy, result.labels):
        assert not tensor.requires_grad
        assert not tensor.is_inference()
    with pytest.raises(OSError, match="nothing"):
        model.predict(["nothing.png"])
    assert {name: module.training for name, module in model.named_modules()} == before


def test_another_default_device(detector, segmenter):
    """Torch makes new tensors there; images and results are on the CPU."""
    expected = detector.predict(PICTURES, threshold=0.0), segmenter.predict(PICTURES[0])
    annotation = {
        "image_id": 1,
        "annotations": [{"bbox": [1, 2, 9, 8], "area": 72, "category_id": 1}],
    }
    labels = {"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.4)}
    with torch.device("meta"):
        found = detector.predict(PICTURES, threshold=0.0), segmenter.predict(PICTURES[0])
        found[0][0].draw(PICTURES[0])
        found[1].draw(PICTURES[0])
        found[1].to_coco(1)
        inputs = detector.image_processor(PICTURES[0], annotation, return_tensors="pt")
        loss = detector(inputs["pixel_values"], labels=[labels]).loss
    for got, wanted in zip([*found[0], found[1]], [*expected[0], expected[1]], strict=True):
        assert_equal(got, wanted)
    assert all(value.device.type == "cpu" for value in inputs["labels"][0].values())
    assert loss.isfinite()


def test_a_configuration_that_asks_for_tuples(detector, monkeypatch):
    expected = detector.predict(PICTURES[0], threshold=0.0)
    monkeypatch.setattr(detector.config, "return_dict", False)
    assert_equal(detector.predict(PICTURES[0], threshold=0.0), expected)


def test_half_precision_models(detector):
    model = ConditionalDetrForObjectDetection(tiny_config())
    model.load_state_dict(detector.state_dict())
    model.image_processor = detector.image_processor
    result = model.to(torch.bfloat16).eval().predict(PICTURES[0], threshold=0.0)
    assert len(result) == 21
    assert result.scores.dtype == result.boxes_xyxy.dtype == torch.float32


# --- the image processor --------------------------------------------------------------------------


def test_the_processor_comes_with_the_checkpoint(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    ConditionalDetrImageProcessor(size={"height": 32, "width": 40}).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ConditionalDetrForObjectDetection.from_pretrained(tmp_path)
        assert model.image_processor.size == {"height": 32, "width": 40}
        weights = tmp_path / "model.safetensors"
        alone = ConditionalDetrForObjectDetection.from_pretrained(weights)
        assert alone.image_processor.size == {"height": 32, "width": 40}
    assert_equal(model.predict(PICTURES[0], 0.0), by_hand(model, PICTURES[0], 0.0))


def test_a_checkpoint_without_processor_warns(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    model = ConditionalDetrForObjectDetection.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no preprocessor_config\.json: .* default settings"):
        assert model.image_processor.size == {"shortest_edge": 800, "longest_edge": 1333}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert model.image_processor is model.image_processor


def test_a_processor_that_cannot_be_read_is_an_error(detector, tmp_path):
    detector.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    model = ConditionalDetrForObjectDetection.from_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"preprocessor_config\.json: expected a JSON file"):
        model.predict(PICTURES[0])


def test_a_new_model_has_default_settings_and_its_own_compat():
    model = ConditionalDetrForObjectDetection(tiny_config(compat="transformers"))
    assert model.image_processor.compat == "transformers"
    with pytest.raises(TypeError, match=r"image_processor: expected .* got builtins\.dict"):
        model.image_processor = {}


# --- segmentation ---------------------------------------------------------------------------------


def segmented_by_hand(model, image: Image.Image, threshold: float, **options) -> tuple:
    processor = model.image_processor
    with torch.no_grad():
        outputs = model(**processor(image, return_tensors="pt"))
    fuse = options.pop("label_ids_to_fuse", None)
    name = "instance" if fuse is None else "panoptic"
    options |= {} if fuse is None else {"label_ids_to_fuse": fuse}
    function = getattr(processor, f"post_process_{name}_segmentation")
    sizes = [(image.height, image.width)]
    return outputs, function(outputs, threshold, target_sizes=sizes, **options)[0]


@pytest.mark.parametrize("fuse", [None, {0, 1, 2}])
@pytest.mark.parametrize("overlap", [0.0, 0.6])
def test_segments_are_those_of_the_whole_model(segmenter, fuse, overlap):
    options = {"overlap_mask_area_threshold": overlap}
    options |= {} if fuse is None else {"label_ids_to_fuse": fuse}
    with torch.no_grad():
        logits = segmenter(**segmenter.image_processor(PICTURES[0])).logits[0]
    paper = segmenter.config.compat == "paper"
    best = (logits.sigmoid() if paper else logits.softmax(-1)).amax(-1).sort().values
    threshold = ((best[1] + best[2]) / 2).item()  # two queries of seven are dropped
    counts = []
    for image in PICTURES:
        outputs, expected = segmented_by_hand(segmenter, image, threshold, **options)
        result = segmenter.predict(image, threshold, **options)
        assert isinstance(result, SegmentationResult)
        infos = expected["segments_info"]
        counts.append(len(infos))
        assert result.segment_ids == [info["id"] for info in infos]
        assert result.labels.tolist() == [info["label_id"] for info in infos]
        scores = torch.tensor([info["score"] for info in infos])
        torch.testing.assert_close(result.scores, scores, rtol=0, atol=2e-6)
        differing = result.segmentation != expected["segmentation"].clamp(min=0)
        assert differing.float().mean() < 1e-3  # sums of other batch sizes round otherwise
        assert result.masks.shape == (len(infos), image.height, image.width)
        if fuse is None or not paper:  # one query a segment: its box is the box head's
            boxes = outputs.pred_boxes[0] * torch.tensor([image.width, image.height] * 2)
            corners = torch.cat(
                (boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1
            )
            distance = (result.boxes_xyxy[:, None] - corners).abs().amax(-1)
            assert (distance.amin(dim=1) < 1e-2).all()
    assert max(counts) > 0 or overlap > 0


def test_masks_of_a_fixed_batch_size_do_not_cover_the_padding(segmenter, monkeypatch):
    options = {"threshold": 0.3, "overlap_mask_area_threshold": 0.0}
    expected = segmenter.predict(PICTURES[0], **options)
    assert len(expected) > 0
    padding = ConditionalDetrImageProcessor(
        size=SIZE, compat=segmenter.config.compat, pad_size={"height": 128, "width": 160}
    )
    monkeypatch.setattr(segmenter, "_image_processor", padding)
    result = segmenter.predict(PICTURES[0], **options)
    assert result.segment_ids == expected.segment_ids
    assert torch.equal(result.segmentation, expected.segmentation)


def test_masks_are_computed_for_kept_queries_alone(segmenter, monkeypatch):
    seen = []
    head = segmenter.mask_head.forward

    def watched(features, attention_maps, maps):
        seen.append(attention_maps.shape[1])
        return head(features, attention_maps, maps)

    monkeypatch.setattr(segmenter.mask_head, "forward", watched)
    nothing = segmenter.predict(PICTURES[0], threshold=1.0)
    assert len(nothing) == 0
    assert nothing.masks.shape == (0, 60, 80)
    assert (nothing.segmentation == 0).all()
    assert nothing.to_coco(1) == []
    assert seen == []
    with torch.no_grad():
        logits = segmenter(**segmenter.image_processor(PICTURES[0])).logits[0]
    scores = logits.sigmoid() if segmenter.config.compat == "paper" else logits.softmax(-1)
    scores, labels = scores.max(-1)
    if segmenter.config.compat == "transformers":
        scores = scores.masked_fill(labels == 2, 0.0)
    best = scores.sort(descending=True).values
    seen.clear()
    segmenter.predict(PICTURES[0], threshold=((best[0] + best[1]) / 2).item())
    assert seen == [1]


def test_images_of_different_sizes_are_segmented_as_if_alone(segmenter):
    images = [PICTURES[0], picture(80, 60, 5), PICTURES[1], PICTURES[2]]
    alone = [segmenter.predict(image, 0.3, overlap_mask_area_threshold=0.1) for image in images]
    results = segmenter.predict(images, 0.3, overlap_mask_area_threshold=0.1, batch_size=3)
    for result, expected in zip(results, alone, strict=True):
        assert_equal(result, expected, atol=1e-4)
        assert (result.segmentation != expected.segmentation).float().mean() < 1e-3
