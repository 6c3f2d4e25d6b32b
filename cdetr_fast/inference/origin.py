"""Follows the weights of the model that an optimised one was made from."""

import functools
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from cdetr_fast.inference.watch import Watch

_FOLLOWS = "follows_its_original"


class Origin:
    """The model that another was made from as a copy with the same names.

    What the two share needs nothing; values are copied where the copy was converted or moved, and
    where the original has got other tensors. A part into which weights were loaded (`set_apart`),
    or whose tensors were replaced, does not follow any more. The original is not kept alive.

    Args:
        original: The model.
        result: Its copy.
    """

    def __init__(self, original: nn.Module, result: nn.Module) -> None:
        self._original = weakref.ref(original, self._forget)
        self._taken = dict(_named_tensors(result))
        self._watch = self._watch_for(original, result)
        for part in result.modules():
            setattr(part, _FOLLOWS, True)

    def _watch_for(self, original: nn.Module, result: nn.Module) -> Watch | None:
        """What is shared needs no watch but its own, as long as it is shared."""
        ours = dict(_named_tensors(result))
        shared = all(
            name in ours and _is_same_memory(ours[name], tensor)
            for name, tensor in _named_tensors(original)
        )
        return Watch(original, contents=not shared)

    def _forget(self, _: Any) -> None:
        self._watch = None

    def has_changed(self) -> bool:
        """Whether anything has been done to the original's tensors since they were taken."""
        watch = self._watch
        return watch is not None and watch.change() is not None

    def follow(self, result: nn.Module) -> None:
        """Takes over the original's values.

        Raises:
            RuntimeError: A tensor of the original is gone, or has another shape.
        """
        original = self._original()
        if original is None:
            return
        watch = self._watch_for(original, result)
        theirs = dict(_named_tensors(original))
        following = {
            name: tensor
            for name, tensor in _named_tensors(result)
            if self._taken.get(name) is tensor and _follows(result, name)
        }
        for name, tensor in following.items():
            source = theirs.get(name)
            if source is None or source.shape != tensor.shape:
                found = "none" if source is None else str(list(source.shape))
                raise RuntimeError(
                    f"{name}: the model that this one was made from had {list(tensor.shape)} "
                    f"here and has {found} now; call optimize() again"
                )
            _take(tensor, source.detach())
        self._watch = watch if following else None


def set_apart(part: nn.Module) -> None:
    """Stops a module from following its original."""
    setattr(part, _FOLLOWS, False)


def _follows(result: nn.Module, name: str) -> bool:
    return getattr(result.get_submodule(name.rpartition(".")[0]), _FOLLOWS, False)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.device) == (b.data_ptr(), b.dtype, b.device)


def _take(tensor: Tensor, source: Tensor) -> None:
    if source.is_meta or _is_same_memory(tensor, source):
        return
    value = source.to(tensor)
    if torch.equal(value, tensor) or torch.equal(tensor.to(source), source):
        return  # converted or moved, on this side or on that, and not changed
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.detach().copy_(value)


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@functools.cache
def count_fused_steps() -> None:
    """Lets fused optimisers count as what they are: in torch 2.15 their steps change no version."""
    register_optimizer_step_post_hook(_increment_versions)


def _increment_versions(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])
