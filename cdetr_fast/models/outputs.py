"""Output containers: attribute, key and tuple access to the fields that are not None.

They behave like transformers' `ModelOutput` (dictionaries whose positions are stable), because its
clients read fields by name and by position.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import Field, dataclass, fields
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cdetr_fast.common.host_classes import inherit_from_hosts


class _Ordered(OrderedDict[str, Any]):
    """The base that stays when a base is added: Python adds none beside a built-in class."""


class ModelOutput(_Ordered):
    """Base of the outputs: a dictionary of its dataclass fields that are not None, in their order.

    `output.logits`, `output["logits"]`, `output[1]`, `output[:2]` and `output.to_tuple()` all work.
    Where transformers is imported, its `ModelOutput` is a base of this one.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # every subclass is a dataclass

    def __init_subclass__(cls) -> None:
        # torch.export, DDP and functorch look inside containers through this registry.
        pytree.register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, keys: _rebuild(cls, dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
            flatten_with_keys_fn=lambda output: (
                [(pytree.MappingKey(key), value) for key, value in output.items()],
                list(output.keys()),
            ),
        )

    def __post_init__(self) -> None:
        if not torch.compiler.is_compiling():
            inherit_from_hosts()
        first, *rest = (field.name for field in fields(self))
        values = getattr(self, first)
        if isinstance(values, (dict, Iterator)) and all(getattr(self, x) is None for x in rest):
            # Accelerate and transformers' pipelines rebuild a container from a dictionary,
            # DataParallel from an iterator of pairs; pipelines add keys of their own.
            OrderedDict.__delitem__(self, first)
            object.__setattr__(self, first, None)
            for name, value in dict(values).items():
                if value is not None:
                    self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        if isinstance(key, str):
            return OrderedDict.__getitem__(self, key)
        return self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        OrderedDict.__setitem__(self, key, value)
        object.__setattr__(self, key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if value is not None and (name in self or name in self.__dataclass_fields__):
            OrderedDict.__setitem__(self, name, value)
        object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), dict(self.items()))

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{type(self).__name__} keeps the fields it was made with")

    __delitem__ = pop = setdefault = update = popitem = _refuse

    def to_tuple(self) -> tuple[Any, ...]:
        """Return the fields that are not None, in order."""
        return tuple(self.values())


def _rebuild(cls: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    # Not `cls(**values)`: there may be keys that are not fields.
    return cls(values)


def present(tensor: Tensor | None) -> Tensor:
    """Return a field that every model sets."""
    assert tensor is not None
    return tensor


@dataclass(repr=False)
class EncoderOutput(ModelOutput):
    """Output of the encoder.

    Attributes:
        last_hidden_state: Memory `[B, S, C]`.
        hidden_states: Input of the first and output of each layer, `[B, S, C]` each.
        attentions: Attention maps `[B, N, S, S]`, one per layer.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass(repr=False)
class DecoderOutput(ModelOutput):
    """Output of the decoder.

    Attributes:
        last_hidden_state: `[B, Q, C]`, layer-normed.
        hidden_states: Input of the first and output of each layer, the last one layer-normed.
        attentions: Self-attention maps `[B, N, Q, Q]`, one per layer.
        cross_attentions: Cross-attention maps `[B, N, Q, S]`, one per layer.
        intermediate_hidden_states: Layer-normed output of each layer `[L, B, Q, C]`, with
            `config.auxiliary_loss`.
        reference_points: `[Q, B, 2]`, x and y relative to the image, fp32.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    intermediate_hidden_states: Tensor | None = None
    reference_points: Tensor | None = None


@dataclass(repr=False)
class ConditionalDetrModelOutput(ModelOutput):
    """Output of `ConditionalDetrModel`: the fields of `DecoderOutput` and `EncoderOutput`."""

    last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    intermediate_hidden_states: Tensor | None = None
    reference_points: Tensor | None = None


@dataclass(repr=False)
class ConditionalDetrObjectDetectionOutput(ModelOutput):
    """Output of `ConditionalDetrForObjectDetection`.

    Attributes:
        loss: Weighted sum of the losses, no dimension; with labels.
        loss_dict: Each loss by name, `_i` appended for decoder layer i < L-1; with labels.
        logits: Class logits `[B, Q, K]`.
        pred_boxes: Centre and size relative to the unpadded image, fp32 `[B, Q, 4]`.
        auxiliary_outputs: `{"logits", "pred_boxes"}` of each decoder layer but the last; with
            labels and `config.auxiliary_loss`.
        last_hidden_state: `[B, Q, C]`; this and the rest as in `ConditionalDetrModelOutput`.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass(repr=False)
class ConditionalDetrSegmentationOutput(ModelOutput):
    """Output of `ConditionalDetrForSegmentation`: that of detection, and masks.

    Attributes:
        pred_masks: Mask logits `[B, Q, H/4, W/4]` (the size of the backbone's finest map).
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    pred_masks: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


def shared_fields(outputs: ConditionalDetrModelOutput) -> dict[str, Any]:
    """Return the fields that the outputs of detection and segmentation have too."""
    return {
        name: getattr(outputs, name)
        for name in (
            "last_hidden_state",
            "decoder_hidden_states",
            "decoder_attentions",
            "cross_attentions",
            "encoder_last_hidden_state",
            "encoder_hidden_states",
            "encoder_attentions",
        )
    }
