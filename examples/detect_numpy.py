# %% [markdown]
# # Detection without torch
#
# A file to copy into a program that runs an exported model: what `predict` does before and after
# the network, with numpy and Pillow only, and ONNX Runtime for the network itself.
#
# One thing differs: images are resized by Pillow here, by torchvision in `predict`. Both use the
# same filter with antialiasing, but Pillow's fixed-point weights have more bits, so that up to
# one pixel in a hundred differs by one level of 255. An image that already has the size of the
# model's input gives the same pixels, and boxes within 1e-3 pixels.

# %%
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageOps


class Detections(NamedTuple):
    """Objects of one image, best first: scores [n], labels [n], boxes [n, 4] in pixels."""

    scores: np.ndarray
    labels: np.ndarray
    boxes_xyxy: np.ndarray


# %% [markdown]
# ## Before the network


# %%
def read_image(source: Any) -> Image.Image:
    """Return an image as RGB, upright by its EXIF orientation."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    return ImageOps.exif_transpose(image).convert("RGB")


def resized_hw(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """Return the height and width to which an image is resized, as `size` in the settings says."""
    if set(size) == {"height", "width"}:
        return size["height"], size["width"]
    if set(size) != {"shortest_edge", "longest_edge"}:
        raise ValueError(f"size: expected shortest_edge and longest_edge, got {dict(size)}")
    short, long = min(height, width), max(height, width)
    wanted: float = size["shortest_edge"]
    new_short = size["shortest_edge"]
    if long / short * wanted > size["longest_edge"]:
        wanted = size["longest_edge"] * short / long
        new_short = round(wanted)
    if new_short == short:
        return height, width
    new_short, new_long = max(1, new_short), max(1, int(wanted * long / short))
    return (new_long, new_short) if width < height else (new_short, new_long)


def preprocess(image: Image.Image, settings: Mapping[str, Any]) -> np.ndarray:
    """Return the network's input, float32 [1, 3, H, W], by preprocessor_config.json."""
    if settings["do_resize"]:
        height, width = resized_hw(image.height, image.width, settings["size"])
        image = image.resize((width, height), settings["resample"])
    pixels: np.ndarray = np.asarray(image, dtype=np.float32)
    if settings["do_rescale"]:
        pixels = pixels * np.float32(settings["rescale_factor"])
    if settings["do_normalize"]:
        mean = np.asarray(settings["image_mean"], dtype=np.float32)
        pixels = (pixels - mean) / np.asarray(settings["image_std"], dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


# %% [markdown]
# ## After the network


# %%
def postprocess(
    logits: np.ndarray,
    boxes_cxcywh: np.ndarray,
    size_hw: tuple[int, int],
    threshold: float = 0.5,
    top_k: int = 100,
) -> Detections:
    """Return the objects in logits [Q, K] and relative boxes [Q, 4] of an image of a size."""
    flat = logits.astype(np.float64).ravel()
    best = np.argsort(-flat, kind="stable")[:top_k]
    scores = 1 / (1 + np.exp(-flat[best]))
    best, scores = best[scores > threshold], scores[scores > threshold]
    centre, extent = np.split(boxes_cxcywh[best // logits.shape[1]], 2, axis=1)
    boxes = np.concatenate([centre - extent / 2, centre + extent / 2], axis=1)
    height, width = size_hw
    return Detections(scores, best % logits.shape[1], boxes * [width, height, width, height])


# %% [markdown]
# ## All of it


# %%
class Detector:
    """A folder with model.onnx, config.json and preprocessor_config.json, ready to detect."""

    def __init__(self, folder: str | Path) -> None:
        import onnxruntime

        folder = Path(folder)
        self.settings = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
        names = json.loads((folder / "config.json").read_text("utf-8"))["id2label"]
        self.id2label = {int(label): name for label, name in names.items()}
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", providers=onnxruntime.get_available_providers()
        )

    def __call__(self, source: Any, threshold: float = 0.5) -> Detections:
        image = read_image(source)
        inputs = {"pixel_values": preprocess(image, self.settings)}
        logits, boxes = self.session.run(["logits", "pred_boxes"], inputs)
        return postprocess(logits[0], boxes[0], (image.height, image.width), threshold)
