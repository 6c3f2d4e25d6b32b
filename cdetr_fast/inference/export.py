"""Models as files: torch.export programs, AOTInductor packages and ONNX; each is checked.

What is exported is the engine that `optimize()` prepares, in its plain form: norms folded, products
joined, everything that no image changes a constant. Outputs are `logits` and `pred_boxes` (and
`pred_masks`), nothing else; none of them is an integer, and neither need the inputs be.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cdetr_fast.common.files import write_atomically
from cdetr_fast.common.validation import PositiveInt, checked
from cdetr_fast.inference.engine import Engine
from cdetr_fast.inference.optimize import optimize

FORMATS = ("torch", "aoti", "onnx")
SUFFIXES = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
_OUTPUTS = ("logits", "pred_boxes", "pred_masks")
_NEEDED = {"torch": (), "aoti": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
_TOLERANCE = 1e-3  # of a value of 1; compiled and foreign code sums in another order
_TOLERANCE_IN_EPS = 10  # of half precision's, where that is more
_LEAST_OPEN_SIZE = 33  # a map of one row would be fixed to one


class ExportedForward(nn.Module):
    """The engine from images (and a mask) to a tuple of predictions.

    Args:
        engine: The engine.
        size: Height and width of the images if they are to be fixed: constants of the map's size
            are then part of the file. None leaves them open.
        masked: Take a mask.
    """

    def __init__(self, engine: Engine, size: tuple[int, int] | None, masked: bool) -> None:
        super().__init__()
        self.engine = engine
        self.masked = masked
        self.constants = None
        if size is not None and not masked:
            self.constants = engine.constants_for_images(size)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        output = self.engine(pixel_values, pixel_mask, self.constants)
        return tuple(output[name] for name in _OUTPUTS if name in output)


def export(
    model: nn.Module,
    path: str | os.PathLike,
    format: str = "torch",
    *,
    size: tuple[int, int] = (800, 1066),
    batch: int = 1,
    dynamic: bool = True,
    masked: bool = False,
) -> float:
    """Writes a model to a file, reads it back, and compares it with the model.

    Args:
        model: Detection or segmentation model of this package or of transformers, in eval mode.
        path: The file; its folder exists.
        format: "torch" (`torch.export`), "aoti" (a package compiled by AOTInductor for machines
            like this one) or "onnx".
        size: Height and width that are tried; the only ones that a file without `dynamic` takes.
        batch: Images in a batch, likewise.
        dynamic: Leave the batch's size, height and width open.
        masked: Take padding masks as a second input `pixel_mask` `[B, H, W]`, in the dtype of the
            images, so that no integer is among the inputs (TensorRT has no int64).

    Returns:
        The largest difference between the file's outputs and the model's.

    Raises:
        ValueError: An argument is out of range.
        TypeError: `model` is of another class, or an argument of another type.
        RuntimeError: The file's outputs are not those of the model; the file is not kept.
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
    for module in _NEEDED[format]:
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(f"{format} needs {module}: pip install 'cdetr-fast[export]'")
    if type(model).__name__ == "ConditionalDetrModel":
        raise TypeError("model: expected one that predicts boxes, got ConditionalDetrModel")
    engine = optimize(model, cuda_graphs=False).runner.engine
    forward = ExportedForward(engine, None if dynamic else size, masked).eval()
    example = _images(engine, batch + (batch == 1 and dynamic), size, masked)
    with torch.no_grad():
        program = torch.export.export(forward, example, dynamic_shapes=_dynamic(masked, dynamic))
    trials = [example]
    if dynamic:
        height, width = size
        trials.append(_images(engine, batch, (height - height % 32 + 32, width), masked))
    errors: list[float] = []

    def write(temporary: Path) -> None:
        run = _WRITERS[format](program, temporary, masked)
        for trial in trials:
            with torch.no_grad():
                expected = engine(*trial) if masked else engine(*trial, None)
            names = [name for name in _OUTPUTS if name in expected]
            for name, got in zip(names, run(trial), strict=True):
                difference = (got.to(expected[name].device) - expected[name]).abs().max().item()
                errors.append(difference)
                scale = 1 + expected[name].abs().max().item()
                if not difference <= _tolerance(engine.dtype) * scale:
                    raise RuntimeError(
                        f"{path}: {name} of the file is off by {difference:.1e} for images "
                        f"{list(trial[0].shape)}; the file was not kept"
                    )

    write_atomically(path, write)
    return max(errors)


def _checked_size(size: Any, dynamic: bool) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise TypeError(f"size: expected (height, width), got {size!r}")
    height, width = (checked(PositiveInt, pixels, "size") for pixels in size)
    if dynamic and min(height, width) < _LEAST_OPEN_SIZE:
        raise ValueError(
            f"size: expected {_LEAST_OPEN_SIZE} or more, as sizes are to be left open, got "
            f"{(height, width)}; use dynamic=False for images as small as that"
        )
    return height, width


def _tolerance(dtype: torch.dtype) -> float:
    return max(_TOLERANCE, _TOLERANCE_IN_EPS * torch.finfo(dtype).eps)


Run = Callable[[tuple[Tensor, ...]], Any]


def _write_torch(program: torch.export.ExportedProgram, path: Path, masked: bool) -> Run:
    torch.export.save(program, path)
    module = torch.export.load(path).module()
    return lambda inputs: module(*inputs)


def _write_aoti(program: torch.export.ExportedProgram, path: Path, masked: bool) -> Run:
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    module = torch._inductor.aoti_load_package(str(path))
    return lambda inputs: module(*inputs)


def _write_onnx(program: torch.export.ExportedProgram, path: Path, masked: bool) -> Run:
    import onnxruntime

    names = ["pixel_values", "pixel_mask"][: 1 + masked]
    count = len(program.graph_signature.user_outputs)
    written = torch.onnx.export(
        program, dynamo=True, input_names=names, output_names=_OUTPUTS[:count], verbose=False
    )
    written.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        arrays = [tensor.cpu().numpy() for tensor in inputs]
        outputs = session.run(None, dict(zip(names, arrays, strict=True)))
        return [torch.from_numpy(array) for array in outputs]

    return run


_WRITERS = {"torch": _write_torch, "aoti": _write_aoti, "onnx": _write_onnx}


def _images(engine: Engine, batch: int, size: tuple[int, int], masked: bool) -> tuple[Tensor, ...]:
    """Random images, all but the first one padded."""
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(batch, engine.num_channels, *size, generator=generator)
    mask = torch.ones(batch, *size)
    mask[1:, size[0] * 3 // 4 :] = 0
    kept = (pixel_values, mask)[: 1 + masked]
    return tuple(tensor.to(engine.device, engine.dtype) for tensor in kept)


def _dynamic(masked: bool, dynamic: bool) -> tuple[Any, ...] | None:
    if not dynamic:
        return None
    auto = torch.export.Dim.DYNAMIC
    shapes = ({0: auto, 2: auto, 3: auto}, {0: auto, 1: auto, 2: auto})
    return shapes if masked else (shapes[0],)
