"""Matching cost and set loss against transformers' criterion; scipy by brute force."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from transformers.loss import loss_deformable_detr, loss_for_object_detection

from cdetr_fast import ConditionalDetrConfig
from cdetr_fast.loss.assignment import match
from cdetr_fast.loss.criterion import detection_loss
from cdetr_fast.loss.targets import Targets, pad_targets
from cdetr_kernels import matching_cost, set_loss
from cdetr_kernels.ops.matching_cost.reference import generalized_iou, planes
from cdetr_kernels.ops.set_loss.focal import focal_in_one_pass, focal_loss

COUNTS = (4, 0, 2, 7)


def batch(layers=3, queries=6, classes=5, counts=COUNTS, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = len(counts)
    logits = torch.randn(layers, images, queries, classes, generator=generator).to(dtype)
    boxes = (torch.rand(layers, images, queries, 4, generator=generator) * 0.5 + 0.2).to(dtype)
    labels = [
        {
            "class_labels": torch.randint(0, classes, (count,), generator=generator),
            "boxes": (torch.rand(count, 4, generator=generator) * 0.5 + 0.2).to(dtype),
        }
        for count in counts
    ]
    return logits, boxes, labels


def padded(labels) -> Targets:
    return pad_targets(labels, torch.device("cpu"), len(labels), 1000)


def pairs_of(matches) -> torch.Tensor:
    """Layer, image, query and target of each pair, [4, M]."""
    layer, image, target = (matches >= 0).nonzero().T
    return torch.stack([layer, image, matches[layer, image, target], target])


def their_cost(logits, boxes, labels, matcher_class, monkeypatch) -> list[torch.Tensor]:
    """The blocks of an image's own targets, caught on their way into scipy."""
    module = {
        "DeformableDetrHungarianMatcher": loss_deformable_detr,
        "HungarianMatcher": loss_for_object_detection,
    }[matcher_class.__name__]
    seen = []
    solve = module.linear_sum_assignment
    monkeypatch.setattr(module, "linear_sum_assignment", lambda c: (seen.append(c), solve(c))[1])
    matcher = matcher_class(class_cost=2, bbox_cost=5, giou_cost=2)
    matcher({"logits": logits, "pred_boxes": boxes}, labels)
    return seen


@pytest.mark.parametrize("classification", ["focal", "softmax"])
def test_cost_equals_transformers(classification, monkeypatch):
    logits, boxes, labels = batch()
    matcher = {
        "focal": loss_deformable_detr.DeformableDetrHungarianMatcher,
        "softmax": loss_for_object_detection.HungarianMatcher,
    }[classification]
    targets = padded(labels)
    got = matching_cost(
        logits, boxes, targets.labels, targets.boxes_cxcywh, targets.counts,
        classification=classification,
    ).unflatten(0, (3, 4))  # fmt: skip
    for layer in range(3):
        with monkeypatch.context() as patch:
            expected = their_cost(logits[layer], boxes[layer], labels, matcher, patch)
        for image, count in enumerate(COUNTS):
            torch.testing.assert_close(
                got[layer, image, :, :count], expected[image], rtol=1e-5, atol=1e-5
            )
            assert (got[layer, image, :, count:] == 0).all()


def test_generalized_iou_equals_torchvision():
    _, boxes, _ = batch(dtype=torch.float64)
    first, second = planes(boxes[0, 0]), planes(boxes[1, 0])
    corners = (box_convert(x, "cxcywh", "xyxy") for x in boxes[:2, 0])
    got = generalized_iou(first[:, :, None], second[:, None])
    torch.testing.assert_close(got, generalized_box_iou(*corners))


def all_losses(logits, boxes, labels, matches, dtype=torch.float32):
    targets = padded(labels)
    return set_loss(
        logits, boxes, targets.labels, targets.boxes_cxcywh, targets.counts, matches,
        torch.tensor(13.0, dtype=dtype),
    )  # fmt: skip


@pytest.mark.parametrize("queries", [6, 1])
def test_loss_equals_transformers_criterion(queries):
    logits, boxes, labels = batch(queries=queries)
    config = ConditionalDetrConfig(num_labels=5)
    matches = match(logits, boxes, padded(labels), config).queries
    got = all_losses(logits, boxes, labels, matches)
    matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(2, 5, 2)
    criterion = loss_deformable_detr.DeformableDetrImageLoss(
        matcher, 5, 0.25, ["labels", "boxes", "cardinality"]
    )
    for layer in range(3):
        expected = criterion({"logits": logits[layer], "pred_boxes": boxes[layer]}, labels)
        assert set(expected) == set(got)
        for name, value in expected.items():
            torch.testing.assert_close(got[name][layer], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("confidence", [2.0, 4.0, 8.0])
def test_loss_of_confident_predictions(confidence):
    """Near the end of a training: matched logits high, all others low, and the loss very small."""
    exact, boxes, labels = batch(layers=1, queries=50, classes=20, dtype=torch.float64)
    matches = match(exact, boxes, padded(labels), ConditionalDetrConfig(num_labels=20)).queries
    layer, image, query, target = pairs_of(matches)
    matched = (layer, image, query, padded(labels).labels[image, target])
    exact = (0.1 * exact - confidence - 1).index_put(matched, torch.tensor(confidence).double())
    wanted = torch.zeros_like(exact).index_put(matched, torch.tensor(1.0).double())
    results = {}
    for dtype in (torch.float64, torch.float32):
        logits = exact.to(dtype, copy=True).requires_grad_()
        loss = all_losses(logits, boxes.to(dtype), labels, matches, dtype)["loss_ce"].sum()
        loss.backward()
        results[dtype] = loss, logits.grad
    expected_logits = exact.clone().requires_grad_()
    expected = sigmoid_focal_loss(expected_logits, wanted, 0.25, 2.0, "sum") / 13.0
    expected.backward()
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-5)):
        loss, gradient = results[dtype]
        torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
        torch.testing.assert_close(
            gradient[matched].double(), expected_logits.grad[matched], rtol=tolerance, atol=0
        )
        torch.testing.assert_close(
            gradient.double(), expected_logits.grad, rtol=tolerance, atol=tolerance * 1e-3
        )


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_on_a_cpu_equals_the_definition(gamma, dtype):
    """Derivatives to some roundings of their own size, and theirs, of logits of any size."""
    values = torch.linspace(-20, 20, 3 * 2 * 40 * 5)
    values[:4] = torch.tensor([60.0, -60.0, 200.0, -200.0])
    logits = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    logits = logits.view(3, 2, 40, 5).to(dtype)
    pairs = torch.tensor([[3, 77, 400], [400, 0, 399], [8, 400, 9]])  # 400: none
    found = []
    for function, x in ((focal_in_one_pass, logits), (focal_loss, logits.double())):
        leaf = x.clone().requires_grad_()
        loss = function(leaf, pairs, 0.25, gamma)
        weights = torch.arange(1, 4).to(loss.dtype)
        (gradient,) = torch.autograd.grad(loss @ weights, leaf, retain_graph=True)
        (slope,) = torch.autograd.grad(loss @ weights, leaf, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), leaf)
        found.append((loss, gradient, slope, second))
    tolerance = 8 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    for got, exact, atol in zip(*found, (0, 1e-37, 1e-6, 1e-5), strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=atol)


def test_loss_gradients():
    logits, boxes, labels = batch(dtype=torch.float64)
    matches = match(logits, boxes, padded(labels), ConditionalDetrConfig(num_labels=5)).queries

    def total(logits, boxes):
        losses = all_losses(logits, boxes, labels, matches, torch.float64)
        return losses["loss_ce"], losses["loss_bbox"], losses["loss_giou"]

    leaves = (logits.requires_grad_(), boxes.requires_grad_())
    assert torch.autograd.gradcheck(total, leaves)
    assert not all_losses(*leaves, labels, matches)["cardinality_error"].requires_grad


@given(
    queries=st.integers(1, 4),
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    layers=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_match_is_a_cheapest_assignment(queries, counts, layers, seed):
    logits, boxes, labels = batch(layers, queries, 3, counts, seed)
    targets = padded(labels)
    matches = pairs_of(match(logits, boxes, targets, ConditionalDetrConfig(num_labels=3)).queries)
    cost = matching_cost(logits, boxes, targets.labels, targets.boxes_cxcywh, targets.counts)
    cost = cost.unflatten(0, (layers, len(counts)))
    assert matches.shape[1] == layers * sum(min(queries, count) for count in counts)
    for layer, image in itertools.product(range(layers), range(len(counts))):
        own = matches[2:, (matches[0] == layer) & (matches[1] == image)]
        pairs = min(queries, counts[image])
        assert own.shape[1] == len(set(own[0].tolist())) == len(set(own[1].tolist())) == pairs
        block = cost[layer, image, :, : counts[image]]
        if pairs == 0:
            continue
        if queries >= counts[image]:
            options = itertools.permutations(range(queries), pairs)
            best = min(sum(block[q, t] for t, q in enumerate(option)) for option in options)
        else:
            options = itertools.permutations(range(counts[image]), pairs)
            best = min(sum(block[q, t] for q, t in enumerate(option)) for option in options)
        torch.testing.assert_close(block[own[0], own[1]].sum(), torch.as_tensor(best))


def test_non_finite_predictions_are_matched_last(caplog):
    logits, boxes, labels = batch(layers=2, queries=6, counts=(3, 2))
    boxes[1, 0, :3] = float("nan")
    logits[0, 1, 2, 4] = float("inf")
    with caplog.at_level("WARNING", logger="cdetr_fast"):
        matches = match(logits, boxes, padded(labels), ConditionalDetrConfig(num_labels=5))
    matches = pairs_of(matches.queries)
    of_image = matches[2, (matches[0] == 1) & (matches[1] == 0)]
    assert (of_image >= 3).all()
    messages = sorted(record.getMessage() for record in caplog.records)
    assert "logits of decoder layer 0 of 2, images [1]" in messages[0]
    assert "pred_boxes of decoder layer 1 of 2, images [0]" in messages[1]


@pytest.mark.parametrize("of_layers", [lambda x: x[-1], lambda x: x[-1].clone(), lambda x: x[0],
                                       lambda x: x[-1].detach()],
                         ids=["view", "copy", "another view", "detached"])  # fmt: skip
def test_the_last_layer_counts_as_given(of_layers):
    """A view of the last auxiliary layer is not copied; its gradient goes where it belongs."""
    logits, boxes, labels = batch()
    config = ConditionalDetrConfig(num_labels=5, auxiliary_loss=True, compat="transformers")
    device = torch.device("cpu")
    got, expected = (logits.clone().requires_grad_() for _ in range(2))
    for leaf, criterion in (
        (got, detection_loss),
        (expected, loss_deformable_detr.DeformableDetrForObjectDetectionLoss),
    ):
        loss, _, _ = criterion(of_layers(leaf), labels, device, boxes[-1], config, leaf, boxes)
        loss.backward()
    torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-6)


def test_no_objects_at_all():
    logits, boxes, labels = batch(layers=1, counts=(0, 0))
    logits.requires_grad_()
    boxes.requires_grad_()
    config = ConditionalDetrConfig(num_labels=5)
    loss, losses, _ = detection_loss(logits[0], labels, torch.device("cpu"), boxes[0], config)
    loss.backward()
    assert losses["loss_bbox"] == 0
    assert losses["loss_giou"] == 0
    assert losses["loss_ce"] > 0
    assert (boxes.grad == 0).all()
    assert (logits.grad != 0).any()


def test_errors():
    logits, boxes, labels = batch()
    targets = padded(labels)
    arguments = {
        "logits": logits,
        "boxes_cxcywh": boxes,
        "target_labels": targets.labels,
        "target_boxes_cxcywh": targets.boxes_cxcywh,
        "target_counts": targets.counts,
    }
    cases = {
        "logits: expected 4 dimensions": {"logits": logits[0]},
        r"boxes_cxcywh: expected \[3, 4, 6, 4\]": {"boxes_cxcywh": boxes[:, :, :5]},
        r"target_boxes_cxcywh: expected \[4, 7, 4\]": {
            "target_boxes_cxcywh": targets.boxes_cxcywh[:, :3]
        },
        r"target_counts: expected \[4\]": {"target_counts": targets.counts[:2]},
        "classification: expected": {"classification": "hinge"},
    }
    for message, change in cases.items():
        with pytest.raises(ValueError, match=message):
            matching_cost(**(arguments | change))
    with pytest.raises(TypeError, match="target_labels: expected int64"):
        matching_cost(**(arguments | {"target_labels": targets.labels.int()}))
    with pytest.raises(ValueError, match=r"matches: expected \[3, 4, 7\], got \[3, 4, 6\]"):
        set_loss(**arguments, matches=torch.zeros(3, 4, 6, dtype=torch.int64), num_boxes=1)
    with pytest.raises(TypeError, match=r"matches: expected int64 \[3, 4, 7\], got float32"):
        set_loss(**arguments, matches=torch.zeros(3, 4, 7), num_boxes=1)
