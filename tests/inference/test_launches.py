"""Launches of an optimised model on a GPU, counted with a driver that launches nothing."""

from collections import Counter
from unittest import mock

import pytest
import torch
from support.kernels import compiled_only

import cdetr_fast
from cdetr_fast import ConditionalDetrConfig, ConditionalDetrForObjectDetection
from cdetr_fast.inference import linear
from cdetr_fast.models.counting import OperatorCounter

pytest.importorskip("triton")
pytestmark = compiled_only

# Widths and sizes of images make no difference to the number of launches.
NARROW = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_queries": 5}
PARTS = {
    "_convolution_pointwise": 54,  # with batch norm, ReLU and residual
    "max_pool2d": 1,
    "addmm": 11,  # joint queries, keys and values of self-attention, with the position
    "conditional_attention": 11,
    "conditional_attention_separable": 6,
    "_addmm_activation": 12 + 5 + 2,  # feed-forward, scale of the sine code, box head
    # Outputs of attention and feed-forward; queries of cross-attention, content and position; scale
    # of the sine code; keys and values of all layers; the two heads.
    "linear": 29 + 10 + 5 + 1 + 2,
    "residual_layer_norm": 29,
    "layer_norm": 1,
    "mul": 5,  # the sine code times its scale
    "add": 1,  # boxes
    "sigmoid": 1,
}


def test_an_optimised_forward_launches_187_kernels():
    from cdetr_kernels import dispatch
    from cdetr_kernels.testing.stub_driver import stubbed

    config = ConditionalDetrConfig(use_pretrained_backbone=False, **NARROW)
    with mock.patch.object(linear, "has_onednn", return_value=False):  # as on a GPU
        model = cdetr_fast.optimize(ConditionalDetrForObjectDetection(config).eval())
    images = torch.zeros(1, 3, 64, 96)
    with (
        torch.inference_mode(),
        stubbed(),
        mock.patch.object(dispatch, "PREFERRED", "triton"),
    ):
        for _ in range(3):  # constants are made, weights packed
            model(images)
        with OperatorCounter() as counted:
            model(images)
    launches: Counter[str] = Counter()
    for name, count in counted.launches.items():
        if name not in ("promote_types", "to"):  # the host's, and one that changes no dtype here
            launches[name.rpartition("::")[2].rstrip("_")] += count
    assert launches == PARTS
    images_to_channels_last = 1  # `contiguous`, which the counter takes for a view
    assert sum(launches.values()) + images_to_channels_last == 187
    assert counted.waits.total() == counted.copies.total() == 0
