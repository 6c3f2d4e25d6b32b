"""OpenVINO as the engine of an optimised model, on CPUs.

Replaces: the call of the prepared copy, with `optimize(model, engine="openvino")`.

The prepared copy is exported once, with batch and image sizes open and a mask, and compiled once
for all sizes: compiled for one size it would be 2 % faster, and each size would hold the weights
again and take a second (ResNet-50, 800x1066). Its outputs are compared with the model's before it
is used.
"""

import copy
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cdetr_fast.inference.prepare import OPEN_SHAPES, PreparedModel

Outputs = dict[str, Tensor]

DTYPES = (torch.float32, torch.bfloat16)
_TRIAL = (2, 96, 128)
"""Batch, height and width of the images that an engine is exported, and checked, with."""
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
_INT8_LIMIT = 0.25
"""Largest errors on a trial, relative to the norm of an output."""
_INSTALL = "pip install 'cdetr-fast[{}]'"


def openvino_unsupported_reason(dtype: torch.dtype, int8: bool) -> str | None:
    """Return why OpenVINO does not run a model in a precision here, and what to do; or None."""
    for module, extra in (("openvino", "openvino"), *((("nncf", "int8"),) if int8 else ())):
        if importlib.util.find_spec(module) is None:
            return f"needs {module}: {_INSTALL.format(extra)}"
    if dtype not in DTYPES:
        return f"expected float32 or bfloat16, got {dtype}"
    if dtype == torch.bfloat16 and "BF16" not in _capabilities():
        return "this CPU has no bf16 instructions; use float32"
    return None


def _capabilities() -> list[str]:
    import openvino

    return openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class Precision(NamedTuple):
    """Precision in which a model is compiled.

    Attributes:
        dtype: float32 or bfloat16: of everything that is not in int8.
        int8_calibration: Batches of images `[B, C, H, W]` for NNCF's post-training quantisation;
            none leaves int8 out.
    """

    dtype: torch.dtype
    int8_calibration: Sequence[Tensor] = ()

    def __str__(self) -> str:
        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return f"int8 by NNCF, the rest in {name}" if self.int8_calibration else name


class OpenVinoCall:
    """A prepared model, compiled by OpenVINO; called as the prepared model is.

    Args:
        model: One of this package's models, on a CPU in eval mode; it is not changed.
        int8_calibration: As in `Precision`.

    Raises:
        RuntimeError: OpenVINO's outputs are not the model's.
    """

    def __init__(self, model: nn.Module, int8_calibration: Sequence[Tensor] = ()) -> None:
        dtype = next(p.dtype for p in model.parameters())
        self.precision = Precision(dtype, int8_calibration)
        self.threads = torch.get_num_threads()
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
            # Exported in fp32: OpenVINO rounds weights itself, after norms are folded.
            prepared = PreparedModel(copy.deepcopy(model).float())
            prepared.join_attention()
            trial = _trial(prepared.num_channels)
            network = convert(
                torch.export.export(_Forward(prepared).eval(), trial, dynamic_shapes=OPEN_SHAPES)
            )
            if int8_calibration:
                network = quantized(network, int8_calibration)
                images = int8_calibration[-1]  # in the range that the codes are for
                trial = images, torch.ones(len(images), *images.shape[-2:], device="cpu")
            self._compiled = compiled(network, dtype, self.threads)
            self._idle: list[Any] = []  # requests, each of one thread at a time
            expected = dict(model(trial[0].to(dtype), trial[1], return_dict=True))
            self._dtypes = {name: tensor.dtype for name, tensor in expected.items()}
            self.error = self._check(self(*trial), expected)

    def __call__(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> Outputs:
        """Run the model; arguments and results as in `PreparedModel.forward`."""
        if pixel_mask is None:
            batch, _, height, width = pixel_values.shape
            pixel_mask = torch.ones(batch, height, width, device="cpu")
        arrays = [_array(pixel_values), _array(pixel_mask != 0)]
        try:
            request = self._idle.pop()
        except IndexError:  # all are in use by other threads
            request = self._compiled.create_infer_request()
        results = request.infer(arrays, share_inputs=True)
        self._idle.append(request)
        return {
            name: torch.from_numpy(results[i]).to(dtype)
            for i, (name, dtype) in enumerate(self._dtypes.items())
        }

    def _check(self, got: Outputs, expected: Outputs) -> float:
        """Return the largest error of outputs, relative to the norm of each."""
        limit = _INT8_LIMIT if self.precision.int8_calibration else _LIMITS[self.precision.dtype]
        errors = []
        for name, tensor in expected.items():
            difference = (got[name].float() - tensor.float()).norm()
            error = (difference / tensor.float().norm()).item()
            if not error <= limit:
                raise RuntimeError(
                    f'engine: "openvino" in {self.precision} is off by {error:.1e} of the norm of '
                    f'{name}, expected at most {limit:.0e}; use engine="torch"'
                )
            errors.append(error)
        return max(errors)

    def describe(self) -> str:
        """Return what runs a call, and how far it is from the model."""
        import openvino

        version = openvino.__version__.partition("-")[0]
        return (
            f"OpenVINO {version}, {self.precision}, {self.threads} threads; outputs on a trial "
            f"within {self.error:.0e} of the model's, relative to their norm"
        )


class _Forward(nn.Module):
    """A prepared model as a function from tensors to a tuple of tensors."""

    def __init__(self, prepared: PreparedModel) -> None:
        super().__init__()
        self.prepared = prepared

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.prepared(pixel_values, pixel_mask).values())


def _trial(channels: int) -> tuple[Tensor, Tensor]:
    """Return images and their mask, which pads the second."""
    batch, height, width = _TRIAL
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(batch, height, width, device="cpu")
    mask[1:, height * 3 // 4 :] = 0
    size = (batch, channels, height, width)
    return torch.randn(size, generator=generator, device="cpu"), mask


def convert(program: torch.export.ExportedProgram) -> Any:
    """Convert an exported program, in fp32, to a network of OpenVINO."""
    import openvino

    network = openvino.convert_model(program)
    if not program.range_constraints:  # of one size, which the conversion does not keep
        arguments, _ = program.example_inputs
        network.reshape({i: list(x.shape) for i, x in enumerate(arguments)})
    return network


def quantized(network: Any, images: Sequence[Tensor]) -> Any:
    """Return a network in int8, by NNCF's post-training quantisation.

    Args:
        network: Of OpenVINO; takes images, and perhaps a mask.
        images: Batches `[B, C, H, W]` on which ranges are found, unpadded.
    """
    import nncf

    masked = len(network.inputs) > 1
    batches = [
        (_array(batch), np.ones((len(batch), *batch.shape[-2:]), np.float32))[: 1 + masked]
        for batch in images
    ]
    return nncf.quantize(network, nncf.Dataset(batches), subset_size=len(batches))


def compiled(network: Any, dtype: torch.dtype, threads: int) -> Any:
    """Compile a network for this CPU.

    Args:
        network: Of OpenVINO.
        dtype: float32 or bfloat16, named in any case: OpenVINO's own choice is bf16 where a CPU has
            AMX.
        threads: Of a call.
    """
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": {torch.float32: "f32", torch.bfloat16: "bf16"}[dtype],
        "PERFORMANCE_HINT": "LATENCY",
        # Pinned, the threads of several processes would share the first cores.
        "ENABLE_CPU_PINNING": threads >= (os.cpu_count() or 1),
    }
    return openvino.Core().compile_model(network, "CPU", settings)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().to(torch.float32).contiguous().numpy()
