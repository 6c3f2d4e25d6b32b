"""Images to model inputs, against transformers where transformers has an answer."""

import contextlib
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
from support.processing import SMALL, Theirs, chw, compare, pixels
from transformers import image_processing_backends

from cdetr_fast.images import (
    ConditionalDetrImageProcessor,
)
from cdetr_fast.images import resize as resize_module
from cdetr_fast.images.load import load_images
from cdetr_fast.images.resize import resized_hw

# transformers 5.17 turns no file upright, drops transparency, and takes grey levels and the numbers
# of a palette for colours.
LIKE_TODAYS = hasattr(image_processing_backends, "convert_to_rgb_pil")
REFUSED = ("L", "LA", "P", "RGBA", "CMYK") if LIKE_TODAYS else ("LA", "RGBA", "CMYK")


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
