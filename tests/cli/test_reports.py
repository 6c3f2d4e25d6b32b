"""Reports of the commands, run as users run them."""

import errno

import pytest
from PIL import Image
from support.html import read_page
from support.tiny import tiny_config

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor, cli
from cdetr_fast.common import files


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny model with random weights, saved with its image processor."""
    folder = tmp_path_factory.mktemp("checkpoint")
    ConditionalDetrForObjectDetection(tiny_config()).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 96}
    ConditionalDetrImageProcessor(size=size).save_pretrained(folder)
    return folder


def exit_code(*arguments):
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return stop.code or 0
    return 0


@pytest.fixture
def detect(checkpoint, tmp_path):
    """Runs `cdetr-fast detect` on two images; returns the exit code."""
    (tmp_path / "images").mkdir()
    for name in ("a & b.png", "<i>ü.png"):
        Image.new("RGB", (64, 48), "gray").save(tmp_path / "images" / name)

    def run(*arguments):
        options = ("--model", checkpoint, "--device", "cpu", "--threshold", 0.0, "--top-k", 7)
        images, output = tmp_path / "images", tmp_path / "found"
        return exit_code("detect", images, *options, "--output", output, *arguments)

    return run


def test_detect(detect, tmp_path):
    assert detect() == 0
    assert not (tmp_path / "found" / "report.html").exists()
    assert detect("--report") == 0
    page = read_page(tmp_path / "found" / "report.html")
    assert len(page.of("image")) == 2
    assert len([g for g in page.of("g") if "data-score" in g]) == 14
    shown = [text for text in page.texts["div"] if text.count("7 objects") == 1]
    assert [text.split("/")[-1] for text in shown] == ["<i>ü.png 7 objects", "a & b.png 7 objects"]
    assert [a["href"] for a in page.of("a")] == ["%3Ci%3E%C3%BC.jpg", "a%20%26%20b.jpg"]


def test_a_report_that_cannot_be_written_loses_nothing(detect, tmp_path, monkeypatch, capsys):
    write = files.write_atomically

    def full(path, *arguments):
        if path.suffix == ".html":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(files, "write_atomically", full)
    assert detect("--report") == 1
    out, err = capsys.readouterr()
    assert "2 images, 14 detections" in out
    assert "--report: " in err
    assert "No space left on device" in err
    assert (tmp_path / "found" / "detections.json").exists()
    assert len(list((tmp_path / "found").glob("*.jpg"))) == 2
