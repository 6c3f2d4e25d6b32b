"""Shell completion, and the options that all commands have."""

import shutil
import subprocess

import pytest

from cdetr_fast import cli

COMMANDS = (
    "detect", "serve", "demo", "train", "evaluate", "convert", "export", "info", "qualify",
    "build-native", "benchmark",
)  # fmt: skip


@pytest.fixture
def complete(monkeypatch, capsys):
    """Returns what bash offers for the last word of a line."""

    def call(line: str) -> list[str]:
        monkeypatch.setenv("_CDETR_FAST_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        with pytest.raises(SystemExit):
            cli.main([])
        return capsys.readouterr().out.split()

    return call


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cdetr-fast e", ["evaluate", "export"]),
        ("cdetr-fast detect --thr", ["--threshold"]),
        ("cdetr-fast info --", ["--json", "--quiet", "--verbose", "--help"]),
        ("cdetr-fast export m.onnx --format ", ["torch", "aoti", "onnx"]),
        ("cdetr-fast evaluate --bad-images s", ["stop", "skip"]),
        ("cdetr-fast train --schedule c", ["cosine", "constant"]),
        ("cdetr-fast convert ", ["voc", "yolo", "coco", "shards"]),
        ("cdetr-fast detect ", []),  # bash offers files
        ("cdetr-fast train --train-annotations ", []),
    ],
)
def test_commands_flags_and_values(complete, line, offered):
    found = complete(line)
    assert set(offered) <= set(found)
    assert bool(found) == bool(offered)
    last = line.split(" ")[-1]
    assert all(word.startswith(last) for word in found)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_the_script_is_bash_and_falls_back_to_files(monkeypatch, capsys):
    monkeypatch.setenv("_CDETR_FAST_COMPLETE", "source_bash")
    with pytest.raises(SystemExit):
        cli.main([])
    script = capsys.readouterr().out
    check = f"{script}\ncomplete -p cdetr-fast"
    done = subprocess.run(["bash", "--norc", "-c", check], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "-o default" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_shared_options(command, capsys):
    required = {
        "convert": ["voc", "x", "--output", "y"],
        "detect": ["a.png"],
        "export": ["m.onnx"],
        "evaluate": ["--model", "m", "--annotations", "a"],
    }
    with pytest.raises(SystemExit, match="2"):
        cli.main([command, "--quiet", "-v", *required.get(command, [])])
    assert "--quiet and --verbose exclude each other" in capsys.readouterr().err


def test_every_command_is_tested_here(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out.partition("Commands:")[2]
    assert tuple(line.split()[0] for line in text.splitlines() if line.strip()) == COMMANDS
