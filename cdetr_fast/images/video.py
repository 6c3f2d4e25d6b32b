"""Video files, streams and cameras: frames read, and frames written.

PyAV (FFmpeg) decodes and encodes; it is imported when a video is opened.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from cdetr_fast.images.load import named_error

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".avi", ".flv", ".h264", ".h265", ".hevc", ".ivf", ".m2ts", ".m4v", ".mjpeg", ".mkv"}
    | {".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"}
    | {".y4m"}
)
"""Suffixes of files that are taken for videos."""

_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}
_TIMEOUT_SECONDS = 30  # of a server that does not answer
_USUAL_RATE = Fraction(25)  # where a file does not tell
_ENCODERS = ("libx264", "libopenh264", "mpeg4")  # the first that PyAV's FFmpeg has
_MOST_TICKS = {"mpeg4": 65_535}  # per second, a limit of that format
_USUAL_MOST_TICKS = 1_000_000
_TICKS = 60_000  # where those of the source are finer
_BITS_PER_PIXEL = 0.2  # of encoders that do not encode at a constant quality
_BT601, _BT709 = 5, 1  # FFmpeg's numbers
_LIMITED_RANGE = 1


@dataclass(frozen=True)
class Frame:
    """A decoded frame.

    Attributes:
        index: Position in the video or the camera's stream, from 0.
        seconds: Time since the first frame.
        image: RGB, upright.
    """

    index: int
    seconds: Fraction
    image: Image.Image


class VideoReader:
    """Iterates once over the frames of a video.

    Frames are turned upright by the rotation that the file has. Packets that cannot be decoded are
    left out. The iteration closes the video.

    Args:
        source: Path, URL, or index of a camera.

    Attributes:
        name: Of the source, in messages.
        is_live: Whether frames come at their own pace: from a camera or a URL without an end.
        rate: Average frames per second, as the header has it.
        time_base: Seconds of a tick of the video's clock.
        pixel_aspect: Width of an upright pixel divided by its height.
        total: Number of frames as the header has it; None if it is not known.
        damage: After the iteration, what could not be read; None if everything could.

    Raises:
        OSError: The source cannot be opened; the message names it.
        ValueError: Likewise, or it has no video stream.
    """

    def __init__(self, source: str | int) -> None:
        import av
        from av.stream import Disposition

        self.name = f"camera {source}" if isinstance(source, int) else source
        try:
            self._container = _open(source)
        except (av.FFmpegError, OSError, ValueError) as error:
            raise named_error(error, self.name) from error
        streams = [
            stream
            for stream in self._container.streams.video
            if not stream.disposition & Disposition.attached_pic  # the cover of an audio file
        ]
        if not streams:
            kinds = ", ".join(sorted({stream.type for stream in self._container.streams}))
            self._container.close()
            raise ValueError(
                f"{self.name}: has no video stream, only {kinds or 'an empty header'}; name a file "
                "that has one"
            )
        self._stream = streams[0]
        is_url = isinstance(source, str) and "://" in source
        self.is_live = isinstance(source, int) or (is_url and self._container.duration is None)
        # Threads that decode a frame each make frames of a camera late.
        self._stream.thread_type = "SLICE" if self.is_live else "AUTO"
        self.rate = self._stream.average_rate or self._stream.guessed_rate or _USUAL_RATE
        self.time_base = self._stream.time_base or 1 / self.rate
        self.pixel_aspect = self._stream.sample_aspect_ratio or Fraction(1)
        self.total = self._stream.frames or None
        self.damage: str | None = None
        self._first: Fraction | None = None  # time of the first frame, by the video's clock
        self._last = -1 / self.rate

    def __iter__(self) -> Generator[Frame, None, None]:
        import av

        packets = index = 0
        is_whole = True
        try:
            for packet in self._container.demux(self._stream):
                packets += packet.size > 0
                try:
                    frames = packet.decode()
                except av.error.InvalidDataError:
                    is_whole = False
                    continue
                is_whole &= not packet.is_corrupt
                for frame in frames:
                    yield self._upright(frame, index)
                    index += 1
            self.damage = self._describe_damage(packets, index, is_whole)
        except (av.FFmpegError, ValueError) as error:
            raise named_error(error, self.name) from error
        finally:
            self._container.close()

    def _upright(self, frame: VideoFrame, index: int) -> Frame:
        seconds = self._last + 1 / self.rate
        if frame.pts is not None and frame.time_base is not None:
            time = frame.pts * frame.time_base
            if self._first is None:
                self._first = time
            if time - self._first > self._last:  # joined files begin at 0 again
                seconds = time - self._first
        self._last = seconds
        quarter_turns = round(frame.rotation / 90) % 4  # anticlockwise
        if index == 0 and quarter_turns % 2:
            self.pixel_aspect = 1 / self.pixel_aspect
        pixels = np.rot90(cast("np.ndarray", frame.to_ndarray(format="rgb24")), quarter_turns)
        return Frame(index, seconds, Image.fromarray(np.ascontiguousarray(pixels)))

    def _describe_damage(self, packets: int, frames: int, is_whole: bool) -> str | None:
        # A file that was cut off has fewer packets than its index.
        expected = len(self._stream.index_entries) if self._stream.frames else 0
        if not is_whole or packets < expected:
            return f"{frames} of {max(packets, self._stream.frames)} frames could be read"
        stated = _seconds(self._stream.metadata.get("DURATION", ""))  # Matroska
        read = self._last + 1 / self.rate
        if stated > read + 1:
            return f"ends after {float(read):.1f} of {stated:.1f} seconds"
        return None


class VideoWriter:
    """Writes an MP4 file in H.264, or in MPEG-4 if PyAV's FFmpeg has no encoder for that.

    Args:
        path: The file.
        size: Width and height of the pictures. The file has the next even numbers, as the format
            needs them: the last column and row come twice.
        rate: Average frames per second.
        time_base: Seconds of a tick; times are rounded to whole ticks.
        pixel_aspect: Width of a pixel divided by its height.

    Raises:
        OSError: The file cannot be written; so do `write` and `close`.
    """

    def __init__(
        self,
        path: Path,
        size: tuple[int, int],
        rate: Fraction,
        time_base: Fraction,
        pixel_aspect: Fraction = Fraction(1),
    ) -> None:
        import av

        name = next(name for name in _ENCODERS if name in av.codecs_available)
        most_ticks = _MOST_TICKS.get(name, _USUAL_MOST_TICKS)
        if time_base.numerator != 1 or time_base.denominator > most_ticks:
            time_base = Fraction(1, _TICKS)
        self._time_base = time_base
        self._size = size
        self._last = -1
        self._path = path
        with self._errors():
            self._container = av.open(f"file:{path}", "w", format="mp4")
        added = self._container.add_stream(name, rate=rate.limit_denominator(1001))
        self._stream = cast("VideoStream", added)
        width, height = size[0] + size[0] % 2, size[1] + size[1] % 2
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base = time_base
        context.sample_aspect_ratio = pixel_aspect
        self._colours = _BT709 if height >= 720 else _BT601  # as players assume
        context.colorspace, context.color_range = self._colours, _LIMITED_RANGE
        if name == "libx264":
            context.options = {"preset": "veryfast"}
        else:
            context.bit_rate = round(width * height * rate * _BITS_PER_PIXEL)

    def write(self, picture: Image.Image, seconds: Fraction) -> None:
        """Append a frame.

        Args:
            picture: RGB; of another size than the first, it is scaled.
            seconds: Its time, later than that of the frame before.
        """
        from av import VideoFrame

        if picture.size != self._size:  # some streams change theirs
            picture = picture.resize(self._size, Image.Resampling.BILINEAR)
        pixels = np.asarray(picture)
        height, width = pixels.shape[:2]
        if height % 2 or width % 2:
            pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frame = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=self._colours,
            dst_color_range=_LIMITED_RANGE,
        )
        self._last = max(self._last + 1, round(seconds / self._time_base))
        frame.pts, frame.time_base = self._last, self._time_base
        with self._errors():
            self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        """Complete the file."""
        with self._errors():
            try:
                self._container.mux(self._stream.encode())
            finally:
                self._container.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        import av

        try:
            yield
        except av.FFmpegError as error:
            raise OSError(f"{self._path}: cannot be written ({error.strerror})") from error


def _open(source: str | int) -> InputContainer:
    """Open a path, a URL or a camera.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is not a video, or cameras cannot be read on this system.
    """
    import av

    if isinstance(source, str):
        if "://" in source:
            return av.open(source, timeout=_TIMEOUT_SECONDS)
        return av.open(f"file:{source}")  # or FFmpeg takes what precedes a colon for a protocol
    if sys.platform not in _CAMERAS:
        raise ValueError(f"cameras are read on {' and '.join(_CAMERAS)}, not on {sys.platform}")
    kind, device = _CAMERAS[sys.platform]
    return av.open(device.format(source), format=kind)


def _seconds(text: str) -> float:
    """Return the seconds of "00:01:02.5"; 0 for other texts."""
    try:
        hours, minutes, seconds = (float(part) for part in text.split(":"))
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds
