"""Dispatch and registry: which implementation runs, and that every operator is registered."""

import os
import re
import subprocess
import sys

import pytest
import torch

import cdetr_kernels
from cdetr_kernels import dispatch, registry


def test_registry_public_names_folders_and_page_agree(root):
    """An operator is a folder, a line in the registry, a public name and a part of the page."""
    folders = (root / "kernels" / "cdetr_kernels" / "ops").glob("*/__init__.py")
    assert sorted(path.parent.name for path in folders) == sorted(registry.NAMES)
    assert sorted(cdetr_kernels.__all__) == sorted([*registry.NAMES, "qualify"])
    page = (root / "docs" / "kernels.md").read_text(encoding="utf-8")
    headings = set(re.findall(r"^## (\w+)$", page, flags=re.MULTILINE))
    assert headings >= set(registry.NAMES)
    for name in registry.NAMES:
        assert registry.operator(name).name == name
        assert list(registry.operator(name).implementations)[-1] == "torch"


def test_report_on_a_cpu():
    choices = {choice.op: choice for choice in registry.report()}
    assert list(choices) == list(registry.NAMES)
    native = {  # "native" only where it is built
        "conditional_attention",
        "conditional_attention_separable",
        "detection_topk",
        "normalize_and_pad",
    }
    assert all(c.path == "torch" for c in choices.values() if c.op not in native)
    assert all(choice.reason for choice in choices.values())
    reason = choices["conditional_attention"].reason
    assert "not triton: the tensors are on cpu" in reason


def test_a_preferred_implementation_is_taken_where_it_can_run(monkeypatch):
    """`CDETR_FAST_BACKEND`, with stand-ins for the implementations."""
    operator = dispatch.Operator(
        "sum",
        {
            "triton": dispatch.Implementation(
                lambda x: "triton", lambda x: "too long" if len(x) > 2 else None, ("cpu",)
            ),
            "torch": dispatch.Implementation(lambda x: "torch"),
        },
    )
    short, long = torch.zeros(1), torch.zeros(3)
    assert operator("auto", short) == "torch"
    assert operator("triton", short) == "triton"
    with pytest.raises(RuntimeError, match="sum: backend 'triton' cannot run: too long"):
        operator("triton", long)
    monkeypatch.setattr(dispatch, "PREFERRED", "triton")
    assert operator("auto", short) == "triton"
    assert operator("auto", long) == "torch"
    assert operator.choice().reason == "CDETR_FAST_BACKEND=triton"


def test_an_unknown_preference_is_refused(root):
    code = "import cdetr_kernels.dispatch"
    environment = os.environ | {"CDETR_FAST_BACKEND": "cuda", "PYTHONPATH": "kernels"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=root
    )
    assert "CDETR_FAST_BACKEND: expected one of" in done.stderr
