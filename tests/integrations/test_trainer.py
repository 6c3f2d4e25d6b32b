"""transformers' Trainer and pipeline run our model, with our image processor."""

import copy
import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.oracle import TINY

import cdetr_fast

transformers = pytest.importorskip("transformers")

SMALL = TINY | {
    "backbone": "test_resnet",
    "encoder_layers": 1,
    "decoder_layers": 2,
    "num_queries": 6,
    "id2label": {0: "disc", 1: "square", 2: "cross"},
    "label2id": {"disc": 0, "square": 1, "cross": 2},
    "auxiliary_loss": True,
}
del SMALL["num_labels"]
# States of 0 enter the first decoder layer: all its queries have one value, whatever they
# attend to.
WITHOUT_GRADIENT = re.compile(r"decoder\.layers\.0\.self_attn\.([qk]_|v_proj\.weight)")
COUNTS = (2, 0, 1, 3)  # objects in each image


@pytest.fixture(scope="module")
def processor():
    return cdetr_fast.ConditionalDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("coco")
    generator = np.random.default_rng(0)
    categories = [{"id": i, "name": name} for i, name in SMALL["id2label"].items()]
    content = {"images": [], "annotations": [], "categories": categories}
    for index, count in enumerate(COUNTS):
        width, height = 64 + 8 * index, 48
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for _ in range(count):
            x, y, w, h = (int(v) for v in generator.integers(8, 24, 4))
            kind = int(generator.integers(3))
            pixels[y : y + h, x : x + w, kind] = 255
            annotation = {"bbox": [x, y, w, h], "category_id": kind, "area": w * h, "iscrowd": 0}
            ids = {"id": len(content["annotations"]), "image_id": index}
            content["annotations"].append(annotation | ids)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        content["images"].append({"id": index, "file_name": f"{index}.png"})
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def data(folder, processor):
    from examples.trainer.train import CocoDetection

    return CocoDetection(folder, processor)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = cdetr_fast.ConditionalDetrConfig(**SMALL)
    model = cdetr_fast.ConditionalDetrForObjectDetection(config)
    for name, buffer in model.named_buffers():
        if name.endswith("weight"):  # timm starts the last norm of each block at 0: no gradient
            buffer.fill_(1.0)
    return model


def make_trainer(model, data, output, metrics=None, **arguments):
    """A Trainer with the settings of transformers' object-detection example."""
    processor = data.processor

    def collate(examples):
        padded = processor.pad([x["pixel_values"] for x in examples], return_tensors="pt")
        return {
            "pixel_values": padded["pixel_values"],
            "pixel_mask": padded["pixel_mask"],
            "labels": [x["labels"] for x in examples],
        }

    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "remove_unused_columns": False,
        "eval_do_concat_batches": False,
        "save_strategy": "no",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(output), **(settings | arguments)),
        data_collator=collate,
        train_dataset=data,
        eval_dataset=data,
        processing_class=processor,
        compute_metrics=metrics,
    )


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_trained(model, before):
    """Every trainable parameter that has a gradient has changed, and no frozen one."""
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if not WITHOUT_GRADIENT.search(name):
            assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def mean_average_precision(processor, model):
    """Return what the example reads at positions 1 and 2 of the predictions."""

    def compute(evaluation):
        queries, boxes = 0, 0
        for batch, targets in zip(evaluation.predictions, evaluation.label_ids, strict=True):
            logits, boxes_cxcywh = torch.tensor(batch[1]), torch.tensor(batch[2])
            sizes = torch.tensor(np.array([target["orig_size"] for target in targets]))
            output = type(model(torch.zeros(1, 3, 32, 32)))(logits=logits, pred_boxes=boxes_cxcywh)
            found = processor.post_process_object_detection(output, 0.0, target_sizes=sizes)
            assert len(found) == len(targets) == len(logits)
            queries += sum(len(x["scores"]) for x in found)
            boxes += sum(len(target["class_labels"]) for target in targets)
        return {"queries": queries, "boxes": boxes}

    return compute


def test_trains_evaluates_and_predicts(model, data, processor, tmp_path):
    before = snapshot(model)
    metrics = mean_average_precision(processor, model)
    trainer = make_trainer(model, data, tmp_path, metrics, eval_strategy="steps", eval_steps=1)
    assert trainer.label_names == ["labels"]
    assert np.isfinite(trainer.train().training_loss)
    assert_trained(model, before)

    evaluation = trainer.evaluate()
    assert np.isfinite(evaluation["eval_loss"])
    assert evaluation["eval_boxes"] == sum(COUNTS)
    assert evaluation["eval_queries"] == len(COUNTS) * 6 * 3

    prediction = trainer.predict(data)
    assert [type(batch) for batch in prediction.predictions] == [tuple, tuple]
    model.eval()
    loader = trainer.get_eval_dataloader()
    for batch, inputs in zip(prediction.predictions, loader, strict=True):
        with torch.no_grad():
            output = model(**inputs)
        assert set(batch[0]) == set(output.loss_dict)
        np.testing.assert_allclose(batch[1], output.logits, atol=1e-5)
        np.testing.assert_allclose(batch[2], output.pred_boxes, atol=1e-5)


def test_trains_with_checkpointing_and_accumulation(model, data, tmp_path):
    before = snapshot(model)
    # Its name before transformers 5.23 is gradient_checkpointing.
    known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    name = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if x in known)
    trainer = make_trainer(model, data, tmp_path, gradient_accumulation_steps=2, **{name: True})
    assert np.isfinite(trainer.train().training_loss)
    assert model.is_activation_checkpointing
    assert_trained(model, before)


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


READERS = {
    "ours": cdetr_fast.ConditionalDetrForObjectDetection,
    "theirs": transformers.ConditionalDetrForObjectDetection,
    "auto": transformers.AutoModelForObjectDetection,
}


def test_everybody_loads_what_trainer_writes(model, data, processor, tmp_path):
    model.config.compat = "transformers"  # with auxiliary loss they differ otherwise
    trainer = make_trainer(model, data, tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "model")
    images = torch.stack([torch.linspace(-1, 1, 64 * 64).view(64, 64)] * 3)[None]
    model.eval()
    with torch.no_grad():
        expected = model(images).logits
    for folder in (tmp_path / "model", tmp_path / "checkpoint-2"):
        assert (folder / "config.json").is_file()
        for cls in READERS.values():
            with torch.no_grad():
                got = cls.from_pretrained(folder).eval()(images).logits
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        stored = cdetr_fast.ConditionalDetrImageProcessor.from_pretrained(folder)
        assert stored.size == processor.size
        pipeline = transformers.pipeline("object-detection", str(folder), device="cpu")
        assert pipeline(Image.new("RGB", (64, 48)), threshold=0.0)


def test_a_resumed_run_equals_an_unbroken_one(model, data, tmp_path):
    model.config.dropout = 0.1
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    first = copy.deepcopy(model)
    for part in (first, model):
        part.train()
    make_trainer(first, data, tmp_path, **settings).train()
    trainer = make_trainer(model, data, tmp_path / "resumed", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_same(weights_of(model), weights_of(first))


def test_the_best_model_is_loaded_at_the_end(model, data, tmp_path):
    scores = iter((2.0, 1.0))
    trainer = make_trainer(
        model,
        data,
        tmp_path,
        lambda evaluation: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    stored = [READERS["ours"].from_pretrained(tmp_path / f"checkpoint-{i}") for i in (1, 2)]
    best, last = map(weights_of, stored)
    assert_same(weights_of(model), best)
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_detection_pipeline(model, processor, folder):
    pipeline = transformers.pipeline(
        "object-detection", model=model.eval(), image_processor=processor, device="cpu"
    )
    assert "ConditionalDetrForObjectDetection" in repr(pipeline)
    image = Image.open(folder / "3.png")
    inputs = processor(images=image, return_tensors="pt")
    with torch.no_grad():
        expected = processor.post_process_object_detection(
            model(**inputs), threshold=0.0, target_sizes=[image.size[::-1]]
        )[0]
    found = pipeline(image, threshold=0.0)
    assert len(found) == 18
    assert [x["score"] for x in found] == pytest.approx(expected["scores"].tolist(), abs=1e-6)
    labels = [model.config.id2label[i] for i in expected["labels"].tolist()]
    assert [x["label"] for x in found] == labels
    corners = [list(x["box"].values()) for x in found]
    assert corners == expected["boxes"].int().tolist()
    several = pipeline([image, Image.open(folder / "0.png")], threshold=0.0)
    assert several[0] == found
    assert len(several) == 2
