"""Names of attention implementations: what `attn_implementation` may be.

- "eager": matrix products and a softmax, which has second derivatives.
- "sdpa": `torch.nn.functional.scaled_dot_product_attention`; attention maps, which it does not
  give, are computed as in "eager" where they are asked for.
- "cdetr_fast", or None: the operators of `cdetr_kernels`, which choose what is fastest.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

IMPLEMENTATIONS = ("eager", "sdpa", "cdetr_fast")


def check_attn_implementation(value: Any) -> str | None:
    """Return the attention implementation of a model.

    Args:
        value: A name, None, or as in transformers a dict with the model's name at "" and that of
            its backbone, which is not the model's own, at "backbone_config".

    Raises:
        ImportError: It is FlashAttention, and that is not installed (as in transformers).
        ValueError: It is not one of `IMPLEMENTATIONS`.
    """
    if isinstance(value, Mapping):
        for key in value.keys() - {"", "backbone_config"}:
            raise ValueError(
                f"attn_implementation: expected the keys '' and 'backbone_config', got {key!r}"
            )
        value = value.get("")
    if value is None or value in IMPLEMENTATIONS:
        return value
    expected = f"expected one of {', '.join(map(repr, IMPLEMENTATIONS))} or None, got {value!r}"
    if isinstance(value, str) and value.startswith("flash_attention"):
        if importlib.util.find_spec("flash_attn") is None:
            raise ImportError(f"attn_implementation: flash_attn is not installed; {expected}")
        expected += (
            "; FlashAttention needs heads of one size, and those of conditional attention have two"
        )
    raise ValueError(f"attn_implementation: {expected}")
