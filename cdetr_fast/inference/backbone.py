"""The backbone with norms folded, and convolutions fused with what follows them.

Replaces: the module that returns feature maps. Its forward is traced, and convolutions take
what follows them along (`FusedConv2d`). Everything that is not a plain layer stays in the traced
graph and runs its own forward; a backbone that cannot be traced runs as it is.

Gains: ResNet-50 at 800x1066 on two cores 0.44 of the time of contiguous memory with frozen norms.
"""

import operator
import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features_fx import get_notrace_modules
from torch import Tensor, fx, nn

from cdetr_fast.common.errors import first_line
from cdetr_fast.inference.convolution import (
    RELU,
    Activation,
    FusedConv2d,
    activation_of,
    can_fold,
)
from cdetr_fast.inference.padding import SamePool2d
from cdetr_fast.inference.pooling import KeptMaxPool2d, can_keep
from cdetr_fast.inference.workspace import Workspace
from cdetr_fast.models.backbone import FrozenBatchNorm2d, FrozenBatchNormAct2d
from cdetr_fast.models.feature_maps import maps_of

_ADDITIONS = {operator.add, operator.iadd, torch.add}

_PROBES = (64, 96), (96, 128)
"""Height and width of the images that a rewritten backbone is compared on."""

ModuleOf = Callable[[fx.Node], nn.Module | None]
"""Returns the module that a node of a graph calls; None if it calls none."""


class _Tracer(fx.Tracer):
    """Traces into everything but convolutions, frozen norms and what timm marks as opaque.

    While fx traces, it has patched `nn.Module` for the whole process: modules that other threads
    call meanwhile are let through, and only one thread traces at a time.
    """

    _one_at_a_time = threading.Lock()

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def trace(self, *args: Any, **kwargs: Any) -> fx.Graph:
        with self._one_at_a_time:
            return super().trace(*args, **kwargs)

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        leaves = (nn.Conv2d, FrozenBatchNorm2d, *get_notrace_modules())
        return isinstance(module, leaves) or super().is_leaf_module(module, name)


class FusedBackbone(nn.Module):
    """A backbone that computes the same maps in fewer passes over them.

    Args:
        backbone: Module that returns feature maps, its batch norms frozen; it is left as it is,
            and weights that are not folded are shared with it.
        all_maps: Return all maps; otherwise only the coarsest one, and the memory of the others is
            free as soon as the backbone itself has read them.

    Attributes:
        notes: What could not be fused, and why.
        fused: Number of convolutions with something folded or fused in.
        dtype: What images come in and maps are returned in, if that is not what it computes in.
    """

    def __init__(self, backbone: nn.Module, all_maps: bool = True) -> None:
        super().__init__()
        self.notes: list[str] = []
        self.output_fmt = getattr(backbone, "output_fmt", "NCHW")
        self.all_maps = all_maps
        self.dtype: torch.dtype | None = None
        self.body: nn.Module = backbone
        try:
            traced = fx.GraphModule(backbone, _Tracer().trace(backbone))
            if not all_maps:
                _return_last(traced.graph)
            _fuse(traced, _probe(backbone, _PROBES[0]))
            self.body = traced
            self._compare(backbone)
        except Exception as error:  # tracing runs the backbone's own code, which may do anything
            self.notes.append(
                f"backbone runs as it is: {type(error).__name__}: {first_line(error)}"
            )
            self.body = backbone
        self.fused = sum(isinstance(module, FusedConv2d) for module in self.body.modules())

    def forward(self, pixel_values: Tensor) -> list[Tensor]:
        """Return feature maps of images `[B, C, H, W]`, fine to coarse, in `output_fmt`."""
        if self.dtype is not None:
            pixel_values = pixel_values.float()
        maps = maps_of(self.body(pixel_values.contiguous(memory_format=torch.channels_last)))
        if not self.all_maps:
            maps = maps[-1:]
        return maps if self.dtype is None else [x.to(self.dtype) for x in maps]

    def _compare(self, backbone: nn.Module) -> None:
        """Check the rewritten backbone, then its fused operators, against the original.

        The last check is at another size: tracing may have made a number of a size.
        """
        image, other = (_probe(backbone, size) for size in _PROBES)
        expected = backbone(image)
        convolutions = [m for m in self.body.modules() if isinstance(m, FusedConv2d)]
        _check_maps(self.body(image), expected)
        reasons = {reason for conv in convolutions if (reason := conv.choose_implementation())}
        self.notes += sorted(f"backbone: {reason}" for reason in reasons)
        _check_maps(self.body(image), expected)
        _check_maps(self.body(other), backbone(other))


def _probe(module: nn.Module, size_hw: tuple[int, int]) -> Tensor:
    """Return a small image for a backbone."""
    weight = next(m for m in module.modules() if isinstance(m, nn.Conv2d)).weight
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, weight.shape[1], *size_hw, generator=generator, device="cpu")
    return image.to(weight.device, weight.dtype, memory_format=torch.channels_last)


def _return_last(graph: fx.Graph) -> None:
    output = next(node for node in graph.nodes if node.op == "output")
    (maps,) = output.args
    output.args = ([maps[-1]],)
    graph.eliminate_dead_code()


def _check_maps(got: list[Tensor], expected: list[Tensor]) -> None:
    """Compare maps, or the coarsest one alone."""
    for a, b in zip(reversed(got), reversed(expected), strict=False):
        a, b = a.double(), b.double()
        # rounding grows with the depth; a wrong graph is off by as much as the values themselves
        limit = max(1e-3, 30 * torch.finfo(expected[0].dtype).eps) * b.abs().max()
        if not (a - b).abs().max() <= limit and b.isfinite().all():
            raise RuntimeError(f"the rewritten backbone is off by {(a - b).abs().max().item():.1e}")


def _fuse(traced: fx.GraphModule, image: Tensor) -> None:
    """Rewrite a traced backbone in place; modules of the original are not changed.

    Args:
        traced: The backbone.
        image: A small one.
    """
    graph, modules = traced.graph, dict(traced.named_modules())

    def module_of(node: fx.Node) -> nn.Module | None:
        return modules[node.target] if node.op == "call_module" else None

    def put(node: fx.Node, module: nn.Module) -> None:
        name = f"fused_{node.name}"
        traced.add_submodule(name, module)
        modules[name] = module
        node.target = name

    for node in list(graph.nodes):
        if isinstance(module_of(node), (nn.Identity, nn.Dropout)):
            _replace(node, node.args[0])
    for node in list(graph.nodes):
        layer = module_of(node)
        if layer is not None and can_keep(layer):
            assert isinstance(layer, nn.MaxPool2d)
            put(node, KeptMaxPool2d(layer))
        if layer is not None and SamePool2d.replaces(layer):
            put(node, SamePool2d(layer))
        if not isinstance(layer, nn.Conv2d) or not can_fold(layer):
            continue
        follower = _only_user(node)
        norm = None if follower is None else module_of(follower)
        conv = FusedConv2d(layer, norm if isinstance(norm, FrozenBatchNorm2d) else None)
        put(node, conv)
        if follower is None or not isinstance(norm, FrozenBatchNorm2d):
            continue
        activation = None
        if isinstance(norm, FrozenBatchNormAct2d) and not isinstance(norm.act, nn.Identity):
            activation = activation_of(norm.act)
            if activation is None:
                with graph.inserting_after(node):
                    name = f"activation_{node.name}"
                    traced.add_submodule(name, norm.act)
                    modules[name] = norm.act
                    after = graph.call_module(name, ())
                follower.replace_all_uses_with(after)
                after.args = (node,)
                graph.erase_node(follower)
                continue
        conv.activation = activation
        _replace(follower, node)
    shapes = _shapes(traced, image)
    for node in list(graph.nodes):
        _fuse_addition(node, module_of, shapes)
        _fuse_activation(node, module_of)
    for node in graph.nodes:
        if isinstance(sum_ := module_of(node), FusedConv2d) and len(node.args) > 1:
            sum_.in_place = _may_overwrite(node, module_of)
    _assign_slots(graph, module_of)
    graph.lint()
    traced.delete_all_unused_submodules()
    traced.recompile()


def _fuse_addition(
    node: fx.Node, module_of: ModuleOf, shapes: dict[str, tuple[int, ...] | None]
) -> None:
    """Make `conv(x) + residual` one call, if nothing else reads the convolution."""
    is_addition = node.op == "call_function" and node.target in _ADDITIONS and not node.kwargs
    operands = [argument for argument in node.args if isinstance(argument, fx.Node)]
    if not is_addition or not len(operands) == len(node.args) == 2:
        return
    if shapes[operands[0].name] != shapes[operands[1].name]:
        return
    order = list(node.graph.nodes)
    # the operand that is computed last, so that the other one is there when it runs
    residual, last = sorted(operands, key=order.index)
    conv = module_of(last)
    if (
        isinstance(conv, FusedConv2d)
        and conv.activation is None
        and len(last.args) == 1
        and _only_user(last) is node
        and residual is not last
    ):
        last.args = (last.args[0], residual)
        _replace(node, last)


def _fuse_activation(node: fx.Node, module_of: ModuleOf) -> None:
    """Make `act(conv(x))` one call, if nothing else reads the convolution."""
    activation = _activation(node, module_of)
    if activation is None or not isinstance(source := node.args[0], fx.Node):
        return
    conv = module_of(source)
    if (
        isinstance(conv, FusedConv2d)
        and conv.activation is None
        and _only_user(source) is node
        and conv.can_fuse(activation, residual=len(source.args) > 1)
    ):
        conv.activation = activation
        _replace(node, source)


def _may_overwrite(node: fx.Node, module_of: ModuleOf) -> bool:
    """Return whether a convolution may write its result over its residual.

    That saves a pass over memory, and fresh pages for the largest maps. The residual has to be a
    tensor of its own, which only convolutions read, all of them before.
    """
    source, residual = node.args
    order = list(node.graph.nodes)
    return (
        isinstance(residual, fx.Node)
        and isinstance(module_of(residual), (FusedConv2d, nn.MaxPool2d))
        and source is not residual
        and all(
            user is node
            or (
                isinstance(module_of(user), FusedConv2d)
                and residual not in user.args[1:]
                and order.index(user) < order.index(node)
            )
            for user in residual.users
        )
    )


def _assign_slots(graph: fx.Graph, module_of: ModuleOf) -> None:
    """Assign slots of one workspace to convolutions and pooling whose maps die within the graph.

    Two maps share a slot if the first one is no longer read when the second one is written. A map
    has none if anything but convolutions and pooling reads it, as that may be a view.
    """
    workspace, slots = Workspace(), 0
    free: list[int] = []
    ends: dict[int, list[int]] = {}  # place in the order -> slots that are free after it
    order = {node: place for place, node in enumerate(graph.nodes)}

    def take(until: int) -> int:
        nonlocal slots
        slot = free.pop() if free else slots
        slots = max(slots, slot + 1)
        ends.setdefault(until, []).append(slot)
        return slot

    for node, place in order.items():
        module = module_of(node)
        is_writable = isinstance(module, KeptMaxPool2d) or (
            isinstance(module, FusedConv2d)
            and len(node.args) == 1
            and module.activation in (None, RELU)  # as a sum with zeros
        )
        if is_writable and (end := _last_read(node, order, module_of)) is not None:
            assert isinstance(module, KeptMaxPool2d | FusedConv2d)
            module.slot, module.workspace = take(end), workspace
            if isinstance(module, KeptMaxPool2d):
                module.index_slot = take(place)
        free += ends.pop(place, [])


def _last_read(node: fx.Node, order: dict[fx.Node, int], module_of: ModuleOf) -> int | None:
    """Return where a map, and what is written over it, is read last; None if that is unknown."""
    last = order[node]
    for user in node.users:
        if not isinstance(module := module_of(user), (FusedConv2d, nn.MaxPool2d)):
            return None
        last = max(last, order[user])
        overwrites = isinstance(module, FusedConv2d) and module.in_place and user.args[1] is node
        if overwrites:
            end = _last_read(user, order, module_of)
            if end is None:
                return None
            last = max(last, end)
    return last


def _activation(node: fx.Node, module_of: ModuleOf) -> Activation | None:
    if (module := module_of(node)) is not None:
        return activation_of(module)
    functions: dict[Any, Activation] = {F.relu: RELU, torch.relu: RELU}
    return functions.get(node.target) if node.op == "call_function" else None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _replace(node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _shapes(traced: fx.GraphModule, image: Tensor) -> dict[str, tuple[int, ...] | None]:
    """Return the shape of every intermediate tensor for an image."""
    shapes: dict[str, tuple[int, ...] | None] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            shapes[node.name] = tuple(result.shape) if isinstance(result, Tensor) else None
            return result

    traced.graph.lint()
    traced.recompile()
    Recorder(traced).run(image)
    return shapes
