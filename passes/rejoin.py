"""Products of one tensor with neighbouring slices of one weight become one product.

    y_i = f(x, W[a_i], b[a_i])        becomes        y = f(x, W, b);  y_1, y_2 = split(y)

for f Linear or Conv and neighbouring rows a_i. That is how the views of a wide layer compute where
each does so by itself, as in the graphs of `torch.compile`. In the backward pass the weight gets
one gradient then, in place of a sum of padded ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.nn import functional as F

from conjoin.graph import bundles, edit, elementwise, hazards, strides
from conjoin.graph.meta import EXAMPLE
from conjoin.graph.rewriting import Rewrite

PRODUCTS: Mapping[Callable[..., Any], int] = {
    F.linear: -1,
    torch.conv1d: -2,
    torch.conv2d: -3,
    torch.conv3d: -4,
}
"""Functions of an input, a weight and a bias, and where the channels of their output are."""

PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The parameters of these functions, in order."""

WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})
"""The types of whole numbers."""

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
"""The memory formats that a product's output may have and a copy of a part can be given."""


@dataclass(frozen=True, slots=True)
class Product:
    """A product with a slice.

    Attributes:
        node: the call.
        weight: the slice of the weight.
        bias: the slice of the bias, if there is one.
        copied: the memory format in which the part must be copied, if something reads its strides.
    """

    node: fx.Node
    weight: Slice
    bias: Slice | None
    copied: torch.memory_format | None


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
            _join(graph, _as_slices(graph, run, modules))
        return PassResult(graph_module, bool(found))


def is_product(node: fx.Node) -> bool:
    """Whether a node is a call that can be part of a wide one."""
    if node.op != "call_function" or node.target not in PRODUCTS:
        return False
    return bool(edit.arguments(node, PARAMETERS).get("groups", 1) == 1)


def settings(node: fx.Node) -> Hashable:
    """What must be equal for products on one tensor to become one, but for having a bias."""
    arguments = edit.arguments(node, PARAMETERS).items()
    given = {name: value for name, value in arguments if name not in ("weight", "bias")}
    return node.target, elementwise.comparable(given, lambda input: input)


def _siblings(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[list[Product]]:
    """Products with slices of one weight that read one tensor, by their rows."""
    epochs = hazards.epochs(graph, modules, _elsewhere(graph))
    groups: dict[Hashable, list[Product]] = {}
    for node in graph.nodes:
        if not is_product(node):
            continue
        given = edit.arguments(node, PARAMETERS)
        weight, bias = _slice(given["weight"]), _slice(given.get("bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            continue
        strided = hazards.reads_strides(node, modules, escapes=True)
        copied = _memory_format(node) if strided else None
        if strided and copied is None:
            continue
        key = settings(node), weight.whole, bias and bias.whole, epochs[node]
        groups.setdefault(key, []).append(Product(node, weight, bias, copied))
    for products in groups.values():
        yield sorted(products, key=lambda product: product.weight.start)


def _elsewhere(graph: fx.Graph) -> Callable[[fx.Node], bool]:
    """Whether a node that changes its first input changes what no product reads.

    Dynamo's example values lie in one storage where the values do. On a later call inputs may lie
    in one that do not now; but not whole numbers, such as a count of batches, and what is
    multiplied.
    """
    products = [node for node in graph.nodes if is_product(node)]
    read = {_storage(input) for node in products for input in node.all_input_nodes}

    def is_elsewhere(node: fx.Node) -> bool:
        changed = node.all_input_nodes[0]
        value = changed.meta.get(EXAMPLE)
        whole = isinstance(value, Tensor) and value.dtype in WHOLE
        return whole and None not in read and _storage(changed) not in read

    return is_elsewhere


def _storage(node: fx.Node) -> int | None:
    """What a node's value lies in; None where that is not known."""
    value = node.meta.get(EXAMPLE)
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


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


def _memory_format(node: fx.Node) -> torch.memory_format | None:
    """How the value of a node lies in memory; None where that is not known."""
    value = node.meta.get(EXAMPLE)
    if not isinstance(value, Tensor):
        return None
    ranks = {torch.channels_last: 4, torch.channels_last_3d: 5}
    return next(
        (
            memory_format
            for memory_format in MEMORY_FORMATS
            if ranks.get(memory_format, value.dim()) == value.dim()
            and value.is_contiguous(memory_format=memory_format)
        ),
        None,
    )


def _as_slices(
    graph: fx.Graph, run: Sequence[Product], modules: Mapping[str, nn.Module]
) -> Sequence[Product]:
    """The same products without copies, where nobody could tell a part from a tensor of its own."""
    formats = {product.copied for product in run}
    example = run[0].node.meta.get(EXAMPLE)
    memory_format = run[0].copied
    if len(formats) > 1 or memory_format is None or not isinstance(example, Tensor):
        return run
    with strides.quietly(example):
        dim = PRODUCTS[run[0].node.target]  # type: ignore[index]
        shape = [*example.shape]
        shape[dim] = sum(product.weight.size for product in run)
        whole = example.new_empty(shape).contiguous(memory_format=memory_format)
        parts = torch.split(whole, [product.weight.size for product in run], dim)
        moved = {product.node: part for product, part in zip(run, parts, strict=True)}
        found = strides.followed(graph, moved, modules)
    if found is None:
        return run
    for node, value in found.items():
        node.meta[EXAMPLE] = value
    return [dataclasses.replace(product, copied=None) for product in run]


def _join(graph: fx.Graph, run: Sequence[Product]) -> None:
    """Puts one product and a split in the place of a run of them."""
    nodes = [product.node for product in run]
    first = min(nodes)
    given = edit.arguments(first, PARAMETERS)
    with graph.inserting_before(first):
        given["weight"] = _rows(graph, [product.weight for product in run])
        biases = [product.bias for product in run if product.bias is not None]
        given["bias"] = _rows(graph, biases) if biases else None
        whole = graph.call_function(first.target, (), given)  # type: ignore[arg-type]
        sizes = [product.weight.size for product in run]
        parts = bundles.cut(graph, whole, sizes, PRODUCTS[first.target])  # type: ignore[index]
        outputs = [
            part if product.copied is None else _copy(graph, part, product.copied)
            for part, product in zip(parts, run, strict=True)
        ]
    whole.meta = {key: value for key, value in first.meta.items() if key != EXAMPLE}
    bundles.substitute(graph, nodes, outputs)
    for product in run:
        for slice in (product.weight, product.bias):
            if slice is not None and not slice.node.users:
                graph.erase_node(slice.node)


def _copy(graph: fx.Graph, part: fx.Node, memory_format: torch.memory_format) -> fx.Node:
    """A copy of a part, at the graph's insert point."""
    return graph.call_method("clone", (part,), {"memory_format": memory_format})


def _rows(graph: fx.Graph, slices: Sequence[Slice]) -> fx.Node:
    """The rows of slices that follow on one another; the tensor itself where that is all of it."""
    whole, start = slices[0].whole, slices[0].start
    size = sum(each.size for each in slices)
    value = whole.meta.get(EXAMPLE)
    if isinstance(value, Tensor) and value.shape[0] == size:
        return whole
    return graph.call_method("narrow", (whole, 0, start, size))
