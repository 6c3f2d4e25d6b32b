"""`ConditionalDetrImageProcessor`: batches from images and annotations, results from outputs."""

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cdetr_fast.images import detections as post_processing
from cdetr_fast.images import segments as segmentation
from cdetr_fast.images import targets
from cdetr_fast.images.batch_feature import BatchFeature
from cdetr_fast.images.load import ImageInput, image_hw, load_images
from cdetr_fast.images.resize import (
    batch_size_hw,
    normalized_batch,
    padded_batch,
    resized,
    resized_hw,
)
from cdetr_fast.images.settings import StoredSettings, without_deprecated


class ConditionalDetrImageProcessor(StoredSettings):
    """Prepare images and their annotations for the model, and read its outputs.

    Every argument is also an attribute that can be set, and can be overridden in a call. None means
    the default.

    Args:
        format: Format of annotations, "coco_detection" or "coco_panoptic".
        do_resize: Whether to resize.
        size: A form of `resized_hw`: by default {"shortest_edge": 800, "longest_edge": 1333}. A
            pair is (height, width); an integer is the shortest edge, with a longest one of 1333.
        resample: Filter, a `PIL.Image.Resampling` or its number; bilinear by default.
        do_rescale: Whether to multiply pixels by `rescale_factor`. Floats in [0, 1] want False.
        rescale_factor: 1/255 by default.
        do_normalize: Whether to subtract `image_mean` and divide by `image_std`.
        image_mean: One value, or one per channel, after rescaling; ImageNet's by default.
        image_std: Likewise.
        do_convert_annotations: Whether boxes become (centre, size) in [0, 1]; else they stay
            corners in pixels. As `do_normalize` by default.
        do_pad: Whether to pad at the bottom and on the right to one size, and return `pixel_mask`.
        pad_size: {"height", "width"} of the batch; the largest image's by default.
        do_convert_rgb: None converts to RGB and drops transparency, True lays transparent images
            over white, False keeps the channels. (None in transformers is False here.)
        data_format: "channels_last" returns `[B, H, W, 3]`. (transformers' torchvision path ignores
            it.)
        input_data_format: Layout of arrays and tensors; inferred by default.
        device: Where to compute; by default where an image is.
        return_tensors: "np" returns numpy arrays, "pt" and None torch tensors.
        disable_grouping: Whether to process images of one shape one by one; by default on CPUs.
        compat: "paper", or "transformers" for the segmentation functions' errors there (see each).
        max_size: Deprecated: longest edge for an integer `size`.
        pad_and_return_pixel_mask: Deprecated name of `do_pad`.

    Raises:
        TypeError: An argument is unknown or has the wrong type.
        ValueError: An argument is out of range.
    """

    model_input_names = ("pixel_values", "pixel_mask")

    def __call__(self, images: ImageInput, *args: Any, **kwargs: Any) -> BatchFeature:
        """Call `preprocess`."""
        return self.preprocess(images, *args, **kwargs)

    def preprocess(
        self,
        images: ImageInput,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> BatchFeature:
        """Turn images, and their annotations, into model inputs.

        PIL images and files are turned upright by their EXIF orientation (with a warning for a PIL
        image that has annotations, or whose sides are swapped: sizes and annotations then refer to
        the upright image) and converted to RGB; transformers does so for files only. Arrays whose
        range is not that of 8 bits are refused (integers) or warned of (floats).

        Args:
            images: PIL images, `[H, W]`, `[C, H, W]` or `[H, W, C]` arrays or tensors (1, 3 or 4
                channels), paths, URLs or the bytes of files; one, a list, nested lists, or a 4-d
                batch.
            annotations: One COCO annotation per image: {"image_id", "annotations"}, or {"image_id",
                "file_name", "segments_info"} for "coco_panoptic". Crowds among detections are
                skipped.
            return_segmentation_masks: Whether labels have `masks`; by default for panoptic ones
                only.
            masks_path: Folder of the panoptic PNG files.
            **overrides: Arguments of the class, for this call.

        Returns:
            `pixel_values` fp32 `[B, 3, H, W]`; with `do_pad`, `pixel_mask` int64 `[B, H, W]`, 1 at
            pixels of the image; with `annotations`, `labels`: per image `class_labels` `[T]`,
            `boxes` `[T, 4]`, `area` `[T]`, `iscrowd` `[T]`, `image_id` `[1]`, `orig_size` and
            `size` `[2]`, and `masks` bool `[T, H, W]`.

        Raises:
            TypeError: An image or argument has the wrong type.
            ValueError: An image, annotation or argument does not fit, or sizes differ without
                `do_pad`.
            ImportError: Masks of polygons are asked for and pycocotools is missing.
        """
        settings = self.with_overrides(without_deprecated(overrides), "preprocess")
        tensors = load_images(
            images,
            settings.do_convert_rgb,
            settings.input_data_format,
            settings.device,
            warn_if_turned=annotations is not None,
            rescale_factor=settings.rescale_factor if settings.do_rescale else None,
        )
        labels: list[targets.Target] | None = None
        if annotations is not None:
            given = [annotations] if isinstance(annotations, Mapping) else list(annotations)
            if len(given) != len(tensors):
                raise ValueError(
                    f"annotations: expected {len(tensors)}, one per image, got {len(given)}"
                )
            labels = [
                targets.prepare_target(
                    label,
                    image_hw(image),
                    settings.format,
                    return_segmentation_masks,
                    masks_path,
                    name=f"annotations[{i}]",
                )
                for i, (image, label) in enumerate(zip(tensors, given, strict=True))
            ]

        pixel_values, pixel_mask, new_sizes = _to_batch(tensors, settings)
        batch_hw = image_hw(pixel_values)
        if settings.data_format == "channels_last":
            pixel_values = pixel_values.permute(0, 2, 3, 1)
        features = BatchFeature({"pixel_values": pixel_values})
        if pixel_mask is not None:
            features["pixel_mask"] = pixel_mask
        if labels is not None:
            relative = bool(settings.do_convert_annotations)
            features["labels"] = []
            for label, image, new_hw in zip(labels, tensors, new_sizes, strict=True):
                if settings.do_resize:
                    label = targets.resize_target(label, image_hw(image), new_hw)
                if relative:
                    label = targets.normalize_target(label, new_hw)
                label = targets.pad_target(label, new_hw, batch_hw, update_boxes=relative)
                features["labels"].append(BatchFeature(label).to(pixel_values.device))
        return features.numpy() if settings.return_tensors == "np" else features

    def to_batch(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Resize, normalise and pad images that are loaded already.

        Args:
            images: Tensors `[C, H, W]`, as `load_images` returns them.

        Returns:
            `pixel_values` `[B, C, H, W]`; with `do_pad` `pixel_mask` int64 `[B, H, W]`, else None.
        """
        pixel_values, pixel_mask, _ = _to_batch(images, self)
        return pixel_values, pixel_mask

    def resized_hw(self, image: Tensor) -> tuple[int, int]:
        """Return the height and width that an image `[C, H, W]` has in a batch before padding."""
        size_hw = image_hw(image)
        return resized_hw(*size_hw, self.size) if self.do_resize else size_hw

    def pad(
        self,
        image: Tensor | Sequence[Tensor],
        padded_size: tuple[int, int] | None = None,
        annotation: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
        update_bboxes: bool = True,
        fill: float = 0,
        return_tensors: str | None = None,
    ) -> tuple[Tensor, Tensor, Any] | BatchFeature:
        """Pad at the bottom and on the right.

        Args:
            image: `[C, H, W]`, or a batch `[B, C, H, W]`; or, as in transformers 4, a list of
                `[C, H, W]` of different sizes, to be made a batch.
            padded_size: (height, width); for a list the largest image's by default.
            annotation: Targets to adapt: one, or a list for a batch.
            update_bboxes: Whether boxes are relative, and so have to shrink.
            fill: Value of the padding.
            return_tensors: For a list: "np", "pt" or None.

        Returns:
            The padded image, its pixel mask int64 and the annotation; for a list, a `BatchFeature`
            with `pixel_values`, `pixel_mask` and, with `annotation`, `labels`.

        Raises:
            ValueError: `padded_size` is smaller than an image, or missing for a tensor.
        """
        if not isinstance(image, Tensor):
            images = [torch.as_tensor(item) for item in image]
        elif padded_size is None:
            raise ValueError("padded_size: expected (height, width), got None")
        else:
            images = list(image if image.dim() == 4 else image[None])
        sizes = [image_hw(item) for item in images]
        pad_size = padded_size and {"height": padded_size[0], "width": padded_size[1]}
        batch_hw = batch_size_hw(sizes, pad_size)
        pixel_values, pixel_mask = padded_batch(images, batch_hw, fill)

        padded: list[targets.Target] | None = None
        if annotation is not None:
            one_or_more = [annotation] if isinstance(annotation, Mapping) else annotation
            padded = [
                targets.pad_target(target, size, batch_hw, update_bboxes)
                for target, size in zip(one_or_more, sizes, strict=True)
            ]
        if isinstance(image, Tensor):
            if image.dim() == 3:
                pixel_values, pixel_mask = pixel_values[0], pixel_mask[0]
            target = padded[0] if padded and isinstance(annotation, Mapping) else padded
            return pixel_values, pixel_mask, target
        features = BatchFeature({"pixel_values": pixel_values, "pixel_mask": pixel_mask})
        if padded is not None:
            features["labels"] = [BatchFeature(target) for target in padded]
        return features.numpy() if return_tensors == "np" else features

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: post_processing.TargetSizes | None = None,
        top_k: int = 100,
        return_tensors: str | None = None,
    ) -> list[dict[str, Tensor]] | BatchFeature:
        """Turn outputs into detections, best first.

        Args:
            outputs: Has `logits` `[B, Q, K]` and `pred_boxes` `[B, Q, 4]`.
            threshold: Detections with a score above it are returned.
            target_sizes: (height, width) of each original image, `[B, 2]` or a list; None keeps
                boxes in [0, 1].
            top_k: Most detections per image, counted before the threshold.
            return_tensors: "pt" returns tensors of the whole batch, which stay on the device and
                do not synchronise; None returns a list.

        Returns:
            Per image `scores` fp32 `[n]`, `labels` int64 `[n]`, `boxes` fp32 `[n, 4]`, corners in
            pixels. With "pt" one `BatchFeature` of `scores` `[B, k]`, `labels` `[B, k]`, `boxes`
            `[B, k, 4]`, `query_index` int64 `[B, k]` (the query of each) and `counts` int64 `[B]`
            (how many are above the threshold; they come first), k the smaller of `top_k` and Q*K.

        Raises:
            TypeError: `top_k` is not an integer.
            ValueError: A target size is missing or below 1, or `top_k` is below 1.

        Note: ties come by lowest query, NaN logits with score 0; transformers leaves both open.
        """
        return post_processing.detections(outputs, threshold, target_sizes, top_k, return_tensors)

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: post_processing.TargetSizes | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Tensor] | list[BatchFeature]:
        """Turn outputs into a class per pixel, by the sum over queries of class times mask score.

        Args:
            outputs: Has `logits` `[B, Q, K]` and `pred_masks` `[B, Q, h, w]`.
            target_sizes: (height, width) of each map; None keeps h x w.
            return_segmentation_scores: Whether to return the sums too.

        Returns:
            Per image the class of each pixel, int64 `[H, W]`; with `return_segmentation_scores` a
            `BatchFeature` of that as `segmentation` and `segmentation_scores` `[K, H, W]`.

        Raises:
            ValueError: The number of target sizes is not that of the images.

        Note: class scores are sigmoids. transformers (and `compat="transformers"`) takes a softmax
        over classes, which gives every empty query as much weight as a certain one. The mask of a
        padded image covers the padding: process images of different sizes one by one.
        """
        return segmentation.semantic_maps(
            outputs, target_sizes, return_segmentation_scores, self.compat
        )

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: post_processing.TargetSizes | None = None,
        return_coco_annotation: bool | str | None = False,
    ) -> list[dict[str, Any]]:
        """Turn outputs into a map of instances.

        A query with a score (sigmoid of its best class) above `threshold` is kept. A pixel belongs
        to the query with the largest score times mask probability among those whose mask has the
        pixel.

        Args:
            outputs: Has `logits` `[B, Q, K]` and `pred_masks` `[B, Q, h, w]`.
            threshold: Score above which a query is kept.
            mask_threshold: Probability from which on a pixel is in a mask.
            overlap_mask_area_threshold: Share of its mask above which a query has to get its
                pixels.
            target_sizes: (height, width) of each map; None keeps h x w.
            return_coco_annotation: "rle" returns COCO's compressed run lengths, one {"size",
                "counts"} per segment, instead of the map. True, as in transformers: one list
                [start, length, ...] per segment over the rows, starts counted from 1, which no
                COCO tool reads. None is False.

        Returns:
            Per image `segmentation` int32 `[H, W]` (ids from 1, 0 for none; all -1 if no query is
            kept) and `segments_info`: `id`, `label_id`, `was_fused`, `score` of each segment.

        Raises:
            ValueError: The number of target sizes is not that of the images.
            ImportError: "rle" without pycocotools.

        Note: transformers (and `compat="transformers"`) takes a softmax, never returns the last
        class, multiplies mask probabilities by the score before they meet `mask_threshold`, and
        hands pixels outside of every mask to some query: a single object fills its picture. DETR's
        PostProcessSegm also takes `sigmoid > 0.5` of each mask, and returns overlapping masks. The
        mask of a padded image covers the padding: process images of different sizes one by one.
        """
        if return_coco_annotation not in (None, False, True, "rle"):
            raise ValueError(
                "return_coco_annotation: expected True, False or 'rle', "
                f"got {return_coco_annotation!r}"
            )
        found = segmentation.segments(
            outputs,
            threshold,
            mask_threshold,
            overlap_mask_area_threshold,
            (),
            target_sizes,
            self.compat,
        )
        return [
            {
                "segmentation": segmentation.run_lengths(image, return_coco_annotation, self.compat)
                if return_coco_annotation
                else image.segmentation,
                "segments_info": image.infos,
            }
            for image in found
        ]

    def post_process_panoptic_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        label_ids_to_fuse: set[int] | None = None,
        target_sizes: post_processing.TargetSizes | None = None,
    ) -> list[dict[str, Any]]:
        """Turn outputs into a map of things and stuff; as `post_process_instance_segmentation`.

        Args:
            outputs: Has `logits` `[B, Q, K]` and `pred_masks` `[B, Q, h, w]`.
            threshold: Score above which a query is kept.
            mask_threshold: Probability from which on a pixel is in a mask.
            overlap_mask_area_threshold: Share of its mask above which a query has to get its
                pixels.
            label_ids_to_fuse: Classes (stuff) whose parts become one segment, with the best part's
                score; None fuses none.
            target_sizes: (height, width) of each map; None keeps h x w.

        Returns:
            Per image `segmentation` and `segments_info`, as for instances.

        Raises:
            ValueError: The number of target sizes is not that of the images.

        Note: besides what is said for instances, transformers lists each part of a fused class, and
        gives the segments after it ids that are taken. DETR's PostProcessPanoptic hands every pixel
        to some query: so does `mask_threshold=0` with `overlap_mask_area_threshold=0`.
        """
        found = segmentation.segments(
            outputs,
            threshold,
            mask_threshold,
            overlap_mask_area_threshold,
            label_ids_to_fuse or (),
            target_sizes,
            self.compat,
        )
        return [
            {"segmentation": image.segmentation, "segments_info": image.infos} for image in found
        ]


def _to_batch(
    images: Sequence[Tensor], settings: StoredSettings
) -> tuple[Tensor, Tensor | None, list[tuple[int, int]]]:
    """Return pixel values, their mask (None without `do_pad`), and the sizes before padding."""
    images = resized(images, settings)
    sizes = [image_hw(image) for image in images]
    if not settings.do_pad and len(set(sizes)) > 1:
        raise ValueError(f"images: expected one size with do_pad=False, got {sizes}")
    batch_hw = batch_size_hw(sizes, settings.pad_size if settings.do_pad else None)
    pixel_values, pixel_mask = normalized_batch(images, settings, batch_hw)
    return pixel_values, pixel_mask if settings.do_pad else None, sizes


# transformers 4 had a slower and a faster implementation; here both names are one class.
ConditionalDetrImageProcessorFast = ConditionalDetrImageProcessor
ConditionalDetrImageProcessorPil = ConditionalDetrImageProcessor


class ConditionalDetrFeatureExtractor(ConditionalDetrImageProcessor):
    """Deprecated name of `ConditionalDetrImageProcessor`; creating one warns."""

    def __init__(self, **settings: Any) -> None:
        warnings.warn(
            "ConditionalDetrFeatureExtractor is deprecated: use ConditionalDetrImageProcessor",
            FutureWarning,
            stacklevel=2,
        )
        super().__init__(**settings)
