"""Equal operations on one tensor become one.

    y_1 = f(x);  y_2 = f(x)        becomes        y = f(x), read by both

for f that acts element by element, joins tensors, gives a view, or is one Linear, Embedding or norm
that is called twice. It saves launches, and shows siblings that were hidden behind it: twenty
`Linear(SiLU(t))` of a diffusion model read one tensor then.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph import edit, elementwise, hazards, samplewise
from conjoin.graph.epochs import epochs_of
from conjoin.graph.rewriting import Rewrite

PURE = frozenset(
    "view reshape flatten unflatten permute transpose t movedim squeeze unsqueeze expand "
    "contiguous cat concat stack batched getitem pad long int float double half bfloat16".split()
)
"""Functions and methods that give equal values for equal inputs, beside those of elements."""


class Share(Rewrite):
    """Computes equal values once."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        epochs = epochs_of(graph, modules)
        known: dict[Hashable, list[fx.Node]] = {}
        changed = False

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


def _key(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[Hashable, ...] | None:
    """The operation and what it reads; None for what must be done as often as it is written."""
    if not node.all_input_nodes or any(True for _ in hazards.written(node, modules)):
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
