"""Adapters of PEFT in this package's models, by the methods that transformers' models have.

transformers' own functions do it where they need nothing of its base class.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from cdetr_fast.checkpoints.key_maps import to_v5

try:
    import peft
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.save_and_load import load_peft_weights
    from transformers.integrations.peft import PeftAdapterMixin
except ImportError as error:
    raise ImportError(
        f"adapters need peft and transformers ({error}); pip install peft "
        "'cdetr-fast[transformers]'"
    ) from error

# As PEFT's own files have it in front of every name.
_PREFIX = "base_model.model."

add_adapter = PeftAdapterMixin.add_adapter
set_adapter = PeftAdapterMixin.set_adapter
disable_adapters = PeftAdapterMixin.disable_adapters
enable_adapters = PeftAdapterMixin.enable_adapters
active_adapters = PeftAdapterMixin.active_adapters
get_adapter_state_dict = PeftAdapterMixin.get_adapter_state_dict
delete_adapter = PeftAdapterMixin.delete_adapter


def load_adapter(
    model: nn.Module,
    peft_model_id: str | None = None,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: Mapping[str, Tensor] | None = None,
    is_trainable: bool = False,
    **download: Any,
) -> None:
    """Add an adapter with the weights of a checkpoint; arguments as in the models' method."""
    loaded: Any = model
    name = adapter_name or "default"
    if loaded._hf_peft_config_loaded and name in loaded.peft_config:
        raise ValueError(
            f"adapter_name: expected a new name, got {name!r}, which is loaded already"
        )
    if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
        raise ValueError(
            "peft_model_id: expected a folder or the id of a model on the hub, or peft_config and "
            "adapter_state_dict instead, got None"
        )
    source: Any = peft_model_id
    if peft_config is None:
        peft_config = peft.PeftConfig.from_pretrained(source, **download)
    elif isinstance(peft_config, Mapping):
        peft_config = peft.PeftConfig.from_peft_type(**peft_config)
    if adapter_state_dict is None:
        adapter_state_dict = load_peft_weights(source, device="cpu", **download)
    peft_config.inference_mode = not is_trainable
    weights = to_v5({key.removeprefix(_PREFIX): x for key, x in adapter_state_dict.items()})
    trained = {n for n, parameter in model.named_parameters() if parameter.requires_grad}
    is_first = not loaded._hf_peft_config_loaded
    peft.inject_adapter_in_model(peft_config, model, name)
    loaded._hf_peft_config_loaded = True
    wanted = peft.get_peft_model_state_dict(model, adapter_name=name).keys()
    if wanted != weights.keys():
        loaded.delete_adapter(name)
        if is_first:
            _take_out_layers(model)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in trained)
        differing = sorted(wanted ^ weights.keys())
        raise ValueError(
            f"{peft_model_id or 'adapter_state_dict'}: expected the weights of an adapter for "
            f"{type(model).__name__}; {len(differing)} names are there alone or here alone, the "
            f"first is {differing[0]}"
        )
    peft.set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    loaded.set_adapter(name)
    if not is_trainable:
        model.eval()
        for part in model.modules():
            if isinstance(part, BaseTunerLayer):
                part.requires_grad_(False)


def _take_out_layers(model: nn.Module) -> None:
    """Restore the layers that adapters were wrapped around."""
    for name, part in list(model.named_modules()):
        if isinstance(part, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, part.get_base_layer())


def save_adapters(model: nn.Module, folder: Path, state_dict: Mapping[str, Tensor] | None) -> None:
    """Write the active adapter as PEFT does: adapter_model.safetensors, adapter_config.json."""
    loaded: Any = model
    active = loaded.active_adapters()
    if len(active) > 1:
        raise ValueError(
            f"save_pretrained: expected one active adapter, got {', '.join(active)}; choose one "
            "with set_adapter"
        )
    weights = loaded.get_adapter_state_dict(state_dict=state_dict)
    safetensors.torch.save_file(
        {_PREFIX + key: x.detach().cpu().contiguous() for key, x in weights.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    loaded.peft_config[active[0]].save_pretrained(folder)
