"""Methods that users of transformers' models call."""

import pytest
import torch
import transformers
from support.tiny import tiny_config
from torch import nn

import cdetr_fast
from cdetr_fast import ConditionalDetrForObjectDetection, ConditionalDetrImageProcessor

peft = pytest.importorskip("peft")


@pytest.fixture
def model():
    return ConditionalDetrForObjectDetection(tiny_config(decoder_layers=2)).eval()


@pytest.fixture
def images():
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    return model.eval()(images).logits


def lora(**changes):
    return peft.LoraConfig(**({"r": 2, "target_modules": ["v_proj", "fc2"]} | changes))


@torch.no_grad()
def randomise_adapter(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "ia3_l" in name:
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def test_sizes_and_parts(model):
    parameters = sum(p.numel() * 4 for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert model.get_memory_footprint(return_buffers=False) == parameters
    assert model.get_memory_footprint() == parameters + buffers
    weight = "class_labels_classifier.weight"
    assert model.get_parameter_or_buffer(weight) is model.class_labels_classifier.weight
    norm = "model.backbone.model.bn1.running_mean"
    assert model.get_parameter_or_buffer(norm) is model.model.backbone.model.bn1.running_mean
    for missing in ("class_labels_classifier", "nothing", "model.nothing.weight"):
        with pytest.raises(AttributeError, match=r"nothing|class_labels_classifier"):
            model.get_parameter_or_buffer(missing)
    assert model.get_encoder() is model.model.get_encoder() is model.model.encoder
    assert model.get_decoder() is model.model.decoder
    assert model.get_encoder("image") is model
    assert model.get_output_embeddings() is None
    assert type(model).can_generate() is False
    assert model.get_input_embeddings() is None  # Accelerate's FSDP asks


def test_attention_and_tags(model):
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation({"": "sdpa", "backbone_config": "eager"})
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="attn_implementation"):
        model.set_attn_implementation("sdqa")
    model.add_model_tags(["a", "b"])
    model.add_model_tags("b")
    assert model.model_tags == ["a", "b"]
    assert ConditionalDetrForObjectDetection.model_tags is None


def test_weights_are_initialised_once(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.init_weights()
    model.tie_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_derived_classes_call_post_init(images):
    class Detector(ConditionalDetrForObjectDetection):
        def __init__(self, config):
            super().__init__(config)
            self.extra = nn.Linear(2, 2)
            self.post_init()

    config = tiny_config()
    config.gradient_checkpointing = True
    detector = Detector(config)
    assert detector.is_activation_checkpointing
    assert "gradient_checkpointing" not in detector.config.to_dict()


def test_keywords_of_callers(model, images):
    expected = logits(model, images)
    with torch.no_grad():
        got = model(images, num_items_in_batch=torch.tensor(3), use_cache=False).logits
    torch.testing.assert_close(got, expected)
    with pytest.raises(TypeError, match="'pixel_masks'; did you mean 'pixel_mask'"):
        model(images, pixel_masks=None)
    # Else Trainer would not divide the loss by the steps that it accumulates.
    assert model.accepts_loss_kwargs is False


@pytest.mark.parametrize("learned", [False, True])
def test_re_entrant_checkpointing_has_the_same_gradients(images, learned):
    found = []
    for options in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        kind = "learned" if learned else "sine"
        model = ConditionalDetrForObjectDetection(
            tiny_config(decoder_layers=2, dropout=0.0, position_embedding_type=kind)
        ).train()
        if options is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        model(images).logits.square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() == found[2].keys()
    for other in found[1:]:
        largest = max(gradient.abs().max().item() for gradient in found[0].values())
        for name, gradient in found[0].items():
            tolerance = 1e-5 * gradient.abs().max().item() + 1e-6 * largest
            torch.testing.assert_close(other[name], gradient, atol=tolerance, rtol=0, msg=name)


def test_inputs_that_require_gradients(model, images):
    model.requires_grad_(False)
    model.add_adapter(lora())
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()(images).logits.sum().backward()
    named = model.named_parameters()
    assert all(p.grad is not None for n, p in named if "model.encoder" in n and "lora_" in n)
    model.disable_input_require_grads()
    model.disable_input_require_grads()
    assert not model.model.input_projection._forward_hooks


CONFIGS = {
    "lora": lambda: lora(),
    "dora": lambda: lora(use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["v_proj", "fc2"], feedforward_modules=["fc2"]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_adapters_are_saved_and_loaded(kind, images, tmp_path):
    model = ConditionalDetrForObjectDetection(tiny_config()).eval()
    model.save_pretrained(tmp_path / "base")
    model = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "base")
    plain = logits(model, images)
    model.add_adapter(CONFIGS[kind]())
    randomise_adapter(model)
    adapted = logits(model, images)
    assert (adapted - plain).abs().max() > 1e-3
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names
    assert all("lora_" in name or "ia3_" in name for name in names)
    model.disable_adapters()
    torch.testing.assert_close(logits(model, images), plain)
    model.enable_adapters()
    assert model.active_adapters() == ["default"]
    model.save_pretrained(tmp_path / "adapter")
    files = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" not in files

    again = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "base")
    again.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(logits(again, images), adapted)
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_" in n)
    ConditionalDetrImageProcessor(size=96).save_pretrained(tmp_path / "base")
    direct = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "adapter")
    assert direct.image_processor.size["shortest_edge"] == 96
    ConditionalDetrImageProcessor(size=64).save_pretrained(tmp_path / "adapter")  # as Trainer does
    direct = ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "adapter")
    assert direct.image_processor.size["shortest_edge"] == 64
    torch.testing.assert_close(logits(direct, images), adapted)
    theirs = transformers.ConditionalDetrForObjectDetection.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(theirs, images), adapted, atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="'default'"):
        again.load_adapter(tmp_path / "adapter")
    again.delete_adapter("default")
    torch.testing.assert_close(logits(again, images), plain)


def test_adapter_of_another_model_is_refused(images, tmp_path):
    model = ConditionalDetrForObjectDetection(tiny_config()).eval()
    model.add_adapter(lora())
    model.save_pretrained(tmp_path)
    other = cdetr_fast.ConditionalDetrModel(tiny_config()).eval()
    before = dict(other.named_parameters())
    with pytest.raises(ValueError, match="expected the weights of an adapter"):
        other.load_adapter(tmp_path)
    after = dict(other.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert sum(p.requires_grad for p in after.values()) > 10
    with pytest.raises(TypeError, match="PeftConfig"):
        model.add_adapter({"r": 2}, "second")


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("merged", [False, True])
def test_optimize_refuses_adapters_by_name(kind, merged, model, images):
    adapted = peft.inject_adapter_in_model(CONFIGS[kind](), model).eval()
    if merged:
        for module in adapted.modules():
            if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
                module.merge()
    with pytest.raises(ValueError, match=r"(v_proj|fc2) is an adapter"):
        cdetr_fast.optimize(adapted)


def test_optimize_takes_a_merged_and_unloaded_model(model, images):
    wrapped = peft.get_peft_model(model, lora())
    randomise_adapter(wrapped)
    with pytest.raises(TypeError, match="Peft"):
        cdetr_fast.optimize(wrapped.eval())
    expected = logits(wrapped, images)
    fast = cdetr_fast.optimize(wrapped.merge_and_unload().eval())
    torch.testing.assert_close(logits(fast, images), expected, atol=1e-4, rtol=0)
