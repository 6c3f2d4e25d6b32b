"""Models that are saved and loaded."""

import warnings

import pytest
import torch
import transformers

import cdetr_fast
from support import oracle

SMALL = {
    "backbone": "resnet18",
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
RESNET = {
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
}
CASES = {
    "base": ("base", {}),
    "detection": ("detection", {}),
    "segmentation": ("segmentation", {}),
    "learned": ("detection", {"position_embedding_type": "learned"}),
    "dc5": ("detection", {"dilation": True}),
    "own resnet": ("detection", RESNET),
    "auxiliary loss": ("detection", {"auxiliary_loss": True}),
    "mobilenet": ("detection", {"backbone": "tf_mobilenetv3_small_075"}),
}


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws norms, biases and statistics, which else are ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.dim() == 1:
            # large variances keep a MobileNet without activations from growing out of fp32's reach
            low = 1.5 if name.endswith("running_var") else 0.5
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + low)


def our_model(task: str = "detection", seed: int = 0, **config) -> torch.nn.Module:
    model = oracle.make_ours(task, **(SMALL | config)).eval()
    randomise(model, seed)
    return model


def their_model(task: str = "detection", **config) -> torch.nn.Module:
    config = transformers.ConditionalDetrConfig(**(oracle.TINY | SMALL | config))
    model = getattr(transformers, oracle.CLASSES[task])(config).eval()
    randomise(model)
    return model


def class_of(task: str) -> type:
    return getattr(cdetr_fast, oracle.CLASSES[task])


@torch.no_grad()
def outputs_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    images, mask = oracle.padded_images(model.dtype)
    output = model(images, pixel_mask=mask)
    names = ("last_hidden_state", "logits", "pred_boxes", "pred_masks")
    return {name: output[name] for name in names if name in output}


def assert_equal_outputs(a: torch.nn.Module, b: torch.nn.Module, tolerance: float = 1e-4) -> None:
    expected = outputs_of(b)
    for name, value in outputs_of(a).items():
        torch.testing.assert_close(value, expected[name], atol=tolerance, rtol=0, msg=name)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def quiet():
    """Turns every warning into a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield
