"""Pairs of models, transformers' and ours, with the same random weights, and inputs for them."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import cdetr_fast

SMALL_MODEL = {
    "backbone": "test_resnet",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 5,
}
"""Settings of a model that takes no time."""
CLASSES = {
    "base": "ConditionalDetrModel",
    "detection": "ConditionalDetrForObjectDetection",
    "segmentation": "ConditionalDetrForSegmentation",
}

TINY: dict[str, Any] = {
    "backbone": "test_resnet",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_queries": 20,
    "num_labels": 7,
    "dropout": 0.0,
}


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Randomise all weights, norms and their statistics included: initial ones hide defects."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    for name, parameter in model.named_parameters():
        if "query_position_embeddings" in name:
            normal(parameter, 1.0)
        elif parameter.dim() == 1 and name.endswith("weight"):  # the norms
            uniform(parameter, 0.5, 1.5)
        elif parameter.dim() == 1:
            normal(parameter, 0.1)
        elif "backbone" not in name:
            normal(parameter, (2 / (parameter.shape[0] + parameter.shape[1])) ** 0.5)
    for name, buffer in model.named_buffers():
        # timm starts the last norm of a residual branch at 0. Frozen, that switches the branch off,
        # but as large as the others it makes fp32 rounding exceed every tolerance.
        if name.endswith("weight"):
            uniform(buffer, *((0.5, 1.5) if buffer.any() else (0.1, 0.3)))
        elif name.endswith("bias"):
            normal(buffer, 0.1)
    _calibrate(model)


def _calibrate(model: nn.Module) -> None:
    """Set batch-norm statistics to those of the images, as training does; states stay moderate."""

    def set_statistics(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        assert isinstance(module.running_mean, Tensor)
        assert isinstance(module.running_var, Tensor)
        module.running_mean.copy_(arguments[0].mean((0, 2, 3)))
        module.running_var.copy_(arguments[0].var((0, 2, 3), correction=0) + 0.01)

    norms = [module for module in model.modules() if hasattr(module, "running_var")]
    handles = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    model(*padded_images())
    for handle in handles:
        handle.remove()


def make_pair(
    task: str = "detection", compat: str = "transformers", **config: Any
) -> tuple[nn.Module, nn.Module]:
    """Return transformers' model and ours with equal weights, in training mode."""
    theirs = make_theirs(task, **config)
    ours = make_ours(task, compat, **config)
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


def make_theirs(task: str = "detection", implementation: str = "eager", **config: Any) -> nn.Module:
    """Return transformers' model with random weights; only "eager" returns attentions there."""
    settings = transformers.ConditionalDetrConfig(**(TINY | config))
    settings._attn_implementation = implementation
    theirs = getattr(transformers, CLASSES[task])(settings)
    randomise(theirs)
    return theirs.train()


def make_ours(task: str = "detection", compat: str = "paper", **config: Any) -> nn.Module:
    """Return our model with its own initial weights."""
    settings = cdetr_fast.ConditionalDetrConfig(compat=compat, **(TINY | config))
    return getattr(cdetr_fast, CLASSES[task])(settings)


def random_model(
    task: str = "detection", compat: str = "paper", seed: int = 0, **config: Any
) -> nn.Module:
    """Return our model with random weights, in evaluation mode."""
    torch.manual_seed(0)  # some initial weights amplify rounding
    model = make_ours(task, compat, **config)
    randomise(model, seed)
    return model.eval()


def assert_same(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    """Compare two outputs of one class, field by field."""
    assert type(got) is type(expected)
    assert list(got) == list(expected)
    for name in expected:
        error = (got[name] - expected[name]).abs().max().item()
        assert error <= tolerance, f"{name} is off by {error}"


def largest_error(got: Any, expected: Any) -> float:
    """Return the largest difference of logits and boxes."""
    return max((got[k] - expected[k]).abs().max().item() for k in ("logits", "pred_boxes"))


def padded_images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return two images of odd sizes, 97 x 131 and 70 x 100, padded: pixel_values, pixel_mask."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(2, 3, 97, 131, generator=generator).to(dtype)
    pixel_mask = torch.ones(2, 97, 131, dtype=torch.int64)
    pixel_mask[1, 70:] = 0
    pixel_mask[1, :, 100:] = 0
    return pixel_values * pixel_mask[:, None], pixel_mask


def random_labels(
    counts: tuple[int, ...] = (3, 0), classes: int = 7, masks: bool = False, seed: int = 3
) -> list[dict[str, Tensor]]:
    """Return labels with `counts[i]` objects in image i."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        label = {
            "class_labels": torch.randint(0, classes, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
        }
        if masks:
            label["masks"] = torch.rand(count, 90, 120, generator=generator) > 0.5
        labels.append(label)
    return labels


def leaves(output: Any) -> dict[str, Tensor]:
    """Return all tensors of an output by a readable path."""
    found: dict[str, Tensor] = {}

    def visit(path: str, value: Any) -> None:
        if isinstance(value, Tensor):
            found[path] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{path}.{key}", item)
        else:
            for index, item in enumerate(value):
                visit(f"{path}.{index}", item)

    visit("", output)
    return found
