"""`normalize_and_pad` against torchvision, image by image.

The triton kernel is tested on a GPU, or in triton's interpreter in a process of its own.
"""

import pytest
import torch
from support.kernels import DEVICE, needs_kernels
from torch import Tensor
from torchvision.transforms.v2 import functional as tvF

from cdetr_kernels import native, normalize_and_pad, registry
from cdetr_kernels.ops.normalize_and_pad import cases
from cdetr_kernels.ops.normalize_and_pad.cases import MEAN, STD

SIZES = [(5, 7), (9, 4), (1, 1), (16, 33)]
DTYPES = (torch.uint8, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32)


def draw(dtype: torch.dtype, channels: int = 3, sizes=SIZES) -> list[Tensor]:
    return list(cases.make(dtype, DEVICE, tuple(sizes), channels).inputs.values())


def expected(images, mean, std, factor, size_hw) -> tuple[Tensor, Tensor]:
    values = torch.zeros(len(images), len(images[0]), *size_hw)
    mask = torch.zeros(len(images), *size_hw, dtype=torch.int64)
    for i, image in enumerate(images):
        h, w = image.shape[1:]
        pixels = image.cpu().to(torch.float32)
        if mean is None:
            pixels = pixels * factor
        else:
            scale = 1.0 / factor
            pixels = tvF.normalize(pixels, torch.tensor(mean) * scale, torch.tensor(std) * scale)
        values[i, :, :h, :w] = pixels
        mask[i, :h, :w] = 1
    return values, mask


def unsupported_reason(backend: str, images) -> str | None:
    implementation = registry.operator("normalize_and_pad").implementations[backend]
    return implementation.unsupported_reason(images, None, None, 1.0, 1, 1)


def check(images, mean=MEAN, std=STD, factor=1 / 255, size_hw=None):
    """All implementations that take the images, against torchvision, to the last bit."""
    copies, versions = [x.clone() for x in images], [x._version for x in images]
    largest = tuple(max(x.shape[axis] for x in images) for axis in (1, 2))
    wanted = expected(images, mean, std, 1.0 if factor is None else factor, size_hw or largest)
    for backend in ("torch", "native", "triton", "auto"):
        if backend != "auto" and unsupported_reason(backend, images) is not None:
            continue
        got = normalize_and_pad(images, mean, std, factor, size_hw, backend)
        torch.testing.assert_close(tuple(x.cpu() for x in got), wanted, rtol=0, atol=0)
    assert [x._version for x in images] == versions
    assert all(torch.equal(x, y) for x, y in zip(images, copies, strict=True))


@pytest.mark.parametrize("size_hw", [None, (16, 33), (20, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_torchvision(dtype, size_hw):
    check(draw(dtype), size_hw=size_hw)


@pytest.mark.parametrize(
    ("mean", "std", "factor"),
    [(None, None, 1 / 255), (None, None, None), (MEAN, STD, None), ((0.5,), (0.25,), 1 / 127.5)],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_options(channels, mean, std, factor):
    if mean == MEAN and channels != 3:
        mean, std = [(*values, 0.5)[:channels] for values in (mean, std)]
    check(draw(torch.uint8, channels), mean, std, factor)


def test_layouts_and_offsets():
    (image,) = draw(torch.uint8, 3, [(20, 41)])
    interleaved = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    check(
        [image[:, 1:, 3:], image.flip(2), image[:, ::2, ::3], interleaved, interleaved[:, 2:, 1:]]
    )
    check([image.transpose(1, 2), image[:1].expand(3, -1, -1)])


def test_images_of_several_dtypes():
    check([draw(dtype, 3, [(4, 5)])[0] for dtype in DTYPES])


needs_extension = pytest.mark.skipif(
    native.UNAVAILABLE["cpu"] is not None, reason=str(native.UNAVAILABLE["cpu"])
)


@needs_extension
def test_what_the_extension_takes():
    assert unsupported_reason("native", draw(torch.uint8)) is None
    assert unsupported_reason("native", draw(torch.float32)) is None
    with pytest.raises(RuntimeError, match=r"native.*the kernel takes images in .*uint8"):
        normalize_and_pad(draw(torch.int32), backend="native")


@needs_extension
def test_registration():
    from cdetr_kernels.ops.normalize_and_pad import native as _registered  # noqa: F401

    images = draw(torch.uint8)
    arguments = images, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0], 1.0, 20, 40
    torch.library.opcheck(torch.ops.cdetr_fast.normalize_and_pad.default, arguments)


@needs_kernels
def test_the_kernel_takes_four_channels():
    with pytest.raises(RuntimeError, match=r"'triton' cannot run: .* up to 4 channels"):
        normalize_and_pad([torch.zeros(5, 2, 2, device=DEVICE)], backend="triton")


def test_compiles_into_one_graph():
    images = draw(torch.uint8)
    compiled = torch.compile(normalize_and_pad, fullgraph=True, backend="eager")
    got, expected = (f(images, MEAN, STD, 1 / 255) for f in (compiled, normalize_and_pad))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


IMAGE = torch.zeros(3, 4, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([],), ValueError, "images: expected at least one image, got none"),
        (([IMAGE, IMAGE[:2]],), ValueError, r"images\[1\]: expected \[C, h, w\], got \[2, 4, 5\]"),
        (([IMAGE[0]],), ValueError, r"images\[0\]: expected \[C, h, w\], got \[4, 5\]"),
        (([IMAGE[:, :0]],), ValueError, r"images\[0\]: expected \[C, h, w\], got \[3, 0, 5\]"),
        (([IMAGE.bool()],), TypeError, r"images\[0\]: expected a tensor of numbers, got torch\.bo"),
        (([None],), TypeError, r"images\[0\]: expected a tensor of numbers, got NoneType"),
        (([IMAGE], MEAN), ValueError, "std: expected values"),
        (([IMAGE], None, STD), ValueError, "mean: expected values"),
        (([IMAGE], MEAN[:2], STD), ValueError, r"mean: expected 3 values \(channels\), got 2"),
        (([IMAGE], MEAN, (1, 0, 1)), ValueError, "std: expected numbers other than 0"),
        (([IMAGE], MEAN, STD, 0), ValueError, "rescale_factor: expected a number other than 0"),
        (
            ([IMAGE], None, None, None, (3, 5)),
            ValueError,
            r"size_hw: expected at least \[4, 5\] for images\[0\], got \[3, 5\]",
        ),
    ],
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        normalize_and_pad(*arguments)


@pytest.mark.parametrize("kind", [tuple, iter, torch.stack])
def test_any_sequence_of_images(kind):
    images = draw(torch.uint8)[:1] * 2
    got, expected = (normalize_and_pad(x, MEAN, STD, 1 / 255) for x in (kind(images), images))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_images_that_require_grad():
    images = [x.requires_grad_() for x in draw(torch.float32)]
    values, _ = normalize_and_pad(images, MEAN, STD, 1 / 255)
    assert torch.equal(
        values.detach(), normalize_and_pad([x.detach() for x in images], MEAN, STD, 1 / 255)[0]
    )
    values.sum().backward()
    for image in images:
        expected = (1 / 255 / torch.tensor(STD))[:, None, None].expand_as(image)
        torch.testing.assert_close(image.grad, expected)
    with torch.no_grad():
        assert not normalize_and_pad(images, MEAN, STD)[0].requires_grad
    for backend in ("native", "triton"):
        with pytest.raises(RuntimeError, match="cannot run"):
            normalize_and_pad(images, MEAN, STD, backend=backend)
