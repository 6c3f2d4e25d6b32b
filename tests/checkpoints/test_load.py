"""Loading and saving: transformers 4 and 5, keys and shapes, the public checkpoint."""

import json

import huggingface_hub
import pytest
import safetensors.torch
import torch
import transformers
from support import oracle
from support.checkpoints import (  # fixtures
    CASES,
    assert_equal_outputs,
    class_of,
    our_model,
    their_model,
)

import cdetr_fast
from cdetr_fast.checkpoints.key_maps import (
    level_of,
    to_level,
    to_v4,
    to_v5,
)


@pytest.mark.parametrize("case", CASES)
def test_disk_names_are_those_of_transformers(case, tmp_path):
    task, config = CASES[case]
    theirs = their_model(task, **config)
    theirs.save_pretrained(tmp_path)
    disk = safetensors.torch.load_file(tmp_path / "model.safetensors")
    ours = our_model(task, **config).state_dict()
    assert to_v4(ours).keys() == disk.keys()
    assert to_v5(disk).keys() == ours.keys()
    assert theirs.state_dict().keys() == ours.keys()
    there_and_back = to_v5(to_v4(ours))
    assert list(there_and_back) == list(ours)
    assert all(there_and_back[key] is ours[key] for key in ours)
    assert to_v5(ours).keys() == ours.keys()


def test_v4_names_of_learned_positions():
    keys = {"model.backbone.position_embedding.row_embeddings.weight": torch.zeros(1)}
    assert list(to_v5(keys)) == ["model.position_embedding.row_embeddings.weight"]


@pytest.mark.parametrize("source", oracle.CLASSES)
@pytest.mark.parametrize("target", oracle.CLASSES)
def test_levels(source, target):
    models = {task: our_model(task).state_dict() for task in (source, target)}
    moved = to_level(models[source], level_of(models[target]))
    depth = list(oracle.CLASSES)
    smaller = min((source, target), key=depth.index)
    shared = set(moved) & set(models[target])
    expected = len(our_model(smaller).state_dict())
    assert len(shared) == expected
    assert all(moved[key].shape == models[target][key].shape for key in shared)


@pytest.mark.filterwarnings("ignore:this config.json was written by transformers")
@pytest.mark.parametrize("case", CASES)
def test_transformers_and_back(case, tmp_path):
    task, config = CASES[case]
    theirs = their_model(task, **config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = class_of(task).from_pretrained(tmp_path / "theirs")
    assert not ours.training
    assert ours.config.architectures == [oracle.CLASSES[task]]
    assert ours.config.name_or_path == str(tmp_path / "theirs")
    assert_equal_outputs(ours, theirs)

    ours.save_pretrained(tmp_path / "ours")
    a, b = (
        safetensors.torch.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("theirs", "ours")
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    back, info = getattr(transformers, oracle.CLASSES[task]).from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_equal_outputs(back.eval(), theirs)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["dtype"], written["architectures"]) == ("float32", [oracle.CLASSES[task]])
    again = class_of(task).from_pretrained(tmp_path / "ours")
    assert again.config == ours.config
    assert_equal_outputs(again, ours, 1e-6)


def test_base_and_head_models_load_each_other(tmp_path):
    detector = our_model()
    detector.save_pretrained(tmp_path / "detector")
    with pytest.warns(
        UserWarning, match=r"8 weights in the checkpoint, not in the model"
    ) as caught:
        base = class_of("base").from_pretrained(tmp_path / "detector")
    assert "class_labels_classifier.weight" in str(caught[0].message)
    images, mask = oracle.padded_images()
    with torch.no_grad():
        a, b = (m(images, pixel_mask=mask).last_hidden_state for m in (base, detector))
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)

    base.save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="8 weights not in the checkpoint, left at their"):
        _, info = class_of("detection").from_pretrained(tmp_path / "base", output_loading_info=True)
    assert len(info["missing_keys"]) == 8
    assert info["unexpected_keys"] == set()  # sets, as in transformers
    with pytest.warns(UserWarning, match=r"mask_head\.conv1\.conv\.weight"):
        segmenter = class_of("segmentation").from_pretrained(tmp_path / "detector")
    state = detector.state_dict()
    for key, tensor in segmenter.conditional_detr.state_dict().items():
        assert torch.equal(tensor, state[key]), key


def test_shapes_that_do_not_fit(tmp_path):
    our_model().save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="num_labels=3"),
        pytest.raises(
            ValueError, match=r"class_labels_classifier\.weight: expected \[3, 64\], got"
        ),
    ):
        class_of("detection").from_pretrained(tmp_path, num_labels=3)
    with pytest.warns(UserWarning, match="2 weights of another shape, left at their") as caught:
        model, info = class_of("detection").from_pretrained(
            tmp_path, num_labels=3, ignore_mismatched_sizes=True, output_loading_info=True
        )
    message = str(caught[-1].message)
    assert "class_labels_classifier.bias: expected [3], got [7]" in message
    assert "bbox_predictor" not in message
    assert info["mismatched_keys"] == {
        ("class_labels_classifier.weight", (7, 64), (3, 64)),
        ("class_labels_classifier.bias", (7,), (3,)),
    }
    # the initial value of the paper, not zero and not the checkpoint's
    torch.testing.assert_close(
        model.class_labels_classifier.bias, torch.full((3,), -torch.tensor(99.0).log().item())
    )


def test_missing_and_unexpected_are_all_listed(tmp_path):
    model = our_model()
    state = model.state_dict()
    removed = [key for key in state if ".mlp.fc" in key]
    kept = {key: tensor for key, tensor in state.items() if key not in removed}
    counter = {"model.backbone.model.bn1.num_batches_tracked": torch.tensor(3)}
    model.save_pretrained(tmp_path, state_dict=kept | counter | {"extra.weight": torch.zeros(2)})
    with pytest.warns(UserWarning, match="not all weights went into") as caught:
        _, info = class_of("detection").from_pretrained(tmp_path, output_loading_info=True)
    message = str(caught[0].message)
    assert len(caught) == 1
    assert all(key in message for key in [*removed, "extra.weight"])
    assert "num_batches_tracked" not in message
    assert info == {
        "missing_keys": set(removed),
        "unexpected_keys": {"extra.weight"},
        "mismatched_keys": set(),
        "error_msgs": [],
    }
    with pytest.raises(ValueError, match=r"expected exactly the weights of .*(\n.*)*extra\.weight"):
        class_of("detection").from_pretrained(tmp_path, strict=True)


PUBLIC = "microsoft/conditional-detr-resnet-50"


@pytest.mark.network
@pytest.mark.slow
def test_public_checkpoint(photo, data_folder):

    try:
        huggingface_hub.HfApi().model_info(PUBLIC, timeout=5)
    except Exception as error:  # whatever keeps the hub from being reached
        pytest.skip(f"the hub cannot be reached: {type(error).__name__}")
    if data_folder is None:
        pytest.skip("needs the photograph")
    model, info = cdetr_fast.ConditionalDetrForObjectDetection.from_pretrained(
        PUBLIC, output_loading_info=True
    )
    assert not any(info.values())
    processor = cdetr_fast.ConditionalDetrImageProcessor.from_pretrained(PUBLIC)
    inputs = processor(images=photo, return_tensors="pt")
    with torch.no_grad():
        output = model(**inputs)
    logits = [
        [-10.4371, -5.7565, -8.6765],
        [-10.5413, -5.8700, -8.0589],
        [-10.6824, -6.3477, -8.3927],
    ]
    boxes = [[0.7733, 0.6576, 0.4496], [0.5171, 0.1184, 0.9095], [0.8846, 0.5647, 0.2486]]
    tolerance = {"atol": 2e-4, "rtol": 0}
    torch.testing.assert_close(output.logits[0, :3, :3], torch.tensor(logits), **tolerance)
    torch.testing.assert_close(output.pred_boxes[0, :3, :3], torch.tensor(boxes), **tolerance)
    found = processor.post_process_object_detection(
        output, threshold=0.3, target_sizes=[photo.size[::-1]]
    )[0]
    scores = torch.tensor([0.8330, 0.8315, 0.8039, 0.6829, 0.5354])
    torch.testing.assert_close(found["scores"], scores, **tolerance)
    assert found["labels"].tolist() == [75, 17, 17, 75, 63]
    corner = torch.tensor([38.3089, 72.1023, 177.6292, 118.4514])
    torch.testing.assert_close(found["boxes"][0], corner, atol=2e-2, rtol=0)
