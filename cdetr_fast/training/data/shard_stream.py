"""Batches from shards: split by process and worker, in the same order in each run.

Each epoch deals the shards out again; a worker reads its own shards, keeps a window of undecoded
images, and cuts that into batches of similar aspect ratio. Every process has the same number of
steps: one with fewer images repeats some, one with more leaves some out, others in each epoch. All
of it follows from (seed, epoch, process, worker): a run resumes in the middle of an epoch by
reading past what it has had, without decoding it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from cdetr_fast.training.data.dataset import Batch, Collate, Item, decode, make_item
from cdetr_fast.training.data.records import ShardImage
from cdetr_fast.training.data.sampling import StepPlan
from cdetr_fast.training.data.shards import ShardSet, read_shard
from cdetr_fast.training.data.transforms import Transform
from cdetr_fast.training.errors import DataError

_WINDOW = 32  # batches at most; as many as the sampler of images sorts together


class ShardStream(StepPlan, IterableDataset[Batch]):
    """The batches of one process.

    Args:
        shards: The set.
        transform: Takes a sample, an image seed and a batch seed.
        batch_size: Images in a batch of one process.
        accumulate: Batches in a step.
        rank: Number of this process.
        processes: Number of processes.
        workers: Processes that load images, per process of the run; 0 = that process itself.
        multiple: Heights and widths of batches are rounded up to it.
        seed: Seed of the order and of the augmentation.

    Raises:
        DataError: There are fewer shards than workers of all processes.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: Transform,
        batch_size: int,
        accumulate: int,
        rank: int,
        processes: int,
        workers: int,
        multiple: int,
        seed: int,
    ) -> None:
        super().__init__(len(shards), batch_size, accumulate, rank, processes, seed)
        self.shards, self.transform, self.collate = shards, transform, Collate(multiple)
        self.workers = max(1, workers)
        # Epoch and first step, in memory that workers share: they live longer than an epoch.
        self.start = torch.zeros(2, dtype=torch.int64).share_memory_()
        if len(shards.names) < processes * self.workers:
            raise DataError(
                f"{shards.path}: expected at least one shard for each loading process, "
                f"{processes} x {self.workers}, got {len(shards.names)}; lower num_workers, or "
                "write smaller shards (--images-per-shard)"
            )

    @property
    def fixed(self) -> dict[str, int]:
        """Further numbers that must not change for the order to stay the same."""
        return {"processes": self.processes, "loading_workers": self.workers}

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Set where the next iteration starts: step `step` of an epoch."""
        self.start[:] = torch.tensor([epoch, step])

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker = info.id if info is not None else 0
        epoch, first_step = self.start.tolist()
        failures: list[str] = []
        chunks = self._chunks(worker, epoch, failures)
        numbers = range(worker, self.steps_per_epoch * self.accumulate, self.workers)
        for number in numbers:
            chunk = next(chunks)
            if number >= first_step * self.accumulate:
                yield self._batch(number, epoch, chunk, failures)
            failures.clear()

    def _chunks(self, worker: int, epoch: int, failures: list[str]) -> Iterator[list[_Sample]]:
        """Cut one window after the other into batches of similar aspect ratio, in random order."""
        rng = np.random.default_rng((self.seed, epoch, self.rank, worker))
        own = self._own_shards(worker, epoch)
        samples = self._samples(own, rng, failures)
        # No image of a small set comes twice before all have come once.
        whole = -(-sum(self.shards.images[i] for i in own) // self.batch_size)
        size = min(_WINDOW, max(1, whole)) * self.batch_size
        while True:
            window = list(itertools.islice(samples, size))
            ratios = [sample.record.width / sample.record.height for sample in window]
            order = rng.permutation(len(window))
            order = order[np.argsort(np.array(ratios)[order], kind="stable")]
            batches = order.reshape(-1, self.batch_size)
            for batch in batches[rng.permutation(len(batches))]:
                yield [window[i] for i in batch]

    def _own_shards(self, worker: int, epoch: int) -> list[int]:
        dealt = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards.names))
        return dealt[self.rank * self.workers + worker :: self.processes * self.workers].tolist()

    def _samples(
        self, own: list[int], rng: np.random.Generator, failures: list[str]
    ) -> Iterator[_Sample]:
        """Yield samples without end; errors of what cannot be read go to `failures`."""
        while True:
            found = 0
            for shard in rng.permutation(own):
                url = self.shards.place + self.shards.names[shard]
                try:
                    for files in read_shard(url):
                        sample = self._parsed(files, url)
                        if isinstance(sample, str):
                            failures.append(sample)
                            continue
                        found += 1
                        yield sample
                except Exception as error:  # tarfile, gopen and its programs raise many kinds
                    failures.append(
                        f"{url}: cannot be read to its end ({type(error).__name__}: {error}); "
                        "fetch or write it again, or pass --bad-images skip"
                    )
            if found == 0:
                raise DataError("\n".join(failures) or f"{self.shards.place}: empty shards")

    def _parsed(self, files: dict[str, Any], url: str) -> _Sample | str:
        """Return a sample, or what is wrong with it."""
        name = f"{url}: sample {files['__key__']}"
        images = [suffix for suffix in files if not suffix.startswith("__") and suffix != "json"]
        try:
            if len(images) != 1 or "json" not in files:
                raise ValueError(f"files {sorted(files)}")
            record = ShardImage.model_validate_json(files["json"])
            objects = [o for o in record.annotations if not o.iscrowd]
            labels = [self.shards.label_of[o.category_id] for o in objects]
        except (KeyError, ValueError) as error:  # pydantic's ValidationError is a ValueError
            return (
                f"{name}: expected an image and a json with image_id, width, height and "
                f"annotations of known categories ({type(error).__name__}: {error}); write the "
                "shard again, or pass --bad-images skip"
            )
        return _Sample(
            name=f"{name} (image id {record.image_id})",
            file=files[images[0]],
            record=record,
            boxes_xywh=np.array([o.bbox for o in objects], dtype=np.float64).reshape(-1, 4),
            labels=np.array(labels, dtype=np.int64),
        )

    def _batch(self, number: int, epoch: int, chunk: list[_Sample], failures: list[str]) -> Batch:
        step, part = divmod(number, self.accumulate)
        results: list[Item | str] = list(failures)
        for place, sample in zip(self.places(part), chunk, strict=True):
            size_hw = sample.record.height, sample.record.width
            try:
                image = decode(sample.file, sample.name, size_hw, "its json", self.shards.exif)
            except DataError as error:
                results.append(str(error))
                continue
            request = self.request(-1, epoch, step, place)
            objects = sample.boxes_xywh, sample.labels, None
            image_id = sample.record.image_id
            results.append(make_item(image, *objects, self.transform, request, image_id))
        return self.collate(results)


class _Sample(NamedTuple):
    """An image that is not yet decoded, and its objects without crowds."""

    name: str
    file: bytes
    record: ShardImage
    boxes_xywh: np.ndarray
    labels: np.ndarray
