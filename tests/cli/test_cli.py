"""The command line, run as users run it: arguments in, exit code, output and files out."""

import errno
import json
import re
import shutil
import subprocess
import sys
import threading
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import randomized, tiny_config

import cdetr_fast
from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor
from cdetr_fast.checkpoints.key_maps import to_authors
from cdetr_fast.cli import detect
from cdetr_fast.common import files
from cdetr_fast.models.predict import DetectingModel


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three images of different sizes, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, size in enumerate([(90, 60), (64, 96), (80, 80)]):
        noise = np.random.default_rng(i).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{'cab'[i]}.png")
    (folder / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(scope="module")
def authors_file(checkpoint, tmp_path_factory) -> Path:
    """The weights of `checkpoint` in a file as the paper's authors save them."""
    model = ConditionalDetrForObjectDetection.from_pretrained(checkpoint)
    path = tmp_path_factory.mktemp("authors") / "checkpoint.pth"
    args = Namespace(dilation=False, nheads=8)
    torch.save({"model": to_authors(model.state_dict()), "args": args}, path)
    (path.parent / "preprocessor_config.json").write_text(
        (checkpoint / "preprocessor_config.json").read_text()
    )
    return path


def read(path: Path) -> object:
    return json.loads(path.read_text(encoding="utf-8"))


def test_help_is_quick_and_names_the_commands():
    code = (
        "import sys\n"
        "from cdetr_fast import cli\n"
        "sys.argv[1:] = ['--help']\n"
        "try: cli.main()\n"
        "except SystemExit: print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for command in ("detect", "demo", "train", "evaluate", "convert", "info"):
        assert re.search(rf"^\s+{command} ", done.stdout, flags=re.MULTILINE)


def test_authors_file(run, checkpoint, authors_file, pictures):
    """Detections are those of the folder with the same weights."""
    found = {}
    for model in (checkpoint, authors_file):
        arguments = ("--model", model, "--threshold", 0.0, "--device", "cpu")
        done = run("detect", pictures / "a.png", *arguments, "--output", "found")
        assert done.code == 0, done.err
        found[model] = read(pictures.parent / "work" / "found" / "detections.json")
    assert len(found[checkpoint]) == 21
    for ours, theirs in zip(found[authors_file], found[checkpoint], strict=True):
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)


def test_file_that_is_no_checkpoint(run, pictures):
    done = run("detect", pictures / "a.png", "--model", pictures / "notes.txt")
    assert done.code == 1
    assert f"--model {pictures / 'notes.txt'}: {pictures / 'notes.txt'}: broken" in done.err


def test_module_is_the_same_command(root):
    command = [sys.executable, "-m", "cdetr_fast", "detect"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 2
    assert "Usage: cdetr-fast detect" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["detect"],
        ["detect", "a.png", "--threshold", "1.5"],
        ["detect", "a.png", "--threshold", "nan"],
        ["serve", "--max-wait", "nan"],
        ["serve", "--timeout", "inf"],
        ["detect", "a.png", "--batch-size", "0"],
        ["detect", "a.png", "--top-k", "many"],
        ["demo", "--seed", "-1"],
        ["demo", "--count", "0"],
        ["unknown"],
    ],
)
def test_wrong_usage_exits_with_2(run, arguments):
    done = run(*arguments)
    assert done.code == 2
    assert "Error:" in done.err
    assert "Traceback" not in done.err


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


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("model", "--model .*no-such-folder"),
        ("model file", "--model .*empty: expected"),
        ("config.json", "--model .*: num_queries: expected an integer >= 1, got '300'"),
        ("preprocessor_config.json", "--model .*: do_resize: expected True or False, got 1"),
        ("filter", "--model .*: resample: expected .* got BOX"),
        ("no image", "none of 1 images could be read"),
        ("empty folder", "no images in this folder"),
        ("device", "--device: 'frobnicator' cannot be used"),
        ("device without memory", "--device: 'meta' computes nothing"),
        ("output", "--output .*: (File exists|Not a directory)"),
    ],
)
def test_errors_are_one_line(run, checkpoint, pictures, tmp_path, case, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copytree(checkpoint, tmp_path / "filter")
    ConditionalDetrImageProcessor(resample=4).save_pretrained(tmp_path / "filter")
    for name, wrong in (
        ("config.json", {"num_queries": "300"}),
        ("preprocessor_config.json", {"do_resize": 1}),
    ):
        shutil.copytree(checkpoint, tmp_path / name)
        (tmp_path / name / name).write_text(json.dumps(read(checkpoint / name) | wrong))
    arguments = {
        "model": [pictures, "--model", tmp_path / "no-such-folder"],
        "model file": [pictures, "--model", empty],
        "config.json": [pictures, "--model", tmp_path / "config.json"],
        "preprocessor_config.json": [pictures, "--model", tmp_path / "preprocessor_config.json"],
        "filter": [pictures, "--model", tmp_path / "filter"],
        "no image": [pictures / "notes.txt", "--model", checkpoint],
        "empty folder": [empty, "--model", checkpoint],
        "device": [pictures, "--model", checkpoint, "--device", "frobnicator"],
        "device without memory": [pictures, "--model", checkpoint, "--device", "meta"],
        "output": [pictures, "--model", checkpoint, "--output", pictures / "notes.txt"],
    }[case]
    done = run("detect", *arguments)
    assert done.code == 1
    last = done.err.strip().splitlines()[-1]
    assert last.startswith("cdetr-fast: ")
    assert re.search(message, last)
    assert "Traceback" not in done.err


def test_version(run):
    done = run("--version")
    assert (done.code, done.out) == (0, f"cdetr-fast {cdetr_fast.__version__}\n")


def test_detect_says_what_the_checkpoint_in_the_package_finds(run, pictures, checkpoint, tmp_path):
    """It finds nothing on a photograph, which is a poor first impression without a reason."""
    for options in ([], ["--model", checkpoint], ["--quiet"]):
        done = run("detect", pictures / "a.png", "--output", tmp_path, *options)
        assert done.code == 0, done.err
        assert done.out.startswith("1 image, ")
        assert ("only finds drawn shapes (circle, " in done.err) == (options == [])


def test_quiet_leaves_results_and_errors(run, checkpoint, pictures, tmp_path):
    (pictures / "b.png").write_bytes(b"nothing")
    common = [pictures, "--model", checkpoint, "--output", tmp_path]
    done = run("detect", *common, "--quiet")
    assert done.code == 1
    assert done.out.startswith("2 images, ")
    (line,) = done.err.splitlines()
    assert line.startswith(f"cdetr-fast: skipped: {pictures / 'b.png'}")
    done = run("detect", *common, "--verbose", "--device", "frobnicator")
    assert done.code == 1
    assert "Traceback" in done.err
    assert done.err.splitlines()[-1].startswith("cdetr-fast: --device: ")
