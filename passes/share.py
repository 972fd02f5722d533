"""Equal operations on one tensor become one.

    y_1 = f(x);  y_2 = f(x)        becomes        y = f(x), read by both

for f that acts element by element, or gives a view. It saves launches, and shows siblings that
were hidden behind it: twenty `Linear(SiLU(t))` of a diffusion model read one tensor then.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from conjoin.graph import edit, elementwise, hazards

VIEWS = frozenset(
    "view reshape flatten unflatten permute transpose t movedim squeeze unsqueeze expand "
    "contiguous".split()
)
"""Methods, and functions of the same names, that give the same values in another shape."""


class Share(PassBase):
    """Computes equal values once."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place."""
        graph, modules = graph_module.graph, edit.called_modules(graph_module)
        epochs = hazards.epochs(graph, modules)
        known: dict[Hashable, fx.Node] = {}
        changed = False
        for node in list(graph.nodes):
            key = _key(node, modules)
            # Whoever changes one of two equal values must find the other as it was.
            if key is None or hazards.is_seen(node, modules):
                continue
            first = known.setdefault((*key, epochs[node]), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)
                changed = True
        return PassResult(graph_module, changed)


def _key(node: fx.Node, modules: Mapping[str, nn.Module]) -> tuple[Hashable, ...] | None:
    """The operation and what it reads; None for what must be done as often as it is written."""
    inputs = node.all_input_nodes
    if len(inputs) != 1 or any(True for _ in hazards.written(node, modules)):
        return None
    found = elementwise.key(node, inputs[0], modules)
    if found is None and hazards.called(node) in VIEWS and hazards.is_pure(node, modules):
        frozen = elementwise.frozen
        found = (
            node.op, node.target, frozen(node.args, inputs[0]), frozen(node.kwargs, inputs[0])
        )  # fmt: skip
    return None if found is None else (found, inputs[0])
