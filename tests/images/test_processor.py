"""Images and annotations to model inputs, against transformers where transformers has an answer."""

import contextlib
import json
import os
import pickle
import warnings
from io import BytesIO

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers import image_processing_backends

from cdetr_fast.images import (
    BatchFeature,
    ConditionalDetrFeatureExtractor,
    ConditionalDetrImageProcessor,
    ConditionalDetrImageProcessorFast,
)
from cdetr_fast.images import resize as resize_module
from cdetr_fast.images import targets as annotations_module
from cdetr_fast.images.load import load_images
from cdetr_fast.images.resize import resized_hw

Theirs = transformers.ConditionalDetrImageProcessor
SMALL = {"shortest_edge": 64, "longest_edge": 101}
# transformers 5.17 turns no file upright, drops transparency, and takes grey levels and the numbers
# of a palette for colours.
LIKE_TODAYS = hasattr(image_processing_backends, "convert_to_rgb_pil")
REFUSED = ("L", "LA", "P", "RGBA", "CMYK") if LIKE_TODAYS else ("LA", "RGBA", "CMYK")


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A smooth random image `[H, W, C]`, so that resizing has something to get wrong."""
    shape = (height // 4 + 2, width // 4 + 2, channels)
    cells = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    bands = [
        Image.fromarray(cells[..., i]).resize((width, height), Image.Resampling.BICUBIC)
        for i in range(channels)
    ]
    return np.stack([np.array(band) for band in bands], axis=-1)


def chw(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def assert_equal_features(ours, theirs) -> None:
    """Same keys, dtypes and values, labels included."""
    assert set(ours) == set(theirs)
    for key in set(ours) - {"labels"}:
        assert ours[key].dtype == theirs[key].dtype, key
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0, msg=key)
    for our_label, their_label in zip(
        ours.get("labels", []), theirs.get("labels", []), strict=True
    ):
        assert set(our_label) == set(their_label)
        for key in our_label:
            assert our_label[key].dtype == their_label[key].dtype, key
            torch.testing.assert_close(our_label[key], their_label[key], rtol=0, atol=0, msg=key)


def compare(images, settings=None, **call) -> BatchFeature:
    """Runs both processors and returns our result, which equals theirs bit for bit."""
    settings = {"size": SMALL} | (settings or {})
    ours = ConditionalDetrImageProcessor(**settings)(images, return_tensors="pt", **call)
    theirs = Theirs(**settings)(images, return_tensors="pt", **call)
    assert_equal_features(ours, theirs)
    return ours


# --- pixels -------------------------------------------------------------------------------------


def test_photo_equals_transformers(photo, data_folder):
    ours = compare(photo, {"size": None})
    assert ours.pixel_values.shape == (1, 3, 800, 1066)
    if data_folder:  # the values that the README of the data gives
        expected = torch.tensor([0.2796, 0.3138, 0.3481])
        torch.testing.assert_close(ours.pixel_values[0, 0, 0, :3], expected, rtol=0, atol=1e-4)


def test_photo_is_near_transformers_pil_path(photo):
    pil = transformers.ConditionalDetrImageProcessorPil()(photo, return_tensors="pt")
    ours = ConditionalDetrImageProcessor()(photo)
    torch.testing.assert_close(ours.pixel_values, pil["pixel_values"], rtol=0, atol=0.05)
    assert torch.equal(ours.pixel_mask, pil["pixel_mask"])


@pytest.mark.parametrize("height_width", [(97, 131), (131, 97), (64, 64), (40, 301), (301, 40)])
def test_odd_sizes(height_width):
    compare(Image.fromarray(pixels(*height_width)))


def test_batch_of_sizes_is_padded_with_a_mask():
    images = [Image.fromarray(pixels(*hw)) for hw in [(97, 131), (131, 90), (64, 64)]]
    ours = compare(images)
    assert ours.pixel_values.shape[-2:] == (93, 86)
    assert ours.pixel_mask.flatten(1).sum(1).tolist() == [64 * 86, 93 * 64, 64 * 64]
    assert (ours.pixel_values * (1 - ours.pixel_mask)[:, None] == 0).all()


@pytest.mark.parametrize("alone", [True, False])
def test_grouping_changes_nothing(alone):
    images = [chw(pixels(97, 131, seed=1)), chw(pixels(60, 70)), chw(pixels(97, 131, seed=2))]
    compare(images, disable_grouping=alone)


@pytest.mark.parametrize(
    "image",
    [
        pixels(97, 131),
        pixels(97, 131).transpose(2, 0, 1),
        pixels(97, 131).astype(np.float32),
        chw(pixels(97, 131)),
        chw(pixels(97, 131)).float(),
        chw(pixels(97, 131)).double() / 255,
        chw(pixels(97, 131)).to(torch.int32),
        chw(pixels(97, 131, 1)).float(),
        chw(pixels(97, 131))[None],
        torch.stack([chw(pixels(97, 131)), chw(pixels(97, 131, seed=1))]),
        [[chw(pixels(97, 131))], [chw(pixels(60, 70))]],
        (pixels(97, 131), pixels(60, 70)),
    ],
    ids=[
        "hwc",
        "chw",
        "hwc-float",
        "chw-tensor",
        "float-tensor",
        "double",
        "int32",
        "grey-1hw",
        "batch-of-1",
        "batch",
        "nested",
        "tuple",
    ],
)
def test_array_inputs(image):
    compare(image)


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 50, "width": 70}},
        {"size": (50, 70)},
        {"size": {"max_height": 50, "max_width": 200}},
        {"size": 64, "max_size": 90},
        {"size": 64},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [0.5, 0.5, 0.5]},
        {"do_pad": False},
        {"pad_and_return_pixel_mask": False},
        {"pad_size": {"height": 120, "width": 140}},
        {"pad_size": 150},
        {"resample": 0},
        {"resample": 3},
        {"resample": Image.Resampling.LANCZOS},
        {"do_convert_rgb": True},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_settings_at_construction_and_per_call(settings):
    image = Image.fromarray(pixels(97, 131))
    expected = compare(image, settings)
    if not settings.keys() & {"max_size", "pad_and_return_pixel_mask"} and settings != {"size": 64}:
        overridden = compare(image, **settings)
        assert torch.equal(overridden.pixel_values, expected.pixel_values)


@pytest.mark.filterwarnings("error")
def test_lanczos_is_bicubic_where_torchvision_has_none(monkeypatch):
    image = Image.fromarray(pixels(97, 131))
    lanczos = ConditionalDetrImageProcessor(size=SMALL, resample=Image.Resampling.LANCZOS)
    bicubic = ConditionalDetrImageProcessor(size=SMALL, resample=Image.Resampling.BICUBIC)
    expected = bicubic(image).pixel_values
    monkeypatch.setattr(resize_module, "_HAS_LANCZOS", False)
    with pytest.warns(UserWarning, match="resample: .* has no LANCZOS for tensors on cpu; BICUBIC"):
        assert torch.equal(lanczos(image).pixel_values, expected)


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    shortest=st.integers(1, 1200),
    longest=st.integers(1, 2000),
)
def test_sizes_equal_transformers(height, width, shortest, longest):
    from transformers.image_transforms import get_size_with_aspect_ratio
    from transformers.image_utils import get_image_size_for_max_height_width

    def at_least_1(size):
        return tuple(max(1, side) for side in size)

    size = {"shortest_edge": shortest, "longest_edge": longest}
    theirs = get_size_with_aspect_ratio((height, width), shortest, longest)
    assert resized_hw(height, width, size) == at_least_1(theirs)
    size = {"max_height": shortest, "max_width": longest}
    theirs = get_image_size_for_max_height_width((height, width), shortest, longest)
    assert resized_hw(height, width, size) == at_least_1(theirs)


def test_sizes_that_transformers_refuses():
    assert resized_hw(100, 200, {"shortest_edge": 50}) == (50, 100)
    assert resized_hw(200, 100, {"longest_edge": 50}) == (50, 25)
    image = Image.fromarray(pixels(40, 60))
    with pytest.raises(ValueError, match="Size must contain"):
        Theirs()(image, size={"shortest_edge": 50})
    assert ConditionalDetrImageProcessor()(image, size=20).pixel_values.shape[-2:] == (20, 30)


# --- inputs on which transformers fails ---------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr"])
def test_pil_modes_are_converted_to_rgb(mode):
    image = Image.fromarray(pixels(97, 131)).convert(mode)
    processor = ConditionalDetrImageProcessor(size=SMALL)
    assert torch.equal(processor(image).pixel_values, processor(image.convert("RGB")).pixel_values)
    if mode in REFUSED:
        with pytest.raises((RuntimeError, ValueError)):
            Theirs(size=SMALL)(image, return_tensors="pt")


def test_transparency_is_dropped_or_laid_over_white():
    rgba = pixels(97, 131, 4)
    processor = ConditionalDetrImageProcessor(size=SMALL)
    dropped = processor(Image.fromarray(rgba)).pixel_values
    assert torch.equal(dropped, processor(rgba[..., :3]).pixel_values)
    assert torch.equal(dropped, processor(rgba).pixel_values)
    grey = Image.fromarray(rgba).convert("LA")
    for image in (Image.fromarray(rgba), chw(rgba), chw(rgba) / 255, grey):
        if LIKE_TODAYS:
            compare(image, do_convert_rgb=True)
    alpha = rgba[..., 3:] / 255
    white = np.round(rgba[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)
    got = processor(Image.fromarray(rgba), do_convert_rgb=True).pixel_values
    torch.testing.assert_close(got, processor(white).pixel_values, rtol=0, atol=0.02)


def test_grey_arrays():
    grey = pixels(97, 131, 1)[..., 0]
    processor = ConditionalDetrImageProcessor(size=SMALL)
    expected = processor(np.stack([grey] * 3, axis=-1)).pixel_values
    for image in (grey, torch.from_numpy(grey), grey[..., None], Image.fromarray(grey)):
        assert torch.equal(processor(image).pixel_values, expected)


def test_arrays_that_tensors_cannot_share():
    image = pixels(97, 131)
    read_only = image.copy()
    read_only.setflags(write=False)
    processor = ConditionalDetrImageProcessor(size=SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(processor(read_only).pixel_values, processor(image).pixel_values)
        flipped = processor(image[:, ::-1]).pixel_values
    assert torch.equal(flipped, processor(image[:, ::-1].copy()).pixel_values)
    deep = processor(image.astype(np.uint16) * 257, rescale_factor=1 / 65535).pixel_values
    torch.testing.assert_close(deep, processor(image).pixel_values, rtol=0, atol=0.02)


def test_inputs_are_not_changed():
    image = chw(pixels(97, 131)).float()
    before = image.clone()
    for settings in ({}, {"do_resize": False}, {"do_resize": False, "do_pad": False}):
        ConditionalDetrImageProcessor(size=SMALL, **settings)(image)
        assert torch.equal(image, before)


def exif_rotated(image: Image.Image, orientation: int) -> Image.Image:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = BytesIO()
    image.save(stream, "PNG", exif=exif)
    stream.seek(0)
    return Image.open(stream)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(pixels(97, 131))
    processor = ConditionalDetrImageProcessor(size=SMALL)
    with pytest.warns(UserWarning, match=r"images\[0\]: turned upright .* 131 x 97"):
        turned = processor(exif_rotated(image, 6)).pixel_values
    upright = image.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(turned, processor(upright).pixel_values)
    half_turn = processor(exif_rotated(image, 3)).pixel_values  # same size: no warning
    assert torch.equal(half_turn, processor(image.rotate(180)).pixel_values)

    path = tmp_path / "turned.png"
    exif_rotated(image, 6).save(path, exif=exif_rotated(image, 6).getexif())
    from_file = processor(path).pixel_values
    assert torch.equal(from_file, turned)
    if LIKE_TODAYS:  # transformers turns files only
        theirs = Theirs(size=SMALL)(str(path), return_tensors="pt")
        assert torch.equal(from_file, theirs["pixel_values"])


def test_paths_and_data_urls(tmp_path):
    import base64

    image = Image.fromarray(pixels(97, 131))
    path = tmp_path / "image.png"
    image.save(path)
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    processor = ConditionalDetrImageProcessor(size=SMALL)
    expected = processor(image).pixel_values
    for source in (path, str(path), data):
        assert torch.equal(processor(source).pixel_values, expected)
    with pytest.raises(FileNotFoundError, match="absent"):
        processor(tmp_path / "absent.png")


def jpeg(image: Image.Image, **options) -> bytes:
    stream = BytesIO()
    image.save(stream, "JPEG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{"quality": 90}, {"progressive": True, "subsampling": 0}, {"quality": 40, "subsampling": 1}],
    ids=str,
)
def test_jpeg_files_are_read_as_pil_reads_them(mode, options, tmp_path):
    content = jpeg(Image.fromarray(pixels(97, 131)).convert(mode), **options)
    path = tmp_path / "photo.jpg"
    path.write_bytes(content)
    expected = chw(np.array(Image.open(path).convert("RGB")))
    for source in (path, str(path), content):
        (read,) = load_images(source)
        assert torch.equal(read, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_files_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = jpeg(Image.fromarray(pixels(97, 131)), exif=exif)
    (read,) = load_images(content)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert torch.equal(read, chw(np.array(upright)))


@pytest.mark.parametrize("content", [jpeg(Image.new("RGB", (9, 9)))[:-60], b"nothing", b""])
def test_broken_files(content, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for source in (path, content):
        name = r"images\[0\]" if isinstance(source, bytes) else "broken.jpg"
        with pytest.raises(OSError, match=rf"(?i){name}: .*(truncated|not an image)"):
            load_images(source)


def test_jpeg_files_without_torchvisions_decoder(monkeypatch):
    content = jpeg(Image.fromarray(pixels(97, 131)))
    (expected,) = load_images(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torchvision 0.29 warns that it will be gone
        assert torch.equal(load_images(content)[0], expected)
    monkeypatch.delattr("torchvision.io.decode_jpeg")
    assert torch.equal(load_images(content)[0], expected)


def test_nvjpeg_decodes_files_on_a_gpu(monkeypatch):
    asked = []

    def decode(data, mode, **options):
        asked.append(options)
        raise RuntimeError("no GPU here")

    monkeypatch.setattr("torchvision.io.decode_jpeg", decode)
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (jpeg(Image.new("RGB", (9, 6))), jpeg(Image.new("RGB", (9, 6)), exif=exif)):
        with contextlib.suppress(RuntimeError, AssertionError):  # no GPU to put PIL's pixels on
            load_images(content, device="cuda:0")
    assert asked == [{"device": "cuda:0"}] * 2  # the second is turned afterwards


def test_channels_first_is_assumed_or_told():
    ambiguous = pixels(3, 64).transpose(0, 1, 2)  # [3, 64, 3]
    processor = ConditionalDetrImageProcessor(do_resize=False)
    assert processor(ambiguous).pixel_values.shape == (1, 3, 64, 3)
    told = processor(ambiguous, input_data_format="channels_last")
    assert told.pixel_values.shape == (1, 3, 3, 64)
    compare(ambiguous, {"do_resize": False}, input_data_format="channels_last")


# --- results --------------------------------------------------------------------------------------


def test_return_types():
    image, processor = pixels(97, 131), ConditionalDetrImageProcessor(size=SMALL)
    label = {"image_id": 1, "annotations": []}
    arrays = processor(image, annotations=label, return_tensors="np")
    assert isinstance(arrays.pixel_values, np.ndarray)
    assert isinstance(arrays["labels"][0]["boxes"], np.ndarray)
    last = processor(image, data_format="channels_last")
    assert last.pixel_values.shape == (1, 64, 86, 3)
    assert torch.equal(last.pixel_values.permute(0, 3, 1, 2), processor(image).pixel_values)
    with pytest.raises(ValueError, match=r"return_tensors: .* got 'tf'"):
        processor(image, return_tensors="tf")


def test_batch_feature():
    features = ConditionalDetrImageProcessor(size=SMALL)(
        pixels(97, 131), annotations={"image_id": 1, "annotations": []}
    )
    assert features.pixel_values is features["pixel_values"]
    assert set({**features}) == {"pixel_values", "pixel_mask", "labels"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = features.nothing
    copy = pickle.loads(pickle.dumps(features))
    assert torch.equal(copy.pixel_values, features.pixel_values)
    half = copy.to(torch.bfloat16)
    assert half is copy
    assert copy.pixel_values.dtype == torch.bfloat16
    assert copy.pixel_mask.dtype == torch.int64
    assert copy.labels[0].boxes.dtype == torch.float32
    copy.to("meta", torch.float16)
    assert copy.pixel_values.dtype == torch.float16
    assert copy.pixel_values.device == copy.labels[0].boxes.device == torch.device("meta")
    with pytest.raises(TypeError, match=r"floating point dtype, got torch\.int64"):
        copy.to(torch.int64)


def test_device_argument():
    features = ConditionalDetrImageProcessor(size=SMALL, device="cpu")(
        pixels(97, 131), annotations={"image_id": 1, "annotations": []}
    )
    assert features.pixel_values.device == features.labels[0].boxes.device == torch.device("cpu")


# --- annotations ----------------------------------------------------------------------------------


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

    features = processor.pad([image, torch.rand(3, 25, 10)], return_tensors="pt")
    assert features.pixel_values.shape == (2, 3, 25, 30)
    assert features.pixel_mask.flatten(1).sum(1).tolist() == [600, 250]
    with pytest.raises(ValueError, match=r"at least \[20, 30\], got \[10, 40\]"):
        processor.pad(image, (10, 40))


# --- preprocessor_config.json ---------------------------------------------------------------------

V4_FEATURE_EXTRACTOR = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConditionalDetrFeatureExtractor",
    "format": "coco_detection",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "max_size": 1333,
    "size": 800,
}
V4_FAST = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": False,
    "device": None,
    "do_center_crop": None,
    "do_convert_annotations": True,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "format": "coco_detection",
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "ConditionalDetrImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "pad_size": None,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"longest_edge": 1333, "shortest_edge": 800},
}


@pytest.mark.parametrize("content", [V4_FEATURE_EXTRACTOR, V4_FAST], ids=["v4", "v4-fast"])
def test_files_of_transformers_4(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = ConditionalDetrImageProcessor.from_pretrained(tmp_path)
    expected = Theirs.from_pretrained(tmp_path).to_dict()
    for key, value in processor.to_dict().items():
        assert expected[key] == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"max_height": 60, "max_width": 90}, "pad_size": 100, "do_normalize": False},
        {"size": SMALL, "resample": 3, "format": "coco_panoptic", "image_mean": 0.5},
        {"size": (30, 40), "do_pad": False, "do_convert_rgb": True, "rescale_factor": 0.5},
    ],
    ids=str,
)
def test_files_go_both_ways(tmp_path, settings):
    theirs, ours = Theirs(**settings), ConditionalDetrImageProcessor(**settings)
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    theirs.save_pretrained(tmp_path / "theirs")
    assert ours.save_pretrained(tmp_path / "ours") == [
        str(tmp_path / "ours" / "preprocessor_config.json")
    ]
    back = Theirs.from_pretrained(tmp_path / "ours")
    assert json.loads(back.to_json_string()) == json.loads(theirs.to_json_string())
    read = ConditionalDetrImageProcessor.from_pretrained(tmp_path / "theirs")
    assert read.to_dict() == ours.to_dict()
    auto = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert type(auto) is Theirs


def test_processor_config_goes_first(tmp_path):
    nested = {"image_processor": {"size": {"height": 10, "width": 20}}, "processor_class": "X"}
    ConditionalDetrImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = ConditionalDetrImageProcessor.from_pretrained(tmp_path)
    assert (
        processor.size == {"height": 10, "width": 20} == dict(Theirs.from_pretrained(tmp_path).size)
    )
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert ConditionalDetrImageProcessor.from_pretrained(tmp_path).size["shortest_edge"] == 800


def test_overrides_and_unknown_keys(tmp_path):
    ConditionalDetrImageProcessor().save_pretrained(tmp_path)
    read = ConditionalDetrImageProcessor.from_pretrained
    assert read(tmp_path, do_pad=False, use_fast=True).do_pad is False
    file = tmp_path / "preprocessor_config.json"
    assert read(file, size={"height": 3, "width": 4}).size == {"height": 3, "width": 4}
    processor, unused = read(tmp_path, do_pad=False, foo=1, return_unused_kwargs=True)
    assert processor.do_pad is False
    assert unused == {"foo": 1}
    with pytest.raises(TypeError, match="unknown field 'do_padd'; did you mean 'do_pad'"):
        read(tmp_path, do_padd=False)
    with pytest.warns(UserWarning, match=r"unknown settings are left out: \['new_key'\]"):
        ConditionalDetrImageProcessor.from_dict({"new_key": 1})
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        read(tmp_path / "..", local_files_only=True)
    file.write_text("{")
    with pytest.raises(OSError, match="expected a JSON file"):
        read(tmp_path)


def test_compat_is_written_only_when_it_is_not_the_default(tmp_path):
    assert "compat" not in ConditionalDetrImageProcessor().to_dict()
    processor = ConditionalDetrImageProcessor(compat="transformers")
    processor.save_pretrained(tmp_path)
    assert ConditionalDetrImageProcessor.from_pretrained(tmp_path).compat == "transformers"
    Theirs.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compat: expected one of 'paper', 'transformers'"):
        ConditionalDetrImageProcessor(compat="detr")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    ConditionalDetrImageProcessor().save_pretrained(tmp_path)
    before = (tmp_path / "preprocessor_config.json").read_text()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        ConditionalDetrImageProcessor(do_pad=False).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_names_and_deprecated_arguments():
    assert ConditionalDetrImageProcessorFast is ConditionalDetrImageProcessor
    with pytest.warns(FutureWarning, match="use ConditionalDetrImageProcessor"):
        extractor = ConditionalDetrFeatureExtractor(size=SMALL)
    assert extractor.to_dict()["image_processor_type"] == "ConditionalDetrImageProcessor"
    with pytest.warns(FutureWarning, match="max_size is deprecated"):
        processor = ConditionalDetrImageProcessor(size=60, max_size=90)
    assert processor.size == {"shortest_edge": 60, "longest_edge": 90}
    with pytest.warns(FutureWarning, match="max_size"):
        assert ConditionalDetrImageProcessor(max_size=900).size["longest_edge"] == 900
    with pytest.warns(FutureWarning, match="use do_pad"):
        assert ConditionalDetrImageProcessor(pad_and_return_pixel_mask=False).do_pad is False


def test_attributes_can_be_set():
    processor = ConditionalDetrImageProcessor()
    processor.size = 32
    processor.do_pad = False
    features = processor(pixels(97, 131))
    assert features.pixel_values.shape[-2:] == (32, 43)
    assert "pixel_mask" not in features


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "call", "error", "message"),
    [
        ([], {}, ValueError, "images: expected at least one image, got an empty list"),
        (None, {}, TypeError, "images: expected PIL images.* got NoneType"),
        ([3], {}, TypeError, "images: expected PIL images.* got int"),
        (
            np.zeros((9, 9, 5), np.uint8),
            {},
            ValueError,
            r"images\[0\]: expected 1, 3 or 4 channels",
        ),
        (np.zeros((1, 1, 1, 9, 9)), {}, ValueError, r"images\[0\]: .* got \[1, 1, 1, 9, 9\]"),
        (np.zeros((0, 9, 3)), {}, ValueError, "at least one pixel"),
        (np.zeros((9, 9, 3), bool), {}, TypeError, "integers or floats, got bool"),
        (torch.zeros(3, 9, 9, dtype=torch.bool), {}, TypeError, "got torch.bool"),
        (Image.new("I;16", (9, 9)), {}, ValueError, "8 bits per channel, got PIL mode 'I;16'"),
        (
            torch.full((4, 9, 9), 2.0),
            {"do_convert_rgb": True},
            ValueError,
            r"RGBA floats in \[0, 1\]",
        ),
        (
            pixels(9, 9),
            {"input_data_format": "hwc"},
            ValueError,
            "input_data_format: expected one of",
        ),
        (pixels(9, 9), {"size": {"width": 3}}, ValueError, "size: expected keys"),
        (pixels(9, 9), {"size": {"width": 3, "height": 0}}, ValueError, "size: expected positive"),
        (pixels(9, 9), {"size": "big"}, ValueError, "size: expected a dict"),
        (pixels(9, 9), {"pad_size": 5}, ValueError, r"pad_size: expected at least"),
        (pixels(9, 9), {"pad_size": {"shortest_edge": 5}}, ValueError, "pad_size: expected keys"),
        (pixels(9, 9), {"do_resize": 1}, TypeError, "do_resize: expected True or False, got 1"),
        (pixels(9, 9), {"resample": 9}, ValueError, "resample: expected"),
        (pixels(9, 9), {"image_mean": (1.0, 2.0)}, ValueError, "image_mean: expected 3 values"),
        (pixels(9, 9), {"do_rezise": True}, TypeError, "'do_rezise'; did you mean 'do_resize'"),
        (pixels(9, 9), {"format": "voc"}, ValueError, "format: expected one of"),
        (pixels(9, 9), {"device": "tpu9"}, ValueError, "device: expected a torch device"),
        (
            [pixels(9, 9), pixels(9, 12)],
            {"do_pad": False},
            ValueError,
            "expected one size with do_pad=False",
        ),
        (
            pixels(9, 9, 4),
            {"do_convert_rgb": False},
            ValueError,
            r"image_mean: expected 4 values \(channels\), got 3",
        ),
        (
            [pixels(9, 9)],
            {"annotations": []},
            ValueError,
            "annotations: expected 1, one per image, got 0",
        ),
        (
            pixels(9, 9),
            {"annotations": {"image_id": 1}},
            ValueError,
            r"annotations\[0\]: expected a dict with \['image_id', 'annotations'\]",
        ),
        (
            pixels(9, 9),
            {"annotations": {"image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4], "area": 1}]}},
            ValueError,
            r"annotations\[0\]\['annotations'\]\[0\]: expected \['category_id'\]",
        ),
    ],
)
def test_bad_input(images, call, error, message):
    with pytest.raises(error, match=message):
        ConditionalDetrImageProcessor()(images, **call)


def test_malformed_boxes():
    item = {"category_id": 1, "area": 1, "bbox": [1, 2, 3]}
    with pytest.raises(
        (TypeError, ValueError), match=r"id 1\): bbox: expected \[left, .*got \[1, "
    ):
        annotations_module.prepare_target(
            {"image_id": 1, "annotations": [item]}, (9, 9), "coco_detection", name="a"
        )
