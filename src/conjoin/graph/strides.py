"""What depends on how values lie in memory, and what becomes of a graph where that changes.

    y = f(x)        becomes        y' = f(x'),  x' of the values of x, but a slice of a wide tensor

Graphs of Dynamo and of programs tell of each value how it lies, so that can be tried out on fake
tensors, which have no memory. Mostly it comes to an end soon: `q.view(...).transpose(1, 2)` of a
slice is a view as well, and attention gives of it what it gives of a tensor of its own. Where
nothing tells how values lie, it is the names of operations that say what reads their strides.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from conjoin.graph import hazards
from conjoin.graph.meta import VALUE, is_wrapped, value_of
from conjoin.layers.kind import hint

RANDOM_FILLS = frozenset(
    "normal_ uniform_ random_ bernoulli_ exponential_ cauchy_ geometric_ log_normal_".split()
)
"""Methods that draw a number for each element, in an order that depends on the strides."""

CONTIGUOUS = frozenset("native_group_norm _pdist_forward".split())
"""Operations that raise where what they read is not contiguous; what they are parts of sees to it.
"""

STRIDE_METHODS = frozenset(
    "view view_as _unsafe_view stride is_contiguous data_ptr storage_offset as_strided "
    "untyped_storage storage numpy __array__ __dlpack__ view_as_complex reshape reshape_as flatten "
    "ravel contiguous as_strided_ resize_ resize_as_ set_".split()
).union(RANDOM_FILLS, CONTIGUOUS)
"""Methods whose result depends on the strides, also in whether it shares memory."""

ABSOLUTE = frozenset("as_strided as_strided_scatter storage_offset".split())
"""Those that count from where the memory begins, or in numbers that are given, so that they give
what is alike and holds something else."""

VIEWS = frozenset("view _unsafe_view reshape flatten".split())
"""Those that share memory wherever the shapes alone let them."""

NEVER_COPYING = frozenset("view view_as _unsafe_view".split())
"""Those that fail where they could not share memory."""


def followed(
    graph: fx.Graph, moved: Mapping[fx.Node, Tensor], modules: Mapping[str, nn.Module]
) -> dict[fx.Node, Any] | None:
    """The values that lie in another way where some nodes' values do.

    Args:
        graph: the graph.
        moved: for some nodes, fake tensors that lie as their values are to lie.
        modules: the modules that the graph calls, by target.

    Returns:
        Their values, as fake tensors; None where somebody could tell: where such a value leaves the
        graph, is changed in place or read by something unknown or by a functorch transform, or
        where that fails or gives a copy in the place of a view.
    """
    found: dict[fx.Node, Any] = dict(moved)
    for node in graph.nodes:
        inputs = [input for input in node.all_input_nodes if input in found]
        if not inputs or node in moved:
            continue
        if hazards.passes_on(node):
            found[node] = found[inputs[0]]
            continue
        if node.op not in ("call_function", "call_method") or not hazards.is_pure(node, modules):
            return None
        if node.op == "call_function" and not hazards.of_torch(node.target):
            return None
        if hazards.called(node) in ABSOLUTE | CONTIGUOUS:  # Fake tensors do not tell.
            return None
        value = _computed(node, found)
        if value is None or not _is_alike(value, value_of(node)):
            return None
        if any(map(is_wrapped, _tensors(value))):
            return None
        shared = _aliases(value, found, inputs)
        if shared != _aliases(value_of(node), {}, inputs):
            return None
        if any(shared) or _layout(value) != _layout(value_of(node)):
            found[node] = value
    return found


def reads_memory(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether something counts in the memory in which a node's value lies."""
    return any(
        hazards.called(user) in ABSOLUTE
        or (hazards.shares_memory(user, modules) and reads_memory(user, modules))
        for user in node.users
    )


def unnoticed(
    graph: fx.Graph, dims: Mapping[fx.Node, int], modules: Mapping[str, nn.Module]
) -> bool:
    """Whether nobody could tell values from slices of larger ones, as far as is known.

    Args:
        graph: the graph.
        dims: for some nodes the dimension along which the values are to be slices.
        modules: the modules that the graph calls, by target.
    """
    moved: dict[fx.Node, Tensor] = {}
    for node, dim in dims.items():
        value = value_of(node)
        if not isinstance(value, FakeTensor) or value.dim() + dim < 0:
            return False
        with quietly(value), torch.no_grad():
            if not value.is_contiguous():
                return False
            shape, width = [*value.shape], value.shape[dim]
            shape[dim] = 3 * width
            moved[node] = value.new_empty(shape).narrow(dim, width, width)
    with quietly(next(iter(moved.values()))), torch.no_grad():
        return followed(graph, moved, modules) is not None


def quietly(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What is computed with a fake tensor's like in here adds no conditions on sizes."""
    environment = value.fake_mode.shape_env if isinstance(value, FakeTensor) else None
    held = contextlib.ExitStack()
    if environment is not None:
        held.enter_context(environment.suppress_guards())
    if isinstance(value, FakeTensor):
        held.enter_context(value.fake_mode)
        held.enter_context(enable_python_dispatcher())  # As Dynamo computes.
    return held


def _computed(node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
    """What a node gives for the values as they lie now; None where that is not known."""
    if any(value_of(each) is None for each in (node, *node.all_input_nodes)):
        return None
    args, kwargs = map_arg(
        (node.args, node.kwargs), lambda input: found.get(input, value_of(input))
    )
    try:
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            function: Any = node.target
            value = function(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):  # Such as `view` of what has to be copied.
        return None
    return value if _may_be_viewed(node, args, value) else None


def _may_be_viewed(node: fx.Node, args: tuple[Any, ...], value: Any) -> bool:
    """Whether a node that must give a view can; of fake tensors with a size of 1 some give any.

    Those of PyTorch 2.13 do; tensors on the meta device do not.
    """
    read = args[0] if args else None
    if hazards.called(node) not in NEVER_COPYING or not isinstance(read, Tensor):
        return True
    if read.dtype != value.dtype:
        return True  # It is viewed as another type.
    facts = [*map(hint, read.shape)], [*map(hint, read.stride())], [*map(hint, value.shape)]
    with torch._C._DisablePythonDispatcher(), torch._C._DisableTorchDispatch():
        try:
            torch.empty_strided(*facts[:2], device="meta").view(facts[2])
        except RuntimeError:
            return False
    return True


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in pytree.tree_leaves(value) if isinstance(each, Tensor)]


def _is_alike(value: Any, before: Any) -> bool:
    """Whether these are tensors of the same sizes and types; not under autocast, which is off."""
    facts = [[(str(tuple(t.shape)), t.dtype) for t in _tensors(each)] for each in (value, before)]
    return facts[0] == facts[1]


def _layout(value: Any) -> list[str]:
    """How tensors lie; sizes that are symbols are compared as they are written."""
    return [str(tensor.stride()) for tensor in _tensors(value)]


def _aliases(value: Any, found: Mapping[fx.Node, Any], inputs: list[fx.Node]) -> list[bool]:
    """Which tensors of a value lie in the memory of an input."""
    memory = {
        tensor.untyped_storage()._cdata
        for input in inputs
        for tensor in _tensors(found.get(input, value_of(input)))
    }
    return [tensor.untyped_storage()._cdata in memory for tensor in _tensors(value)]


def reads_strides(
    node: fx.Node, modules: Mapping[str, nn.Module], *, escapes: bool, dim: int | None = None
) -> str:
    """What depends on the strides of the node's output; empty where nothing is known to.

    Args:
        node: a call of a layer.
        modules: the modules that the graph calls, by target.
        escapes: whether something beyond the graph reads the graph's outputs.
        dim: the dimension, counted from the end, along which the output is to be a slice; where
            that is known, so is which views it has like any other tensor.
    """
    for user in node.users:
        if user.op == "output" and escapes:
            return "what reads the output is not known"
        if user.op == "call_module":
            module = modules[str(user.target)]
            if hazards.is_opaque(module) or isinstance(module, (nn.Flatten, nn.Unflatten)):
                return type(module).__name__
        reads = (
            user.op in ("call_method", "call_function") and hazards.called(user) in STRIDE_METHODS
        )
        moved = dim == -1 and _moves_front(node, user)
        if reads and not moved and (dim is None or not _cuts_behind(node, user, dim)):
            return hazards.called(user)
        if user.op == "call_function" and not hazards.of_torch(user.target):
            return f"{getattr(user.target, '__name__', user.target)} is not PyTorch's"
        if hazards.shares_memory(user, modules):
            along = dim if moved else None
            if why := reads_strides(user, modules, escapes=escapes, dim=along):
                return why
    return ""


def _cuts_behind(node: fx.Node, view: fx.Node, dim: int) -> bool:
    """Whether a view leaves the dimensions in front of one as they are, as far as is known.

    What lies along that one and behind it lies together, also in a slice.
    """
    before, after = _viewed(node, view)
    front = len(before) + dim
    return len(after) > front >= 0 and before[:front] == after[:front]


def _moves_front(node: fx.Node, view: fx.Node) -> bool:
    """Whether a view leaves the last dimension as it is, as far as is known.

    The rows of a slice along that one are as far apart as those of the whole, all of them, so that
    they can be counted in any way.
    """
    before, after = _viewed(node, view)
    return bool(before and after) and before[-1] == after[-1]


def _viewed(node: fx.Node, view: fx.Node) -> tuple[list[str], list[str]]:
    """The sizes before and after a view, as they are written; none where they are not known."""
    values = node.meta.get(VALUE), view.meta.get(VALUE)
    known = hazards.called(view) in VIEWS and all(isinstance(each, Tensor) for each in values)
    before, after = ([str(n) for n in each.shape] if known else [] for each in values)  # type: ignore[union-attr]
    return before, after


def merges_channels(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node flattens all dimensions but the first.

    It gives the same values from a slice as from a tensor of its own; whether it shares memory
    only a second reader of its input could tell.
    """
    if node.op == "call_module":
        module = modules[str(node.target)]
        return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
    return (
        hazards.called(node) == "flatten" and node.args[1:] in ((1,), (1, -1)) and not node.kwargs
    )
