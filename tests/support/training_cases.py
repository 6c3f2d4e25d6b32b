"""Batches of two shapes and steps of training over them, on any device."""

import torch

from support.oracle import random_labels

SHAPES = [(2, 3, 64, 96), (2, 3, 64, 64), (1, 3, 96, 64)]


def batch(step, shape=SHAPES[0], masked=True, device="cpu"):
    """Arguments of the model; half of the last image is padding."""
    generator = torch.Generator().manual_seed(step)
    pixel_mask = torch.ones(shape[0], *shape[2:], dtype=torch.bool)
    pixel_mask[-1, shape[2] // 2 :] = False
    return {
        "pixel_values": torch.randn(shape, generator=generator).to(device),
        "pixel_mask": pixel_mask.to(device) if masked else None,
        "labels": random_labels((3, 0)[: shape[0]], seed=step),
        "num_boxes": torch.tensor(3.0, device=device),
    }


def run(model, steps, accumulate=2, autocast=False, cache=True):
    """Train; return losses, logits and gradients of all steps. The shapes alternate."""
    device = model.device
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        for i in range(accumulate):
            number = step * accumulate + i
            inputs = batch(number, SHAPES[number % 2], device=device)
            with torch.autocast(device.type, torch.bfloat16, autocast, cache_enabled=cache):
                outputs = model(**inputs)
            values = [outputs.loss, *outputs.loss_dict.values(), outputs.logits]
            found += [x.detach().clone() for x in values]
            outputs.loss.backward()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
    return found
