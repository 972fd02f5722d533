"""Bundles: a wide tensor in a graph together with the parts that it is cut into.

    side by side:   W (..., sum c_i, ...),  p_i = W[..., c_i of them, ...]  along a dimension
    stacked:        W (n, ...),             p_i = W[i]

A bundle is a node W, one split of it and one item of the split for each part.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function, has_torch_function_unary

from conjoin.graph import edit
from conjoin.layers.embedding import unstack
from conjoin.layers.wide import Wide

CUTS = frozenset({torch.unsafe_split_with_sizes, torch.split, unstack})
"""The functions that cut a wide tensor."""

CARRIED = "conjoin_carried"
"""The entry of a GraphModule's `meta` that holds the paths of wide layers, and how many operations
run on what each gives before it is cut; None where it is not."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A wide tensor and its parts.

    Attributes:
        whole: the node of the wide tensor; nothing but the split reads it.
        split: the node that cuts it.
        parts: the node of each part, in order.
        sizes: the sizes of the parts along `dim`; ones where they are stacked.
        dim: the dimension that they lie along, counted from the end; None where they are stacked.
    """

    whole: fx.Node
    split: fx.Node
    parts: tuple[fx.Node, ...]
    sizes: tuple[int, ...]
    dim: int | None

    @property
    def equal(self) -> bool:
        """Whether all parts have one size."""
        return len(set(self.sizes)) == 1


def bundles(graph: fx.Graph) -> Iterator[Bundle]:
    """The bundles of a graph, in order."""
    for node in list(graph.nodes):
        if (found := bundle_at(node)) is not None:
            yield found


def bundle_at(split: fx.Node) -> Bundle | None:
    """The bundle that a node cuts; None where it is no split, or more than parts is read."""
    if split.op != "call_function" or split.kwargs or not split.args:
        return None
    arguments: tuple[Any, ...] = split.args
    whole, dim = arguments[0], None
    sizes: tuple[int, ...]
    if split.target is torch.unsafe_split_with_sizes and len(arguments) == 3:
        sizes, dim = tuple(arguments[1]), arguments[2]
        if not (isinstance(dim, int) and dim < 0 and all(isinstance(s, int) for s in sizes)):
            return None
    elif split.target is unstack and len(arguments) == 2:
        sizes = (1,) * arguments[1]
    else:
        return None
    if not isinstance(whole, fx.Node) or len(whole.users) != 1:
        return None
    items: dict[Any, fx.Node] = {}
    for user in split.users:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            return None
        if user.args[1] in items:
            return None
        items[user.args[1]] = user
    count = len(sizes)
    if sorted(items) != list(range(count)) or count < 2:
        return None
    parts = tuple(items[i] for i in range(count))
    return Bundle(whole, split, parts, sizes, dim)


def cut(
    graph: fx.Graph, whole: fx.Node, sizes: Sequence[int], dim: int | None
) -> tuple[fx.Node, ...]:
    """Adds a split of a wide tensor to a graph, at the graph's insert point.

    Returns:
        The node of each part.
    """
    if dim is None:
        split = graph.call_function(unstack, (whole, len(sizes)))
    else:
        split = graph.call_function(torch.unsafe_split_with_sizes, (whole, list(sizes), dim))
    return tuple(graph.call_function(operator.getitem, (split, i)) for i in range(len(sizes)))


def note_carried(graph_module: fx.GraphModule) -> None:
    """Notes for each wide layer in a graph after how many operations its output is cut."""
    modules = edit.called_modules(graph_module)
    calls = [node for node in graph_module.graph.nodes if node.op == "call_module"]
    found = (
        (str(n.target), _carried(n)) for n in calls if isinstance(modules[str(n.target)], Wide)
    )
    graph_module.meta[CARRIED] = tuple(found)


def _carried(whole: fx.Node) -> int | None:
    """How many operations run on a wide tensor before it is cut; None where none cuts it at once.

    What joins it with others, or reads it as a stack, is taken for something that gains by it.
    """
    count, node = 0, whole
    while len(node.users) == 1:
        user = next(iter(node.users))
        if user.target in CUTS:
            return count
        if "apart" in user.kwargs or len(user.all_input_nodes) > 1:
            return None
        count, node = count + 1, user
    return None


def carve(graph: fx.Graph, bundle: Bundle, start: int, stop: int) -> Bundle:
    """Makes the parts from `start` to `stop` a bundle of their own, cut from a chunk of the whole.

    The other parts stay parts of the whole.
    """
    count = len(bundle.parts)
    if (start, stop) == (0, count):
        return bundle
    sizes = bundle.sizes[start:stop]
    with graph.inserting_before(bundle.split):
        if bundle.dim is None:
            pieces = [piece for piece in (start, stop - start, count - stop) if piece]
            chunks = graph.call_function(torch.unsafe_split_with_sizes, (bundle.whole, pieces, 0))
            found: list[fx.Node] = []
            for number, piece in enumerate(pieces):
                chunk = graph.call_function(operator.getitem, (chunks, number))
                found += cut(graph, chunk, (1,) * piece, None)
            nodes, inner = found, found[start:stop]
        else:
            around = (*bundle.sizes[:start], sum(sizes), *bundle.sizes[stop:])
            outer = cut(graph, bundle.whole, around, bundle.dim)
            inner = list(cut(graph, outer[start], sizes, bundle.dim))
            nodes = [*outer[:start], *inner, *outer[start + 1 :]]
    substitute(graph, bundle.parts, nodes)
    graph.erase_node(bundle.split)
    made = bundle_at(inner[0].args[0])  # type: ignore[arg-type]
    assert made is not None  # it was cut just now
    return made


def runs(bundle: Bundle, key: Callable[[fx.Node, fx.Node, int], Hashable | None]) -> list[range]:
    """The longest ranges of neighbouring parts that go on alike.

    Args:
        bundle: the bundle.
        key: what a node does with a part that it alone reads, of some size; None is alike to
            nothing.
    """
    keys: list[Hashable | None] = []
    for part, size in zip(bundle.parts, bundle.sizes, strict=True):
        user = next(iter(part.users), None)
        alone = user is not None and len(part.users) == 1
        keys.append(key(user, part, size) if user is not None and alone else None)
    found: list[range] = []
    start = 0
    for stop in range(1, len(keys) + 1):
        if stop == len(keys) or keys[stop] is None or keys[stop] != keys[start]:
            if stop - start > 1 and keys[start] is not None:
                found.append(range(start, stop))
            start = stop
    return found


def readers(bundle: Bundle, positions: range) -> list[fx.Node]:
    """The nodes that read the parts at some positions, where each is read by one."""
    return [next(iter(bundle.parts[i].users)) for i in positions]


def replace(
    graph: fx.Graph,
    bundle: Bundle,
    users: Sequence[fx.Node],
    whole: fx.Node,
    sizes: Sequence[int],
    dim: int | None,
) -> list[fx.Node]:
    """Puts the parts of another wide tensor in the place of what is made of each part.

    Args:
        graph: the graph.
        bundle: the bundle, which goes.
        users: the node that reads each part, which goes.
        whole: what is made of the whole; it stands before the bundle's split.
        sizes: the sizes of its parts.
        dim: the dimension that they lie along, or None.

    Returns:
        The split into these parts, and what the bundle itself was cut from.
    """
    with graph.inserting_before(bundle.split):
        parts = cut(graph, whole, sizes, dim)
    substitute(graph, users, parts)
    for node in (*bundle.parts, bundle.split):
        graph.erase_node(node)
    return [*parts[0].all_input_nodes, *bundle.whole.all_input_nodes]


def rework(graph: fx.Graph, change: Callable[[Bundle], list[fx.Node]]) -> bool:
    """Changes the bundles of a graph, and those that come of it, as long as there are any.

    Args:
        graph: the graph.
        change: changes a bundle and gives the splits to look at then; none where it changes none.
    """
    changed = False
    pending = [bundle.split for bundle in bundles(graph)][::-1]
    while pending:
        split = pending.pop()
        bundle = None if split._erased else bundle_at(split)
        made = [] if bundle is None else change(bundle)
        changed |= bool(made)
        pending += made
    return changed


def substitute(graph: fx.Graph, old: Sequence[fx.Node], new: Sequence[fx.Node]) -> None:
    """Replaces nodes by others everywhere, and takes them out of the graph."""
    for before, after in zip(old, new, strict=True):
        after.meta = {**before.meta, **after.meta}
        before.replace_all_uses_with(after)
        graph.erase_node(before)


def beside(tensors: Sequence[Tensor]) -> Tensor:
    """N tensors (..., c) side by side: (..., n * c)."""
    if has_torch_function(tensors):  # A graph that is traced again keeps the call.
        return handle_torch_function(beside, tuple(tensors), tensors)
    return torch.cat(list(tensors), -1)


def columns(whole: Tensor, dim: int, start: int, stop: int) -> Tensor:
    """The columns of a tensor from `start` to `stop` along a dimension, stacked: (stop - start, *).

    Raises:
        IndexError: there are not as many, or no such dimension, as for the columns one by one.
    """
    if has_torch_function_unary(whole):  # A graph that is traced again keeps the call.
        return handle_torch_function(columns, (whole,), whole, dim, start, stop)
    whole.select(dim, stop - 1)
    return whole.movedim(dim, 0)[start:stop]


CASTS = ("long", "int")
"""Methods that make row numbers of columns of any type."""


def before_cast(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """What nodes make row numbers of, if all of them do nothing else; otherwise nothing."""
    target = nodes[0].target
    known = target in CASTS and all(
        (node.op, node.target, len(node.args), node.kwargs) == ("call_method", target, 1, {})
        for node in nodes
    )
    return [source for node in nodes for source in node.all_input_nodes] if known else []


def as_columns(nodes: Sequence[fx.Node]) -> tuple[fx.Node, int, int, int] | None:
    """What `columns` is called with to give nodes stacked; None where they are no such columns."""
    found = [_column(node) for node in nodes]
    first = found[0]
    if first is None or found != [(*first[:2], first[2] + i) for i in range(len(nodes))]:
        return None
    return *first, first[2] + len(nodes)


def _column(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """Of which tensor a node is a column, along which dimension, and which one."""
    if node.kwargs or not node.args or not isinstance(whole := node.args[0], fx.Node):
        return None
    given: Any = node.args[1:]
    if node.target is operator.getitem and isinstance(given[0], tuple):
        *before, place = given[0]
        # Where there is none, a number may be the name of something.
        given = (len(before), place) if before and before == [slice(None)] * len(before) else ()
    elif node.target not in ("select", torch.select):
        return None
    plain = len(given) == 2 and all(type(number) is int and number >= 0 for number in given)
    return (whole, *given) if plain else None


def side_by_side(graph: fx.Graph, stack: fx.Node) -> fx.Node:
    """Stacked parts (n, ..., c) as (..., n * c), at the graph's insert point."""
    inside = graph.call_method("movedim", (stack, 0, -2))
    return graph.call_method("flatten", (inside, -2))


STACKING = ("unflatten", "movedim")
"""The methods that make a stack of what lies side by side, in turn."""


def stacked(graph: fx.Graph, whole: fx.Node, count: int) -> fx.Node:
    """Parts that lie side by side (..., n * c) as a stack (n, ..., c), at the insert point."""
    inside = graph.call_method("unflatten", (whole, -1, (count, -1)))
    return graph.call_method("movedim", (inside, -2, 0))


def stacked_from(stack: fx.Node) -> list[fx.Node]:
    """The nodes that make a stack of what lies side by side, if that is what a node is."""
    inside = stack.args[0] if stack.target == "movedim" and stack.args[1:] == (-2, 0) else None
    if not isinstance(inside, fx.Node) or inside.target != "unflatten" or inside.args[1] != -1:
        return []
    return [inside, stack] if len(inside.users) == len(stack.users) == 1 else []


def rejoined(whole: Tensor, sizes: Sequence[int], along: int, dim: int) -> Tensor:
    """A tensor that was cut into parts of these sizes and joined again: the tensor itself.

    Args:
        whole: the tensor.
        sizes: the sizes of the parts.
        along: the dimension that it was cut along.
        dim: the dimension that they were joined along, which for a tensor of another rank than
            usual may be another one.

    Raises:
        RuntimeError: the sizes do not sum to its size, as `torch.split` says.
        IndexError: it has no such dimension.
    """
    if has_torch_function_unary(whole):  # A graph that is traced again keeps the call.
        return handle_torch_function(rejoined, (whole,), whole, sizes, along, dim)
    dimensions = range(whole.dim())
    if along != dim and dimensions[along] != dimensions[dim]:
        return torch.cat(torch.split(whole, list(sizes), along), dim)
    if whole.shape[along] != sum(sizes):
        torch.split(whole, list(sizes), along)
    return whole


def batched(tensors: Sequence[Tensor], dims: int) -> Tensor:
    """Stacks n tensors (*) of one shape to (n, *), for one call of a layer in the place of n.

    Where they have less than `dims` dimensions, which the layer needs, it is the first of them,
    for which the layer raises its error.
    """
    if has_torch_function(tuple(tensors)):  # A graph that is traced again keeps the call.
        return handle_torch_function(batched, tuple(tensors), tensors, dims)
    return tensors[0] if tensors[0].dim() < dims else torch.stack(tuple(tensors))
