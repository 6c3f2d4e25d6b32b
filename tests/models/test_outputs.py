"""Outputs are read as transformers' `ModelOutput` is, by its clients."""

import copy
import pickle

import pytest
import torch
import transformers
from support.oracle import make_ours, make_pair, random_labels
from torch.utils import _pytree as pytree
from transformers.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDetrObjectDetectionOutput as TheirOutput,
)

from cdetr_fast.models.outputs import ConditionalDetrObjectDetectionOutput as OurOutput

SMALL = {"backbone": "test_resnet", "encoder_layers": 1, "decoder_layers": 2, "num_queries": 5}
BOTH = pytest.mark.parametrize("cls", [TheirOutput, OurOutput], ids=["theirs", "ours"])


def fields():
    return {
        "loss": torch.tensor(1.5),
        "logits": torch.ones(1, 2, 3),
        "pred_boxes": torch.zeros(1, 2, 4),
        "decoder_hidden_states": (torch.ones(1), torch.zeros(1)),
    }


def same(a, b):
    """Whether two outputs have the same keys in the same order, and equal tensors."""
    return list(a) == list(b) and all(
        torch.equal(x, y) for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    )


# One test for both classes: what transformers' class does is the specification.


@BOTH
def test_access_by_attribute_key_and_position(cls):
    values = fields()
    output = cls(**values)
    assert output.logits is values["logits"]
    assert output["logits"] is values["logits"]
    assert output[1] is values["logits"]
    assert output[-1] is values["decoder_hidden_states"]
    assert output[1:3] == (values["logits"], values["pred_boxes"])
    assert output.get("logits") is values["logits"]
    assert output.get("loss_dict", 7) == 7
    assert list(output) == list(output.keys()) == list(values)
    assert len(output) == len(output.to_tuple()) == 4
    assert all(a is b for a, b in zip(output.to_tuple(), values.values(), strict=True))
    assert all(a is b for a, b in zip(output.values(), values.values(), strict=True))


@BOTH
def test_fields_without_value_are_attributes_only(cls):
    output = cls(**fields())
    assert output.loss_dict is None
    assert "loss_dict" not in output
    with pytest.raises(KeyError, match="loss_dict"):
        output["loss_dict"]
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = output.no_such_field
    with pytest.raises(TypeError, match="no_such_field"):
        cls(no_such_field=torch.ones(1))
    with pytest.raises(IndexError):
        output[4]


@BOTH
def test_the_order_is_that_of_the_fields_not_of_the_arguments(cls):
    output = cls(**dict(reversed(fields().items())))
    assert list(output) == list(fields())


@BOTH
def test_assigning(cls):
    output = cls(**fields())
    output.logits = torch.zeros(2)
    assert output["logits"].shape == (2,)
    output["pred_boxes"] = torch.zeros(3)
    assert output.pred_boxes.shape == (3,)
    output.last_hidden_state = torch.zeros(4)
    assert output["last_hidden_state"].shape == (4,)
    assert list(output)[-1] == "last_hidden_state"


@BOTH
def test_removing_is_refused(cls):
    output = cls(**fields())
    with pytest.raises(Exception, match=f"__delitem__.*{cls.__name__}|{cls.__name__} keeps"):
        del output["logits"]
    for method, arguments in {
        "pop": ["logits"],
        "setdefault": ["x", 1],
        "update": [{"x": 1}],
    }.items():
        with pytest.raises(Exception, match=cls.__name__):
            getattr(output, method)(*arguments)
    assert same(output, cls(**fields()))


@BOTH
def test_copies(cls):
    output = cls(**fields())
    for copied in (
        copy.copy(output),
        copy.deepcopy(output),
        pickle.loads(pickle.dumps(output)),
        cls(**output),
        cls(dict(output)),
    ):
        assert type(copied) is cls
        assert same(copied, output)
        assert copied.logits.equal(output.logits)
        assert copied.loss_dict is None
    assert copy.copy(output).logits is output.logits
    assert copy.deepcopy(output).logits is not output.logits
    assert type(dict(**output)) is dict
    assert list(dict(**output)) == list(output)


@BOTH
def test_keys_beside_the_fields(cls):
    """transformers' detection pipeline hands the image size on inside the output."""
    output = cls({"target_size": torch.ones(1), **cls(**fields())})
    assert list(output) == ["target_size", *fields()]
    assert output["target_size"] is output.target_size is output[0]
    for copied in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        assert set(copied) == set(output)
        assert copied.target_size == 1


@BOTH
def test_tree_functions_see_the_tensors(cls):
    output = cls(**fields())
    doubled = pytree.tree_map(lambda x: 2 * x, output)
    assert type(doubled) is cls
    assert list(doubled) == list(output)
    assert doubled.loss == 3
    assert doubled.decoder_hidden_states[0] == 2
    nothing = pytree.tree_map(lambda x: None, cls(loss=torch.ones(1)))
    assert nothing.loss is None
    assert list(nothing) == []
    paths, spec = pytree.tree_flatten_with_path(output)
    assert len(paths) == 5
    assert same(pytree.tree_unflatten([leaf for _, leaf in paths], spec), output)


def test_accelerate_rebuilds_outputs():
    from accelerate.utils.operations import convert_to_fp32, recursively_apply

    half = OurOutput(**{k: v for k, v in fields().items() if k != "decoder_hidden_states"})
    half.logits = half.logits.bfloat16()
    upcast = convert_to_fp32(half)
    assert type(upcast) is OurOutput
    assert upcast.logits.dtype == torch.float32
    moved = recursively_apply(lambda x: x + 1, OurOutput(**fields()))
    assert type(moved) is OurOutput
    assert moved.loss == 2.5
    assert moved.decoder_hidden_states[1] == 1


@pytest.mark.parametrize("task", ["base", "detection", "segmentation"])
@pytest.mark.parametrize("auxiliary_loss", [False, True], ids=["plain", "auxiliary"])
@pytest.mark.parametrize("everything", [False, True], ids=["few", "all"])
def test_tuples_have_the_positions_of_transformers(task, auxiliary_loss, everything):
    theirs, ours = make_pair(task, **SMALL, auxiliary_loss=auxiliary_loss)
    arguments = {"output_attentions": everything, "output_hidden_states": everything}
    if everything and task != "base":
        arguments["labels"] = random_labels((2, 1), masks=task == "segmentation")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(images, return_dict=False, **arguments)
        got = ours(images, return_dict=False, **arguments)
        named = ours(images, return_dict=True, **arguments)
    assert type(got) is tuple
    assert list(named) == list(theirs(images, return_dict=True, **arguments))
    assert all(a is not None for a in got)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, named.to_tuple())


def test_positions_that_the_training_example_reads():
    model = make_ours(**SMALL).eval()
    images, labels = torch.zeros(2, 3, 64, 64), random_labels((1, 2))
    output = model(images, labels=labels)
    batch = output[1:]  # Trainer takes the loss off the front
    assert batch[1] is output.logits
    assert batch[2] is output.pred_boxes


def test_return_dict_of_the_configuration():
    model = make_ours(**SMALL, return_dict=False).eval()
    assert type(model(torch.zeros(1, 3, 64, 64))) is tuple
    assert type(model(torch.zeros(1, 3, 64, 64), return_dict=True)) is OurOutput


def test_names_of_the_output_classes():
    """Their fields in their order, for those that build outputs by position."""
    from transformers.models.conditional_detr import modeling_conditional_detr as theirs

    from cdetr_fast.models import outputs as ours

    for name in ("ConditionalDetrObjectDetectionOutput", "ConditionalDetrSegmentationOutput"):
        expected = list(getattr(theirs, name).__dataclass_fields__)
        assert list(getattr(ours, name).__dataclass_fields__) == expected
    assert issubclass(theirs.ConditionalDetrModelOutput, transformers.utils.ModelOutput)


def test_rebuilt_from_pairs():
    """As `nn.DataParallel` gathers the outputs of its replicas."""
    output = OurOutput(logits=torch.ones(1), pred_boxes=torch.zeros(1))
    rebuilt = type(output)((key, output[key]) for key in output)
    assert list(rebuilt) == ["logits", "pred_boxes"]
    assert rebuilt.loss is None
    assert rebuilt.logits is output.logits
