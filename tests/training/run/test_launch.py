"""Two processes are one with the whole batch; kills at random moments change nothing.

This file is also the program that `torchrun` and the killed processes run.
"""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from cdetr_fast.training.data.loader import initialize_worker
from cdetr_fast.training.run.launch import end_process_group
from cdetr_fast.training.run.state import checkpoint_files, load_checkpoint

KILLS = int(os.environ.get("CDETR_FAST_TEST_KILLS", "2"))
CASES = {
    "split": {"batch_size": 2, "accumulate": 1},
    "accumulated": {"batch_size": 1, "accumulate": 2},
    "sharded": {"batch_size": 1, "accumulate": 2, "fsdp": True},
}


def train_quietly(settings):
    torch.set_num_threads(1)
    from cdetr_fast.training import TrainingConfig, train

    train(TrainingConfig(**settings))


def run_all(path):
    """Trains each of the settings in a file: what every process under torchrun does."""
    for settings in json.loads(Path(path).read_text()):
        train_quietly(settings)
    end_process_group()


def losses(output):
    rows = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if row["kind"] == "train"]


def evaluated(output):
    rows = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
    found = [row for row in rows if row["kind"] == "eval"][-1]
    return {name: value for name, value in found.items() if name != "seconds"}  # of the clock


def moments(output):
    state = load_checkpoint(checkpoint_files(Path(output) / "checkpoints")[0])["optimizer"]
    # sharded, parameters go by name, else by number; in the same order
    order = [p for group in state["param_groups"] for p in group["params"]]
    return [state["state"][p]["exp_avg"] for p in order if p in state["state"]]


def final_state(output):
    return load_checkpoint(checkpoint_files(Path(output) / "checkpoints")[-1])


def test_two_processes_are_one(settings, scenes, tmp_path, root):
    """Losses to 1e-5, gradients (first moments of one step) too; evaluation is the same.

    Also of a run that one process began and two continue, sharded.

    One image in four has objects: in some steps a process has none.
    """
    content = json.loads((scenes / "train" / "annotations.json").read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 4 == 0]
    path = tmp_path / "some.json"
    path.write_text(json.dumps(content))
    common = {
        "train_annotations": str(path),
        "train_images": str(scenes / "train"),
        "val_annotations": str(scenes / "val" / "annotations.json"),
        "model_options": settings()["model_options"] | {"dropout": 0.0},
        "save_every": 1,
        "keep": 100,
        "epochs": 1,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-4,
        "ema_decay": 0.5,
    }
    alone = settings(**common, output=str(tmp_path / "alone"))
    runs = [
        settings(**(common | changes), output=str(tmp_path / name))
        for name, changes in CASES.items()
    ]
    train_quietly(alone)
    continued = settings(
        **(common | CASES["sharded"]), output=str(tmp_path / "continued"), resume=True
    )
    shutil.copytree(alone["output"], continued["output"])
    for path in checkpoint_files(Path(continued["output"]) / "checkpoints")[2:]:
        path.unlink()
    runs.append(continued)
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
            *("--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *(__file__, str(tmp_path / "runs.json")),
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for run in runs:
        torch.testing.assert_close(
            torch.tensor(losses(run["output"])),
            torch.tensor(losses(alone["output"])),
            rtol=1e-5,
            atol=0,
        )
        expected = moments(alone["output"])
        error = sum(
            (a - b).square().sum() for a, b in zip(moments(run["output"]), expected, strict=True)
        )
        assert (error / sum(b.square().sum() for b in expected)).sqrt() < 1e-5
        numbered = isinstance(next(iter(final_state(run["output"])["optimizer"]["state"])), int)
        assert numbered == ("fsdp" not in run)
        result, single = evaluated(run["output"]), evaluated(alone["output"])
        assert {k: v for k, v in result.items() if v is not None} == pytest.approx(
            {k: v for k, v in single.items() if v is not None}, abs=1e-6
        )


def test_killed_at_random_moments(settings, tmp_path):
    """kill -9 whatever it is doing, then --resume, again and again: bitwise the unbroken run."""
    options = {
        "epochs": 3,
        "save_every": 1,
        "batch_size": 4,
        "num_workers": 1,
        "ema_decay": 0.9,
        "model_options": settings()["model_options"] | {"dropout": 0.1},
    }
    whole = settings(**options, output=str(tmp_path / "whole"))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["cdetr_fast.training.engine", "timm", "accelerate"])

    def run(arguments, lifetime=None):
        process = context.Process(target=train_quietly, args=(arguments,))
        process.start()
        process.join(lifetime)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        return process.exitcode

    run(whole, 60)  # the server imports at its first process
    start = time.perf_counter()
    shutil.rmtree(whole["output"])
    assert run(whole) == 0
    seconds = time.perf_counter() - start

    broken = settings(**options, output=str(tmp_path / "broken"), resume=True)
    moment = random.Random(0)
    # Early enough on a machine that became faster meanwhile.
    codes = [run(broken, moment.uniform(0.1, 0.5) * seconds) for _ in range(KILLS)]
    assert -signal.SIGKILL in codes
    assert run(broken) == 0
    assert losses(broken["output"]) == losses(whole["output"])
    ours, expected = (final_state(x["output"]) for x in (broken, whole))
    for name, value in expected["model"].items():
        assert torch.equal(ours["model"][name], value), name
    for a, b in zip(ours["average"]["average"], expected["average"]["average"], strict=True):
        assert torch.equal(a, b)


def load_forever(pipe):
    loader = torch.utils.data.DataLoader(
        range(10**9),
        num_workers=1,
        worker_init_fn=initialize_worker,
        multiprocessing_context="forkserver",
    )
    batches = iter(loader)
    next(batches)
    pipe.send(batches._workers[0].pid)
    time.sleep(600)


def test_workers_end_with_a_killed_run():
    """Also those of a fork server, whose parent process continues."""
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=load_forever, args=(theirs,))
    process.start()
    worker = ours.recv()
    assert Path(f"/proc/{worker}").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    limit = time.monotonic() + 30
    while Path(f"/proc/{worker}").exists():
        assert time.monotonic() < limit
        time.sleep(0.1)


def test_sigterm_to_the_process_group_leaves_workers_to_their_run():
    """Schedulers and `timeout` signal every process; a step may take longer than any grace."""
    loader = torch.utils.data.DataLoader(
        range(10**9), num_workers=1, worker_init_fn=initialize_worker, prefetch_factor=1
    )
    batches = iter(loader)
    next(batches)
    worker = batches._workers[0]
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    for _ in range(100):
        next(batches)
    assert worker.is_alive()
    with contextlib.suppress(RuntimeError):  # torch's, of a worker that ended
        worker.terminate()
        worker.join(30)
    assert worker.exitcode == 1


if __name__ == "__main__":
    run_all(sys.argv[1])
