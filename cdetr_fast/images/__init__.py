"""Images to model inputs, and model outputs to results.

`inputs` turns whatever a user has into RGB tensors, `annotations` turns COCO annotations into
training targets, `processor` resizes, normalises and pads both, `post_processing` turns outputs
into results.
"""

from cdetr_fast.images.batch_feature import BatchFeature
from cdetr_fast.images.processor import (
    ConditionalDetrFeatureExtractor,
    ConditionalDetrImageProcessor,
    ConditionalDetrImageProcessorFast,
)

__all__ = [
    "BatchFeature",
    "ConditionalDetrFeatureExtractor",
    "ConditionalDetrImageProcessor",
    "ConditionalDetrImageProcessorFast",
]
