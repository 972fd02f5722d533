"""Products of one tensor with weights of their own become one, where it pays to join the weights.

    y_i = f(x, W_i, b_i)    becomes    y = f(x, cat(W_i), cat(b_i));  y_1, y_2, ... = split(y)

for f Linear, Conv or ConvTranspose. In the graphs of `torch.compile` the weights are parameters of
a model that stays as it is, so they are joined in each call. What that costs is estimated for the
sizes that the graph was captured with; mostly it is more than it saves, and so it is where
gradients come back. `conjoin.optimize` joins weights once.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import edit, functional
from conjoin.graph.meta import EXAMPLE
from conjoin.graph.rewriting import Rewrite
from conjoin.layers.kind import elements
from conjoin.policy import joining, machine
from conjoin.policy.cost import Setting, Work
from conjoin.policy.joining import Joining


class Join(Rewrite):
    """Joins the weights of siblings at each call, where that costs less than it saves."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        found = [group for group in groups(graph_module) if _pays(group)]
        for group in found:
            _join(graph, group, modules)
        return PassResult(graph_module, bool(found))


@dataclass(frozen=True, slots=True)
class ParameterProduct:
    """A product with a parameter.

    Attributes:
        node: the call.
        weight: the node of its weight.
        bias: the node of its bias, if there is one.
        part: the product as a part of a wide one; None where it can be none.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    part: functional.Piece | None


@dataclass(frozen=True, slots=True)
class Joinable:
    """Products of one tensor that may become one.

    Attributes:
        products: the products.
        figures: what they take; None where the device is not measured, or sizes are not known.
    """

    products: tuple[ParameterProduct, ...]
    figures: Joining | None


def groups(graph_module: fx.GraphModule) -> list[Joinable]:
    """The products of a graph that read one tensor, each with parameters of its own."""
    graph, modules = graph_module.graph, edit.called_modules(graph_module)
    epochs = functional.epochs(graph, modules)
    found: dict[Hashable, list[ParameterProduct]] = {}
    for node in graph.nodes:
        if _is_plain(node) and (product := product_of(node, modules)) is not None:
            key = functional.settings(node), epochs[node], _alike(product)
            found.setdefault(key, []).append(product)
    return [_group(products) for products in found.values() if len(products) > 1]


def _is_plain(node: fx.Node) -> bool:
    return functional.is_product(node) and not functional.is_grouped(node)


def product_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> ParameterProduct | None:
    """A node as a product with parameters; None where it is none."""
    given, dim = functional.arguments(node), functional.weight_dim(node)
    weight, bias = given["weight"], given.get("bias")
    values = [_parameter(each) for each in (weight, bias) if each is not None]
    held = [value for value in values if value is not None]
    made = node.meta.get(EXAMPLE)
    if len(held) < len(values) or {each.dtype for each in held} != {getattr(made, "dtype", None)}:
        return None  # Under autocast a product is of another type, and so is what it reads.
    return ParameterProduct(node, weight, bias, functional.piece(node, held[0].shape[dim], modules))


def _parameter(node: object) -> Tensor | None:
    """The value of a node that is a plain parameter; None of any other."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return None
    value = node.meta.get(EXAMPLE)
    plain = type(value) is FakeTensor and isinstance(value, nn.Parameter)
    return value if plain else None


def _alike(product: ParameterProduct) -> Hashable:
    """What must be equal beside the settings; also whether there is a backward pass."""
    weight, made = product.weight.meta[EXAMPLE], product.node.meta[EXAMPLE]
    dim, biased = functional.weight_dim(product.node), product.bias is not None
    return (
        weight.shape[:dim],
        weight.shape[dim + 1 :],
        weight.dtype,
        weight.device,
        biased,
        made.requires_grad,
    )


def _group(products: Sequence[ParameterProduct]) -> Joinable:
    made, weight = (node.meta[EXAMPLE] for node in (products[0].node, products[0].weight))
    read = functional.arguments(products[0].node)["input"].meta.get(EXAMPLE)
    known = machine.constants(weight.device, weight.dtype)
    if known is None or not isinstance(read, Tensor) or not elements(read):
        return Joinable(tuple(products), None)
    works = [_work(product) for product in products]
    setting = Setting(made.requires_grad, passed_on=read.requires_grad)
    return Joinable(tuple(products), joining.estimate(known, works, setting))


def _work(product: ParameterProduct) -> Work:
    copied = product.part is not None and product.part.copied is not None
    shape, biased = product.weight.meta[EXAMPLE].shape, product.bias is not None
    return work_of(product.node, shape, biased=biased, contiguous=copied)


def work_of(node: fx.Node, shape: Sequence[int], *, biased: bool, contiguous: bool = False) -> Work:
    """What a product does for the sizes that the graph was captured with.

    Args:
        node: the product.
        shape: the shape of its weight.
        biased: whether it has a bias.
        contiguous: whether its part of a wide output must be made contiguous.
    """
    read, made = functional.arguments(node)["input"].meta[EXAMPLE], node.meta[EXAMPLE]
    size, outputs, weight = made.element_size(), elements(made), math.prod(shape)
    return Work(
        input=elements(read) * read.element_size(),
        output=outputs * size,
        weight=weight * size,
        read=weight * size,
        operations=2 * outputs * weight // max(shape[functional.weight_dim(node)], 1),
        biased=biased,
        contiguous=contiguous,
    )


def _pays(group: Joinable) -> bool:
    possible = all(product.part is not None for product in group.products)
    return possible and group.figures is not None and group.figures.pays


def _join(graph: fx.Graph, group: Joinable, modules: Mapping[str, nn.Module]) -> None:
    """Puts one product with joined weights and a split in the place of a group."""

    def joined() -> tuple[fx.Node, fx.Node | None]:
        biases = [product.bias for product in group.products if product.bias is not None]
        weights = [product.weight for product in group.products]
        weight = _cat(graph, weights, functional.weight_dim(group.products[0].node))
        return weight, _cat(graph, biases, 0) if biases else None

    parts = [product.part for product in group.products if product.part is not None]
    functional.join(graph, parts, modules, joined)


def _cat(graph: fx.Graph, tensors: Sequence[fx.Node], dim: int) -> fx.Node:
    return graph.call_function(torch.cat, (list(tensors), dim))
