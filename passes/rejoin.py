"""Products of one tensor with neighbouring slices of one weight become one product.

    y_i = f(x, W[a_i], b[a_i])        becomes        y = f(x, W, b);  y_1, y_2 = split(y)

for f Linear, Conv, ConvTranspose, or an Embedding of tables of one width, and neighbouring rows
a_i. That is how the views of a wide layer compute where each does so by itself, as in the graphs of
`torch.compile`. In the backward pass the weight gets one gradient then, in place of a sum of padded
ones.

Tables of several widths stay apart: Inductor reads each where its rows are needed, and a joined one
would have to be written first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from conjoin.graph import bundles, edit, elementwise, functional, strides
from conjoin.graph.meta import value_of
from conjoin.graph.rewriting import Rewrite
from conjoin.layers.conv import REPEATED
from conjoin.layers.embedding import read_stack
from conjoin.layers.kind import elements, memory_format

aten = torch.ops.aten

OF_EMBEDDING = (
    *("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
)
"""The parameters of `F.embedding`, in order."""

VIEWING = frozenset({"view", aten.view.default})
"""Methods and ATen operations that give a tensor another shape."""

NARROWING = frozenset({"narrow", aten.narrow.default, aten.slice.Tensor})
"""Those that take rows of one."""

CUTTING: frozenset[Any] = frozenset({torch.split, torch.split_with_sizes})
"""Those that cut one into such slices, all at once."""

ON_THE_TABLE = ("max_norm", "scale_grad_by_freq", "sparse")
"""Those that act on a table as a whole."""


@dataclass(frozen=True, slots=True)
class SliceProduct:
    """A product with a slice.

    Attributes:
        part: the product.
        weight: the slice of the weight.
        bias: the slice of the bias, if there is one.
    """

    part: functional.Piece
    weight: Slice
    bias: Slice | None


@dataclass(frozen=True, slots=True)
class Slice:
    """Neighbouring rows of a tensor: `size` of them from `start` on.

    Attributes:
        nodes: what they are made by, from the last one on.
        whole: the tensor.
        start: the first row.
        size: how many rows.
        shape: the shape in which they are viewed, where they are.
    """

    nodes: tuple[fx.Node, ...]
    whole: fx.Node
    start: int
    size: int
    shape: tuple[int, ...] | None = None

    @property
    def source(self) -> Hashable:
        """What is equal for slices of one tensor, which a graph may read by several nodes."""
        return str(self.whole.target) if self.whole.op == "get_attr" else self.whole

    def precedes(self, other: Slice) -> bool:
        """Whether the other's rows follow on these."""
        return self.source == other.source and self.start + self.size == other.start


class Rejoin(Rewrite):
    """Makes the wide product again of what the views of a wide layer compute one by one."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        found = [run for products in _siblings(graph, modules) for run in _runs(products)]
        found = [run for run in found if _pays(run)]
        for run in found:
            _join(graph, run, modules)
        return PassResult(graph_module, bool(found))


def _siblings(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[list[SliceProduct]]:
    """Products with slices of one weight that read one tensor, by their rows."""
    moment = functional.moments(graph, modules)
    groups: dict[Hashable, list[SliceProduct]] = {}
    for node in graph.nodes:
        found = _lookup(node) or _product(node, modules)
        if found is not None:
            key, product = found
            key = key, product.weight.source, product.bias and product.bias.source, moment(node)
            groups.setdefault(key, []).append(product)
    for products in groups.values():
        yield sorted(products, key=lambda product: product.weight.start)


def _product(
    node: fx.Node, modules: Mapping[str, nn.Module]
) -> tuple[Hashable, SliceProduct] | None:
    """A node as a product with slices, and what must be equal; None where it is none."""
    if not functional.is_product(node):
        return None
    given, dim = functional.arguments(node), functional.weight_dim(node)
    weight, bias = slice_of(given["weight"]), slice_of(given.get("bias"))
    if weight is None or (weight.shape is None) != (dim == 0):
        return None
    if given.get("bias") is not None and (bias is None or bias.shape is not None):
        return None
    size = weight.size if weight.shape is None else weight.shape[dim]
    if bias is not None and bias.size != size:
        return None
    part = functional.piece(node, size, modules)
    if part is None:
        return None
    kernel = None if weight.shape is None else (weight.shape[:dim], weight.shape[dim + 1 :])
    grouped = size if functional.is_grouped(node) else None
    return (functional.settings(node), kernel, grouped), SliceProduct(part, weight, bias)


def _lookup(node: fx.Node) -> tuple[Hashable, SliceProduct] | None:
    """A node as a lookup in a slice, and what must be equal; None where it is none."""
    if node.op != "call_function" or node.target is not F.embedding:
        return None
    given = edit.arguments(node, OF_EMBEDDING)
    weight, padding = slice_of(given.pop("weight")), given.get("padding_idx")
    if weight is None or weight.shape is None or len(weight.shape) != 2:
        return None
    if any(given.get(name) for name in ON_THE_TABLE) or (padding is not None and padding < 0):
        return None
    key = node.target, elementwise.comparable(given, lambda input: input), weight.shape
    return key, SliceProduct(functional.Piece(node, 1, None), weight, None)


def slice_of(node: object) -> Slice | None:
    """The rows that a node takes of a tensor; None where it is something else."""
    if not isinstance(node, fx.Node) or node.kwargs:
        return None
    arguments: tuple[Any, ...] = node.args
    if node.target in VIEWING and arguments and isinstance(arguments[0], fx.Node):
        rows, shape = slice_of(arguments[0]), arguments[1:]
        given = shape[0] if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
        sizes = tuple(size for size in given if type(size) is int and size >= 0)
        if rows is None or rows.shape is not None or len(sizes) < len(given):
            return None
        return Slice((node, *rows.nodes), rows.whole, rows.start, rows.size, sizes)
    if node.target is operator.getitem:
        return _cut(node)
    if node.target not in NARROWING or len(arguments) != 4:
        return None
    whole, dim, start, given = arguments
    if not isinstance(whole, fx.Node) or dim != 0:
        return None
    if type(start) is not int or type(given) is not int or start < 0:
        return None
    size = given
    if node.target is aten.slice.Tensor:
        size = given - start  # As far as there are as many rows.
        if getattr(value_of(node), "shape", (None,))[0] != size:
            return None
    return Slice((node,), whole, start, size)


def _cut(node: fx.Node) -> Slice | None:
    """The rows that an item of a split has, where it says how many each has."""
    split, index = node.args
    if not isinstance(split, fx.Node) or split.target not in CUTTING or split.kwargs:
        return None
    given: tuple[Any, ...] = split.args
    whole, sizes, dim = (*given, 0)[:3]
    known = isinstance(sizes, (list, tuple)) and all(type(size) is int for size in sizes)
    if not known or dim != 0 or type(index) is not int or not 0 <= index < len(sizes):
        return None
    return Slice((node, split), whole, sum(sizes[:index]), sizes[index])


def _runs(products: Sequence[SliceProduct]) -> Iterator[list[SliceProduct]]:
    """Two products or more, each with the rows that follow on those of the one before."""
    run: list[SliceProduct] = []
    for product in products:
        if run and not _follows(run[-1], product):
            if len(run) > 1:
                yield run
            run = []
        run.append(product)
    if len(run) > 1:
        yield run


def _follows(first: SliceProduct, second: SliceProduct) -> bool:
    if first.bias is None or second.bias is None:
        return first.weight.precedes(second.weight) and first.bias is second.bias
    return first.weight.precedes(second.weight) and first.bias.precedes(second.bias)


def _pays(run: Sequence[SliceProduct]) -> bool:
    """Whether products take less time as one: with groups, where their input is small."""
    first = run[0].part.node
    if first.target is F.embedding or not functional.is_grouped(first):
        return True
    read = value_of(functional.arguments(first)["input"])
    if not isinstance(read, Tensor) or any(product.part.copied for product in run):
        return False
    with strides.quietly(read):
        known = 0 < elements(read) * len(run) <= REPEATED
        return known and memory_format(read) != "channels_last"


def _join(graph: fx.Graph, run: Sequence[SliceProduct], modules: Mapping[str, nn.Module]) -> None:
    """Puts one product and a split in the place of a run of them."""
    weights = [product.weight for product in run]
    biases = [product.bias for product in run if product.bias is not None]

    def joined() -> tuple[fx.Node, fx.Node | None]:
        weight = rows(graph, weights)
        if weights[0].shape is not None:
            weight = _blocks(graph, weight, weights)
        return weight, rows(graph, biases) if biases else None

    if run[0].part.node.target is F.embedding:
        _read(graph, run)
    else:
        functional.join(graph, [product.part for product in run], modules, joined)
    nodes = {node for slice in (*weights, *biases) for node in slice.nodes}
    edit.erase_unread(graph, sorted(nodes, reverse=True))


def rows(graph: fx.Graph, slices: Sequence[Slice]) -> fx.Node:
    """The rows of slices that follow on one another; the tensor itself where that is all of it."""
    whole, start = min(each.whole for each in slices), slices[0].start
    size = sum(each.size for each in slices)
    value = value_of(whole)
    if isinstance(value, Tensor) and value.shape[0] == size:
        return whole
    return graph.call_method("narrow", (whole, 0, start, size))


def _blocks(graph: fx.Graph, rows: fx.Node, slices: Sequence[Slice]) -> fx.Node:
    """Blocks (in, out_i, *kernel) that lie one after another, joined along dimension 1."""
    # One split, whose backward pass is one cat, in the place of slices.
    split: Callable[..., Any] = torch.split
    cut = graph.call_function(split, (rows, [slice.size for slice in slices]))
    blocks = [
        graph.call_method("view", (graph.call_function(operator.getitem, (cut, i)), slice.shape))
        for i, slice in enumerate(slices)
    ]
    return graph.call_function(torch.cat, (blocks, 1))


def _read(graph: fx.Graph, run: Sequence[SliceProduct]) -> None:
    """Puts one lookup in a stack of tables in the place of those in each."""
    nodes, slices = [product.part.node for product in run], [product.weight for product in run]
    first = min(nodes)
    given = edit.arguments(first, OF_EMBEDDING)
    with graph.inserting_before(first):
        shape = len(run), *(slices[0].shape or ())
        stack = graph.call_method("view", (rows(graph, slices), shape))
        read = (stack, given["input"], given.get("padding_idx"))
        whole = graph.call_function(read_stack, read)
        parts = bundles.cut(graph, whole, [1] * len(run), None)
    bundles.substitute(graph, nodes, parts)
