"""Qualification by itself: when it runs, that one process does, and what stands against it."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from cdetr_kernels import evidence, registry
from cdetr_kernels.evidence import Evidence, Finding, Key, Record
from cdetr_kernels.qualification import automatic, ensure_qualified, run, store

GPU = torch.device("cuda", 0)
KEY = Key("A GPU", "9.0", "570", "2.15.0", "3.9.0", "0123456789abcdef")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Play a GPU without a record; return the operators of each qualification."""
    monkeypatch.delenv("CDETR_FAST_QUALIFY", raising=False)
    monkeypatch.setenv("CDETR_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(evidence, "key", lambda _: KEY)
    monkeypatch.setattr(evidence, "_FIXED", {})
    monkeypatch.setattr(evidence, "_SAID", set())
    monkeypatch.setattr(evidence, "_read", lambda _: Evidence(*evidence.find(KEY)))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device=None: empty(*sizes))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that kernels can run on what is there
    runs = []

    def qualify(device, operators):
        runs.append(list(operators))
        time.sleep(0.2)
        findings = tuple(Finding(x, "triton", "float32", (), "forward", "right") for x in operators)
        record = Record(KEY, findings)
        return run.Report(record, store.write(record))

    monkeypatch.setattr(automatic, "qualify", qualify)
    return runs


def test_a_gpu_without_a_record_is_qualified_once(gpu, caplog):
    ensure_qualified(GPU)
    ensure_qualified(GPU)
    (operators,) = gpu
    assert set(operators) >= set(registry.NAMES) - {"detection_topk"}
    assert "at most 85 seconds" in caplog.messages[0]
    assert "CDETR_FAST_QUALIFY=0" in caplog.messages[0]


def test_only_what_is_missing_is_qualified(gpu):
    store.write(Record(KEY, (Finding("sine_query", "triton", "float32", (), "forward", "wrong"),)))
    ensure_qualified(GPU)
    (operators,) = gpu
    assert "sine_query" not in operators
    assert "set_loss" in operators


def test_one_of_several_at_once_does_it_and_the_others_wait(gpu, caplog):
    threads = [threading.Thread(target=ensure_qualified, args=(GPU,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu) == 1
    assert evidence.find(KEY)[0] is not None
    assert "waiting for another process, which tries the kernels on this GPU" in caplog.messages


def test_the_wait_has_a_limit(gpu, monkeypatch, caplog):
    monkeypatch.setattr(automatic, "_LONGEST_WAIT", 0.2)
    monkeypatch.setattr(automatic.socket, "gethostname", lambda: "host")
    evidence.user_folder().mkdir(parents=True)
    with store.locked(evidence.user_folder() / "a-gpu-host.qualifying", 0.0) as held:
        assert held
        ensure_qualified(GPU)
    assert gpu == []
    assert "the other process takes too long; PyTorch's operators run" in caplog.messages


@pytest.mark.parametrize("reason", ["argument", "variable", "cpu", "fixed"])
def test_when_it_does_not_run(gpu, monkeypatch, reason):
    device = torch.device("cpu") if reason == "cpu" else GPU
    if reason == "variable":
        monkeypatch.setenv("CDETR_FAST_QUALIFY", "0")
    if reason == "fixed":
        evidence.fix(GPU, Evidence(None, ""))
    ensure_qualified(device, False if reason == "argument" else "auto")
    assert gpu == []


def test_another_mode_is_refused():
    with pytest.raises(ValueError, match='qualify: expected "auto" or False, got True'):
        ensure_qualified(GPU, True)


def test_without_a_place_for_the_record_it_is_not_tried_at_every_start(gpu, monkeypatch, caplog):
    monkeypatch.setenv("CDETR_FAST_CACHE", "/proc/nothing")
    ensure_qualified(GPU)
    assert gpu == []
    assert "set CDETR_FAST_CACHE" in caplog.text


def test_a_lock_that_cannot_be_opened_is_said_and_the_work_begins(gpu, monkeypatch, caplog):
    monkeypatch.setattr(automatic.socket, "gethostname", lambda: "host")
    (evidence.user_folder() / "a-gpu-host.qualifying").mkdir(parents=True)
    ensure_qualified(GPU)
    assert gpu == []
    assert "the kernels are not tried on this GPU: " in caplog.text


def test_an_error_is_said_and_the_work_begins(gpu, monkeypatch, caplog):
    def fails(*_):
        raise OSError("no processes left")

    monkeypatch.setattr(automatic, "qualify", fails)
    ensure_qualified(GPU)
    assert "the kernels could not be tried: no processes left" in caplog.messages


def test_importing_starts_nothing(root):
    """Neither import nor a call on a CPU reads records or starts processes."""
    code = (
        "import subprocess, torch, cdetr_kernels, cdetr_fast\n"
        "from cdetr_kernels import evidence\n"
        "subprocess.Popen = evidence.find = None\n"
        "x = torch.ones(2, 3)\n"
        "cdetr_kernels.residual_layer_norm(x, x, x[0], x[0])\n"
        "cdetr_fast.optimize\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
