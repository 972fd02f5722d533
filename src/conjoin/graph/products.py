"""Products with Parameters in a graph: `F.linear(x, self.w, self.b)`, `x @ self.w` and the like."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph import edit, hazards
from conjoin.layers.product import LinearProduct, Matmul, Product

OFFSETS = frozenset({"storage_offset", "as_strided", "as_strided_"})
"""Methods whose result differs for a part of a stack, which is contiguous."""

MATMULS: dict[Any, str] = {
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    "matmul": "matmul",
    torch.mm: "mm",
    "mm": "mm",
}
"""Functions of a tensor and a weight (in, out), and names of methods."""

LINEAR = ("input", "weight", "bias")
"""The arguments of `F.linear`."""


@dataclass(frozen=True, slots=True)
class Call:
    """A product in a graph.

    Attributes:
        node: the node.
        input: what is multiplied.
        weight: the node of the weight.
        bias: the node of the bias, where there is one.
        function: the name of the function.
        equation: for `einsum`, its equation; for `tensordot`, a number of dimensions, if given.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    function: str
    equation: str = ""

    @property
    def reads(self) -> tuple[object, ...]:
        """What is read, and how; equal for all calls of one product."""
        bias = None if self.bias is None else self.bias.target
        return self.weight.target, bias, self.function, self.equation

    def layer(self, weight: nn.Parameter, bias: nn.Parameter | None, *, stacked: bool) -> Product:
        """The product as a layer."""
        if self.function == "linear":
            return LinearProduct(self.function, weight, bias, stacked=stacked)
        return Matmul(self.function, weight, None, self.equation)


def calls(graph: fx.Graph) -> list[Call]:
    """The products of a graph."""
    return [call for node in graph.nodes if (call := _read(node)) is not None]


def call(
    graph: fx.Graph, lent: Mapping[str, tuple[str, str]], modules: Mapping[str, nn.Module]
) -> None:
    """Calls layers in the place of products with Parameters that were lent to them.

    What else is done with such a Parameter stays as it is.

    Args:
        graph: the graph, changed in place.
        lent: for the target of each Parameter that of its layer, and its name there.
        modules: the layers, by target.
    """
    for found in calls(graph):
        target, _ = lent.get(str(found.weight.target), ("", ""))
        layer = modules.get(target)
        if isinstance(layer, Product) and _is_of(found, lent, target, layer):
            edit.call_instead(graph, found.node, target, found.input)
    edit.erase_unread(graph, lent)


def write_out(
    graph: fx.Graph, modules: Mapping[str, nn.Module], lent: Mapping[str, Mapping[str, str]]
) -> None:
    """Writes calls of layers as the products with Parameters that they were.

    Args:
        graph: the graph, changed in place.
        modules: the modules that it calls, by target.
        lent: for each target of a layer the targets of its Parameters, by their names there.
    """
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, Product):
            continue
        held = lent[str(node.target)]
        with graph.inserting_before(node):
            weight = graph.get_attr(held["weight"])
            bias = graph.get_attr(held["bias"]) if "bias" in held else None
            made = _product(graph, layer, node.all_input_nodes[0], weight, bias)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)


def _product(
    graph: fx.Graph, layer: Product, input: fx.Node, weight: fx.Node, bias: fx.Node | None
) -> fx.Node:
    """A product as it is written, at the insert point."""
    if layer.function == "linear":
        return graph.call_function(F.linear, (input, weight, bias))
    if layer.function == "einsum":
        return graph.call_function(torch.einsum, (layer.equation, input, weight))
    if layer.function == "tensordot":
        dims = 1 if layer.equation else ([-1], [0])
        return graph.call_function(torch.tensordot, (input, weight), {"dims": dims})
    function = torch.mm if layer.function == "mm" else operator.matmul
    return graph.call_function(function, (input, weight))


def _is_of(call: Call, lent: Mapping[str, tuple[str, str]], target: str, layer: Product) -> bool:
    """Whether a call is the product that a layer stands for."""
    bias = None if call.bias is None else lent.get(str(call.bias.target))
    return (
        lent[str(call.weight.target)] == (target, "weight")
        and bias == (None if layer.bias is None else (target, "bias"))
        and (call.bias is None) == (layer.bias is None)
        and (call.function, call.equation) == (layer.function, layer.equation)
    )


def read_otherwise(graph: fx.Graph, found: Sequence[Call]) -> set[str]:
    """The targets of weights and biases that are read in any other way than in one product."""
    products = {call.node: call for call in found}
    ways: dict[str, set[object]] = {}
    for node in graph.nodes:
        for user in node.users if node.op == "get_attr" else ():
            known = products.get(user)
            way = known.reads if known is not None and known.input is not node else user
            ways.setdefault(str(node.target), set()).add(way)
    return {target for target, each in ways.items() if len(each) > 1}


def tells_offsets(graph: fx.Graph) -> bool:
    """Whether something in a graph tells where in its storage a tensor begins."""
    return any(hazards.called(node) in OFFSETS for node in graph.nodes)


def _read(node: fx.Node) -> Call | None:
    """A node as a product with a Parameter; None where it is none."""
    function, equation, operands = _written(node)
    input, weight, bias = (*operands, None, None, None)[:3]
    if not isinstance(input, fx.Node) or not _is_attribute(weight):
        return None
    if bias is not None and not _is_attribute(bias):
        return None
    return Call(node, input, weight, bias, function, equation)


def _written(node: fx.Node) -> tuple[str, str, Sequence[Any]]:
    """The function of a product, its equation and its operands; no operands where it is none."""
    none: tuple[str, str, Sequence[Any]] = "", "", ()
    if node.op == "call_function" and node.target is F.linear:
        given = edit.arguments(node, LINEAR)
        return "linear", "", [given.get(name) for name in LINEAR]
    if node.op in ("call_function", "call_method") and node.target in MATMULS:
        return none if node.kwargs or len(node.args) != 2 else (MATMULS[node.target], "", node.args)
    if node.op == "call_function" and node.target is torch.tensordot:
        given = edit.arguments(node, ("a", "b", "dims"))
        plain = given.get("out") is None and _is_last_by_first(given.get("dims"))
        # How often to sum is kept, since an error tells it.
        equation = "1" if given.get("dims") == 1 else ""
        return ("tensordot", equation, [given.get("a"), given.get("b")]) if plain else none
    if node.op == "call_function" and node.target is torch.einsum and not node.kwargs:
        written, *operands = node.args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = [*operands[0]]
        if isinstance(written, str) and len(operands) == 2 and _is_product(written):
            return "einsum", written.replace(" ", ""), operands
    return none


def _is_last_by_first(dims: object) -> bool:
    """Whether `tensordot` sums over the last dimension of the one and the first of the other."""
    if isinstance(dims, (list, tuple)):
        each = [list(dim) if isinstance(dim, (list, tuple)) else [dim] for dim in dims]
        return each == [[-1], [0]]
    return type(dims) is int and dims == 1


def _is_product(equation: str) -> bool:
    """Whether an equation is that of `x @ w`, such as `bsi,io->bso` or `...i,io->...o`."""
    found = re.fullmatch(
        r"(\.\.\.)?([a-zA-Z]*)([a-zA-Z]),([a-zA-Z])([a-zA-Z])->(\.\.\.)?([a-zA-Z]*)([a-zA-Z])",
        equation.replace(" ", ""),
    )
    if found is None:
        return False
    dots, rows, inner, first, width, same_dots, same_rows, last = found.groups()
    letters = [*rows, inner, width]
    kept = (dots, rows, inner, width) == (same_dots, same_rows, first, last)
    return kept and len({*letters}) == len(letters)


def _is_attribute(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"
