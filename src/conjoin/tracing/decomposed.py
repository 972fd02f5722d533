"""How layers are written in graphs that were decomposed, by `run_decompositions` or `make_fx`.

    linear(x, W, b)         is        addmm(b, x, permute(W)),  mm(x, permute(W))  without a bias
    conv2d(x, W, b, ...)    is        convolution(x, W, b, ..., transposed, output_padding, groups)
    layer_norm(x, ...)      is        getitem(native_layer_norm(x, ...), 0)

Each is read as the operation that it was made of, so that nothing else need know.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

TURNS: Mapping[Any, tuple[tuple[Any, ...], ...]] = {
    aten.t.default: ((),),
    aten.permute.default: (([1, 0],),),
    aten.transpose.int: ((0, 1), (1, 0), (-2, -1), (-1, -2)),
}
"""Operations that transpose a matrix, and with which further arguments."""

CONVOLVED = ("stride", "padding", "dilation", "groups")
"""The settings of a convolution."""

TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
"""Those of a transposed one."""


@dataclass(frozen=True, slots=True)
class Written:
    """A call of a layer as operations.

    Attributes:
        operation: the operation that it is, or was made of.
        arguments: its arguments by name.
        nodes: the nodes that stand for it, the one that gives its value last.
    """

    operation: Any
    arguments: Mapping[str, Any]
    nodes: tuple[fx.Node, ...]


def read(node: fx.Node, arguments: Callable[[fx.Node], dict[str, Any]]) -> Written | None:
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
        return _norm(node, arguments)
    return None


def _linear(node: fx.Node) -> Written | None:
    """A product with a weight (out, in) that is transposed for it alone."""
    *bias, input, turned = node.args
    if node.kwargs or not isinstance(turned, fx.Node) or len(turned.users) != 1:
        return None
    if turned.target not in TURNS or [*turned.args[1:]] not in map(list, TURNS[turned.target]):
        return None
    given = {"input": input, "weight": turned.args[0], "bias": bias[0] if bias else None}
    return Written(aten.linear, given, (turned, node))


def _convolution(node: fx.Node, given: Mapping[str, Any]) -> Written:
    dimensions = len(given["stride"])
    name = f"conv_transpose{dimensions}d" if given["transposed"] else f"conv{dimensions}d"
    names = TRANSPOSED if given["transposed"] else CONVOLVED
    kept = {name: given[name] for name in ("input", "weight", "bias", *names)}
    return Written(getattr(aten, name), kept, (node,))


def _norm(item: fx.Node, arguments: Callable[[fx.Node], dict[str, Any]]) -> Written | None:
    """The first of what a normalization gives, where nothing reads the statistics."""
    node = item.args[0]
    if not isinstance(node, fx.Node) or any(user.users for user in node.users if user is not item):
        return None
    unread = (user for user in node.users if user is not item)
    nodes = (node, *unread, item)
    if node.target is aten.native_layer_norm.default:
        return Written(aten.layer_norm, arguments(node), nodes)
    if node.target is aten.native_group_norm.default:
        given = arguments(node)
        kept = {name: given[name] for name in ("input", "weight", "bias", "eps")}
        return Written(aten.group_norm, {**kept, "num_groups": given["group"]}, nodes)
    if node.target is aten._native_batch_norm_legit_no_training.default:
        return Written(aten.batch_norm, {**arguments(node), "training": False}, nodes)
    return None
