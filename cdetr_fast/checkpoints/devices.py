"""`device_map`: where the parts of a loaded model go."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.common.validation import refuse

_STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")


def place(
    model: nn.Module,
    device_map: Any,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | None = None,
    offload_buffers: bool = False,
) -> None:
    """Move a model to a device, or its parts to several.

    Args:
        model: The model; its attribute `hf_device_map` is set.
        device_map: None leaves it where it is; a device; "auto", "balanced", "balanced_low_0" or
            "sequential": CUDA where there is one, else the CPU, unless `max_memory` says what fits
            where; a dict of module names ("" is the whole model) and devices or "disk".
        max_memory: Largest size per device, as in {0: "10GB", "cpu": "30GB"}.
        offload_folder: Folder for what is on "disk".
        offload_buffers: Offload buffers with the parameters.

    Raises:
        ValueError: There is no such device or module, or a parameter is given no device.
        ImportError: Parts are on several devices, which accelerate does, and it is not installed.
    """
    if max_memory is not None and device_map not in _STRATEGIES:
        refuse("max_memory", f"None without device_map in {', '.join(_STRATEGIES)}", max_memory)
    if device_map is None:
        return
    if isinstance(device_map, str) and device_map in _STRATEGIES:
        if max_memory is None:
            device_map = "cuda" if torch.cuda.is_available() else "cpu"
        else:
            device_map = _infer(model, device_map, max_memory)
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    devices = {name: _device(name, value) for name, value in device_map.items()}
    _check_modules(model, devices)
    if len(set(devices.values())) == 1 and "disk" not in devices.values():
        model.to(next(iter(devices.values())))
    else:
        accelerate = _accelerate("a device_map with several devices")
        accelerate.dispatch_model(
            model,
            {name: str(device) for name, device in devices.items()},
            offload_dir=offload_folder,
            offload_buffers=offload_buffers,
        )
    cast("Any", model).hf_device_map = dict(device_map)


def all_weights(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the weights of a model by name, with those that are offloaded.

    Raises:
        RuntimeError: There are none on the meta device.
        ImportError: Some are offloaded, and accelerate, which did it, is not installed.
    """
    weights: dict[str, Tensor] = model.state_dict()
    empty = next((name for name, tensor in weights.items() if tensor.is_meta), None)
    if empty is None:
        return weights
    if not hasattr(model, "hf_device_map"):  # of offloaded parts, `place` and accelerate set it
        raise RuntimeError(f"{empty}: is on the meta device, which has no weights to save")
    offloading = _accelerate("reading offloaded weights").utils.modeling
    found: dict[str, Tensor] = offloading.get_state_dict_offloaded_model(model)
    return found


def _infer(model: nn.Module, strategy: str, max_memory: Mapping[int | str, int | str]) -> Any:
    accelerate = _accelerate("max_memory")
    whole = list(getattr(model, "_no_split_modules", ()))
    memory = dict(max_memory)
    if strategy != "sequential":
        memory = accelerate.utils.get_balanced_memory(
            model,
            max_memory=memory,
            no_split_module_classes=whole,
            low_zero=strategy == "balanced_low_0",
        )
    return accelerate.infer_auto_device_map(model, max_memory=memory, no_split_module_classes=whole)


def _accelerate(reason: str) -> Any:
    try:
        import accelerate
    except ImportError as error:
        raise ImportError(f"{reason} needs accelerate; pip install accelerate") from error
    return accelerate


def _device(name: str, value: Any) -> torch.device | str:
    where = f"device_map[{name!r}]" if name else "device_map"
    if value == "disk":
        return "disk"
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        expected = f'a device of this machine, "disk", or one of {", ".join(_STRATEGIES)} for all'
        refuse(where, f"{expected} ({first_line(error)})", value)
    return device


def _check_modules(model: nn.Module, devices: Mapping[str, Any]) -> None:
    modules = {name for name, _ in model.named_modules()}
    for name in devices:
        tensors = (*model.state_dict(), *modules)
        if name not in tensors:
            refuse("device_map", f"names of modules of {type(model).__name__}", name)
    for tensor in model.state_dict():
        if not any(not name or tensor == name or tensor.startswith(name + ".") for name in devices):
            refuse("device_map", f"a device for every module, also for that of {tensor}", devices)
