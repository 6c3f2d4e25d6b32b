"""Base of the models: loading, saving, activation checkpointing, the criterion."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import nn

from cdetr_fast.checkpoints.key_maps import to_v5
from cdetr_fast.common.host_classes import inherit_from_hosts
from cdetr_fast.config.model import ConditionalDetrConfig


class ConditionalDetrPreTrainedModel(nn.Module):
    """Base of the models: configuration, loading and saving, gradient checkpointing.

    Args:
        config: The model's configuration.

    Raises:
        TypeError: `config` is not a `ConditionalDetrConfig`.
    """

    config_class = ConditionalDetrConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = (
        "ConditionalDetrConvEncoder",
        "ConditionalDetrEncoderLayer",
        "ConditionalDetrDecoderLayer",
    )

    def __init__(self, config: ConditionalDetrConfig) -> None:
        nn.Module.__init__(self)  # alone: not that of a base added by a host library
        inherit_from_hosts()
        if not isinstance(config, ConditionalDetrConfig):
            got = f"{type(config).__module__}.{type(config).__name__}"
            raise TypeError(f"config: expected cdetr_fast.ConditionalDetrConfig, got {got}")
        self.config = config
        self.name_or_path = config.name_or_path

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> Self:
        """Loads a model in eval mode; see `cdetr_fast.checkpoints.load.load_pretrained`."""
        from cdetr_fast.checkpoints.load import load_pretrained

        return load_pretrained(cls, pretrained_model_name_or_path, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Saves weights and configuration; see `cdetr_fast.checkpoints.save.save_pretrained`."""
        from cdetr_fast.checkpoints.save import save_pretrained

        save_pretrained(self, save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Uploads weights and configuration; see `cdetr_fast.checkpoints.save.push_to_hub`."""
        from cdetr_fast.checkpoints.save import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Is `torch.nn.Module.state_dict`."""
        inherit_from_hosts()  # transformers' Trainer asks next what the model is, to save it
        return super().state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Is `torch.nn.Module.load_state_dict`; takes the names in the files of transformers too.

        `save_pretrained` writes those, and transformers' Trainer reads its checkpoints without
        translating them.
        """
        if state_dict.keys() - super().state_dict().keys():
            state_dict = to_v5(state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    @property
    def base_model(self) -> nn.Module:
        """The model below the heads; the model itself if it has none."""
        return getattr(self, self.base_model_prefix, self)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Returns the number of (trainable) parameters, with or without those of embeddings."""
        left_out = {
            id(module.weight)
            for module in self.modules()
            if exclude_embeddings and isinstance(module, nn.Embedding)
        }
        return sum(
            p.numel()
            for p in self.parameters()
            if id(p) not in left_out and (p.requires_grad or not only_trainable)
        )

    def can_generate(self) -> bool:
        """Returns False: there is no text to generate (transformers' pipelines ask)."""
        return False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recomputes each encoder and decoder layer in the backward pass, to save memory.

        Args:
            activation_checkpointing_kwargs: For transformers' Trainer; `use_reentrant` may only be
                False.
            every_n_layers: For the same; may only be 1.
            offload: For the same; may only be False.

        Raises:
            ValueError: Another setting is asked for.
        """
        kwargs = activation_checkpointing_kwargs or {}
        if kwargs.get("use_reentrant") or kwargs.keys() - {"use_reentrant"}:
            raise ValueError(
                "activation_checkpointing_kwargs: expected {'use_reentrant': False} or None, "
                f"got {activation_checkpointing_kwargs!r}"
            )
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers: expected 1 (every layer), got {every_n_layers!r}")
        if offload:
            raise ValueError(f"offload: expected False, got {offload!r}")
        self._set_checkpointing(True)

    def activation_checkpointing_disable(self) -> None:
        """Keeps all activations again."""
        self._set_checkpointing(False)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.modules())

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Is `activation_checkpointing_enable`, by the name it had before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Is `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Is `is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def _set_checkpointing(self, value: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = value

    def _output(self, output: Any, return_dict: bool | None) -> Any:
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


class ModelWithLoss(ConditionalDetrPreTrainedModel):
    """A model with a criterion, which users may replace by assigning `loss_function`."""

    _default_loss: Callable

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        self._loss_function = None

    @property
    def loss_function(self) -> Callable:
        """Criterion: `(logits, labels, device, pred_boxes, [pred_masks], config, ...)`."""
        return self._loss_function or type(self)._default_loss

    @loss_function.setter
    def loss_function(self, value: Callable) -> None:
        self._loss_function = value
