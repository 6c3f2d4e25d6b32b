"""`cdetr-fast detect` of videos and cameras."""

import itertools
import json
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from support.videos import SIZE, turn, write_clip, write_sound

from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.cli.detector import Detector
from cdetr_fast.images import video
from cdetr_fast.images.video import VideoReader, VideoWriter

pytest.importorskip("av")


@pytest.fixture
def detect(run, checkpoint, monkeypatch):
    """Runs `cdetr-fast detect` without the seconds of `optimize`, which other tests cover."""
    monkeypatch.setattr(Detector, "optimize", lambda self, engine: None)
    fixed = ("--model", checkpoint, "--threshold", 0, "--device", "cpu", "--output", "found")
    return lambda *arguments: run("detect", *arguments, *fixed)


@pytest.fixture
def found(tmp_path) -> Path:
    return tmp_path / "work" / "found"


@pytest.fixture
def camera(monkeypatch, tmp_path):
    """A camera that shows 40 frames as fast as they are decoded."""
    clip = write_clip(tmp_path / "camera.mp4", 40)
    opened = []
    open_source = video._open

    def open_camera(source):
        if isinstance(source, str):
            return open_source(source)
        opened.append(source)
        return open_source(str(clip))

    monkeypatch.setattr(video, "_open", open_camera)
    return opened


def read(folder: Path) -> tuple[dict, list]:
    index, objects = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("images", "detections")
    )
    return index, objects


def interrupt_after(count: int, monkeypatch, number: int = signal.SIGINT) -> None:
    """Send a signal, that of Ctrl-C, when the model has done so many frames."""
    predict_each = Detector.predict_each

    def interrupted(self, *arguments):
        for i, result in enumerate(predict_each(self, *arguments)):
            yield result
            if i + 1 == count:
                signal.raise_signal(number)

    monkeypatch.setattr(Detector, "predict_each", interrupted)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_results_are_those_of_the_frames(detect, checkpoint, tmp_path, found, batch_size):
    clip = write_clip(tmp_path / "clip.mp4")
    done = detect(clip, "--batch-size", batch_size)
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(
        rf"{clip}: 10 frames, 210 detections, [\d.]+ frames per second: found/clip\.mp4\n", done.out
    )
    index, objects = read(found)
    assert index["images"] == [
        {
            "id": i,
            "file_name": str(clip),
            "width": 64,
            "height": 48,
            "picture": "clip.mp4",
            "frame_index": i,
            "time": i / 25,
        }
        for i in range(10)
    ]
    model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint)
    groups = [list(group) for _, group in itertools.groupby(objects, lambda o: o["image_id"])]
    for group, frame in zip(groups, VideoReader(str(clip)), strict=True):
        expected = model.predict(frame.image, 0.0).to_coco(frame.index)
        assert [o["category_id"] for o in group] == [o["category_id"] for o in expected]
        for ours, theirs in zip(group, expected, strict=True):
            assert (ours["frame_index"], ours["time"]) == (frame.index, float(frame.seconds))
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
            assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-2)
    annotated = VideoReader(str(found / "clip.mp4"))
    frames = list(annotated)
    assert annotated.rate == 25
    assert [(frame.image.size, frame.seconds * 25) for frame in frames] == [
        (SIZE, i) for i in range(10)
    ]


def test_coco_reads_the_results(detect, tmp_path, found):
    coco = pytest.importorskip("pycocotools.coco")
    assert detect(write_clip(tmp_path / "clip.mp4"), "--frames", 3).code == 0
    results = coco.COCO(found / "images.json").loadRes(str(found / "detections.json"))
    assert results.getImgIds() == [0, 1, 2]
    assert len(results.getAnnIds(imgIds=1)) == 21


def test_several_videos_and_upright_ones(detect, tmp_path, found):
    """Image ids count through, names differ, and no input is overwritten."""
    found.mkdir()
    paths = [write_clip(found / "clip.mp4", 4), write_clip(tmp_path / "clip.mkv", 4)]
    paths.append(Path("clip: 100 %d.mp4"))  # no protocol, no pattern
    (tmp_path / "work" / paths[2]).write_bytes(paths[0].read_bytes())
    turn(paths[0], 1)
    before = paths[0].read_bytes()
    done = detect(*paths, "--frames", 2)
    assert (done.code, done.err) == (0, "")
    frames = read(found)[0]["images"]
    assert [(f["id"], f["file_name"], f["frame_index"], f["width"]) for f in frames] == [
        (0, str(paths[0]), 0, 48),
        (1, str(paths[0]), 1, 48),
        (2, str(paths[1]), 0, 64),
        (3, str(paths[1]), 1, 64),
        (4, str(paths[2]), 0, 64),
        (5, str(paths[2]), 1, 64),
    ]
    assert paths[0].read_bytes() == before
    assert [f.image.size for f in VideoReader(str(found / "clip_2.mp4"))] == [(48, 64)] * 2
    assert [f.image.size for f in VideoReader(str(found / "clip_3.mp4"))] == [(64, 48)] * 2
    assert len(list(VideoReader(str(found / paths[2])))) == 2


def test_a_repeated_run_replaces_its_videos_alone(detect, tmp_path, found):
    found.mkdir()
    (found / "clip.mp4").write_bytes(b"of somebody else")
    clip = write_clip(tmp_path / "clip.mkv", 4)
    for frames in (2, 3):
        assert detect(clip, "--frames", frames).code == 0
        assert len(list(VideoReader(str(found / "clip_2.mp4")))) == frames
    assert (found / "clip.mp4").read_bytes() == b"of somebody else"
    assert len(list(found.glob("*.mp4"))) == 2


def test_a_camera_drops_what_the_model_has_no_time_for(detect, camera, found, monkeypatch):
    predict_each = Detector.predict_each

    def slow(self, *arguments):
        for result in predict_each(self, *arguments):
            time.sleep(0.05)
            yield result

    monkeypatch.setattr(Detector, "predict_each", slow)
    done = detect(0)
    assert (done.code, done.err) == (0, "")
    assert camera == [0]
    match = re.fullmatch(
        r"camera 0: (\d+) frames, \d+ detections, [\d.]+ frames per second, (\d+) dropped: "
        r"found/camera_0\.mp4\n",
        done.out,
    )
    frames, dropped = map(int, match.groups())
    assert frames + dropped == 40
    assert dropped > 0
    indices = [image["frame_index"] for image in read(found)[0]["images"]]
    assert len(indices) == frames
    assert indices == sorted(set(indices))
    assert indices[-1] == 39  # the newest one waits
    times = [round(frame.seconds * 25) for frame in VideoReader(str(found / "camera_0.mp4"))]
    assert times == [i - indices[0] for i in indices]


def test_a_stream_without_an_end_is_live(detect, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.ts", 40)
    raw = tmp_path / "clip.m4v"
    import av

    with av.open(str(clip)) as source, av.open(str(raw), "w", format="m4v") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    monkeypatch.setattr(video, "_open", lambda source: av.open(str(raw), format="m4v"))
    done = detect("rtsp://camera.local/live?user=a", "--frames", 2)
    assert done.code == 0
    assert re.search(
        r"^rtsp://camera.local/live\?user=a: 2 frames.* dropped: found/live.mp4", done.out
    )


def test_ctrl_c_ends_a_camera(detect, camera, found, monkeypatch):
    before = signal.getsignal(signal.SIGINT)  # a shell's background job ignores it
    interrupt_after(2, monkeypatch)
    done = detect("1")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("camera 1: ")
    assert 2 <= len(read(found)[0]["images"]) < 10
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [(signal.SIGINT, 130, "cdetr-fast: interrupted\n"), (signal.SIGTERM, 143, "")],
)
def test_a_stopped_file_keeps_what_was_found(
    detect, tmp_path, found, monkeypatch, number, code, text
):
    interrupt_after(3, monkeypatch, number)
    clips = [write_clip(tmp_path / name, 40) for name in ("a.mp4", "b.mp4")]
    done = detect(*clips)
    assert (done.code, done.err) == (code, text)
    frames = read(found)[0]["images"]
    assert 3 <= len(frames) < 20
    assert len(list(VideoReader(str(found / "a.mp4")))) == len(frames)
    assert not (found / "b.mp4").exists()


def test_a_damaged_file_keeps_what_was_found(detect, tmp_path, found):
    damaged = tmp_path / "damaged.mp4"
    content = write_clip(tmp_path / "whole.mp4", 10).read_bytes()
    damaged.write_bytes(content[: len(content) * 6 // 10])
    done = detect(damaged, tmp_path / "none.mp4", tmp_path / "whole.mp4")
    assert done.code == 1
    lines = done.err.splitlines()
    assert re.fullmatch(
        rf"cdetr-fast: damaged: {damaged}: \d+ of 10 frames could be read", lines[0]
    )
    assert lines[1].startswith(f"cdetr-fast: skipped: {tmp_path}/none.mp4: cannot be read (No such")
    assert len(lines) == 2
    names = [Path(image["file_name"]).name for image in read(found)[0]["images"]]
    assert 2 < names.count("damaged.mp4") < 8
    assert names.count("whole.mp4") == 10


def test_a_video_that_cannot_be_written(detect, tmp_path, found, monkeypatch):
    write = VideoWriter.write

    def full(self, picture, seconds):
        if seconds > 0.1:
            raise OSError(f"{self._path}: cannot be written (No space left on device)")
        write(self, picture, seconds)

    monkeypatch.setattr(VideoWriter, "write", full)
    done = detect(write_clip(tmp_path / "clip.mp4", 40))
    assert done.code == 1
    expected = "stopped: found/clip.mp4: cannot be written (No space left on device)"
    assert done.err == f"cdetr-fast: {expected}\n"
    assert len(read(found)[0]["images"]) == 4
    assert len(list(VideoReader(str(found / "clip.mp4")))) == 3


def test_files_without_frames(detect, tmp_path, found):
    import av

    with av.open(str(tmp_path / "empty.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    done = detect(write_sound(tmp_path / "sound.mov"), tmp_path / "empty.avi")
    assert done.code == 1
    assert f"skipped: {tmp_path}/sound.mov: has no video stream, only audio" in done.err
    assert f"{tmp_path}/empty.avi: no frame could be decoded" in done.err
    assert sorted(path.name for path in found.iterdir()) == ["detections.json", "images.json"]
    assert read(found)[1] == []


def test_wrong_usage(detect, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", 2)
    assert "--report shows images" in (done := detect(clip, "--report")).err
    assert done.code == 2
    assert "--frames is for videos" in (done := detect("a.png", "--frames", 3)).err
    assert done.code == 2
    assert "images and videos" in (done := detect("a.png", clip)).err
    assert done.code == 1
    monkeypatch.setitem(sys.modules, "av", None)
    done = detect(clip)
    assert (done.code, done.err) == (
        1,
        "cdetr-fast: av missing: pip install 'cdetr-fast[video]'\n",
    )
