"""Invariants: padding, batches and recomputation must not change a result, dropout must."""

import pytest
import torch
from support.oracle import leaves, make_ours, random_labels, randomise
from torch import nn

from cdetr_fast.models.backbone import FrozenBatchNorm2d
from cdetr_fast.models.modeling import ImageFeatures
from cdetr_fast.models.position import MapPosition

SMALL = {
    "backbone": "test_resnet",
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 6,
}
TASKS = pytest.mark.parametrize("task", ["detection", "segmentation"])


def random_model(task="detection", **config):
    model = make_ours(task, **(SMALL | config))
    randomise(model)
    return model


def random_images(batch, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, height, width, generator=generator)


def padded(images, height, width, fill=0.0):
    """Images `[3, h, w]` of several sizes as one batch, with its mask."""
    pixel_values = torch.full((len(images), 3, height, width), fill)
    pixel_mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for i, image in enumerate(images):
        pixel_values[i, :, : image.shape[1], : image.shape[2]] = image
        pixel_mask[i, : image.shape[1], : image.shape[2]] = 1
    return pixel_values, pixel_mask


# Padding and batches -----------------------------------------------------------------------------


class Patches(nn.Module):
    """A backbone that sees no pixel outside its own cell of the map.

    Convolutions with overlap carry what they make of the padding over the border, in any
    implementation (0.25 in the logits of a random `test_resnet`, transformers' as ours).
    """

    def __init__(self, channels):
        super().__init__()
        self.convolution = nn.Conv2d(3, channels, kernel_size=32, stride=32)

    def forward(self, x):
        return [self.convolution(x)]


@torch.no_grad()
@pytest.mark.parametrize("position", ["sine", "learned"])
@pytest.mark.parametrize("fill", [0.0, 100.0])
def test_a_sample_alone_and_padded_in_a_batch(position, fill):
    model = random_model(position_embedding_type=position).eval()
    model.model.backbone.model = Patches(model.model.backbone.intermediate_channel_sizes[-1])
    sizes = [(64, 96), (128, 32), (32, 128), (96, 96)]
    images = [random_images(1, *size, seed)[0] for seed, size in enumerate(sizes)]
    together = model(*padded(images, 160, 128, fill))
    for i, image in enumerate(images):
        alone = model(image[None])
        for name in ("logits", "pred_boxes", "last_hidden_state"):
            torch.testing.assert_close(together[name][i], alone[name][0], rtol=0, atol=1e-5)
    assert not torch.allclose(together.logits[0], together.logits[1], atol=1e-2)


@torch.no_grad()
@TASKS
def test_a_padded_sample_alone_and_in_a_batch(task):
    model = random_model(task).eval()
    sizes = [(61, 97), (128, 33), (100, 100)]
    images = [random_images(1, *size, seed)[0] for seed, size in enumerate(sizes)]
    pixel_values, pixel_mask = padded(images, 128, 100)
    together = leaves(model(pixel_values, pixel_mask))
    order = [2, 0, 1]
    shuffled = leaves(model(pixel_values[order], pixel_mask[order]))
    for name, batch in together.items():
        torch.testing.assert_close(shuffled[name], batch[order], rtol=0, atol=1e-5)
    for i in range(len(images)):
        for name, alone in leaves(model(pixel_values[i : i + 1], pixel_mask[i : i + 1])).items():
            expected = together[name][i]
            tolerance = 1e-5 * max(1.0, expected.abs().max().item())  # mask logits are large
            torch.testing.assert_close(alone[0], expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_features_of_the_padding_are_not_read():
    model = random_model().model.eval()
    features = model.embed_images(*padded([random_images(1, 64, 96)[0]], 128, 160))
    code = features.position.code
    expected = model.transform(features)
    mask = features.mask.view(1, 1, 4, 5)
    assert mask.sum() == 6
    projected = features.projected.masked_fill(~mask, 1e4)
    changed = ImageFeatures(features.maps, projected, features.mask, MapPosition(code))
    got = model.transform(changed).last_hidden_state
    torch.testing.assert_close(got, expected.last_hidden_state, rtol=0, atol=1e-5)

    cropped = ImageFeatures(
        [],
        features.projected[..., :2, :3],
        None,
        MapPosition(code.view(1, 4, 5, -1)[:, :2, :3].flatten(1, 2)),
    )
    got = model.transform(cropped).last_hidden_state
    torch.testing.assert_close(got, expected.last_hidden_state, rtol=0, atol=1e-5)


@torch.no_grad()
@TASKS
def test_a_full_mask_is_no_mask(task):
    model = random_model(task).eval()
    images = random_images(2, 70, 90)
    expected = leaves(model(images))
    for name, got in leaves(model(images, torch.ones(2, 70, 90))).items():
        assert torch.equal(got, expected[name])


@TASKS
def test_the_order_of_objects_does_not_count(task):
    model = random_model(task, auxiliary_loss=True)
    labels = random_labels((5, 3), masks=True)
    shuffled = [{key: value.flip(0) for key, value in label.items()} for label in labels]
    images = random_images(2, 64, 64)
    expected, got = (leaves(model(images, labels=x).loss_dict) for x in (labels, shuffled))
    torch.testing.assert_close(got, expected)


@TASKS
def test_repeatable(task):
    model = random_model(task, dropout=0.1, attention_dropout=0.1, auxiliary_loss=True)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(gradients(model, random_labels((3, 1), masks=True)))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# Gradient checkpointing --------------------------------------------------------------------------


def gradients(model, labels):
    model.zero_grad()
    model(random_images(2, 64, 96), labels=labels).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def saved_bytes(model):
    """Bytes of the tensors that a forward pass keeps for the backward pass."""
    storages = {}

    def count(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        kept = model(random_images(2, 256, 256)).logits
    del kept
    return sum(storages.values())


@TASKS
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("compat", ["paper", "transformers"])
def test_checkpointing_gives_the_same_gradients(task, dropout, compat):
    model = random_model(
        task, dropout=dropout, attention_dropout=dropout, auxiliary_loss=True, compat=compat
    )
    labels = random_labels((3, 1), masks=True)
    results = []
    for enabled in (False, True):
        if enabled:
            model.activation_checkpointing_enable()
        assert model.is_activation_checkpointing is model.is_gradient_checkpointing is enabled
        torch.manual_seed(0)
        results.append(gradients(model, labels))
    assert results[0].keys() == results[1].keys()
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_checkpointing_keeps_less():
    model = random_model(encoder_layers=4, encoder_ffn_dim=256)
    model.model.freeze_backbone()
    expected = saved_bytes(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert saved_bytes(model) < 0.7 * expected
    model.gradient_checkpointing_disable()
    assert saved_bytes(model) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"activation_checkpointing_kwargs": {"use_reentrance": True}},
            ["did you mean", "use_reen"],
        ),
        ({"every_n_layers": 2}, ["every_n_layers", "2"]),
        ({"offload": True}, ["offload", "True"]),
    ],
)
def test_settings_of_checkpointing_that_are_refused(arguments, words):
    model = random_model()
    with pytest.raises((TypeError, ValueError), match=".*".join(words)):
        model.activation_checkpointing_enable(**arguments)
    assert not model.is_activation_checkpointing


def test_number_of_parameters():
    model = random_model(position_embedding_type="learned")
    everything = sum(p.numel() for p in model.parameters())
    embeddings = 6 * 32 + 2 * 50 * 16
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    assert frozen > 0
    assert model.num_parameters() == everything
    assert model.num_parameters(exclude_embeddings=True) == everything - embeddings
    assert model.num_parameters(only_trainable=True) == everything - frozen
    assert (
        model.num_parameters(only_trainable=True, exclude_embeddings=True)
        == everything - frozen - embeddings
    )


# Dropout, layer drop, freezing -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dropout", "attention_dropout"])
def test_images_have_their_own_dropout_from_the_first_decoder_layer_on(kind):
    """Up to the first cross-attention nothing else depends on the image."""
    model = random_model(**{"dropout": 0.0, kind: 0.2}).model
    seen = []
    norm = model.decoder.layers[0].self_attn_layer_norm
    norm.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    images = random_images(1, 64, 64).expand(3, -1, -1, -1)
    torch.manual_seed(0)
    model.train()(images)
    (states,) = seen
    assert states.shape[0] == 3
    for i in range(3):
        for j in range(i):
            assert not torch.allclose(states[i], states[j])
    seen.clear()
    model.eval()(images)
    assert all(torch.equal(state, seen[0][0]) for state in seen[0])


@pytest.mark.parametrize("where", ["encoder", "decoder"])
@pytest.mark.parametrize("kind", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_dropout_acts_in_training_only(where, kind):
    """With the other part of the model in eval mode, equal images still get different states."""
    model = random_model(**{"dropout": 0.0, kind: 0.2}).model.train()
    getattr(model, "decoder" if where == "encoder" else "encoder").eval()
    images = random_images(1, 64, 64).expand(2, -1, -1, -1)
    torch.manual_seed(0)
    states = model(images).last_hidden_state
    assert (states[0] - states[1]).abs().max() > 1e-3
    states = model.eval()(images).last_hidden_state
    assert torch.equal(states[0], states[1])


@TASKS
@pytest.mark.parametrize("auxiliary_loss", [False, True], ids=["plain", "auxiliary"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_all_layers_dropped(task, auxiliary_loss, checkpointing):
    model = random_model(
        task, encoder_layerdrop=1.0, decoder_layerdrop=1.0, auxiliary_loss=auxiliary_loss
    )
    if checkpointing:
        model.activation_checkpointing_enable()
    labels = random_labels((3, 1), masks=True)
    grads = gradients(model, labels)
    assert all(g.isfinite().all() for g in grads.values())
    assert not any("coder.layers." in name for name in grads)
    prefix = "" if task == "detection" else "conditional_detr."
    assert grads[f"{prefix}bbox_predictor.layers.0.bias"].any()
    assert grads[f"{prefix}model.decoder.layernorm.bias"].any()
    model.eval()
    output = model(random_images(2, 64, 96), output_hidden_states=True)
    assert len(output.decoder_hidden_states) == len(output.encoder_hidden_states) == 3


def test_layers_are_dropped_at_random():
    model = random_model(decoder_layers=4, encoder_layerdrop=0.5, decoder_layerdrop=0.5).model
    torch.manual_seed(0)
    counts = [
        (len(output.encoder_hidden_states) - 1, len(output.decoder_hidden_states) - 1)
        for output in (
            model(random_images(1, 32, 32), output_hidden_states=True) for _ in range(30)
        )
    ]
    encoder, decoder = zip(*counts, strict=True)
    assert set(encoder) == {0, 1, 2}
    assert len(set(decoder)) >= 4
    assert 1 < sum(decoder) / 30 < 3


@TASKS
def test_freezing_the_backbone(task):
    model = random_model(task)
    base = (model if task == "detection" else model.conditional_detr).model
    names = {name for name, _ in model.named_parameters() if ".backbone." in f".{name}"}
    labels = random_labels((2, 1), masks=True)
    start = set(gradients(model, labels))
    assert start & names < names  # the early stages are frozen from the start

    base.freeze_backbone()
    frozen = set(gradients(model, labels))
    assert not frozen & names
    assert frozen == start - names

    base.unfreeze_backbone()
    grads = gradients(model, labels)
    assert set(grads) == start | names
    assert all(grads[name].any() for name in names)


def test_the_first_self_attention_is_a_constant_without_gradients():
    """Its state is zero: the constant is what the computation gives, and hooks still see a call."""
    model = random_model().eval()
    pixel_values = random_images(2, 64, 96)
    expected = model(pixel_values)
    layer = model.model.decoder.layers[0].self_attn
    calls = []
    with torch.no_grad():
        got = model(pixel_values)
        layer.q_pos_proj.register_forward_hook(lambda *_: calls.append("hook"))
        called = model(pixel_values)
    assert calls == ["hook"]
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-5)
        torch.testing.assert_close(called[name], expected[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["sine", "learned"])
@pytest.mark.parametrize("shape", ["rectangle", "hole", "none"])
def test_separable_positions_are_taken_where_they_hold(position, shape):
    """Forward and gradients are those of the general form, which a mask with a hole needs."""
    model = random_model(position_embedding_type=position).double().eval()
    pixel_values = random_images(2, 128, 160).double()
    pixel_mask = torch.ones(2, 128, 160, dtype=torch.int64)
    if shape != "none":
        pixel_mask[1, 70:] = 0
        pixel_mask[1, :, 100:] = 0
    if shape == "hole":
        pixel_mask[1, 20:60, 20:60] = 0
    features = model.model.embed_images(pixel_values, pixel_mask)
    is_separable = features.position.rows is not None
    assert is_separable == (position == "learned" or shape != "hole")
    results = []
    for code in (features.position, MapPosition(features.position.code)):
        output = model.model.transform(features._replace(position=code)).last_hidden_state
        # The projection of the positions only sees them through the decoder's keys.
        projections = [layer.encoder_attn.k_pos_proj.weight for layer in model.model.decoder.layers]
        gradients = torch.autograd.grad(output.square().sum(), projections, retain_graph=True)
        results.append((output, *gradients))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def test_positions_on_a_gpu_are_not_looked_at():
    """A mask that is not on a CPU keeps the general form: a look would wait for the device."""
    embedding = random_model().model.position_embedding
    assert embedding.is_separable(None)
    assert not embedding.is_separable(torch.ones(1, 2, 2, dtype=torch.bool, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_frozen_norms_keep_nothing_of_their_input(dtype):
    """Numbers are those of torch's batch norm, which keeps its input for gradients of its own."""
    norm = FrozenBatchNorm2d(5, eps=1e-3)
    for buffer in norm.buffers():
        torch.nn.init.uniform_(buffer, 0.5, 1.5)
    images = torch.randn(2, 5, 3, 4).to(memory_format=torch.channels_last)
    ours, theirs = (images.to(dtype).requires_grad_() for _ in range(2))
    if dtype == torch.float64:
        norm.double()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape), lambda x: x):
        norm(ours)
    assert kept == [(5,), (5,)]
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    expected = torch.nn.functional.batch_norm(theirs, *statistics, eps=1e-3)
    got = norm(ours)
    upstream = torch.randn_like(got)
    assert torch.equal(got, expected)
    (gradient,) = torch.autograd.grad(got, ours, upstream)
    (expected,) = torch.autograd.grad(expected, theirs, upstream)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, expected)
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(norm, ours)
        assert torch.autograd.gradgradcheck(norm, ours)
