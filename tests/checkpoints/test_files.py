"""Files that are not weights: an OSError names them, whatever torch makes of their bytes."""

import io
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cdetr_fast import ConditionalDetrForObjectDetection
from cdetr_fast.checkpoints.files import read_weights


def saved(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


WEIGHTS = {"model": {"a": torch.ones(3)}}
FILES = {
    "torch": saved(WEIGHTS),
    "old torch": saved(WEIGHTS, _use_new_zipfile_serialization=False),
    "pickle": pickle.dumps({"a": [1, 2, 3], "b": "text"}),
    "nothing": b"",
}


@given(data=st.data())
def test_damaged_files(data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "junk.pth"
    content = bytearray(data.draw(st.sampled_from(list(FILES.values())) | st.binary(max_size=200)))
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        weights = read_weights([path])
    except OSError as error:
        message = str(error)
    else:  # a number was changed, or nothing
        message = str(path)
        assert all(isinstance(tensor, torch.Tensor) for tensor in weights.values())
    assert message.startswith(str(path))


@pytest.mark.parametrize("name", ["junk.pth", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [b"", b"no weights", FILES["pickle"]])
def test_files_of_something_else(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(OSError, match=re.escape(f"{path}: broken")) as caught:
        read_weights([path])
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to run code from the file


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(OSError, match=r"none.pth: cannot be read \(No such file or directory\)"):
        read_weights([tmp_path / "none.pth"])


ENCODER = "transformer.encoder.layers.0."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "expected a state_dict"),
        (torch.ones(2), "expected a state_dict"),
        ({"model": [1]}, "expected a state_dict"),
        ({1: torch.ones(2)}, "expected a state_dict"),
        ({}, "expected weights, got an empty"),
        ({"model": {}}, "expected weights, got an empty"),
        ({"a.b": torch.ones(2)}, "config: expected one"),
        (
            {"transformer.x": torch.ones(2)},
            r"names of the authors, .*\(the encoder has no layer",
        ),
        ({f"{ENCODER}self_attn.in_proj_weight": torch.tensor(1.0)}, "names of the authors"),
        ({f"{ENCODER}self_attn.in_proj_weight": torch.ones(4, 4)}, "names of the authors"),
        ({f"{ENCODER}linear1.weight": torch.tensor(1.0)}, "names of the authors"),
    ],
)
def test_files_without_a_model(content, message, tmp_path):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(OSError, match=message) as caught:
        ConditionalDetrForObjectDetection.from_pretrained(path)
    assert "other.pth" in str(caught.value)
