"""`patch_transformers()`: what it replaces, and back again; files, pickles, threads."""

import copy
import io
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from support.oracle import leaves, make_theirs
from support.patching import (
    SWITCHES,
    assert_same_outputs,
    differences,
    forward,
    only,
    predict,
    snapshot,
)
from transformers.models.conditional_detr import modeling_conditional_detr as modeling

import cdetr_fast
from cdetr_fast.integrations import patching

pytestmark = pytest.mark.usefixtures("unpatched")


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_technique_alone(switch):
    model = make_theirs("segmentation", "sdpa", auxiliary_loss=True)
    expected = forward(model, "segmentation")
    before = snapshot()
    with cdetr_fast.patch_transformers(**only(switch)) as patch:
        assert patch.switches == only(switch)
        assert len(differences(before, snapshot())) == len(patching._TECHNIQUES[switch].replaced)
        assert_same_outputs(forward(model, "segmentation"), expected)


def test_undone_exactly():
    model = make_theirs(implementation="sdpa")
    before, expected = snapshot(), leaves(predict(model))
    bound = model.model.encoder.forward
    cdetr_fast.patch_transformers()
    changed = differences(before, snapshot())
    assert len(changed) == sum(len(t.replaced) for t in patching._TECHNIQUES.values())
    assert model.model.encoder.forward != bound
    predict(model)
    cdetr_fast.unpatch_transformers()
    assert differences(before, snapshot()) == []
    assert model.model.encoder.forward == bound
    for name, value in leaves(predict(model)).items():
        assert torch.equal(value, expected[name]), name
    cdetr_fast.unpatch_transformers()  # does nothing
    assert differences(before, snapshot()) == []


def test_switches_are_checked():
    with pytest.raises(TypeError, match="losses: expected True or False, got 'no'"):
        cdetr_fast.patch_transformers(losses="no")


def test_twice_is_once():
    clean = snapshot()
    cdetr_fast.patch_transformers()
    once = snapshot()
    with cdetr_fast.patch_transformers():
        assert differences(once, snapshot()) == []
    assert differences(once, snapshot()) == []  # the inner call had changed nothing
    with cdetr_fast.patch_transformers(losses=False, attention=False):
        changed = set(differences(clean, snapshot()))
        assert len(set(differences(clean, once)) - changed) == 6  # four of attention, two losses
    assert set(differences(clean, snapshot())) == set(differences(clean, once))
    cdetr_fast.unpatch_transformers()
    assert differences(clean, snapshot()) == []
    with pytest.raises(ZeroDivisionError), cdetr_fast.patch_transformers():
        1 / 0  # noqa: B018
    assert differences(clean, snapshot()) == []


def test_before_transformers_is_imported():
    script = (
        "import sys, cdetr_fast\n"
        "assert 'transformers' not in sys.modules\n"
        "cdetr_fast.patch_transformers\n"
        "assert 'transformers' not in sys.modules\n"
        "cdetr_fast.patch_transformers()\n"
        "from transformers.models.conditional_detr.modeling_conditional_detr import *\n"
        "print(ConditionalDetrModel.__init__.__module__)\n"
        "from transformers.models.conditional_detr import modeling_conditional_detr as m\n"
        "print(m.ConditionalDetrEncoder.forward.__code__.co_filename)\n"
    )
    run = [sys.executable, "-c", script]
    lines = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    assert lines[-1].endswith("attention.py")


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "cdetr-fast\[transformers\]"'):
        cdetr_fast.patch_transformers()


def test_pickles_and_files_hold_nothing_of_it(tmp_path):
    plain = make_theirs(implementation="sdpa")
    expected = predict(plain)
    plain.save_pretrained(tmp_path / "plain")
    with cdetr_fast.patch_transformers():
        patched = make_theirs(implementation="sdpa").eval()
        patched.load_state_dict(plain.state_dict())
        content = pickle.dumps(patched)
        patched.save_pretrained(tmp_path / "patched")
        buffer = io.BytesIO()
        torch.save(patched, buffer)
        assert_same_outputs(predict(copy.deepcopy(patched)), expected)
        loaded = type(patched).from_pretrained(tmp_path / "plain")
        assert_same_outputs(predict(loaded), expected)
    assert b"cdetr_fast" not in content
    assert b"cdetr_fast" not in buffer.getvalue()
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "patched" / file.name).read_bytes() == file.read_bytes(), file.name
    for name, value in leaves(predict(pickle.loads(content))).items():
        assert torch.equal(value, leaves(expected)[name]), name


def test_what_others_replaced_since_is_left_alone(monkeypatch):
    cdetr_fast.patch_transformers()
    monkeypatch.setattr(modeling.ConditionalDetrConvEncoder, "forward", lambda self, *x: x)
    before = snapshot()
    with pytest.raises(RuntimeError, match=r"ConditionalDetrConvEncoder\.forward: expected what"):
        cdetr_fast.unpatch_transformers()
    assert differences(before, snapshot()) == []
    monkeypatch.undo()
    cdetr_fast.unpatch_transformers()


def test_threads():
    """A model may run while others patch: any mix of replacements gives its numbers."""
    model = make_theirs(implementation="eager")
    before, expected = snapshot(), leaves(predict(model))
    stop, errors = threading.Event(), []

    def patch_and_unpatch():
        while not stop.is_set():
            cdetr_fast.patch_transformers()
            cdetr_fast.patch_transformers(attention=False)
            cdetr_fast.unpatch_transformers()

    def run():
        try:
            for _ in range(5):
                for name, value in leaves(predict(model)).items():
                    torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-4)
        except BaseException as error:
            errors.append(error)

    patchers = [threading.Thread(target=patch_and_unpatch) for _ in range(2)]
    runners = [threading.Thread(target=run) for _ in range(2)]
    for thread in (*patchers, *runners):
        thread.start()
    for thread in runners:
        thread.join()
    stop.set()
    for thread in patchers:
        thread.join()
    assert errors == []
    cdetr_fast.unpatch_transformers()
    assert differences(before, snapshot()) == []
