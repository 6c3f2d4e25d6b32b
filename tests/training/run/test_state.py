"""Checkpoints of a run: on a full disk, and broken."""

import resource
import signal

import pytest
import torch

from cdetr_fast.training import DataError
from cdetr_fast.training.run.state import load_checkpoint, save_checkpoint


def test_full_disk_loses_nothing(tmp_path, caplog):
    old = save_checkpoint(tmp_path, 1, {"x": torch.ones(10)}, keep=1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        assert save_checkpoint(tmp_path, 2, {"x": torch.ones(100_000)}, keep=1) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert "could not be written" in caplog.text
    assert list(tmp_path.iterdir()) == [old]
    assert torch.equal(load_checkpoint(old)["x"], torch.ones(10))
    new = save_checkpoint(tmp_path, 3, {"x": torch.ones(100_000)}, keep=1)
    assert list(tmp_path.iterdir()) == [new]


def test_broken_checkpoint(tmp_path):
    path = tmp_path / "step-00000001.pt"
    path.write_bytes(b"PK half of it")
    with pytest.raises(DataError, match=r"step-00000001.pt: broken .* remove it"):
        load_checkpoint(path)
