"""A plain Accelerate loop trains our model."""

import copy
import re

import pytest
import torch
from support.oracle import make_ours, random_labels, randomise
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")

SMALL = {
    "backbone": "test_resnet",
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 6,
    "auxiliary_loss": True,
}
COUNTS = (2, 0, 1, 3)


def make_model():
    model = make_ours(**SMALL)
    randomise(model)
    for name, buffer in model.named_buffers():
        if name.endswith("weight"):  # timm starts the last norm of each block at 0: no gradient
            buffer.fill_(1.0)
    return model.train()


def make_loader():
    generator = torch.Generator().manual_seed(0)
    labels = random_labels(COUNTS)
    images = [torch.randn(3, 64, 64, generator=generator) for _ in COUNTS]
    masks = [torch.ones(64, 64, dtype=torch.int64) for _ in COUNTS]
    masks[1][:, 40:] = 0

    def collate(examples):
        pixel_values, pixel_mask, targets = zip(*examples, strict=True)
        return {
            "pixel_values": torch.stack(pixel_values),
            "pixel_mask": torch.stack(pixel_mask),
            "labels": list(targets),
        }

    examples = list(zip(images, masks, labels, strict=True))
    return DataLoader(examples, batch_size=2, collate_fn=collate)


def trainable(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_trains(precision):
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = make_model()
    seen = []
    loss_function = model.loss_function

    def spy(logits, labels, device, pred_boxes, *rest):
        seen.append((logits.dtype, pred_boxes.dtype, pred_boxes.detach()))
        return loss_function(logits, labels, device, pred_boxes, *rest)

    model.loss_function = spy
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    before = trainable(model)
    for batch in loader:
        optimizer.zero_grad()
        output = model(**batch)
        accelerator.backward(output.loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        assert output.loss.isfinite()
        assert type(output).__name__ == "ConditionalDetrObjectDetectionOutput"
        assert output.logits.dtype == output.pred_boxes.dtype == torch.float32
    assert len(seen) == 2
    after = trainable(model)
    assert all(p.isfinite().all() for p in after.values())
    # States of 0 enter the first decoder layer: all its queries have one value, whatever they
    # attend to.
    without_gradient = re.compile(r"decoder\.layers\.0\.self_attn\.([qk]_|v_proj\.weight)")
    unchanged = [name for name, p in after.items() if torch.equal(p, before[name])]
    assert [name for name in unchanged if not without_gradient.search(name)] == []

    for logits_dtype, boxes_dtype, boxes_cxcywh in seen:
        assert logits_dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert boxes_dtype == torch.float32
        assert not torch.equal(boxes_cxcywh.bfloat16().float(), boxes_cxcywh)


def test_gradient_accumulation():
    """Two batches before a step: that of the mean of their gradients."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    alone = copy.deepcopy(model)
    for batch in make_loader():
        (alone(**batch).loss / 2).backward()
    expected = {
        name: p.detach() - 0.01 * p.grad for name, p in alone.named_parameters() if p.requires_grad
    }

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    stepped = []
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        stepped.append(accelerator.sync_gradients)
    assert stepped == [False, True]
    torch.testing.assert_close(trainable(model), expected, rtol=1e-5, atol=1e-6)


def test_state_is_saved_and_loaded(tmp_path):
    accelerator = accelerate.Accelerator(cpu=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, make_loader())
    accelerator.save_state(tmp_path)
    before = trainable(model)
    accelerator.backward(model(**next(iter(loader))).loss)
    optimizer.step()
    assert not all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    accelerator.load_state(tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
