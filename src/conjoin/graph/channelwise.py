"""What acts on each channel of a tensor by itself, or on each part of equal parts.

For parts p_i of a tensor W that lie side by side along the channels, f(p_i) is the i-th part of
f(W) where f leaves the channels alone: pooling, padding and resizing of what lies behind them. A
softmax along the channels is one along those of each part, of W (..., n, c, ...).
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from conjoin.graph import elementwise, hazards

SPATIAL_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        getattr(nn, f"{name}{dimensions}d")
        for name in (
            "MaxPool AvgPool AdaptiveAvgPool AdaptiveMaxPool LPPool ZeroPad ConstantPad "
            "ReflectionPad ReplicationPad CircularPad".split()
        )
        for dimensions in (1, 2, 3)
    }
)
"""Modules that act on the last dimensions only; their name tells how many these are."""

SPATIAL_FUNCTIONS: frozenset[Any] = frozenset(
    {
        getattr(F, f"{name}_pool{dimensions}d")
        for name in ("max", "avg", "adaptive_avg", "adaptive_max")
        for dimensions in (1, 2, 3)
    }
)
"""Functions that do so too."""

SOFTMAX: dict[Any, bool] = {
    nn.Softmax: False,
    nn.LogSoftmax: True,
    F.softmax: False,
    F.log_softmax: True,
    torch.softmax: False,
    torch.log_softmax: True,
    "softmax": False,
    "log_softmax": True,
}
"""Softmax in all its spellings, and whether its logarithm is taken."""

MODULES: frozenset[type[nn.Module]] = SPATIAL_MODULES | {nn.Softmax, nn.LogSoftmax}
"""All modules that are known here."""


def key(
    node: fx.Node, part: fx.Node, dim: int | None, modules: Mapping[str, nn.Module]
) -> Hashable | None:
    """What a node does to the space of each channel; equal for nodes that do the same.

    Args:
        node: a node that reads `part`.
        part: a part of a wide tensor.
        dim: the dimension that the parts lie along, counted from the end; None where stacked.
        modules: the modules that the graph calls, by target.

    Returns:
        The operation and its settings; None where it is not known to leave the channels alone.
    """
    if dim is None:
        return None
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = elementwise.is_plain(module) and (*node.args, *node.kwargs.values()) == (part,)
        known = type(module) in SPATIAL_MODULES and _dimensions(type(module).__name__) == -1 - dim
        if not plain or not known or getattr(module, "return_indices", False):
            return None
        return type(module), elementwise.settings(module)
    if node.op != "call_function" or node.kwargs.get("return_indices", False) is not False:
        return None
    if node.target in SPATIAL_FUNCTIONS:
        name = hazards.called(node)
        # The seventh argument of pooling, if it is given, tells whether indices are wanted.
        known = _dimensions(name) == -1 - dim and len(node.args) < 7
        known &= not (name.startswith("adaptive_max") and len(node.args) > 2)
    elif node.target is F.pad:
        pad = _given(node, 1, "pad", None)
        known = isinstance(pad, (tuple, list)) and len(pad) // 2 <= -1 - dim
    else:
        known = node.target is F.interpolate and dim < -1
    frozen = elementwise.frozen
    return (node.target, frozen(node.args, part), frozen(node.kwargs, part)) if known else None


def softmax_key(
    node: fx.Node, part: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[int, bool] | None:
    """The dimension of a softmax and whether it is logarithmic; None for any other node."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        plain = elementwise.is_plain(module) and (*node.args, *node.kwargs.values()) == (part,)
        dim = getattr(module, "dim", None)
        if plain and type(module) in SOFTMAX and isinstance(dim, int):
            return dim, SOFTMAX[type(module)]
        return None
    if node.op not in ("call_function", "call_method") or node.target not in SOFTMAX:
        return None
    # A trace of `F.softmax` spells out what was not given.
    given = {
        k: v for k, v in node.kwargs.items() if k != "_stacklevel" and (k, v) != ("dtype", None)
    }
    known = {*given} <= {"dim"} and len(node.args) + len(given) == 2
    dim = _given(node, 1, "dim", None)
    if known and node.args[:1] == (part,) and isinstance(dim, int):
        return dim, SOFTMAX[node.target]
    return None


def softmax_of_parts(
    whole: Tensor, dim: int, logarithmic: bool, count: int, along: int | None
) -> Tensor:
    """The softmax of each of `count` equal parts, put together as they were.

    Args:
        whole: the parts, side by side along `along` or stacked.
        dim: the dimension of the softmax of a part.
        logarithmic: whether the logarithm is wanted.
        count: the number of parts.
        along: the dimension that they lie along, counted from the end; None where stacked.
    """
    if has_torch_function_unary(whole):  # A graph that is traced again keeps the call.
        return handle_torch_function(
            softmax_of_parts, (whole,), whole, dim, logarithmic, count, along
        )
    function = torch.log_softmax if logarithmic else torch.softmax
    rank = whole.dim() - (along is None)
    if not -rank <= dim < rank:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-rank}, {rank - 1}], "
            f"but got {dim})"
        )
    from_end = dim % rank - rank
    if along is None or from_end != along:
        return function(whole, from_end)
    shape = count, whole.shape[along] // count
    parts: Tensor = torch.unflatten(whole, along, shape)
    return function(parts, along).flatten(along - 1, along)


def _dimensions(name: str) -> int:
    found = re.search(r"([123])d$", name)
    return int(found[1]) if found else 0


def _given(node: fx.Node, position: int, name: str, default: Any) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
