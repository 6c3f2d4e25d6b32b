"""Labels of a training batch stay on the host until the criterion has matched them."""

import pytest
import torch
from torch.distributed.utils import _to_kwargs

from cdetr_fast.models.counting import OperatorCounter, as_on_a_gpu
from cdetr_fast.training import TrainingConfig
from cdetr_fast.training.data.coco import read_coco
from cdetr_fast.training.data.dataset import Collate, DetectionDataset
from cdetr_fast.training.data.sampling import ImageRequest
from cdetr_fast.training.data.transforms import EvaluationTransform
from cdetr_fast.training.engine import Engine
from cdetr_fast.training.run.signals import StopSignals

META = torch.device("meta")


@pytest.fixture
def batch(scenes):
    index = read_coco(scenes / "train" / "annotations.json")
    dataset = DetectionDataset(index, EvaluationTransform({"shortest_edge": 64}))
    return Collate()([dataset[ImageRequest(i)] for i in range(4)])


def test_only_pixels_and_masks_go_to_the_device(batch):
    for label in batch.labels:
        label["masks"] = torch.zeros(len(label["boxes"]), *batch.pixels.shape[2:], dtype=torch.bool)
    statistics = torch.ones(2, 3, 1, 1, device=META)
    inputs = batch.model_inputs(META, *statistics)
    # DDP and FSDP move what they find in tuples, lists and dictionaries.
    _, (wrapped,) = _to_kwargs((), inputs, META, False)
    for found in (inputs, wrapped):
        assert found["pixel_values"].is_meta
        assert len(found["labels"]) == 4
        for label, original in zip(found["labels"], batch.labels, strict=True):
            assert label["masks"].is_meta
            assert label["boxes"] is original["boxes"]
            assert label["class_labels"] is original["class_labels"]


@pytest.mark.parametrize("auxiliary", [False, True])
def test_a_step_copies_the_labels_once_and_waits_once(settings, batch, auxiliary):
    config = TrainingConfig(**settings())
    config.model_options["auxiliary_loss"] = auxiliary
    engine = Engine(config, StopSignals())
    with as_on_a_gpu(), OperatorCounter() as counted:
        engine.training_step(0, [batch])
    engine.close()
    # The labels of the batch, and the matches of all layers on their way back.
    assert counted.copies == {"from_numpy": 2}
    assert counted.waits == {"cpu": 1}
