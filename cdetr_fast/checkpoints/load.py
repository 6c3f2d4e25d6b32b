"""`load_pretrained`: models from checkpoints.

These are folders and hub repositories of transformers 4 and 5 and of this package, safetensors or
.bin, whole or sharded, and the authors' .pth files.
"""

import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from cdetr_fast.checkpoints.authors import config_of_authors
from cdetr_fast.checkpoints.devices import place
from cdetr_fast.checkpoints.files import find_weights, read_weights
from cdetr_fast.checkpoints.key_maps import (
    StateDict,
    class_of_level,
    fields_of,
    from_authors,
    is_authors,
    level_of,
    match_resnet,
    to_level,
    to_v5,
)
from cdetr_fast.common.files import ADDED_BY_CALLERS, read_json
from cdetr_fast.common.model_families import service
from cdetr_fast.common.validation import checked, refuse
from cdetr_fast.config.attention import check_attn_implementation
from cdetr_fast.config.field_types import Dtype
from cdetr_fast.config.model import CONFIG_NAME, ConditionalDetrConfig
from cdetr_fast.images.settings import has_settings

Model = TypeVar("Model", bound=nn.Module)

ADAPTER_CONFIG_NAME = "adapter_config.json"

# Options of transformers' from_pretrained, and their values that have no effect here.
_TRANSFORMERS_OPTIONS: dict[str, tuple[Any, ...]] = {
    "device_mesh": (None,),
    "disable_mmap": (None, False, True),
    "distributed_config": (None,),
    "experts_implementation": (None,),
    "from_flax": (None, False),
    "from_tf": (None, False),
    "generation_config": (None,),
    "gguf_file": (None,),
    "kernel_config": (None,),
    "mirror": (None,),
    "offload_state_dict": (None, False),
    "proxies": (None,),
    "quantization_config": (None,),
    "tp_plan": (None,),
    "tp_size": (None,),
    "use_kernels": (None, False),
    "weights_only": (None, True),
}


def load_pretrained(
    model_class: Callable[[ConditionalDetrConfig], Model],
    name_or_path: str | os.PathLike[str] | None,
    *,
    config: ConditionalDetrConfig | str | os.PathLike[str] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    key_mapping: Mapping[str, str] | None = None,
    revision: str | None = None,
    subfolder: str = "",
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    use_safetensors: bool | None = None,
    variant: str | None = None,
    ignore_mismatched_sizes: bool = False,
    strict: bool = False,
    dtype: torch.dtype | str | None = None,
    torch_dtype: torch.dtype | str | None = None,
    device_map: torch.device | str | int | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    offload_buffers: bool = False,
    output_loading_info: bool = False,
    attn_implementation: str | dict[str, str] | None = None,
    low_cpu_mem_usage: bool | None = None,
    **config_overrides: Any,
) -> Model | tuple[Model, dict[str, Any]]:
    """Load a model in eval mode.

    Args:
        model_class: Class to build, whose `config_class` the configuration is.
        name_or_path: A folder, the id of a model on the hub, or one file of weights. The authors'
            .pth files need no configuration, but as keyword arguments what neither weights nor
            the command line inside them determine (the number of heads, `dilation`, ...). A folder
            of an adapter that PEFT has saved loads the model it was trained on, and the adapter;
            an image processor beside the adapter takes precedence over the model's.
            None with `config` and `state_dict`.
        config: Configuration, whose class stays as it is, or where to read it, with the same
            `revision`, `subfolder`, `token` and so on; default the config.json beside the weights.
        state_dict: Weights instead of those in files, by any of the names that files have.
        key_mapping: Regular expressions for names of weights and their replacements, applied before
            anything else.
        revision: Branch, tag or commit on the hub.
        subfolder: Folder inside the folder or repository.
        cache_dir: Folder for downloads; default the cache of `huggingface_hub`.
        token: Access token for the hub.
        local_files_only: Use the cache alone, without downloading.
        force_download: Download files that are in the cache too.
        use_safetensors: True or False restricts the search to safetensors or to .bin files.
        variant: Part of the file name, as in `model.fp16.safetensors`.
        ignore_mismatched_sizes: Leave weights of other shapes at their initial values, with a
            warning that lists them, as for a new number of classes.
        strict: Refuse missing and unexpected weights instead of listing them in a warning.
        dtype: dtype of the weights; "auto" or None, as in transformers 5: the one in config.json,
            else that of the first floating-point weight.
        torch_dtype: Old name of dtype.
        device_map: As in `cdetr_fast.checkpoints.devices.place`; so are the three that follow.
        max_memory: Largest size per device.
        offload_folder: Folder for what is on "disk".
        offload_buffers: Offload buffers with the parameters.
        output_loading_info: Return (model, dict of the sets missing_keys, unexpected_keys and
            mismatched_keys).
        attn_implementation: As in `cdetr_fast.config.attention`; by default the operators choose.
        low_cpu_mem_usage: Accepted for callers of transformers, where it has no effect either.
        **config_overrides: Configuration fields that replace those in config.json. Options of
            transformers that this package does not support (`quantization_config`, `tp_plan`,
            `trust_remote_code`, ...) are accepted at the value that has no effect.

    Raises:
        OSError: A file is missing or broken; the message names it.
        ValueError: An argument does not fit, or weights have other shapes than the configuration.
        TypeError: An unknown keyword, or neither files nor weights.
        RuntimeError: The model would be on the meta device, without weights.
    """
    if name_or_path is None and (config is None or state_dict is None):
        missing = "config" if config is None else "state_dict"
        raise TypeError(f"{missing}: expected one, as the name of the model is None, got None")
    download = {
        "revision": revision,
        "subfolder": subfolder,
        "cache_dir": cache_dir,
        "token": token,
        "local_files_only": local_files_only,
        "force_download": force_download,
    }
    for name in ADDED_BY_CALLERS:
        config_overrides.pop(name, None)
    adapter_kwargs = config_overrides.pop("adapter_kwargs", None) or {}
    if "_adapter_model_path" in adapter_kwargs:
        refuse("adapter_kwargs", "no path of an adapter; use load_adapter", adapter_kwargs)
    for name in _TRANSFORMERS_OPTIONS.keys() & config_overrides.keys():
        neutral, value = _TRANSFORMERS_OPTIONS[name], config_overrides.pop(name)
        if value not in neutral:
            refuse(name, f"one of {', '.join(map(repr, neutral))}", value)
    dtype = torch_dtype if dtype is None else dtype
    adapter = None if state_dict is not None else find_adapter(name_or_path, download)
    adapter_path = name_or_path or ""
    if adapter is not None:
        name_or_path = adapter
    source = "the state_dict" if name_or_path is None else name_or_path
    is_file = name_or_path is not None and os.path.isfile(name_or_path)
    config_class = getattr(model_class, "config_class", ConditionalDetrConfig)
    if config is not None or not is_file:
        config = _find_config(config, config_class, name_or_path, download, config_overrides)
    files = [Path(source)] if is_file else []
    if state_dict is None:
        files = files or find_weights(source, variant, use_safetensors, **download)
        state_dict = read_weights(files)
    state_dict = _mapped(state_dict, key_mapping)
    if is_authors(state_dict):
        try:
            state_dict = from_authors(state_dict)
            known = fields_of(state_dict)
        except (RuntimeError, TypeError, ValueError) as error:
            raise OSError(
                f"{source}: the weights have the names of the authors, but not their shapes "
                f"({error})"
            ) from error
        config = config or config_of_authors(files[0], config_class, known, config_overrides)
        _compare(config, known, source, ignore_mismatched_sizes)
    else:
        config = config or _find_config(
            None, config_class, name_or_path, download, config_overrides
        )
        if config.backbone_config.is_foreign:
            library, name = service("backbones"), class_of_level(level_of(state_dict))
            state_dict = library.names_in_memory(name, config.to_dict(), state_dict)
        state_dict = to_v5(state_dict)
    config.name_or_path = os.fspath(name_or_path or "")
    if attn_implementation is not None:
        config._attn_implementation = check_attn_implementation(attn_implementation)

    model = _build(model_class, config)
    if any(tensor.is_meta for tensor in model.state_dict().values()):
        raise RuntimeError(
            f"{source}: weights cannot be loaded on the meta device, which has none; call "
            "from_pretrained outside of torch.device('meta') and of init_empty_weights(), or build "
            "an empty model with the constructor"
        )
    if name_or_path is not None:
        # `predict` finds the image processor there; a token is not kept.
        own = adapter is not None and has_settings(adapter_path)
        cast("Any", model)._processor_source = (
            adapter_path if own else name_or_path,
            {k: v for k, v in download.items() if k not in ("token", "force_download")},
        )
    chosen = _choose_dtype(dtype, config, state_dict)
    report = _fill(model, state_dict)
    report.complain(source, type(model).__name__, ignore_mismatched_sizes, strict)
    config.dtype = chosen
    model.to(dtype=chosen)
    model.eval()
    if adapter is not None:
        cast("Any", model).load_adapter(adapter_path)
    offload = None if offload_folder is None else os.fspath(offload_folder)
    place(model, device_map, max_memory, offload, offload_buffers)
    if output_loading_info:
        info: dict[str, Any] = {name: set(keys) for name, keys in report._asdict().items()}
        return model, info | {"error_msgs": []}
    return model


def find_adapter(
    name_or_path: str | os.PathLike[str] | None, download: dict[str, Any]
) -> str | None:
    """Return the model that an adapter in a folder was trained on; None if there is no adapter."""
    if name_or_path is None or not os.path.isdir(name_or_path):
        return None
    folder = Path(name_or_path) / download["subfolder"]
    if (folder / CONFIG_NAME).is_file() or not (folder / ADAPTER_CONFIG_NAME).is_file():
        return None
    base = read_json(folder / ADAPTER_CONFIG_NAME).get("base_model_name_or_path")
    if not base:
        expected = "the model that the adapter was trained on"
        refuse(f"{folder / ADAPTER_CONFIG_NAME}: base_model_name_or_path", expected, base, OSError)
    return str(base)


def _mapped(state_dict: Mapping[str, Tensor], key_mapping: Mapping[str, str] | None) -> StateDict:
    renamed: StateDict = {}
    for key, tensor in state_dict.items():
        name = key
        for pattern, replacement in (key_mapping or {}).items():
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            refuse("key_mapping", "different names for different weights", name)
        renamed[name] = tensor
    return renamed


def _find_config(
    config: ConditionalDetrConfig | str | os.PathLike[str] | None,
    config_class: type[ConditionalDetrConfig],
    name_or_path: str | os.PathLike[str] | None,
    download: dict[str, Any],
    overrides: dict[str, Any],
) -> ConditionalDetrConfig:
    if isinstance(config, str | os.PathLike):
        return config_class.from_pretrained(config, **download, **overrides)
    if isinstance(config, ConditionalDetrConfig):
        return config.with_overrides(**overrides)
    if config is not None:  # that of transformers
        # `to_dict`, like config.json, is without the choice of an attention.
        overrides.setdefault("attn_implementation", config._attn_implementation)
        return config_class.from_dict(config.to_dict(), **overrides)
    assert name_or_path is not None  # the caller has checked it
    if not os.path.isfile(name_or_path):
        return config_class.from_pretrained(name_or_path, **download, **overrides)
    beside = Path(name_or_path).with_name(CONFIG_NAME)
    if not beside.is_file():
        raise FileNotFoundError(f"config: expected one, or {beside}, to go with {name_or_path}")
    return config_class.from_pretrained(beside, **overrides)


def _compare(
    config: ConditionalDetrConfig,
    known: dict[str, Any],
    name: str | os.PathLike[str],
    ignore_mismatched_sizes: bool,
) -> None:
    """Refuse a configuration that contradicts the weights."""
    for field, expected in known.items():
        got = getattr(config, field)
        if field == "backbone":  # timm adds where the weights are from: resnet50.a1_in1k
            got = got and got.split(".")[0]
        if ignore_mismatched_sizes and field in ("num_labels", "num_queries"):
            continue
        if got != expected and got is not None:  # None: the ResNet that has no name in timm
            refuse(field, f"{expected!r} as in the weights of {name}", got)


def _build(
    model_class: Callable[[ConditionalDetrConfig], Model], config: ConditionalDetrConfig
) -> Model:
    """Build a model without downloading backbone weights, which the checkpoint has."""
    backbone = config.backbone_config
    if not backbone.use_pretrained_backbone:
        return model_class(config)
    backbone.use_pretrained_backbone = False
    try:
        return model_class(config)
    finally:
        backbone.use_pretrained_backbone = True


class LoadingReport(NamedTuple):
    """Weights that were not copied from a checkpoint into a model.

    Attributes:
        missing_keys: Weights of the model that the checkpoint lacks.
        unexpected_keys: Weights of the checkpoint that the model lacks.
        mismatched_keys: (key, shape in the checkpoint, shape in the model).
    """

    missing_keys: list[str]
    unexpected_keys: list[str]
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    def complain(
        self, name: str | os.PathLike[str], model: str, ignore_mismatched_sizes: bool, strict: bool
    ) -> None:
        """Raise or warn, with a list of everything."""
        shapes = [f"{key}: expected {list(b)}, got {list(a)}" for key, a, b in self.mismatched_keys]
        if shapes and not ignore_mismatched_sizes:
            raise ValueError(
                f"{name}: weights of another shape than {model} with this configuration has "
                f"(ignore_mismatched_sizes=True keeps their initial values):{_listed(shapes)}"
            )
        parts = [
            ("not in the checkpoint, left at their initial values", self.missing_keys),
            ("in the checkpoint, not in the model", self.unexpected_keys),
            ("of another shape, left at their initial values", shapes),
        ]
        text = "".join(
            f"\n{len(keys)} weights {what}:{_listed(keys)}" for what, keys in parts if keys
        )
        if strict and (self.missing_keys or self.unexpected_keys):
            raise ValueError(f"{name}: expected exactly the weights of {model}.{text}")
        if text:
            warnings.warn(f"{name}: not all weights went into {model}.{text}", stacklevel=4)


def _listed(lines: list[str], limit: int = 60) -> str:
    rest = [f"... and {len(lines) - limit} more"] if len(lines) > limit else []
    return "".join(f"\n  {line}" for line in lines[:limit] + rest)


def _fill(model: nn.Module, state_dict: StateDict) -> LoadingReport:
    """Copy weights (v5 names, of any of the models) into a model."""
    here = model.state_dict()
    there = {
        key: tensor
        for key, tensor in match_resnet(to_level(state_dict, level_of(here)), here).items()
        # frozen batch norm does not count batches
        if not key.endswith(".num_batches_tracked")
    }
    mismatched = [
        (key, tuple(there[key].shape), tuple(tensor.shape))
        for key, tensor in here.items()
        if key in there and there[key].shape != tensor.shape
    ]
    report = LoadingReport(
        missing_keys=[key for key in here if key not in there],
        unexpected_keys=[key for key in there if key not in here],
        mismatched_keys=mismatched,
    )
    skipped = {*report.unexpected_keys, *(key for key, *_ in mismatched)}
    model.load_state_dict({k: v for k, v in there.items() if k not in skipped}, strict=False)
    return report


def _choose_dtype(
    dtype: torch.dtype | str | None, config: ConditionalDetrConfig, state_dict: StateDict
) -> torch.dtype:
    if dtype not in (None, "auto"):
        return checked(Dtype, dtype, "dtype")
    if config.dtype is not None:
        return config.dtype
    floats = (tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point())
    return next(floats, torch.get_default_dtype())
