"""Settings of the image processor: files, attributes, and what is refused."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.processing import SMALL, Theirs, pixels

from cdetr_fast.images import (
    ConditionalDetrFeatureExtractor,
    ConditionalDetrImageProcessor,
    ConditionalDetrImageProcessorFast,
)
from cdetr_fast.images import targets as annotations_module

V4_FEATURE_EXTRACTOR = {
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConditionalDetrFeatureExtractor",
    "format": "coco_detection",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "max_size": 1333,
    "size": 800,
}
V4_FAST = {
    "crop_size": None,
    "data_format": "channels_first",
    "default_to_square": False,
    "device": None,
    "do_center_crop": None,
    "do_convert_annotations": True,
    "do_convert_rgb": None,
    "do_normalize": True,
    "do_pad": True,
    "do_rescale": True,
    "do_resize": True,
    "format": "coco_detection",
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "ConditionalDetrImageProcessorFast",
    "image_std": [0.229, 0.224, 0.225],
    "input_data_format": None,
    "pad_size": None,
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "return_tensors": None,
    "size": {"longest_edge": 1333, "shortest_edge": 800},
}


@pytest.mark.parametrize("content", [V4_FEATURE_EXTRACTOR, V4_FAST], ids=["v4", "v4-fast"])
def test_files_of_transformers_4(tmp_path, content):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        processor = ConditionalDetrImageProcessor.from_pretrained(tmp_path)
    expected = Theirs.from_pretrained(tmp_path).to_dict()
    for key, value in processor.to_dict().items():
        assert expected[key] == (tuple(value) if isinstance(value, list) else value), key


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"max_height": 60, "max_width": 90}, "pad_size": 100, "do_normalize": False},
        {"size": SMALL, "resample": 3, "format": "coco_panoptic", "image_mean": 0.5},
        {"size": (30, 40), "do_pad": False, "do_convert_rgb": True, "rescale_factor": 0.5},
    ],
    ids=str,
)
def test_files_go_both_ways(tmp_path, settings):
    theirs, ours = Theirs(**settings), ConditionalDetrImageProcessor(**settings)
    assert json.loads(ours.to_json_string()) == json.loads(theirs.to_json_string())
    theirs.save_pretrained(tmp_path / "theirs")
    assert ours.save_pretrained(tmp_path / "ours") == [
        str(tmp_path / "ours" / "preprocessor_config.json")
    ]
    back = Theirs.from_pretrained(tmp_path / "ours")
    assert json.loads(back.to_json_string()) == json.loads(theirs.to_json_string())
    read = ConditionalDetrImageProcessor.from_pretrained(tmp_path / "theirs")
    assert read.to_dict() == ours.to_dict()
    auto = transformers.AutoImageProcessor.from_pretrained(tmp_path / "ours")
    assert type(auto) is Theirs


def test_processor_config_goes_first(tmp_path):
    nested = {"image_processor": {"size": {"height": 10, "width": 20}}, "processor_class": "X"}
    ConditionalDetrImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(nested))
    processor = ConditionalDetrImageProcessor.from_pretrained(tmp_path)
    assert (
        processor.size == {"height": 10, "width": 20} == dict(Theirs.from_pretrained(tmp_path).size)
    )
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "X"}))
    assert ConditionalDetrImageProcessor.from_pretrained(tmp_path).size["shortest_edge"] == 800


def test_overrides_and_unknown_keys(tmp_path):
    ConditionalDetrImageProcessor().save_pretrained(tmp_path)
    read = ConditionalDetrImageProcessor.from_pretrained
    assert read(tmp_path, do_pad=False, use_fast=True).do_pad is False
    file = tmp_path / "preprocessor_config.json"
    assert read(file, size={"height": 3, "width": 4}).size == {"height": 3, "width": 4}
    processor, unused = read(tmp_path, do_pad=False, foo=1, return_unused_kwargs=True)
    assert processor.do_pad is False
    assert unused == {"foo": 1}
    with pytest.raises(TypeError, match="unknown field 'do_padd'; did you mean 'do_pad'"):
        read(tmp_path, do_padd=False)
    with pytest.warns(UserWarning, match=r"unknown settings are left out: \['new_key'\]"):
        ConditionalDetrImageProcessor.from_dict({"new_key": 1})
    with pytest.raises(FileNotFoundError, match=r"preprocessor_config\.json"):
        read(tmp_path / "..", local_files_only=True)
    file.write_text("{")
    with pytest.raises(OSError, match="expected a JSON file"):
        read(tmp_path)


def test_compat_is_written_only_when_it_is_not_the_default(tmp_path):
    assert "compat" not in ConditionalDetrImageProcessor().to_dict()
    processor = ConditionalDetrImageProcessor(compat="transformers")
    processor.save_pretrained(tmp_path)
    assert ConditionalDetrImageProcessor.from_pretrained(tmp_path).compat == "transformers"
    Theirs.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compat: expected one of 'paper', 'transformers'"):
        ConditionalDetrImageProcessor(compat="detr")


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    ConditionalDetrImageProcessor().save_pretrained(tmp_path)
    before = (tmp_path / "preprocessor_config.json").read_text()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        ConditionalDetrImageProcessor(do_pad=False).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").read_text() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_names_and_deprecated_arguments():
    assert ConditionalDetrImageProcessorFast is ConditionalDetrImageProcessor
    with pytest.warns(FutureWarning, match="use ConditionalDetrImageProcessor"):
        extractor = ConditionalDetrFeatureExtractor(size=SMALL)
    assert extractor.to_dict()["image_processor_type"] == "ConditionalDetrImageProcessor"
    with pytest.warns(FutureWarning, match="max_size is deprecated"):
        processor = ConditionalDetrImageProcessor(size=60, max_size=90)
    assert processor.size == {"shortest_edge": 60, "longest_edge": 90}
    with pytest.warns(FutureWarning, match="max_size"):
        assert ConditionalDetrImageProcessor(max_size=900).size["longest_edge"] == 900
    with pytest.warns(FutureWarning, match="use do_pad"):
        assert ConditionalDetrImageProcessor(pad_and_return_pixel_mask=False).do_pad is False


def test_defaults_of_a_derived_class(tmp_path):
    class Own(ConditionalDetrImageProcessor):
        image_mean = (0.5, 0.5, 0.5)
        do_normalize = False
        size = {"shortest_edge": 64}  # noqa: RUF012 - as transformers' classes have it

    own, given = Own(), Own(do_normalize=True, image_mean=None)
    assert (own.image_mean, own.size) == ((0.5, 0.5, 0.5), {"shortest_edge": 64})
    assert own.do_normalize is own.do_convert_annotations is False
    assert (given.image_mean, given.do_normalize) == ((0.5, 0.5, 0.5), True)
    assert own(pixels(97, 131)).pixel_values.shape[-2:] == (64, 86)
    given.save_pretrained(tmp_path)
    assert ConditionalDetrImageProcessor.from_pretrained(tmp_path).image_mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert Own.from_pretrained(tmp_path).do_normalize is False


def test_attributes_can_be_set():
    processor = ConditionalDetrImageProcessor()
    processor.size = 32
    processor.do_pad = False
    features = processor(pixels(97, 131))
    assert features.pixel_values.shape[-2:] == (32, 43)
    assert "pixel_mask" not in features


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "call", "error", "message"),
    [
        ([], {}, ValueError, "images: expected at least one image, got an empty list"),
        (None, {}, TypeError, "images: expected PIL images.* got NoneType"),
        ([3], {}, TypeError, "images: expected PIL images.* got int"),
        (
            np.zeros((9, 9, 5), np.uint8),
            {},
            ValueError,
            r"images\[0\]: expected 1, 3 or 4 channels",
        ),
        (np.zeros((1, 1, 1, 9, 9)), {}, ValueError, r"images\[0\]: .* got \[1, 1, 1, 9, 9\]"),
        (np.zeros((0, 9, 3)), {}, ValueError, "at least one pixel"),
        (np.zeros((9, 9, 3), bool), {}, TypeError, "integers or floats, got bool"),
        (torch.zeros(3, 9, 9, dtype=torch.bool), {}, TypeError, "got torch.bool"),
        (Image.new("I;16", (9, 9)), {}, ValueError, "8 bits per channel, got PIL mode 'I;16'"),
        (
            torch.full((4, 9, 9), 2.0),
            {"do_convert_rgb": True},
            ValueError,
            r"RGBA floats in \[0, 1\]",
        ),
        (
            pixels(9, 9),
            {"input_data_format": "hwc"},
            ValueError,
            "input_data_format: expected one of",
        ),
        (pixels(9, 9), {"size": {"width": 3}}, ValueError, "size: expected keys"),
        (pixels(9, 9), {"size": {"width": 3, "height": 0}}, ValueError, "size: expected positive"),
        (pixels(9, 9), {"size": "big"}, ValueError, "size: expected a dict"),
        (pixels(9, 9), {"pad_size": 5}, ValueError, r"pad_size: expected at least"),
        (pixels(9, 9), {"pad_size": {"shortest_edge": 5}}, ValueError, "pad_size: expected keys"),
        (pixels(9, 9), {"do_resize": 1}, TypeError, "do_resize: expected True or False, got 1"),
        (pixels(9, 9), {"resample": 9}, ValueError, "resample: expected"),
        (pixels(9, 9), {"resample": 4}, ValueError, "resample: expected .* got BOX"),
        (pixels(9, 9), {"image_mean": (1.0, 2.0)}, ValueError, "image_mean: expected 3 values"),
        (pixels(9, 9), {"do_rezise": True}, TypeError, "'do_rezise'; did you mean 'do_resize'"),
        (pixels(9, 9), {"format": "voc"}, ValueError, "format: expected one of"),
        (pixels(9, 9), {"device": "tpu9"}, ValueError, "device: expected a torch device"),
        (
            [pixels(9, 9), pixels(9, 12)],
            {"do_pad": False},
            ValueError,
            "expected one size with do_pad=False",
        ),
        (
            pixels(9, 9, 4),
            {"do_convert_rgb": False},
            ValueError,
            r"image_mean: expected 4 values \(channels\), got 3",
        ),
        (
            [pixels(9, 9)],
            {"annotations": []},
            ValueError,
            "annotations: expected 1, one per image, got 0",
        ),
        (
            pixels(9, 9),
            {"annotations": {"image_id": 1}},
            ValueError,
            r"annotations\[0\]: expected a dict with \['image_id', 'annotations'\]",
        ),
        (
            pixels(9, 9),
            {"annotations": {"image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4], "area": 1}]}},
            ValueError,
            r"annotations\[0\]\['annotations'\]\[0\]: expected \['category_id'\]",
        ),
    ],
)
def test_bad_input(images, call, error, message):
    with pytest.raises(error, match=message):
        ConditionalDetrImageProcessor()(images, **call)


def test_malformed_boxes():
    item = {"category_id": 1, "area": 1, "bbox": [1, 2, 3]}
    with pytest.raises(
        (TypeError, ValueError), match=r"id 1\): bbox: expected \[left, .*got \[1, "
    ):
        annotations_module.prepare_target(
            {"image_id": 1, "annotations": [item]}, (9, 9), "coco_detection", name="a"
        )
