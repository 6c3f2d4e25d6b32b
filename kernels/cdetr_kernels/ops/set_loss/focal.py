"""The focal loss: its definition, and loss and derivative in one pass over a CPU's memory.

For a logit x that should be low, with p = sigmoid(x) and n = 1 - p,

    loss       = p^gamma softplus(x)
    derivative = p^gamma (gamma n softplus(x) + p)

and a logit that should be high is the same mirrored. Some layers at a time, so that what is in
between stays in the cache. `softplus` itself takes 25 times as long as a sigmoid there: it is made
of a logarithm, and of its series where that has lost digits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Below it the logarithm is off by 4e-6 relative at most, above it the series by 1e-6.
_SMALL = 1 / 64
# Logits at a time, but a layer at least: the workspace of six then has 12 MiB.
_CACHED = 2**19


def focal_loss(logits: Tensor, pairs: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the sum of the focal losses of each layer.

    Args:
        logits: `[L, B, Q, K]`.
        pairs: int64 `[L, P]`, places of the positive ones in a layer's logits, flattened; the
            number of logits stands for none.
        alpha: Balance.
        gamma: Exponent.

    Returns:
        `[L]`.
    """
    padded = F.pad(logits.flatten(1), (0, 1), value=float("inf"))  # of a positive one: no loss
    positives = _focal_negative(-padded.gather(1, pairs), gamma).sum(1)
    # The logit -inf takes the matched ones out of the negatives; subtracting them again would
    # leave the difference of large numbers.
    others = padded.scatter(1, pairs, float("-inf"))[:, :-1]
    return alpha * positives + (1 - alpha) * _focal_negative(others, gamma).sum(1)


def _focal_negative(logits: Tensor, gamma: float) -> Tensor:
    """Return the focal loss, without its weight, of each logit; all should be low."""
    return logits.sigmoid() ** gamma * F.softplus(logits)


def focal_in_one_pass(logits: Tensor, pairs: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the `focal_loss` of fp32, fp16 or bf16 logits on a CPU; see there for shapes."""
    with_derivative = logits.requires_grad and torch.is_grad_enabled()
    return _Focal.apply(logits, pairs, alpha, gamma, with_derivative)


class _Focal(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        pairs: Tensor,
        alpha: float,
        gamma: float,
        with_derivative: bool,
    ) -> Tensor:
        layers, count = len(logits), logits[:1].numel()
        # One more: what is written for a pair that is none goes there.
        derivative = logits.new_empty(
            layers if with_derivative else 0, count + 1, dtype=torch.float32
        )
        step = max(1, min(layers, _CACHED // (count + 1)))
        workspace = logits.new_empty(6, step, count + 1, dtype=torch.float32)
        negatives, positives = [], []
        for first in range(0, layers, step):
            rows = slice(first, min(first + step, layers))
            work = workspace[:, : rows.stop - first]
            x, index = work[0], pairs[rows]
            x[:, :count].view(-1, *logits.shape[1:]).copy_(logits[rows])
            x[:, count] = float("inf")
            positives.append(x.gather(1, index).neg_())
            x.scatter_(1, index, float("-inf"))[:, count] = float("-inf")
            out = derivative[rows] if with_derivative else None
            negatives.append(_negative(x, work[1:], gamma, 1 - alpha, out).sum(1))
        own = torch.cat(positives)
        out = torch.empty_like(own) if with_derivative else None
        loss = _negative(own, own.new_empty(5, *own.shape), gamma, alpha, out)
        if out is not None:
            derivative.scatter_(1, pairs, out.neg_())
        ctx.save_for_backward(logits, pairs, derivative)
        ctx.options = alpha, gamma
        return torch.cat(negatives) + loss.sum(1)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        logits, pairs, derivative = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of the derivative may be wanted
            loss = focal_loss(logits.float(), pairs, *ctx.options)
            (gradient,) = torch.autograd.grad(loss, logits, grad_output, create_graph=True)
            return gradient, None, None, None, None
        gradient = derivative[:, :-1] * grad_output[:, None]
        return gradient.view(logits.shape).to(logits.dtype), None, None, None, None


def _negative(
    x: Tensor, work: Tensor, gamma: float, weight: float, derivative: Tensor | None
) -> Tensor:
    """Return the weighted loss of logits that should be low; write its derivative to `derivative`.

    All is written into `work` `[5, *x.shape]`, the loss too.
    """
    p, squared, softplus, scratch, power = work
    torch.sigmoid(x, out=p)
    torch.mul(p, p, out=squared)
    # softplus(x) = max(x, 0) - log(sigmoid(|x|)), right for any x
    torch.abs(x, out=scratch).sigmoid_().log_()
    torch.clamp(x, min=0, out=softplus).sub_(scratch)
    series = torch.addcmul(p, p, p, value=0.5, out=scratch).addcmul_(squared, p, value=1 / 3)
    torch.where(p < _SMALL, series, softplus, out=softplus)
    power = squared if gamma == 2 else torch.pow(p, gamma, out=power)
    power.mul_(weight)
    if derivative is not None:
        torch.addcmul(softplus, p, softplus, value=-1, out=scratch)
        torch.add(p, scratch, alpha=gamma, out=scratch)
        torch.mul(power, scratch, out=derivative)
    return torch.mul(power, softplus, out=softplus)
