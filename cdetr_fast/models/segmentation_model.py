"""`ConditionalDetrForSegmentation`: a mask head on the detection model, and its loss."""

from typing import Any

from torch import Tensor

from cdetr_fast.common.scores import kept_queries, upcast
from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.loss.criterion import segmentation_loss
from cdetr_fast.loss.targets import Labels
from cdetr_fast.models.base_model import ImageFeatures
from cdetr_fast.models.detection_model import ConditionalDetrForObjectDetection
from cdetr_fast.models.initialization import initialize_mask_head
from cdetr_fast.models.mask_head import (
    ConditionalDetrMaskHeadSmallConv,
    ConditionalDetrMHAttentionMap,
)
from cdetr_fast.models.outputs import (
    ConditionalDetrModelOutput,
    ConditionalDetrSegmentationOutput,
    present,
    shared_fields,
)
from cdetr_fast.models.predict import SegmentingModel


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
        states, logits, pred_boxes = self._apply_heads(outputs)
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
                *detector.predict_auxiliary(outputs, self._uses_reference_points),
                **({} if num_boxes is None else {"num_boxes": num_boxes}),
            )
        output = ConditionalDetrSegmentationOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=pred_boxes,
            pred_masks=pred_masks,
            auxiliary_outputs=auxiliary_outputs,
            **shared_fields(outputs),
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
        states, logits, pred_boxes = self._apply_heads(outputs)
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

    @property
    def _uses_reference_points(self) -> bool:
        return self.config.compat == "paper"

    def _apply_heads(self, outputs: ConditionalDetrModelOutput) -> tuple[Tensor, Tensor, Tensor]:
        """Return the last decoder states, and the class logits and boxes of all queries."""
        states = present(outputs.last_hidden_state)
        points = outputs.reference_points if self._uses_reference_points else None
        return states, *self.conditional_detr.predict_from(states, points)

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
