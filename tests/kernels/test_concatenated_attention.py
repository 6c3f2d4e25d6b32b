"""Attention on the PyTorch path of GPUs, on CPU tensors: results, and what it allocates."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from support.kernels import differentiate
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdetr_kernels import conditional_attention, conditional_attention_separable
from cdetr_kernels.ops.conditional_attention import cases as general
from cdetr_kernels.ops.conditional_attention import concatenated, native
from cdetr_kernels.ops.conditional_attention_separable import cases as separable

SHARED = ("k_content", "k_spatial", "k_rows", "k_columns")
CASES = {
    "one of each": {"queries": 1, "height": 1, "width": 1, "heads": 1, "size": 4},
    "padded": {"batch": 2, "queries": 13, "height": 5, "width": 6, "heads": 2, "mask": "padded"},
    "a row without keys": {"batch": 2, "queries": 7, "height": 3, "width": 5, "mask": "no keys"},
    "shared keys": {"batch": 3, "queries": 5, "height": 4, "width": 3, "shared": SHARED},
    "shared codes": {"batch": 3, "queries": 5, "height": 4, "width": 3, "mask": "holes",
                     "shared": SHARED[1:]},
    "odd widths": {"batch": 2, "queries": 5, "height": 4, "width": 3, "size": 9, "value_size": 5},
}  # fmt: skip
KINDS = {"general": general, "separable": separable}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(
        concatenated, "is_taken", lambda _, seed, with_map: seed is None and not with_map
    )
    monkeypatch.setattr(native, "_UNSUPPORTED_CPU", "not on a GPU")


def evaluate(case, dtype=None):
    tensors = {name: x for name, x in case.inputs.items() if name != "key_mask"}
    grad = torch.randn(case.inputs["q_content"].shape[:3] + case.inputs["value"].shape[-1:],
                       generator=torch.Generator().manual_seed(5))  # fmt: skip
    function = case.function("torch")
    return differentiate(
        lambda **x: function(**x, key_mask=case.inputs["key_mask"]), tensors, grad, dtype
    )


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(name, kind):
    case = KINDS[kind].make(torch.float32, "cpu", **CASES[name])
    expected = evaluate(case)
    with mock.patch.object(concatenated, "is_taken", return_value=True):
        got = evaluate(case)
    for key, x in expected.items():
        scale = max(1.0, float(x.abs().max()))
        torch.testing.assert_close(got[key], x, rtol=0, atol=1e-6 * scale, msg=key)
    if CASES[name].get("mask") == "no keys":
        assert (got["output"][0] == 0).all()
        assert all((got[key][0] == 0).all() for key in ("q_content", "value"))


@pytest.mark.parametrize("mask", [None, "no keys"])
def test_plain_attention(as_on_a_gpu, mask):
    case = general.make(torch.float32, "cpu", 2, None, 3, 5, mask)
    got = case.function("torch")(**case.inputs)
    with mock.patch.object(concatenated, "is_taken", return_value=False):
        expected = case.function("torch")(**case.inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


def test_the_first_layers_keys_may_be_added_to_its_queries(as_on_a_gpu):
    """q_c (k_c + k_s) + q_s k_s = q_c k_c + (q_c + q_s) k_s."""
    case = general.make(torch.float64, "cpu", 2, 5, 3, 4, "padded")
    q_content, q_spatial, k_content, k_spatial, value, mask = case.inputs.values()
    as_written = conditional_attention(
        q_content, q_spatial, k_content + k_spatial, k_spatial, value, mask
    )
    added = conditional_attention(
        q_content, q_content + q_spatial, k_content, k_spatial, value, mask
    )
    torch.testing.assert_close(added, as_written, rtol=0, atol=1e-12)


class Allocations(TorchDispatchMode):
    """Sizes of all results, those inside of the fused attention left out."""

    def __init__(self):
        super().__init__()
        self.shapes, self.inside = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not self.inside:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves(args)
                     if isinstance(x, torch.Tensor)}  # fmt: skip
            self.shapes += [tuple(x.shape) for x in tree_leaves(result)
                            if isinstance(x, torch.Tensor)
                            and x.untyped_storage().data_ptr() not in given]  # fmt: skip
        return result


@pytest.mark.parametrize("mask", [None, "padded"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_scores_and_no_more_memory_than_transformers(as_on_a_gpu, kind, mask):
    """Theirs has queries and keys of both halves, concatenated from tensors per head."""
    batch, queries, height, width, heads, size = 2, 19, 5, 7, 2, 8
    keys = height * width
    case = KINDS[kind].make(
        torch.float32, "cpu", batch, queries, height, width, mask, heads, size,
        shared=("k_spatial", "k_rows", "k_columns"),
    )  # fmt: skip
    allocations, fused = Allocations(), F.scaled_dot_product_attention
    calls = []

    def attend(*args, **options):
        calls.append((args, options))
        allocations.inside = True
        try:
            return fused(*args, **options)
        finally:
            allocations.inside = False

    with mock.patch.object(F, "scaled_dot_product_attention", attend), allocations:
        case.function("torch")(**case.inputs)
    assert len(calls) == 1
    assert not any(shape[-2:] == (queries, keys) for shape in allocations.shapes)
    if mask is not None:  # nor a mask for each query
        assert calls[0][1]["attn_mask"].shape == (batch, 1, 1, keys)
    theirs = 2 * batch * heads * size * (queries + keys) + batch * heads * size * (queries + keys)
    ours = sum(torch.Size(shape).numel() for shape in allocations.shapes)
    assert ours <= theirs, (ours, theirs, allocations.shapes)


def test_dropout_is_that_of_the_fused_attention_unless_there_is_a_seed(as_on_a_gpu):
    case = general.make(torch.float32, "cpu", 1, 40, 5, 8)
    drawn = []
    fused = F.scaled_dot_product_attention

    def attend(*args, **options):
        drawn.append(options["dropout_p"])
        return fused(*args, **options)

    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        first, second = (conditional_attention(**case.inputs, dropout_p=0.5) for _ in range(2))
        assert not torch.equal(first, second)
        assert drawn == [0.5, 0.5]
        first, second = (
            conditional_attention(**case.inputs, dropout_p=0.5, seed=3) for _ in range(2)
        )
        assert torch.equal(first, second)
        assert len(drawn) == 2
        conditional_attention(**case.inputs, return_attention=True)
        assert len(drawn) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_one_graph_for_all_sizes(as_on_a_gpu, dtype):
    torch.compiler.reset()
    compiled = torch.compile(
        conditional_attention_separable, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for height in (3, 4, 6):
        case = separable.make(dtype, "cpu", 2, 5, height, 4, "padded", shared=SHARED[2:])
        expected = conditional_attention_separable(**case.inputs)
        assert torch.equal(compiled(**case.inputs), expected)


def test_a_cpu_keeps_its_own_path():
    assert not concatenated.is_taken(torch.zeros(1), None, False)
    gpu = mock.Mock(is_cpu=False)
    assert concatenated.is_taken(gpu, None, False)
    assert not concatenated.is_taken(gpu, 3, False)
    assert not concatenated.is_taken(gpu, None, True)
