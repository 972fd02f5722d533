"""Products of one tensor with neighbouring slices of one weight become one product.

    y_i = f(x, W[a_i], b[a_i])        becomes        y = f(x, W, b);  y_1, y_2 = split(y)

for f Linear or Conv and neighbouring rows a_i. That is how the views of a wide layer compute where
each does so by itself, as in the graphs of `torch.compile`. In the backward pass the weight gets
one gradient then, in place of a sum of padded ones.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import edit, functional
from conjoin.graph.meta import EXAMPLE
from conjoin.graph.rewriting import Rewrite


@dataclass(frozen=True, slots=True)
class Product:
    """A product with a slice.

    Attributes:
        part: the product.
        weight: the slice of the weight.
        bias: the slice of the bias, if there is one.
    """

    part: functional.Part
    weight: Slice
    bias: Slice | None


@dataclass(frozen=True, slots=True)
class Slice:
    """Neighbouring rows of a tensor: `size` of them from `start` on."""

    node: fx.Node
    whole: fx.Node
    start: int
    size: int

    def precedes(self, other: Slice) -> bool:
        """Whether the other's rows follow on these."""
        return self.whole is other.whole and self.start + self.size == other.start


class Rejoin(Rewrite):
    """Makes the wide product again of what the views of a wide layer compute one by one."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        found = [run for products in _siblings(graph, modules) for run in _runs(products)]
        for run in found:
            _join(graph, run, modules)
        return PassResult(graph_module, bool(found))


def _siblings(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[list[Product]]:
    """Products with slices of one weight that read one tensor, by their rows."""
    epochs = functional.epochs(graph, modules)
    groups: dict[Hashable, list[Product]] = {}
    for node in graph.nodes:
        if not functional.is_product(node):
            continue
        given = edit.arguments(node, functional.PARAMETERS)
        weight, bias = _slice(given["weight"]), _slice(given.get("bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            continue
        part = functional.part(node, weight.size, modules)
        if part is not None:
            key = functional.settings(node), weight.whole, bias and bias.whole, epochs[node]
            groups.setdefault(key, []).append(Product(part, weight, bias))
    for products in groups.values():
        yield sorted(products, key=lambda product: product.weight.start)


def _slice(node: object) -> Slice | None:
    """The rows that a node takes of a tensor; None where it is something else."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target != "narrow":
        return None
    if node.kwargs or len(node.args) != 4:
        return None
    whole, dim, start, size = node.args
    if not isinstance(whole, fx.Node) or dim != 0:
        return None
    if not isinstance(start, int) or not isinstance(size, int) or start < 0:
        return None
    return Slice(node, whole, start, size)


def _runs(products: Sequence[Product]) -> Iterator[list[Product]]:
    """Two products or more, each with the rows that follow on those of the one before."""
    run: list[Product] = []
    for product in products:
        if run and not _follows(run[-1], product):
            if len(run) > 1:
                yield run
            run = []
        run.append(product)
    if len(run) > 1:
        yield run


def _follows(first: Product, second: Product) -> bool:
    if first.bias is None or second.bias is None:
        return first.weight.precedes(second.weight) and first.bias is second.bias
    return first.weight.precedes(second.weight) and first.bias.precedes(second.bias)


def _join(graph: fx.Graph, run: Sequence[Product], modules: Mapping[str, nn.Module]) -> None:
    """Puts one product and a split in the place of a run of them."""
    weights = [product.weight for product in run]
    biases = [product.bias for product in run if product.bias is not None]

    def rows() -> tuple[fx.Node, fx.Node | None]:
        return _rows(graph, weights), _rows(graph, biases) if biases else None

    functional.join(graph, [product.part for product in run], modules, rows)
    edit.erase_unread(graph, [slice.node for slice in (*weights, *biases)])


def _rows(graph: fx.Graph, slices: Sequence[Slice]) -> fx.Node:
    """The rows of slices that follow on one another; the tensor itself where that is all of it."""
    whole, start = slices[0].whole, slices[0].start
    size = sum(each.size for each in slices)
    value = whole.meta.get(EXAMPLE)
    if isinstance(value, Tensor) and value.shape[0] == size:
        return whole
    return graph.call_method("narrow", (whole, 0, start, size))
