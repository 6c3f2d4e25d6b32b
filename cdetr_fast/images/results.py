"""What `predict` returns for an image: objects with scores, classes, boxes and masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from cdetr_fast.images.segments import coco_rle

if TYPE_CHECKING:
    import supervision
    from PIL import Image


@dataclass(frozen=True, eq=False, repr=False)
class DetectionResult:
    """The objects found in one image, best first, on the CPU.

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
        """Class name of each object; the number where there is no name."""
        return [self.id2label.get(label, str(label)) for label in self.labels.tolist()]

    def __repr__(self) -> str:
        height, width = self.image_hw
        return f"<{type(self).__name__}: {len(self)} objects in {width} x {height} pixels>"

    def __str__(self) -> str:
        lines = [
            f"{score:.2f} {name} at {left:.0f}, {top:.0f}, "
            f"{right - left:.0f} x {bottom - top:.0f} pixels"
            for score, name, (left, top, right, bottom) in zip(
                self.scores.tolist(), self.names, self.boxes_xyxy.tolist(), strict=True
            )
        ]
        return "\n".join(lines) or "nothing found"

    def above(self, threshold: float) -> Self:
        """Returns the objects with a score above a threshold."""
        return self._select(self.scores > threshold)

    def _select(self, keep: Tensor) -> Self:
        return replace(
            self,
            scores=self.scores[keep],
            labels=self.labels[keep],
            boxes_xyxy=self.boxes_xyxy[keep],
        )

    def to_supervision(self) -> supervision.Detections:
        """Returns the objects as `supervision.Detections`, with `class_name` among their data.

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
        """Returns the objects in COCO's results form, which `json` can write.

        Args:
            image_id: The image's id in the annotations.

        Returns:
            One dictionary an object: `image_id`, `category_id` (the label), `bbox` (left, top,
            width, height in pixels) and `score`; for segments also `segmentation`, compressed run
            lengths.

        Raises:
            ImportError: Segments without pycocotools.
        """
        rows = zip(
            self.boxes_xyxy.tolist(), self.labels.tolist(), self.scores.tolist(), strict=True
        )
        return [
            {
                "image_id": image_id,
                "category_id": label,
                "bbox": [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)],
                "score": round(score, 6),
            }
            for (x0, y0, x1, y1), label, score in rows
        ]

    def draw(self, image: Image.Image) -> Image.Image:
        """Draws boxes, class names and scores on a copy of the image.

        Args:
            image: The image, upright; of the result's size or a multiple of it.
        """
        from cdetr_fast.images.draw import draw_detections

        scale = torch.tensor([image.width / self.image_hw[1], image.height / self.image_hw[0]])
        boxes_xyxy = self.boxes_xyxy * scale.repeat(2)
        return draw_detections(image, boxes_xyxy, self.labels, self.scores, self.id2label)


@dataclass(frozen=True, eq=False, repr=False)
class SegmentationResult(DetectionResult):
    """The segments found in one image, in the order of their ids, on the CPU.

    Attributes:
        segmentation: int32 `[H, W]`: the id of the segment that a pixel belongs to, else 0.
        segment_ids: The id of each segment.
    """

    segmentation: Tensor
    segment_ids: list[int]

    @property
    def masks(self) -> Tensor:
        """The pixels of each segment, bool `[n, H, W]`; no pixel is in two of them."""
        ids = torch.tensor(self.segment_ids, dtype=torch.int32)
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

    def draw(self, image: Image.Image) -> Image.Image:
        """Tints the segments on a copy of the image, with class names and scores.

        Args:
            image: The image, upright, of the result's size.
        """
        from cdetr_fast.images.draw import draw_masks

        infos = [
            {"id": segment_id, "label_id": label, "score": score}
            for segment_id, label, score in zip(
                self.segment_ids, self.labels.tolist(), self.scores.tolist(), strict=True
            )
        ]
        return draw_masks(image, self.segmentation, infos, self.id2label)
