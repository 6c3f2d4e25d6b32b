"""`conditional_attention_separable` against `conditional_attention` with its spatial keys made."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cdetr_kernels import conditional_attention, conditional_attention_separable
from cdetr_kernels.ops.conditional_attention import reference
from cdetr_kernels.ops.conditional_attention_separable import cases

NAMES = ("q_content", "q_spatial", "k_content", "k_rows", "k_columns", "value")


CODES = ("k_rows", "k_columns")


def inputs(batch=2, queries=5, height=3, width=4, heads=3, size=4, dtype=torch.float64, **options):
    """Tensors by name; the batch shares the codes unless `shared` says otherwise."""
    options = {"value_size": 6, "shared": CODES} | options
    case = cases.make(
        dtype, "cpu", batch, queries, height, width, heads=heads, size=size, **options
    )
    return {name: case.inputs[name] for name in NAMES}


def with_spatial_keys(q_content, q_spatial, k_content, k_rows, k_columns, value, **options):
    k_spatial = (k_rows[:, :, None] + k_columns[:, None]).flatten(1, 2)
    return conditional_attention(q_content, q_spatial, k_content, k_spatial, value, **options)


MASKS = {
    "no mask": None,
    "holes": torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1], [0, 0, 1, 1] * 3]).bool(),
    "one row fully masked": torch.tensor([[0] * 12, [1, 0, 1] * 4]).bool(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shared", [CODES, ()])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_equals_the_general_form(monkeypatch, mask, shared, gradients, at_once):
    monkeypatch.setattr(reference, "_PIECE", at_once * 5 * 12 * 8)
    tensors = inputs(shared=shared)
    options = {"key_mask": MASKS[mask]}
    with torch.set_grad_enabled(gradients):
        for x in tensors.values():
            x.requires_grad_(gradients)
        got = conditional_attention_separable(**tensors, **options)
    expected, expected_map = with_spatial_keys(**tensors, **options, return_attention=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    got, attention = conditional_attention_separable(**tensors, **options, return_attention=True)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-12)
    if gradients:
        grad_output = torch.randn(expected.shape, dtype=expected.dtype)
        leaves = list(tensors.values())
        torch.testing.assert_close(
            torch.autograd.grad(got, leaves, grad_output),
            torch.autograd.grad(expected, leaves, grad_output),
            rtol=0,
            atol=1e-12,
        )
    if mask == "one row fully masked":
        assert (got[0] == 0).all()


@pytest.mark.parametrize("masked", [True, False])
def test_some_images_at_a_time(monkeypatch, masked):
    """Two of three, the rest after; rows shared by the batch, columns not."""
    tensors = inputs(batch=3, shared=())
    tensors["k_rows"] = tensors["k_rows"][:1]
    key_mask = torch.arange(12) < torch.tensor([[12], [5], [0]]) if masked else None
    expected = conditional_attention_separable(**tensors, key_mask=key_mask)
    heads = tensors["value"].shape[2]
    monkeypatch.setattr(reference, "_PIECE", 2 * heads * 5 * 12 * 8)
    got = conditional_attention_separable(**tensors, key_mask=key_mask)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    general, _ = with_spatial_keys(**tensors, key_mask=key_mask, return_attention=True)
    torch.testing.assert_close(got, general, rtol=0, atol=1e-12)


def test_gradients():
    leaves = [x.requires_grad_() for x in inputs(queries=3, height=2, width=3).values()]
    mask = MASKS["holes"][:, :6]
    assert torch.autograd.gradcheck(
        lambda *x: conditional_attention_separable(*x, mask), leaves, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mask", ["no mask", "holes"])
@pytest.mark.parametrize("gradients", [True, False])
def test_error_in_lower_precision(dtype, mask, gradients):
    """At most twice the error of torch's own attention on concatenated tensors."""
    tensors = inputs(queries=33, size=16, value_size=16, dtype=dtype)
    key_mask = MASKS[mask]
    for x in tensors.values():
        x.requires_grad_(gradients)
    expected = with_spatial_keys(**{n: x.double() for n, x in tensors.items()}, key_mask=key_mask)
    got = conditional_attention_separable(**tensors, key_mask=key_mask)
    assert got.dtype == dtype
    k_spatial = (tensors["k_rows"][:, :, None] + tensors["k_columns"][:, None]).flatten(1, 2)
    query = torch.cat([tensors["q_content"], tensors["q_spatial"]], -1).transpose(1, 2)
    key = torch.cat([tensors["k_content"], k_spatial.expand(2, -1, -1, -1)], -1).transpose(1, 2)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        torchs = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            tensors["value"].transpose(1, 2),
            attn_mask=None if key_mask is None else key_mask[:, None, None],
        ).transpose(1, 2)
    floor = torch.finfo(dtype).eps
    assert (got - expected).abs().max() <= 2 * (torchs - expected).abs().max() + floor


@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 9),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    value_size=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_any_shape(batch, queries, height, width, heads, size, value_size, seed):
    options = {"value_size": value_size, "shared": (), "seed": seed}
    tensors = inputs(batch, queries, height, width, heads, size, **options)
    generator = torch.Generator().manual_seed(seed)
    options = {"key_mask": torch.rand(batch, height * width, generator=generator) > 0.4}
    expected, expected_map = with_spatial_keys(**tensors, **options, return_attention=True)
    fused = conditional_attention_separable(**tensors, **options)
    got, attention = conditional_attention_separable(**tensors, **options, return_attention=True)
    for x in (fused, got):
        torch.testing.assert_close(x, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(attention, expected_map, rtol=0, atol=1e-12)


def test_dropout_is_that_of_the_general_form():
    options = {"dropout_p": 0.3, "seed": 4, "return_attention": True}
    expected = with_spatial_keys(**inputs(), **options)
    got = conditional_attention_separable(**inputs(), **options)
    assert (got[1] == 0).any()
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_strided_inputs_are_left_as_they_are():
    tensors = {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in inputs().items()}
    before = {name: x.clone() for name, x in tensors.items()}
    versions = {name: x._version for name, x in tensors.items()}
    expected = conditional_attention_separable(**inputs())
    torch.testing.assert_close(conditional_attention_separable(**tensors), expected)
    for name, tensor in tensors.items():
        assert torch.equal(tensor, before[name])
        assert tensor._version == versions[name]


BAD = {
    "q_content: expected 4 dimensions": {"q_content": torch.zeros(2, 5, 12, dtype=torch.float64)},
    "k_rows: expected 4 dimensions": {"k_rows": torch.zeros(3, 3, 4).double()},
    r"q_spatial: expected \[2, 5, 3, 4\]": {"q_spatial": torch.zeros(2, 6, 3, 4).double()},
    r"k_content: expected \[2, 12, 3, 4\] \(or 1": {"k_content": torch.zeros(2, 13, 3, 4).double()},
    r"k_rows: expected \[2, 3, 3, 4\] \(or 1": {"k_rows": torch.zeros(3, 3, 3, 4).double()},
    r"k_columns: expected \[2, 4, 3, 4\]": {"k_columns": torch.zeros(1, 4, 3, 5).double()},
    r"value: expected \[2, 12, 3, 6\]": {"value": torch.zeros(2, 9, 3, 6).double()},
    r"key_mask: expected \[2, 12\], got \[2, 3, 4\]": {"key_mask": torch.ones(2, 3, 4).bool()},
    "scale: expected a positive number, got 0": {"scale": 0.0},
    r"dropout_p: expected a probability in \[0, 1\), got -0.1": {"dropout_p": -0.1},
    "backend: expected one of": {"backend": "fast"},
}


@pytest.mark.parametrize("message", BAD)
def test_value_errors(message):
    with pytest.raises(ValueError, match=message):
        conditional_attention_separable(**(inputs() | BAD[message]))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"k_columns": torch.zeros(1, 4, 3, 4)}, "k_columns: expected torch.float64 as q_content"),
        ({"key_mask": torch.ones(2, 12)}, r"key_mask: expected bool \[2, 12\], got float32"),
    ],
)
def test_type_errors(argument, message):
    with pytest.raises(TypeError, match=message):
        conditional_attention_separable(**(inputs() | argument))
