"""Order of the images: which of them a step sees, on which process, with which random numbers.

Everything is a function of (seed, epoch, step): a run that resumes in the middle of an epoch
continues with the same images, and their augmentation does not depend on the worker that loads
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Sampler

# Steps whose images are sorted by aspect ratio together: more would save little more padding, and
# mix the images less.
_SORTED_STEPS = 32

Seed = tuple[int, ...]


class ImageRequest(NamedTuple):
    """One image to load.

    Attributes:
        position: Position of the image in the index.
        image_seed: Seed of what is random for this image (flip, position of the crop).
        batch_seed: Seed of what all images of a step share (scale, shape of the crop), so that they
            have similar sizes; None for evaluation, which is not random.
        counted: Whether evaluation counts the image; False for images that fill up a batch.
    """

    position: int
    image_seed: Seed = ()
    batch_seed: Seed | None = None
    counted: bool = True


class StepPlan:
    """Division of the images into steps, batches and processes.

    Args:
        num_images: Images of the training set.
        batch_size: Images in a batch of one process.
        accumulate: Batches in a step.
        rank: Number of this process.
        processes: Number of processes.
        seed: Seed of the order and of the augmentation.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        self.num_images = num_images
        self.batch_size, self.accumulate = batch_size, accumulate
        self.rank, self.processes = rank, processes
        self.seed = seed

    @property
    def images_per_step(self) -> int:
        """Images of one step over all processes."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image (of shards: about every image) comes once."""
        return -(-self.num_images // self.images_per_step)

    @property
    def fixed(self) -> dict[str, int]:
        """Further numbers that must not change for the order to stay the same."""
        return {}

    def places(self, part: int) -> range:
        """Return the places, within the images of a step, of this process's batch `part`."""
        start = (part * self.processes + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def request(self, image: int, epoch: int, step: int, place: int) -> ImageRequest:
        """Return the request for an image at a place within a step."""
        batch_seed = (self.seed, epoch, step)
        return ImageRequest(image, (*batch_seed, place), batch_seed)


class TrainingSampler(StepPlan, Sampler[list[ImageRequest]]):
    """Batches of one process, step by step.

    The images of a step have similar aspect ratios. Which they are does not depend on how their
    number is made up of batch size, accumulation and processes. Each image comes once per epoch;
    the last step is filled up with the epoch's first images.

    Args:
        aspect_ratios: Width / height of every image.
        *plan: As in `StepPlan`, from `batch_size` on.
        **named_plan: The same.
    """

    def __init__(self, aspect_ratios: Sequence[float], *plan: int, **named_plan: int) -> None:
        if len(aspect_ratios) == 0:
            raise ValueError("aspect_ratios: expected at least one image, got none")
        super().__init__(len(aspect_ratios), *plan, **named_plan)
        self.aspect_ratios = np.asarray(aspect_ratios, dtype=np.float64)
        self.epoch = 0
        self.first_step = 0

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Set where the next iteration starts: step `step` of an epoch."""
        self.epoch, self.first_step = epoch, step

    def steps(self, epoch: int) -> np.ndarray:
        """Return the images of every step of an epoch, int64 `[steps, images_per_step]`."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.num_images)
        size = self.images_per_step
        order = np.resize(order, self.steps_per_epoch * size)  # repeats from the front
        for start in range(0, len(order), _SORTED_STEPS * size):
            part = order[start : start + _SORTED_STEPS * size]
            part[:] = part[np.argsort(self.aspect_ratios[part], kind="stable")]
        steps = order.reshape(-1, size)
        # Sorting leaves neighbours of one shape beside each other: mix within the step and among
        # the steps, so that no process always gets the wider half.
        return rng.permuted(steps, axis=1)[rng.permutation(len(steps))]

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[ImageRequest]]:
        steps = self.steps(self.epoch)
        for step in range(self.first_step, len(steps)):
            images = steps[step].tolist()
            for part in range(self.accumulate):
                places = self.places(part)
                yield [self.request(images[i], self.epoch, step, i) for i in places]


class EvaluationSampler(Sampler[list[ImageRequest]]):
    """Each image once over all processes, in batches of similar aspect ratio.

    Every process gets the same number of batches, as sharded models need; images that fill them up
    are marked as not counted.

    Args:
        aspect_ratios: Width / height of every image.
        batch_size: Images in a batch.
        rank: Number of this process.
        processes: Number of processes.
    """

    def __init__(
        self, aspect_ratios: Any, batch_size: int, rank: int = 0, processes: int = 1
    ) -> None:
        order = np.argsort(np.asarray(aspect_ratios), kind="stable")
        self.images = len(order)
        self.plan = StepPlan(self.images, batch_size, rank=rank, processes=processes)
        whole = self.plan.steps_per_epoch * self.plan.images_per_step
        self.order = np.resize(order, whole).reshape(-1, self.plan.images_per_step)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[ImageRequest]]:
        for row, images in enumerate(self.order.tolist()):
            yield [
                ImageRequest(images[i], counted=row * len(images) + i < self.images)
                for i in self.plan.places(0)
            ]
