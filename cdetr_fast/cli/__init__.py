"""The command line: detect, demo, train, evaluate, convert, benchmark, export, info, build-native.

Heavy imports are inside the commands, so that `--help` and usage errors come at once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cdetr_fast.common.files import write_atomically
from cdetr_fast.demo import DEMO

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from cdetr_fast.images.results import DetectionResult

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help and one-line usage errors
    help="Conditional DETR: detect objects, see a demonstration, ask what runs on this machine.",
)

IMAGE_SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
)
"""What counts as an image in a folder; a file named on the command line may be called anything."""

# The training package reads the arguments of its commands itself, `--help` too.
_PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
    "add_help_option": False,
}

_SCENES_PER_SEED = 10_000  # `--seed` 0 to 99,999 stay below the seeds of the training scenes
_WORTH_OPTIMIZING = 4  # images; preparing a ResNet-50 takes as long as it saves on two
_SHEET_COLUMNS, _SHEET_ROWS = 4, 3
_SINGLE_PICTURES = 6

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Folder, hub name or the authors' .pth. Default: the checkpoint in the package.",
        show_default=False,
    ),
]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a hub name.", show_default=False)
]
DeviceOption = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1 ... Default: cuda if there.", show_default=False),
]
ThresholdOption = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="Lowest score that counts as a detection.")
]


class UserError(Exception):
    """Something that the user can put right; `main` prints it as one line."""


def main() -> None:
    """Run the command line; exit code 1 for an error or a skipped image, 2 for wrong usage."""
    try:
        app(prog_name="cdetr-fast")
    except UserError as error:
        print(f"cdetr-fast: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def detect(
    images: Annotated[
        list[Path], typer.Argument(help="Image files, and folders whose images are taken.")
    ],
    model: ModelOption = None,
    threshold: ThresholdOption = 0.5,
    output: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("output/detect"),
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in one forward pass.")] = 1,
    revision: RevisionOption = None,
    top_k: Annotated[int, typer.Option(min=1, help="Most detections per image.")] = 100,
) -> None:
    """Detect objects in images.

    Writes detections.json (COCO results), images.json (the COCO images and categories that its
    ids mean) and an annotated picture of each image. An image that cannot be read is reported
    and skipped, and the exit code is then 1.
    """
    paths = _list_images(images)
    _make_folder(output)
    detector = _Detector(model, revision, device)
    if len(paths) >= _WORTH_OPTIMIZING:
        detector.optimize()
    console = Console(stderr=True)
    records: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    names = _PictureNames(output, paths)
    read: deque[tuple[int, Path, Image.Image]] = deque()

    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("detecting", total=len(paths))

        def readable() -> Iterator[Image.Image]:  # in a thread of its own, ahead of the model
            for image_id, path in enumerate(paths):
                try:
                    image = _read_image(path)
                except UserError as error:
                    message = f"cdetr-fast: skipped: {error}"
                    console.print(message, markup=False, highlight=False, soft_wrap=True)
                    progress.advance(task)
                else:
                    read.append((image_id, path, image))
                    yield image

        for result in detector.predict_each(readable(), threshold, top_k, batch_size):
            image_id, path, image = read.popleft()
            picture = names.take(path)
            result.draw(image).save(picture, quality=92)
            records.append(
                {
                    "id": image_id,
                    "file_name": str(path),
                    "width": image.width,
                    "height": image.height,
                    "picture": picture.name,
                }
            )
            results.extend(result.to_coco(image_id))
            progress.advance(task)
    skipped = len(paths) - len(records)

    if not records:
        raise UserError(f"none of {len(paths)} images could be read")
    categories = [{"id": i, "name": name} for i, name in sorted(detector.id2label.items())]
    write_json(
        output / "images.json",
        {"info": {}, "images": records, "annotations": [], "categories": categories},
    )
    write_json(output / "detections.json", results)
    note = f", {skipped} skipped" if skipped else ""
    print(f"{len(records)} images, {len(results)} detections{note}: {output}")
    if skipped:
        raise typer.Exit(1)


@app.command()
def demo(
    seed: Annotated[
        int, typer.Option(min=0, max=99_999, help="Other seeds draw other scenes.")
    ] = 0,
    count: Annotated[
        int, typer.Option(min=1, max=_SCENES_PER_SEED, help="Scenes to draw and score.")
    ] = 200,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("output/demo"),
    image: Annotated[
        Path | None, typer.Option(help="A photograph, in place of the scenes.", show_default=False)
    ] = None,
    model: ModelOption = None,
    threshold: ThresholdOption = 0.4,
    device: DeviceOption = None,
) -> None:
    """Draw scenes that no training has seen, detect their objects, and score the result."""
    if image is not None:
        _demo_photograph(image, output, model, threshold, device)
        return

    from cdetr_fast.demo import scenes
    from cdetr_fast.images.draw import contact_sheet

    _require_pycocotools()
    _make_folder(output)
    detector = _Detector(model, None, device)
    names = [detector.id2label.get(i) for i in range(len(detector.id2label))]
    if names != list(scenes.CLASSES):
        raise UserError(
            f"--model {model}: expected the scenes' classes {', '.join(scenes.CLASSES)}; "
            "give --image to run another model on a photograph"
        )

    if count >= _WORTH_OPTIMIZING:
        detector.optimize()
    annotations, results, seconds, sheet = [], [], [], []
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        for i in progress.track(range(count), description="scenes"):
            scene, annotation = scenes.draw_scene(seed * _SCENES_PER_SEED + i)
            start = time.perf_counter()
            result = detector.model.predict(scene, threshold=0.0)
            seconds.append(time.perf_counter() - start)
            annotations.append(annotation)
            results.extend(result.to_coco(i))
            if len(sheet) < _SHEET_COLUMNS * _SHEET_ROWS:
                zoomed = scene.resize((2 * scene.width, 2 * scene.height))
                sheet.append(result.above(threshold).draw(zoomed))

    for i, picture in enumerate(sheet[:_SINGLE_PICTURES]):
        picture.save(output / f"scene_{i}.png")
    contact_sheet(sheet, _SHEET_COLUMNS).save(output / "contact_sheet.png")
    ap, ap50 = average_precision(scenes.coco_ground_truth(annotations), results)
    objects = sum(len(annotation["labels"]) for annotation in annotations)
    print(f"model      {detector.describe()}")
    print(f"scenes     {count} unseen, {objects} objects, seed {seed}")
    print(f"AP         {ap:.3f}")
    print(f"AP50       {ap50:.3f}")
    print(
        f"time       {statistics.median(seconds) * 1e3:.1f} ms per image "
        f"(median; one image at a time, from picture to boxes, on {detector.describe_device()})"
    )
    print(f"pictures   {output / 'contact_sheet.png'}")


@app.command(**_PASSED_ON)
def train(context: typer.Context) -> None:
    """Train a model on COCO-format data."""
    from cdetr_fast.training.commands import train_command

    train_command(context.args)


@app.command(**_PASSED_ON)
def evaluate(context: typer.Context) -> None:
    """Score a checkpoint on COCO-format data."""
    from cdetr_fast.training.commands import evaluate_command

    evaluate_command(context.args)


@app.command(**_PASSED_ON)
def convert(context: typer.Context) -> None:
    """Make COCO-format annotations of a Pascal VOC or YOLO folder."""
    from cdetr_fast.training.commands import convert_command

    convert_command(context.args)


@app.command(**_PASSED_ON)
def benchmark(context: typer.Context) -> None:
    """Time the whole model against transformers on this machine (from a checkout)."""
    import subprocess

    root = Path(__file__).resolve().parents[1]
    if not (root / "benchmarks" / "model.py").is_file():
        raise UserError("benchmark needs a checkout of the project, where benchmarks/ lies")
    command = [sys.executable, "-m", "benchmarks.model", *context.args]
    paths = [str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    raise typer.Exit(subprocess.run(command, cwd=root, env=environment, check=False).returncode)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="The file: .pt2, or .onnx with --format onnx.")],
    model: ModelOption = None,
    format: Annotated[str, typer.Option(help="torch, aoti or onnx.")] = "torch",
    size: Annotated[
        tuple[int, int], typer.Option(help="Height and width of the images that are tried.")
    ] = (800, 1066),
    batch: Annotated[int, typer.Option(min=1, help="Images in a batch.")] = 1,
    static: Annotated[
        bool, typer.Option("--static", help="Only for this size and batch; constants folded.")
    ] = False,
    masked: Annotated[
        bool, typer.Option("--masked", help="Take padding masks as a second input, as numbers.")
    ] = False,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Write a model to a file for torch.export, AOTInductor or ONNX, and check the file."""
    from cdetr_fast.inference.export import export as write

    detector = _Detector(model, revision, device)
    try:
        error = write(
            detector.model,
            output,
            format,
            size=size,
            batch=batch,
            dynamic=not static,
            masked=masked,
        )
    except (OSError, RuntimeError, TypeError, ValueError) as failure:
        raise UserError(_first_line(failure)) from failure
    megabytes = output.stat().st_size / 1e6
    print(f"{output}, {megabytes:.1f} MB; its outputs are within {error:.0e} of the model's")


@app.command()
def info() -> None:
    """Show versions, devices, threads, and which path each operator takes and why."""
    import platform
    from importlib import metadata

    import torch

    import cdetr_fast
    from cdetr_fast.loss.assignment import solver_choice
    from cdetr_kernels import native, registry

    table = Table("what", "value", box=None, show_header=False, pad_edge=False)
    table.add_row("cdetr_fast", cdetr_fast.__version__)
    table.add_row("python", f"{platform.python_version()}, {platform.platform()}")
    for name in ("torch", "torchvision", "triton", "timm", "transformers"):
        try:
            table.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row(
        "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads per operation"
    )
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            table.add_row(
                f"cuda:{i}",
                f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
                f"compute capability {properties.major}.{properties.minor}",
            )
    else:
        table.add_row("cuda", f"no device (torch is built for CUDA {torch.version.cuda})")
    for part, state in native.parts().items():
        table.add_row(part, state)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    table.add_row("assignment", solver_choice(device))
    operators = Table("operator", "path", "reason", box=None, pad_edge=False)
    for entry in registry.report(device):
        operators.add_row(entry.op, entry.path, entry.reason)
    console = Console(highlight=False, markup=False)
    console.print(table)
    console.print()
    console.print(operators)


@app.command()
def build_native() -> None:
    """Build the C++ and CUDA parts of the extension, in place, as far as there are compilers.

    CDETR_FAST_NATIVE=1 makes a missing C++ compiler an error; TORCH_CUDA_ARCH_LIST, CXX and
    CUDA_HOME are honoured.
    """
    from cdetr_kernels import build

    try:
        build.build()
    except (build.BuildError, OSError) as error:
        raise UserError(str(error)) from error


def average_precision(
    ground_truth: dict[str, Any], results: list[dict[str, Any]]
) -> tuple[float, float]:
    """Score detections by COCO's box evaluation, silently.

    Args:
        ground_truth: A COCO detection dictionary with at least one annotation.
        results: COCO results, as `DetectionResult.to_coco` gives them.

    Returns:
        AP (mean over IoU 0.50 to 0.95) and AP50, both in [0, 1].
    """
    if not results:  # pycocotools fails on an empty list
        return 0.0, 0.0
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return float(evaluation.stats[0]), float(evaluation.stats[1])


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that an interruption leaves the old file or the new one, never half.

    Args:
        path: The file; its folder exists.
        content: What `json` can write.
    """
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


class _Detector:
    """The model that `--model` names."""

    def __init__(self, name: str | None, revision: str | None, device: str | None) -> None:
        import torch

        import cdetr_fast
        from cdetr_fast.models.auto import class_of_checkpoint

        self.name = "embedded" if name is None else name
        self.device = _pick_device(device)
        source = str(DEMO) if name is None else name
        options = {} if revision is None else {"revision": revision}
        try:
            model_class = class_of_checkpoint(source, **options)
            self.segments = model_class is cdetr_fast.ConditionalDetrForSegmentation
            model = model_class.from_pretrained(source, dtype=torch.float32, **options)
            model.image_processor  # noqa: B018 - read here, where its errors are reported
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--model {self.name}: {_first_line(error)}") from error
        self.model = model.to(self.device)
        self.id2label: dict[int, str] = self.model.config.id2label

    def optimize(self) -> None:
        """Prepares the model for many images; results are the same up to rounding."""
        from cdetr_fast import optimize

        # images of a folder have many sizes, each of which would be a graph to capture
        self.model = optimize(self.model, cuda_graphs=False, inplace=True)

    def predict_each(
        self, images: Iterable[Image.Image], threshold: float, top_k: int, batch_size: int
    ) -> Iterator[DetectionResult]:
        options = {} if self.segments else {"top_k": top_k}  # segments are as many as queries
        return self.model.predict_each(images, threshold, batch_size=batch_size, **options)

    def describe(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.name}, {parameters / 1e6:.2f} million parameters"

    def describe_device(self) -> str:
        import torch

        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"


class _PictureNames:
    """Names for annotated pictures: no two alike, and none that would overwrite an input."""

    def __init__(self, folder: Path, inputs: Iterable[Path]) -> None:
        self.folder = folder
        self.taken = {self._key(path) for path in inputs}

    def take(self, source: Path) -> Path:
        number = 1
        while True:
            suffix = "" if number == 1 else f"_{number}"
            path = self.folder / f"{source.stem}{suffix}.jpg"
            if self._key(path) not in self.taken:
                self.taken.add(self._key(path))
                return path
            number += 1

    @staticmethod
    def _key(path: Path) -> str:
        return str(path.resolve()).lower()  # some file systems do not tell A.jpg from a.jpg


def _demo_photograph(
    path: Path, output: Path, model: str | None, threshold: float, device: str | None
) -> None:
    image = _read_image(path)
    _make_folder(output)
    detector = _Detector(model, None, device)
    start = time.perf_counter()
    result = detector.model.predict(image, threshold)
    seconds = time.perf_counter() - start
    picture = _PictureNames(output, [path]).take(path)
    result.draw(image).save(picture, quality=92)
    print(f"model      {detector.describe()}")
    for line in str(result).splitlines() if len(result) else ():
        score, _, rest = line.partition(" ")
        print(f"{score}       {rest}")
    if len(result) == 0:
        print(f"nothing    scores above {threshold}")
    print(f"time       {seconds * 1e3:.1f} ms (first call, on {detector.describe_device()})")
    print(f"picture    {picture}")


def _list_images(arguments: Iterable[Path]) -> list[Path]:
    """Files as they are named, folders as their images in order of name; each file once."""
    paths: dict[Path, Path] = {}
    for argument in arguments:
        found = [argument]
        if argument.is_dir():
            found = sorted(p for p in argument.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
            if not found:
                raise UserError(f"{argument}: no images in this folder")
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())


def _read_image(path: Path) -> Image.Image:
    """Read a file as an RGB image that stands upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    from cdetr_fast.images.load import require_8_bits

    try:
        with Image.open(path) as image:
            require_8_bits(image)
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that can be read") from error
    # PIL raises the last three for damaged or absurdly large files.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{path}: {reason or _first_line(error)}") from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}") from error


def _pick_device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # a torch without CUDA raises the second
        raise UserError(f"--device {name}: {_first_line(error)}") from error
    return device


def _require_pycocotools() -> None:
    from importlib.util import find_spec

    if find_spec("pycocotools") is None:
        raise UserError("demo scores with pycocotools: pip install 'cdetr-fast[eval]'")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
