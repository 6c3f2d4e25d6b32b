"""The models: backbone, encoder, decoder and heads composed, behind the API of transformers."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cdetr_fast.common.masks import is_unpadded
from cdetr_fast.common.scores import kept_queries, upcast
from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.loss.criterion import detection_loss, segmentation_loss
from cdetr_fast.loss.targets import Labels
from cdetr_fast.models.backbone import ConditionalDetrConvEncoder
from cdetr_fast.models.decoder import ConditionalDetrDecoder
from cdetr_fast.models.encoder import ConditionalDetrEncoder
from cdetr_fast.models.heads import ConditionalDetrMLPPredictionHead, box_origins, predict_boxes
from cdetr_fast.models.initialization import (
    initialize_detection_heads,
    initialize_mask_head,
    initialize_model,
)
from cdetr_fast.models.mask_head import (
    ConditionalDetrMaskHeadSmallConv,
    ConditionalDetrMHAttentionMap,
)
from cdetr_fast.models.outputs import (
    ConditionalDetrModelOutput,
    ConditionalDetrObjectDetectionOutput,
    ConditionalDetrSegmentationOutput,
    EncoderOutput,
    present,
)
from cdetr_fast.models.position import (
    ConditionalDetrLearnedPositionEmbedding,
    ConditionalDetrSinePositionEmbedding,
    MapPosition,
)
from cdetr_fast.models.predict import DetectingModel, SegmentingModel
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


class ConditionalDetrForObjectDetection(DetectingModel):
    """Conditional DETR with class and box heads.

    Args:
        config: The model's configuration.
    """

    _default_loss = staticmethod(detection_loss)

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        self.model = ConditionalDetrModel(config)
        self.class_labels_classifier = nn.Linear(config.d_model, config.num_labels)
        self.bbox_predictor = ConditionalDetrMLPPredictionHead(
            config.d_model, config.d_model, 4, 3, fp32=True
        )
        initialize_detection_heads(config, self.class_labels_classifier, self.bbox_predictor)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Labels | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_boxes: Tensor | None = None,
        **kwargs: Any,
    ) -> ConditionalDetrObjectDetectionOutput | tuple[Any, ...]:
        """Detect objects; with labels, also compute the loss.

        Args:
            pixel_values: As in `ConditionalDetrModel.forward`; so are the arguments not listed
                here.
            pixel_mask: `[B, H, W]` or None.
            decoder_attention_mask: `[B, Q]` or None.
            encoder_outputs: Memory `[B, S, C]` first, or None.
            inputs_embeds: Refused.
            decoder_inputs_embeds: `[B, Q, C]` or None.
            labels: One dictionary per image, with `class_labels` int64 `[T]`, and `boxes` `[T, 4]`
                as centre and size relative to the image.
            output_attentions: Return attention maps.
            output_hidden_states: Return the layers' states.
            return_dict: Return a `ConditionalDetrObjectDetectionOutput`, else a tuple.
            num_boxes: Number of boxes that the losses are divided by, a scalar, for gradient
                accumulation (see `loss.criterion.detection_loss`); None counts the labels' own.
            **kwargs: What transformers' callers pass to every model, such as `num_items_in_batch`:
                not read.

        Raises:
            TypeError: A dtype does not fit, or a keyword is unknown.
            ValueError: A shape or label does not fit.
        """
        self._check_keywords(kwargs)
        outputs = self.model(
            pixel_values,
            pixel_mask,
            decoder_attention_mask,
            encoder_outputs,
            inputs_embeds,
            decoder_inputs_embeds,
            output_attentions,
            output_hidden_states,
            return_dict=True,
        )
        if labels is None:
            logits, pred_boxes = self.predict_from(
                present(outputs.last_hidden_state), outputs.reference_points
            )
            found: dict[str, Any] = {"logits": logits, "pred_boxes": pred_boxes}
        else:
            found = self.score(self.predict_layers(outputs), labels, num_boxes)
        output = ConditionalDetrObjectDetectionOutput(**found, **_states(outputs))
        return self._output(output, return_dict)

    def predict_layers(self, outputs: ConditionalDetrModelOutput) -> tuple[Tensor, ...]:
        """Apply the heads to everything that has a loss.

        Args:
            outputs: Of `self.model`.

        Returns:
            Without auxiliary loss class logits `[B, Q, K]` and boxes `[B, Q, 4]`; with it those of
            every decoder layer, `[L, B, Q, ...]`; under `compat="transformers"`, which norms the
            last state once more, the last layer's in front of them.
        """
        every_layer = self.predict_every_layer(outputs) if self.config.auxiliary_loss else ()
        if every_layer and self.config.compat == "paper":
            return every_layer
        last = self.predict_from(present(outputs.last_hidden_state), outputs.reference_points)
        return (*last, *every_layer)

    def score(
        self, predictions: tuple[Tensor, ...], labels: Labels, num_boxes: Tensor | None = None
    ) -> dict[str, Any]:
        """Compute the loss of what `predict_layers` returned; other arguments as in `forward`.

        Returns:
            The fields of the output from `loss` to `auxiliary_outputs`.
        """
        logits, pred_boxes = predictions[:2]
        outputs_class, outputs_coord = None, None
        if self.config.auxiliary_loss:
            outputs_class, outputs_coord = predictions[-2:]
            if len(predictions) == 2:
                logits, pred_boxes = outputs_class[-1], outputs_coord[-1]
        loss, loss_dict, auxiliary_outputs = self.loss_function(
            logits,
            labels,
            logits.device,
            pred_boxes,
            self.config,
            outputs_class,
            outputs_coord,
            **({} if num_boxes is None else {"num_boxes": num_boxes}),
        )
        return {
            "loss": loss,
            "loss_dict": loss_dict,
            "logits": logits,
            "pred_boxes": pred_boxes,
            "auxiliary_outputs": auxiliary_outputs,
        }

    def predict_from(
        self, hidden_states: Tensor, reference_points: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Apply the heads.

        Args:
            hidden_states: Layer-normed decoder states `[..., B, Q, C]`.
            reference_points: `[Q, B, 2]`; None predicts boxes without them.

        Returns:
            Class logits `[..., B, Q, K]`, and boxes `[..., B, Q, 4]` in fp32.
        """
        logits = self.class_labels_classifier(hidden_states)
        origins = None if reference_points is None else self.box_origins(reference_points)
        return logits, predict_boxes(self.bbox_predictor, hidden_states, origins)

    def box_origins(self, reference_points: Tensor) -> Tensor:
        """Return what boxes are an offset from, `[Q, B, 2] -> [B|1, Q, 4]`."""
        return box_origins(reference_points.transpose(0, 1))

    def predict_auxiliary(
        self, outputs: ConditionalDetrModelOutput, use_reference_points: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Apply the heads to every decoder layer; (None, None) without auxiliary loss."""
        if not self.config.auxiliary_loss:
            return None, None
        return self.predict_every_layer(outputs, use_reference_points)

    def predict_every_layer(
        self, outputs: ConditionalDetrModelOutput, use_reference_points: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Apply the heads to the states of every decoder layer, `[L, B, Q, ...]`."""
        states = outputs.intermediate_hidden_states
        if states is None:  # layer drop has left out all layers
            states = present(outputs.last_hidden_state)[None]
        reference_points = outputs.reference_points if use_reference_points else None
        return self.predict_from(states, reference_points)


class ConditionalDetrForSegmentation(SegmentingModel):
    """Conditional DETR with class, box and mask heads.

    Under `compat="transformers"` boxes are predicted without their reference points and matched by
    softmax, as transformers does here (its detection class does neither).

    Args:
        config: The model's configuration.
    """

    _default_loss = staticmethod(segmentation_loss)

    def __init__(self, config: ConditionalDetrConfig) -> None:
        super().__init__(config)
        self.conditional_detr = ConditionalDetrForObjectDetection(config)
        backbone = self.conditional_detr.model.backbone
        backbone.read_all_maps()
        channels = backbone.intermediate_channel_sizes
        if len(channels) < 3:
            raise ValueError(
                "backbone_config.out_indices: expected three feature maps or more for "
                f"segmentation, got {len(channels)}"
            )
        self.mask_head = ConditionalDetrMaskHeadSmallConv(
            config.d_model,
            config.encoder_attention_heads,
            channels[2::-1],
            config.activation_function,
        )
        self.bbox_attention = ConditionalDetrMHAttentionMap(
            config.d_model, config.encoder_attention_heads
        )
        initialize_mask_head(config, self.mask_head, self.bbox_attention)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: tuple[Tensor, ...] | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Labels | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_boxes: Tensor | None = None,
        **kwargs: Any,
    ) -> ConditionalDetrSegmentationOutput | tuple[Any, ...]:
        """Detect and segment; arguments as in `ConditionalDetrForObjectDetection.forward`.

        Args:
            pixel_values: `[B, num_channels, H, W]`.
            pixel_mask: `[B, H, W]` or None.
            decoder_attention_mask: `[B, Q]` or None.
            encoder_outputs: Memory `[B, S, C]` first, or None.
            inputs_embeds: Refused.
            decoder_inputs_embeds: `[B, Q, C]` or None.
            labels: As for detection, with `masks` `[T, H, W]` too.
            output_attentions: Return attention maps.
            output_hidden_states: Return the layers' states.
            return_dict: Return a `ConditionalDetrSegmentationOutput`, else a tuple.
            num_boxes: As for detection.
            **kwargs: As for detection.
        """
        self._check_keywords(kwargs)
        detector = self.conditional_detr
        if inputs_embeds is not None:
            raise ValueError(
                "inputs_embeds: expected None, as masks need the backbone's maps, "
                f"got {list(inputs_embeds.shape)}"
            )
        features = detector.model.embed_images(pixel_values, pixel_mask)
        outputs = detector.model.transform(
            features,
            decoder_attention_mask,
            encoder_outputs,
            decoder_inputs_embeds,
            output_attentions,
            output_hidden_states,
        )
        use_reference_points = self.config.compat == "paper"
        states = present(outputs.last_hidden_state)
        logits, pred_boxes = detector.predict_from(
            states, outputs.reference_points if use_reference_points else None
        )
        pred_masks = self._masks_of(states, outputs, features)
        loss, loss_dict, auxiliary_outputs = None, None, None
        if labels is not None:
            loss, loss_dict, auxiliary_outputs = self.loss_function(
                logits,
                labels,
                pixel_values.device,
                pred_boxes,
                pred_masks,
                self.config,
                *detector.predict_auxiliary(outputs, use_reference_points),
                **({} if num_boxes is None else {"num_boxes": num_boxes}),
            )
        output = ConditionalDetrSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=pred_boxes,
            pred_masks=pred_masks,
            auxiliary_outputs=auxiliary_outputs,
            **_states(outputs),
        )
        return self._output(output, return_dict)

    def forward_kept(
        self, pixel_values: Tensor, pixel_mask: Tensor | None, threshold: float
    ) -> ConditionalDetrSegmentationOutput:
        """Segment with only the queries whose score is above a threshold.

        Args:
            pixel_values: `[B, num_channels, H, W]`.
            pixel_mask: `[B, H, W]` or None.
            threshold: Of the score by which segmentation post-processing keeps queries.

        Returns:
            `logits`, `pred_boxes` and `pred_masks` of the q queries of the image that has most,
            those above the threshold first, in their order.
        """
        detector = self.conditional_detr
        features = detector.model.embed_images(pixel_values, pixel_mask)
        outputs = detector.model.transform(features)
        use_reference_points = self.config.compat == "paper"
        states = present(outputs.last_hidden_state)
        logits, pred_boxes = detector.predict_from(
            states, outputs.reference_points if use_reference_points else None
        )
        queries = kept_query_indices(logits, threshold, self.config.compat)
        logits, pred_boxes, states = (
            tensor.take_along_dim(queries, dim=1) for tensor in (logits, pred_boxes, states)
        )
        if queries.shape[1]:
            pred_masks = self._masks_of(states, outputs, features)
        else:
            pred_masks = logits.new_zeros(len(logits), 0, *features.maps[0].shape[-2:])
        return ConditionalDetrSegmentationOutput(
            logits=logits, pred_boxes=pred_boxes, pred_masks=pred_masks
        )

    def _masks_of(
        self, states: Tensor, outputs: ConditionalDetrModelOutput, features: ImageFeatures
    ) -> Tensor:
        """Return mask logits `[B, q, H/4, W/4]` of decoder states `[B, q, C]`."""
        attention_maps = self.bbox_attention(
            states, present(outputs.encoder_last_hidden_state), features.mask
        )
        return self.mask_head(
            features.projected,
            attention_maps.unflatten(-1, features.projected.shape[-2:]),
            features.maps[2::-1],
        )


def kept_query_indices(logits: Tensor, threshold: float, compat: str) -> Tensor:
    """Return the indices `[B, q, 1]` of the queries above a threshold; see `forward_kept`."""
    _, _, keep = kept_queries(upcast(logits), threshold, compat)
    count = int(keep.sum(dim=1).amax())
    return (~keep).int().argsort(dim=1, stable=True)[:, :count, None]


def _states(outputs: ConditionalDetrModelOutput) -> dict[str, Any]:
    """Return the fields that the heads pass on from the model's output."""
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
