"""`patch_transformers()` refuses releases and code that it does not know."""

import sys

import pytest
from support.patching import differences, only, snapshot
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

import cdetr_fast
from cdetr_fast.integrations import versions

pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.mark.parametrize("release", ["4.57.6", "5.16.1", "5.25.0.dev0", "6.0.0", "main"])
def test_other_versions_are_refused(release, monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", release)
    before = snapshot()
    with pytest.raises(RuntimeError, match=rf"expected 5\.17 to 5\.24, got {release}"):
        cdetr_fast.patch_transformers()
    assert differences(before, snapshot()) == []


def test_other_code_is_refused(monkeypatch, tmp_path):
    """Nothing is changed, also not what an earlier call had put in place."""
    source = tmp_path / "changed.py"
    source.write_text("def forward(self, x):\n    return x + self.bias\n")
    code = {}
    exec(compile(source.read_text(), source, "exec"), code)
    cdetr_fast.patch_transformers(**only("losses", "attention"))
    before = snapshot()
    norm = modeling.ConditionalDetrFrozenBatchNorm2d
    monkeypatch.setattr(norm, "forward", code["forward"])
    with pytest.raises(RuntimeError, match=r"ConditionalDetrFrozenBatchNorm2d.*batch_norm=False"):
        cdetr_fast.patch_transformers()
    assert differences(before, snapshot()) == [(norm, "forward")]
    cdetr_fast.patch_transformers(batch_norm=False)


def test_fingerprints_tell_code_from_comments(tmp_path):
    def define(text):
        path = tmp_path / f"f{len(list(tmp_path.iterdir()))}.py"
        path.write_text(text)
        scope = {}
        exec(compile(text, path, "exec"), scope)
        return scope["f"]

    first = define("def f(x, y=1):\n    return x * y\n")
    same = define('def f(x: int, y: int = 1) -> int:\n    """Multiply."""\n    return x * y  # !\n')
    other = define("def f(x, y=2):\n    return x * y\n")
    assert versions.fingerprint(first) == versions.fingerprint(same)
    assert versions.fingerprint(first) != versions.fingerprint(other)
    versions.check_signature("f", first, same)
    with pytest.raises(RuntimeError, match=r"expected f\(x\), got f\(x, y\)"):
        versions.check_signature("f", first, lambda x: x)
