"""Small edits of graphs, and questions about nodes, that many files have in common."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Argument, map_arg

from conjoin.layers.wide import Wide


def replace(
    graph: fx.Graph,
    siblings: Sequence[fx.Node],
    target: str,
    wide: Wide,
) -> None:
    """Puts one call of a module and its split in the place of the calls of siblings.

    Args:
        graph: the graph, changed in place.
        siblings: the calls, in the order of the parts, on the same input. The new call stands in
            the place of the one that comes first in the graph.
        target: the module that is called instead.
        wide: that module.
    """
    first = min(siblings)
    with graph.inserting_before(first):
        whole = graph.call_module(target, (only_input(first),))
        whole.meta = dict(first.meta)
        function, arguments = wide.kind.split(wide)
        parts = graph.call_function(function, (whole, *arguments))
        nodes = [graph.call_function(operator.getitem, (parts, i)) for i in range(len(siblings))]
        for i in sorted(wide.contiguous):
            # Not `contiguous`, which leaves a slice of a batch of one as it is, strides and all.
            format: Argument = torch.contiguous_format
            nodes[i] = graph.call_method("clone", (nodes[i],), {"memory_format": format})
    made = dict(zip(siblings, nodes, strict=True))
    for sibling, node in made.items():
        node.meta = dict(sibling.meta)
    # All at once: a node that reads a thousand siblings is rewritten once, not a thousand times.
    for user in {user: None for sibling in siblings for user in sibling.users}:
        user.args = map_arg(user.args, lambda node: made.get(node, node))
        user.kwargs = map_arg(user.kwargs, lambda node: made.get(node, node))
    for sibling in siblings:
        graph.erase_node(sibling)


def copied(graph: fx.Graph, node: fx.Node, at: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """Puts a copy of a node of another graph at the end, under the name that it has there.

    Args:
        graph: the graph.
        node: the node.
        at: what it reads in the place of what it reads there.
    """
    made = graph.node_copy(node, at)
    made.name = node.name  # Which need not be one that a graph would give, such as `input`.
    return made


def erase_unread(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Takes out those of some nodes that nothing reads."""
    for node in dict.fromkeys(nodes):
        if not node.users:
            graph.erase_node(node)


def only_input(call: fx.Node) -> fx.Node | None:
    """The node that a call of a module reads, if it reads no more and takes no options."""
    inputs = [*call.args, *call.kwargs.values()]
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], fx.Node) else None


def arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    """The arguments of a node by name, as far as they are given; further keywords among them."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


class Modules(dict[str, nn.Module]):
    """The modules of a graph by target, also those that it comes to call later."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        """Knows what the graph calls now."""
        super().__init__()
        self._owner = graph_module
        for node in graph_module.graph.nodes:
            if node.op == "call_module":
                self[str(node.target)]

    def __missing__(self, target: str) -> nn.Module:
        found: nn.Module | None = self._owner
        for name in target.split("."):
            found = None if found is None else found._modules.get(name)
        if found is None:  # It is no child; PyTorch, which looks for that last, knows or raises.
            found = self._owner.get_submodule(target)
        self[target] = found
        return found


def called_modules(graph_module: fx.GraphModule) -> Modules:
    """The modules that a graph calls, by target."""
    return Modules(graph_module)
