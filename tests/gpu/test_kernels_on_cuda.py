"""Every triton kernel on a CUDA device: accuracy, capture, streams, devices, size, no waiting.

The calls are the cases of the operators: whatever is registered is tested.
"""

import contextlib
import functools

import pytest
import torch

from cdetr_kernels import conditional_attention, sine_position_2d, sine_query
from cdetr_kernels.ops.conditional_attention import cases as attention_cases
from cdetr_kernels.testing import accuracy
from cdetr_kernels.testing.case import registered

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CASES = registered()
# Those of triton's kernels; test_topk_on_cuda.py has the other one.
NAMES = [name for name, (_, sizes) in CASES.items() if torch.float16 in sizes.dtypes]


@functools.cache
def make(name: str, dtype: torch.dtype, device: str = "cuda", backward: bool = True):
    """A case, its kernels as a function, and its judge; skips where there are no kernels."""
    make, sizes = CASES[name]
    case = make(dtype, torch.device(device), **sizes.medium)
    if "triton" not in case.backends():
        pytest.skip(f"{case.op} has no triton kernels")
    return case, case.function("triton"), accuracy.Judge(case, backward and bool(case.gradients))


def results(judge, function):
    return list(judge.evaluate(function).named().values())


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_output_and_gradients(name, dtype):
    _, function, judge = make(name, dtype)
    for error in judge.errors(judge.evaluate(function)):
        assert error.passes(accuracy.KERNELS_FACTOR), error


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", attention_cases.MAPS)
@pytest.mark.parametrize("batch", [1, 8])
def test_attention_at_the_sizes_of_the_model(batch, keys, dtype):
    """With one image the keys are split into parts."""
    sizes = attention_cases.MAPS[keys]
    case = attention_cases.make(dtype, "cuda", batch=batch, mask="padded", **sizes)
    judge = accuracy.Judge(case, backward=True)
    for error in judge.errors(judge.evaluate(case.function("triton"))):
        assert error.passes(accuracy.KERNELS_FACTOR), error


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_in_every_run(name):
    _, function, judge = make(name, torch.float16)
    for got, expected in zip(results(judge, function), results(judge, function), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_waits_for_the_device(name):
    case, function, judge = make(name, torch.float16)
    results(judge, function)  # compiled, and loaded
    leaves = {
        key: x.detach().requires_grad_() if key in judge.names else x
        for key, x in case.inputs.items()
    }
    with no_waiting():
        outputs = accuracy.tensors(function(**leaves))
        if judge.names:
            torch.autograd.grad(outputs, [leaves[key] for key in judge.names], judge.grads)


def test_dropout_does_not_wait_and_draws_anew_at_each_replay():
    case, _, _ = make("conditional_attention", torch.float16)
    call = functools.partial(conditional_attention, **case.inputs, dropout_p=0.5, backend="triton")
    call()
    with no_waiting():
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()
    replayed = []
    for _ in range(2):
        graph.replay()
        replayed.append(output.clone())
    assert not torch.equal(*replayed)


@pytest.mark.parametrize("name", NAMES)
def test_captured_as_a_graph(name):
    """Forward and backward; other inputs in the same memory give other, right, results."""
    case, function, judge = make(name, torch.float16)
    static = {key: None if x is None else x.clone() for key, x in case.inputs.items()}

    def step(inputs):
        leaves = {
            key: x.detach().requires_grad_() if key in judge.names else x
            for key, x in inputs.items()
        }
        outputs = accuracy.tensors(function(**leaves))
        if not judge.names:
            return outputs
        wanted = [leaves[key] for key in judge.names]
        return (*outputs, *torch.autograd.grad(outputs, wanted, judge.grads))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for x in static.values():
        if x is not None and x.is_floating_point():
            x.copy_(x.flip(0) * 0.75)
    graph.replay()
    for got, expected in zip(captured, step(static), strict=True):
        assert torch.equal(got.detach(), expected.detach())


@pytest.mark.parametrize("name", NAMES)
def test_two_streams_at_a_time(name):
    case, function, judge = make(name, torch.float16)
    expected = results(judge, function)
    streams = [torch.cuda.Stream() for _ in range(2)]
    # The second stream starts late: on the wrong stream its kernels would read zeros.
    late = {key: None if x is None else torch.zeros_like(x) for key, x in case.inputs.items()}
    torch.cuda.synchronize()
    with torch.cuda.stream(streams[1]):
        torch.cuda._sleep(20_000_000)
        for key, x in late.items():
            if x is not None:
                x.copy_(case.inputs[key])
        with torch.set_grad_enabled(bool(judge.names)):
            second = accuracy.evaluate(function, late, judge.names, judge.grads, judge.images)
    with torch.cuda.stream(streams[0]):
        first = results(judge, function)
    torch.cuda.synchronize()
    for got in (first, second.named().values()):
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("name", NAMES)
def test_a_device_that_is_not_the_current_one(name):
    _, function, judge = make(name, torch.float16, "cuda:1")
    assert torch.cuda.current_device() == 0
    for error in judge.errors(judge.evaluate(function)):
        assert error.passes(accuracy.KERNELS_FACTOR), error


# -------------------------------------------------- offsets beyond 2^31 elements, in real memory

BEYOND = 2**31 + 2**20


def require(gigabytes: float) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes} GiB of GPU memory, {free:.0f} are free")


def normal(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to("cuda", torch.float16)


def test_more_keys_than_fit_into_32_bits():
    """Only the last 100 of 8.4 million keys are attended to."""
    require(24)
    heads, size = 8, 32
    keys = BEYOND // (heads * size)
    tail = 100
    query, tails = normal(1, 16, heads, size), (normal(1, tail, heads, size) for _ in range(2))
    key_tail, value_tail = tails
    key, value = (torch.zeros(1, keys, heads, size, dtype=torch.float16, device="cuda")
                  for _ in range(2))  # fmt: skip
    key[:, -tail:], value[:, -tail:] = key_tail, value_tail
    mask = torch.zeros(1, keys, dtype=torch.bool, device="cuda")
    mask[:, -tail:] = True
    grad_output = normal(1, 16, heads, size)

    def step(query, key, value, mask):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = conditional_attention(
            leaves[0], None, leaves[1], None, leaves[2], mask, backend="triton"
        )
        return output.detach(), torch.autograd.grad(output, leaves, grad_output)

    output, (dquery, dkey, dvalue) = step(query, key, value, mask)
    expected, (dquery_small, dkey_small, dvalue_small) = step(query, key_tail, value_tail, None)
    for got, want in ((output, expected), (dquery, dquery_small), (dkey[:, -tail:], dkey_small),
                      (dvalue[:, -tail:], dvalue_small)):  # fmt: skip
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-3)
    assert not dkey[:, : keys // 2].any()


def test_more_queries_than_fit_into_32_bits():
    require(24)
    heads, size = 8, 32
    queries = BEYOND // (heads * size)
    tail = 100
    query_tail = normal(1, tail, heads, size)
    key, value = normal(1, 48, heads, size), normal(1, 48, heads, size)
    query = torch.zeros(1, queries, heads, size, dtype=torch.float16, device="cuda")
    query[:, -tail:] = query_tail
    grad_output = torch.zeros_like(query)
    grad_output[:, -tail:] = 1.0

    def step(query, grad_output):
        leaves = [x.detach().requires_grad_() for x in (query, key, value)]
        output = conditional_attention(
            leaves[0], None, leaves[1], None, leaves[2], backend="triton"
        )
        return output.detach(), torch.autograd.grad(output, leaves, grad_output)

    output, (dquery, *others) = step(query, grad_output)
    expected, (dquery_small, *others_small) = step(query_tail, grad_output[:, -tail:])
    assert torch.equal(output[:, -tail:], expected)
    torch.testing.assert_close(dquery[:, -tail:], dquery_small, rtol=2e-3, atol=2e-3)
    for got, want in zip(others, others_small, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-2)


def test_a_map_larger_than_32_bits():
    require(8)
    heads, size, side = 8, 16, 16500  # 2.2 billion elements
    query, key, value = (normal(1, side, heads, size) for _ in range(3))
    with torch.no_grad():
        _, attention = conditional_attention(
            query, None, key, None, value, return_attention=True, backend="triton"
        )
        _, expected = conditional_attention(
            query[:, -100:], None, key, None, value, return_attention=True, backend="triton"
        )
    assert torch.equal(attention[0, -1, -100:], expected[0, -1])


def test_position_codes_larger_than_32_bits():
    require(16)
    channels, height, width = 256, 25, 42
    batch = BEYOND // (channels * height * width) + 1
    mask = torch.ones(batch, height, width, dtype=torch.bool, device="cuda")
    mask[-1, :, 30:] = False
    code = sine_position_2d(mask, channels, dtype=torch.float16, backend="triton")
    expected = sine_position_2d(mask[-1:], channels, dtype=torch.float16, backend="triton")
    assert torch.equal(code[-1:], expected)
    del code
    rows = BEYOND // channels
    points = torch.rand(1, rows, 2, device="cuda")
    query_scale = torch.ones(1, rows, channels, dtype=torch.float16, device="cuda")
    query_scale[:, -100:] = normal(1, 100, channels)
    code = sine_query(points, channels, query_scale, backend="triton")
    expected = sine_query(points[:, -100:], channels, query_scale[:, -100:], backend="triton")
    assert torch.equal(code[:, -100:], expected)
