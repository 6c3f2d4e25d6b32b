"""The model that `--model` names, on the device that `--device` names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cdetr_fast.cli.errors import UserError
from cdetr_fast.common.errors import first_line
from cdetr_fast.demo import DEMO

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from cdetr_fast.images.results import DetectionResult

EMBEDDED = "embedded"
"""Name of the checkpoint in the package."""

COCO = "microsoft/conditional-detr-resnet-50"
"""Checkpoint on the hub for COCO's classes."""

_WORTH_OPTIMIZING = 4  # images


class Detector:
    """A loaded model with its description.

    Args:
        name: Folder, hub name or the authors' file; None is the checkpoint in the package.
        revision: Branch, tag or commit of a hub name.
        device: Name of the device; None is CUDA if there is a GPU.

    Raises:
        UserError: The device or the model cannot be used.
    """

    def __init__(self, name: str | None, revision: str | None, device: str | None) -> None:
        import torch

        import cdetr_fast
        from cdetr_fast.common import progress
        from cdetr_fast.common.devices import qualify_kernels, usable_device
        from cdetr_fast.models.auto import class_of_checkpoint

        self.name = EMBEDDED if name is None else name
        source = str(DEMO) if name is None else name
        options = {} if revision is None else {"revision": revision}
        try:
            self.device = usable_device("--device", device)
        except RuntimeError as error:
            raise UserError(str(error)) from error
        if self.device.type == "meta":
            raise UserError("--device: 'meta' computes nothing; name cpu or cuda")
        qualify_kernels(self.device)
        # The hub's library shows its downloads itself.
        waiting = progress.task("loading the model") if Path(source).exists() else nullcontext()
        try:
            with waiting:
                model_class = class_of_checkpoint(source, **options)
                self.segments = model_class is cdetr_fast.ConditionalDetrForSegmentation
                model = model_class.from_pretrained(source, dtype=torch.float32, **options)
                model.image_processor  # noqa: B018 - read here, where its errors are reported
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"--model {self.name}: {first_line(error)}") from error
        self.model = model.to(self.device)
        self.id2label: dict[int, str] = self.model.config.id2label

    def note_its_classes(self) -> None:
        """Note that the checkpoint in the package is for drawn shapes, if it is that one."""
        from cdetr_fast.common import progress

        if self.name == EMBEDDED:
            progress.current().line(
                "the checkpoint in the package only finds drawn shapes "
                f"({', '.join(self.id2label.values())}); --model {COCO} finds 80 kinds of objects"
            )

    def optimize_for(self, images: int) -> None:
        """Optimize the model if it pays for so many images; results stay the same up to rounding.

        Preparing a ResNet-50 takes as long as it saves on two images.
        """
        if images >= _WORTH_OPTIMIZING:
            self.optimize()

    def optimize(self, engine: str = "torch") -> None:
        """Optimize the model; results stay the same up to rounding.

        Args:
            engine: As of `cdetr_fast.optimize`.

        Raises:
            UserError: The engine cannot run the model.
        """
        from cdetr_fast import optimize
        from cdetr_fast.common import progress

        try:
            # images of a user have many sizes, each of which would be a graph to capture
            with progress.task("optimizing the model"):
                self.model = optimize(self.model, cuda_graphs=False, engine=engine, inplace=True)
        except (RuntimeError, TypeError, ValueError) as error:
            if engine != "openvino":
                raise
            raise UserError(f"--{first_line(error)}") from error

    def prepared_images(self, folder: Path, most: int) -> list[Tensor]:
        """Return images of a folder as the model gets them; UserError if there are none."""
        from cdetr_fast.images.load import image_files

        if not folder.is_dir() or not (paths := image_files(folder)):
            raise UserError(f"{folder}: expected a folder with images")
        process = self.model.image_processor
        images = (read_image(path) for path in paths[:most])
        return [process([image], return_tensors="pt")["pixel_values"] for image in images]

    def predict(self, image: Image.Image, threshold: float) -> DetectionResult:
        """Return the result of one image; UserError if the checkpoint does not take it."""
        try:
            return cast("DetectionResult", self.model.predict(image, threshold))
        except ValueError as error:
            raise UserError(f"--model {self.name}: {first_line(error)}") from error

    def predict_each(
        self, images: Iterable[Image.Image], threshold: float, top_k: int, batch_size: int
    ) -> Iterator[DetectionResult]:
        """Yield the result of each image; see `predict_each` of the model."""
        options: dict[str, Any] = (
            {} if self.segments else {"top_k": top_k}
        )  # segments are as many as queries
        return self.model.predict_each(images, threshold, batch_size=batch_size, **options)

    def describe(self) -> str:
        """Return the model's name and number of parameters."""
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return f"{self.name}, {parameters / 1e6:.2f} million parameters"

    def describe_device(self) -> str:
        """Return the GPU's name, or the number of CPU threads."""
        import torch

        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type}, {torch.get_num_threads()} threads"


def read_image(path: Path) -> Image.Image:
    """Read a file as an upright RGB image; UserError if it cannot be read."""
    from cdetr_fast.images.load import as_picture

    try:
        return as_picture(path)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a JPEG file, whole or not at all; UserError if it cannot be written."""
    from cdetr_fast.common.files import write_atomically

    try:
        write_atomically(path, lambda staged: picture.save(staged, "JPEG", quality=92))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from error
