"""`cdetr-fast detect` of videos, cameras and streams."""

from __future__ import annotations

import logging
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import typer

from cdetr_fast.cli.detector import Detector
from cdetr_fast.cli.errors import UserError, require_packages
from cdetr_fast.cli.output import GrowingArray, PictureNames, counted
from cdetr_fast.common import progress
from cdetr_fast.common.errors import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from PIL import Image

    from cdetr_fast.images.results import DetectionResult
    from cdetr_fast.images.video import Frame, VideoReader, VideoWriter

logger = logging.getLogger(__name__)

_WAITING = 4  # frames before the model, and results behind it
_WAITING_LIVE = 1  # the newest frame of a camera


def list_videos(inputs: Iterable[str]) -> list[str | int]:
    """Return the inputs if they are videos: files, URLs, and indices of cameras.

    Raises:
        UserError: Some of them are images, or PyAV is missing.
    """
    inputs = list(dict.fromkeys(inputs))
    videos = [source for text in inputs if (source := _video(text)) is not None]
    if not videos:
        return []
    if len(videos) < len(inputs):
        raise UserError(
            "images and videos: expected one of these kinds; detect them one after the other"
        )
    require_packages("av", extra="video")
    return videos


def _video(text: str) -> str | int | None:
    from cdetr_fast.images.video import VIDEO_SUFFIXES

    if "://" in text:
        return text
    if text.isdecimal() and not Path(text).exists():
        return int(text)
    path = Path(text)
    return text if path.suffix.lower() in VIDEO_SUFFIXES and not path.is_dir() else None


def detect_videos(
    detector: Detector,
    sources: list[str | int],
    output: Path,
    threshold: float,
    top_k: int,
    batch_size: int,
    most_frames: int | None,
) -> None:
    """Detect objects in videos, and write annotated videos and COCO results of all frames.

    A video that cannot be read, or not to its end, is reported, with exit code 1 at the end.
    Ctrl-C ends a live source as it should; in a file it is an interruption. What was found until
    then is kept in any case.

    Args:
        detector: The model.
        sources: Paths, URLs and indices of cameras.
        output: Folder for the results.
        threshold: Lowest score of a detection.
        top_k: Most detections per frame.
        batch_size: Frames in one forward pass.
        most_frames: Of each source; None takes all.
    """
    from cdetr_fast.images.video import VideoReader
    from cdetr_fast.training.run.signals import StopSignals

    failed = interrupted = False
    names = PictureNames(output, (Path(source) for source in sources if isinstance(source, str)))
    with StopSignals() as signals, closing(_Results(output, detector.id2label)) as results:
        for source in sources:
            video = names.take(_named_like(source), ".mp4")
            try:
                reader = VideoReader(source)
            except (OSError, ValueError) as error:
                logger.error("skipped: %s", error)
                failed = True
                continue
            annotated = _AnnotatedVideo(reader, video, results)

            def found(
                images: Iterable[Image.Image],
            ) -> Generator[DetectionResult, None, None]:
                yield from detector.predict_each(images, threshold, top_k, batch_size)

            try:
                _detect(reader, found, annotated, most_frames, lambda: signals.received is not None)
            except (OSError, ValueError) as error:
                logger.error("stopped: %s", first_line(error))
                failed = True
            if reader.damage is not None:
                logger.error("damaged: %s: %s", reader.name, reader.damage)
                failed = failed or not reader.is_live
            if signals.received is not None:
                interrupted = not reader.is_live
                break
    if signals.received == signal.SIGTERM:
        raise typer.Exit(128 + signal.SIGTERM)
    if interrupted:
        raise KeyboardInterrupt
    if failed:
        raise typer.Exit(1)


def _named_like(source: str | int) -> Path:
    if isinstance(source, int):
        return Path(f"camera_{source}")
    path = urlsplit(source).path if "://" in source else source
    return Path(Path(path).name or "stream")


class _Results:
    """COCO results and images of all frames, written as they come."""

    def __init__(self, output: Path, id2label: Mapping[int, str]) -> None:
        import json

        categories = [{"id": i, "name": name} for i, name in sorted(id2label.items())]
        head = json.dumps({"info": {}, "annotations": [], "categories": categories})
        try:
            self._frames = GrowingArray(
                output / "images.json", head[:-1] + ', "images": [', after="]}"
            )
            self._objects = GrowingArray(output / "detections.json")
        except OSError as error:
            raise UserError(
                f"--output {output}: cannot be written ({first_line(error)}); name another folder"
            ) from error
        self._count = 0

    def append(
        self, reader: VideoReader, video: Path, frame: Frame, result: DetectionResult
    ) -> None:
        """Write a frame and what was found in it."""
        place = {"frame_index": frame.index, "time": round(float(frame.seconds), 6)}
        width, height = frame.image.size
        record = {"id": self._count, "file_name": reader.name, "width": width, "height": height}
        self._frames.append(record | {"picture": video.name} | place)
        for found in result.to_coco(self._count):
            self._objects.append(found | place)
        self._count += 1

    def close(self) -> None:
        """Complete the files."""
        with closing(self._frames), closing(self._objects):
            pass


class _AnnotatedVideo:
    """The annotated video of a source, and its part of the results."""

    def __init__(self, reader: VideoReader, path: Path, results: _Results) -> None:
        self.path = path
        self.frames = self.objects = 0
        self._reader = reader
        self._results = results
        self._writer: VideoWriter | None = None

    def append(self, item: tuple[Frame, DetectionResult]) -> None:
        """Write a frame with what was found in it."""
        from cdetr_fast.images.video import VideoWriter

        frame, result = item
        if self._writer is None:
            reader = self._reader
            self._writer = VideoWriter(
                self.path, frame.image.size, reader.rate, reader.time_base, reader.pixel_aspect
            )
        self._results.append(self._reader, self.path, frame, result)
        self._writer.write(result.draw(frame.image), frame.seconds)
        self.frames += 1
        self.objects += len(result)

    def close(self) -> None:
        """Complete the video, if it has frames."""
        if self._writer is not None:
            self._writer.close()


def _detect(
    reader: VideoReader,
    detect: Callable[[Iterable[Image.Image]], Generator[DetectionResult, None, None]],
    annotated: _AnnotatedVideo,
    most_frames: int | None,
    stopped: Callable[[], bool],
) -> None:
    """Let frames flow through decoder, model and encoder, and print what became of them."""
    from cdetr_fast.common.pipeline import Ahead, Background

    waiting: deque[Frame] = deque()
    most = _WAITING_LIVE if reader.is_live else _WAITING
    frames = Ahead(iter(reader), most, reader.is_live, stopped)
    started = time.perf_counter()
    done = 0

    def images() -> Iterator[Image.Image]:  # in a thread of its own, ahead of the model
        for frame in islice(frames, most_frames):
            waiting.append(frame)
            yield frame.image

    def pace() -> str:
        rate = done / (time.perf_counter() - started)
        dropped = f", {frames.dropped} dropped" if reader.is_live else ""
        return f"{rate:.1f} frames per second{dropped}"

    doing = f"detecting in {reader.name}"
    totals = [total for total in (reader.total, most_frames) if total is not None]
    try:
        with ExitStack() as stack:
            stack.enter_context(closing(annotated))
            results = stack.enter_context(closing(detect(images())))
            task = stack.enter_context(progress.task(doing, min(totals, default=None)))
            writer = stack.enter_context(Background(annotated.append, _WAITING))
            stack.callback(frames.close)
            for result in results:
                writer.put((waiting.popleft(), result))
                done += 1
                task.update(done, f"{doing}, {pace()}")
    finally:
        if annotated.frames:
            print(
                f"{reader.name}: {counted(annotated.frames, 'frame')}, "
                f"{counted(annotated.objects, 'detection')}, "
                f"{pace()}: {annotated.path}",
                flush=True,
            )
    if not annotated.frames and not stopped():
        raise ValueError(f"{reader.name}: no frame could be decoded; check that it plays")
