"""Watching of the weights that a prepared model was made from.

A model made by `optimize` shares the memory of all weights with its original, and its prepared copy
holds some of them folded and joined. A `Watch` notices writes to them; an `Original` also copies
values where no memory is shared (a result that was converted or moved, an original with other
tensors).
"""

import functools
import operator
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from cdetr_fast.inference.prepare import named_tensors

_FOLLOWS = "follows_its_original"


class Watch:
    """Remembers a module's tensors, submodules and settings, and says whether they have changed.

    Settings are public attributes, such as a stride. Of tensors, versions and addresses are
    compared, and on a CPU some values of each, as writes through `.data` or numpy count no version.
    Asking costs 0.2 ms for a ResNet-50 model, and never waits for a device.

    Args:
        module: The module.
        contents: Also notice writes to tensors, not only other tensors and modules.
        settings: Also notice other settings.
    """

    def __init__(self, module: nn.Module, contents: bool = True, settings: bool = True) -> None:
        self._owners: list[dict[str, Any]] = []  # of each member, with its name there
        self._names: list[str] = []
        self._members: list[Any] = []
        self._tensors: list[Tensor] = []
        self._growing: list[dict[str, Any]] = []
        for part in module.modules():
            for owner in (part._modules, part._parameters, part._buffers):
                self._remember(owner, list(owner))
                self._growing.append(owner)
            self._tensors += [
                x for x in (*part._parameters.values(), *part._buffers.values()) if x is not None
            ]
            if settings:
                self._remember(vars(part), [name for name in vars(part) if _is_setting(name)])
        self._counting: list[Tensor] = []
        self._samples: list[np.ndarray] = []
        if contents:
            # Tensors made in inference mode count no versions.
            self._counting = [x for x in self._tensors if not x.is_inference()]
            self._samples = [view for x in self._tensors if (view := _sample(x)) is not None]
        self._marks = self._read()

    def _remember(self, owner: dict[str, Any], names: list[str]) -> None:
        self._owners += [owner] * len(names)
        self._names += names
        self._members += map(owner.get, names)

    def _read(self) -> tuple[list[Any], ...]:
        return (
            list(map(len, self._growing)),
            [tensor._version for tensor in self._counting],
            list(map(Tensor.data_ptr, self._tensors)),
            [view.tobytes() for view in self._samples],
        )

    def has_changed(self) -> bool:
        """Return whether a tensor was written to, or one of what it remembers is another."""
        members = map(dict.get, self._owners, self._names)
        return not all(map(operator.is_, members, self._members)) or self._read() != self._marks

    def modules_have_changed(self) -> bool:
        """Return whether a module or setting is another, and not only tensors."""
        found = map(dict.get, self._owners, self._names)
        return list(map(len, self._growing)) != self._marks[0] or any(
            now is not before and not (isinstance(now, Tensor) and isinstance(before, Tensor))
            for now, before in zip(found, self._members, strict=True)
        )


def _is_setting(name: str) -> bool:
    # Whether a module is in training mode is asked in each call.
    return not name.startswith("_") and name not in ("training", _FOLLOWS)


# What writes past autograd, an optimiser or an average, writes all values of a tensor.
_SAMPLED = 4
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _sample(tensor: Tensor) -> np.ndarray | None:
    """Return a view of the bits of some values, spread over a tensor; None if not on a CPU."""
    integers = _INTEGERS.get(tensor.element_size())
    if not tensor.is_cpu or tensor.numel() == 0 or integers is None:
        return None
    strides = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in strides)
    count = min(_SAMPLED, last + 1)
    step = max(1, last // max(1, count - 1))
    return tensor.detach().as_strided((count,), (step,)).view(integers).numpy()


class Original:
    """The model that another was made from as a copy with the same names.

    Tensors that the two share need nothing; values are copied where the copy was converted or
    moved, and where the original has other tensors now. Settings of modules are not followed. A
    part into which weights were loaded (`stop_following`), or whose tensors were replaced, no
    longer follows. The original is not kept alive.

    Args:
        model: The model.
        result: Its copy.
    """

    def __init__(self, model: nn.Module, result: nn.Module) -> None:
        self._model = weakref.ref(model, self._forget)
        self._taken = dict(named_tensors(result))
        self._kinds = {name: type(part) for name, part in model.named_modules() if name}
        self._watch: Watch | None = _watch_for(model, result)
        for part in result.modules():
            setattr(part, _FOLLOWS, True)

    def _forget(self, _: Any) -> None:
        self._watch = None

    def has_changed(self) -> bool:
        """Return whether the original's tensors were changed since their values were taken."""
        watch = self._watch
        return watch is not None and watch.has_changed()

    def copy_values(self, result: nn.Module) -> None:
        """Copy the original's values to the tensors that follow it.

        Raises:
            RuntimeError: The original no longer has a tensor, or has it in another shape, or has a
                module of another class.
        """
        model = self._model()
        if model is None:
            return
        watch = _watch_for(model, result)
        self._check_kinds(model, result)
        theirs, ours = dict(named_tensors(model)), dict(named_tensors(result))
        following = self.following(result)
        for name in following:
            source, tensor = theirs.get(name), ours[name]
            if source is None or source.shape != tensor.shape:
                found = "none" if source is None else str(list(source.shape))
                raise RuntimeError(
                    f"{name}: the model that this one was made from had {list(tensor.shape)} "
                    f"here and has {found} now; call optimize() again"
                )
            _copy_value(tensor, source.detach())
        self._watch = watch if following else None

    def following(self, result: nn.Module) -> list[str]:
        """Return the names of the tensors of the copy that follow their original."""
        return [
            name
            for name, tensor in named_tensors(result)
            if self._taken.get(name) is tensor and _follows(result, name)
        ]

    def take(self, result: nn.Module, names: Sequence[str]) -> None:
        """Make the tensors of these names follow again, after a conversion has replaced them."""
        tensors = dict(named_tensors(result))
        self._taken |= {name: tensors[name] for name in names if name in tensors}

    def _check_kinds(self, model: nn.Module, result: nn.Module) -> None:
        ours = dict(result.named_modules())
        for name, part in model.named_modules():
            kind = self._kinds.get(name)
            if kind is not None and type(part) is not kind and type(ours.get(name)) is kind:
                raise RuntimeError(
                    f"{name}: the model that this one was made from had a {kind.__name__} here and "
                    f"has a {type(part).__name__} now; call optimize() again"
                )


def stop_following(part: nn.Module) -> None:
    """Stop a module from following its original."""
    setattr(part, _FOLLOWS, False)


def _follows(result: nn.Module, name: str) -> bool:
    return getattr(result.get_submodule(name.rpartition(".")[0]), _FOLLOWS, False)


def _watch_for(model: nn.Module, result: nn.Module) -> Watch:
    """Watch the original; writes to memory that the result shares are noticed there already."""
    ours = dict(named_tensors(result))
    shared = all(
        name in ours and _is_same_memory(ours[name], tensor)
        for name, tensor in named_tensors(model)
    )
    return Watch(model, contents=not shared, settings=False)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.device) == (b.data_ptr(), b.dtype, b.device)


def _copy_value(tensor: Tensor, source: Tensor) -> None:
    if source.is_meta or _is_same_memory(tensor, source):
        return
    value = source.to(tensor)
    if torch.equal(value, tensor) or torch.equal(tensor.to(source), source):
        return  # converted or moved, on this side or on that, and not changed
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.detach().copy_(value)


@functools.cache
def count_fused_steps() -> None:
    """Make fused optimisers count versions, which their steps do not do in torch 2.15."""
    register_optimizer_step_post_hook(_increment_versions)


def _increment_versions(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])
