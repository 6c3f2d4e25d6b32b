"""Settings as YAML and as keyword arguments."""

from pathlib import Path

import pytest

from cdetr_fast.training import DataError, TrainingConfig


def test_defaults_are_the_papers():
    config = TrainingConfig()
    assert (config.learning_rate, config.backbone_learning_rate) == (1e-4, 1e-5)
    assert (config.epochs, config.decay_epochs, config.max_grad_norm) == (50, (40,), 0.1)
    assert config.scales == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert (config.max_size, config.crop_scales, config.crop_sizes) == (
        *(1333, (400, 500, 600)),
        (384, 600),
    )


def test_round_trip(tmp_path):
    config = TrainingConfig(model="a", max_steps=3, scales=[32, 48], model_options={"dropout": 0.0})
    config.to_yaml(tmp_path / "config.yaml")
    assert TrainingConfig.from_yaml(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize: 2", r"config.yaml: unknown setting 'batchsize'; did you mean 'batch_size'"),
        ("batch_size: two", "batch_size: expected an integer >= 1, got 'two'"),
        ("batch_size: 0", "batch_size: expected an integer >= 1, got 0"),
        ("flip_probability: 2", r"flip_probability: expected a number in \[0, 1\], got 2"),
        ("learning_rate: .inf", "learning_rate: expected a number >= 0, got inf"),
        ("max_grad_norm: .nan", "max_grad_norm: expected a number >= 0, got nan"),
        ("scales: [a]", r"scales\[0\]: expected an integer >= 1, got 'a'"),
        ("crop_sizes: [9, 3]", "crop_sizes: expected two positive integers"),
        (
            "schedule: linear",
            "schedule: expected one of 'step', 'cosine', 'constant', got 'linear'",
        ),
        ("- 1", "expected a YAML mapping, got list"),
        ("a: [", "expected a YAML file"),
        ("a: 2020-13-45", "expected a YAML file"),
        pytest.param("[" * 9999, "expected a YAML file", id="deep"),
    ],
)
def test_errors_name_the_setting(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        TrainingConfig.from_yaml(path)


def test_values_are_stored_in_the_type_of_their_setting():
    config = TrainingConfig(output=Path("x"), learning_rate=1, scales=[32], trackers=["wandb"])
    assert (config.output, config.scales, config.trackers) == ("x", (32,), ("wandb",))
    assert type(config.learning_rate) is float
    with pytest.raises(DataError, match="compile: expected True or False, got 1"):
        config.compile = 1


def test_graphs_exclude_other_settings():
    with pytest.raises(DataError, match="cuda_graphs: expected compile False with it, got True"):
        TrainingConfig(cuda_graphs=True, compile=True)


@pytest.mark.parametrize("value", [False, True])
def test_find_unused_parameters_reaches_ddp(value, tmp_path):
    from support.accelerate_state import forget_accelerate_state

    from cdetr_fast.training.setup import make_accelerator

    config = TrainingConfig(
        train_images="a", output=str(tmp_path), device="cpu", find_unused_parameters=value
    )
    accelerator = make_accelerator(config)
    assert accelerator.ddp_handler.find_unused_parameters is value
    forget_accelerate_state()
