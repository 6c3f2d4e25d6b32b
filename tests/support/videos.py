"""Small videos, written by PyAV."""

import struct
from fractions import Fraction
from pathlib import Path

import numpy as np

SIZE = (64, 48)


def write_clip(path: Path, frames: int = 10, rate: int = 25, faststart: bool = True) -> Path:
    """Write noise of 64 x 48 pixels, with a key frame among every five frames."""
    import av

    noise = np.random.default_rng(0)
    options = {"movflags": "faststart"} if faststart and path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = 5
        for _ in range(frames):
            pixels = noise.integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_sound(path: Path) -> Path:
    """Write a second of silence."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for start in range(0, 8000, 1000):
            frame = av.AudioFrame.from_ndarray(
                np.zeros((1, 1000), np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts, frame.time_base = 8000, start, Fraction(1, 8000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, quarters_clockwise: int) -> None:
    """Set the rotation in the header of an MP4 file, as phones do."""
    cos, sin = [(1, 0), (0, 1), (-1, 0), (0, -1)][quarters_clockwise]
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    struct.pack_into(
        ">9i", content, matrix, cos * one, sin * one, 0, -sin * one, cos * one, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
