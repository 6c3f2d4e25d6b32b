"""Results of `predict`: objects of an image with scores, classes, boxes and masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torchvision.ops import box_convert

from cdetr_fast.images.batch_feature import BatchFeature
from cdetr_fast.images.detections import detections
from cdetr_fast.images.segments import Segments, coco_rle, segments

if TYPE_CHECKING:
    import supervision
    from PIL import Image

    from cdetr_fast.images.load import ImageInput


@dataclass(frozen=True, eq=False, repr=False)
class DetectionResult:
    """The objects of one image, best first, on the CPU.

    Attributes:
        scores: fp32 `[n]` in [0, 1].
        labels: Class indices int64 `[n]`.
        boxes_xyxy: fp32 `[n, 4]`: left, top, right, bottom in pixels of the upright image.
        image_hw: Height and width of the image.
        id2label: Class names.
    """

    scores: Tensor
    labels: Tensor
    boxes_xyxy: Tensor
    image_hw: tuple[int, int]
    id2label: Mapping[int, str]

    def __post_init__(self) -> None:
        shape = (len(self.labels), 4)
        if self.scores.shape != self.labels.shape or self.boxes_xyxy.shape != shape:
            got = [list(t.shape) for t in (self.scores, self.labels, self.boxes_xyxy)]
            raise ValueError(f"scores, labels, boxes_xyxy: expected [n], [n], [n, 4], got {got}")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def names(self) -> list[str]:
        """Class name of each object; its number if it has no name."""
        return [self.id2label.get(label, str(label)) for label in self.labels.tolist()]

    def __repr__(self) -> str:
        height, width = self.image_hw
        return f"<{type(self).__name__}: {len(self)} objects in {width} x {height} pixels>"

    def __str__(self) -> str:
        boxes_xywh = box_convert(self.boxes_xyxy, "xyxy", "xywh").tolist()
        lines = [
            f"{score:.2f} {name} at {left:.0f}, {top:.0f}, {width:.0f} x {height:.0f} pixels"
            for score, name, (left, top, width, height) in zip(
                self.scores.tolist(), self.names, boxes_xywh, strict=True
            )
        ]
        return "\n".join(lines) or "nothing found"

    def above(self, threshold: float) -> Self:
        """Return the objects with a score above a threshold."""
        return self._select(self.scores > threshold)

    def _select(self, keep: Tensor) -> Self:
        return replace(
            self,
            scores=self.scores[keep],
            labels=self.labels[keep],
            boxes_xyxy=self.boxes_xyxy[keep],
        )

    def to_supervision(self) -> supervision.Detections:
        """Return the objects as `supervision.Detections`, with `class_name` among their data.

        Raises:
            ImportError: supervision is not installed.
        """
        import numpy as np

        try:
            from supervision import Detections
        except ImportError as error:
            raise ImportError(
                "to_supervision needs supervision: pip install supervision"
            ) from error
        return Detections(
            xyxy=self.boxes_xyxy.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str)},
            **self._supervision_fields(),
        )

    def _supervision_fields(self) -> dict[str, Any]:
        return {}

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """Return the objects in COCO's results form, which `json` can write.

        Args:
            image_id: The image's id in the annotations.

        Returns:
            One dictionary per object: `image_id`, `category_id` (the label), `bbox` (left, top,
            width, height in pixels) and `score`; for segments also `segmentation`, compressed run
            lengths.

        Raises:
            ImportError: Segments without pycocotools.
        """
        boxes_xywh = box_convert(self.boxes_xyxy.double(), "xyxy", "xywh").tolist()
        rows = zip(boxes_xywh, self.labels.tolist(), self.scores.tolist(), strict=True)
        return [
            {
                "image_id": image_id,
                "category_id": label,
                "bbox": [round(v, 3) for v in box],
                "score": round(score, 6),
            }
            for box, label, score in rows
        ]

    def draw(self, image: ImageInput) -> Image.Image:
        """Draw boxes, class names and scores on a copy of the image.

        Args:
            image: What `predict` got, or the same picture in another resolution.

        Raises:
            OSError: The file cannot be read; the message names it.
            ValueError: There are several images.
        """
        from cdetr_fast.images.draw import draw_detections
        from cdetr_fast.images.load import as_picture

        image = as_picture(image)
        scale = self.boxes_xyxy.new_tensor(
            [image.width / self.image_hw[1], image.height / self.image_hw[0]]
        )
        boxes_xyxy = self.boxes_xyxy * scale.repeat(2)
        return draw_detections(image, boxes_xyxy, self.labels, self.scores, self.id2label)


@dataclass(frozen=True, eq=False, repr=False)
class SegmentationResult(DetectionResult):
    """The segments of one image, in the order of their ids, on the CPU.

    Attributes:
        segmentation: int32 `[H, W]`: the id of the segment of each pixel, 0 for none.
        segment_ids: The id of each segment.
    """

    segmentation: Tensor
    segment_ids: list[int]

    @property
    def masks(self) -> Tensor:
        """The pixels of each segment, bool `[n, H, W]`, without overlaps."""
        ids = self.segmentation.new_tensor(self.segment_ids, dtype=torch.int32)
        return self.segmentation == ids[:, None, None]

    def _select(self, keep: Tensor) -> Self:
        ids = [i for i, kept in zip(self.segment_ids, keep.tolist(), strict=True) if kept]
        return replace(super()._select(keep), segment_ids=ids)

    def _supervision_fields(self) -> dict[str, Any]:
        return {"mask": self.masks.numpy()}

    def to_coco(self, image_id: int | str) -> list[dict[str, Any]]:
        """As `DetectionResult.to_coco`."""
        codes = coco_rle(self.segmentation, self.segment_ids)
        objects = super().to_coco(image_id)
        return [item | {"segmentation": code} for item, code in zip(objects, codes, strict=True)]

    def draw(self, image: ImageInput) -> Image.Image:
        """Tint the segments on a copy of the image, with class names and scores.

        Args:
            image: What `predict` got.

        Raises:
            OSError: The file cannot be read; the message names it.
            ValueError: There are several images, or one of another size.
        """
        from cdetr_fast.images.draw import draw_masks
        from cdetr_fast.images.load import as_picture

        infos = [
            {"id": segment_id, "label_id": label, "score": score}
            for segment_id, label, score in zip(
                self.segment_ids, self.labels.tolist(), self.scores.tolist(), strict=True
            )
        ]
        return draw_masks(as_picture(image), self.segmentation, infos, self.id2label)


def detection_results(
    outputs: Any,
    sizes_hw: Sequence[tuple[int, int]],
    id2label: Mapping[int, str],
    *,
    threshold: float,
    top_k: int,
) -> list[DetectionResult]:
    """Turn the outputs for a batch into results, with one transfer from the device.

    Args:
        outputs: Has `logits` `[B, Q, K]` and `pred_boxes` `[B, Q, 4]`.
        sizes_hw: Height and width of each image.
        id2label: Class names.
        threshold: Detections with a score above it are returned.
        top_k: Most detections per image.
    """
    found = detections(outputs, threshold, sizes_hw, top_k, return_tensors="pt")
    assert isinstance(found, BatchFeature)
    found = found.to("cpu")
    return [
        DetectionResult(
            found["scores"][image, :count],
            found["labels"][image, :count],
            found["boxes"][image, :count],
            size_hw,
            id2label,
        )
        for image, (count, size_hw) in enumerate(
            zip(found["counts"].tolist(), sizes_hw, strict=True)
        )
    ]


def segmentation_results(
    outputs: Any,
    sizes_hw: Sequence[tuple[int, int]],
    id2label: Mapping[int, str],
    *,
    compat: str,
    threshold: float,
    mask_threshold: float,
    overlap_mask_area_threshold: float,
    labels_to_fuse: Collection[int],
) -> list[SegmentationResult]:
    """Turn the outputs for a batch into results; the box of a fused segment encloses its parts.

    Args:
        outputs: Has `logits` `[B, Q, K]`, `pred_boxes` `[B, Q, 4]` and `pred_masks` `[B, Q, h, w]`.
        sizes_hw: Height and width of each image.
        id2label: Class names.
        compat: "paper" or "transformers".
        threshold: Score above which a query is kept.
        mask_threshold: Probability from which on a pixel is in a mask.
        overlap_mask_area_threshold: Share of its mask above which a query has to get its pixels.
        labels_to_fuse: Classes whose parts become one segment.
    """
    found = segments(
        outputs,
        threshold,
        mask_threshold,
        overlap_mask_area_threshold,
        labels_to_fuse,
        sizes_hw,
        compat,
    )
    boxes_xyxy = box_convert(outputs.pred_boxes.cpu(), "cxcywh", "xyxy")
    return [
        _segmentation_result(image, boxes, size_hw, id2label)
        for image, boxes, size_hw in zip(found, boxes_xyxy, sizes_hw, strict=True)
    ]


def _segmentation_result(
    found: Segments,
    boxes_xyxy: Tensor,
    size_hw: tuple[int, int],
    id2label: Mapping[int, str],
) -> SegmentationResult:
    height, width = size_hw
    boxes_xyxy = boxes_xyxy * boxes_xyxy.new_tensor([width, height, width, height])
    parts = [boxes_xyxy[queries] for queries in found.queries]
    boxes = [torch.cat((part[:, :2].amin(0), part[:, 2:].amax(0))) for part in parts]
    infos = found.infos
    return SegmentationResult(
        torch.tensor([info["score"] for info in infos], device="cpu"),
        torch.tensor([info["label_id"] for info in infos], dtype=torch.int64, device="cpu"),
        torch.stack(boxes) if boxes else torch.zeros(0, 4, device="cpu"),
        size_hw,
        id2label,
        found.segmentation.clamp_(min=0).cpu(),
        [info["id"] for info in infos],
    )
