"""transformers' model in other runtimes, exported once with batch and image size open."""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import GateFailed
from benchmarks.inputs import random_images
from cdetr_fast.inference.openvino import compiled, convert
from cdetr_fast.inference.prepare import OPEN_SHAPES

Call = Callable[[Tensor], SimpleNamespace]


class DetectionOutputs(nn.Module):
    """A detection model as a function from tensors to logits and boxes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output = self.model(pixel_values, pixel_mask, return_dict=True)
        return output.logits, output.pred_boxes


def require(*modules: str) -> None:
    """Raise GateFailed with what to install if a module is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise GateFailed(f"needs {', '.join(missing)}: pip install 'cdetr-fast[peers]'")


@torch.no_grad()
def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    """Export a model for unpadded images of any number and size."""
    images, _ = random_images(2, (96, 128))
    return torch.export.export(
        DetectionOutputs(model).eval(), (images,), dynamic_shapes=OPEN_SHAPES[:1]
    )


def on_openvino(model: nn.Module, threads: int) -> Call:
    """Return a call of a model on OpenVINO, in fp32."""
    require("openvino")
    request = compiled(convert(program_of(model)), torch.float32, threads).create_infer_request()

    def run(pixel_values: Tensor) -> SimpleNamespace:
        return outputs_of(list(request.infer([pixel_values.numpy()]).values()))

    return run


def on_onnx_runtime(model: nn.Module, threads: int) -> Call:
    """Return a call of a model on ONNX Runtime, in fp32."""
    require("onnxruntime", "onnx", "onnxscript")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        written: Any = torch.onnx.export(
            program_of(model), dynamo=True, input_names=["pixel_values"], verbose=False
        )
        written.save(path)
        session = onnx_session(path, threads)

    def run(pixel_values: Tensor) -> SimpleNamespace:
        return outputs_of(session.run(None, {"pixel_values": pixel_values.numpy()}))

    return run


def onnx_session(path: Path, threads: int) -> Any:
    """Return a session of ONNX Runtime on the CPU."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])


def outputs_of(arrays: list[Any]) -> SimpleNamespace:
    """Return logits and boxes under their names."""
    return SimpleNamespace(logits=torch.tensor(arrays[0]), pred_boxes=torch.tensor(arrays[1]))
