"""Bad input is refused by name; odd but legal input works."""

import logging

import pytest
import torch
import transformers
from support.oracle import CLASSES, SMALL_MODEL, make_ours, make_pair, random_labels

import cdetr_fast

SMALL = SMALL_MODEL | {"num_labels": 7}
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def models():
    return {task: make_ours(task, **SMALL).train() for task in CLASSES}


@pytest.fixture(params=list(CLASSES))
def model(models, request):
    return models[request.param]


@pytest.fixture
def detector(models):
    return models["detection"]


@pytest.fixture
def segmenter(models):
    return models["segmentation"]


def refuses(model, error, *words, **arguments):
    """Asserts that a call raises with all words in its message, and leaves the model as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    grads = [p.grad for p in model.parameters()]
    arguments = {"pixel_values": IMAGES} | arguments
    with pytest.raises(error) as caught:
        model(**arguments)
    message = str(caught.value)
    assert type(caught.value) is error
    assert all(word in message for word in words), f"{words} not all in {message!r}"
    assert "expected" in message
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(a is p.grad for a, p in zip(grads, model.parameters(), strict=True))


def labels_with(**changes):
    """Labels of two images with two and one objects; the changes go into the second image."""
    labels = random_labels((2, 1))
    labels[1] = {k: v for k, v in (labels[1] | changes).items() if v is not None}
    return labels


def box(*values):
    return torch.tensor([values], dtype=torch.float32)


# Images ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pixel_values", "error", "got"),
    [
        (None, TypeError, "NoneType"),
        (IMAGES.numpy(), TypeError, "ndarray"),
        (list(IMAGES), TypeError, "list"),
        (IMAGES[0], ValueError, "[3, 64, 64]"),
        (IMAGES[None], ValueError, "[1, 2, 3, 64, 64]"),
        (IMAGES[:, :1], ValueError, "[2, 1, 64, 64]"),
        (IMAGES.permute(0, 2, 3, 1), ValueError, "[2, 64, 64, 3]"),
        (IMAGES[:0], ValueError, "[0, 3, 64, 64]"),
        (IMAGES[:, :, :0], ValueError, "[2, 3, 0, 64]"),
        (IMAGES.byte(), TypeError, "uint8"),
        (IMAGES.long(), TypeError, "int64"),
        (IMAGES.double(), TypeError, "float64"),
        (IMAGES.bfloat16(), TypeError, "bfloat16"),
    ],
)
def test_images(model, pixel_values, error, got):
    refuses(model, error, "pixel_values", got, pixel_values=pixel_values)


def test_integer_images_under_autocast(detector):
    with torch.autocast("cpu", torch.bfloat16):
        refuses(detector, TypeError, "pixel_values", "uint8", pixel_values=IMAGES.byte())


@pytest.mark.parametrize(
    ("pixel_mask", "error", "got"),
    [
        (torch.ones(2, 1, 64, 64), ValueError, "[2, 1, 64, 64]"),
        (torch.ones(64, 64), ValueError, "[64, 64]"),
        (torch.ones(2, 64, 32), ValueError, "[2, 64, 32]"),
        (torch.ones(1, 64, 64), ValueError, "[1, 64, 64]"),
        (torch.ones(2, 64, 64).numpy(), TypeError, "ndarray"),
        ([[1] * 64] * 2, TypeError, "list"),
    ],
)
def test_masks_of_the_images(model, pixel_mask, error, got):
    refuses(model, error, "pixel_mask", "[2, 64, 64]", got, pixel_mask=pixel_mask)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"encoder_outputs": (torch.ones(2, 5, 32),)},
            ValueError,
            ["encoder_outputs[0]", "[2, 4, 32]", "[2, 5, 32]"],
        ),
        (
            {"encoder_outputs": (torch.ones(1, 4, 32),)},
            ValueError,
            ["encoder_outputs[0]", "[2, 4, 32]", "[1, 4, 32]"],
        ),
        (
            {"encoder_outputs": (torch.ones(2, 4, 32).double(),)},
            TypeError,
            ["encoder_outputs[0]", "float64"],
        ),
        ({"encoder_outputs": (None,)}, TypeError, ["encoder_outputs[0]", "NoneType"]),
        ({"encoder_outputs": ()}, TypeError, ["encoder_outputs[0]", "NoneType"]),
        (
            {"decoder_attention_mask": torch.ones(2, 4)},
            ValueError,
            ["decoder_attention_mask", "[2, 5]", "[2, 4]"],
        ),
        ({"decoder_attention_mask": [1] * 5}, TypeError, ["decoder_attention_mask", "list"]),
        (
            {"decoder_inputs_embeds": torch.ones(2, 5, 16)},
            ValueError,
            ["decoder_inputs_embeds", "[2, 5, 32]", "[2, 5, 16]"],
        ),
        (
            {"decoder_inputs_embeds": torch.ones(2, 5, 32).half()},
            TypeError,
            ["decoder_inputs_embeds", "float16"],
        ),
        ({"inputs_embeds": torch.ones(2, 9, 32)}, ValueError, ["inputs_embeds", "[2, 9, 32]"]),
    ],
)
def test_states_given_from_outside(model, arguments, error, words):
    refuses(model, error, *words, **arguments)


def test_map_too_large_for_learned_positions():
    model = make_ours(**SMALL, position_embedding_type="learned").train()
    images = torch.zeros(1, 3, 32, 51 * 32)
    refuses(model, ValueError, "pixel_values", "50 x 50", "1 x 51", pixel_values=images)
    assert model.eval()(images[..., : 50 * 32]).logits.shape == (1, 5, 7)


@pytest.mark.parametrize("task", list(CLASSES))
def test_configuration_of_another_class(task):
    theirs = transformers.ConditionalDetrConfig(backbone_config=None)
    expected = "config.*cdetr_fast.ConditionalDetrConfig.*got transformers.*ConditionalDetrConfig"
    with pytest.raises(TypeError, match=expected):
        getattr(cdetr_fast, CLASSES[task])(theirs)
    with pytest.raises(TypeError, match=r"config.*dict"):
        getattr(cdetr_fast, CLASSES[task])(theirs.to_dict())


# Labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (random_labels((1,))[0], TypeError, ["labels", "dict"]),
        (torch.zeros(2), TypeError, ["labels", "Tensor"]),
        ([], ValueError, ["labels", "2", "got 0"]),
        (random_labels((1,)), ValueError, ["labels", "2", "got 1"]),
        (random_labels((1, 1, 1)), ValueError, ["labels", "2", "got 3"]),
        ([None, None], TypeError, ["labels[0]", "NoneType"]),
        ([random_labels((1,))[0], "cat"], TypeError, ["labels[1]", "str"]),
        (labels_with(boxes=None), ValueError, ["labels[1]", "'boxes'", "['class_labels']"]),
        (labels_with(class_labels=None), ValueError, ["labels[1]", "'class_labels'", "['boxes']"]),
    ],
)
@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_containers_of_labels(models, task, labels, error, words):
    refuses(models[task], error, *words, labels=labels)


@pytest.mark.parametrize(
    ("class_labels", "error", "got"),
    [
        (torch.tensor([7]), ValueError, "got 7"),
        (torch.tensor([-1]), ValueError, "got -1"),
        (torch.tensor([2**40]), ValueError, f"got {2**40}"),
        (torch.tensor([1.0]), TypeError, "float32"),
        (torch.tensor([True]), TypeError, "bool"),
        (torch.tensor([[1]]), ValueError, "[1, 1]"),
        (torch.tensor(1), ValueError, "[]"),
        ([1], TypeError, "list"),
    ],
)
def test_class_labels(detector, class_labels, error, got):
    labels = labels_with(class_labels=class_labels)
    refuses(detector, error, "labels[1]['class_labels']", got, labels=labels)


@pytest.mark.parametrize(
    ("boxes", "error", "got"),
    [
        (box(1.5, 0.5, 0.25, 0.25), ValueError, "[1.5, 0.5, 0.25, 0.25]"),
        (box(0.5, -0.5, 0.25, 0.25), ValueError, "[0.5, -0.5, 0.25, 0.25]"),
        (box(100, 50, 30, 20), ValueError, "[100.0, 50.0, 30.0, 20.0]"),
        (box(0.5, 0.5, -0.25, 0.25), ValueError, "[0.5, 0.5, -0.25, 0.25]"),
        (box(0.5, 0.5, 0.25, -(2**-20)), ValueError, str(-(2**-20))),
        (box(0.5, NAN, 0.25, 0.25), ValueError, "nan"),
        (box(0.5, 0.5, INF, 0.25), ValueError, "inf"),
        (torch.ones(1, 4, dtype=torch.int64), TypeError, "int64"),
        (torch.ones(2, 4), ValueError, "[2, 4]"),
        (torch.ones(1, 5), ValueError, "[1, 5]"),
        (torch.ones(4), ValueError, "[4]"),
        ([[0.5] * 4], TypeError, "list"),
    ],
)
@pytest.mark.parametrize("auxiliary_loss", [False, True], ids=["plain", "auxiliary"])
def test_boxes(detector, boxes, error, got, auxiliary_loss):
    detector.config.auxiliary_loss = auxiliary_loss
    detector.model.decoder.auxiliary_loss = auxiliary_loss
    try:
        refuses(detector, error, "labels[1]['boxes']", got, labels=labels_with(boxes=boxes))
    finally:
        detector.config.auxiliary_loss = detector.model.decoder.auxiliary_loss = False


def test_the_first_bad_box_is_the_one_named(detector):
    labels = random_labels((3, 4))
    labels[1]["boxes"][2:, 0] = 2
    with pytest.raises(ValueError, match=r"labels\[1\]\['boxes'\]\[2\].*\[2\.0, "):
        detector(IMAGES, labels=labels)


@pytest.mark.parametrize(
    ("masks", "error", "got"),
    [
        (None, ValueError, "['boxes', 'class_labels']"),
        (torch.zeros(2, 9, 9), ValueError, "[2, 9, 9]"),
        (torch.zeros(9, 9), ValueError, "[9, 9]"),
        (torch.zeros(1, 0, 9), ValueError, "[1, 0, 9]"),
        (torch.zeros(1, 9, 9).numpy(), TypeError, "ndarray"),
    ],
)
def test_masks_of_objects(segmenter, masks, error, got):
    labels = random_labels((2, 1), masks=True)
    labels[1] = {k: v for k, v in (labels[1] | {"masks": masks}).items() if v is not None}
    refuses(segmenter, error, "labels[1]", "masks", got, labels=labels)


# Odd but legal -----------------------------------------------------------------------------------


def step(model, images=IMAGES, **arguments):
    """Runs forward and backward, and checks that loss and gradients are finite."""
    model.zero_grad()
    output = model(images, **arguments)
    output.loss.backward()
    assert output.loss.isfinite()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(g.isfinite().all() for g in grads)
    return output


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("counts", [(0, 0), (0, 3), (9, 0), (9, 12), (5, 1)])
def test_any_number_of_objects(models, task, counts):
    """None in an image or in the batch; as many as queries, and more."""
    output = step(models[task], labels=random_labels(counts, masks=task == "segmentation"))
    if counts == (0, 0):
        assert output.loss_dict["loss_bbox"] == output.loss_dict["loss_giou"] == 0


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 1)])
def test_one_query(counts):
    model = make_ours(**(SMALL | {"num_queries": 1}), auxiliary_loss=True)
    assert step(model, labels=random_labels(counts)).logits.shape == (2, 1, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_of_other_dtypes(detector, dtype):
    labels = random_labels((2, 1))
    expected = step(detector, labels=labels).loss
    for label in labels:
        label["boxes"] = label["boxes"].to(dtype)
    torch.testing.assert_close(step(detector, labels=labels).loss, expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_class_labels_of_other_dtypes(detector, dtype):
    labels = random_labels((2, 1))
    expected = step(detector, labels=labels).loss
    for label in labels:
        label["class_labels"] = label["class_labels"].to(dtype)
    assert torch.equal(step(detector, labels=labels).loss, expected)


def test_masks_of_other_dtypes(segmenter):
    """Nonzero is object: masks drawn with 255 count as those with 1."""
    labels = random_labels((2, 1), masks=True)
    expected = step(segmenter, labels=labels).loss
    for dtype, value in ((torch.uint8, 255), (torch.int64, 1), (torch.float32, 1)):
        changed = [y | {"masks": y["masks"].to(dtype) * value} for y in labels]
        assert torch.equal(step(segmenter, labels=changed).loss, expected)


def test_labels_are_left_as_they_were(segmenter):
    labels = random_labels((2, 1), masks=True)
    before = [{key: value.clone() for key, value in label.items()} for label in labels]
    step(segmenter, labels=tuple(labels))
    for label, old in zip(labels, before, strict=True):
        assert label.keys() == old.keys()
        assert all(torch.equal(label[key], old[key]) for key in old)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_masks_of_any_dtype(models, dtype):
    model = models["base"].eval()
    pixel_mask = torch.ones(2, 64, 64, dtype=torch.bool)
    pixel_mask[1, :, 32:] = False
    expected = model(IMAGES, pixel_mask).last_hidden_state
    assert not torch.equal(model(IMAGES).last_hidden_state, expected)
    got = model(IMAGES, pixel_mask.to(dtype)).last_hidden_state
    model.train()
    assert torch.equal(got, expected)


def test_an_image_that_is_all_padding(detector):
    pixel_mask = torch.ones(2, 64, 64)
    pixel_mask[1] = 0
    output = step(detector, pixel_mask=pixel_mask, labels=random_labels((2, 0)))
    assert output.logits.isfinite().all()
    assert output.pred_boxes.isfinite().all()


def test_images_in_other_strides(models):
    model = models["base"].eval()
    expected = model(IMAGES).last_hidden_state
    wide = torch.zeros(4, 3, 64, 128)
    wide[::2, :, :, ::2] = IMAGES
    for images in (
        wide[::2, :, :, ::2],
        IMAGES.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
        IMAGES.contiguous(memory_format=torch.channels_last),
    ):
        version = images._version
        torch.testing.assert_close(model(images).last_hidden_state, expected)
        assert images._version == version
    assert model(IMAGES[:1].expand(5, -1, -1, -1)).last_hidden_state.shape[0] == 5
    model.train()


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (33, 2)])
def test_tiny_images(size):
    theirs, ours = make_pair(**SMALL)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, got = theirs.eval()(images), ours.eval()(images)
    torch.testing.assert_close(got.to_tuple(), expected.to_tuple(), rtol=0, atol=1e-4)


# Predictions that are not numbers ----------------------------------------------------------------


def nan_model(task, part):
    model = make_ours(task, **SMALL, auxiliary_loss=True)
    heads = model if task == "detection" else model.conditional_detr
    with torch.no_grad():
        if part == "class head":
            heads.class_labels_classifier.weight[0, 0] = NAN
        elif part == "box head":
            heads.bbox_predictor.layers[-1].bias[2] = INF
            heads.bbox_predictor.layers[0].bias[0] = NAN
        else:
            heads.model.decoder.layers[1].mlp.fc1.bias[0] = NAN
    return model


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize(
    ("part", "reported"),
    [
        ("class head", [("logits", 0), ("logits", 1)]),
        ("box head", [("pred_boxes", 0), ("pred_boxes", 1)]),
        ("second decoder layer", [("logits", 1), ("pred_boxes", 1)]),
    ],
)
def test_nan_weights_are_reported(caplog, task, part, reported):
    model = nan_model(task, part)
    with caplog.at_level(logging.WARNING, "cdetr_fast"):
        output = model(IMAGES, labels=random_labels((2, 1), masks=task == "segmentation"))
        output.loss.backward()
    assert {record.name for record in caplog.records} == {"cdetr_fast.loss.assignment"}
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(reported)
    for (tensor, layer), message in zip(reported, messages, strict=True):
        assert f"{tensor} of decoder layer {layer} of 2" in message
        assert "images [0, 1]" in message


def test_only_the_image_with_nan_is_named(detector, caplog):
    images = IMAGES.clone()
    images[1, 0, 0, 0] = NAN
    with caplog.at_level(logging.WARNING, "cdetr_fast"):
        output = detector(images, labels=random_labels((2, 1)))
    assert output.logits[0].isfinite().all()
    assert [record.getMessage().count("images [1]") for record in caplog.records] == [1, 1]


def test_finite_predictions_are_not_reported(detector, caplog):
    with caplog.at_level(logging.WARNING, "cdetr_fast"):
        step(detector, labels=random_labels((9, 0)))
    assert not caplog.records


@pytest.mark.parametrize("where", [0, 3])
def test_nan_predictions_are_matched_last(detector, where):
    """With finite predictions left, a query that is NaN gets no target: the loss is finite."""
    logits, boxes_cxcywh = torch.zeros(2, 5, 7), torch.full((2, 5, 4), 0.5)
    boxes_cxcywh[:, where] = NAN
    boxes_cxcywh.requires_grad_()
    loss, losses, _ = detector.loss_function(
        logits, random_labels((4, 2)), torch.device("cpu"), boxes_cxcywh, detector.config
    )
    assert losses["loss_bbox"].isfinite()
    assert losses["loss_giou"].isfinite()
    loss.backward()
    assert boxes_cxcywh.grad.isfinite().all()
