"""Image files and arrays as people have them: orientation, metadata, damage, ranges of pixels."""

import contextlib
import itertools
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from cdetr_fast import ConditionalDetrImageProcessor
from cdetr_fast.images.load import (
    exif_orientation,
    image_files,
    load_images,
    read_header,
    turned_upright,
)

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")


def picture(height=13, width=21, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(image, form="PNG", **options):
    stream = BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def chw(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", range(1, 9))
def test_every_orientation_of_every_format_is_turned_as_pil_turns_it(form, value, tmp_path):
    content = encoded(picture(), form, exif=orientation(value))
    path = tmp_path / "photo"
    path.write_bytes(content)
    expected = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    for source in (path, str(path), content):
        assert torch.equal(load_images(source)[0], chw(expected))
    opened = Image.open(path)
    turns = value > 1 and form != "TIFF"  # PIL has turned those
    with (
        pytest.warns(UserWarning, match=f"orientation {value}")
        if turns
        else contextlib.nullcontext()
    ):
        (found,) = load_images(opened, warn_if_turned=True)
    assert torch.equal(found, chw(expected))
    header = read_header(path)
    assert header.stored_hw == (13, 21)
    assert header.upright_hw == (expected.height, expected.width)


@pytest.mark.parametrize("value", range(1, 9))
def test_orientation_in_xmp(value):
    packet = f'<x:xmpmeta><rdf:Description tiff:Orientation="{value}"/></x:xmpmeta>'.encode()
    content = encoded(picture(), "JPEG", xmp=packet, quality=95)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    assert torch.equal(load_images(content)[0], chw(expected))


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_do_not_exist(value):
    content = encoded(picture(), "PNG", exif=orientation(value))
    assert torch.equal(load_images(content)[0], chw(picture()))


def test_turning_equals_pil_on_any_leading_axes():
    pixels = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert torch.equal(turned_upright(pixels, 1), pixels)
    for value in range(1, 9):
        for part, whole in zip(pixels, turned_upright(pixels, value), strict=True):
            assert torch.equal(turned_upright(part, value), whole)


DAMAGED = (
    b"Exif\0\0no TIFF header",
    b"Exif\0\0",
    b"Exif\0\0II*\0",
    b"Exif\0\0MM\0*\0\0\xff\xff",
    b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x07\0\xff\xff\xff\xff\0\0\0\0",
    b"\0",
)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", DAMAGED)
@pytest.mark.filterwarnings("ignore:.*EXIF:UserWarning")
def test_damaged_metadata_does_not_hide_a_picture(form, exif):
    plain = encoded(picture(), form)
    content = encoded(picture(), form, exif=exif)
    (expected,) = load_images(plain)
    assert torch.equal(load_images(content)[0], expected)
    opened = Image.open(BytesIO(content))
    for image in (opened, opened.convert("RGB"), opened.copy(), opened.convert("L")):
        assert exif_orientation(image) == 1
        assert load_images(image)[0].shape == expected.shape


@settings(max_examples=150, deadline=None)
@given(exif=st.binary(max_size=60), form=st.sampled_from(["JPEG", "PNG", "WEBP"]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_metadata_leaves_the_picture(exif, form):
    content = encoded(picture(), form, exif=b"Exif\0\0" + exif)
    found = load_images(content)[0]
    assert sorted(found.shape) == [3, 13, 21]


@settings(max_examples=300, deadline=None)
@given(
    form=st.sampled_from([*FORMATS, "GIF", "BMP", "PPM"]),
    cut=st.integers(0, 1500),
    places=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=4),
)
@pytest.mark.filterwarnings("ignore")
def test_errors_of_damaged_files_name_them(form, cut, places):
    """Whatever is damaged: a picture, or an OSError or ValueError with the name."""
    content = bytearray(
        encoded(picture(), form, exif=orientation(6))
        if form in FORMATS[:3]
        else encoded(picture(), form)
    )
    for place, value in places:
        content[place % len(content)] = value
    data = bytes(content[: len(content) - cut % len(content)])
    try:
        found = load_images([data])[0]
    except (OSError, ValueError) as error:
        refusal = str(error)
    else:
        assert found.dtype == torch.uint8
        return
    assert refusal.startswith("images[0]: cannot be read (")
    assert "\n" not in refusal


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_absurdly_large_pictures_are_named(tmp_path):
    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data) for kind, data in ((b"IHDR", header), (b"IDAT", b""), (b"IEND", b""))
    )
    path = tmp_path / "scan.png"
    path.write_bytes(content)
    for read in (load_images, read_header):
        with pytest.raises(OSError, match=r"scan.png: cannot be read \(Image size"):
            read(path)


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("absent.png", FileNotFoundError, r"absent.png: cannot be read \(No such file"),
        (".", IsADirectoryError, r"\.: cannot be read \(Is a directory"),
        ("a\0b.png", ValueError, "b.png: cannot be read .*null byte"),
        ("data:image/png;base64,é", ValueError, "data:image/png;base64,é: cannot be read"),
        ("data:image/png;base64,AAAA", OSError, r"data:.*: cannot be read \(not an image\)"),
        ("http://localhost:1/a.jpg", OSError, "http://localhost:1/a.jpg: cannot be read"),
        ("http://[", ValueError, r"http://\[: cannot be read"),
    ],
)
def test_errors_of_sources_name_them(source, kind, message):
    with pytest.raises(kind, match=message):
        load_images(source)


def test_pil_image_that_is_decoded_late_is_named(tmp_path):
    whole = encoded(picture(64, 64))
    path = tmp_path / "half.png"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=r"images\[0\] \(.*half.png\): cannot be read"):
        load_images(Image.open(path))


def test_hidden_files_and_folders_are_no_pictures(tmp_path):
    for name in (
        "b.PNG",
        "a.jpg",
        "._a.jpg",
        ".hidden.png",
        "notes.txt",
        "sub/c.png",
        ".ipynb_checkpoints/a-checkpoint.jpg",
        "__MACOSX/a.jpg",
        "sub/.Trash/d.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    own = [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    assert image_files(tmp_path) == own
    assert image_files(tmp_path, recursive=True) == [*own, tmp_path / "sub" / "c.png"]
    below = tmp_path / ".ipynb_checkpoints"  # asked for by name
    assert image_files(below) == [below / "a-checkpoint.jpg"]


# Ranges -------------------------------------------------------------------------------------------

EIGHT = 1 / 255


def load(image, factor=EIGHT, recognizes=True):
    (found,) = load_images(image, rescale_factor=factor, recognizes_floats=recognizes)
    return found


FLOATS = [torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize(  # numpy has no bfloat16
    ("kind", "dtype"),
    [("tensor", torch.bfloat16), *itertools.product(["tensor", "array"], FLOATS)],
)
def test_floats_from_0_to_1_are_recognized(kind, dtype):
    pixels = chw(picture())
    given_image = (pixels / 255).to(dtype)
    if kind == "array":
        given_image = given_image.numpy()
    found = load(given_image).float()
    assert torch.allclose(found, pixels.float(), atol=1 if dtype == torch.bfloat16 else 0.2)
    if isinstance(given_image, torch.Tensor):
        assert given_image.max() <= 1  # the caller's is left alone


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.int64, np.float32, np.float64]
)
def test_values_of_8_bits_are_taken_in_every_dtype(dtype):
    pixels = np.array(picture()).astype(dtype)
    assert torch.equal(load(pixels).float(), chw(picture()).float())


@pytest.mark.parametrize(
    "dtype", [np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64, "unit"]
)
def test_transparent_arrays_of_every_range_are_laid_over_white(dtype):
    rgba = np.random.default_rng(0).integers(0, 256, (6, 8, 4), dtype=np.uint8)
    rgba[:2] = 0  # nothing to be seen
    color, alpha = rgba[..., :3].astype(float), rgba[..., 3:] / 255
    expected = color * alpha + 255 * (1 - alpha)
    rgba = rgba / 255 if dtype == "unit" else rgba.astype(dtype)
    for rows in (slice(None), slice(2)):
        (found,) = load_images(rgba[rows], True, rescale_factor=EIGHT, recognizes_floats=True)
        assert torch.allclose(found.double(), chw(expected[rows]), atol=1)


@pytest.mark.parametrize("recognizes", [True, False])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.uint16, 257), (np.uint16, 16), (np.uint32, 2**24), (np.int16, 100), (np.int64, 300)],
)
def test_integers_beyond_8_bits_are_refused_by_name(dtype, scale, recognizes):
    pixels = np.array(picture()).astype(dtype) * dtype(scale)
    name = np.dtype(dtype).name
    with pytest.raises(ValueError, match=rf"images\[0\]: expected pixels from 0 to 255, .*{name}"):
        load(pixels, recognizes=recognizes)
    with pytest.raises(ValueError, match="in the range -"):
        load(-np.array(picture()).astype(np.int32), recognizes=recognizes)


def test_a_factor_for_deeper_pixels_is_followed():
    pixels = np.array(picture()).astype(np.uint16) * 257
    found = load(pixels, 1 / 65535)
    assert torch.equal(found, chw(picture()).float() * 257)
    processor = ConditionalDetrImageProcessor(do_resize=False)
    deep = processor(pixels, rescale_factor=1 / 65535).pixel_values
    assert torch.allclose(deep, processor(picture()).pixel_values, atol=1e-5)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.linspace(-2.1, 2.6, 48).reshape(3, 4, 4),  # normalised
        torch.linspace(-1, 1, 48).reshape(3, 4, 4),
        torch.linspace(-2.1, -0.5, 48).reshape(3, 4, 4),
        torch.linspace(0, 65535, 48).reshape(3, 4, 4),
        torch.full((3, 4, 4), torch.nan),
        torch.full((3, 4, 4), torch.inf),
        torch.full((3, 4, 4), -torch.inf),
    ],
)
def test_other_ranges_of_floats_are_refused_or_warned_of(pixels):
    with pytest.raises(ValueError, match="expected pixels from 0 to 255, got float32 in the range"):
        load(pixels)
    with pytest.warns(UserWarning, match="got float32 in the range"):
        assert load(pixels, recognizes=False) is not None


@pytest.mark.parametrize(
    "pixels", [torch.zeros(3, 4, 4), torch.linspace(-9, 270, 48).view(3, 4, 4)]
)
def test_black_pictures_and_overshooting_ones_stay(pixels, recwarn):
    for recognizes in (True, False):
        assert torch.equal(load(pixels, recognizes=recognizes), pixels)
    assert not recwarn


def test_processor_warns_where_it_would_make_a_picture_black():
    """The pixel values are those of transformers, which is silent about it."""
    pixels = chw(picture()) / 255
    processor = ConditionalDetrImageProcessor(do_resize=False)
    with pytest.warns(UserWarning, match="set do_rescale=False if they are from 0 to 1") as caught:
        processor(pixels)
    assert {Path(warning.filename).name for warning in caught} == {"test_load.py"}
    with pytest.raises(ValueError, match="uint16"):
        processor(np.array(picture()).astype(np.uint16) * 257)
