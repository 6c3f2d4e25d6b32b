"""`patch_transformers()` and `unpatch_transformers()`: our operators in transformers' own models.

Only attributes of classes, names of one module and entries of transformers' registries are
replaced. So models built before or after, loaded or pickled are all patched alike, and none keeps
a trace of it.
"""

import importlib
import inspect
import threading
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

from cdetr_fast.common.validation import checked
from cdetr_fast.integrations import adapters, attention, versions

_MODELING = "transformers.models.conditional_detr.modeling_conditional_detr"
_LOSSES = "transformers.loss.loss_for_object_detection"
_LOSS_MAPPING = "transformers.loss.loss_utils:LOSS_MAPPING"
_FOCAL_LOSSES = "transformers.loss.loss_deformable_detr"


Adapter = Callable[[Any, ModuleType], Any]


class _Technique(NamedTuple):
    """The replacements of one switch.

    Attributes:
        replaced: Adapters, which make the replacements, by what they replace, `module:path`.
        code: Functions and classes whose work the replacements do.
        fingerprints: Fingerprints of that code in the supported versions.
    """

    replaced: dict[str, Adapter]
    code: tuple[str, ...]
    fingerprints: tuple[str, ...]


_TECHNIQUES = {
    "attention": _Technique(
        {
            f"{_MODELING}:ALL_ATTENTION_FUNCTIONS": attention.attention_functions,
            f"{_MODELING}:ConditionalDetrDecoderCrossAttention.forward": attention.cross_attention,
            f"{_MODELING}:ConditionalDetrEncoder.forward": attention.encoder,
            f"{_MODELING}:ConditionalDetrDecoder.forward": attention.decoder,
        },
        (
            f"{_MODELING}:eager_attention_forward",
            f"{_MODELING}:ConditionalDetrSelfAttention",
            f"{_MODELING}:ConditionalDetrDecoderSelfAttention",
            f"{_MODELING}:ConditionalDetrDecoderCrossAttention",
            f"{_MODELING}:ConditionalDetrEncoder.forward",
            f"{_MODELING}:ConditionalDetrDecoder.forward",
        ),
        ("84987232d8e8", "ac2a775b8fc5"),
    ),
    "position_codes": _Technique(
        {
            f"{_MODELING}:ConditionalDetrSinePositionEmbedding.forward": adapters.map_code,
            f"{_MODELING}:encode_sinusoidal_position_embedding": adapters.point_code,
        },
        (
            f"{_MODELING}:ConditionalDetrSinePositionEmbedding",
            f"{_MODELING}:encode_sinusoidal_position_embedding",
        ),
        ("83da024f22fa",),
    ),
    "overflow_clamp": _Technique(
        {f"{_MODELING}:ConditionalDetrEncoderLayer.forward": adapters.encoder_layer},
        (f"{_MODELING}:ConditionalDetrEncoderLayer",),
        ("c0d2c5f48e9a",),
    ),
    "losses": _Technique(
        {
            f"{_LOSS_MAPPING}.ConditionalDetrForObjectDetection": adapters.detection,
            f"{_LOSS_MAPPING}.ConditionalDetrForSegmentation": adapters.segmentation,
        },
        (
            f"{_FOCAL_LOSSES}:DeformableDetrForObjectDetectionLoss",
            f"{_FOCAL_LOSSES}:DeformableDetrForSegmentationLoss",
            f"{_FOCAL_LOSSES}:DeformableDetrImageLoss",
            f"{_FOCAL_LOSSES}:DeformableDetrHungarianMatcher",
            f"{_LOSSES}:ImageLoss",
            f"{_LOSSES}:HungarianMatcher",
            f"{_LOSSES}:generalized_box_iou",
            f"{_LOSSES}:sigmoid_focal_loss",
            f"{_LOSSES}:dice_loss",
        ),
        ("3b1063efb26b", "c11ba95bfaab"),
    ),
    "mask_head": _Technique(
        {f"{_MODELING}:ConditionalDetrMaskHeadSmallConv.forward": adapters.mask_head},
        (
            f"{_MODELING}:ConditionalDetrMaskHeadSmallConv",
            f"{_MODELING}:ConditionalDetrFPNFusionStage",
            f"{_MODELING}:ConditionalDetrConvBlock",
        ),
        ("3b7a913bbf14",),
    ),
    "batch_norm": _Technique(
        {f"{_MODELING}:ConditionalDetrFrozenBatchNorm2d.forward": adapters.batch_norm},
        (f"{_MODELING}:ConditionalDetrFrozenBatchNorm2d.forward",),
        ("4fd9bdf57828",),
    ),
    "channels_last": _Technique(
        {f"{_MODELING}:ConditionalDetrConvEncoder.forward": adapters.conv_encoder},
        (f"{_MODELING}:ConditionalDetrConvEncoder.forward",),
        ("cda9e131d55e",),
    ),
    "attention_interface": _Technique(
        {
            "transformers.modeling_utils:AttentionInterface._global_mapping.cdetr_fast": (
                attention.registered_attention
            ),
            "transformers.masking_utils:AttentionMaskInterface._global_mapping.cdetr_fast": (
                attention.registered_mask
            ),
        },
        (),
        (),
    ),
}


class _Attribute(NamedTuple):
    """An attribute of a class or module, or an entry of a dictionary, which may be missing."""

    owner: Any
    name: str

    @classmethod
    def find(cls, path: str) -> "_Attribute":
        """Import the module of a path `module:dotted.name` and look the name up."""
        module, _, dotted = path.partition(":")
        owner = importlib.import_module(module)
        *parents, name = dotted.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return cls(owner, name)

    def get(self) -> Any:
        """Return the value, None if there is none."""
        owned = self.owner if isinstance(self.owner, dict) else vars(self.owner)
        return owned.get(self.name)

    def set(self, value: Any) -> None:
        """Set the value; None removes an entry."""
        if not isinstance(self.owner, dict):
            setattr(self.owner, self.name, value)
        elif value is None:
            del self.owner[self.name]
        else:
            self.owner[self.name] = value


class _Replacement(NamedTuple):
    path: str
    attribute: _Attribute
    before: Any
    after: Any


class _State:
    """The replacements in this process; there is one such object."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.switches: dict[str, bool] = dict.fromkeys(_TECHNIQUES, False)
        self.replacements: list[_Replacement] = []

    def set(self, switches: dict[str, bool]) -> dict[str, bool]:
        """Replace what the switches name and nothing else; return the switches before."""
        with self.lock:
            before = self.switches
            if switches == before:
                return before
            self._refuse_if_replaced_by_others()
            for replacement in self.replacements:
                replacement.attribute.set(replacement.before)
            try:
                replacements = _plan(switches)
            except BaseException:
                for replacement in self.replacements:
                    replacement.attribute.set(replacement.after)
                raise
            for replacement in replacements:
                replacement.attribute.set(replacement.after)
            self.switches, self.replacements = switches, replacements
            return before

    def _refuse_if_replaced_by_others(self) -> None:
        for path, attribute, _, after in self.replacements:
            found = attribute.get()
            if found is not after:
                raise RuntimeError(
                    f"{path}: expected what patch_transformers() put there, got {found!r}. "
                    "Undo that replacement first"
                )


_STATE = _State()


def _plan(switches: dict[str, bool]) -> list[_Replacement]:
    """Check transformers and make the replacements, without installing any."""
    wanted = {name: _TECHNIQUES[name] for name, on in switches.items() if on}
    if not wanted:
        return []
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "patch_transformers: expected transformers to be installed, got none. "
            'Install it with pip install "cdetr-fast[transformers]"'
        ) from error
    versions.check_version(transformers.__version__)
    modeling = importlib.import_module(_MODELING)
    replacements = []
    for name, technique in wanted.items():
        if technique.code:
            code = {path: _Attribute.find(path).get() for path in technique.code}
            versions.check_structure(name, code, technique.fingerprints)
        for path, adapter in technique.replaced.items():
            attribute = _Attribute.find(path)
            before = attribute.get()
            after = adapter(before, modeling)
            if inspect.isfunction(before):
                versions.check_signature(path, before, after)
            replacements.append(_Replacement(path, attribute, before, after))
    return replacements


class TransformersPatch:
    """Handle of a call of `patch_transformers()`; as a context manager it undoes the call.

    Attributes:
        switches: Techniques by name, True where in use.
    """

    def __init__(self, switches: dict[str, bool]) -> None:
        self.switches = switches
        self._before = _STATE.set(switches)

    def __enter__(self) -> "TransformersPatch":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _STATE.set(self._before)

    def __repr__(self) -> str:
        techniques = ", ".join(name for name, on in self.switches.items() if on)
        return f"TransformersPatch({techniques})"


def patch_transformers(
    *,
    attention: bool = True,
    position_codes: bool = True,
    overflow_clamp: bool = True,
    losses: bool = True,
    mask_head: bool = True,
    batch_norm: bool = True,
    channels_last: bool = True,
    attention_interface: bool = True,
) -> TransformersPatch:
    """Make every Conditional DETR of transformers in this process use our operators.

    Models already built are patched too. Numbers stay those of transformers, rounding aside, also
    where it departs from the paper. A second call with the same switches changes nothing; with
    others, its switches replace those of the first. `unpatch_transformers()` undoes it; so does the
    end of a `with` block.

    Args:
        attention: Attention without concatenated queries and keys, and padding masks that are
            neither looked at nor written out. Attention maps are computed when
            `output_attentions` asks for them. Only with "eager", "sdpa" and "cdetr_fast".
        position_codes: Sine codes of the map and of the reference points by our operators; for the
            map not in half precision, where transformers rounds the angles.
        overflow_clamp: Encoder layers clamp in training without asking the device whether
            anything overflowed.
        losses: Costs of an image's own targets only, all decoder layers at once, one transfer per
            step. A NaN in a prediction is logged, where transformers raises.
        mask_head: The mask head of segmentation without a copy of the maps for each query.
        batch_norm: Frozen batch norm in one pass.
        channels_last: Backbones run on channels-last images.
        attention_interface: Registers `attn_implementation="cdetr_fast"`, for all models. It
            raises ValueError for attention it does not compute, such as attention sinks.

    Returns:
        A context manager, which need not be kept.

    Raises:
        TypeError: A switch is not True or False.
        ImportError: transformers is not installed.
        RuntimeError: Its version or code is not supported, or something else has replaced what an
            earlier call had installed. Nothing is changed then.
    """
    switches = {
        "attention": attention,
        "position_codes": position_codes,
        "overflow_clamp": overflow_clamp,
        "losses": losses,
        "mask_head": mask_head,
        "batch_norm": batch_norm,
        "channels_last": channels_last,
        "attention_interface": attention_interface,
    }
    return TransformersPatch({name: checked(bool, on, name) for name, on in switches.items()})


def unpatch_transformers() -> None:
    """Restore everything that `patch_transformers()` replaced, if anything.

    Raises:
        RuntimeError: Something else has replaced some of it since. Nothing is changed then.
    """
    _STATE.set(dict.fromkeys(_TECHNIQUES, False))
