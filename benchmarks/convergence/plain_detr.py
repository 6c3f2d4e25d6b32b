"""DETR with plain cross-attention, as a model that `cdetr_fast.training` trains.

transformers' `DetrForObjectDetection` as its authors have it. Three things are put right, as they
would decide the comparison: the decoder's normed states are only read out (with `auxiliary_loss`
transformers feeds them to the next layer and norms them again), initial weights are the authors'
(transformers draws all from N(0, 0.02)), and the backbone is that of our model (in
transformers frozen norms lose the activations that timm fuses with them).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection
from transformers.loss.loss_for_object_detection import ForObjectDetectionLoss
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

import cdetr_fast
from cdetr_fast.loss.criterion import detection_loss
from cdetr_fast.models.backbone import ConditionalDetrConvEncoder

SHARED = (
    *("num_queries", "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads"),
    *("decoder_attention_heads", "encoder_ffn_dim", "decoder_ffn_dim", "dropout"),
    *("attention_dropout", "activation_dropout", "activation_function", "bbox_cost", "giou_cost"),
    *("bbox_loss_coefficient", "giou_loss_coefficient", "id2label", "label2id", "num_channels"),
)
"""Fields of both configurations, which get the same values."""


class PlainDetr(DetrForObjectDetection):
    """DETR with its own loss: softmax over the classes and "no object", which weighs 0.1."""

    def __init__(self, config: DetrConfig) -> None:
        config.auxiliary_loss = False  # of the decoder; the states are collected below
        super().__init__(config)
        given: Any = config.backbone_config
        backbone = given.to_dict() | {"use_pretrained_backbone": False}
        self.paper = cdetr_fast.ConditionalDetrConfig(
            **{name: getattr(config, name) for name in SHARED},
            backbone_config=backbone,
            auxiliary_loss=True,
        )
        self.model.backbone.model = ConditionalDetrConvEncoder(self.paper).model
        self.states: list[Tensor] = []
        for layer in self.model.decoder.layers:
            layer.register_forward_hook(lambda module, inputs, state: self.states.append(state))
        self.reset_to_authors()

    @torch.no_grad()
    def reset_to_authors(self) -> None:
        """Draw weights as the authors' models/transformer.py and models/detr.py do."""
        for part in (self.model.encoder, self.model.decoder):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    module.reset_parameters()
                    nn.init.xavier_uniform_(module.weight)
            for module in part.modules():
                # q, k, v are one [3C, C] matrix there, whose bound is smaller.
                if hasattr(module, "q_proj"):
                    for projection in (module.q_proj, module.k_proj, module.v_proj):
                        bound = math.sqrt(6 / (4 * projection.in_features))
                        nn.init.uniform_(projection.weight, -bound, bound)
                    for projection in module.children():
                        nn.init.zeros_(projection.bias)
        heads = [self.class_labels_classifier, *self.bbox_predictor.layers]
        for module in (self.model.input_projection, *heads):
            module.reset_parameters()
        nn.init.normal_(self.model.query_position_embeddings.weight)

    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        num_boxes: Tensor | None = None,
    ) -> DetrObjectDetectionOutput:
        """Return outputs with the names and meanings of ours; see `scores`."""
        self.states.clear()
        images = pixel_values.contiguous(memory_format=torch.channels_last)
        self.model(images, pixel_mask)
        states = self.model.decoder.layernorm(torch.stack(self.states))
        logits = self.class_labels_classifier(states)
        boxes = self.bbox_predictor(states).sigmoid()
        if labels is None:
            return DetrObjectDetectionOutput(logits=self.scores(logits[-1]), pred_boxes=boxes[-1])
        loss, parts, auxiliary = self.criterion(logits, boxes, labels, num_boxes)
        return DetrObjectDetectionOutput(
            loss=loss,
            loss_dict=parts,
            logits=logits[-1],
            pred_boxes=boxes[-1],
            auxiliary_outputs=auxiliary,
        )

    def scores(self, logits: Tensor) -> Tensor:
        """Return what our evaluation takes the sigmoid of: softmax scores without "no object"."""
        log_p = logits.log_softmax(-1)[..., :-1].clamp(max=-1e-7)
        return log_p - torch.log(-torch.expm1(log_p))

    def criterion(self, logits: Tensor, boxes: Tensor, labels: list, num_boxes: Any) -> tuple:
        """Return DETR's loss of all layers, which counts the boxes itself."""
        self.config.auxiliary_loss = True
        result = ForObjectDetectionLoss(
            logits[-1], labels, logits.device, boxes[-1], self.config, logits, boxes
        )
        self.config.auxiliary_loss = False
        return result


class PlainDetrFocal(PlainDetr):
    """The same with the loss and matching of Conditional DETR: only attention and boxes differ."""

    def reset_to_authors(self) -> None:
        """Also give the class head, without "no object", the prior of the focal loss."""
        self.class_labels_classifier = nn.Linear(self.config.d_model, self.config.num_labels or 0)
        super().reset_to_authors()
        nn.init.constant_(self.class_labels_classifier.bias, -math.log(99))

    def scores(self, logits: Tensor) -> Tensor:
        """Return the logits, whose sigmoid is the score."""
        return logits

    def criterion(self, logits: Tensor, boxes: Tensor, labels: list, num_boxes: Any) -> tuple:
        """Return Conditional DETR's loss of all layers."""
        return detection_loss(
            logits[-1], labels, logits.device, boxes[-1], self.paper, logits, boxes, num_boxes
        )


def plain_counterpart(ours: nn.Module, kind: type[PlainDetr], seed: int) -> PlainDetr:
    """Return a DETR of the sizes of our model, with its backbone's weights.

    Args:
        ours: A detection model.
        kind: `PlainDetr` or `PlainDetrFocal`.
        seed: Of the other weights.
    """
    source: Any = ours.config
    backbone = {
        "model_type": "timm_backbone",
        "backbone": source.backbone_config.backbone,
        "out_indices": list(source.backbone_config.out_indices),
        "num_channels": source.num_channels,
        "features_only": True,
        "use_pretrained_backbone": False,
    }
    shared = {name: getattr(source, name) for name in SHARED}
    torch.manual_seed(seed)
    model = kind(DetrConfig(**shared, backbone_config=backbone))
    detectors: tuple[Any, Any] = (ours, model)
    own, other = (detector.model.backbone.model for detector in detectors)
    other.load_state_dict(own.state_dict())
    for mine, its in zip(own.parameters(), other.parameters(), strict=True):
        its.requires_grad_(mine.requires_grad)
    return model.float().train()
