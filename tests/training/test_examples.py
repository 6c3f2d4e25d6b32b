"""The scripts in examples/ run, change the weights and leave a checkpoint that loads."""

import runpy
import sys
from unittest import mock

import pytest
import torch

from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.demo.scenes import CLASSES
from cdetr_fast.training import TrainingConfig
from cdetr_fast.training.initial_weights import build_model
from cdetr_fast.training.setup import make_processor


@pytest.fixture
def checkpoint(settings, tmp_path):
    """A model of two other classes, which needs a new head."""
    config = TrainingConfig(**settings())
    model = build_model(config, ["cat", "dog"])
    model.save_pretrained(tmp_path / "start")
    make_processor(config, model).save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def run(root, capsys):
    """Runs an example as a program, in this process; returns what it prints."""

    def call(script, *arguments):
        path = str(root / "examples" / script / "train.py")
        capsys.readouterr()
        with mock.patch.object(sys, "argv", [path, *map(str, arguments)]):
            runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return call


def assert_trained(checkpoint, folder):
    start = ConditionalDetrForObjectDetection.from_pretrained(checkpoint)
    model = ConditionalDetrForObjectDetection.from_pretrained(folder, strict=True)
    assert list(model.config.id2label.values()) == list(CLASSES)
    assert not model.config.auxiliary_loss
    for name in ("bbox_predictor.layers.2.weight", "model.input_projection.weight"):
        before, after = start.get_parameter(name), model.get_parameter(name)
        assert after.isfinite().all()
        assert not torch.equal(before, after), name
    # The new head starts at the focal prior and a few steps leave it near.
    bias = model.class_labels_classifier.bias
    assert bias.tolist() == pytest.approx([-4.6] * len(CLASSES), abs=0.1)


def test_trainer(run, scenes, checkpoint, tmp_path):
    pytest.importorskip("transformers")
    out = run(
        *("trainer", "--model", checkpoint, "--output_dir", tmp_path / "run"),
        *("--train", scenes / "train", "--val", scenes / "val", "--max_steps", 2),
        *("--per_device_train_batch_size", 4, "--use_cpu", "--save_strategy", "no"),
        *("--learning_rate", "1e-3", "--report_to", "none", "--disable_tqdm", "True"),
    )
    assert "'eval_loss': " in out
    assert "'AP50': " in out.splitlines()[-1]
    assert_trained(checkpoint, tmp_path / "run")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accelerate(run, scenes, checkpoint, tmp_path, accumulate):
    out = run(
        *("accelerate", "--model", checkpoint, "--output", tmp_path / "run"),
        *("--train", scenes / "train" / "annotations.json", "--scales", 48, 64, "--cpu"),
        *("--val", scenes / "val" / "annotations.json", "--epochs", 1, "--workers", 0),
        *("--batch-size", 4, "--accumulate", accumulate),
    )
    assert "14 images" in out
    assert "epoch 1: loss " in out
    assert "'AP50': " in out.splitlines()[-1]
    assert_trained(checkpoint, tmp_path / "run")


def test_trainer_keeps_little_of_an_evaluation(scenes, checkpoint, tmp_path):
    """Loss parts, logits and boxes of each batch, where transformers' example looks for them."""
    transformers = pytest.importorskip("transformers")
    model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint, auxiliary_loss=True)
    model.config.output_attentions = model.config.output_hidden_states = True
    labels = {"class_labels": torch.tensor([1]), "boxes": torch.full((1, 4), 0.5)}
    items = [{"pixel_values": torch.randn(3, 64, 64), "labels": labels} for _ in range(3)]
    kept = []

    def compute_metrics(evaluated):
        kept.extend(evaluated.predictions)
        return {}

    def collate(items):
        pixels = torch.stack([x["pixel_values"] for x in items])
        return {"pixel_values": pixels, "labels": [x["labels"] for x in items]}

    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path / "trainer"),
            per_device_eval_batch_size=2,
            eval_do_concat_batches=False,
            remove_unused_columns=False,
            use_cpu=True,
            report_to="none",
        ),
        data_collator=collate,
        eval_dataset=items,
        compute_metrics=compute_metrics,
    )
    trainer.evaluate()
    assert [len(batch) for batch in kept] == [3, 3]
    for batch, images in zip(kept, (2, 1), strict=True):
        assert isinstance(batch[0], dict)
        assert batch[1].shape == (images, 12, 2)
        assert batch[2].shape == (images, 12, 4)
