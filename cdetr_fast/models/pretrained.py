"""Base of the models: loading, saving, activation checkpointing, the criterion."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cdetr_fast.checkpoints.key_maps import to_v5
from cdetr_fast.common.host_classes import inherit_from_hosts
from cdetr_fast.common.validation import checked, unknown_keyword
from cdetr_fast.config.attention import check_attn_implementation
from cdetr_fast.config.field_types import Dtype
from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.adapters import AdapterMethods
from cdetr_fast.models.recompute import DEFAULT_OPTIONS

# Keywords that transformers' Trainer, pipelines and models hand on to every model's forward, and
# that change nothing in one without text.
_UNREAD_KEYWORDS = ("num_items_in_batch", "use_cache", "output_router_logits", "return_loss")
_FORWARD_KEYWORDS = (
    *("pixel_values", "pixel_mask", "decoder_attention_mask", "encoder_outputs", "inputs_embeds"),
    *("decoder_inputs_embeds", "labels", "output_attentions", "output_hidden_states"),
    *("return_dict", "num_boxes"),
)
_CHECKPOINT_OPTIONS = (
    *("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug"),
    "early_stop",
)


class ConditionalDetrPreTrainedModel(AdapterMethods, nn.Module):
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
    # The losses are means over boxes, which Trainer has to average over accumulated steps.
    accepts_loss_kwargs = False
    model_tags: list[str] | None = None
    _no_split_modules: ClassVar[list[str]] = [
        "ConditionalDetrConvEncoder",
        "ConditionalDetrEncoderLayer",
        "ConditionalDetrDecoderLayer",
    ]

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
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any
    ) -> Self:
        """Load a model in eval mode; see `cdetr_fast.checkpoints.load.load_pretrained`."""
        from cdetr_fast.checkpoints.load import load_pretrained

        with torch.inference_mode(False):  # weights of that mode could never train
            return cast("Self", load_pretrained(cls, pretrained_model_name_or_path, **kwargs))

    @classmethod
    def _from_config(cls, config: ConditionalDetrConfig, **kwargs: Any) -> Self:
        """Build a model without weights, as transformers' auto classes do.

        Args:
            config: The model's configuration; it is copied.
            **kwargs: `dtype` (or `torch_dtype`) and `attn_implementation`.
        """
        config = copy.deepcopy(config)
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or config.dtype
        if (implementation := kwargs.pop("attn_implementation", None)) is not None:
            config._attn_implementation = implementation
        for name in kwargs:
            raise unknown_keyword("_from_config", name, ("dtype", "attn_implementation"))
        config.dtype = checked(Dtype | None, dtype, "dtype")
        return cls(config).to(config.dtype)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> None:
        """Save weights and configuration; see `cdetr_fast.checkpoints.save.save_pretrained`."""
        from cdetr_fast.checkpoints.save import save_pretrained

        save_pretrained(self, save_directory, *args, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Upload weights and configuration; see `cdetr_fast.checkpoints.save.push_to_hub`."""
        from cdetr_fast.checkpoints.save import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Call `torch.nn.Module.state_dict`."""
        inherit_from_hosts()  # transformers' Trainer asks next what the model is, to save it
        return super().state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Call `torch.nn.Module.load_state_dict`; take the names in the files of transformers too.

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
        """Return the number of (trainable) parameters, with or without those of embeddings."""
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

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Return the bytes of the parameters, and of the buffers unless that is switched off."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(tensor.nelement() * tensor.element_size() for tensor in tensors)

    def get_parameter_or_buffer(self, target: str) -> Tensor:
        """Return a parameter or buffer by its dotted name.

        Raises:
            AttributeError: The model has no parameter or buffer of this name.
        """
        module, _, name = target.rpartition(".")
        part = self.get_submodule(module)
        for tensors in (part._parameters, part._buffers):
            if (tensor := tensors.get(name)) is not None:
                return tensor
        raise AttributeError(f"{target!r} is neither a parameter nor a buffer")

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the encoder; the model itself for a modality, as transformers does."""
        return self if modality is not None else self._transformer().get_submodule("encoder")

    def get_decoder(self) -> nn.Module:
        """Return the decoder."""
        return self._transformer().get_submodule("decoder")

    def _transformer(self) -> nn.Module:
        return next(part for part in self.modules() if hasattr(part, "query_position_embeddings"))

    def get_input_embeddings(self) -> None:
        """Return None: images have no embeddings of tokens.

        transformers raises NotImplementedError, which ends Accelerate's FSDP.
        """
        return

    def get_output_embeddings(self) -> None:
        """Return None: there are no embeddings of tokens (PEFT asks)."""
        return

    def set_attn_implementation(self, attn_implementation: str | dict[str, str]) -> None:
        """Choose how attention is computed, as `attn_implementation` of `from_pretrained` does.

        Args:
            attn_implementation: Name, or a dict with that of the whole model under "".

        Raises:
            ValueError: The name is not one of those that the configuration takes.
        """
        name: Any = attn_implementation
        if isinstance(attn_implementation, dict):
            name = attn_implementation.get("", self.config._attn_implementation)
        self.config._attn_implementation = check_attn_implementation(name)

    def add_model_tags(self, tags: list[str] | str) -> None:
        """Add tags to the model card that `push_to_hub` writes."""
        present = self.model_tags or []
        tags = [tags] if isinstance(tags, str) else tags
        self.model_tags = present + [tag for tag in dict.fromkeys(tags) if tag not in present]

    def post_init(self) -> None:
        """Do nothing but honour `config.gradient_checkpointing`; derived classes of users call it.

        The constructor has initialised this package's parts; those that a derived class adds keep
        the initial weights of their own classes, and `_init_weights` is not called.
        """
        if self.config.__dict__.pop("gradient_checkpointing", False):
            self.activation_checkpointing_enable()

    def init_weights(self) -> None:
        """Do nothing: the constructor has initialised the weights, and none are tied."""

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: no weights are tied."""

    def enable_input_require_grads(self) -> None:
        """Make gradients reach the encoder's input although everything before it is frozen.

        Re-entrant checkpointing of a model whose adapters alone train needs it.
        """
        self.disable_input_require_grads()
        projection = self._transformer().get_submodule("input_projection")
        self._require_grads_hook = projection.register_forward_hook(_require_grad)

    def disable_input_require_grads(self) -> None:
        """Undo `enable_input_require_grads`."""
        handle: RemovableHandle | None = self.__dict__.pop("_require_grads_hook", None)
        if handle is not None:
            handle.remove()

    @classmethod
    def can_generate(cls) -> bool:
        """Return False: there is no text to generate (transformers' pipelines ask)."""
        return False

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute each encoder and decoder layer in the backward pass, to save memory.

        Args:
            activation_checkpointing_kwargs: Keywords of `torch.utils.checkpoint.checkpoint`;
                default `{"use_reentrant": False}`.
            every_n_layers: May only be 1; for transformers' Trainer.
            offload: May only be False; for the same.

        Raises:
            TypeError: torch's checkpoint does not take a keyword.
            ValueError: Another setting is asked for.
        """
        options = {**DEFAULT_OPTIONS, **(activation_checkpointing_kwargs or {})}
        for name in options.keys() - set(_CHECKPOINT_OPTIONS):
            raise unknown_keyword("activation_checkpointing_kwargs", name, _CHECKPOINT_OPTIONS)
        if every_n_layers != 1:
            raise ValueError(f"every_n_layers: expected 1 (every layer), got {every_n_layers!r}")
        if offload:
            raise ValueError(f"offload: expected False, got {offload!r}")
        self._set_checkpointing(True, options)

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self._set_checkpointing(False)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers are recomputed in the backward pass."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.modules())

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Call `activation_checkpointing_enable`; its name before transformers 5.23."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_disable(self) -> None:
        """Call `activation_checkpointing_disable`."""
        self.activation_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The same as `is_activation_checkpointing`."""
        return self.is_activation_checkpointing

    def _set_checkpointing(self, value: bool, options: Mapping[str, Any] = DEFAULT_OPTIONS) -> None:
        parts = [part for part in self.modules() if hasattr(part, "gradient_checkpointing")]
        for part in cast("list[Any]", parts):
            part.gradient_checkpointing = value
            part.checkpoint_options = options

    def _check_keywords(self, keywords: Mapping[str, Any]) -> None:
        """Refuse keywords of `forward` that neither it nor transformers' callers know."""
        for name in keywords:
            if name not in _UNREAD_KEYWORDS:
                raise unknown_keyword(f"{type(self).__name__}.forward", name, _FORWARD_KEYWORDS)

    def _output(self, output: Any, return_dict: bool | None) -> Any:
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()


def _require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)


class ModelWithLoss(ConditionalDetrPreTrainedModel):
    """A model with a criterion, which users may replace by assigning `loss_function`."""

    _default_loss: Callable[..., Any]

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        self._loss_function: Callable[..., Any] | None = None

    @property
    def loss_function(self) -> Callable[..., Any]:
        """Criterion: `(logits, labels, device, pred_boxes, [pred_masks], config, ...)`."""
        return self._loss_function or type(self)._default_loss

    @loss_function.setter
    def loss_function(self, value: Callable[..., Any]) -> None:
        self._loss_function = value
