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

from cdetr_fast.inference.prepare import OPEN_SHAPES, PreparedModel, outputs_of

Outputs = dict[str, Tensor]

DTYPES = (torch.float32, torch.bfloat16)
_TRIAL = (2, 96, 128)
"""Batch, height and width of the images that an engine is exported, and checked, with."""
_LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.05}
_INT8_LIMIT = 0.25
"""Largest errors on a trial, relative to the norm of an output."""
MEMORY = "encoder_last_hidden_state"
"""Output that the decoder reads."""
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
            in_fp32 = copy.deepcopy(model).float()
            prepared = PreparedModel(in_fp32)
            prepared.join_attention()
            trial = _trial(prepared.num_channels)
            network = convert(
                torch.export.export(_Forward(prepared).eval(), trial, dynamic_shapes=OPEN_SHAPES)
            )
            if int8_calibration:
                names = list(outputs_of(in_fp32, *trial))
                network = quantized(network, int8_calibration, names.index(MEMORY))
                images = int8_calibration[-1]  # in the range that the codes are for
                trial = images, torch.ones(len(images), *images.shape[-2:], device="cpu")
            self._compiled = compiled(network, dtype, self.threads)
            self._idle: list[Any] = []  # requests, each of one thread at a time
            own = outputs_of(model, trial[0].to(dtype), trial[1])
            self._dtypes = {name: tensor.dtype for name, tensor in own.items()}
            self.error = self._check(self(*trial), own, outputs_of(in_fp32, *trial))

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

    def _check(self, got: Outputs, own: Outputs, in_fp32: Outputs) -> float:
        """Return the largest error of outputs, relative to the norm of each.

        Args:
            got: The engine's outputs.
            own: The model's. Twice their error is allowed, where that is more than the limit.
            in_fp32: The model's in fp32.
        """
        floor = _INT8_LIMIT if self.precision.int8_calibration else _LIMITS[self.precision.dtype]
        errors = []
        for name, tensor in in_fp32.items():
            error = _difference(got[name], tensor)
            limit = max(floor, 2 * _difference(own[name], tensor))
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
            f"within {self.error:.0e} of the model's in fp32, relative to their norm"
        )


class _Forward(nn.Module):
    """A prepared model as a function from tensors to a tuple of tensors."""

    def __init__(self, prepared: PreparedModel) -> None:
        super().__init__()
        self.prepared = prepared

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.prepared(pixel_values, pixel_mask).values())


def _difference(got: Tensor, expected: Tensor) -> float:
    """Return the distance of a tensor, relative to the norm of the one that is expected."""
    return ((got.float() - expected).norm() / expected.norm()).item()


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


def quantized(network: Any, images: Sequence[Tensor], memory: int) -> Any:
    """Return a network in int8 up to the encoder's output, by NNCF's post-training quantisation.

    What reads that output, the decoder and the heads, has a twentieth of the products, and in 8
    bits would make nearly all of the error.

    Args:
        network: Of OpenVINO; takes images, and perhaps a mask.
        images: Batches `[B, C, H, W]` on which ranges are found, unpadded.
        memory: Index of the network's output that is the encoder's.
    """
    import nncf

    masked = len(network.inputs) > 1
    batches = [
        (_array(batch), np.ones((len(batch), *batch.shape[-2:]), np.float32))[: 1 + masked]
        for batch in images
    ]
    encoder = network.outputs[memory].get_node().input_value(0).get_node()
    left_out = nncf.IgnoredScope(names=_readers(encoder), validate=False)
    return nncf.quantize(
        network, nncf.Dataset(batches), subset_size=len(batches), ignored_scope=left_out
    )


def _readers(node: Any) -> list[str]:
    """Return the names of the operators that read a node of a network, directly or not."""
    found: set[str] = set()
    waiting = [node]
    while waiting:
        for output in waiting.pop().outputs():
            for target in output.get_target_inputs():
                reader = target.get_node()
                if reader.get_type_name() != "Result" and reader.get_friendly_name() not in found:
                    found.add(reader.get_friendly_name())
                    waiting.append(reader)
    return sorted(found)


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
