"""Videos: frames and their times, rotation, damage."""

import itertools
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.videos import SIZE, turn, write_clip, write_sound

from cdetr_fast.images import video
from cdetr_fast.images.video import VideoReader, VideoWriter

av = pytest.importorskip("av")


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_frames_come_back_with_their_times_and_colours(encoder, monkeypatch):
    """For any size and any distances between frames."""
    if encoder not in av.codecs_available:
        pytest.skip(f"PyAV without {encoder}")
    monkeypatch.setattr(video, "_ENCODERS", (encoder,))

    @settings(max_examples=12, deadline=None)
    @given(
        size=st.tuples(st.integers(16, 70), st.integers(16, 70)),
        gaps=st.lists(st.integers(1, 400), min_size=1, max_size=6),
        base=st.sampled_from([1000, 12_800 * 5, 90_000, 1_000_000, 1_000_000_000]),
    )
    def check(size, gaps, base):
        times = [Fraction(t, 1000) for t in itertools.accumulate([0, *gaps])]
        pictures = [Image.new("RGB", size, (200, 40 * i, 90)) for i in range(len(times))]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "a.mp4")
            writer = VideoWriter(path, size, Fraction(25), Fraction(1, base), Fraction(4, 3))
            for picture, time in zip(pictures, times, strict=True):
                writer.write(picture, time)
            writer.close()
            reader = VideoReader(str(path))
            frames = list(reader)
        assert reader.damage is None
        assert (reader.pixel_aspect, reader.total) == (Fraction(4, 3), len(times))
        assert [frame.index for frame in frames] == list(range(len(times)))
        for frame, picture, time in zip(frames, pictures, times, strict=True):
            assert abs(frame.seconds - time) < Fraction(1, 20_000)
            assert frame.image.size == tuple(side + side % 2 for side in size)
            # B-frames of different times between flat colours are a few levels off
            expected = np.asarray(picture.getpixel((0, 0)))
            assert np.abs(np.asarray(frame.image) - expected).max() < 12

    check()


def test_rate_and_duration_stay(tmp_path):
    clip = write_clip(tmp_path / "a.mp4")
    reader = VideoReader(str(clip))
    writer = VideoWriter(tmp_path / "b.mp4", SIZE, reader.rate, reader.time_base)
    for frame in reader:
        writer.write(frame.image, frame.seconds)
    writer.close()
    with av.open(str(clip)) as a, av.open(str(tmp_path / "b.mp4")) as b:
        assert a.streams.video[0].average_rate == b.streams.video[0].average_rate == 25
        assert a.duration == b.duration


def test_frames_of_another_size_are_scaled(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", SIZE, Fraction(5), Fraction(1, 5))
    for i, size in enumerate([SIZE, (30, 90)]):
        writer.write(Image.new("RGB", size, "red"), Fraction(i, 5))
    writer.close()
    assert [frame.image.size for frame in VideoReader(str(tmp_path / "a.mp4"))] == [SIZE, SIZE]


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_rotation(tmp_path, quarters):
    """The red left side comes where a quarter turn clockwise, or more of them, moves it."""
    picture = Image.new("RGB", SIZE, "blue")
    picture.paste("red", (0, 0, 32, 48))
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, SIZE, Fraction(5), Fraction(1, 5), Fraction(2))
    writer.write(picture, Fraction(0))
    writer.close()
    turn(path, quarters)
    reader = VideoReader(str(path))
    (frame,) = reader
    upright = picture.rotate(-90 * quarters, expand=True)
    assert frame.image.size == upright.size
    difference = np.asarray(frame.image, dtype=int) - np.asarray(upright)
    assert np.abs(difference).mean() < 8
    assert reader.pixel_aspect == (Fraction(1, 2) if quarters % 2 else 2)


def test_times_of_joined_files_increase(tmp_path):
    content = write_clip(tmp_path / "a.ts").read_bytes()
    (tmp_path / "b.ts").write_bytes(content + content)
    times = [frame.seconds for frame in VideoReader(str(tmp_path / "b.ts"))]
    assert len(times) == 20
    assert all(a < b for a, b in itertools.pairwise(times))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("clips")
    names = ("a.mp4", "a.mkv", "a.ts", "a.avi")
    return {name: write_clip(folder / name, 20, rate=4).read_bytes() for name in names}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cut_and_damaged_files(clips, data):
    """Errors name the file; what can be read comes, and it is told that something is missing."""
    name = data.draw(st.sampled_from(sorted(clips)))
    content = bytearray(clips[name])
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    else:
        start = data.draw(st.integers(0, len(content)))
        content[start : start + 40] = data.draw(st.binary(min_size=40, max_size=40))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        frames, reason = [], None
        try:
            reader = VideoReader(str(path))
            frames.extend(reader)
        except (OSError, ValueError) as error:
            reason = str(error)
    assert [frame.index for frame in frames] == list(range(len(frames)))
    if reason is not None:
        assert reason.startswith(str(path))
    elif name == "a.mp4" and len(content) < len(clips[name]) and len(frames) < 20:
        assert reader.damage is not None


def test_a_file_that_ends_early(clips, tmp_path):
    for name, content in clips.items():
        (tmp_path / name).write_bytes(content[: len(content) * 6 // 10])
        reader = VideoReader(str(tmp_path / name))
        frames = list(reader)
        assert 5 < len(frames) < 15
        if name == "a.mkv":
            assert reader.damage == f"ends after {len(frames) / 4:.1f} of 5.0 seconds"
        elif name != "a.ts":  # has no length
            assert reader.damage == f"{len(frames)} of 20 frames could be read"


def test_sources_that_are_no_video(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"none\.mp4: cannot be read \(No such file"):
        VideoReader("none.mp4")
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4: cannot be read \(Invalid data"):
        VideoReader(str(tmp_path / "text.mp4"))
    with pytest.raises(ValueError, match=r"a\.m4a: has no video stream, only audio"):
        VideoReader(str(write_sound(tmp_path / "a.m4a")))
    monkeypatch.setattr("sys.platform", "plan9")
    with pytest.raises(ValueError, match=r"camera 3: cannot be read .*not on plan9"):
        VideoReader(3)


def test_a_file_that_cannot_be_written(tmp_path):
    writer = VideoWriter(tmp_path / "none" / "a.mp4", SIZE, Fraction(5), Fraction(1, 5))

    def write_many() -> None:
        for i in range(100):  # encoders keep the first ones
            writer.write(Image.new("RGB", SIZE), Fraction(i, 5))

    with pytest.raises(OSError, match=r"none/a\.mp4: cannot be written \(No such file"):
        write_many()
    with pytest.raises(OSError, match=r"none/a\.mp4: cannot be written"):
        writer.close()
