"""Settings of a training run as flags."""

import re

import pytest

from cdetr_fast import cli
from cdetr_fast.training import TrainingConfig


@pytest.fixture
def parse(monkeypatch):
    """Runs `cdetr-fast train` up to where training begins; returns the configuration."""
    pytest.importorskip("accelerate")
    configs = []

    def train(config):
        configs.append(config)
        return {"step": 0}

    monkeypatch.setattr("cdetr_fast.training.engine.train", train)

    def call(*arguments):
        with pytest.raises(SystemExit, match="0"):
            cli.main(["train", *arguments])
        return configs.pop()

    return call


def test_flags(parse):
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


def test_flags_go_before_the_file_and_the_file_before_defaults(parse, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("batch_size: 4\nlearning_rate: 1e-3\nscales: [32]\nmodel_options: {dropout: 0}")
    config = parse("--config", str(path), "--batch-size", "6")
    assert (config.batch_size, config.learning_rate, config.scales) == (6, 1e-3, (32,))
    assert config.model_options == {"dropout": 0}
    assert config.epochs == TrainingConfig().epochs


def test_lists(parse):
    """As with argparse: up to the next flag, nothing at all, the last one counts."""
    config = parse(
        *("--scales", "1", "2", "--scales=3", "--decay-epochs", "--crop-sizes", "4", "5"),
        *("--trackers", "wandb", "tensorboard", "--model-options", "a='b c'", "d={e: 1, f: [2]}"),
    )
    assert (config.scales, config.decay_epochs, config.crop_sizes) == ((3,), (), (4, 5))
    assert config.trackers == ("wandb", "tensorboard")
    assert config.model_options == {"a": "b c", "d": {"e": 1, "f": [2]}}
    assert parse('--model-options=a="b c"').model_options == {"a": "b c"}
    assert parse("--decay-epochs", "-1", "2").decay_epochs == (-1, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batchsize", "2"], "No such option: --batchsize; did you mean '--batch-size'?"),
        (["--batch-size", "x"], "Invalid value for '--batch-size': "),
        (["--model-options", "a"], "Invalid value for '--model-options': expected NAME=VALUE"),
        (
            ["--model-options", "a=1", "b={c: d"],
            "Invalid value for '--model-options': expected a value in YAML behind b=, got '{c: d'",
        ),
        (["--model-options", "a=2020-13-45"], "behind a=, got '2020-13-45' (month must be in"),
        (["--scales", "1", "x"], "Invalid value for '--scales': expected INTEGER..., got '1 x'"),
        (["--schedule", "linear"], "'linear' is not one of 'step', 'cosine', 'constant'"),
    ],
)
def test_wrong_flags_exit_with_2(flags, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["train", *flags])
    assert message in capsys.readouterr().err


def test_help_is_grouped_and_typed(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", "--help"])
    text = capsys.readouterr().out
    groups = re.findall(r"─ (\w+) ─", text)
    assert groups == ["Options", "data", "model", "augmentation", "optimisation", "run"]
    for line in (
        r"--epochs +INTEGER +passes over the training set \(default: 50\)",
        r"--learning-rate +FLOAT ",
        r"--scales +INTEGER\.\.\. .*\(default: 480 512 .* 800\)",
        r"--model-options +NAME=VALUE\.\.\. ",
        r"--resume +--no-resume ",
        r"--bad-labels +\W?stop\|drop\W? ",
        r"--trackers +TEXT\.\.\. .*\(default: none\)",
    ):
        assert re.search(line, text), line
