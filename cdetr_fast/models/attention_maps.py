"""`draw_attention`: the decoder's cross-attention over a photograph, as in the paper's figures."""

import operator
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from cdetr_fast.common.scores import kept_queries, upcast
from cdetr_fast.common.validation import PositiveInt, Probability, checked
from cdetr_fast.images import ConditionalDetrImageProcessor
from cdetr_fast.images.draw import draw_heatmap
from cdetr_fast.images.load import ImageInput, image_hw
from cdetr_fast.models.modeling import (
    ConditionalDetrForObjectDetection,
    ConditionalDetrForSegmentation,
)
from cdetr_fast.models.outputs import present
from cdetr_fast.models.predict import evaluating, is_single


@torch.inference_mode()
def draw_attention(
    model: ConditionalDetrForObjectDetection | ConditionalDetrForSegmentation,
    image: ImageInput,
    queries: Iterable[int] | None = None,
    *,
    threshold: float = 0.5,
    layer: int = -1,
    size: int = 480,
) -> list[list[Image.Image]]:
    """Draw the cross-attention of object queries over an image, one picture per head.

    Each picture shows where in the image one head of the query reads, with the query's predicted
    box as a rectangle and its reference point as a dot. The brightest colour is the largest of the
    head's weights. In a trained model the heads look at the object's extremities and inside it.

    The model's own forward runs, in evaluation and inference mode, also in a model that `optimize`
    returned: only it computes attention maps.

    Args:
        model: A detection or segmentation model of this package. `model.image_processor` prepares
            the image.
        image: One image of any kind that `predict` takes.
        queries: Indices of object queries, in the order of the pictures. None draws the queries
            with a score above `threshold`, best first.
        threshold: From 0 to 1; not read if `queries` is given.
        layer: Index of the decoder layer; negative ones count from the last.
        size: Longer side of each picture in pixels.

    Returns:
        One list per query with a picture per head, of the upright image's aspect ratio;
        `cdetr_fast.images.draw.contact_sheet` puts pictures on one sheet.

    Raises:
        TypeError: The model is of another class, or an argument of another type.
        ValueError: There are several images, or a query or layer that the model does not have.
        OSError: The image's file cannot be read; the message names it.

    Source: figure 1 and section 3.4 of the paper (Meng et al., ICCV 2021).
    """
    if not isinstance(model, ConditionalDetrForObjectDetection | ConditionalDetrForSegmentation):
        got = f"{type(model).__module__}.{type(model).__name__}"
        raise TypeError(
            "model: expected cdetr_fast.ConditionalDetrForObjectDetection or "
            f"ConditionalDetrForSegmentation, got {got}; load the checkpoint with one of these"
        )
    if not is_single(image):
        raise ValueError("image: expected one image, got several; call draw_attention for each")
    checked(Probability, threshold, "threshold")
    checked(PositiveInt, size, "size")
    layers = model.config.decoder_layers
    if not -layers <= checked(int, layer, "layer") < layers:
        raise ValueError(f"layer: expected {-layers} to {layers - 1}, got {layer}")
    if queries is not None:
        try:
            queries = [operator.index(query) for query in queries]
        except TypeError as error:
            raise TypeError(f"queries: expected a list of indices, got {queries!r}") from error
        for query in queries:
            if not 0 <= query < model.config.num_queries:
                last = model.config.num_queries - 1
                raise ValueError(f"queries: expected indices from 0 to {last}, got {query}")

    pixels = model._read(image, 0)
    batch = model._batch([pixels])
    is_detector = isinstance(model, ConditionalDetrForObjectDetection)
    detector: Any = model if is_detector else model.conditional_detr
    with evaluating(model):
        features = detector.model.embed_images(batch.pixel_values, batch.pixel_mask)
        outputs = detector.model.transform(features, output_attentions=True)
        uses_points = is_detector or model.config.compat == "paper"
        points = present(outputs.reference_points)  # [Q, 1, 2]
        logits, boxes_cxcywh = detector.predict_from(
            present(outputs.last_hidden_state), points if uses_points else None
        )
    # Detection scores are sigmoids under either `compat`.
    scores, labels, keep = (
        values[0].cpu()
        for values in kept_queries(
            upcast(logits), threshold, "paper" if is_detector else model.config.compat
        )
    )
    if queries is None:
        order = scores.argsort(descending=True, stable=True)
        queries = order[keep[order]].tolist()

    assert outputs.cross_attentions is not None
    map_hw = image_hw(features.projected)
    maps = outputs.cross_attentions[layer][0].unflatten(-1, map_hw)  # [N, Q, h, w]
    mask = None if features.mask is None else features.mask[0].unflatten(-1, map_hw)
    weights = _over_padding(maps[:, queries].float().cpu(), mask)
    extent = _extent(batch.pixel_mask, image_hw(batch.pixel_values), map_hw)
    picture = _picture(pixels, model.image_processor, size)
    to_pixels = torch.tensor([picture.width, picture.height], device="cpu")
    boxes_xyxy = box_convert(boxes_cxcywh[0].cpu(), "cxcywh", "xyxy") * to_pixels.repeat(2)
    points_xy = points[:, 0].cpu() * to_pixels
    rows = []
    for position, query in enumerate(queries):
        label = int(labels[query])
        name = model.config.id2label.get(label, str(label))
        rows.append(
            [
                draw_heatmap(
                    picture,
                    head_weights,
                    extent,
                    boxes_xyxy[query].tolist(),
                    points_xy[query].tolist(),
                    label,
                    f"{name} {float(scores[query]):.2f}, head {head}",
                )
                for head, head_weights in enumerate(weights[:, position])
            ]
        )
    return rows


def _over_padding(maps: Tensor, mask: Tensor | None) -> np.ndarray:
    """Continue maps `[..., h, w]` over the padding, so that no edge darkens when it is resized.

    Args:
        maps: fp32 on the CPU.
        mask: bool `[h, w]`, True = unpadded: a rectangle in the upper left corner; or None.
    """
    values = maps.numpy()
    if mask is None:
        return values
    height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
    below, right = values.shape[-2] - height, values.shape[-1] - width
    edges = [(0, 0)] * (values.ndim - 2) + [(0, below), (0, right)]
    return np.pad(values[..., :height, :width], edges, mode="edge")


def _extent(
    pixel_mask: Tensor | None, batch_hw: tuple[int, int], map_hw: tuple[int, int]
) -> tuple[float, float]:
    """Return the width and height of the unpadded image in cells of the map."""
    height, width = batch_hw
    if pixel_mask is not None:
        height, width = int(pixel_mask[0].any(1).sum()), int(pixel_mask[0].any(0).sum())
    return width * map_hw[1] / batch_hw[1], height * map_hw[0] / batch_hw[0]


def _picture(pixels: Tensor, processor: ConditionalDetrImageProcessor, size: int) -> Image.Image:
    """Return pixels `[C, H, W]`, as `load_images` reads them, as an RGB image.

    Its longer side is `size`. Values that no `rescale_factor` explains are stretched.
    """
    if pixels.shape[0] != 3:
        pixels = pixels[:1].expand(3, -1, -1) if pixels.shape[0] < 3 else pixels[:3]
    values = pixels.cpu()
    if values.dtype != torch.uint8:
        if processor.do_rescale:
            values = values.float() * processor.rescale_factor
        else:
            values = values.float()
            low, high = values.aminmax()
            values = (values - low) / (high - low).clamp(min=1e-12)
        values = (values * 255).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(values.permute(1, 2, 0).contiguous().numpy())
    scale = size / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.LANCZOS)
