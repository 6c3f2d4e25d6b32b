"""Scores of queries, for post-processing and the segmentation model."""

import torch
from torch import Tensor


def upcast(values: Tensor) -> Tensor:
    """Return half precision as fp32; probabilities of 16 bits tie and do not add up."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def kept_queries(logits: Tensor, threshold: float, compat: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return the score and label of each query, and which queries are above the threshold.

    Args:
        logits: fp32 `[B, Q, K]`.
        threshold: Score above which a query is kept.
        compat: "paper" or "transformers".

    Returns:
        scores `[B, Q]`, labels int64 `[B, Q]`, keep bool `[B, Q]`.
    """
    if compat == "paper":
        best_logits, labels = logits.max(dim=-1)
        scores = best_logits.sigmoid()
        return scores, labels, scores > threshold
    scores, labels = logits.softmax(dim=-1).max(dim=-1)
    return scores, labels, (scores > threshold) & (labels != logits.shape[-1] - 1)
