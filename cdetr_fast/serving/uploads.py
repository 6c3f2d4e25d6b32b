"""Uploads: from the body of a request to pixels, or the reason why not."""

from collections.abc import Mapping
from io import BytesIO

from fastapi import HTTPException, Request
from PIL import Image
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.types import Message, Receive
from torch import Tensor

from cdetr_fast.common.errors import first_line
from cdetr_fast.images import ConditionalDetrImageProcessor
from cdetr_fast.images.load import named_error, read_file, turned_upright

FORMATS = ("BMP", "GIF", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP")
"""Formats that are decoded, as PIL names them: others run programs (EPS) or are rare."""

_FORM = "multipart/form-data"
_FORM_OVERHEAD = 64 * 1024  # bytes around the file
_BINARY = "application/octet-stream"


class Rejected(HTTPException):
    """A request that cannot be answered.

    Args:
        status_code: Status of the response.
        reason: The `detail` of its JSON.
        headers: More headers.
    """

    def __init__(
        self, status_code: int, reason: str, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status_code, reason, headers)


async def read_upload(request: Request, max_bytes: int) -> bytes:
    """Return the image file in a request: its body, or the file of a form.

    Raises:
        HTTPException: The body is too large, empty or not a file.
        starlette.requests.ClientDisconnect: The client is gone.
    """
    kind = request.headers.get("content-type", _BINARY).partition(";")[0].strip().lower()
    if kind != _FORM and kind != _BINARY and not kind.startswith("image/"):
        raise Rejected(
            415,
            f"Content-Type: expected image/..., {_BINARY} or {_FORM}, got {kind}; with curl: "
            "--form file=@photo.jpg",
        )
    limit = max_bytes + (_FORM_OVERHEAD if kind == _FORM else 0)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise _too_large(max_bytes)
    limited = Request(request.scope, _limited(request.receive, limit, max_bytes))
    if kind != _FORM:
        content = await limited.body()
    else:
        content = await _file_of_form(limited)
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    if not content:
        raise Rejected(400, "image: expected a file, got 0 bytes")
    return content


async def _file_of_form(request: Request) -> bytes:
    try:
        async with request.form(max_files=1, max_fields=10) as form:
            for value in form.values():
                if isinstance(value, UploadFile):
                    return await value.read()
    except FormParserError as error:  # which starlette before 1.0 lets through
        raise Rejected(400, f"form: {first_line(error)}") from error
    raise Rejected(400, "form: expected a file, got none; with curl: --form file=@photo.jpg")


def _limited(receive: Receive, limit: int, max_bytes: int) -> Receive:
    """Return `receive`, which raises as soon as more than `limit` bytes have come."""
    received = 0

    async def receive_at_most() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_large(max_bytes)
        return message

    return receive_at_most


def _too_large(max_bytes: int) -> Rejected:
    # The rest of the body is not read, so the connection cannot be used again.
    reason = f"image: expected at most {max_bytes} bytes; send a smaller file"
    return Rejected(413, reason, {"Connection": "close"})


def decode(content: bytes, max_pixels: float, processor: ConditionalDetrImageProcessor) -> Tensor:
    """Return the upright pixels of an image file, uint8 `[C, H, W]`; of an animation, the first.

    Raises:
        Rejected: It is not an image, is damaged, has too many pixels, or cannot be used.
    """
    _check_header(content, max_pixels)
    try:
        pixels = turned_upright(*read_file(content, "image", processor.do_convert_rgb))
        processor.resized_hw(pixels)
    except (OSError, ValueError) as error:
        raise Rejected(422, first_line(error)) from error
    return pixels


def _check_header(content: bytes, max_pixels: float) -> None:
    """Reject an image before any of its pixels is decoded."""
    try:
        with Image.open(BytesIO(content)) as image:
            found, (width, height) = image.format, image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_many_pixels("more", max_pixels) from error
    except Exception as error:  # PIL raises dozens of kinds for damaged files
        raise Rejected(422, str(named_error(error, "image"))) from error
    if found not in FORMATS:
        raise Rejected(415, f"image: expected {', '.join(FORMATS)}, got {found}")
    if width * height > max_pixels:
        raise _too_many_pixels(f"{width} x {height}", max_pixels)


def _too_many_pixels(got: str, max_pixels: float) -> Rejected:
    return Rejected(413, f"image: expected at most {max_pixels} pixels, got {got}; send it smaller")
