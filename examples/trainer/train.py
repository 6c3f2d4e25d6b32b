"""Fine-tune a detection checkpoint with transformers' Trainer, on COCO-format data.

python examples/trainer/train.py --model microsoft/conditional-detr-resnet-50 --train data/train
--val data/val --output_dir runs/trainer; further options are those of TrainingArguments.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import HfArgumentParser, Trainer, TrainingArguments

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.training import evaluate


class CocoDetection(torch.utils.data.Dataset[dict[str, Any]]):
    """Images beside an `annotations.json`, prepared by the image processor."""

    def __init__(self, folder: str, processor: ConditionalDetrImageProcessor) -> None:
        self.folder, self.processor = Path(folder), processor
        content = json.loads((self.folder / "annotations.json").read_text("utf-8"))
        categories = sorted(content["categories"], key=lambda c: c["id"])
        self.classes = [c["name"] for c in categories]
        label_of = {c["id"]: label for label, c in enumerate(categories)}  # ids may have gaps
        self.images = content["images"]
        self.objects: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in self.images}
        for item in content["annotations"]:
            item["category_id"] = label_of[item["category_id"]]
            self.objects[item["image_id"]].append(item)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        picture = Image.open(self.folder / image["file_name"]).convert("RGB")
        target = {"image_id": image["id"], "annotations": self.objects[image["id"]]}
        encoded = self.processor(images=picture, annotations=target, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"][0], "labels": encoded["labels"][0]}

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.processor.pad([x["pixel_values"] for x in examples], return_tensors="pt")
        assert not isinstance(batch, tuple)
        return {**batch, "labels": [x["labels"] for x in examples]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint: hub name or folder")
    parser.add_argument("--train", required=True, help="folder of images and annotations.json")
    parser.add_argument("--val", required=True, help="the same for evaluation")
    own, rest = parser.parse_known_args(arguments)
    # The types of transformers name neither this class a dataclass nor foreign image processors.
    option_parser = HfArgumentParser(TrainingArguments)  # type: ignore[arg-type]
    (settings,) = option_parser.parse_args_into_dataclasses(rest)
    settings.remove_unused_columns = False  # the collator makes the columns
    settings.eval_do_concat_batches = False  # batches differ in padding and in objects

    processor = ConditionalDetrImageProcessor.from_pretrained(own.model)
    train, val = (CocoDetection(folder, processor) for folder in (own.train, own.val))
    model = ConditionalDetrForObjectDetection.from_pretrained(
        own.model,
        id2label=dict(enumerate(train.classes)),
        label2id={name: label for label, name in enumerate(train.classes)},
        ignore_mismatched_sizes=True,  # another number of classes: a new head, at the focal prior
        auxiliary_loss=True,  # of all decoder layers, as the authors train
    )
    trainer = Trainer(
        model=model,
        args=settings,
        data_collator=train.collate,
        train_dataset=train,
        eval_dataset=val,
        processing_class=processor,  # type: ignore[arg-type]
    )
    trainer.train()
    print(trainer.evaluate())
    if trainer.is_world_process_zero():
        model.config.auxiliary_loss = False
        model.save_pretrained(settings.output_dir)  # with config.json, unlike Trainer's own
        processor.save_pretrained(settings.output_dir)
    trainer.accelerator.wait_for_everyone()
    device = "cpu" if settings.use_cpu else "auto"
    result = evaluate(
        settings.output_dir, Path(own.val) / "annotations.json", device=device, num_workers=0
    )
    if result is not None:
        print({name: round(value, 4) for name, value in result.stats.items()})


if __name__ == "__main__":
    main()
