"""The models under one name, as users of transformers look for them and as pickles name them."""

from cdetr_fast.models.base_model import ConditionalDetrModel, ImageFeatures
from cdetr_fast.models.detection_model import ConditionalDetrForObjectDetection
from cdetr_fast.models.segmentation_model import (
    ConditionalDetrForSegmentation,
    kept_query_indices,
)

__all__ = [
    "ConditionalDetrForObjectDetection",
    "ConditionalDetrForSegmentation",
    "ConditionalDetrModel",
    "ImageFeatures",
    "kept_query_indices",
]
