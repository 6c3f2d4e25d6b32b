"""`FeatureBackbone`: what a model knows about a backbone, whichever library it comes from."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class FeatureBackbone(NamedTuple):
    """A backbone that returns feature maps, and what its module does not say itself.

    Attributes:
        module: Called with images `[B, C, H, W]`; `maps_of` reads what it returns.
        channels: Channels of each map, from fine to coarse.
        early: Names of the parameters up to the end of the last stage at stride 4 or finer.
        unread_by_last: Names of the parameters that the coarsest map does not depend on.
        unread: Names of the parameters that no map depends on.
        multiple: Images are padded to multiples of this size, since the module runs at those alone.
        image_size: The only (height, width) that the module runs at; None runs at any.
    """

    module: nn.Module
    channels: list[int]
    early: frozenset[str] = frozenset()
    unread_by_last: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    multiple: int = 1
    image_size: tuple[int, int] | None = None


def maps_of(output: Any) -> list[Tensor]:
    """Return the feature maps in the output of timm's, transformers' or our backbones."""
    return list(getattr(output, "feature_maps", output))


def dependencies(module: nn.Module, results: Iterable[Tensor]) -> frozenset[str]:
    """Return the names of the parameters that results of a module depend on.

    Args:
        module: Ran with gradients on, on any device, meta included.
        results: What it returned, or parts of that.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found, seen = set(), set()
    nodes = [result.grad_fn for result in results]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of the node at a parameter
        if variable is not None:
            found.add(names.get(id(variable), ""))
        nodes += [parent for parent, _ in node.next_functions]
    return frozenset(found - {""})


def probe(module: nn.Module, channels: int, size: tuple[int, int]) -> list[Tensor]:
    """Run a backbone on one blank image, where its parameters are, and return the maps."""
    parameter = next(module.parameters())
    image = torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)
    with torch.enable_grad():
        return maps_of(module(image))
