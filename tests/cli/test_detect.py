"""`cdetr-fast detect` on images: results, pictures, and files that cannot be read."""

import errno
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import randomized, tiny_config

import cdetr_fast
from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.cli import detect
from cdetr_fast.common import files
from cdetr_fast.models.predict import DetectingModel


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_detect_writes_results_that_coco_reads(run, checkpoint, pictures, tmp_path):
    output = tmp_path / "results"
    done = run("detect", pictures, "--model", checkpoint, "--threshold", 0, "--output", output)
    assert (done.code, done.err.strip()) == (0, "")
    images, results = read(output / "images.json"), read(output / "detections.json")
    assert [Path(i["file_name"]).name for i in images["images"]] == ["a.png", "b.png", "c.png"]
    assert [i["id"] for i in images["images"]] == [0, 1, 2]
    assert images["categories"] == [
        {"id": 0, "name": "cat"},
        {"id": 1, "name": "dog"},
        {"id": 2, "name": "remote"},
    ]
    assert set(results[0]) == {"image_id", "category_id", "bbox", "score"}
    assert len(results) == 3 * 7 * 3  # images x queries x classes
    for record in images["images"]:
        with (
            Image.open(output / record["picture"]) as picture,
            Image.open(record["file_name"]) as o,
        ):
            assert picture.size == o.size == (record["width"], record["height"])
    assert f"3 images, {len(results)} detections: {output}" in done.out

    coco = pytest.importorskip("pycocotools.coco")
    loaded = coco.COCO(output / "images.json").loadRes(str(output / "detections.json"))
    assert len(loaded.getAnnIds(imgIds=[1])) == 21


def test_detect_gives_the_boxes_of_the_model(run, checkpoint, pictures, tmp_path):
    from cdetr_fast import ConditionalDetrImageProcessor

    path = pictures / "b.png"
    run("detect", path, "--model", checkpoint, "--threshold", 0, "--top-k", 4, "--output", tmp_path)
    results = read(tmp_path / "detections.json")

    model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint).eval()
    processor = ConditionalDetrImageProcessor.from_pretrained(checkpoint)
    image = Image.open(path)
    with torch.inference_mode():
        outputs = model(**processor(images=[image], return_tensors="pt"))
    sizes = [(image.height, image.width)]
    (expected,) = processor.post_process_object_detection(
        outputs, threshold=0.0, target_sizes=sizes, top_k=4
    )
    assert len(results) == 4
    boxes_xywh = expected["boxes"].clone()
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    np.testing.assert_allclose([r["bbox"] for r in results], boxes_xywh, atol=1e-3)
    np.testing.assert_allclose([r["score"] for r in results], expected["scores"], atol=1e-6)
    assert [r["category_id"] for r in results] == expected["labels"].tolist()


def test_batches_change_nothing(run, checkpoint, pictures, tmp_path):
    found = []
    for size in (1, 2, 3):
        output = tmp_path / str(size)
        common = ["--model", checkpoint, "--threshold", 0, "--output", output]
        assert run("detect", pictures, *common, "--batch-size", size).code == 0
        results = read(output / "detections.json")
        results.sort(key=lambda r: (r["image_id"], r["category_id"], -r["score"]))
        found.append(results)
    for results in found[1:]:
        boxes = [[r["bbox"] for r in some] for some in (results, found[0])]
        np.testing.assert_allclose(*boxes, atol=0.02)


def test_pictures_are_written_while_the_model_works(run, checkpoint, tmp_path, monkeypatch):
    """The first picture waits for the model to see the image after the next one."""
    seen = threading.Semaphore(0)
    predict = DetectingModel._detect
    save = detect.save_picture
    waited = []

    def counted(self, *arguments, **options):
        seen.release()
        return predict(self, *arguments, **options)

    def later(picture, path):
        if not waited:
            waited.append(all(seen.acquire(timeout=30) for _ in range(3)))
        save(picture, path)

    monkeypatch.setattr(DetectingModel, "_detect", counted)
    monkeypatch.setattr(detect, "save_picture", later)
    images = [tmp_path / f"{i}.png" for i in range(3)]
    for path in images:
        Image.new("RGB", (60, 40)).save(path)
    done = run("detect", *images, "--model", checkpoint, "--output", tmp_path / "found")
    assert done.code == 0, done.err
    assert waited == [True]
    index = json.loads((tmp_path / "found/images.json").read_text())
    assert [image["picture"] for image in index["images"]] == ["0.jpg", "1.jpg", "2.jpg"]


def test_a_fault_of_writing_ends_the_command(run, checkpoint, tmp_path, monkeypatch):
    def fail(picture, path):
        raise ZeroDivisionError

    monkeypatch.setattr(detect, "save_picture", fail)
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    with pytest.raises(ZeroDivisionError):
        run("detect", tmp_path / "a.png", "--model", checkpoint, "--output", tmp_path / "found")


def test_many_images_are_detected_by_the_optimised_model(
    run, checkpoint, pictures, tmp_path, monkeypatch
):
    """The numbers are those of the model one image at a time."""
    made = []

    def optimize(model, **options):
        made.append(cdetr_fast.inference.optimize(model, **options))
        return made[-1]

    monkeypatch.setattr(cdetr_fast, "optimize", optimize)
    run("detect", pictures, "--model", checkpoint, "--output", tmp_path)
    assert made == []  # three images
    Image.open(pictures / "a.png").rotate(90).save(pictures / "d.png")
    done = run("detect", pictures, "--model", checkpoint, "--threshold", 0, "--output", tmp_path)
    assert done.code == 0
    results = read(tmp_path / "detections.json")
    model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint, dtype=torch.float32)
    for i, name in enumerate("abcd"):
        expected = model.predict(pictures / f"{name}.png", 0.0)
        got = [result for result in results if result["image_id"] == i]
        scores = torch.tensor([result["score"] for result in got])
        torch.testing.assert_close(scores, expected.scores, rtol=0, atol=1e-4)
    assert len(made) == 1
    assert made[0].runner.fallback_reason is None


def test_detect_with_a_segmentation_model(run, pictures, tmp_path):
    from cdetr_fast import ConditionalDetrForSegmentation

    size = {"shortest_edge": 64, "longest_edge": 96}
    model = randomized(ConditionalDetrForSegmentation(tiny_config(num_queries=1)))
    model.save_pretrained(tmp_path / "model")
    ConditionalDetrImageProcessor(size=size).save_pretrained(tmp_path / "model")
    output = tmp_path / "results"
    options = ["--model", tmp_path / "model", "--output", output, "--threshold", 0]
    done = run("detect", pictures, *options)
    assert (done.code, done.err.strip()) == (0, "")
    coco_mask = pytest.importorskip("pycocotools.mask")
    results = read(output / "detections.json")
    assert results
    for record in read(output / "images.json")["images"]:
        masks = [
            coco_mask.decode(item["segmentation"])
            for item in results
            if item["image_id"] == record["id"]
        ]
        assert all(mask.shape == (record["height"], record["width"]) for mask in masks)
        assert np.sum(masks, axis=0).max() <= 1  # no pixel is in two of them
        assert (output / record["picture"]).is_file()


def test_threshold_drops_what_is_below(run, checkpoint, pictures, tmp_path):
    common = [pictures, "--model", checkpoint, "--output", tmp_path]
    run("detect", *common, "--threshold", 0)
    scores = sorted(r["score"] for r in read(tmp_path / "detections.json"))
    limit = (scores[30] + scores[31]) / 2
    run("detect", *common, "--threshold", limit)
    assert sorted(r["score"] for r in read(tmp_path / "detections.json")) == scores[31:]
    done = run("detect", *common, "--threshold", 1)
    assert done.code == 0
    assert read(tmp_path / "detections.json") == []
    assert done.err.startswith("no score is above 1.0; ")
    assert "3 images, 0 detections" in done.out


@pytest.mark.parametrize("batch_size", [1, 2])
def test_unreadable_images_are_reported_and_skipped(
    run, checkpoint, pictures, tmp_path, batch_size
):
    whole = (pictures / "c.png").read_bytes()
    (pictures / "b.png").write_bytes(whole[: len(whole) // 2])
    (pictures / "aa.jpg").write_bytes(b"nothing")
    Image.new("I;16", (8, 8)).save(pictures / "d.png")
    missing = tmp_path / "missing.png"
    common = ["--model", checkpoint, "--threshold", 0, "--output", tmp_path / "o"]
    done = run("detect", missing, pictures, *common, "--batch-size", batch_size)
    assert done.code == 1
    reports = done.err.strip().splitlines()
    assert [r.split(":")[1:3] for r in reports] == [
        [" skipped", f" {missing}"],
        [" skipped", f" {pictures / 'aa.jpg'}"],
        [" skipped", f" {pictures / 'b.png'}"],
        [" skipped", f" {pictures / 'd.png'}"],
    ]
    assert "8 bits per channel, got PIL mode 'I" in reports[3]  # or I;16, by Pillow's version
    assert "No such file" in reports[0]
    assert "2 images" in done.out
    assert "4 skipped" in done.out
    images = read(tmp_path / "o" / "images.json")["images"]
    assert [(i["id"], Path(i["file_name"]).name) for i in images] == [(1, "a.png"), (4, "c.png")]
    assert {r["image_id"] for r in read(tmp_path / "o" / "detections.json")} == {1, 4}


def test_equal_file_names_get_two_pictures(run, checkpoint, tmp_path):
    paths = []
    for folder, colour in (("x", "red"), ("y", "blue"), ("z", "green")):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / ("A.png" if folder == "z" else "a.png"))
        Image.new("RGB", (64, 64), colour).save(paths[-1])
    output = tmp_path / "o"
    run("detect", *paths, paths[0], "--model", checkpoint, "--output", output)
    records = read(output / "images.json")["images"]
    assert [r["picture"] for r in records] == ["a.jpg", "a_2.jpg", "A_3.jpg"]
    for record, colour in zip(records, [(255, 0, 0), (0, 0, 255), (0, 128, 0)], strict=True):
        pixel = Image.open(output / record["picture"]).getpixel((32, 32))
        assert np.abs(np.subtract(pixel, colour)).max() < 10


def test_pictures_never_overwrite_inputs(run, checkpoint, tmp_path):
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 64), "red").save(path)
    before = path.read_bytes()
    done = run("detect", path, "--model", checkpoint, "--threshold", 0, "--output", tmp_path)
    assert done.code == 0
    assert path.read_bytes() == before
    assert (tmp_path / "photo_2.jpg").is_file()


def test_a_repeated_run_into_its_input_folder_leaves_its_own_pictures_out(
    run, checkpoint, tmp_path
):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.jpg")
    for _ in range(2):
        assert run("detect", tmp_path, "--model", checkpoint, "--output", tmp_path).code == 0
        (record,) = read(tmp_path / "images.json")["images"]
        assert (record["file_name"], record["picture"]) == (
            str(tmp_path / "photo.jpg"),
            "photo_2.jpg",
        )
    assert len(list(tmp_path.glob("*.jpg"))) == 2


def test_files_whose_names_begin_with_a_dash(run, checkpoint, tmp_path):
    names = ("-a.png", "--model")
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / "work" / name, "PNG")
    done = run("detect", "--model", checkpoint, "--output", tmp_path / "o", "--", *names)
    assert done.code == 0, done.err
    assert len(read(tmp_path / "o" / "images.json")["images"]) == 2


@pytest.mark.parametrize("index", [None, "{", '{"images": [3, {"file_name": "photo.jpg"}]}', "[]"])
def test_a_repeated_run_replaces_its_pictures_alone(run, checkpoint, tmp_path, index):
    """Whatever file an images.json of something else names."""
    other = tmp_path / "photo.jpg"
    other.write_bytes(b"of somebody else")
    if index is not None:
        (tmp_path / "images.json").write_text(index)
    for colour in ("red", "blue"):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "photo.png")
        path = tmp_path / "photo.png"
        assert run("detect", path, "--model", checkpoint, "--output", tmp_path).code == 0
        assert read(tmp_path / "images.json")["images"][0]["picture"] == "photo_2.jpg"
        pixel = Image.open(tmp_path / "photo_2.jpg").getpixel((32, 32))
        assert np.argmax(pixel) == (0 if colour == "red" else 2)
    assert other.read_bytes() == b"of somebody else"
    assert len(list(tmp_path.glob("*.jpg"))) == 2


def test_rotated_photographs_are_set_upright(run, checkpoint, tmp_path):
    image = Image.new("RGB", (80, 40))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "r.jpg", exif=exif)
    run("detect", tmp_path / "r.jpg", "--model", checkpoint, "--output", tmp_path / "o")
    (record,) = read(tmp_path / "o" / "images.json")["images"]
    assert (record["width"], record["height"]) == (40, 80)
    assert Image.open(tmp_path / "o" / "r.jpg").size == (40, 80)


def test_a_picture_that_cannot_be_written_costs_that_picture(run, checkpoint, tmp_path):
    Image.new("RGB", (90, 90)).save(tmp_path / "a.png")
    Image.new("RGB", (66000, 8)).save(tmp_path / "b.png")  # JPEG ends at 65,535
    Image.new("RGB", (64, 80)).save(tmp_path / "c.png")
    output = tmp_path / "o"
    done = run("detect", tmp_path, "--model", checkpoint, "--threshold", 0, "--output", output)
    assert done.code == 1
    (line,) = done.err.strip().splitlines()
    assert line.startswith(f"cdetr-fast: not drawn: {output / 'b.jpg'}: cannot be written (")
    assert "3 images" in done.out
    assert "1 without a picture" in done.out
    records = read(output / "images.json")["images"]
    assert [r["picture"] for r in records] == ["a.jpg", None, "c.jpg"]
    assert {r["image_id"] for r in read(output / "detections.json")} == {0, 1, 2}
    assert sorted(p.name for p in output.iterdir()) == [
        "a.jpg", "c.jpg", "detections.json", "images.json"
    ]  # fmt: skip


@pytest.mark.parametrize("fails", ["pictures", "everything"])
def test_a_full_disk(run, checkpoint, pictures, tmp_path, monkeypatch, fails):
    """Results are written if they can be; the exit code and one line per loss tell."""
    write = files.write_atomically

    def full(path, *arguments):
        if fails == "everything" or path.suffix == ".jpg":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(files, "write_atomically", full)
    done = run("detect", pictures, "--model", checkpoint, "--output", tmp_path / "o")
    assert done.code == 1
    assert done.err.count("not drawn: ") == 3
    assert done.err.count("No space left on device") == (4 if fails == "everything" else 3)
    assert "Traceback" not in done.err
    assert (tmp_path / "o" / "detections.json").exists() == (fails == "pictures")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_metadata_and_hidden_files(run, checkpoint, tmp_path):
    image = Image.new("RGB", (64, 64))
    image.save(tmp_path / "a.jpg", exif=b"Exif\0\0no TIFF header")
    image.save(tmp_path / "b.png", exif=b"II*")
    (tmp_path / "._a.jpg").write_bytes(b"of macOS")
    done = run("detect", tmp_path, "--model", checkpoint, "--output", tmp_path / "o")
    assert done.code == 0, done.err
    assert len(read(tmp_path / "o" / "images.json")["images"]) == 2


def test_detect_says_what_the_checkpoint_in_the_package_finds(run, pictures, checkpoint, tmp_path):
    """It finds nothing on a photograph, which is a poor first impression without a reason."""
    for options in ([], ["--model", checkpoint], ["--quiet"]):
        done = run("detect", pictures / "a.png", "--output", tmp_path, *options)
        assert done.code == 0, done.err
        assert done.out.startswith("1 image, ")
        assert ("only finds drawn shapes (circle, " in done.err) == (options == [])
