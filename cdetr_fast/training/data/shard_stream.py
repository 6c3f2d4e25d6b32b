"""Batches out of shards: split by process and worker, the same order in each run.

Each epoch deals the shards out anew; a worker reads its own ones, keeps a window of undecoded
images, and cuts that into batches of similar aspect ratio. Every process has the same number of
steps: who has fewer images takes some again, who has more leaves some out, in each epoch others.
All of it follows from (seed, epoch, process, worker): a run goes on in the middle of an epoch by
reading past what it has had, without decoding it.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cdetr_fast.training.data.dataset import Batch, Collate, decode, make_item
from cdetr_fast.training.data.shards import ShardSet, read_shard
from cdetr_fast.training.errors import DataError
from cdetr_fast.training.run.signals import outlive_in_worker

_WINDOW = 32  # batches at most; as many as the sampler of images sorts together


class ShardStream(IterableDataset):
    """Gives the batches of one process; has the attributes of a `TrainingSampler`.

    Args:
        shards: The set.
        transform: Takes a sample, an image seed and a batch seed.
        batch_size: Images in a batch of one process.
        accumulate: Batches in a step.
        rank: Of this process.
        processes: Number of processes.
        workers: Processes that load images, of each; 0 = the main one.
        multiple: Batches are padded to multiples of it.
        seed: Of the order and of the augmentation.

    Raises:
        DataError: There are fewer shards than workers of all processes.
    """

    def __init__(
        self,
        shards: ShardSet,
        transform: Any,
        batch_size: int,
        accumulate: int,
        rank: int,
        processes: int,
        workers: int,
        multiple: int,
        seed: int,
    ) -> None:
        self.shards, self.transform, self.collate = shards, transform, Collate(multiple)
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.processes, self.workers = rank, processes, max(1, workers)
        self.seed = seed
        # Epoch and first step, in memory that workers share: they live longer than an epoch.
        self.start = torch.zeros(2, dtype=torch.int64).share_memory_()
        if len(shards.names) < processes * self.workers:
            raise DataError(
                f"{shards.path}: expected at least one shard for each loading process, "
                f"{processes} x {self.workers}, got {len(shards.names)}; lower num_workers, or "
                "write smaller shards (--images-per-shard)"
            )

    @property
    def images_per_step(self) -> int:
        """Images of one step over all processes."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which about every image comes once."""
        return -(-len(self.shards) // self.images_per_step)

    @property
    def fixed(self) -> dict[str, int]:
        """What has to stay as it is for the order to do so."""
        return {"processes": self.processes, "loading_workers": self.workers}

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Sets where the next iteration starts: step `step` of an epoch."""
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

    def _chunks(self, worker: int, epoch: int, failures: list[str]) -> Iterator[list[dict]]:
        """Cuts a window at a time into batches of similar aspect ratio, in random order."""
        place = (self.seed, epoch, self.rank, worker)
        rng = np.random.default_rng(place)
        own = self._own(worker, epoch)
        samples = self._samples(own, rng, failures)
        # A small set is not to come twice before it was there once.
        whole = -(-sum(self.shards.images[i] for i in own) // self.batch_size)
        size = min(_WINDOW, max(1, whole)) * self.batch_size
        while True:
            window = list(itertools.islice(samples, size))
            ratios = [sample["content"]["width"] / sample["content"]["height"] for sample in window]
            order = rng.permutation(len(window))
            order = order[np.argsort(np.array(ratios)[order], kind="stable")]
            batches = order.reshape(-1, self.batch_size)
            for batch in batches[rng.permutation(len(batches))]:
                yield [window[i] for i in batch]

    def _own(self, worker: int, epoch: int) -> list[int]:
        dealt = np.random.default_rng((self.seed, epoch)).permutation(len(self.shards.names))
        return dealt[self.rank * self.workers + worker :: self.processes * self.workers].tolist()

    def _samples(
        self, own: list[int], rng: np.random.Generator, failures: list[str]
    ) -> Iterator[dict[str, Any]]:
        """Gives samples without end; what cannot be read is added to `failures`."""
        while True:
            given = 0
            for shard in rng.permutation(own):
                url = self.shards.place + self.shards.names[shard]
                try:
                    for raw in read_shard(url):
                        sample = self._parsed(raw, url)
                        if isinstance(sample, str):
                            failures.append(sample)
                            continue
                        given += 1
                        yield sample
                except Exception as error:  # tarfile, gopen and its programs raise many kinds
                    failures.append(
                        f"{url}: cannot be read to its end ({type(error).__name__}: {error}); "
                        "fetch or write it anew, or pass --bad-images skip"
                    )
            if given == 0:
                raise DataError("\n".join(failures) or f"{self.shards.place}: empty shards")

    def _parsed(self, raw: dict[str, Any], url: str) -> dict[str, Any] | str:
        """Returns file, name and content of a sample, or what is wrong with it."""
        name = f"{url}: sample {raw['__key__']}"
        files = [k for k in raw if not k.startswith("__") and k != "json"]
        try:
            content = json.loads(raw["json"])
            numbers = [content[key] for key in ("image_id", "height", "width")]
            if not (len(files) == 1 and all(isinstance(n, int) for n in numbers)):
                raise ValueError(f"files {files}, image_id, height, width {numbers}")
            if min(numbers[1:]) < 1:
                raise ValueError(f"height, width {numbers[1:]}")
            objects = [o for o in content["annotations"] if not o.get("iscrowd")]
            boxes = np.array([o["bbox"] for o in objects], dtype=np.float64).reshape(-1, 4)
            labels = [self.shards.label_of[o["category_id"]] for o in objects]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            return (
                f"{name}: expected an image and a json with image_id, width, height and "
                f"annotations of known categories ({type(error).__name__}: {error}); write the "
                "shard anew, or pass --bad-images skip"
            )
        named = f"{name} (image id {content['image_id']})"
        return {"name": named, "file": raw[files[0]], "content": content} | {
            "boxes": boxes,
            "labels": np.array(labels, dtype=np.int64),
        }

    def _batch(self, number: int, epoch: int, chunk: list[dict], failures: list[str]) -> Batch:
        step, part = divmod(number, self.accumulate)
        batch_seed = (self.seed, epoch, step)
        first = (part * self.processes + self.rank) * self.batch_size
        items: list[dict[str, Any] | str] = list(failures)
        for i, sample in enumerate(chunk, first):
            content = sample["content"]
            try:
                image = decode(
                    io.BytesIO(sample["file"]),
                    sample["name"],
                    (content["height"], content["width"]),
                    "its json",
                )
            except DataError as error:
                items.append(str(error))
                continue
            seeds = (*batch_seed, i), batch_seed
            item = make_item(image, sample["boxes"], sample["labels"], None, self.transform, *seeds)
            items.append(item | {"image_id": content["image_id"], "index": -1, "counted": True})
        return self.collate(items)


def stream_loader(stream: ShardStream, workers: int, pin_memory: bool) -> DataLoader:
    """Returns a loader of the batches of a stream."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=outlive_in_worker,
        generator=torch.Generator().manual_seed(0),
    )
