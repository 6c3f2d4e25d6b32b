"""`optimize(model)`: the same model, faster at inference."""

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from cdetr_fast.common.devices import usable_device
from cdetr_fast.common.model_families import family_of
from cdetr_fast.common.validation import PositiveInt, checked
from cdetr_fast.config.field_types import Dtype
from cdetr_fast.inference import optimized
from cdetr_fast.inference.engine_records import (
    DEFAULT,
    Choice,
    Precision,
    architecture,
    choose,
)
from cdetr_fast.inference.engines import ChosenRunner
from cdetr_fast.inference.following import Original, count_fused_steps, stop_following
from cdetr_fast.inference.int8 import int8_unsupported_reason
from cdetr_fast.inference.openvino import openvino_unsupported_reason
from cdetr_fast.inference.plain import unsupported_reason
from cdetr_fast.inference.prepare import shallow_copy
from cdetr_fast.inference.runner import Family, Options, Runner
from cdetr_fast.models.known import become, known
from cdetr_kernels.qualification import ensure_qualified

Model = TypeVar("Model", bound=nn.Module)

ENGINES = ("torch", "openvino", "auto")
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def optimize(
    model: Model,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    compile: bool | str = "auto",
    cuda_graphs: bool | str = "auto",
    *,
    engine: str = "torch",
    bucket: int | str = "exact",
    max_batch: int | None = None,
    max_graphs: int = 8,
    static_outputs: bool = False,
    int8_calibration: Sequence[torch.Tensor] | None = None,
    inplace: bool = False,
    qualify: bool | str = "auto",
) -> Model:
    """Return a model of the same class name, signature, outputs and weights that runs faster.

    Frozen batch norms are folded into the convolutions, which run with bias, residual and
    activation as one operator in channels-last memory; self-attention is one product for queries,
    keys and values; what no image changes is computed once. Outputs agree with the model's up to
    rounding (1e-4 in fp32).

    The result shares all weights with `model` that are not folded, joined or converted, and watches
    it: after it is trained, or weights are loaded into it, the result prepares itself again in the
    next call. Weights that are loaded into the result are its own from then on. It does not train.
    What the modules of `model` are set to (a stride, the epsilon of a norm) is as it was in this
    call; in the result it may be changed. Where a module of `model` is replaced by one of another
    class, the next call of the result raises RuntimeError: optimize the model again.
    Calls with labels, `output_attentions` and the like run the model's own forward.

    A module with something attached (a hook, an adapter such as LoRA, a parametrisation) is refused
    by name. Other modules that were replaced (a backbone, a head, a layer) run as they are, and
    the result's `explain()` says so.

    NaN in images need not come out as NaN: on a CPU a fused ReLU makes 0 of it.

    Not seen are writes through `.data` to tensors on a GPU, to a few single values on a CPU, and
    changes while a graph that torch.compile made around the result is all that runs: call the
    result's `refresh()` after them.

    Args:
        model: A model of this package or of transformers, in eval mode.
        dtype: Convert the weights; None keeps them. Boxes are computed in fp32 in any case.
        device: Move the weights; None keeps them where they are.
        compile: Run it through torch.compile: True or the name of a mode. "auto" does not:
            on a CPU it gains nothing (see docs/decisions.md), and takes a minute for each size.
        cuda_graphs: Capture a CUDA graph for each shape; "auto" does on a GPU.
        engine: What runs the prepared copy: "torch", or "openvino" on CPUs (extra `openvino`), in
            fp32 or bf16, with as many threads as torch has then. It is exported and compiled here,
            once for all sizes, and again when weights change, which takes some seconds each time;
            its outputs are compared with the model's on a trial. Not for segmentation. With
            `int8_calibration` backbone and encoder are put into int8 by NNCF (extra `int8`).
            "auto" is "openvino" where `cdetr-fast benchmark` has found it right and faster on this
            machine, for such a model in this precision, and "torch" elsewhere; `explain()` has the
            reason.
        bucket: Pad images to multiples of 32 or 64 pixels, with masks, so that fewer shapes are
            captured or compiled. Like all padding it changes predictions a little, as convolutions
            see it. "exact" pads nothing.
        max_batch: Larger batches run in parts of this size.
        max_graphs: Graphs that are kept; the one not used for longest is dropped first.
        static_outputs: Return the graph's own tensors, which its next call overwrites.
        int8_calibration: Batches of `pixel_values` `[B, C, H, W]`, some tens of images of the
            sizes, and in batches, as the calls will be. With them the backbone's convolutions and
            the feed-forward blocks run in int8, on CPUs with VNNI, and the rest in `dtype`, fp32 or
            bf16; ranges are found on these images, and again when the weights change. What that
            costs, `python -m benchmarks precision` measures. The other engine goes by them in its
            own way, see `engine`.
        inplace: Change `model` itself, and return it.
        qualify: "auto" finds out which kernels are right and faster on a GPU without a record, once
            and in at most 90 seconds, see `cdetr_kernels.qualify`; False leaves it out, as
            `CDETR_FAST_QUALIFY=0` does.

    Raises:
        TypeError: `model` is of another class, or an argument of another type.
        ValueError: The model is in training mode, has hooks, adapters or NaN in its weights, or an
            argument is out of range.
        RuntimeError: `cuda_graphs=True` where there is no GPU, or a dtype that the device does not
            run, or int8 where the CPU has no instructions for it; or an engine that is not
            installed, or whose outputs are not the model's.
    """
    family = _recognise(model)
    _check_state(model, family)
    wanted: torch.dtype | None = checked(Dtype | None, dtype, "dtype")
    target = _device(device) if device is not None else next(model.parameters()).device
    _check_dtype(wanted or next(p.dtype for p in model.parameters()), target)
    images = calibration_batches(int8_calibration, model)
    kept = wanted or next(p.dtype for p in model.parameters())
    if engine not in ENGINES:
        expected = ", ".join(f'"{name}"' for name in ENGINES)
        raise ValueError(f"engine: expected one of {expected}, got {engine!r}")
    refusal = None
    if engine != "torch":
        refusal = _openvino_refusal(model, target, kept, bool(images), compile, cuda_graphs)
    choice = None
    if engine == "auto":
        choice = Choice(DEFAULT, str(refusal)) if refusal else _choice(model, family, kept, images)
        engine = choice.engine
    elif refusal is not None:
        raise refusal
    if engine == "torch" and images:
        _check_int8(kept, target, compile)
    options = Options(
        engine=engine,
        compile=_compile_mode(compile),
        cuda_graphs=_use_graphs(cuda_graphs, target, compile),
        bucket=_bucket(bucket),
        max_batch=checked(PositiveInt | None, max_batch, "max_batch"),
        max_graphs=checked(PositiveInt, max_graphs, "max_graphs"),
        static_outputs=checked(bool, static_outputs, "static_outputs"),
        int8_calibration=images,
    )
    inplace = checked(bool, inplace, "inplace")
    ensure_qualified(target, qualify)
    result = _alias(model)
    runner = _prepared(result, target, wanted, _runner(options, family, choice))
    if inplace:  # all that could fail has been tried on the alias, so this is done in full
        result = model
        runner = _prepared(result, target, wanted, _runner(options, family, choice))
    else:
        count_fused_steps()
        runner.original = Original(model, result)
    known(become(result, family.optimized_class), optimized.OptimizedModel).runner = runner
    return result


def _runner(options: Options, family: Family, choice: Choice | None) -> Runner:
    return Runner(options, family) if choice is None else ChosenRunner(options, family, choice)


def _prepared(
    model: nn.Module, device: torch.device, dtype: torch.dtype | None, runner: Runner
) -> Runner:
    """Convert a model and prepare its copy."""
    model.to(device=device, dtype=dtype)
    if dtype is not None:
        config: Any = model.config
        config.dtype = dtype
    if (reason := runner.prepare(model)) is not None:
        raise ValueError(f"cannot optimize: {reason}")
    return runner


def _recognise(model: Any) -> Family:
    """Return the family of a model."""
    family = optimized.recognise(model)
    if family is None and (module := family_of(model)) is not None:
        family = module.recognise(model)
    if family is not None:
        return family
    if isinstance(model, optimized.OptimizedModel):
        raise TypeError("model: expected one that is not optimised yet, got an optimised one")
    got = f"{type(model).__module__}.{type(model).__name__}"
    raise TypeError(
        "model: expected ConditionalDetrModel, ConditionalDetrForObjectDetection or "
        f"ConditionalDetrForSegmentation of cdetr_fast or transformers, got {got}"
    )


def _check_state(model: nn.Module, family: Family) -> None:
    if model.training or any(part.training for part in model.modules()):
        raise ValueError("model: expected one in eval mode, got training mode; call model.eval()")
    if (reason := unsupported_reason(model, family.is_harmless)) is not None:
        raise ValueError(f"cannot optimize: {reason}")
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("model: expected weights, got parameters on the meta device")
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise ValueError(f"model: expected one device, got {sorted(map(str, devices))}")


def _device(device: str | torch.device) -> torch.device:
    target = usable_device("device", device)
    if target.type == "meta":
        raise ValueError("device: expected one that computes, got meta")
    return target


def _check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
    if (
        dtype == torch.bfloat16
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        name = torch.cuda.get_device_name(device)
        raise RuntimeError(f"dtype: bfloat16 needs compute capability 8.0, {name} has less")
    if dtype == torch.float64 and device.type == "mps":
        raise RuntimeError("dtype: float64 does not run on mps")


def _openvino_refusal(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    int8: bool,
    compile: bool | str,
    cuda_graphs: bool | str,
) -> Exception | None:
    """Return the error with which engine="openvino" refuses a model or option, or None."""
    if device.type != "cpu":
        return ValueError(f'engine: "openvino" runs on a CPU, got a model on {device}')
    if type(model).__name__ == "ConditionalDetrForSegmentation":
        return TypeError(
            'engine: "openvino" runs no segmentation; use engine="torch", or optimize the '
            "model's detector alone"
        )
    for name, option in (("compile", compile), ("cuda_graphs", cuda_graphs)):
        if option not in ("auto", False):
            return ValueError(
                f'{name}: expected False, as engine="openvino" compiles itself, got {option!r}'
            )
    reason = openvino_unsupported_reason(dtype, int8)
    return None if reason is None else RuntimeError(f'engine: "openvino" {reason}')


def _choice(
    model: nn.Module, family: Family, dtype: torch.dtype, images: tuple[torch.Tensor, ...]
) -> Choice:
    """Choose an engine by the record of this machine."""
    names: tuple[Precision, Precision] = ("int8", "int8-bf16") if images else ("fp32", "bf16")
    precision = names[dtype == torch.bfloat16]
    try:
        converted = family.convert(model)
    except ValueError as error:
        raise ValueError(f"cannot optimize: {error}") from error
    return choose(architecture(converted), precision)


def _compile_mode(value: bool | str) -> str | None:
    if value is False or value == "auto":
        return None
    if value is True:
        return "default"
    if value not in _COMPILE_MODES:
        expected = f'"auto", True, False or one of {_COMPILE_MODES}'
        raise ValueError(f"compile: expected {expected}, got {value!r}")
    return value


def _use_graphs(value: bool | str, device: torch.device, compile: bool | str) -> bool:
    captures_itself = compile in ("reduce-overhead", "max-autotune")
    if value == "auto":
        return device.type == "cuda" and not captures_itself
    if not isinstance(value, bool):
        raise ValueError(f'cuda_graphs: expected "auto", True or False, got {value!r}')
    if value and device.type != "cuda":
        raise RuntimeError(
            f"cuda_graphs: expected a CUDA device to capture graphs on, got {device}"
        )
    if value and captures_itself:
        raise ValueError(f"cuda_graphs: expected False, as compile={compile!r} captures graphs")
    return value


def calibration_batches(images: Any, model: nn.Module) -> tuple[torch.Tensor, ...]:
    """Return what `int8_calibration` gives, in fp32 on the CPU; nothing for None.

    Raises:
        TypeError: It is not a list of floating-point tensors.
        ValueError: A tensor is not a batch of images for the model, or has NaN.
    """
    if images is None:
        return ()
    name = "int8_calibration"
    config: Any = model.config
    channels = config.num_channels
    if isinstance(images, torch.Tensor) or not isinstance(images, Sequence) or not images:
        raise TypeError(
            f"{name}: expected a list of batches of images, got {type(images).__name__}"
        )
    for batch in images:
        if not isinstance(batch, torch.Tensor) or not batch.is_floating_point():
            got = batch.dtype if isinstance(batch, torch.Tensor) else type(batch).__name__
            raise TypeError(f"{name}: expected floating-point tensors, got {got}")
        if batch.dim() != 4 or batch.shape[1] != channels or not batch.numel():
            raise ValueError(f"{name}: expected [B, {channels}, H, W], got {list(batch.shape)}")
        if not batch.isfinite().all():
            raise ValueError(f"{name}: expected finite pixels, got NaN or infinity")
    return tuple(batch.detach().to("cpu", torch.float32) for batch in images)


def _check_int8(dtype: torch.dtype, device: torch.device, compile: bool | str) -> None:
    """Raise the error with which this package's own int8 refuses a model or option."""
    name = "int8_calibration"
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        expected = "a model in float32 or bfloat16 on a CPU"
        raise ValueError(f"{name}: expected {expected}, got {dtype} on {device}")
    if compile not in ("auto", False):
        raise ValueError(f"{name}: expected compile=False, got {compile!r}")
    if (reason := int8_unsupported_reason()) is not None:
        raise RuntimeError(f"{name}: {reason}")


def _bucket(value: int | str) -> int | None:
    if value == "exact":
        return None
    if type(value) is not int or value not in (32, 64):
        raise ValueError(f'bucket: expected 32, 64 or "exact", got {value!r}')
    return value


def _alias(model: Model) -> Model:
    """Copy a model, but for the memory, and counts of writes, of its tensors."""
    result: Model = shallow_copy(model, alias=True)
    for module in result.modules():
        module.register_load_state_dict_pre_hook(_unshare)
    return result


def _unshare(module: nn.Module, *_: Any) -> None:
    """Give a module memory of its own before weights are loaded into it: not into the original."""
    stop_following(module)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if tensor is not None:
            tensor.data = tensor.detach().clone()
