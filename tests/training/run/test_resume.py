"""`--resume`: what has to stay the same, what may change, and which run a restart continues."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.training_settings import short_run

from cdetr_fast.training import DataError, TrainingConfig, train
from cdetr_fast.training.run import launch
from cdetr_fast.training.run.identity import require_one_folder
from cdetr_fast.training.run.state import checkpoint_files, load_checkpoint


def last_rates(config):
    """Learning rate of the last row, and weight decay in the last checkpoint."""
    run = Path(config.output)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rate = [row["lr_rest"] for row in rows if row["kind"] == "train"][-1]
    groups = load_checkpoint(checkpoint_files(run / "checkpoints")[-1])["optimizer"]["param_groups"]
    return rate, groups[0]["weight_decay"]


@pytest.fixture(scope="module")
def first_steps(scenes, tmp_path_factory):
    """Settings of a run with two steps."""
    output = tmp_path_factory.mktemp("begun") / "run"
    config = TrainingConfig(**short_run(scenes, output) | {"max_steps": 2})
    train(config)
    return config


@pytest.fixture
def begun(first_steps, tmp_path):
    """Settings of a copy of that run, and `resume` set."""
    output = tmp_path / "run"
    shutil.copytree(first_steps.output, output)
    return dataclasses.replace(first_steps, output=str(output), resume=True, max_steps=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 2}, r"step-00000002.pt: images per step: 4 before, 2 now; keep the prod"),
        ({"seed": 1}, "seed: 0 before, 1 now; keep it"),
        ({"backbone_learning_rate": 0.0}, "frozen backbone: False before, True now; keep backbone"),
        (
            {"model_options": {"num_queries": 5}},
            r"the weights do not fit the model of the settings",
        ),
        ({"backbone": "test_resnet2"}, "model_options, backbone"),
    ],
)
def test_another_run_is_refused(begun, changes, message):
    if "model_options" in changes:
        changes = {"model_options": begun.model_options | changes["model_options"]}
    with pytest.raises(DataError, match=message):
        train(dataclasses.replace(begun, **changes))


def other_box(content):
    content["annotations"][0]["bbox"][2] += 1


def other_class(content):
    content["categories"][2]["name"] = "renamed"


def other_images(content):
    a, b = content["images"][:2]
    a["file_name"], b["file_name"] = b["file_name"], a["file_name"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_box, "digest of the training set: .* resume with the same training set"),
        (other_class, r"classes: \[.* before, .*'renamed'"),
        (other_images, "digest of the training set"),
    ],
)
def test_other_data_is_refused(begun, scenes, tmp_path, change, message):
    content = json.loads((scenes / "train" / "annotations.json").read_text())
    change(content)
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(content))
    changed = dataclasses.replace(
        begun, train_annotations=str(path), train_images=str(scenes / "train")
    )
    with pytest.raises(DataError, match=message):
        train(changed)


def test_settings_of_the_later_start_count(begun, caplog):
    caplog.set_level("INFO")
    assert last_rates(begun) == (1e-3, 1e-4)
    changed = dataclasses.replace(begun, learning_rate=5e-4, weight_decay=0.01)
    train(changed)
    assert last_rates(begun) == (5e-4, 0.01)
    stored = TrainingConfig.from_yaml(Path(begun.output) / "config.yaml")
    assert stored == dataclasses.replace(changed, resume=False)
    assert "learning_rate: 0.0005 from now on, 0.001 before" in caplog.text


def test_an_average_that_starts_later_starts_from_the_weights(begun):
    """Not from the random ones that the model was made with."""
    before = load_checkpoint(checkpoint_files(Path(begun.output) / "checkpoints")[-1])["model"]
    train(dataclasses.replace(begun, ema_decay=0.999, max_steps=3))
    state = load_checkpoint(checkpoint_files(Path(begun.output) / "checkpoints")[-1])
    trained = [n for n, v in before.items() if not torch.equal(v, state["model"][n])]
    averages = state["average"]["average"]
    for name in trained:
        old, new = before[name], state["model"][name]
        near = [a for a in averages if a.shape == old.shape]
        assert any(((a - old).abs() <= (new - old).abs() + 1e-6).all() for a in near), (
            f"{name} was averaged with something else"
        )


def test_processes_that_see_different_checkpoints():
    require_one_folder(Path("run"), [[], []])
    require_one_folder(Path("run"), [["step-00000002.pt"]] * 3)
    with pytest.raises(
        DataError,
        match=r"output: .* is step-00000002.pt for process 0 and none for process 2; output has to",
    ):
        require_one_folder(Path("run"), [["step-00000002.pt"], ["step-00000002.pt"], []])


def test_agents_of_a_launch(tmp_path):
    agent = {"host": "a", "pid": 1, "started": 1000.5}
    assert not launch.has_run(tmp_path, [agent])
    launch.remember(tmp_path, [agent, agent | {"host": "b"}])
    assert launch.has_run(tmp_path, [{"host": "b", "pid": 1, "started": 1001.0}])
    for other in ({"host": "c"}, {"pid": 2}, {"started": 2000.0}):
        assert not launch.has_run(tmp_path, [agent | other])
    assert not launch.has_run(tmp_path, [])


def program(runs, folder):
    """Trains one run after the other under torchrun, and dies once at a step if it is told to."""
    from cdetr_fast.training.step import TrainingStep

    torch.set_num_threads(1)
    original = TrainingStep.__call__
    rank = int(os.environ["RANK"])

    def call(self, step, *args):
        marker = Path(f"{output}-dies-{step}-{rank}")
        if marker.exists():
            marker.unlink()
            os.kill(os.getpid(), 9)
        original(self, step, *args)

    TrainingStep.__call__ = call
    for settings in json.loads(runs):
        output = settings["output"]
        done = Path(f"{output}-done-{rank}")
        if done.exists():  # before the restart
            continue
        try:
            train(TrainingConfig(**settings))
        except DataError as error:
            Path(folder, f"error-{os.environ['TORCHELASTIC_RESTART_COUNT']}-{rank}").write_text(
                f"{error.reported_elsewhere} {error}"
            )
            sys.exit(1)
        done.touch()
    launch.end_process_group()


def torchrun(root, folder, *runs):
    """Runs `program` with two processes and two restarts."""
    folders = [str(root / name) for name in ("", "kernels", "tests")]
    paths = [*folders, os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        # With torch 2.15 gloo's processes may else not find each other after a restart.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *("--max-restarts", "2", "--monitor-interval", "0.2"),
            *(__file__, json.dumps(runs), str(folder)),
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_restarts_resume_their_own_runs_bitwise_and_no_other(settings, tmp_path, begun, root):
    """A process is killed in the second run, which the first restart ends; then it is refused to
    begin a third in the folder of others. The second restart must not take that for its own."""
    options = {"batch_size": 2, "save_every": 1, "epochs": 1}
    whole = settings(**options, output=str(tmp_path / "whole"))
    broken = settings(**options, output=str(tmp_path / "broken"))
    dies = Path(broken["output"] + "-dies-2-1")
    dies.touch()
    others = Path(begun.output)
    before = {path.name: path.read_bytes() for path in others.iterdir() if path.is_file()}
    done = torchrun(root, tmp_path, whole, broken, settings(batch_size=2))
    assert done.returncode != 0

    assert not dies.exists(), done.stderr[-3000:]
    ours, expected = (
        load_checkpoint(checkpoint_files(Path(x["output"]) / "checkpoints")[-1])
        for x in (broken, whole)
    )
    assert ours["step"] == expected["step"] == 4
    for name, value in expected["model"].items():
        assert torch.equal(ours["model"][name], value), name

    for attempt in (1, 2):
        errors = [(tmp_path / f"error-{attempt}-{rank}").read_text() for rank in (0, 1)]
        assert errors[0].startswith("False output: ")
        assert "has a run already; pass --resume" in errors[0]
        assert errors[1].replace("True", "False", 1) == errors[0]
    assert {path.name: path.read_bytes() for path in others.iterdir() if path.is_file()} == before


if __name__ == "__main__":
    program(*sys.argv[1:])
