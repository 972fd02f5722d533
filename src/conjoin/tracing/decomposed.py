"""Reads the layers in graphs that were decomposed, by `run_decompositions` or `make_fx`.

    linear(x, W, b)         is        addmm(b, x, permute(W)),  mm(x, permute(W))  without a bias
    conv2d(x, W, b, ...)    is        convolution(x, W, b, ..., transposed, output_padding, groups)
    layer_norm(x, ...)      is        getitem(native_layer_norm(x, ...), 0)
    max_pool2d(x, ...)      is        getitem(max_pool2d_with_indices(x, ...), 0)
    silu(x)                 is        x * sigmoid(x)

Each is read as the operation that it was made of, so that nothing else need know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from conjoin.graph import products
from conjoin.graph.meta import VALUE

aten = torch.ops.aten

ATTRIBUTES: Mapping[Any, str] = {aten.numpy_T.default: "T", aten.mT.default: "mT"}
"""Operations that transpose a tensor, by the attributes that Python has for them."""

SOFTMAXES: Mapping[Any, Callable[..., Any]] = {
    aten._softmax.default: torch.softmax,
    aten._log_softmax.default: torch.log_softmax,
}
"""Operations on a tensor and a dimension that may give another type, and the functions."""

POOLS: Mapping[Any, Any] = {
    aten.max_pool2d_with_indices.default: aten.max_pool2d,
    aten.max_pool3d_with_indices.default: aten.max_pool3d,
}
"""Operations that tell where the largest elements are, too."""

CONVOLVED = ("stride", "padding", "dilation", "groups")
"""The settings of a convolution."""

TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
"""Those of a transposed one."""


CONVOLUTIONS: Mapping[str, Callable[..., Any]] = {
    f"conv{way}{dimensions}d": getattr(F, f"conv{way}{dimensions}d")
    for way in ("", "_transpose")
    for dimensions in (1, 2, 3)
}
"""The functions that convolve, by the names of their operations."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """A call of a layer as operations.

    Attributes:
        operation: the operation that it is, or was made of.
        arguments: its arguments by name.
        nodes: the nodes that stand for it, the one that gives its value last.
    """

    operation: Any
    arguments: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]


def read(node: fx.Node, arguments: Callable[[fx.Node], dict[str, Any]]) -> LayerCall | None:
    """What a node stands for in a decomposed graph; None where it is nothing of this.

    Args:
        node: the node that gives the value.
        arguments: gives the arguments of an operation by name, with its defaults.
    """
    if node.target in (aten.addmm.default, aten.mm.default):
        return _linear(node)
    if node.target is aten.convolution.default:
        return _convolution(node, arguments(node))
    if node.target is operator.getitem and node.args[1] == 0:
        return _first(node, arguments)
    if node.target is aten.mul.Tensor:
        return _silu(node)
    return None


def _linear(node: fx.Node) -> LayerCall | None:
    """A product with a weight (out, in) that is transposed for it alone."""
    *bias, input, turned = node.args
    if node.kwargs or not isinstance(turned, fx.Node) or len(turned.users) != 1:
        return None
    if not products.transposes(turned):
        return None
    given = {"input": input, "weight": turned.args[0], "bias": bias[0] if bias else None}
    return LayerCall(aten.linear, given, (turned, node))


def _silu(node: fx.Node) -> LayerCall | None:
    """A product of a tensor with its own sigmoid, which rounds as SiLU does in these types."""
    pairs = (node.args, node.args[::-1]) if len(node.args) == 2 and not node.kwargs else ()
    for input, gate in pairs:
        if isinstance(gate, fx.Node) and gate.target is aten.sigmoid.default:
            known = getattr(gate.meta.get(VALUE), "dtype", None) in (torch.float32, torch.float64)
            if known and gate.args == (input,) and len(gate.users) == 1:
                return LayerCall(aten.silu, {"input": input}, (gate, node))
    return None


def _convolution(node: fx.Node, given: Mapping[str, Any]) -> LayerCall | None:
    way, names = ("_transpose", TRANSPOSED) if given["transposed"] else ("", CONVOLVED)
    name = f"conv{way}{len(given['stride'])}d"
    if name not in CONVOLUTIONS:
        return None
    kept = {name: given[name] for name in ("input", "weight", "bias", *names)}
    return LayerCall(getattr(aten, name), kept, (node,))


def _first(item: fx.Node, arguments: Callable[[fx.Node], dict[str, Any]]) -> LayerCall | None:
    """The first of what a normalization or a pooling gives, where nothing reads the others."""
    node = item.args[0]
    if not isinstance(node, fx.Node) or any(user.users for user in node.users if user is not item):
        return None
    unread = (user for user in node.users if user is not item)
    nodes = (node, *unread, item)
    if node.target is aten.native_layer_norm.default:
        return LayerCall(aten.layer_norm, arguments(node), nodes)
    if node.target is aten.native_group_norm.default:
        given = arguments(node)
        kept = {name: given[name] for name in ("input", "weight", "bias", "eps")}
        return LayerCall(aten.group_norm, {**kept, "num_groups": given["group"]}, nodes)
    if node.target is aten._native_batch_norm_legit_no_training.default:
        return LayerCall(aten.batch_norm, {**arguments(node), "training": False}, nodes)
    if node.target in POOLS:
        return LayerCall(POOLS[node.target], arguments(node), nodes)
    return None


def function(
    node: fx.Node, arguments: Callable[[fx.Node], dict[str, Any]]
) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """The function behind an operation that is no layer, and its arguments.

    Args:
        node: the node.
        arguments: gives the arguments of an operation by name, with its defaults.
    """
    if node.target is aten.convolution.default:
        found = _convolution(node, arguments(node))
        if found is None:
            return None
        return CONVOLUTIONS[found.operation.__name__], (*found.arguments.values(),)
    if node.target in SOFTMAXES and node.args[2:] == (False,):
        return SOFTMAXES[node.target], node.args[:2]
    if node.target in ATTRIBUTES:
        return getattr, (node.args[0], ATTRIBUTES[node.target])
    if node.target is aten.permute.default and [*node.args[1]] == [1, 0]:  # type: ignore[misc]
        return torch.t, node.args[:1]
    return None
