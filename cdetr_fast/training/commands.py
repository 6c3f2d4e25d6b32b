"""The commands `cdetr-fast train`, `evaluate` and `convert`: arguments in, one-line errors out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from cdetr_fast.training.errors import DataError, TrainingStopped

if TYPE_CHECKING:
    from cdetr_fast.training.evaluation.detection import Evaluation

_COLUMNS = ("AP", "AP50", "AR100")
_PANOPTIC_COLUMNS = ("PQ", "SQ", "RQ")
_TRAIN_NEEDS = ("accelerate", "faster_coco_eval", "matplotlib", "yaml")


def train_command(arguments: Sequence[str] | None = None) -> None:
    """Runs `cdetr-fast train`; exit code 1 for an error, 143 after SIGTERM."""
    _require(_TRAIN_NEEDS, "train")
    from cdetr_fast.training.config import parse_flags

    def run() -> None:
        config = parse_flags(
            sys.argv[1:] if arguments is None else arguments,
            "cdetr-fast train",
            "Train on COCO-format data. Every setting is a flag and a key of the YAML file.",
        )
        from cdetr_fast.training.engine import train

        try:
            result = train(config)
            _print_result(result, config.output)
        finally:
            leave_processes()

    _guarded(run)


def evaluate_command(arguments: Sequence[str]) -> None:
    """Runs `cdetr-fast evaluate`."""
    _require(_TRAIN_NEEDS, "train")
    from cdetr_fast.training.config import FlagParser

    parser = FlagParser(
        "cdetr-fast evaluate",
        description="Score a checkpoint by COCO's rules; writes tables and pictures.",
    )
    parser.add_argument("--model", required=True, help="folder, hub name or the authors' .pth")
    parser.add_argument("--annotations", required=True, help="COCO JSON file")
    parser.add_argument("--images", help="folder of its images, if not found beside the file")
    parser.add_argument("--masks", help="folder of panoptic PNG files: panoptic quality too")
    parser.add_argument("--output", default="output/evaluate", help="folder for the results")
    parser.add_argument("--batch-size", type=int, default=1, help="images in a forward pass")
    parser.add_argument("--num-workers", type=int, default=2, help="processes that load images")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument(
        "--threshold", type=float, default=0.5, help="lowest score in confusion, pictures, segments"
    )
    parser.add_argument("--bad-labels", choices=("stop", "drop"), default="stop")
    parser.add_argument(
        "--bad-images",
        choices=("stop", "skip"),
        default="stop",
        help="skip leaves images that cannot be read out of the figures",
    )
    options = vars(parser.parse_args(arguments))

    def run() -> None:
        from cdetr_fast.training.evaluation.checkpoint import evaluate

        try:
            evaluation = evaluate(**options)
            if evaluation is not None:
                _print_evaluation(evaluation)
                print(f"tables and pictures: {options['output']}")
        finally:
            leave_processes()

    _guarded(run)


def _print_evaluation(evaluation: Evaluation) -> None:
    columns = _COLUMNS + (_PANOPTIC_COLUMNS if "PQ" in evaluation.stats else ())
    table = Table("class", "objects", *columns, box=None, pad_edge=False)
    for one in evaluation.classes:
        table.add_row(one["class"], str(one["objects"]), *(f"{one[k]:.3f}" for k in columns))
    console = Console(highlight=False, markup=False)
    console.print(table)
    for name, value in evaluation.stats.items():
        console.print(f"{name:10} {value:.3f}")


def convert_command(arguments: Sequence[str]) -> None:
    """Runs `cdetr-fast convert`."""
    _require(("yaml",), "train")
    from cdetr_fast.training.config import FlagParser

    parser = FlagParser(
        "cdetr-fast convert",
        description="Write COCO JSON files for a Pascal VOC or YOLO folder, or a COCO set as shards"
        " (tar files for WebDataset).",
    )
    parser.add_argument("kind", choices=("voc", "yolo", "shards"))
    parser.add_argument("source", help="folder of the data set; for shards, its COCO JSON file")
    parser.add_argument("--output", required=True, help="folder for what is written")
    group = parser.add_argument_group("shards")
    group.add_argument("--images", help="folder of the images, if not found beside the file")
    group.add_argument("--images-per-shard", type=int, default=1000)
    group.add_argument("--bad-labels", choices=("stop", "drop"), default="stop")
    options = parser.parse_args(arguments)

    def run() -> None:
        if options.kind == "shards":
            from cdetr_fast.training.data.shards import write_shards

            values = (options.images, options.images_per_shard, options.bad_labels)
            path = write_shards(options.source, options.output, *values)
            print(f"--train-annotations {path}")
            return
        from cdetr_fast.training.data import conversion

        written = conversion.convert(options.kind, options.source, options.output)
        images = conversion.image_folder(options.kind, options.source)
        print("\n".join(conversion.lines_about(written, images)))

    _guarded(run)


def _print_result(result: dict, output: str) -> None:
    from accelerate import PartialState

    if PartialState().is_main_process:
        figures = ", ".join(f"{k} {result[k]:.3f}" for k in ("AP", "AP50", "PQ") if k in result)
        print(f"{result['step']} steps{', ' + figures if figures else ''}: {output}")


def leave_processes() -> None:
    """Ends the process group, if there is one; a program that trains calls it last.

    Left to the interpreter's exit, a thread of gloo may ask for an interpreter that is no more,
    and abort a process whose work is done.
    """
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _require(modules: Sequence[str], extra: str) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        _fail(f"{', '.join(missing)} missing: pip install 'cdetr-fast[{extra}]'", 1)


def _guarded(run: Callable[[], None]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for chatty in ("accelerate", "faster_coco_eval", "timm"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        run()
    except TrainingStopped as error:
        _fail(str(error), error.exit_code)
    except DataError as error:
        if error.said_elsewhere:
            sys.exit(1)
        _fail(str(error), 1)


def _fail(message: str, code: int) -> None:
    print(f"cdetr-fast: {message}", file=sys.stderr)
    sys.exit(code)
