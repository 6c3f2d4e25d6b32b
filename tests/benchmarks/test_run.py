"""The registry and the command line."""

import pytest

from benchmarks import run
from benchmarks.registry import BENCHMARKS, REGISTRY, TOOLS, Entry


def test_names_are_unique_and_every_module_is_complete():
    assert len(REGISTRY) == len(BENCHMARKS) + len(TOOLS)
    for entry in REGISTRY.values():
        module = entry.load()
        assert module.__doc__
        for function in ("main",) if entry.tool else ("add_options", "cases"):
            assert callable(getattr(module, function)), (entry.name, function)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_without_a_name_all_are_listed(arguments, capsys):
    assert run.main(arguments) == 0
    shown = capsys.readouterr().out
    for entry in REGISTRY.values():
        assert f"  {entry.name} " in shown
        assert entry.summary in shown
    assert "(needs transformers, timm)" in shown


def test_a_wrong_command_is_explained(monkeypatch, capsys):
    assert run.main(["los"]) == 2
    assert capsys.readouterr().err == "los: no such benchmark; did you mean 'loss'?\n"
    monkeypatch.setitem(REGISTRY, "far", Entry("far", "", ("no_such_module",)))
    assert run.main(["far"]) == 2
    assert "far needs no_such_module" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        run.main(["loss", "--device", "tpu"])
    assert stop.value.code == 2


@pytest.mark.parametrize("name", REGISTRY)
def test_each_prints_its_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main([name, "--help"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    assert "usage:" in shown
    if not REGISTRY[name].tool:
        for option in ("--threads", "--repeats", "--device", "--output"):
            assert option in shown
    if name == "loss":
        assert "--targets" in shown  # an option of its own, and its description
        assert "ours against transformers'" in shown
