"""Each image once, whatever the processes; resumable; little padding."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdetr_fast.training.data.sampling import EvaluationSampler, TrainingSampler

numbers = st.integers(1, 5)


@given(images=st.integers(1, 90), batch=numbers, accumulate=numbers, processes=numbers)
def test_each_image_once_an_epoch(images, batch, accumulate, processes):
    ratios = np.random.default_rng(images).uniform(0.5, 2, images)
    samplers = [
        TrainingSampler(ratios, batch, accumulate, rank, processes) for rank in range(processes)
    ]
    drawn = [list(sampler) for sampler in samplers]
    for batches, sampler in zip(drawn, samplers, strict=True):
        assert len(batches) == len(sampler) == sampler.steps_per_epoch * accumulate
        assert all(len(b) == batch for b in batches)
    counts = np.bincount(
        [draw.position for batches in drawn for b in batches for draw in b], minlength=images
    )
    surplus = counts.sum() - images
    assert counts.min() >= 1
    assert surplus == samplers[0].steps_per_epoch * samplers[0].images_per_step - images
    assert counts.max() <= -(-counts.sum() // images)


@pytest.mark.parametrize(("batch", "accumulate", "processes"), [(6, 2, 1), (2, 2, 3), (1, 1, 12)])
def test_a_step_has_the_same_images_however_it_is_split(batch, accumulate, processes):
    ratios = np.random.default_rng(0).uniform(0.5, 2, 50)

    def steps(batch, accumulate, processes):
        parts = [
            list(TrainingSampler(ratios, batch, accumulate, rank, processes, seed=3))
            for rank in range(processes)
        ]
        return [
            sorted(
                draw
                for part in parts
                for b in part[step * accumulate : (step + 1) * accumulate]
                for draw in b
            )
            for step in range(len(parts[0]) // accumulate)
        ]

    assert steps(batch, accumulate, processes) == steps(12, 1, 1)


def test_goes_on_in_the_middle_of_an_epoch():
    sampler = TrainingSampler(np.linspace(0.5, 2, 40), 2, accumulate=2)
    sampler.start_at(3)
    whole = list(sampler)
    sampler.start_at(3, 4)
    assert len(sampler) == len(whole) - 8
    assert list(sampler) == whole[8:]
    sampler.start_at(4)
    assert list(sampler) != whole


def test_batches_have_one_shape():
    """Against batches of random images: the padding falls to a small part."""
    rng = np.random.default_rng(0)
    ratios = rng.choice([0.67, 0.75, 1.33, 1.5, 1.78], 640)
    padding = []
    for order in (rng.permutation(640).reshape(-1, 8), TrainingSampler(ratios, 8).steps(0)):
        batches = ratios[order]
        width, height = np.maximum(batches, 1), np.maximum(1 / batches, 1)  # shortest edge 1
        used = width * height
        whole = width.max(1) * height.max(1) * 8
        padding.append(1 - used.sum() / whole.sum())
    assert padding[1] < 0.1 * padding[0]


@given(images=st.integers(1, 60), batch=numbers, processes=numbers)
def test_evaluation_counts_each_image_once(images, batch, processes):
    ratios = np.random.default_rng(images).uniform(0.5, 2, images)
    samplers = [EvaluationSampler(ratios, batch, rank, processes) for rank in range(processes)]
    assert len({len(list(sampler)) for sampler in samplers}) == 1
    counted = [d.position for s in samplers for b in s for d in b if d.counted]
    assert sorted(counted) == list(range(images))


def test_no_images():
    with pytest.raises(ValueError, match="at least one image"):
        TrainingSampler([], 2)
