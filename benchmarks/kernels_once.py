"""Every kernel once, forward and backward, at small odd sizes, for tools that watch them.

    compute-sanitizer --tool memcheck python -m benchmarks kernels_once

Exits with 1 if a result is not accurate. Under `TRITON_INTERPRET=1` it runs on a CPU.
"""

import argparse
import sys

import torch

from benchmarks import ops
from cdetr_kernels import conditional_attention, detection_topk, native
from cdetr_kernels.testing import accuracy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", default=list(ops.DTYPES), choices=ops.DTYPES)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    ran = failed = 0
    for name, sizes, dtype, _ in ops.cells(options.dtypes, modes=("forward",), tiny=True):
        case = ops.works()[name][0](ops.DTYPES[dtype], device, **sizes)
        kernel = next((x for x in ("triton", "native") if x in case.backends()), None)
        if kernel is None:
            continue
        judge = accuracy.Judge(case, bool(case.gradients))
        errors = judge.errors(judge.evaluate(case.function(kernel)))
        wrong = [x for x in errors if not x.passes(accuracy.KERNELS_FACTOR)]
        print(f"{name} {dtype}: {'; '.join(map(str, wrong)) or 'accurate'}", flush=True)
        ran, failed = ran + 1, failed + bool(wrong)
    _rarely_used(device)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print(f"{ran} calls of operators with kernels, {failed} not accurate")
    return 1 if failed or not ran else 0


def _rarely_used(device: torch.device) -> None:
    """Run dropout, the attention map, keys split into parts; detections in tiles, and many."""
    generator = torch.Generator().manual_seed(0)
    if native.UNAVAILABLE[device.type] is None:
        logits = torch.randn(2, 111, 91, generator=generator).to(device)
        boxes_cxcywh = torch.rand(2, 111, 4, generator=generator).to(device)
        for k in (100, 1100):
            got, expected = (
                detection_topk(logits, boxes_cxcywh, [(4, 5), (6, 7)], k, backend)
                for backend in ("native", "torch")
            )
            torch.testing.assert_close(got, expected)
    keys = 41 if device.type == "cpu" else 2100
    tensors = [
        torch.randn(1, rows, 2, 32, generator=generator).to(device).requires_grad_()
        for rows in (21, 21, keys, keys, keys)
    ]
    q_content, q_spatial, k_content, k_spatial, value = tensors
    output, attention = conditional_attention(
        q_content, q_spatial, k_content, k_spatial, value,
        dropout_p=0.1, seed=1, return_attention=True, backend="triton",
    )  # fmt: skip
    assert output.isfinite().all()
    assert attention.isfinite().all()
    for gradient in torch.autograd.grad(output.sum(), tensors):
        assert gradient.isfinite().all()


if __name__ == "__main__":
    sys.exit(main())
