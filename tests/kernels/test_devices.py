"""Tensors of several devices in one call, on fake devices: no GPU is needed."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cdetr_kernels import detection_topk, normalize_and_pad, registry
from cdetr_kernels.testing.case import registered

CASES = registered()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def make(name):
    case, sizes = CASES[name]
    more = {"mask": "padded"} if "attention" in name else {}
    return case(sizes.dtypes[0], "cpu", **sizes.smallest, **more)


OTHERS = [
    (name, argument)
    for name in CASES
    for argument, x in list(make(name).inputs.items())[1:]
    if isinstance(x, torch.Tensor)
]


@pytest.mark.parametrize(("name", "argument"), OTHERS)
def test_a_tensor_on_another_device_is_refused_by_name(name, argument):
    """A kernel would read an address of one GPU, or of the host, on another."""
    case = make(name)
    case.inputs[argument] = case.inputs[argument].to("meta")
    with pytest.raises(ValueError, match=f"^{argument}: expected cpu.*, got meta"):
        case.public(**case.inputs, **case.options)


class Arguments(TorchDispatchMode):
    """Keeps the tensors that an operator of this package is called with, and all copies."""

    def __init__(self):
        super().__init__()
        self.tensors, self.copies = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "cdetr_fast":
            self.tensors += [x for x in args if isinstance(x, torch.Tensor)]
        if function is torch.ops.aten._to_copy.default:
            self.copies.append(kwargs)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_boxes", [7, torch.tensor(7), torch.tensor(7.0, dtype=torch.float64)])
def test_the_number_of_boxes_may_be_on_the_host(num_boxes):
    pytest.importorskip("triton")
    module = registry.cases("set_loss")
    case = module.make(torch.float16, "cpu", **module.SIZES["set_loss"].smallest)
    options = {name: x for name, x in case.options.items() if name != "num_boxes"}
    with FakeTensorMode() as fake, Arguments() as seen:
        inputs = {
            name: torch.empty(x.shape, dtype=x.dtype, device="cuda:0")
            for name, x in case.inputs.items()
        }
        if isinstance(num_boxes, torch.Tensor):
            num_boxes = fake.from_tensor(num_boxes)
        seen.copies.clear()
        losses = case.public(**inputs, **options, num_boxes=num_boxes, backend="triton")
    assert {str(x.device) for x in seen.tensors} == {"cuda:0"}
    assert seen.tensors[-1].dtype == torch.float32
    assert losses["loss_ce"].device.type == "cuda"
    assert all(copy.get("non_blocking") for copy in seen.copies)


def fake(shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda:0")


FROM_THE_HOST = {
    "sizes of images": lambda: detection_topk(
        fake((2, 5, 3)), fake((2, 5, 4)), [[480, 640], [600, 800]], 4, backend="torch"
    ),
    "numbers of channels": lambda: normalize_and_pad(
        [fake((3, 4, 5), torch.uint8)] * 2, [0.5] * 3, [0.2] * 3, 1 / 255, backend="torch"
    ),
}


@pytest.mark.parametrize("call", FROM_THE_HOST)
def test_the_host_does_not_wait_for_what_it_hands_over(call):
    with FakeTensorMode(), Arguments() as seen:
        results = FROM_THE_HOST[call]()
    assert {x.device.type for x in results} == {"cuda"}
    to_gpu = [copy for copy in seen.copies if str(copy.get("device", "")).startswith("cuda")]
    assert to_gpu
    assert all(copy.get("non_blocking") for copy in to_gpu)
