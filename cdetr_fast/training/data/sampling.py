"""Which images a step sees, on which process, with which random numbers.

Everything is a function of (seed, epoch, step): a run that is resumed in the middle of an epoch
goes on with the same images, and their augmentation does not depend on the worker that loads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from torch.utils.data import Sampler

# Steps whose images are sorted by aspect ratio together: more would cut little more padding, and
# mix the images less.
_SORTED_STEPS = 32


class Draw(NamedTuple):
    """One image to load.

    Attributes:
        index: Of the image.
        image_seed: For what is random about this image (flip, where to crop).
        batch_seed: For what all images of a step share (scale, shape of the crop), so that they
            have similar sizes; None for evaluation, which is not random.
        counted: Whether evaluation counts the image; False fills up a batch.
    """

    index: int
    image_seed: tuple[int, ...] = ()
    batch_seed: tuple[int, ...] | None = None
    counted: bool = True


class TrainingSampler(Sampler):
    """Gives the batches of one process, step by step.

    The images of a step are `batch_size * accumulate * processes` of similar aspect ratio. Which
    they are does not depend on how that product is made up. Each image comes once an epoch; the
    last step is filled up from the epoch's first images.

    Args:
        aspect_ratios: Width / height of every image.
        batch_size: Images in a batch of one process.
        accumulate: Batches in a step.
        rank: Of this process.
        processes: Number of processes.
        seed: Of the order and of the augmentation.

    Attributes:
        fixed: What else has to stay as it is for the order to do so: nothing.
    """

    fixed: ClassVar[dict[str, int]] = {}

    def __init__(
        self,
        aspect_ratios: Sequence[float],
        batch_size: int,
        accumulate: int = 1,
        rank: int = 0,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        if len(aspect_ratios) == 0:
            raise ValueError("aspect_ratios: expected at least one image, got none")
        self.aspect_ratios = np.asarray(aspect_ratios, dtype=np.float64)
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.rank = rank
        self.processes = processes
        self.seed = seed
        self.epoch = 0
        self.first_step = 0

    @property
    def images_per_step(self) -> int:
        """Images of one step over all processes."""
        return self.batch_size * self.accumulate * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every image comes once."""
        return -(-len(self.aspect_ratios) // self.images_per_step)

    def start_at(self, epoch: int, step: int = 0) -> None:
        """Sets where the next iteration starts: step `step` of an epoch."""
        self.epoch, self.first_step = epoch, step

    def steps(self, epoch: int) -> np.ndarray:
        """Returns the images of every step of an epoch, int64 `[steps, images_per_step]`."""
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(len(self.aspect_ratios))
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

    def __iter__(self) -> Iterator[list[Draw]]:
        steps = self.steps(self.epoch)
        for step in range(self.first_step, len(steps)):
            shared = (self.seed, self.epoch, step)
            for part in range(self.accumulate):
                start = (part * self.processes + self.rank) * self.batch_size
                places = range(start, start + self.batch_size)
                yield [Draw(int(steps[step, i]), (*shared, i), shared) for i in places]


class EvaluationSampler(Sampler):
    """Gives each image once over all processes, in batches of similar aspect ratio.

    Every process gets the same number of batches, as sharded models need; what fills them up is
    marked as not counted.

    Args:
        aspect_ratios: Width / height of every image.
        batch_size: Images in a batch.
        rank: Of this process.
        processes: Number of processes.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float],
        batch_size: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        order = np.argsort(np.asarray(aspect_ratios), kind="stable")
        size = batch_size * processes
        self.order = np.resize(order, -(-len(order) // size) * size).reshape(-1, size)
        self.images = len(order)
        self.batch_size = batch_size
        self.rank = rank

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[Draw]]:
        for row, images in enumerate(self.order):
            start = self.rank * self.batch_size
            yield [
                Draw(int(images[i]), counted=row * len(images) + i < self.images)
                for i in range(start, start + self.batch_size)
            ]
