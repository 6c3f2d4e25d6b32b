"""Whole model in fp32, bf16 and int8 beside other runtimes: ONNX Runtime and OpenVINO.

    python -m benchmarks runtimes --threads 2
    python -m benchmarks runtimes --threads 2 --shapes 1x800x1066 4x480x640p --compile default

Shapes are BxHxW, with a p behind them for padded batches. The other runtimes get transformers'
model, exported for the one shape, and without a mask where nothing is padded. All precisions are
measured in turns in one run, and compared with transformers' model in fp32. Calibration images are
the same for every int8 model; those of other runtimes are made by NNCF. Needs the extra `peers`;
a runtime that is missing is a row with the reason.
"""

import argparse
import functools
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import cdetr_fast
from benchmarks.case import Case, GateFailed, Within
from benchmarks.exported import DetectionOutputs, onnx_session, outputs_of, require
from benchmarks.inputs import ERRORS, model_pair, output_errors, random_images
from cdetr_fast.inference.engine_trial import Shape

REFERENCE = "transformers sdpa"
CALIBRATION = 4  # batches
LIMITS = {"fp32": (1e-3, 0.1), "bf16": (0.5, float("inf")), "int8": (0.5, float("inf"))}
"""Largest errors of a precision, in the order of `ERRORS`; AP is what `precision` measures."""

Inputs = tuple[Tensor, ...]
Call = Callable[[], Any]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--layers", type=int, default=6, help="of the encoder and the decoder")
    parser.add_argument(
        "--shapes", nargs="+", type=shape_of, default=[Shape(1, 800, 1066)], metavar="BxHxW[p]"
    )
    parser.add_argument(
        "--compile", nargs="*", default=[], metavar="MODE", help="modes of torch.compile to try"
    )
    parser.add_argument(
        "--only", metavar="REGEX", help="providers to measure, besides the reference"
    )


def shape_of(text: str) -> Shape:
    """Return the shape that an option names."""
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for batch, height, width, padded in options.shapes:
        models = Models(options, batch, (height, width), padded)
        providers = models.providers()
        if options.only:
            wanted = re.compile(options.only)
            providers = {
                name: call
                for name, call in providers.items()
                if name == REFERENCE or wanted.search(name)
            }
        yield Case(
            work="forward",
            shape=f"{options.backbone} {height}x{width} B={batch}" + (" padded" if padded else ""),
            dtype="as named",
            providers=providers,
            reference=REFERENCE,
            gate=_gate(output_errors((height, width))),
            optional=[name for name in providers if not name.startswith(("transf", "optim"))]
            + [f"{REFERENCE} compile {mode}" for mode in options.compile],
            warmup=1,
            derive=lambda row, batch=batch: {  # type: ignore[misc]  # its default is the batch's
                "precision": precision_of(row["provider"]),
                "images/s": 1e3 * batch / row["ms"],
            },
        )


def precision_of(provider: str) -> str:
    """Return the precision in a provider's name; fp32 if it has none."""
    return next((name for name in ("int8", "bf16") if name in provider), "fp32")


def _gate(errors: Callable[[Any, Any], dict[str, float]]) -> Callable[..., Mapping[str, float]]:
    gates = {
        name: Within(errors, dict(zip(ERRORS, limits, strict=True)))
        for name, limits in LIMITS.items()
    }
    return lambda provider, got, expected: gates[precision_of(provider)](provider, got, expected)


class Models:
    """Calls of the models on one batch, by the name of their row, built in their first call.

    Args:
        options: Of the command.
        batch: Number of images.
        size: Their height and width.
        padded: Whether all but the first have a quarter less height.
    """

    def __init__(
        self, options: argparse.Namespace, batch: int, size: tuple[int, int], padded: bool
    ) -> None:
        self.options = options
        pixel_values, pixel_mask = random_images(batch, size, padded)
        self.images: Inputs = (pixel_values, pixel_mask) if padded else (pixel_values,)
        generator = torch.Generator().manual_seed(2)
        self.calibration = [
            torch.randn(pixel_values.shape, generator=generator) for _ in range(CALIBRATION)
        ]

    @functools.cached_property
    def pair(self) -> tuple[Any, Any]:
        """Transformers' model and ours, with equal weights."""
        return model_pair(
            backbone=self.options.backbone,
            encoder_layers=self.options.layers,
            decoder_layers=self.options.layers,
            num_labels=91,
        )

    def providers(self) -> dict[str, Call]:
        """Return the calls, each of which builds its model when it is called first."""
        makers: dict[str, Callable[[], Call]] = {
            REFERENCE: lambda: functools.partial(self.pair[0], *self.images)
        }
        for mode in self.options.compile:
            makers[f"{REFERENCE} compile {mode}"] = functools.partial(self._compiled, mode)
        makers |= {
            "optimize(cdetr_fast) fp32": self._optimized,
            "optimize(cdetr_fast) bf16": lambda: self._optimized(dtype=torch.bfloat16),
            "optimize(cdetr_fast) int8": lambda: self._optimized(int8_calibration=self.calibration),
            "optimize(cdetr_fast) int8, the rest bf16": lambda: self._optimized(
                dtype=torch.bfloat16, int8_calibration=self.calibration
            ),
            'engine="openvino" fp32': lambda: self._optimized(engine="openvino"),
            'engine="openvino" bf16': lambda: self._optimized(
                engine="openvino", dtype=torch.bfloat16
            ),
            'engine="openvino" int8': lambda: self._optimized(
                engine="openvino", int8_calibration=self.calibration
            ),
            'engine="openvino" int8, the rest bf16': lambda: self._optimized(
                engine="openvino", dtype=torch.bfloat16, int8_calibration=self.calibration
            ),
            "ONNX Runtime fp32": lambda: self._onnx_runtime(False),
            "ONNX Runtime int8": lambda: self._onnx_runtime(True),
            "OpenVINO fp32": lambda: self._openvino("f32", False),
            "OpenVINO bf16": lambda: self._openvino("bf16", False),
            "OpenVINO int8": lambda: self._openvino("f32", True),
            "OpenVINO int8, the rest bf16": lambda: self._openvino("bf16", True),
        }
        return {name: _Built(make) for name, make in makers.items()}

    def _compiled(self, mode: str) -> Call:
        return functools.partial(torch.compile(self.pair[0], mode=mode), *self.images)

    def _optimized(self, **options: Any) -> Call:
        model = cdetr_fast.optimize(self.pair[1], **options)
        pixel_values = self.images[0].to(options.get("dtype", torch.float32))
        return functools.partial(model, pixel_values, *self.images[1:])

    @functools.cached_property
    def program(self) -> torch.export.ExportedProgram:
        """Transformers' model, exported for the batch's shape."""
        model = DetectionOutputs(self.pair[0]).eval()
        return torch.export.export(model, self.images)

    def _feeds(self, names: list[str]) -> list[dict[str, Any]]:
        """Return calibration batches as arrays by the names of inputs."""
        return [
            {name: x.numpy() for name, x in zip(names, (batch, *self.images[1:]), strict=True)}
            for batch in self.calibration
        ]

    def _openvino(self, precision: str, int8: bool) -> Call:
        require("openvino", *(("nncf",) if int8 else ()))
        import openvino

        core = openvino.Core()
        if precision == "bf16" and "BF16" not in core.get_property(
            "CPU", "OPTIMIZATION_CAPABILITIES"
        ):
            raise GateFailed("this CPU has no bf16 instructions")
        model = self._openvino_int8 if int8 else self._openvino_model
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_NUM_THREADS": self.options.threads,
                "INFERENCE_PRECISION_HINT": precision,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        request = compiled.create_infer_request()
        arrays = [tensor.numpy() for tensor in self.images]

        def run() -> SimpleNamespace:
            results = request.infer(arrays, share_inputs=True)
            return outputs_of([results[output] for output in compiled.outputs])

        return run

    @functools.cached_property
    def _openvino_model(self) -> Any:
        import openvino

        model = openvino.convert_model(self.program)
        model.reshape({i: list(x.shape) for i, x in enumerate(self.images)})
        return model

    @functools.cached_property
    def _openvino_int8(self) -> Any:
        import nncf

        names = [x.any_name for x in self._openvino_model.inputs]
        return nncf.quantize(
            self._openvino_model, nncf.Dataset(self._feeds(names)), subset_size=CALIBRATION
        )

    def _onnx_runtime(self, int8: bool) -> Call:
        require("onnxruntime", "onnx", "onnxscript", *(("nncf",) if int8 else ()))
        names = ["pixel_values", "pixel_mask"][: len(self.images)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.onnx")
            written: Any = torch.onnx.export(
                self.program, dynamo=True, input_names=names, verbose=False
            )
            written.save(path)
            if int8:
                import nncf
                import onnx

                quantized = nncf.quantize(
                    onnx.load(path),
                    nncf.Dataset(self._feeds(names)),
                    subset_size=CALIBRATION,
                    # NNCF 3.4 stops at a linear layer of this graph with an assertion.
                    advanced_parameters=nncf.AdvancedQuantizationParameters(
                        disable_bias_correction=True
                    ),
                )
                onnx.save(quantized, path)
            session = onnx_session(path, self.options.threads)
        feeds = {name: x.numpy() for name, x in zip(names, self.images, strict=True)}
        return lambda: outputs_of(session.run(None, feeds))


class _Built:
    """A call that is built when it is called first."""

    def __init__(self, make: Callable[[], Call]) -> None:
        self.make = make
        self.call: Call | None = None

    @torch.no_grad()
    def __call__(self) -> Any:
        if self.call is None:
            self.call = self.make()
        return self.call()
