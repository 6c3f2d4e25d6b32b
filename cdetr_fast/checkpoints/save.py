"""`save_pretrained` and `push_to_hub`: checkpoints in the layout of transformers 5."""

import copy
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from huggingface_hub import CommitInfo, HfApi, split_torch_state_dict_into_shards
from torch import Tensor, nn

from cdetr_fast.checkpoints.devices import all_weights
from cdetr_fast.checkpoints.files import weight_names
from cdetr_fast.checkpoints.key_maps import class_of_level, level_of, to_v4
from cdetr_fast.common.files import make_folder, replace_all, write_json
from cdetr_fast.common.hub import upload
from cdetr_fast.common.model_families import service
from cdetr_fast.common.validation import refuse
from cdetr_fast.config.model import CONFIG_NAME, ConditionalDetrConfig


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    *,
    safe_serialization: bool = True,
    save_function: Callable[..., Any] | None = None,
    **push_options: Any,
) -> None:
    """Save weights and configuration in a folder that transformers 4 and 5 and this package read.

    Of a model with adapters (`add_adapter`), those alone are saved, in the format of PEFT.

    All files are written beside the old ones first and then replace them, so an interrupted write
    leaves the old files.

    Args:
        model: The model.
        save_directory: Folder, created if necessary.
        is_main_process: False writes nothing (for the other processes of a distributed run).
        state_dict: Weights instead of the model's own, with the same names.
        push_to_hub: Upload the files too.
        max_shard_size: Size above which weights are split over several files, as in "50GB".
        variant: Part of the file name, as in `model.fp16.safetensors`.
        token: Access token for the upload.
        safe_serialization: False writes pytorch_model.bin instead of model.safetensors.
        save_function: Accepted for callers of transformers (Accelerate's idiom passes
            `accelerator.save`), where it has no effect either.
        **push_options: As in `push_to_hub`; `repo_id` is the folder's name unless given.

    Raises:
        TypeError: Options for an upload without push_to_hub=True.
        ValueError: The fields of the configuration do not fit each other.
        RuntimeError: The model is on the meta device.
    """
    for name in ("save_peft_format", "save_original_format", "distributed_checkpoint"):
        neutral = (False,) if name == "distributed_checkpoint" else (True, False)
        value = push_options.pop(name, False)
        if value not in neutral:
            refuse(name, f"one of {', '.join(map(repr, neutral))}", value)
    if push_options and not push_to_hub:
        raise TypeError(f"save_pretrained: unknown keyword {next(iter(push_options))!r}")
    if not is_main_process:
        return
    folder = make_folder(save_directory)
    config = copy.deepcopy(cast("ConditionalDetrConfig", model.config))
    config.architectures = [type(model).__name__]
    config.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    config.validate()
    if config.compat == "paper" and (reason := config.departure()):
        warnings.warn(
            f"{save_directory}: transformers computes other numbers with these weights: there "
            f"{reason}. Models that are used in both need compat='transformers'.",
            stacklevel=3,
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        with replace_all(folder) as stage:
            service("adapters").save_adapters(model, stage(""), state_dict)
            written = [path.name for path in stage("").iterdir()]
        if push_to_hub:
            push_options.setdefault("repo_id", folder.resolve().name)
            _upload(model, folder, written, token=token, **push_options)
        return
    weights = all_weights(model) if state_dict is None else state_dict
    if config.backbone_config.is_foreign:
        name = class_of_level(level_of(weights))
        weights = service("backbones").names_on_disk(name, config.to_dict(), dict(weights))
    else:
        weights = to_v4(weights)
    weights = {key: tensor.detach().cpu().contiguous() for key, tensor in weights.items()}

    part = f".{variant}" if variant else ""
    stem, suffix = ("model", "safetensors") if safe_serialization else ("pytorch_model", "bin")
    shards = split_torch_state_dict_into_shards(
        weights,
        filename_pattern=f"{stem}{part}{{suffix}}.{suffix}",
        max_shard_size=max_shard_size,
    )
    with replace_all(folder) as stage:
        for name, keys in shards.filename_to_tensors.items():
            shard = {key: weights[key] for key in keys}
            if safe_serialization:
                safetensors.torch.save_file(shard, stage(name), metadata={"format": "pt"})
            else:
                torch.save(shard, stage(name))
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_json(stage(f"{stem}.{suffix}.index{part}.json"), index)
        write_json(stage(CONFIG_NAME), config.to_diff_dict())
        written = [path.name for path in stage("").iterdir()]
    _remove_stale(folder, variant, written)
    if push_to_hub:
        push_options.setdefault("repo_id", folder.resolve().name)
        _upload(model, folder, written, token=token, **push_options)


def _remove_stale(folder: Path, variant: str | None, written: list[str]) -> None:
    """Remove older weights that a reader would mistake for the ones just written."""
    names = weight_names(variant)
    main = next(index for index, name in enumerate(names) if name in written)
    stem, *_, suffix = names[main - main % 2].split(".")
    shard = re.compile(
        re.escape(f"{stem}.{variant}" if variant else stem) + rf"-\d{{5}}-of-\d{{5}}\.{suffix}"
    )
    # those that a reader finds first, and the whole or sharded one of the same format
    for name in {*names[:main], names[main ^ 1]}:
        (folder / name).unlink(missing_ok=True)
    for path in folder.iterdir():
        if shard.fullmatch(path.name) and path.name not in written:
            path.unlink()


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    safe_serialization: bool = True,
    tags: list[str] | str | None = None,
) -> CommitInfo:
    """Upload weights and configuration to a repository on the hub, created if necessary.

    Args:
        model: The model.
        repo_id: Name of the repository, prefixed by the organisation if it is not the user's own.
        commit_message: Title of the commit.
        commit_description: Its text.
        private: Make a new repository private.
        token: Access token; default the one of `hf auth login`.
        revision: Branch, created if necessary.
        create_pr: Open a pull request instead of committing.
        max_shard_size: As in `save_pretrained`.
        variant: As in `save_pretrained`.
        safe_serialization: As in `save_pretrained`.
        tags: Tags to add to the model card, besides those of `model.add_model_tags`.

    Returns:
        The commit, with its URL.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(
            model,
            folder,
            max_shard_size=max_shard_size,
            variant=variant,
            safe_serialization=safe_serialization,
        )
        return _upload(
            model,
            Path(folder),
            os.listdir(folder),
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )


def _upload(
    model: nn.Module, folder: Path, names: Iterable[str], repo_id: str, **options: Any
) -> CommitInfo:
    tags = options.pop("tags", None) or []
    own = getattr(model, "model_tags", None) or []
    tags = [*own, *([tags] if isinstance(tags, str) else tags)]
    commit: CommitInfo = upload(folder, names, repo_id, tags=tags, api=HfApi, **options)
    return commit
