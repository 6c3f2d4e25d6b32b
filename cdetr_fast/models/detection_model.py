"""`ConditionalDetrForObjectDetection`: class and box heads on the base model, and their loss."""

from typing import Any

from torch import Tensor, nn

from cdetr_fast.config.model import ConditionalDetrConfig
from cdetr_fast.loss.criterion import detection_loss
from cdetr_fast.loss.targets import Labels
from cdetr_fast.models.base_model import ConditionalDetrModel
from cdetr_fast.models.heads import ConditionalDetrMLPPredictionHead, box_origins, predict_boxes
from cdetr_fast.models.initialization import initialize_detection_heads
from cdetr_fast.models.outputs import (
    ConditionalDetrModelOutput,
    ConditionalDetrObjectDetectionOutput,
    present,
    shared_fields,
)
from cdetr_fast.models.predict import DetectingModel


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
        output = ConditionalDetrObjectDetectionOutput(**found, **shared_fields(outputs))
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
