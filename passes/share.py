"""Equal operations on one tensor become one.

    y_1 = f(x);  y_2 = f(x)        becomes        y = f(x), read by both

for f that acts element by element, joins tensors, gives a view, or is one Linear, Embedding or norm
that is called twice. It saves launches, and shows siblings that were hidden behind it: twenty
`Linear(SiLU(t))` of a diffusion model read one tensor then. In graphs of Dynamo, which guards the
types of all values, a conversion to the type that a tensor has is that very tensor.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import edit, elementwise, hazards, samplewise
from conjoin.graph.epochs import epochs_of
from conjoin.graph.meta import EXAMPLE, storage_of
from conjoin.graph.rewriting import Rewrite

PURE = frozenset(
    "view reshape flatten unflatten permute transpose t movedim squeeze unsqueeze expand "
    "contiguous cat concat stack batched getitem pad long int float double half bfloat16".split()
)
"""Functions and methods that give equal values for equal inputs, beside those of elements."""

CONVERSIONS = frozenset("to type_as float double half bfloat16".split())
"""Methods that give the tensor itself where it is of the wanted type already, and copy it if not.

So they do where a memory format is wanted, but whether it is the tensor's may change with sizes."""


class Share(Rewrite):
    """Computes equal values once."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        changed = _unconvert(graph)
        epochs = epochs_of(graph, modules)
        known: dict[Hashable, list[fx.Node]] = {}

        def is_same(first: fx.Node, node: fx.Node) -> bool:
            # Whoever changes one of two equal values must find the other as it was.
            seen = hazards.is_seen(first, modules) or hazards.is_seen(node, modules)
            return not seen and epochs[first] == epochs[node]

        for node in list(graph.nodes):
            key = _key(node, modules)
            if key is None:
                continue
            firsts = known.setdefault(key, [])
            first = next((first for first in firsts if is_same(first, node)), None)
            if first is None:
                firsts.append(node)
                continue
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            changed = True
        return PassResult(graph_module, changed)


def _unconvert(graph: fx.Graph) -> bool:
    """Takes conversions out that give what they get; whether there were any."""
    idle = [node for node in graph.nodes if _is_idle(node)]
    for node in idle:
        node.replace_all_uses_with(node.all_input_nodes[0])
        graph.erase_node(node)
    return bool(idle)


def _is_idle(node: fx.Node) -> bool:
    if node.op != "call_method" or node.target not in CONVERSIONS:
        return False
    given = (*node.args, *node.kwargs.values())
    if any(isinstance(each, torch.memory_format) for each in given):
        return False
    read, made = (each.meta.get(EXAMPLE) for each in (node.all_input_nodes[0], node))
    if not isinstance(read, Tensor) or not isinstance(made, Tensor):
        return False
    return storage_of(read) is not None and storage_of(made) == storage_of(read)


def _key(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[Hashable, ...] | None:
    """The operation and what it reads; None for what must be done as often as it is written."""
    if not node.all_input_nodes or hazards.writes(node, modules):
        return None
    first = node.all_input_nodes[0]
    found = elementwise.key(node, first, modules)
    if node.op == "call_module":
        found = found or samplewise.key(node, first, modules)
        return None if found is None else (found, first)
    if found is None and hazards.called(node) not in PURE:
        return None
    given = elementwise.comparable((node.args, node.kwargs), lambda input: input)
    return node.op, node.target, given
