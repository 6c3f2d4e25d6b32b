"""Images as model inputs, and model outputs as results.

In the order in which data passes: `load` turns whatever a user has into RGB tensors, `resize`
resizes, normalises and pads them, `targets` makes training targets of COCO annotations; then
`detections` and `segments` read model outputs, and `results` and `draw` present them. `processor`
is the class around them, `settings` its settings and files.
"""

from cdetr_fast.images.batch_feature import BatchFeature
from cdetr_fast.images.processor import (
    ConditionalDetrFeatureExtractor,
    ConditionalDetrImageProcessor,
    ConditionalDetrImageProcessorFast,
    ConditionalDetrImageProcessorPil,
)

__all__ = [
    "BatchFeature",
    "ConditionalDetrFeatureExtractor",
    "ConditionalDetrImageProcessor",
    "ConditionalDetrImageProcessorFast",
    "ConditionalDetrImageProcessorPil",
]
