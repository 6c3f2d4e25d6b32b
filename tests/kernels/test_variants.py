"""Variants that triton compiles of a kernel: few, whatever the sizes of a batch are; edge sizes."""

import itertools

import pytest
import torch
from support.kernels import compiled_only

pytest.importorskip("triton")
from cdetr_kernels.gpu import support
from cdetr_kernels.gpu.launching import Launch
from cdetr_kernels.ops.conditional_attention_separable import triton as separable
from cdetr_kernels.ops.matching_cost.triton import cost_launch
from cdetr_kernels.ops.normalize_and_pad import cases as padding
from cdetr_kernels.ops.set_loss import triton as loss
from cdetr_kernels.testing.machine_code import compiling_for, examine, source

pytestmark = compiled_only
BATCHES = list(itertools.product((1, 2, 8), (1, 7, 20, 100), (100, 300), (3, 80, 91)))


def variants(launches: list[Launch]) -> set[str]:
    """Return what triton tells apart, but for the constants that the launcher chooses."""
    found = set()
    for launch in launches:
        chosen = {p.name for p in launch.kernel.params if p.is_constexpr}
        made = source(launch)
        kinds = {name: kind for name, kind in made.signature.items() if name not in chosen}
        found.add(f"{kinds} {sorted(made.attrs.items())}")
    return found


def predictions(batch, targets, queries, classes):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    return (
        empty(6, batch, queries, classes, dtype=torch.bfloat16),
        empty(6, batch, queries, 4),
        empty(batch, targets, dtype=torch.int64),
        empty(batch, targets, 4),
        empty(batch, dtype=torch.int64),
        empty(6, batch, targets, dtype=torch.int64),
        empty(6 * batch, targets, queries),
    )


def test_matching_cost_has_one():
    launches = []
    for sizes in BATCHES:
        *inputs, _, cost = predictions(*sizes)
        launches.append(cost_launch(*inputs, (2, 5, 2), False, 0.25, 2.0, cost))
    assert len(variants(launches)) == 1


def test_set_loss_has_one():
    launches = []
    for batch, targets, queries, classes in BATCHES:
        logits, boxes, labels, wanted, _, matched, _ = predictions(batch, targets, queries, classes)
        partial = torch.empty(6 * batch, 19, 4, device="meta")
        launches.append(
            loss.forward_launch(
                logits, boxes, labels, wanted, matched, 0.25, 2.0,
                logits.float(), torch.empty(2, *boxes.shape, device="meta"), partial,
            )
        )  # fmt: skip
    assert len(variants(launches)) == 1


def test_normalize_and_pad_has_one_for_aligned_rows_and_one_for_others():
    sizes = [(h, w) for h in (1, 427, 480, 800) for w in (427, 640, 1066, 1088, 1333)]
    padded = [(1, 1066), (800, 1088), (800, 1333), (1333, 1333)]
    launches = [
        padding.audited(size, outer)["normalize_and_pad"].launch
        for size in sizes
        for outer in padded
    ]
    assert len(variants(launches)) == 2


@pytest.mark.parametrize("masked", [True, False])
def test_separable_attention_has_one_for_all_maps(masked):
    launches = {}
    for batch, (height, width) in itertools.product(
        (2, 8), ((25, 34), (25, 42), (34, 25), (38, 50), (42, 25), (32, 32), (50, 84), (64, 48))
    ):

        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        heads, size, queries = 8, 32, 300
        tensors = (
            *(empty(batch, queries, heads, size) for _ in range(2)),
            empty(batch, height * width, heads, size),
            empty(1, height, heads, size),
            empty(1, width, heads, size),
            empty(batch, height * width, heads, size),
        )
        mask = empty(batch, height * width, dtype=torch.bool) if masked else None
        inputs = (*tensors, mask, None, 0.1, 0.0)
        logsumexp = empty(batch, heads, queries, dtype=torch.float32)
        with compiling_for("sm_90", "half"):
            forward = separable.forward_launch(*inputs, tensors[0], logsumexp)
            gradients = separable.ATTENTION.gradient_buffers(*tensors)
            backward = separable.backward_launches(
                tensors[0], *inputs, tensors[0], logsumexp, *gradients
            )
        for name, launch in zip("fqkab", (forward, *backward), strict=True):
            launches.setdefault(name, []).append(launch)
    counts = {name: len(variants(group)) for name, group in launches.items()}
    assert counts == dict.fromkeys("fqkab", 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (1, 1088)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_edge_sizes_of_images_compile(size, dtype):
    launch = padding.audited(size, size, dtype)["normalize_and_pad"].launch
    assert examine(launch, "sm_90")["spills"] == 0


class OldGpu:
    """A tensor on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)

    @staticmethod
    def get_device():
        return 0


@pytest.mark.parametrize(("capability", "refused"), [((7, 5), True), ((8, 0), False)])
def test_chips_that_are_too_old_are_refused(monkeypatch, capability, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    support.unsupported_capability.cache_clear()
    try:
        reason = support.unsupported_device(OldGpu())
    finally:
        support.unsupported_capability.cache_clear()
    expected = "the kernels need compute capability 8.0, Tesla T4 has 7.5"
    assert reason == (expected if refused else None)
