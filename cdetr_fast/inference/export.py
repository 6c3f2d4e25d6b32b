"""Export to torch.export programs, AOTInductor packages and ONNX files, each checked.

The file holds the optimized form of the model: norms folded, products joined, everything that does
not depend on the image a constant. Its outputs are `logits` and `pred_boxes` (and `pred_masks`).
Inputs and outputs are floating-point numbers only.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cdetr_fast.common.files import write_atomically
from cdetr_fast.common.validation import PositiveInt, checked
from cdetr_fast.inference.optimize import optimize
from cdetr_fast.inference.prepare import PreparedModel

FORMATS = ("torch", "aoti", "onnx")
SUFFIXES = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_OUTPUTS = ("logits", "pred_boxes", "pred_masks")
_REQUIRED = {"torch": (), "aoti": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
_TOLERANCE = 1e-3  # of a value of 1; compiled and foreign code sums in another order
_TOLERANCE_IN_EPS = 10  # in half precision, where that is more
_MIN_DYNAMIC_SIZE = 33  # a map of one row would be fixed to one

Inputs = tuple[Tensor, ...]  # images, and a mask where the file takes one
Run = Callable[[Inputs], Sequence[Tensor]]


class ExportedForward(nn.Module):
    """A prepared model as a function of images (and a mask) that returns a tuple of predictions.

    Args:
        prepared: The prepared model.
        size: Height and width of the images if they are fixed: constants of the map's size are then
            part of the file. None leaves them open.
        masked: Take a mask.
    """

    def __init__(self, prepared: PreparedModel, size: tuple[int, int] | None, masked: bool) -> None:
        super().__init__()
        self.prepared = prepared
        self.masked = masked
        if size is not None and not masked:
            prepared.fix_image_size(*size)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        output = self.prepared(pixel_values, pixel_mask)
        return tuple(output[name] for name in _OUTPUTS if name in output)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "torch",
    *,
    size: tuple[int, int] = (800, 1066),
    batch: int = 1,
    dynamic: bool = True,
    masked: bool = False,
) -> float:
    """Write a model to a file, load the file, and compare its outputs with those of the model.

    Args:
        model: Detection or segmentation model of this package or of transformers, in eval mode.
        path: The file, in an existing folder.
        format: "torch" (`torch.export`), "aoti" (a package compiled by AOTInductor for machines
            like this one) or "onnx".
        size: Height and width to try; the only ones that a file without `dynamic` takes.
        batch: Number of images in a batch, likewise.
        dynamic: Leave batch size, height and width open.
        masked: Take padding masks as a second input `pixel_mask` `[B, H, W]`, in the dtype of the
            images, so that no input is an integer (TensorRT has no int64).

    Returns:
        The largest difference between the file's outputs and the model's.

    Raises:
        ValueError: An argument is out of range, or the model has a layer that is neither plain nor
            a known one, such as an adapter; the error names it.
        TypeError: `model` is of another class, or an argument of another type.
        RuntimeError: The file's outputs are not those of the model's own forward; the file is not
            kept.
    """
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {FORMATS}, got {format!r}")
    path = Path(path)
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"path: expected a name ending in {SUFFIXES[format]}, got {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path: expected an existing folder, got {path.parent}")
    size = _checked_size(size, dynamic)
    batch = checked(PositiveInt, batch, "batch")
    for module in _REQUIRED[format]:
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(f"{format} needs {module}: pip install 'cdetr-fast[export]'")
    if type(model).__name__ == "ConditionalDetrModel":
        raise TypeError("model: expected one that predicts boxes, got ConditionalDetrModel")
    optimized: Any = optimize(model, cuda_graphs=False)
    forward = ExportedForward(optimized.runner.prepared, None if dynamic else size, masked).eval()
    example = _images(model, batch + (batch == 1 and dynamic), size, masked)
    trials = [example]
    if dynamic:
        height, width = size
        trials.append(_images(model, batch, (height - height % 32 + 32, width), masked))
    errors: list[float] = []

    def write(temporary: Path) -> None:
        run = _WRITERS[format](program, temporary, masked)
        for trial in trials:
            errors.append(_largest_error(model, run, trial, path))

    with torch.no_grad():
        program = torch.export.export(forward, example, dynamic_shapes=_dynamic(masked, dynamic))
        write_atomically(path, write)
    return max(errors)


def _largest_error(model: nn.Module, run: Run, inputs: Inputs, path: Path) -> float:
    """Return the largest difference between a file's outputs and the model's on some images.

    Raises:
        RuntimeError: It is more than rounding.
    """
    output = model(*inputs)
    names = [name for name in _OUTPUTS if name in output]
    errors = []
    for name, got in zip(names, run(inputs), strict=True):
        expected = output[name]
        error = (got.to(expected.device) - expected).abs().max().item()
        scale = 1 + expected.abs().max().item()
        if not error <= _tolerance(inputs[0].dtype) * scale:
            raise RuntimeError(
                f"{path}: {name} of the file is off by {error:.1e} for images "
                f"{list(inputs[0].shape)}; the file was not kept"
            )
        errors.append(error)
    return max(errors)


def _checked_size(size: Any, dynamic: bool) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size: expected (height, width), got {size!r}")
    height, width = (checked(PositiveInt, pixels, "size") for pixels in size)
    if dynamic and min(height, width) < _MIN_DYNAMIC_SIZE:
        raise ValueError(
            f"size: expected {_MIN_DYNAMIC_SIZE} or more for a file of any size, got "
            f"{(height, width)}; use dynamic=False for images as small as that"
        )
    return height, width


def _tolerance(dtype: torch.dtype) -> float:
    return max(_TOLERANCE, _TOLERANCE_IN_EPS * torch.finfo(dtype).eps)


def _write_torch(program: torch.export.ExportedProgram, path: Path, masked: bool) -> Run:
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    return lambda inputs: cast(Sequence[Tensor], module(*inputs))


def _write_aoti(program: torch.export.ExportedProgram, path: Path, masked: bool) -> Run:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    module = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: cast(Sequence[Tensor], module(*inputs))


def _write_onnx(program: torch.export.ExportedProgram, path: Path, masked: bool) -> Run:
    import onnxruntime

    names = ["pixel_values", "pixel_mask"][: 1 + masked]
    count = len(program.graph_signature.user_outputs)
    written: Any = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=_OUTPUTS[:count], verbose=False
    )
    written.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> list[Tensor]:
        arrays = [tensor.cpu().numpy() for tensor in inputs]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in outputs]

    return run


_WRITERS = {"torch": _write_torch, "aoti": _write_aoti, "onnx": _write_onnx}


def _images(model: nn.Module, batch: int, size: tuple[int, int], masked: bool) -> Inputs:
    """Return random images, with a mask that pads all but the first if `masked`."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    channels = cast(Any, model).config.num_channels
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(batch, channels, *size, generator=generator)
    mask = torch.ones(batch, *size)
    mask[1:, size[0] * 3 // 4 :] = 0
    kept = (pixel_values, mask)[: 1 + masked]
    return tuple(tensor.to(weight.device, weight.dtype) for tensor in kept)


def _dynamic(masked: bool, dynamic: bool) -> tuple[Any, ...] | None:
    if not dynamic:
        return None
    auto = torch.export.Dim.DYNAMIC
    shapes = ({0: auto, 2: auto, 3: auto}, {0: auto, 1: auto, 2: auto})
    return shapes if masked else (shapes[0],)
