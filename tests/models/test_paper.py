"""Where transformers departs from the paper: the difference is real, and `compat` chooses the side.

One test a row of the table in the README (compat modes); rows on data parallelism and on
post-processing are tested beside those parts.
"""

import copy
import math

import pytest
import timm
import torch
import transformers
from support.oracle import TINY, make_ours, make_pair, padded_images, random_labels

import cdetr_fast


@pytest.fixture
def images():
    return padded_images()


def test_auxiliary_loss_does_not_change_the_predictions(images):
    theirs, plain = make_pair("detection", "paper", auxiliary_loss=False)
    paper = make_ours("detection", "paper", auxiliary_loss=True)
    defect = make_ours("detection", "transformers", auxiliary_loss=True)
    their_auxiliary, _ = make_pair("detection", auxiliary_loss=True)
    for model in (paper, defect, their_auxiliary):
        model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        logits = {
            name: model.eval()(*images).logits
            for name, model in {
                "theirs": theirs,
                "their auxiliary": their_auxiliary,
                "plain": plain,
                "paper": paper,
                "defect": defect,
            }.items()
        }
    assert torch.equal(logits["paper"], logits["plain"])
    torch.testing.assert_close(logits["paper"], logits["theirs"], rtol=0, atol=1e-4)
    torch.testing.assert_close(logits["defect"], logits["their auxiliary"], rtol=0, atol=1e-4)
    assert (logits["their auxiliary"] - logits["theirs"]).abs().max() > 0.1


def test_last_auxiliary_state_is_the_last_state_in_the_paper(images):
    paper = make_ours("base", "paper", auxiliary_loss=True).eval()
    with torch.no_grad():
        outputs = paper(*images)
    assert torch.equal(outputs.intermediate_hidden_states[-1], outputs.last_hidden_state)


def test_reference_points_start_spread_over_the_image(images):
    spread = {}
    settings = {"backbone": "resnet18", "d_model": 256, "num_queries": 300}
    for compat in ("paper", "transformers"):
        torch.manual_seed(0)
        model = make_ours("base", compat, **settings).eval()
        with torch.no_grad():
            spread[compat] = model(*images).reference_points.std().item()
    torch.manual_seed(0)
    theirs = transformers.ConditionalDetrModel(
        transformers.ConditionalDetrConfig(**(TINY | settings))
    )
    with torch.no_grad():
        spread["theirs"] = theirs.eval()(*images).reference_points.std().item()
    assert spread["paper"] == pytest.approx(0.18, abs=0.06)
    assert spread["theirs"] < 0.001
    assert spread["transformers"] < 0.001


def test_first_class_loss(images):
    first = {}
    labels = random_labels((3, 2), classes=91)
    for compat in ("paper", "transformers"):
        torch.manual_seed(0)
        model = make_ours("detection", compat, num_labels=91, num_queries=300)
        first[compat] = model(*images, labels=labels).loss_dict["loss_ce"].item()
    theirs = transformers.ConditionalDetrForObjectDetection(
        transformers.ConditionalDetrConfig(**(TINY | {"num_labels": 91, "num_queries": 300}))
    )
    first["theirs"] = theirs(*images, labels=labels).loss_dict["loss_ce"].item()
    assert first["paper"] < 5
    assert first["theirs"] > 100 * first["paper"]
    assert first["transformers"] > 100 * first["paper"]
    prior = make_ours("detection", "paper", num_labels=91).class_labels_classifier.bias
    torch.testing.assert_close(prior, torch.full((91,), -math.log(99)))


def test_boxes_start_at_their_reference_points(images):
    model = make_ours("detection", "paper").eval()
    with torch.no_grad():
        outputs = model(*images)
        points = model.model(*images).reference_points.transpose(0, 1)
    torch.testing.assert_close(outputs.pred_boxes[..., :2], points, rtol=0, atol=1e-5)
    assert (outputs.pred_boxes[..., 2:] == 0.5).all()


@pytest.mark.parametrize(("compat", "weight"), [("paper", 3), ("transformers", 1)])
def test_class_loss_coefficient(images, compat, weight):
    theirs, ours = make_pair("detection", compat, cls_loss_coefficient=3)
    outputs = ours(*images, labels=random_labels())
    parts = outputs.loss_dict
    expected = weight * parts["loss_ce"] + 5 * parts["loss_bbox"] + 2 * parts["loss_giou"]
    torch.testing.assert_close(outputs.loss, expected)
    their_loss = theirs(*images, labels=random_labels()).loss
    assert (abs(their_loss - outputs.loss) < 1e-3) == (compat == "transformers")


def frozen_modules(model) -> set[str]:
    named = model.named_parameters()
    return {name.split(".")[0] for name, p in named if not p.requires_grad}


def test_stem_and_first_stage_are_frozen():
    theirs, defect = make_pair("base", "transformers")
    paper = make_ours("base", "paper")
    assert frozen_modules(paper.backbone.model) == {"conv1", "layer1"}
    assert frozen_modules(theirs.backbone.model) == set()
    assert frozen_modules(defect.backbone.model) == set()
    paper.freeze_backbone()
    assert not any(p.requires_grad for p in paper.backbone.parameters())
    paper.unfreeze_backbone()
    assert frozen_modules(paper.backbone.model) == set()


def test_frozen_stages_of_other_backbones():
    """Up to stride 4, whatever timm calls the stages."""
    expected = {
        "tf_efficientnet_lite0": ({"conv_stem", "blocks.0", "blocks.1"}, {"blocks.2"}),
        "convnext_atto": ({"stem_0", "stem_1", "stages_0"}, {"stages_1"}),
        "regnetx_002": ({"stem", "s1"}, {"s2"}),
    }
    for backbone, (frozen, trained) in expected.items():
        model = make_ours("base", "paper", backbone=backbone).backbone.model
        for prefixes, requires_grad in ((frozen, False), (trained, True)):
            for prefix in prefixes:
                parameters = list(model.get_submodule(prefix).parameters())
                assert parameters, (backbone, prefix)
                assert all(p.requires_grad == requires_grad for p in parameters), (backbone, prefix)


def test_transformers_own_resnet_is_frozen_as_a_whole_there_only():
    backbone = {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    settings = {k: v for k, v in TINY.items() if k != "backbone"} | {"backbone_config": backbone}
    theirs = transformers.ConditionalDetrModel(transformers.ConditionalDetrConfig(**settings))
    assert not any(p.requires_grad for p in theirs.backbone.parameters())
    early = {"embedder.embedder", "encoder.stages.0"}
    for compat, frozen in (("paper", early), ("transformers", None)):
        config = cdetr_fast.ConditionalDetrConfig(compat=compat, **copy.deepcopy(settings))
        ours = cdetr_fast.ConditionalDetrModel(config)
        if frozen is None:
            assert not any(p.requires_grad for p in ours.backbone.parameters())
        else:
            parts = ours.backbone.model.named_parameters()
            names = {name for name, p in parts if not p.requires_grad}
            assert all(any(name.startswith(part + ".") for part in frozen) for name in names)
            assert {part for part in frozen if any(n.startswith(part) for n in names)} == frozen


def test_segmentation_boxes_have_reference_points(images):
    theirs, paper = make_pair("segmentation", "paper")
    detector = paper.conditional_detr
    with torch.no_grad():
        expected = detector.eval()(*images).pred_boxes
        got = paper.eval()(*images).pred_boxes
        defect = theirs.eval()(*images).pred_boxes
    torch.testing.assert_close(got, expected)
    assert (defect - expected).abs().max() > 0.05


def test_segmentation_matches_by_the_focal_cost(images):
    """An image whose best match differs between the costs: softmax has classes compete."""
    losses = {}
    for compat in ("paper", "transformers"):
        config = cdetr_fast.ConditionalDetrConfig(
            compat=compat, num_labels=2, bbox_cost=0, giou_cost=0, backbone="resnet18"
        )
        # Query 0: both classes likely. Query 1: neither, but class 0 more than class 1.
        logits = torch.tensor([[[3.0, 3.0], [-1.0, -4.0]]])
        boxes = torch.full((1, 2, 4), 0.5)
        labels = [
            {
                "class_labels": torch.tensor([0]),
                "boxes": torch.full((1, 4), 0.5),
                "masks": torch.ones(1, 8, 8),
            }
        ]
        masks = torch.tensor([-5.0, 5.0])[None, :, None, None].expand(1, 2, 8, 8)
        from cdetr_fast.loss.criterion import segmentation_loss

        _, loss_dict, _ = segmentation_loss(logits, labels, logits.device, boxes, masks, config)
        losses[compat] = loss_dict["loss_dice"].item()
    assert losses["paper"] > 0.9  # query 0, whose mask is empty
    assert losses["transformers"] < 0.1  # query 1, whose mask is right


def test_a_nan_box_is_reported_and_training_goes_on(images, caplog):
    theirs, ours = make_pair("detection", "paper", auxiliary_loss=True)
    for model in (theirs, ours):
        with torch.no_grad():
            model.bbox_predictor.layers[-1].bias[0] = float("nan")
    with pytest.raises(ValueError, match="corner"):
        theirs(*images, labels=random_labels())
    with caplog.at_level("WARNING", logger="cdetr_fast"):
        outputs = ours(*images, labels=random_labels())
    assert not outputs.loss.isfinite()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3  # one a decoder layer
    assert "pred_boxes of decoder layer 1 of 3, images [0, 1]" in messages[1]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains(images, dtype, task):
    theirs, ours = make_pair(task, "paper", auxiliary_loss=True)
    pixel_values, pixel_mask = images
    labels = random_labels(masks=True)
    labels[0]["masks"] = torch.ones(3, 400, 400, dtype=torch.bool)  # sums overflow fp16
    with pytest.raises((RuntimeError, NotImplementedError)):
        theirs.to(dtype)(pixel_values.to(dtype), pixel_mask, labels=labels)
    outputs = ours.to(dtype)(pixel_values.to(dtype), pixel_mask, labels=labels)
    assert all(loss.isfinite() for loss in outputs.loss_dict.values())
    assert outputs.pred_boxes.dtype == torch.float32
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)


def test_boxes_keep_single_precision(images):
    """Centres in pixels of a 1333-pixel image: bf16 rounds them away, fp32 does not.

    The decoder's states are given, so that the box path alone is compared.
    """
    theirs, ours = (model.eval().bfloat16() for model in make_pair("detection", "paper"))
    exact = copy.deepcopy(theirs).double()  # the same, already rounded weights
    states = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    pixel_values, pixel_mask = images

    def boxes(model, dtype):
        decoder = model.model.decoder
        handle = decoder.register_forward_hook(
            lambda module, arguments, output: replace(output, states.to(dtype))
        )
        with torch.no_grad():
            outputs = model(pixel_values.to(dtype), pixel_mask)
        handle.remove()
        return outputs.pred_boxes[..., :2].double()

    def replace(output, hidden_state):
        output.last_hidden_state = hidden_state
        return output

    expected = boxes(exact, torch.float64)
    assert (boxes(ours, torch.bfloat16) - expected).abs().max() * 1333 < 0.01
    assert (boxes(theirs, torch.bfloat16) - expected).abs().max() * 1333 > 1.0


def test_reference_points_keep_single_precision(images):
    _, ours = make_pair("base", "paper")
    ours.eval().bfloat16()
    exact = copy.deepcopy(ours).double()
    pixel_values, pixel_mask = images
    with torch.no_grad():
        got = ours(pixel_values.bfloat16(), pixel_mask).reference_points
        expected = exact(pixel_values.double(), pixel_mask).reference_points
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 1e-6


def test_decoder_inputs_are_honoured(images):
    theirs, ours = make_pair("detection", "paper")
    states = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[:, 10:] = 0
    for argument in ({"decoder_inputs_embeds": states}, {"decoder_attention_mask": mask}):
        with torch.no_grad():
            their_change = theirs.eval()(*images, **argument).logits - theirs(*images).logits
            our_change = ours.eval()(*images, **argument).logits - ours(*images).logits
        assert (their_change == 0).all()
        assert our_change.abs().max() > 1e-3  # rounding is 1e-6


def test_a_masked_query_is_not_attended_to(images):
    _, ours = make_pair("detection", "paper")
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[1, 10:] = 0
    with torch.no_grad():
        attentions = ours.eval()(
            *images, decoder_attention_mask=mask, output_attentions=True
        ).decoder_attentions
    for attention in attentions:
        assert (attention[1, :, :, 10:] == 0).all()
        assert (attention[0, :, :, 10:] > 0).all()


def test_zeros_in_place_of_default_decoder_inputs_change_nothing(images):
    _, ours = make_pair("detection", "paper")
    ours.eval()
    with torch.no_grad():
        expected = ours(*images).logits
        given = ours(*images, decoder_inputs_embeds=torch.zeros(2, 20, 64)).logits
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", ["tf_mobilenetv3_small_075", "tf_efficientnet_lite0"])
def test_activations_of_the_backbone_are_kept(backbone):
    reference = timm.create_model(backbone, features_only=True, out_indices=(1, 2, 3, 4)).eval()
    models = make_pair("base", "paper", backbone=backbone)
    defect = make_ours("base", "transformers", backbone=backbone)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = []
    with torch.no_grad():
        expected = reference(image)[-1]
        for model in (*models, defect):
            backbone_model = model.eval().backbone.model
            backbone_model.load_state_dict(reference.state_dict(), strict=False)
            features.append(backbone_model(image)[-1])
    theirs, paper, defective = features
    scale = expected.abs().max()
    torch.testing.assert_close(paper, expected, rtol=0, atol=float(1e-4 * scale))
    assert (theirs - expected).abs().max() > 0.1 * scale
    tolerance = float(1e-3 * theirs.abs().max())
    torch.testing.assert_close(defective, theirs, rtol=0, atol=tolerance)


def test_backbones_with_four_stages_work(images):
    settings = TINY | {"backbone": "convnext_atto"}
    with pytest.raises(IndexError):
        transformers.ConditionalDetrModel(transformers.ConditionalDetrConfig(**settings))
    model = make_ours("segmentation", "paper", backbone="convnext_atto").eval()
    with torch.no_grad():
        outputs = model(*images)
    assert outputs.logits.isfinite().all()
    assert model.conditional_detr.model.backbone.intermediate_channel_sizes == [40, 80, 160, 320]
