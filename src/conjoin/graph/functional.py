"""Products as functions of a weight, as Dynamo writes them, and one product made of several.

    y_i = f(x, W_i, b_i)        becomes        y = f(x, W, b);  y_1, y_2, ... = split(y)

for f Linear, Conv or ConvTranspose, where somebody else says what W is. With groups it is
y = f((x, x, ...), W, b) with as many times the groups. A part is a slice of y, so it is copied
where somebody could tell that from a tensor of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from conjoin.graph import bundles, edit, elementwise, strides
from conjoin.graph.epochs import Epochs, epochs_of, makes_memory
from conjoin.graph.meta import EXAMPLE, VALUE, is_wrapped, storage_of, value_of
from conjoin.layers.conv import repeated

PRODUCTS: Mapping[Callable[..., Any], int] = {
    F.linear: -1,
    torch.conv1d: -2,
    torch.conv2d: -3,
    torch.conv3d: -4,
    torch.conv_transpose1d: -2,
    torch.conv_transpose2d: -3,
    torch.conv_transpose3d: -4,
}
"""Functions of an input, a weight and a bias, and where the channels of their output are."""

TRANSPOSED = frozenset({torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d})
"""Those of them whose weight has the output channels along dimension 1, not 0."""

BATCHED = frozenset({torch.bmm, torch.baddbmm})
"""Functions that multiply stacks of matrices."""

PARAMETERS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The parameters of these functions, in order."""

OF_TRANSPOSED = (*PARAMETERS[:5], "output_padding", "groups", "dilation")
"""Those of the transposed ones."""

WHOLE = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool})
"""The types of whole numbers."""

MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)
"""The memory formats that a product's output may have and a copy of a part can be given."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A product that may become a part of a wide one.

    Attributes:
        node: the call.
        size: how many output channels it has.
        copied: the memory format in which it must be copied, if something reads its strides.
    """

    node: fx.Node
    size: int
    copied: torch.memory_format | None


def is_product(node: fx.Node) -> bool:
    """Whether a node is a call that can be part of a wide one.

    Not in a functorch transform: `vmap` knows no way to split without an alias.
    """
    if node.op != "call_function" or node.target not in PRODUCTS:
        return False
    if is_wrapped(node.meta.get(EXAMPLE)):
        return False
    return node.target not in TRANSPOSED or not is_grouped(node)


def is_batched(node: fx.Node) -> bool:
    """Whether a node is a batched product, or the rows of one in their shape."""
    if (node.op, node.target) == ("call_method", "unflatten"):
        node = node.all_input_nodes[0]
    return node.op == "call_function" and node.target in BATCHED


def is_grouped(node: fx.Node) -> bool:
    """Whether a product has groups, so that a wide one reads its input once for each part."""
    return bool(arguments(node).get("groups", 1) != 1)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a product by name, as far as they are given."""
    return edit.arguments(node, OF_TRANSPOSED if node.target in TRANSPOSED else PARAMETERS)


def weight_dim(node: fx.Node) -> int:
    """The dimension of a product's weight that runs over the output channels."""
    return int(node.target in TRANSPOSED)


def settings(node: fx.Node) -> Hashable:
    """What must be equal for products on one tensor to become one, but for having a bias."""
    given = {n: value for n, value in arguments(node).items() if n not in ("weight", "bias")}
    return node.target, elementwise.comparable(given, lambda input: input)


def piece(node: fx.Node, size: int, modules: Mapping[str, nn.Module]) -> Piece | None:
    """A product as a part; None where it must be copied and it is not known how it lies."""
    if not strides.reads_strides(node, modules, escapes=True):
        return Piece(node, size, None)
    copied = memory_format(node)
    return None if copied is None else Piece(node, size, copied)


def epochs(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Epochs:
    """The epochs of a graph's nodes, in which products of one epoch may trade places.

    What changes nothing that a product or a lookup reads does not count. Dynamo's example values
    lie in one storage where the values do. On a later call inputs may lie in one that do not now;
    but not a count of batches, or the like, and what is multiplied or looked up.
    """
    return epochs_of(graph, modules, _changes_elsewhere(graph))


def _changes_elsewhere(graph: fx.Graph) -> Callable[[fx.Node], bool]:
    """Whether a node that changes its first input changes nothing that a product reads."""
    products = [node for node in graph.nodes if is_product(node) or node.target is F.embedding]
    read = {_storage(input) for node in products for input in node.all_input_nodes}

    def is_elsewhere(node: fx.Node) -> bool:
        changed = node.all_input_nodes[0]
        value = changed.meta.get(EXAMPLE)
        whole = isinstance(value, Tensor) and value.dtype in WHOLE
        return whole and None not in read and _storage(changed) not in read

    return is_elsewhere


def moments(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Callable[[fx.Node], Hashable]:
    """What is equal for products of a graph that may trade places as far as it is known.

    It is their epoch; but what changes memory that was made in the graph, which no input lies in on
    any call, counts only for those that read that memory.
    """
    given = {_storage(n) for n in graph.nodes if n.op in ("placeholder", "get_attr")} - {None}
    made = {_storage(n) for n in graph.nodes if makes_memory(n)} - given - {None}
    changes: dict[int | None, list[fx.Node]] = {}
    is_elsewhere = _changes_elsewhere(graph)

    def is_told_apart(node: fx.Node) -> bool:
        storage = _storage(node.all_input_nodes[0])
        if storage in made:
            changes.setdefault(storage, []).append(node)
        return storage in made or is_elsewhere(node)

    found = epochs_of(graph, modules, is_told_apart).settled()

    def moment(product: fx.Node) -> Hashable:
        read = {_storage(input) for input in product.all_input_nodes}
        # Of other values fake tensors may not tell, such as what dropout passes on.
        relevant = read & {*changes} if read <= given | made else {*changes}
        passed = (change for storage in relevant for change in changes[storage])
        return found[product], sum(change < product for change in passed)

    return moment


def join(
    graph: fx.Graph,
    parts: Sequence[Piece],
    modules: Mapping[str, nn.Module],
    weights: Callable[[], tuple[fx.Node, fx.Node | None]],
) -> None:
    """Puts one product and a split in the place of several on one tensor.

    Args:
        graph: the graph, changed in place.
        parts: the products, in the order of the parts.
        modules: the modules that it calls, by target.
        weights: puts what the weight and the bias are made of into the graph, at its insert point.
    """
    parts = _as_slices(graph, parts, modules)
    nodes = [part.node for part in parts]
    first = min(nodes)
    given = arguments(first)
    with graph.inserting_before(first):
        given["weight"], given["bias"] = weights()
        if is_grouped(first):
            count, dim = len(parts), PRODUCTS[first.target]  # type: ignore[index]
            given["input"] = graph.call_function(repeated, (given["input"], dim, count))
            given["groups"] *= count
        whole = graph.call_function(first.target, (), given)  # type: ignore[arg-type]
        sizes = [part.size for part in parts]
        cut = bundles.cut(graph, whole, sizes, PRODUCTS[first.target])  # type: ignore[index]
        outputs = [
            output if part.copied is None else _copy(graph, output, part.copied)
            for output, part in zip(cut, parts, strict=True)
        ]
    whole.meta = {k: value for k, value in first.meta.items() if k not in (EXAMPLE, VALUE)}
    bundles.substitute(graph, nodes, outputs)


def _copy(graph: fx.Graph, part: fx.Node, memory_format: torch.memory_format) -> fx.Node:
    """A copy of a part, at the graph's insert point."""
    return graph.call_method("clone", (part,), {"memory_format": memory_format})


def _storage(node: fx.Node) -> int | None:
    """What a node's value lies in; None where that is not known."""
    value = node.meta.get(EXAMPLE)
    return storage_of(value) if isinstance(value, Tensor) else None


def memory_format(node: fx.Node) -> torch.memory_format | None:
    """How the value of a node lies in memory; None where that is not known.

    What has one channel lies in several formats, but has the strides of one: what joins it with
    others goes by these.
    """
    value = value_of(node)
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    ranks = {torch.channels_last: 4, torch.channels_last_3d: 5}
    possible = [each for each in MEMORY_FORMATS if ranks.get(each, value.dim()) == value.dim()]
    with strides.quietly(value), torch.no_grad():
        found = [each for each in possible if value.is_contiguous(memory_format=each)]
        # Of sizes that are symbols, some versions of PyTorch know less than the strides tell.
        for each in found[1:] if found else possible:
            made = torch.empty_like(value, memory_format=each)
            if str(made.stride()) == str(value.stride()):
                return each
    return found[0] if found else None


def _as_slices(
    graph: fx.Graph, parts: Sequence[Piece], modules: Mapping[str, nn.Module]
) -> Sequence[Piece]:
    """The same products without copies, where nobody could tell a part from a tensor of its own."""
    formats = {part.copied for part in parts}
    example = value_of(parts[0].node)
    memory_format = parts[0].copied
    if len(formats) > 1 or memory_format is None or not isinstance(example, Tensor):
        return parts
    with strides.quietly(example):
        dim = PRODUCTS[parts[0].node.target]  # type: ignore[index]
        sizes = [part.size for part in parts]
        shape = [*example.shape]
        shape[dim] = sum(sizes)
        whole = example.new_empty(shape).contiguous(memory_format=memory_format)
        cut = torch.split(whole, sizes, dim)
        moved = {part.node: slice for part, slice in zip(parts, cut, strict=True)}
        found = strides.followed(graph, moved, modules)
    if found is None:
        return parts
    for node, value in found.items():
        node.meta[EXAMPLE if EXAMPLE in node.meta else VALUE] = value
    return [dataclasses.replace(part, copied=None) for part in parts]
