"""Siblings become one wide layer followed by a split.

    y_1 = a(x);  y_2 = b(x)        becomes        y = wide(x);  y_1, y_2 = split(y)

x: (..., in), y_i: (..., out_i), y: (..., sum out_i). The wide layer stands where the first sibling
stood, so what is done to x between the siblings must leave it as it is.
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from conjoin.graph import edit, hazards
from conjoin.layers.wide import WIDE, View, Wide


class Widen(PassBase):
    """Merges the calls of views that make up whole wide layers.

    A wide layer is left to its views where some of them are not called on the same tensor, or
    where something stands between them that might change it: what the views compute is the same,
    in more launches.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place; modules that stand between siblings must stay pure."""
        modules = edit.called_modules(graph_module)
        calls: dict[tuple[Wide, fx.Node, int], dict[int, fx.Node]] = {}
        for node, epoch in hazards.epochs(graph_module.graph, modules).items():
            if node.op == "call_module" and not hazards.is_opaque(modules[str(node.target)]):
                view = modules[str(node.target)]
                if isinstance(view, View) and (input := edit.only_input(node)) is not None:
                    key = view.wide_layer, input, epoch
                    calls.setdefault(key, {}).setdefault(view.conjoin_index, node)
        whole = {key: group for key, group in calls.items() if len(group) == len(key[0].widths)}
        for (wide, _, _), group in whole.items():
            siblings = [group[index] for index in range(len(group))]
            edit.replace(graph_module.graph, siblings, f"{min(siblings).target}.{WIDE}", wide)
        return PassResult(graph_module, bool(whole))
