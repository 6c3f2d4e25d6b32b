"""`attn_implementation="cdetr_fast"`: the operator in any model of transformers that it fits."""

import inspect
import re
from pathlib import Path

import pytest
import torch
from support.oracle import leaves, make_theirs, padded_images
from torch.utils._python_dispatch import TorchDispatchMode

import cdetr_fast
from cdetr_fast.integrations import attention

transformers = pytest.importorskip("transformers")
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.fixture(autouse=True)
def _registered():
    with cdetr_fast.patch_transformers(attention=False, losses=False, channels_last=False):
        yield


@pytest.fixture
def calls(monkeypatch):
    """Shapes of queries that reached the operator."""
    seen = []
    original = attention.conditional_attention

    def counted(query, *args, **kwargs):
        seen.append(tuple(query.shape))
        return original(query, *args, **kwargs)

    monkeypatch.setattr(attention, "conditional_attention", counted)
    return seen


def compare(model, *inputs, **kwargs):
    """Outputs under "sdpa" and under "cdetr_fast", and the gradients of their sums."""
    model.eval()
    results = []
    for implementation in ("sdpa", "cdetr_fast"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        output = model(*inputs, **kwargs)
        output[0].square().mean().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((leaves(output), gradients))
    (expected, expected_gradients), (got, gradients) = results
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5)
    for name, value in expected_gradients.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-4)


def test_conditional_detr_loaded_by_name(tmp_path, calls):
    model = make_theirs("detection", "eager")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = leaves(model.eval()(*padded_images(), output_attentions=True))
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="cdetr_fast")
    with torch.no_grad():
        got = leaves(loaded(*padded_images(), output_attentions=True))
    assert loaded.config._attn_implementation == "cdetr_fast"
    assert list(got) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4)
    assert len(calls) == 2 + 3 + 3
    with cdetr_fast.patch_transformers(), torch.no_grad():
        got = leaves(loaded(*padded_images(), output_attentions=True))
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=0, atol=1e-4)


def test_text_with_padding(calls):
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SMALL)).double()
    ids = torch.randint(0, 50, (3, 7))
    attention_mask = torch.ones(3, 7, dtype=torch.int64)
    attention_mask[1, 4:] = 0
    compare(model, ids, attention_mask=attention_mask)
    assert calls == [(3, 7, 4, 8)] * 2
    compare(model, ids)
    assert len(calls) == 4


def test_detr_with_padding(calls):
    torch.manual_seed(0)
    config = transformers.DetrConfig(
        backbone="resnet18",
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=9,
    )
    compare(transformers.DetrForObjectDetection(config), *padded_images())
    assert len(calls) == 1 + 2 + 2


def test_causal_attention_is_left_to_sdpa(calls):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2)
    ids = torch.randint(0, 50, (2, 6))
    attention_mask = torch.ones(2, 6, dtype=torch.int64)
    attention_mask[1, :2] = 0
    model = transformers.LlamaModel(config).double()
    compare(model, ids, use_cache=False)
    compare(model, ids, attention_mask=attention_mask, use_cache=False)
    ungrouped = transformers.LlamaConfig(**SMALL)
    compare(transformers.LlamaModel(ungrouped).double(), ids, use_cache=False)
    assert calls == []


class Module(torch.nn.Module):
    is_causal = False


def call(name, attention_mask, module=None, **kwargs):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, 3, length, 4, generator=generator, dtype=torch.float64)
        for length in (5, 6, 6)
    )
    kwargs = {"scaling": 0.4} | kwargs
    return ALL_ATTENTION_FUNCTIONS[name](
        module or Module(), query, key, value, attention_mask, **kwargs
    )


KEY_MASK = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
BIAS = torch.randn(2, 1, 1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASKS = {
    "none": (None, True),
    "expanded bool": (KEY_MASK[:, None, None].expand(2, 1, 5, 6), True),
    "bool of one row": (KEY_MASK[:, None, None], True),
    "bool of all heads": (KEY_MASK[:, None, None].expand(2, 3, 5, 6), True),
    "bool, one for the batch": (KEY_MASK[:1, None, None].expand(1, 1, 5, 6), True),
    "dense bool": (KEY_MASK[:, None, None].expand(2, 1, 5, 6).contiguous(), False),
    "bool by query": (torch.arange(30).view(1, 1, 5, 6) % 4 > 0, False),
    "expanded bias": (BIAS.expand(2, 1, 5, 6), False),
    "bias of one row": (BIAS, False),
    "padding as floats": (torch.where(KEY_MASK, 0.0, -1e30)[:, None, None].double(), False),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks(name, calls):
    """Only one that its strides prove to be a padding mask reaches the operator."""
    mask, reaches_operator = MASKS[name]
    expected, _ = call("sdpa", mask)
    got, attention_map = call("cdetr_fast", mask)
    torch.testing.assert_close(got, expected)
    assert got.is_contiguous()
    assert attention_map is None
    assert bool(calls) == reaches_operator


def test_an_image_that_is_all_padding_is_as_in_sdpa():
    mask = KEY_MASK.clone()
    mask[1] = False
    mask = mask[:, None, None].expand(2, 1, 5, 6)
    torch.testing.assert_close(call("cdetr_fast", mask)[0], call("sdpa", mask)[0])
    assert (call("cdetr_fast", mask)[0][1] == 0).all()


def test_maps_and_dropout():
    output, attention_map = call("cdetr_fast", None, output_attentions=True)
    assert attention_map.shape == (2, 3, 5, 6)
    torch.testing.assert_close(attention_map.sum(-1), torch.ones(2, 3, 5, dtype=torch.float64))
    torch.manual_seed(0)
    drawn = torch.stack([call("cdetr_fast", None, dropout=0.3)[0] for _ in range(3000)])
    assert (drawn[0] != drawn[1]).any()
    torch.testing.assert_close(drawn.mean(0), output, rtol=0, atol=0.1)


@pytest.mark.parametrize(
    "arguments",
    [
        {"is_causal": True},
        {"position_bias": torch.ones(1, 3, 5, 6, dtype=torch.float64)},
    ],
)
def test_what_the_operator_does_not_compute(arguments, calls):
    expected, _ = call("sdpa", None, **arguments)
    torch.testing.assert_close(call("cdetr_fast", None, **arguments)[0], expected)
    assert calls == []
    if "cache" in inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters:
        call("cdetr_fast", None, cache="not one that sdpa knows")
    else:  # before transformers 5.23
        with pytest.raises(ValueError, match="does not compute cache"):
            call("cdetr_fast", None, cache="not one that sdpa knows")
    assert calls == []


def test_what_nobody_computes_is_refused():
    """sdpa ignores keywords that it does not know, so it cannot be the fallback for them."""
    for name in ("s_aux", "sinks", "softcap", "indices", "block_indices", "a_new_idea"):
        message = f'"cdetr_fast" does not compute {name}, which Module needs; set .*"eager"'
        with pytest.raises(ValueError, match=message):
            call("cdetr_fast", None, **{name: torch.ones(3)})
        expected, _ = call("sdpa", None)
        torch.testing.assert_close(call("cdetr_fast", None, **{name: None})[0], expected)


def test_sinks_of_the_module_are_refused():
    module = Module()
    module.sinks = torch.zeros(3)
    with pytest.raises(ValueError, match="does not compute sinks, which Module needs"):
        call("cdetr_fast", None, module)


def test_keywords_that_change_nothing_reach_the_operator(calls):
    expected, _ = call("sdpa", None)
    neutral = {"sliding_window": 7, "position_ids": torch.arange(5), "use_cache": True}
    torch.testing.assert_close(call("cdetr_fast", None, **neutral)[0], expected)
    assert len(calls) == 1


def test_attention_sinks_are_refused_by_the_name_of_their_module():
    config = transformers.GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssModel._from_config(config, attn_implementation="cdetr_fast")
    with pytest.raises(ValueError, match="does not compute sinks, which GptOssAttention needs"):
        model(torch.arange(5)[None])


def keywords_of_attention():
    """Return what the models of transformers hand to their attention functions."""
    call = re.compile(r"attention_interface\(\n(.*?)\n        \)\n", re.DOTALL)
    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for arguments in call.findall(path.read_text(encoding="utf-8")):
            found |= set(re.findall(r"^            (\w+)=", arguments, re.MULTILINE))
    return sorted(found - {"module", "query", "key", "value", "attention_mask"})


CHANGES = {  # how a keyword of sdpa changes the result
    "dropout": 0.5,
    "scaling": 2.0,
    "is_causal": True,
    "position_bias": torch.arange(30.0, dtype=torch.float64).view(1, 1, 5, 6),
}
NEUTRAL = attention._WITHOUT_EFFECT | {"output_attentions"}


@pytest.mark.parametrize("name", keywords_of_attention())
def test_every_keyword_of_a_model_is_honoured_or_refused(name):
    expected, _ = call("sdpa", None)
    if name in CHANGES:
        given = {name: CHANGES[name]}
        torch.manual_seed(0)
        got, _ = call("cdetr_fast", None, **given)
        assert not torch.allclose(got, expected)
        if name != "dropout":
            torch.testing.assert_close(got, call("sdpa", None, **given)[0])
    elif name in NEUTRAL:
        torch.testing.assert_close(call("cdetr_fast", None, **{name: 3})[0], expected)
    else:
        with pytest.raises(ValueError, match=f"does not compute {name}"):
            call("cdetr_fast", None, **{name: torch.ones(3)})


class ScalarReads(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_padding_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(attention, "is_unpadded", lambda mask: False)  # as on a GPU
    model = make_theirs("detection", "cdetr_fast").eval()
    with torch.no_grad(), ScalarReads() as mode:
        model(*padded_images())
    assert mode.count == 0


def test_the_name_is_free_again():
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward
    cdetr_fast.unpatch_transformers()
    assert "cdetr_fast" not in ALL_ATTENTION_FUNCTIONS
    config = transformers.ConditionalDetrConfig(backbone="resnet18")
    config._attn_implementation = "cdetr_fast"
    with pytest.raises(ValueError, match="cdetr_fast"):
        transformers.ConditionalDetrModel(config)
