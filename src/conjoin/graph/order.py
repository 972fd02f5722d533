"""The order that nodes must keep beyond their inputs, and sorting a graph by it.

What may change something stays where it is among all other nodes. What draws random numbers keeps
its place among its like, and so do the calls of one module that updates its buffers.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from torch import fx, nn

from conjoin.graph import hazards
from conjoin.graph.epochs import epochs_of
from conjoin.layers.view import View
from conjoin.layers.wide import Wide

RANDOM = tuple(
    "rand dropout bernoulli multinomial binomial normal poisson attention gumbel uniform "
    "exponential cauchy geometric rrelu fractional rsample".split()
)
"""What occurs in the names of functions that draw random numbers, and of some that do not."""

RANDOM_MODULES = (
    nn.modules.dropout._DropoutNd,
    nn.RReLU,
    nn.MultiheadAttention,
    nn.Transformer,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
    nn.RNNBase,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)
"""Modules that draw random numbers, in training mode or always."""

Edges = dict[fx.Node, set[fx.Node]]
"""For each node those that must come before it."""


def constraints(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Edges:
    """What must come before each node, its inputs aside."""
    epochs = epochs_of(graph, modules)
    found: Edges = {}
    last: dict[object, fx.Node] = {}
    barrier: fx.Node | None = None
    since: list[fx.Node] = []
    for node in graph.nodes:
        before = found.setdefault(node, set())
        if barrier is not None:
            before.add(barrier)
        if since and epochs[node] != epochs[since[-1]]:
            before.update(since)
            barrier, since = node, []
        since.append(node)
        for key in _kept_in_order(node, modules):
            if key in last:
                before.add(last[key])
            last[key] = node
    return found


def _kept_in_order(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[object]:
    if node.op == "call_module":
        module = modules[str(node.target)]
        keys: list[object] = [module] if any(True for _ in module.buffers()) else []
        wide = module.wide_layer if isinstance(module, View) else module
        if isinstance(wide, Wide) and wide.running:
            keys.append(wide)
        return [*keys, "random"] if is_random_module(module) else keys
    if node.op in ("call_function", "call_method"):
        name = hazards.called(node)
        drawn = name == "sample" or any(word in name for word in RANDOM)
        return ["random"] if drawn else []
    return []


def is_random_module(module: nn.Module) -> bool:
    """Whether a call of a module may draw random numbers."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p != 0
    return isinstance(module, RANDOM_MODULES) or not type(module).__module__.startswith(
        ("torch.nn.", "conjoin.")
    )


def depths(graph: fx.Graph, edges: Edges, counts: Callable[[fx.Node], bool]) -> dict[fx.Node, int]:
    """The largest number of nodes that count on a way to each node.

    Of two nodes that count and are of one depth, neither depends on the other.
    """
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = (*node.all_input_nodes, *edges.get(node, ()))
        found[node] = max((found[other] + counts(other) for other in before), default=0)
    return found


def stand_in(edges: Edges, old: Sequence[fx.Node], new: Sequence[fx.Node]) -> None:
    """Puts nodes that take the place of others where all of those had to be."""
    gone = {*old}
    before = set().union(*(edges.pop(node, set()) for node in old)) - gone
    for others in edges.values():
        if not gone.isdisjoint(others):
            others -= gone
            others.update(new)
    for node in new:
        edges[node] = {*before}


def sort(graph: fx.Graph, edges: Edges) -> None:
    """Puts nodes in an order in which all comes after what it needs, changed as little as may be.

    Args:
        graph: the graph, in any order.
        edges: what must come before nodes beside their inputs; nodes that are gone are passed over.
    """
    position = {node: number for number, node in enumerate(graph.nodes)}
    needs: dict[fx.Node, set[fx.Node]] = {}
    needed_by: dict[fx.Node, list[fx.Node]] = {}
    for node in position:
        before = {n for n in (*node.all_input_nodes, *edges.get(node, ())) if n in position}
        needs[node] = before
        for other in before:
            needed_by.setdefault(other, []).append(node)
    ready = [(number, node) for node, number in position.items() if not needs[node]]
    heapq.heapify(ready)
    root = next(iter(graph.nodes)).prev
    while ready:
        _, node = heapq.heappop(ready)
        root.prepend(node)
        for user in needed_by.get(node, ()):
            needs[user].discard(node)
            if not needs[user]:
                heapq.heappush(ready, (position[user], user))
