"""The triton kernels of `conditional_attention` against fp64, and their registration with torch.

On a machine with a GPU the tests run there. Everywhere they run in triton's interpreter, in a
process of its own: whether a kernel is interpreted is decided when triton is imported.
"""

import contextlib
import functools
import itertools
import math
from unittest import mock

import pytest
import torch
from support.kernels import (
    DEVICE,
    assert_accurate,
    assert_close,
    cases_and_dtypes,
    check_refusals,
    compiled_only,
    differentiate,
    needs_kernels,
)
from torch.nn.attention import SDPBackend

from cdetr_kernels import conditional_attention
from cdetr_kernels.ops.conditional_attention import cases
from cdetr_kernels.ops.conditional_attention.reference import conditional_attention as reference
from cdetr_kernels.testing.case import RandomTensors

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poisoned_memory")

NAMES = ("q_content", "q_spatial", "k_content", "k_spatial", "value")
CASES = {
    "one of each": {"queries": 1, "height": 1, "width": 1, "heads": 1, "size": 4},
    "padded": {"batch": 2, "queries": 9, "height": 7, "width": 10, "heads": 2, "mask": "padded"},
    "no mask": {"queries": 100, "height": 7, "width": 9, "heads": 1, "size": 16, "value_size": 32},
    "odd sizes": {"batch": 2, "queries": 5, "height": 7, "width": 10, "heads": 1, "size": 9,
                  "value_size": 20, "mask": "holes"},
    "plain": {"batch": 2, "queries": 33, "height": 8, "width": 12, "heads": 1, "size": 8,
              "value_size": 16, "mask": "no keys", "spatial": False},
    "many queries": {"queries": 140, "height": 4, "width": 10, "heads": 1, "mask": "holes"},
    "widest": {"queries": 33, "height": 5, "width": 8, "heads": 1, "size": 128,
               "value_size": 100, "mask": "holes"},
}  # fmt: skip


def draw(case, dtype=torch.float32):
    """Five inputs by name (spatial ones may be None), the key mask, and the output's gradient."""
    inputs = cases.make(dtype, DEVICE, **CASES[case]).inputs
    mask = inputs.pop("key_mask")
    shape = (*inputs["q_content"].shape[:3], inputs["value"].shape[-1])
    return inputs, mask, RandomTensors(DEVICE, dtype, seed=9).normal(*shape)


def concatenated(mask):
    """The paper's form on torch's unfused attention."""
    return functools.partial(cases.sdpa(SDPBackend.MATH)(), key_mask=mask)


def fused(mask, **options):
    return lambda **tensors: conditional_attention(
        **tensors, key_mask=mask, backend="triton", **options
    )


@needs_kernels
@pytest.mark.parametrize(
    ("case", "dtype"), cases_and_dtypes(CASES, ("padded", "odd sizes", "plain")), ids=str
)
def test_output_and_gradients(case, dtype):
    assert_accurate(cases.make(dtype, DEVICE, **CASES[case]))


@needs_kernels
def test_a_row_without_keys_is_zero_and_has_no_gradient():
    tensors, mask, grad_output = draw("plain")
    got = differentiate(fused(mask), tensors, grad_output)
    for x in got.values():
        assert (x[0] == 0).all()
        assert (x[1] != 0).any()


@needs_kernels
@pytest.mark.parametrize("names", [("k_spatial",), ("k_content", "k_spatial")], ids=str)
def test_keys_shared_by_the_batch(names):
    tensors, mask, grad_output = draw("padded")
    tensors |= {name: tensors[name][:1] for name in names}
    got = differentiate(fused(mask), tensors, grad_output)
    torchs = differentiate(concatenated(mask), tensors, grad_output)
    exact = differentiate(concatenated(mask), tensors, grad_output, torch.float64)
    assert_close(got, torchs, exact)
    repeated = {
        name: x.expand(2, -1, -1, -1) if name in names else x for name, x in tensors.items()
    }
    assert torch.equal(got["output"], fused(mask)(**repeated))


@needs_kernels
def test_offsets_beyond_32_bits():
    tensors, _, _ = draw("odd sizes", torch.float16)
    expected = fused(None)(**tensors)
    rows = 2**31 // (tensors["value"].shape[1] - 1) + 1
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:  # virtual memory: only the pages with rows in them are ever touched
        buffer = torch.empty(tensors["value"].shape[1], rows, dtype=torch.float16, device=DEVICE)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    for name in ("k_content", "value"):
        x = tensors[name]
        view = buffer[:, : x[:, 0].numel()].view(x.shape[1], x.shape[0], *x.shape[2:])
        tensors[name] = view.transpose(0, 1).copy_(x) if name == "value" else x
    assert torch.equal(fused(None)(**tensors), expected)


@contextlib.contextmanager
def tiles_of(queries: int, keys: int):
    from cdetr_kernels.gpu import configurations
    from cdetr_kernels.gpu.tiles import Tile

    tile = Tile(queries, keys)
    with mock.patch.object(configurations, "tile", return_value=tile):
        yield


def kept(case, dropout_p, seed):
    """Which weights dropout keeps, read from the map."""
    tensors, _, _ = draw(case)
    _, attention = fused(None, dropout_p=dropout_p, seed=seed, return_attention=True)(**tensors)
    return attention != 0


@needs_kernels
def test_dropout_keeps_what_it_should():
    mask = kept("plain", 0.25, seed=7).double()  # [2, 1, 33, 96]
    count = mask.numel()
    assert abs(mask.mean() - 0.75) < 4 * math.sqrt(0.1875 / count)
    # Rows, columns and neighbours are as independent as coin tosses are.
    centred = mask - 0.75
    for axis in (2, 3):
        sums = centred.sum(axis)
        variance = (sums**2).mean() / mask.shape[axis]
        assert abs(variance / 0.1875 - 1) < 5 * math.sqrt(2 / sums.numel())
        neighbours = centred.narrow(axis, 1, mask.shape[axis] - 1) * centred.narrow(
            axis, 0, mask.shape[axis] - 1
        )
        assert abs(neighbours.mean()) < 4 * 0.1875 / math.sqrt(neighbours.numel())
    assert abs((centred[0] * centred[1]).mean()) < 4 * 0.1875 / math.sqrt(count / 2)
    for seed in (8, 7 + 2**32, -1):
        other = kept("plain", 0.25, seed).double() - 0.75
        assert abs((centred * other).mean()) < 4 * 0.1875 / math.sqrt(count)


@needs_kernels
def test_dropout_is_the_same_in_tiles_of_any_size():
    expected = kept("padded", 0.5, seed=1)
    with tiles_of(16, 64):
        assert torch.equal(kept("padded", 0.5, seed=1), expected)


@needs_kernels
def test_dropout_draws_from_the_generator_of_torch_without_a_seed():
    tensors, mask, _ = draw("odd sizes")
    outputs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        outputs.append(fused(mask, dropout_p=0.5)(**tensors))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@needs_kernels
@pytest.mark.parametrize("case", ["padded", "plain"])
def test_dropout_output_and_gradients(case):
    """The mask of the map is that of the output, and of both backward kernels."""
    tensors, mask, grad_output = draw(case)
    multiplier = kept(case, 0.25, seed=11).double() / 0.75

    def expected(**tensors):
        _, attention = reference(
            *(tensors[name] for name in NAMES), mask, _scale(tensors), 0.0, None, True
        )
        return ((attention * multiplier) @ tensors["value"].transpose(1, 2)).transpose(1, 2)

    got = differentiate(fused(mask, dropout_p=0.25, seed=11), tensors, grad_output)
    exact = differentiate(expected, tensors, grad_output, torch.float64)
    for name, x in exact.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-5, atol=1e-5)


def _scale(tensors):
    halves = 1 if tensors["q_spatial"] is None else 2
    return 1 / math.sqrt(halves * tensors["q_content"].shape[-1])


@needs_kernels
@pytest.mark.parametrize("case", ["one of each", "padded", "plain"])
def test_attention_map_and_its_gradients(case):
    tensors, mask, _ = draw(case)

    def maps(backend):
        def attend(**tensors):
            _, attention = conditional_attention(
                **tensors, key_mask=mask, return_attention=True, backend=backend
            )
            return attention

        return attend

    batch, queries, heads, _ = tensors["q_content"].shape
    keys = tensors["k_content"].shape[1]
    grad_map = RandomTensors(DEVICE, torch.float32, seed=1).normal(batch, heads, queries, keys)
    del tensors["value"]
    value = torch.zeros(batch, keys, heads, 4, device=DEVICE)
    got = differentiate(lambda **x: maps("triton")(**x, value=value), tensors, grad_map)
    exact = differentiate(
        lambda **x: maps("torch")(**x, value=value.double()), tensors, grad_map, torch.float64
    )
    for name, x in exact.items():
        torch.testing.assert_close(got[name].double(), x, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_map_and_output_agree_under_dropout():
    tensors, mask, _ = draw("padded")
    options = {"dropout_p": 0.3, "seed": 2, "return_attention": True}
    output, attention = fused(mask, **options)(**tensors)
    expected = (attention @ tensors["value"].transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("case", ["padded", "plain", "widest"])
def test_split_over_keys(case):
    """The parts put together are the whole, rows without keys and parts without keys included."""
    from cdetr_kernels.gpu import configurations

    tensors, mask, grad_output = draw(case)
    whole = differentiate(fused(mask), tensors, grad_output)
    with mock.patch.object(configurations, "parts", return_value=3):
        split = differentiate(fused(mask), tensors, grad_output)
    for name, x in whole.items():
        torch.testing.assert_close(split[name], x, rtol=1e-6, atol=1e-6)


def test_number_of_parts():
    from cdetr_kernels.gpu.configurations import parts

    assert parts(programs=40, tiles_of_keys=66, multiprocessors=132) == 3
    assert parts(programs=40, tiles_of_keys=17, multiprocessors=132) == 2
    assert parts(programs=40, tiles_of_keys=5, multiprocessors=132) == 1
    assert parts(programs=320, tiles_of_keys=66, multiprocessors=132) == 1
    # One image of 25x42 with 64x64 tiles on an H100: 40 programs.
    assert parts(40, 17, 132, fill=2, depth=4) == 4
    assert parts(40, 17, 132, fill=2, depth=2) == 6
    assert parts(40, 17, 132, fill=4, depth=2) == 6  # not 8: parts of 3 tiles, all with keys
    assert parts(40, 66, 132, fill=0) == 1
    assert parts(40, 0, 132) == 1


@needs_kernels
def test_what_the_kernels_cannot_do_is_said():
    check_refusals(fused(None), draw)


@compiled_only
def test_precision_of_dots_follows_torch():
    from cdetr_kernels.gpu.launching import dot_precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert dot_precision(torch.float32) == "ieee"
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert dot_precision(torch.float32) == "tf32"
        assert dot_precision(torch.float16) == "ieee"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_every_kernel_has_a_tile_on_every_architecture():
    from cdetr_kernels.gpu import configurations as c
    from cdetr_kernels.testing.machine_code import TARGETS

    for architecture in (*TARGETS, "interpreter", "sm_86", "sm_120", "gfx950", "a new one"):
        precisions = ("half", "ieee") + (() if architecture.startswith("gfx") else ("tf32",))
        for options in itertools.product(precisions, (1, 32, 33, 128)):
            for kernel in c.KERNELS:
                tile = c.tile(kernel, architecture, *options)
                assert min(tile.queries, tile.keys) >= 16
    assert [c.padded(size) for size in (1, 16, 17, 64, 65, 128)] == [16, 16, 32, 64, 128, 128]
