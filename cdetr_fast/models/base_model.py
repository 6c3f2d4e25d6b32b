"""`ConditionalDetrModel`: backbone, encoder and decoder composed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cdetr_fast.common.masks import is_unpadded
from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.models.backbone import ConditionalDetrConvEncoder
from cdetr_fast.models.decoder import ConditionalDetrDecoder
from cdetr_fast.models.encoder import ConditionalDetrEncoder
from cdetr_fast.models.initialization import initialize_model
from cdetr_fast.models.outputs import ConditionalDetrModelOutput, EncoderOutput, present
from cdetr_fast.models.position import (
    ConditionalDetrLearnedPositionEmbedding,
    ConditionalDetrSinePositionEmbedding,
    MapPosition,
)
from cdetr_fast.models.pretrained import ConditionalDetrPreTrainedModel


class ImageFeatures(NamedTuple):
    """Features of a batch of images, as the encoder reads them.

    Attributes:
        maps: Feature maps from fine to coarse, `[B, C_i, h_i, w_i]`.
        projected: The coarsest map with d_model channels, `[B, C, h, w]`.
        mask: bool `[B, h*w]`, True = unpadded; None if nothing is padded.
        position: Position code of the coarsest map.
    """

    maps: list[Tensor]
    projected: Tensor
    mask: Tensor | None
    position: MapPosition


class ConditionalDetrModel(ConditionalDetrPreTrainedModel):
    """Backbone, encoder and decoder without heads.

    Args:
        config: The model's configuration.
    """

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        self.backbone = ConditionalDetrConvEncoder(config)
        self.position_embedding: (
            ConditionalDetrSinePositionEmbedding | ConditionalDetrLearnedPositionEmbedding
        )
        if config.position_embedding_type == "sine":
            self.position_embedding = ConditionalDetrSinePositionEmbedding(config.d_model)
        else:
            self.position_embedding = ConditionalDetrLearnedPositionEmbedding(config.d_model)
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        self.input_projection = nn.Conv2d(
            self.backbone.intermediate_channel_sizes[-1], config.d_model, kernel_size=1
        )
        self.encoder = ConditionalDetrEncoder(config)
        self.decoder = ConditionalDetrDecoder(config)
        initialize_model(
            config,
            self.encoder,
            self.decoder,
            self.input_projection,
            self.query_position_embeddings,
            self.position_embedding,
        )

    def freeze_backbone(self) -> None:
        """Stop training of the backbone."""
        self.backbone.model.requires_grad_(False)

    def unfreeze_backbone(self) -> None:
        """Train the whole backbone, the stages that the authors freeze included."""
        self.backbone.unfreeze()

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ConditionalDetrModelOutput | tuple[Any, ...]:
        """Run the model.

        Args:
            pixel_values: Normalised images `[B, num_channels, H, W]`.
            pixel_mask: `[B, H, W]`, 1 = image and 0 = padding; None if nothing is padded.
            decoder_attention_mask: `[B, Q]`, 1 = object query takes part, 0 = the others do not
                attend to it in self-attention. transformers ignores it.
            encoder_outputs: Memory `[B, S, C]` in the first place, then (optionally) hidden states
                and attentions; the encoder is not run.
            inputs_embeds: Refused: the size of the map is not known without the backbone.
                transformers ignores it. Use `encoder_outputs`.
            decoder_inputs_embeds: Initial decoder state `[B, Q, C]` instead of zeros. transformers
                ignores it in this class.
            output_attentions: Return attention maps (default: `config.output_attentions`).
            output_hidden_states: Return the layers' states (default:
                `config.output_hidden_states`).
            return_dict: Return a `ConditionalDetrModelOutput` (default: `config.return_dict`), else
                a tuple.
            **kwargs: What transformers' callers pass to every model, such as `num_items_in_batch`:
                not read.

        Raises:
            TypeError: A dtype does not fit, or a keyword is unknown.
            ValueError: A shape does not fit, or `inputs_embeds` is given.
        """
        self._check_keywords(kwargs)
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds: expected None, as the map's size is not known from it, "
                f"got {list(inputs_embeds.shape)}; pass encoder_outputs or pixel_values instead"
            )
        output = self.transform(
            self.embed_images(pixel_values, pixel_mask),
            decoder_attention_mask,
            encoder_outputs,
            decoder_inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        return self._output(output, return_dict)

    def embed_images(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> ImageFeatures:
        """Run the backbone and code the positions of its coarsest map; arguments as `forward`."""
        self.check_images(pixel_values, pixel_mask)
        if pixel_mask is not None and is_unpadded(pixel_mask):
            pixel_mask = None
        maps, mask = self.backbone(pixel_values, pixel_mask)
        position = self.map_position(maps[-1], mask, pixel_values.dtype)
        projected = self.input_projection(maps[-1])
        mask = None if mask is None else mask.flatten(1)
        return ImageFeatures(maps, projected, mask, position)

    def map_position(
        self, feature_map: Tensor, mask: Tensor | None, dtype: torch.dtype
    ) -> MapPosition:
        """Code the positions of the map `[B, C, h, w]` with its mask `[B, h, w]`."""
        code = self.position_embedding(feature_map, mask, dtype)
        if not self.position_embedding.is_separable(mask):
            return MapPosition(code)
        return MapPosition.separated(code, *feature_map.shape[-2:])

    def transform(
        self,
        features: ImageFeatures,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Tensor, ...] | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> ConditionalDetrModelOutput:
        """Run encoder and decoder on the features of `embed_images`; arguments as `forward`."""
        config = self.config
        attentions = config.output_attentions if output_attentions is None else output_attentions
        states = (
            config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        batch = features.projected.shape[0]
        query_shape = (batch, config.num_queries)
        if decoder_attention_mask is not None:
            _check_shape("decoder_attention_mask", decoder_attention_mask, query_shape)
            decoder_attention_mask = decoder_attention_mask.bool()
        if decoder_inputs_embeds is not None:
            _check_shape(
                "decoder_inputs_embeds", decoder_inputs_embeds, (*query_shape, config.d_model)
            )
            self._check_dtype("decoder_inputs_embeds", decoder_inputs_embeds)
        flat = features.projected.flatten(2).transpose(1, 2)  # [B, S, C]
        if encoder_outputs is None:
            encoded = self.encoder(flat, features.position, features.mask, attentions, states)
        else:
            encoded = _as_encoder_output(encoder_outputs)
            _check_shape("encoder_outputs[0]", encoded.last_hidden_state, tuple(flat.shape))
            self._check_dtype("encoder_outputs[0]", present(encoded.last_hidden_state))
        decoded = self.decoder(
            self.query_position_embeddings.weight[None],
            encoded.last_hidden_state,
            features.position,
            features.mask,
            decoder_inputs_embeds,
            decoder_attention_mask,
            attentions,
            states,
        )
        return ConditionalDetrModelOutput(
            last_hidden_state=decoded.last_hidden_state,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=encoded.last_hidden_state,
            encoder_hidden_states=encoded.hidden_states,
            encoder_attentions=encoded.attentions,
            intermediate_hidden_states=decoded.intermediate_hidden_states,
            reference_points=decoded.reference_points,
        )

    def check_images(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
        """Refuse images and masks that do not fit the model or each other."""
        if not isinstance(pixel_values, Tensor):
            got = type(pixel_values).__name__
            raise TypeError(f"pixel_values: expected a tensor [B, C, H, W], got {got}")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.backbone.num_channels:
            raise ValueError(
                f"pixel_values: expected [B, {self.backbone.num_channels}, H, W], "
                f"got {list(pixel_values.shape)}"
            )
        if 0 in pixel_values.shape:
            shape = list(pixel_values.shape)
            raise ValueError(f"pixel_values: expected at least one image and pixel, got {shape}")
        self._check_dtype("pixel_values", pixel_values)
        if pixel_mask is not None:
            batch, _, height, width = pixel_values.shape
            _check_shape("pixel_mask", pixel_mask, (batch, height, width))

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        dtype = self.input_projection.weight.dtype
        if tensor.dtype == dtype:
            return
        if not (tensor.is_floating_point() and torch.is_autocast_enabled(tensor.device.type)):
            raise TypeError(f"{name}: expected {dtype} as the model, got {tensor.dtype}")


def _as_encoder_output(given: Any) -> EncoderOutput:
    """Read transformers' or our output by name, and a tuple by position."""
    if isinstance(given, Mapping):
        names = ("last_hidden_state", "hidden_states", "attentions")
        return EncoderOutput(*(given.get(name) for name in names))
    if not isinstance(given, (tuple, list)):
        got = type(given).__name__
        raise TypeError(f"encoder_outputs: expected a tuple or an encoder's output, got {got}")
    return EncoderOutput(*given[:3])


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor):
        got = type(tensor).__name__
        raise TypeError(f"{name}: expected a tensor {list(shape)}, got {got}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected {list(shape)}, got {list(tensor.shape)}")
