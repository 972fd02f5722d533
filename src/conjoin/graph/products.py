"""Products with a module's own Parameters in a graph: `F.linear(x, self.w)`, `x @ self.w`."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from conjoin.graph import bundles, edit, hazards, strides
from conjoin.layers import Kind, kind_of
from conjoin.layers.convolved import CONVOLUTIONS
from conjoin.layers.owner import may_lend
from conjoin.layers.product import SUFFIX, LinearProduct, Matmul, Product

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

TURNED: dict[Any, tuple[tuple[Any, ...], ...]] = {
    torch.t: ((),),
    "t": ((),),
    torch.transpose: ((0, 1), (1, 0), (-2, -1), (-1, -2)),
    "transpose": ((0, 1), (1, 0), (-2, -1), (-1, -2)),
    "permute": ((1, 0), ((1, 0),)),
    getattr: (("T",), ("mT",)),
}
"""Functions and methods that transpose a weight, and with which further arguments."""

CONVOLVING: dict[Any, str] = {getattr(F, function): function for function in CONVOLUTIONS}
"""Functions that convolve, and their names."""


@dataclass(frozen=True, slots=True)
class ProductCall:
    """A product in a graph.

    Attributes:
        node: the node.
        input: what is multiplied.
        weight: the node of the weight.
        bias: the node of the bias, where there is one.
        function: the name of the function.
        equation: for `einsum`, its equation; for `tensordot`, a number of dimensions, if given.
        rows: whether the rows of the weight are output channels, so that it is (out, in).
        turned: the node that transposes the weight before, where there is one.
        settings: for a convolution, its settings by name.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    function: str
    equation: str = ""
    rows: bool = False
    turned: fx.Node | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def reads(self) -> tuple[object, ...]:
        """What is read, and how; equal for all calls of one product."""
        bias = None if self.bias is None else self.bias.target
        how = self.function, self.equation, self.rows, self.settings
        return self.weight.target, bias, *how

    @property
    def convolves(self) -> bool:
        """Whether it is a convolution."""
        return self.function in CONVOLUTIONS

    @property
    def dims(self) -> int:
        """How many dimensions the weight must have."""
        return CONVOLUTIONS[self.function].dims if self.convolves else 2

    def layer(self, weight: nn.Parameter, bias: nn.Parameter | None, *, stacked: bool) -> Product:
        """The product as a layer."""
        if self.convolves:
            return CONVOLUTIONS[self.function](weight, bias, dict(self.settings))
        if self.rows:
            return LinearProduct(self.function, weight, bias, self.equation, stacked=stacked)
        return Matmul(self.function, weight, bias, self.equation)


@dataclass(frozen=True, slots=True)
class RawProduct:
    """A product with Parameters of a module's own.

    Attributes:
        owner: the qualified name of the module.
        parameters: the Parameters' names there, by those in the layer.
        layer: the product as a layer.
        read: whether one of the Parameters is read in some other way too.
        strided: whether its output must be contiguous, where it is not one of a stack.
    """

    owner: str
    parameters: dict[str, str]
    layer: Product
    read: bool
    strided: bool

    @property
    def name(self) -> str:
        """The qualified name that the layer has once the Parameters are lent to it."""
        return self.owned(self.parameters["weight"]) + SUFFIX

    def owned(self, name: str) -> str:
        """The qualified name of something in the owner."""
        return f"{self.owner}.{name}".lstrip(".")


def calls(graph: fx.Graph) -> list[ProductCall]:
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
    turned: list[fx.Node] = []
    for found in calls(graph):
        target, _ = lent.get(str(found.weight.target), ("", ""))
        layer = modules.get(target)
        if isinstance(layer, Product) and _is_of(found, lent, target, layer):
            with graph.inserting_before(found.node):
                made = graph.call_module(target, (found.input,))
            bundles.substitute(graph, [found.node], [made])
            turned += [found.turned] if found.turned is not None else []
    edit.erase_unread(graph, turned)
    edit.erase_unread(graph, [n for n in graph.nodes if n.op == "get_attr" and n.target in lent])


def read_otherwise(graph: fx.Graph, found: Sequence[ProductCall]) -> set[str]:
    """The targets of weights and biases that are read in any other way than in one product."""
    products = {call.node: call for call in found}
    turned = {call.turned for call in found}

    def ways(node: fx.Node) -> Iterator[object]:
        for user in node.users:
            known = products.get(user)
            if user in turned:
                yield from ways(user)
            else:
                yield known.reads if known is not None and known.input is not node else user

    read: dict[str, set[object]] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            read.setdefault(str(node.target), set()).update(ways(node))
    return {target for target, each in read.items() if len(each) > 1}


def raw_products(
    graph_module: fx.GraphModule, model: nn.Module, kinds: tuple[Kind, ...], *, escapes: bool
) -> dict[ProductCall, RawProduct]:
    """The products of a graph with Parameters of a model that can be lent, by their calls.

    Args:
        graph_module: the graph, of the model or of a module in it.
        model: the model.
        kinds: the kinds of layer; one of these is merged as a layer, and lends nothing.
        escapes: whether something beyond the graph reads its outputs.
    """
    graph, modules = graph_module.graph, edit.called_modules(graph_module)
    found = calls(graph)
    read = read_otherwise(graph, found)
    at = dict(graph_module.named_parameters(remove_duplicate=False))
    owned = {
        id(parameter): (prefix, name)
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
    }
    strided = {c for c in found if strides.reads_strides(c.node, modules, escapes=escapes)}
    stacked = {call.input for call in strided if not call.convolves}
    copied = {call.reads for call in strided if call.convolves}
    by_call: dict[ProductCall, RawProduct] = {}
    made: dict[object, RawProduct] = {}
    for call in found:
        nodes = {"weight": call.weight, "bias": call.bias}
        targets = {name: str(node.target) for name, node in nodes.items() if node is not None}
        held = {name: at[target] for name, target in targets.items() if target in at}
        places = {name: owned[id(p)] for name, p in held.items() if id(p) in owned}
        names = {tensor: name for tensor, (_, name) in places.items()}
        owner = places.get("weight", ("", ""))[0]
        whole = places.keys() == targets.keys() and all(p == owner for p, _ in places.values())
        if not whole or is_lazy(held["weight"]) or held["weight"].dim() != call.dims:
            continue
        module = model.get_submodule(owner)
        if kind_of(module, kinds) is not None or not may_lend(module, tuple(names.values())):
            continue
        layer = call.layer(held["weight"], held.get("bias"), stacked=call.input in stacked)
        elsewhere = not read.isdisjoint(targets.values())
        product = RawProduct(owner, names, layer, elsewhere, call.reads in copied)
        by_call[call] = made.setdefault(call.reads, product)
    return by_call


def tells_offsets(graph: fx.Graph) -> bool:
    """Whether something in a graph tells where in its storage a tensor begins."""
    return any(hazards.called(node) in OFFSETS for node in graph.nodes)


def write_out(
    graph: fx.Graph, modules: Mapping[str, nn.Module], lent: Mapping[str, Mapping[str, str]]
) -> None:
    """Writes calls of layers as the products with Parameters that they were.

    Args:
        graph: the graph, changed in place.
        modules: the modules that it calls, by target.
        lent: for each target of a layer the targets of its Parameters, by their names there.
    """
    tracer = fx.proxy.GraphAppendingTracer(graph)
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, Product):
            continue
        held = lent[str(node.target)]
        with graph.inserting_before(node):
            # `graph.get_attr` would warn, since the Parameters come back only after this.
            weight = graph.create_node("get_attr", held["weight"])
            bias = graph.create_node("get_attr", held["bias"]) if "bias" in held else None
            read = node.all_input_nodes[0], weight, bias
            proxies: list[Any] = [each and fx.Proxy(each, tracer) for each in read]
            written: Any = layer.written(*proxies)
        bundles.substitute(graph, [node], [written.node])


def _is_of(
    call: ProductCall, lent: Mapping[str, tuple[str, str]], target: str, layer: Product
) -> bool:
    """Whether a call is the product that a layer stands for."""
    bias = None if call.bias is None else lent.get(str(call.bias.target))
    return (
        lent[str(call.weight.target)] == (target, "weight")
        and bias == (None if layer.bias is None else (target, "bias"))
        and (call.bias is None) == (layer.bias is None)
        and (call.function, call.equation) == (layer.function, layer.equation)
        and call.rows == isinstance(layer, LinearProduct)
        and dict(call.settings) == layer.given
    )


def _read(node: fx.Node) -> ProductCall | None:
    """A node as a product with a Parameter; None where it is none."""
    if node.op == "call_function" and (found := _convolution(node)) is not None:
        return found
    function, equation, operands = _written(node)
    input, weight, bias = (*operands, None, None, None)[:3]
    if not isinstance(input, fx.Node) or not isinstance(weight, fx.Node):
        return None
    turned = None
    if function in ("matmul", "mm", "addmm") and turns(weight):
        turned, weight = weight, weight.args[0]
    if not _is_attribute(weight) or not (bias is None or _is_attribute(bias)):
        return None
    rows = function == "linear" or turned is not None or _is_product(equation, turned=True)
    return ProductCall(node, input, weight, bias, function, equation, rows, turned)


def turns(node: fx.Node) -> bool:
    """Whether a node is the transpose of a Parameter, which it is sure to be if it has two dims."""
    return transposes(node) and _is_attribute(node.args[0])


def transposes(node: fx.Node) -> bool:
    """Whether a node is the transpose of a tensor, which it is sure to be if it has two dims."""
    known = node.op in ("call_function", "call_method") and node.target in TURNED
    return known and not node.kwargs and node.args[1:] in TURNED[node.target]


def _convolution(node: fx.Node) -> ProductCall | None:
    """A node as a convolution with a Parameter; None where it is none."""
    function = CONVOLVING.get(node.target)
    if function is None:
        return None
    defaults = CONVOLUTIONS[function].defaults  # In the order of the arguments.
    given = edit.arguments(node, (*LINEAR, *defaults))
    input, weight, bias = (given.get(name) for name in LINEAR)
    settings = tuple((name, _plain(given.get(name, defaults[name]))) for name in defaults)
    plain = dict(settings)["groups"] == 1
    plain &= not any(isinstance(each, fx.Node) for each in pytree.tree_leaves(settings))
    plain &= _is_attribute(weight) and (bias is None or _is_attribute(bias))
    if not plain or not isinstance(input, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return ProductCall(node, input, weight, bias, function, settings=settings)


def _plain(setting: Any) -> Any:
    return tuple(setting) if isinstance(setting, (list, tuple)) else setting


def _written(node: fx.Node) -> tuple[str, str, Sequence[Any]]:
    """The function of a product, its equation and its operands; no operands where it is none."""
    none: tuple[str, str, Sequence[Any]] = "", "", ()
    if node.op == "call_function" and node.target is F.linear:
        given = edit.arguments(node, LINEAR)
        return "linear", "", [given.get(name) for name in LINEAR]
    if node.op in ("call_function", "call_method") and node.target in MATMULS:
        return none if node.kwargs or len(node.args) != 2 else (MATMULS[node.target], "", node.args)
    if node.op == "call_function" and node.target is torch.addmm:
        plain = not node.kwargs and len(node.args) == 3 and _is_attribute(node.args[0])
        return ("addmm", "", [*node.args[1:], node.args[0]]) if plain else none
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
        if isinstance(written, str) and len(operands) == 2:
            equation = written.replace(" ", "")
            if _is_product(equation) or _is_product(equation, turned=True):
                return "einsum", equation, operands
    return none


def _is_last_by_first(dims: object) -> bool:
    """Whether `tensordot` sums over the last dimension of the one and the first of the other."""
    if isinstance(dims, (list, tuple)):
        each = [list(dim) if isinstance(dim, (list, tuple)) else [dim] for dim in dims]
        return each == [[-1], [0]]
    return type(dims) is int and dims == 1


def _is_product(equation: str, *, turned: bool = False) -> bool:
    """Whether an equation is that of `x @ w`, such as `bsi,io->bso` or `...i,io->...o`.

    Args:
        equation: the equation, without spaces.
        turned: whether it is that of `x @ w.t()` instead, such as `bsi,oi->bso`.
    """
    found = re.fullmatch(
        r"(\.\.\.)?([a-zA-Z]*)([a-zA-Z]),([a-zA-Z])([a-zA-Z])->(\.\.\.)?([a-zA-Z]*)([a-zA-Z])",
        equation,
    )
    if found is None:
        return False
    dots, rows, inner, first, second, same_dots, same_rows, last = found.groups()
    letters = [*rows, inner, last]
    weight = (last, inner) if turned else (inner, last)
    kept = (dots, rows, first, second) == (same_dots, same_rows, *weight)
    return kept and len({*letters}) == len(letters)


def _is_attribute(value: object) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"
