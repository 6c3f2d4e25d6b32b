"""Settings as flags, as YAML and as keyword arguments."""

import pytest

from cdetr_fast.training import DataError, TrainingConfig
from cdetr_fast.training.config import parse_flags


def parse(*arguments):
    return parse_flags(arguments, "train", "")


def test_defaults_are_the_papers():
    config = TrainingConfig()
    assert (config.learning_rate, config.backbone_learning_rate) == (1e-4, 1e-5)
    assert (config.epochs, config.decay_epochs, config.max_grad_norm) == (50, (40,), 0.1)
    assert config.scales == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (config.max_size, config.crop_scales, config.crop_sizes) == (
        *(1333, (400, 500, 600)),
        (384, 600),
    )


def test_flags():
    config = parse(
        *("--train-annotations", "a.json", "--learning-rate", "2e-4", "--batch-size", "8"),
        *("--scales", "64", "96", "--ema-decay", "0.99", "--no-resume", "--compile"),
        *("--model-options", "num_queries=100", "activation_function=gelu", "dropout=1e-1"),
        *("--max-steps", "7", "--trackers", "tensorboard"),
    )
    assert config.train_annotations == "a.json"
    assert (config.learning_rate, config.batch_size, config.scales) == (2e-4, 8, (64, 96))
    assert config.compile
    assert not config.resume
    assert config.model_options == {
        "num_queries": 100,
        "activation_function": "gelu",
        "dropout": 0.1,
    }
    assert (config.max_steps, config.trackers) == (7, ("tensorboard",))


def test_flags_go_before_the_file_and_the_file_before_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("batch_size: 4\nlearning_rate: 1e-3\nscales: [32]\nmodel_options: {dropout: 0}")
    config = parse("--config", str(path), "--batch-size", "6")
    assert (config.batch_size, config.learning_rate, config.scales) == (6, 1e-3, (32,))
    assert config.model_options == {"dropout": 0}
    assert config.epochs == TrainingConfig().epochs


def test_round_trip(tmp_path):
    config = TrainingConfig(model="a", max_steps=3, scales=[32, 48], model_options={"dropout": 0.0})
    config.to_yaml(tmp_path / "config.yaml")
    assert TrainingConfig.from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 2", r"config.yaml: unknown setting 'batchsize'; did you mean 'batch_size'"),
        ("batch_size: two", "batch_size: expected int, got 'two'"),
        ("batch_size: 0", "batch_size: expected an integer of at least 1, got 0"),
        ("flip_probability: 2", "flip_probability: expected a number from 0 to 1, got 2.0"),
        ("learning_rate: .inf", "learning_rate: expected a finite number, got inf"),
        ("max_grad_norm: .nan", "max_grad_norm: expected a finite number, got nan"),
        ("scales: [a]", r"scales: expected a list of int, got \['a'\]"),
        ("crop_sizes: [9, 3]", "crop_sizes: expected two positive integers"),
        ("schedule: linear", r"schedule: expected one of \['step', 'cosine', 'constant'\]"),
        ("task: segmentation\ntrain_annotations: a", "train_masks: expected the folder"),
        ("- 1", "expected a YAML mapping, got list"),
        ("a: [", "expected a YAML file"),
    ],
)
def test_errors_name_the_setting(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        TrainingConfig.from_yaml(path)


@pytest.mark.parametrize(
    "flags", [["--batchsize", "2"], ["--batch-size", "x"], ["--model-options", "num_queries"]]
)
def test_wrong_flags_exit_with_2(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*flags)
    assert stop.value.code == 2
    assert flags[0] in capsys.readouterr().err
