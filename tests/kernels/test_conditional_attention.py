"""`conditional_attention` against the concatenated form of the paper, written out in fp64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_kernels import conditional_attention
from cdetr_kernels.ops.conditional_attention import cases, reference

NAMES = ("q_content", "q_spatial", "k_content", "k_spatial", "value")


def inputs(batch=2, queries=5, keys=7, heads=3, size=4, dtype=torch.float64, **options):
    options = {"value_size": 6} | options
    case = cases.make(dtype, "cpu", batch, queries, 1, keys, heads=heads, size=size, **options)
    return {name: case.inputs[name] for name in NAMES}


def concatenated(tensors, key_mask=None, scale=None):
    """The paper's form: concatenate content and spatial halves, then attend, one row at a time."""
    tensors = {name: x.double() for name, x in tensors.items() if x is not None}
    batch, queries, heads, size = tensors["q_content"].shape
    keys = tensors["k_content"].shape[1]
    spatial = "q_spatial" in tensors
    scale = scale or 1 / math.sqrt(size * (2 if spatial else 1))
    output = torch.zeros(batch, queries, heads, tensors["value"].shape[-1], dtype=torch.float64)
    attention = torch.zeros(batch, heads, queries, keys, dtype=torch.float64)
    for b in range(batch):
        attended = torch.arange(keys) if key_mask is None else key_mask[b].nonzero()[:, 0]
        if len(attended) == 0:
            continue
        for n in range(heads):
            query, key = tensors["q_content"][b, :, n], tensors["k_content"][b, attended, n]
            if spatial:
                shared = b if len(tensors["k_spatial"]) > 1 else 0
                query = torch.cat([query, tensors["q_spatial"][b, :, n]], -1)
                key = torch.cat([key, tensors["k_spatial"][shared, attended, n]], -1)
            weights = (query @ key.T * scale).softmax(-1)
            attention[b, n][:, attended] = weights
            output[b, :, n] = weights @ tensors["value"][b, attended, n]
    return output, attention


MASKS = {
    "no mask": None,
    "padded": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0]], dtype=torch.bool),
    "one row fully masked": torch.tensor([[0] * 7, [1, 0, 1, 0, 0, 0, 0]], dtype=torch.bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("spatial", [True, False])
@pytest.mark.parametrize("return_attention", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_equals_concatenation(monkeypatch, mask, spatial, return_attention, at_once):
    """Also some heads at a time, as large inputs are attended to without gradients."""
    monkeypatch.setattr(reference, "_PIECE", at_once * 5 * 7 * 8)
    tensors = inputs()
    if not spatial:
        tensors |= {"q_spatial": None, "k_spatial": None}
    expected, expected_map = concatenated(tensors, MASKS[mask])
    got = conditional_attention(
        *(tensors[name] for name in NAMES), MASKS[mask], return_attention=return_attention
    )
    if return_attention:
        got, attention = got
        torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-12)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients(mask):
    tensors = inputs(queries=3)
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    assert torch.autograd.gradcheck(
        lambda *x: conditional_attention(*x, MASKS[mask]), leaves, atol=1e-6
    )


def test_a_fully_masked_row_has_zero_gradient():
    tensors = inputs()
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    conditional_attention(*leaves, MASKS["one row fully masked"]).square().sum().backward()
    for leaf in leaves:
        assert leaf.grad.isfinite().all()
        assert (leaf.grad[0] == 0).all()
        assert (leaf.grad[1] != 0).any()


def test_keys_shared_by_the_batch():
    tensors = inputs()
    tensors["k_spatial"] = tensors["k_spatial"][:1]
    expected, _ = concatenated(tensors)
    got = conditional_attention(*(tensors[name] for name in NAMES))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_first_layer_identity():
    """q_c (k_c + k_s) + q_s k_s = q_c k_c + (q_c + q_s) k_s, as in the first layer."""
    t = inputs()
    added = t | {"k_content": t["k_content"] + t["k_spatial"]}
    moved = t | {"q_spatial": t["q_content"] + t["q_spatial"]}
    torch.testing.assert_close(
        conditional_attention(*added.values()), conditional_attention(*moved.values())
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_in_lower_precision(dtype):
    """At most twice the error of torch's own attention on the concatenated tensors."""
    tensors = inputs(queries=33, keys=65, size=16, value_size=16, dtype=dtype)
    expected, _ = concatenated(tensors)
    got = conditional_attention(*(tensors[name] for name in NAMES))
    assert got.dtype == dtype
    query = torch.cat([tensors["q_content"], tensors["q_spatial"]], -1).transpose(1, 2)
    key = torch.cat([tensors["k_content"], tensors["k_spatial"]], -1).transpose(1, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torchs = torch.nn.functional.scaled_dot_product_attention(
            query, key, tensors["value"].transpose(1, 2)
        ).transpose(1, 2)
    floor = torch.finfo(dtype).eps
    assert (got - expected).abs().max() <= 2 * (torchs - expected).abs().max() + floor


HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mask", ["no mask", "padded"])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_gradients_of_few_queries_are_computed_in_fp32(dtype, mask, autocast):
    """torch's own in half precision take several times as long on CPUs, and are less accurate."""
    tensors = inputs(queries=33, size=8, value_size=8, dtype=dtype, spatial=False)
    got, expected = (
        {name: x.detach().to(to).requires_grad_() for name, x in tensors.items() if x is not None}
        for to in (dtype, torch.float32)
    )
    seed = torch.randn(2, 33, 3, 8).to(dtype)
    results = []
    for leaves in (got, expected):
        arguments = [leaves.get(name) for name in NAMES]
        with torch.autocast("cpu", dtype, enabled=autocast and leaves is got):
            result = conditional_attention(*arguments, MASKS[mask], backend="torch")
        result.backward(seed.to(result.dtype))
        results.append(result)
    assert results[0].dtype == dtype
    assert torch.equal(results[0], results[1].to(dtype))
    for name, leaf in got.items():
        assert torch.equal(leaf.grad, expected[name].grad.to(dtype)), name


@pytest.mark.parametrize("dtype", HALF)
def test_half_scores_are_one_product(dtype):
    """They are rounded once, and have no copy in fp32."""
    made = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape == (2, 3, 33, 7):
                made.append((function, result.dtype))
            return result

    tensors = inputs(queries=33, size=8, value_size=8, dtype=dtype)
    leaves = [tensors[name].requires_grad_() for name in NAMES]
    with Recorder():
        got = conditional_attention(*leaves, MASKS["padded"], backend="torch")
        got.sum().backward()
    assert {dtype for _, dtype in made} == {dtype}
    assert not any(function is torch.ops.aten.add.Tensor for function, _ in made)
    q_content, q_spatial, k_content, k_spatial, value = leaves
    query, key = torch.cat((q_content, q_spatial), -1), torch.cat((k_content, k_spatial), -1)
    expected, _ = conditional_attention(
        query, None, key, None, value, MASKS["padded"], return_attention=True
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=torch.finfo(dtype).eps)


@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    keys=st.integers(1, 9),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    value_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(batch, queries, keys, heads, size, value_size, seed):
    tensors = inputs(batch, queries, keys, heads, size, value_size=value_size, seed=seed)
    key_mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(seed)) > 0.4
    expected, expected_map = concatenated(tensors, key_mask)
    got, attention = conditional_attention(
        *(tensors[name] for name in NAMES), key_mask, return_attention=True
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-12)


def test_strided_inputs_are_left_as_they_are():
    tensors = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs().items()}
    before = {name: x.clone() for name, x in tensors.items()}
    versions = {name: x._version for name, x in tensors.items()}
    expected, _ = concatenated(tensors)
    torch.testing.assert_close(conditional_attention(*tensors.values()), expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
        assert tensor._version == versions[name]


def test_dropout():
    tensors = inputs(batch=1, queries=50, keys=200, heads=1)
    tensors["value"] = torch.ones_like(tensors["value"])
    expectation = conditional_attention(*tensors.values())  # rows of ones
    got = conditional_attention(*tensors.values(), dropout_p=0.25, seed=1)
    assert (got - expectation).abs().max() > 0.05
    assert got.mean().item() == pytest.approx(1.0, abs=0.03)
    again = conditional_attention(*tensors.values(), dropout_p=0.25, seed=1)
    other = conditional_attention(*tensors.values(), dropout_p=0.25, seed=2)
    assert torch.equal(got, again)
    assert not torch.equal(got, other)


BAD = {
    "q_content: expected 4 dimensions": {"q_content": torch.zeros(2, 5, 12, dtype=torch.float64)},
    r"k_content: expected \[2, 7, 3, 4\]": {"k_content": torch.zeros(2, 7, 3, 5).double()},
    r"value: expected \[2, 9, 3, 6\].*|k_content: expected \[2, 9": {
        "value": torch.zeros(2, 9, 3, 6).double()
    },
    r"k_spatial: expected \[2, 7, 3, 4\] \(or 1": {"k_spatial": torch.zeros(3, 7, 3, 4).double()},
    "k_spatial: expected a tensor": {"k_spatial": None},
    r"key_mask: expected \[2, 7\], got \[2, 8\]": {"key_mask": torch.ones(2, 8, dtype=torch.bool)},
    "scale: expected a positive number, got -1": {"scale": -1.0},
    r"dropout_p: expected a probability in \[0, 1\), got 1.0": {"dropout_p": 1.0},
    "backend: expected one of": {"backend": "cudnn"},
}


@pytest.mark.parametrize("message", BAD)
def test_value_errors(message):
    with pytest.raises(ValueError, match=message):
        conditional_attention(**(inputs() | BAD[message]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"value": torch.zeros(2, 7, 3, 6)}, "value: expected torch.float64"),
        ({"key_mask": torch.ones(2, 7)}, r"key_mask: expected bool \[2, 7\], got float32 \[2, 7\]"),
    ],
)
def test_type_errors(argument, message):
    with pytest.raises(TypeError, match=message):
        conditional_attention(**(inputs() | argument))


@pytest.mark.parametrize("backend", ["triton", "native"])
def test_a_path_asked_for_by_name_is_not_replaced(backend):
    with pytest.raises(
        RuntimeError, match=f"conditional_attention: backend '{backend}' cannot run: "
    ):
        conditional_attention(**inputs(), backend=backend)
