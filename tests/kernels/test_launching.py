"""Launches that are kept: a later call of a kind launches what triton itself would launch."""

import itertools
from unittest import mock

import pytest
import torch

from cdetr_kernels import registry

pytest.importorskip("triton")
from support.kernels import compiled_only

from cdetr_kernels.gpu import launching
from cdetr_kernels.testing.stub_driver import stubbed

pytestmark = compiled_only
OPERATORS = [x for x in registry.NAMES if "triton" in registry.operator(x).implementations]


def make(name, dtype=None, **sizes):
    module = registry.cases(name)
    known = module.SIZES[name]
    return module.make(dtype or known.dtypes[0], "cpu", **{**known.small, **sizes})


def call(case):
    """Run forward and, where there are gradients, backward."""
    inputs = [case.inputs[name].requires_grad_() for name in case.gradients]
    result = case.function("triton")(**case.inputs)
    if inputs:
        result = [result] if isinstance(result, torch.Tensor) else result
        torch.autograd.grad(sum(x.float().sum() for x in result), inputs)


def launches_of(stub, case):
    stub.launches.clear()
    call(case)
    return list(stub.launches)


def addresses(case):
    values = [x if isinstance(x, list) else [x] for x in case.inputs.values()]
    return {x.data_ptr() for x in itertools.chain(*values) if isinstance(x, torch.Tensor)}


def assert_same(kept, direct, known):
    """Compare launches: all numbers, and the addresses of what the caller gave."""
    assert [x[:2] for x in kept] == [x[:2] for x in direct]
    for (name, _, ours), (_, _, theirs) in zip(kept, direct, strict=True):
        assert len(ours) == len(theirs)
        for position, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if not isinstance(other, torch.Tensor):
                assert (mine, type(mine)) == (other, type(other)), (name, position)
            elif other.numel() and other.data_ptr() in known:
                assert mine == other.data_ptr(), (name, position)
            else:
                assert type(mine) is int, (name, position)  # memory of this call


@pytest.mark.parametrize("name", OPERATORS)
def test_a_later_call_launches_what_triton_would(name):
    first, later = make(name), make(name)
    with stubbed() as stub:
        stub.keeps_launches = True
        made = launches_of(stub, first)
        compiled = len(stub.compilations)
        kept = launches_of(stub, later)
        assert len(made) == len(kept) > 0
        assert len(stub.compilations) == compiled
        assert not any(isinstance(x, torch.Tensor) for _, _, own in kept for x in own)
        launching.forget()
        direct = launches_of(stub, later)
    assert_same(kept, direct, addresses(later))


def attention(**changes):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    inputs = {
        "q_content": draw(2, 40, 2, 16),
        "q_spatial": draw(2, 40, 2, 16),
        "k_content": draw(2, 33, 2, 16),
        "k_spatial": draw(2, 33, 2, 16),
        "value": draw(2, 33, 2, 16),
    }
    return inputs | changes


def run(inputs):
    from cdetr_kernels import conditional_attention

    return conditional_attention(**inputs, backend="triton")


@torch.inference_mode()
def test_a_tensor_that_was_there_twice_may_differ_later():
    shared = attention()
    shared["value"] = shared["k_content"]
    distinct = attention()
    with stubbed() as stub:
        stub.keeps_launches = True
        run(shared)
        run(distinct)
        assert len(launching._PLANS) == 1
        arguments = stub.launches[-1][2]
    assert {x.data_ptr() for x in distinct.values()} <= set(arguments)


@torch.inference_mode()
@pytest.mark.parametrize(
    "other",
    [
        pytest.param(attention(k_content=torch.randn(1, 33, 2, 16)), id="keys of all images"),
        pytest.param(attention(value=torch.randn(2, 2, 33, 16).transpose(1, 2)), id="strides"),
        pytest.param(attention(value=torch.randn(2 * 33 * 32 + 1)[1:].view(2, 33, 2, 16)), id="at"),
        pytest.param(attention(key_mask=torch.ones(2, 33, dtype=torch.bool)), id="mask"),
        pytest.param(attention(scale=0.5), id="scale"),
        pytest.param(attention(dropout_p=0.5, seed=1), id="dropout"),
        pytest.param({k: x.bfloat16() for k, x in attention().items()}, id="dtype"),
        pytest.param({k: x[:1] for k, x in attention().items()}, id="batch"),
    ],
)
def test_calls_of_different_kinds_keep_different_launches(other):
    with stubbed() as stub:
        stub.keeps_launches = True
        run(attention())
        kept = len(launching._PLANS)
        run(other)
        assert len(launching._PLANS) == kept + 1
        stub.launches.clear()
        run(other)
        ours = list(stub.launches)
        launching.forget()
        stub.launches.clear()
        run(other)
        known = {x.data_ptr() for x in other.values() if isinstance(x, torch.Tensor)}
        assert_same(ours, stub.launches, known)


@torch.inference_mode()
def test_the_precision_of_products_is_followed():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    seen = []
    try:
        with stubbed() as stub:
            stub.keeps_launches = True
            for matmul.fp32_precision in ("ieee", "tf32", "ieee"):
                run(attention())
                seen.append("tf32" in stub.launches[-1][2])
    finally:
        matmul.fp32_precision = before
    assert seen == [False, True, False]


@torch.inference_mode()
def test_what_is_kept_has_a_limit():
    with stubbed(), mock.patch.object(launching, "_MOST_PLANS", 3):
        for batch in range(1, 9):
            run({k: x[:1].expand(batch, -1, -1, -1) for k, x in attention().items()})
            assert len(launching._PLANS) <= 3


def test_nothing_is_kept_of_a_callers_tensors():
    import gc
    import weakref

    with stubbed(), torch.inference_mode():
        inputs = attention()
        references = [weakref.ref(x) for x in inputs.values()]
        run(inputs)
        del inputs
        gc.collect()
        assert not any(x() is not None for x in references)


@torch.inference_mode()
def test_tiles_that_are_tried_are_launched():
    from cdetr_kernels.gpu.tiles import Tile
    from cdetr_kernels.qualification.tuning import with_tile

    with stubbed() as stub:
        stub.keeps_launches = True
        run(attention())
        usual = stub.launches[-1]
        with with_tile("forward", Tile(16, 16)):
            run(attention())
            tried = stub.launches[-1]
        run(attention())
        assert usual[1] == stub.launches[-1][1] != tried[1]


def test_the_emptiest_call_launches_nothing():
    with stubbed() as stub, torch.inference_mode():
        stub.keeps_launches = True
        for _ in range(2):
            output = run({k: x[:0] for k, x in attention().items()})
        assert output.shape == (0, 40, 2, 16)
        assert not stub.launches
