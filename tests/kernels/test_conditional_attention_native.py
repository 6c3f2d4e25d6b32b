"""The C++ path of both attention operators, against fp64 and in every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernels import assert_close, in_double, scattered

from cdetr_kernels import conditional_attention, conditional_attention_separable, registry
from cdetr_kernels.ops.conditional_attention import cases, native
from cdetr_kernels.ops.conditional_attention_separable import cases as separable_cases

REASON = (
    registry.operator("conditional_attention")
    .implementations["native"]
    .unsupported_reason(torch.empty(0))
)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def check(operator, inputs, **options):
    """By the twice-the-error rule, with the dispatcher's own choice."""
    tensors = {name: x for name, x in inputs.items() if x is not None}
    absent = {name: None for name in inputs if name not in tensors}
    copies = {name: x.clone() for name, x in tensors.items()}
    got = operator(**inputs, **options, backend="native")
    torchs = operator(**inputs, **options, backend="torch")
    exact = operator(**in_double(tensors), **absent, **options, backend="torch")
    assert_close({"output": got}, {"output": torchs}, {"output": exact})
    assert got.is_contiguous()
    assert torch.equal(operator(**inputs, **options), got)
    for name, copy in copies.items():
        assert torch.equal(tensors[name], copy), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=st.integers(1, 3),
    queries=st.integers(1, 40),
    height=st.integers(1, 6),
    width=st.integers(1, 13),
    heads=st.integers(1, 3),
    size=st.integers(1, 40),
    value_size=st.integers(1, 70),
    spatial=st.sampled_from(["none", "general", "shared", "separable"]),
    mask=st.sampled_from([None, "padded", "random", "one row fully masked"]),
    scale=st.sampled_from([None, 1.0, 0.03]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_call(
    dtype, batch, queries, height, width, heads, size, value_size, spatial, mask, scale, seed
):
    options = {"heads": heads, "size": size, "value_size": value_size, "seed": seed}
    if spatial == "separable":
        case = separable_cases.make(dtype, "cpu", batch, queries, height, width, **options)
        operator = conditional_attention_separable
    else:
        options |= {"spatial": spatial != "none"}
        options |= {"shared": ("k_content", "k_spatial")} if spatial == "shared" else {}
        case = cases.make(dtype, "cpu", batch, queries, height, width, **options)
        operator = conditional_attention
    generator = torch.Generator().manual_seed(seed)
    key_mask = None
    if mask is not None:
        key_mask = torch.rand(batch, height * width, generator=generator) > 0.4
        if mask == "padded":
            key_mask[:, height * width // 2 + 1 :] = False
        if mask == "one row fully masked":
            key_mask[-1] = False
    check(operator, case.inputs | {"key_mask": key_mask}, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [511, 512, 513, 1100])
def test_more_keys_than_a_block(dtype, keys):
    """Maxima and sums of earlier blocks are corrected, also where a whole block is masked."""
    inputs = cases.make(dtype, "cpu", 2, 30, 1, keys, heads=2).inputs
    inputs["k_content"] = inputs["k_content"] * torch.linspace(0.1, 3, keys)[:, None, None].to(
        dtype
    )
    check(conditional_attention, inputs)
    key_mask = torch.ones(2, keys, dtype=torch.bool)
    key_mask[0, :512], key_mask[1, 512:] = False, False
    check(conditional_attention, inputs | {"key_mask": key_mask})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_change_no_bit(dtype, threads):
    inputs = cases.make(dtype, "cpu", 1, 301, 12, 9, heads=2).inputs
    before = torch.get_num_threads()
    expected = conditional_attention(**inputs, backend="native")
    try:
        torch.set_num_threads(threads)
        assert torch.equal(conditional_attention(**inputs, backend="native"), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_what_belongs_to_the_tensors_is_read(dtype):
    """Inputs of any strides, between numbers that are not numbers."""
    inputs = separable_cases.make(dtype, "cpu", 2, 13, 3, 7, heads=2).inputs
    expected = conditional_attention_separable(**inputs, backend="native")
    apart = {name: x if x is None else scattered(x) for name, x in inputs.items()}
    got = conditional_attention_separable(**apart, backend="native")
    assert torch.equal(got, expected)


def test_extreme_scores():
    inputs = cases.make(torch.float32, "cpu", 1, 3, 1, 5, heads=1, spatial=False).inputs
    inputs["q_content"] *= 1e4  # the softmax is a maximum, and most weights are 0
    check(conditional_attention, inputs)
    inputs["q_content"][0, 1, 0, 2] = torch.nan
    got = conditional_attention(**inputs, backend="native")
    assert got[0, 1].isnan().all()
    assert got[0, ::2].isfinite().all()


def test_no_keys_and_no_queries():
    for queries, keys in ((3, 0), (0, 4)):
        q, k = torch.randn(2, queries, 2, 8), torch.randn(2, keys, 2, 8)
        got = conditional_attention(q, None, k, None, k, backend="native")
        assert torch.equal(got, torch.zeros(2, queries, 2, 8))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dropout_p": 0.1}, "no dropout"),
        ({"return_attention": True}, "no attention map"),
        ({"dtype": torch.float64}, "not torch.float64"),
        ({"requires_grad": True}, "no gradient"),
    ],
)
def test_what_it_does_not_do_takes_the_other_path(change, reason):
    dtype = change.pop("dtype", torch.float32)
    inputs = cases.make(dtype, "cpu", 1, 3, 1, 5, heads=1, spatial=False).inputs
    if change.pop("requires_grad", False):
        inputs["value"].requires_grad_()
    with torch.enable_grad():
        conditional_attention(**inputs, **change)
        with pytest.raises(RuntimeError, match=reason):
            conditional_attention(**inputs, **change, backend="native")


def test_an_older_build_is_named(monkeypatch):
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    assert "build-native" in native._unsupported_cpu()


def test_compiled_and_exported():
    """A compiled graph holds the kernel; an exported one consists of PyTorch's own operators."""
    case = separable_cases.make(torch.float32, "cpu", 1, 13, 3, 7, heads=2)
    tensors = [x for x in case.inputs.values() if x is not None]

    class Model(torch.nn.Module):
        def forward(self, *tensors):
            return conditional_attention_separable(*tensors)

    expected = Model()(*tensors)
    graphs = []
    compiled = torch.compile(
        Model(), fullgraph=True, backend=lambda graph, _: graphs.append(graph.code) or graph
    )
    assert torch.equal(compiled(*tensors), expected)
    assert "conditional_attention_cpu" in graphs[0]
    program = torch.export.export(Model(), tuple(tensors))
    assert "cdetr_fast" not in program.graph_module.code
    torch.testing.assert_close(program.module()(*tensors), expected)


@pytest.mark.parametrize("capability", ["avx512", "avx2", "default"])
def test_instruction_sets(capability):
    """This file again, in a process whose torch, and kernel, use no newer instructions."""
    if os.environ.get("ATEN_CPU_CAPABILITY"):
        pytest.skip("is the process that this test starts")
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "any_call or block or belongs"]
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    assert ("needs AVX2" in done.stdout) == (capability == "default"), done.stdout
