"""Export to torch.export programs, AOTInductor packages, ONNX and OpenVINO, each checked.

The file holds the optimized form of the model: norms folded, products joined, everything that does
not depend on the image a constant. Its outputs are `logits` and `pred_boxes` (and `pred_masks`).
Inputs and outputs are floating-point numbers only.
"""

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from cdetr_fast.common import progress
from cdetr_fast.common.files import write_atomically
from cdetr_fast.common.validation import PositiveInt, checked
from cdetr_fast.inference.openvino import MEMORY, compiled, convert, quantized
from cdetr_fast.inference.optimize import calibration_batches, optimize
from cdetr_fast.inference.prepare import OPEN_SHAPES, PreparedModel

FORMATS = ("torch", "aoti", "onnx", "openvino")
SUFFIXES = {"torch": ".pt2", "aoti": ".pt2", "onnx": ".onnx", "openvino": ".xml"}
_OUTPUTS = ("logits", "pred_boxes", "pred_masks")
_WRITING = {
    "torch": "writing the program",
    "aoti": "compiling the package, which takes some minutes",
    "onnx": "translating to ONNX",
    "openvino": "translating to OpenVINO",
}
_REQUIRED = {
    "torch": (),
    "aoti": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino",),
}
_TOLERANCE = 1e-3  # of a value of 1; compiled and foreign code sums in another order
_TOLERANCE_IN_EPS = 10  # in half precision, where that is more
_INT8_TOLERANCE = 0.25
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
        memory: Return the encoder's output too, as the last one.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        size: tuple[int, int] | None,
        masked: bool,
        memory: bool = False,
    ) -> None:
        super().__init__()
        self.prepared = prepared
        self.names = (*_OUTPUTS, MEMORY) if memory else _OUTPUTS
        self.masked = masked
        if size is not None and not masked:
            prepared.fix_image_size(*size)

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        output = self.prepared(pixel_values, pixel_mask)
        return tuple(output[name] for name in self.names if name in output)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    format: str = "torch",
    *,
    size: tuple[int, int] = (800, 1066),
    batch: int = 1,
    dynamic: bool = True,
    masked: bool = False,
    int8_calibration: Sequence[Tensor] | None = None,
) -> float:
    """Write a model to a file, load the file, and compare its outputs with those of the model.

    Args:
        model: Detection or segmentation model of this package or of transformers, in eval mode.
        path: The file, in an existing folder.
        format: "torch" (`torch.export`), "aoti" (a package compiled by AOTInductor for machines
            like this one), "onnx", or "openvino" (a network in a file of this name, and its
            weights beside it in one that ends in .bin).
        size: Height and width to try; the only ones that a file without `dynamic` takes.
        batch: Number of images in a batch, likewise.
        dynamic: Leave batch size, height and width open.
        masked: Take padding masks as a second input `pixel_mask` `[B, H, W]`, in the dtype of the
            images, so that no input is an integer (TensorRT has no int64).
        int8_calibration: Batches of `pixel_values` `[B, C, H, W]`, some tens of images as the
            calls will have them. With them a file for OpenVINO is in int8, made by NNCF (extra
            `int8`), and compared with the model on the last of them.

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
    if int8_calibration is not None:
        _check_int8(format, dynamic)
    calibration = calibration_batches(int8_calibration, model)
    needs = _REQUIRED[format] + (("nncf",) if calibration else ())
    for module in needs:
        if importlib.util.find_spec(module) is None:
            extra = {"openvino": "openvino", "nncf": "int8"}.get(module, "export")
            raise RuntimeError(f"{format} needs {module}: pip install 'cdetr-fast[{extra}]'")
    if type(model).__name__ == "ConditionalDetrModel":
        raise TypeError("model: expected one that predicts boxes, got ConditionalDetrModel")
    if format == "openvino" and (dtype := next(model.parameters()).dtype) != torch.float32:
        raise ValueError(
            f"model: expected float32, got {dtype}; OpenVINO rounds weights when it compiles the "
            "file (INFERENCE_PRECISION_HINT)"
        )
    with progress.task("optimizing the model"):
        optimized: Any = optimize(model, cuda_graphs=False)
    prepared: PreparedModel = optimized.runner.prepared
    if format == "openvino":
        prepared.join_attention()
    fixed = None if dynamic else size
    forward = ExportedForward(prepared, fixed, masked, memory=bool(calibration)).eval()
    example = _images(model, batch + (batch == 1 and dynamic), size, masked)
    trials = [example]
    if dynamic:
        height, width = size
        trials.append(_images(model, batch, (height - height % 32 + 32, width), masked))
    write_file = _WRITERS[format]
    tolerance = _tolerance(example[0].dtype)
    if calibration:
        images = calibration[-1]
        trials = [(images, torch.ones(len(images), *images.shape[-2:], device="cpu"))[: 1 + masked]]
        write_file = functools.partial(_write_openvino, int8_calibration=calibration)
        tolerance = _INT8_TOLERANCE
    errors: list[float] = []

    def write(temporary: Path) -> None:
        with progress.task(_WRITING[format]):
            run = write_file(program, temporary, masked)
        for trial in progress.track(trials, "comparing with the model"):
            errors.append(_largest_error(model, run, trial, path, tolerance))

    shapes = OPEN_SHAPES[: 1 + masked] if dynamic else None
    with torch.no_grad():
        with progress.task("tracing the model"):
            program = torch.export.export(forward, example, dynamic_shapes=shapes)
        write_atomically(path, write)
    return max(errors)


def _largest_error(
    model: nn.Module, run: Run, inputs: Inputs, path: Path, tolerance: float
) -> float:
    """Return the largest difference between a file's outputs and the model's on some images.

    Raises:
        RuntimeError: It is more than rounding.
    """
    output = model(*inputs, return_dict=True)
    names = [name for name in _OUTPUTS if name in output]
    errors = []
    for name, got in zip(names, run(inputs), strict=True):
        expected = output[name]
        error = (got.to(expected.device) - expected).abs().max().item()
        scale = 1 + expected.abs().max().item()
        if not error <= tolerance * scale:
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


def _check_int8(format: str, dynamic: bool) -> None:
    if format != "openvino":
        raise ValueError(f'int8_calibration: expected format="openvino" with it, got {format!r}')
    if not dynamic:
        raise ValueError("int8_calibration: expected dynamic=True with it")


def _tolerance(dtype: torch.dtype) -> float:
    return max(_TOLERANCE, _TOLERANCE_IN_EPS * torch.finfo(dtype).eps)


def module_of(program: torch.export.ExportedProgram) -> nn.Module:
    """Return a module that runs an exported program at all sizes that it is for.

    torch 2.11 has it refuse sizes of another parity than the example's, which nothing in the
    program depends on; its max-pooling asked for them.
    """
    has_fault = TorchVersion(torch.__version__) < "2.12"
    return program.module(check_guards=False) if has_fault else program.module()


def _write_torch(program: torch.export.ExportedProgram, path: Path, masked: bool) -> Run:
    torch.export.save(program, path)
    module = module_of(torch.export.load(path))
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


def _write_openvino(
    program: torch.export.ExportedProgram,
    path: Path,
    masked: bool,
    int8_calibration: Sequence[Tensor] = (),
) -> Run:
    import openvino

    network = convert(program)
    if int8_calibration:
        network = quantized(network, int8_calibration, len(network.outputs) - 1)
        network.remove_result(network.get_results()[-1])
    for name, port in zip(("pixel_values", "pixel_mask"), network.inputs, strict=False):
        port.get_tensor().set_names({name})
    for name, port in zip(_OUTPUTS, network.outputs, strict=False):
        port.get_tensor().set_names({name})
    openvino.save_model(network, path, compress_to_fp16=False)
    # read into memory, as the file is moved afterwards
    written = openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())
    run = compiled(written, torch.float32, torch.get_num_threads())

    def call(inputs: Inputs) -> list[Tensor]:
        results = run([tensor.cpu().numpy() for tensor in inputs])
        return [torch.from_numpy(results[i]) for i in range(len(run.outputs))]

    return call


_WRITERS: dict[str, Callable[[torch.export.ExportedProgram, Path, bool], Run]] = {
    "torch": _write_torch,
    "aoti": _write_aoti,
    "onnx": _write_onnx,
    "openvino": _write_openvino,
}


def _images(model: nn.Module, batch: int, size: tuple[int, int], masked: bool) -> Inputs:
    """Return random images, with a mask that pads all but the first if `masked`."""
    weight = next(p for p in model.parameters() if p.is_floating_point())
    channels = cast(Any, model).config.num_channels
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(batch, channels, *size, generator=generator, device="cpu")
    mask = torch.ones(batch, *size, device="cpu")
    mask[1:, size[0] * 3 // 4 :] = 0
    kept = (pixel_values, mask)[: 1 + masked]
    return tuple(tensor.to(weight.device, weight.dtype) for tensor in kept)
