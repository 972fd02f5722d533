"""What becomes of a graph's values where some of them lie in memory in another way.

    y = f(x)        becomes        y' = f(x'),  x' of the values of x, but a slice of a wide tensor

Dynamo's graphs tell of each value how it lies, so that can be tried out on fake tensors, which have
no memory. Mostly it comes to an end soon: `q.view(...).transpose(1, 2)` of a slice is a view as
well, and attention gives of it what it gives of a tensor of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from conjoin.graph import hazards
from conjoin.graph.meta import EXAMPLE


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
        graph, is changed in place or read by something unknown, or where that fails or gives a
        copy in the place of a view.
    """
    found: dict[fx.Node, Any] = dict(moved)
    for node in graph.nodes:
        inputs = [input for input in node.all_input_nodes if input in found]
        if not inputs or node in moved:
            continue
        if node.op not in ("call_function", "call_method") or not hazards.is_pure(node, modules):
            return None
        if node.op == "call_function" and not hazards.of_torch(node.target):
            return None
        value = _computed(node, found)
        if value is None or not _is_alike(value, node.meta[EXAMPLE]):
            return None
        shared = _aliases(value, found, inputs)
        if shared != _aliases(node.meta[EXAMPLE], {}, inputs):
            return None
        if any(shared) or _layout(value) != _layout(node.meta[EXAMPLE]):
            found[node] = value
    return found


def quietly(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    """What is computed with a fake tensor's like in here adds no conditions on sizes."""
    environment = value.fake_mode.shape_env if isinstance(value, FakeTensor) else None
    held = contextlib.ExitStack()
    if environment is not None:
        held.enter_context(environment.suppress_guards())
    if isinstance(value, FakeTensor):
        held.enter_context(value.fake_mode)
    return held


def _computed(node: fx.Node, found: Mapping[fx.Node, Any]) -> Any:
    """What a node gives for the values as they lie now; None where that is not known."""
    if EXAMPLE not in node.meta or any(EXAMPLE not in n.meta for n in node.all_input_nodes):
        return None
    args, kwargs = map_arg(
        (node.args, node.kwargs), lambda input: found.get(input, input.meta[EXAMPLE])
    )
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        function: Any = node.target
        return function(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):  # Such as `view` of what has to be copied.
        return None


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
    held = {
        tensor.untyped_storage()._cdata
        for input in inputs
        for tensor in _tensors(found.get(input, input.meta[EXAMPLE]))
    }
    return [tensor.untyped_storage()._cdata in held for tensor in _tensors(value)]
