"""Fine-tune a detection checkpoint in a plain Accelerate loop, on COCO-format data.

accelerate launch examples/accelerate/train.py --model microsoft/conditional-detr-resnet-50
--train data/train/annotations.json --val data/val/annotations.json --output runs/accelerate

The data set is the package's own: the paper's augmentation, batches of similar aspect ratio, a
share for each process. `cdetr-fast train` does all of this and more; this loop is yours to change.
"""

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.training import TrainingConfig, evaluate
from cdetr_fast.training.data.loader import grouped
from cdetr_fast.training.setup import pixel_statistics, read_data, training_loader


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="checkpoint: hub name or folder")
    parser.add_argument("--train", required=True, help="COCO JSON file")
    parser.add_argument("--val", required=True, help="the same for evaluation")
    parser.add_argument("--output", required=True, help="folder for the trained checkpoint")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=2, help="of one process")
    parser.add_argument("--accumulate", type=int, default=1, help="batches in a step")
    parser.add_argument("--scales", type=int, nargs="+", default=[480, 560, 640, 720, 800])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=options.cpu)
    set_seed(0)
    config = TrainingConfig(
        train_annotations=options.train,
        val_annotations=options.val,
        batch_size=options.batch_size,
        accumulate=options.accumulate,
        scales=options.scales,
        crop_probability=0.0,
        num_workers=options.workers,
    )
    train, _, reports = read_data(config)
    for report in reports:
        accelerator.print("\n".join(report.lines()))
    model = ConditionalDetrForObjectDetection.from_pretrained(
        options.model,
        id2label=dict(enumerate(train.classes)),
        label2id={name: label for label, name in enumerate(train.classes)},
        ignore_mismatched_sizes=True,  # another number of classes: a new head, at the focal prior
        auxiliary_loss=True,  # of all decoder layers, as the authors train
    ).train()
    processor = ConditionalDetrImageProcessor.from_pretrained(options.model)
    mean, std = pixel_statistics(processor, accelerator.device)
    backbone = [p for n, p in model.named_parameters() if "backbone" in n and p.requires_grad]
    rest = [p for n, p in model.named_parameters() if "backbone" not in n and p.requires_grad]
    groups = [{"params": backbone, "lr": 1e-5}, {"params": rest, "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    # The sampler gives each process its own batches: `prepare` would split them again.
    sampler, loader = training_loader(config, train, accelerator)

    for epoch in range(options.epochs):
        sampler.start_at(epoch, 0)
        for batches in grouped(iter(loader), options.accumulate):
            # Losses are divided by the boxes of the whole step, not of each batch.
            count = sum(len(x["class_labels"]) for batch in batches for x in batch.labels)
            boxes = torch.tensor(float(count), device=accelerator.device)
            boxes = accelerator.reduce(boxes, "mean").clamp(min=1)
            total = torch.zeros((), device=accelerator.device)
            for batch in batches:
                inputs = batch.model_inputs(accelerator.device, mean, std)
                loss = model(**inputs, num_boxes=boxes).loss
                accelerator.backward(loss)
                total += loss.detach()
            accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {total.item():.3f}")

    if accelerator.is_main_process:
        trained = accelerator.unwrap_model(model)
        trained.config.auxiliary_loss = False
        trained.save_pretrained(options.output)
        processor.save_pretrained(options.output)
    accelerator.wait_for_everyone()
    device = "cpu" if options.cpu else "auto"
    result = evaluate(options.output, options.val, device=device, num_workers=options.workers)
    if result is not None:
        print({name: round(value, 4) for name, value in result.stats.items()})
    accelerator.state.destroy_process_group()


if __name__ == "__main__":
    main()
