"""The README.md of a trained model."""

from __future__ import annotations

import math
from typing import Any

from cdetr_fast.training.config import TrainingConfig
from cdetr_fast.training.data.index import CocoIndex
from cdetr_fast.training.data.shards import ShardSet

_TEMPLATE = """---
library_name: cdetr_fast
pipeline_tag: object-detection
tags: [object-detection, conditional_detr]
---
# Conditional DETR, trained on {train_name}

```python
from cdetr_fast import ConditionalDetr{task}, ConditionalDetrImageProcessor

model = ConditionalDetr{task}.from_pretrained("path/of/this/folder").eval()
processor = ConditionalDetrImageProcessor.from_pretrained("path/of/this/folder")
```

## Data

| | file | images | objects |
|---|---|---|---|
{data}

Classes: {classes}.

## Figures

{figures}

## Settings

```yaml
{settings}```
"""


def model_card(
    config: TrainingConfig,
    train: CocoIndex | ShardSet,
    val: CocoIndex | None,
    result: dict[str, Any],
) -> str:
    """Return the text of the card.

    Args:
        config: Of the run.
        train: Training set.
        val: Validation set, if any.
        result: COCO's figures on the validation set; empty without one.
    """
    rows = [("training", train)] + ([("validation", val)] if val is not None else [])
    figures = "No validation set was given."
    if result:
        shown = {k: v for k, v in result.items() if isinstance(v, float) and not math.isnan(v)}
        names, values = " | ".join(shown), " | ".join(f"{v:.3f}" for v in shown.values())
        figures = f"COCO's, on the validation set:\n\n| {names} |\n|{'---|' * len(shown)}\n"
        figures += f"| {values} |"
    return _TEMPLATE.format(
        train_name=train.path.stem,
        task="ForObjectDetection" if config.task == "detection" else "ForSegmentation",
        data="\n".join(
            f"| {name} | {index.path.name} | {len(index)} | {index.num_objects} |"
            for name, index in rows
        ),
        classes=", ".join(train.classes),
        figures=figures,
        settings=config.as_yaml(),
    )
