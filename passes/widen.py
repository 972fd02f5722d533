"""Siblings become one wide layer followed by a split.

    y_1 = a(x);  y_2 = b(x)        becomes        y = wide(x);  y_1, y_2 = split(y)

x: (..., in), y_i: (..., out_i), y: (..., sum out_i). The wide layer stands where the first sibling
stood, so what is done to x between the siblings must leave it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from conjoin.graph import edit, hazards
from conjoin.layers.wide import WIDE, View, Wide


def widen(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list[str] | None:
    """Merges the calls of views that make up whole wide layers.

    A wide layer is left to its views where some of them are not called on the same tensor, or
    where something stands between them that might change it: what the views compute is the same,
    in more launches.

    Args:
        graph: the graph, changed in place.
        modules: the modules that it calls, by target.

    Returns:
        The targets of modules that stand between siblings, which must stay free of side effects;
        None where nothing was merged.
    """
    calls: dict[tuple[Wide, fx.Node, int], dict[int, fx.Node]] = {}
    between: dict[tuple[Wide, fx.Node, int], list[str]] = {}
    pure: list[str] = []
    barrier = 0
    for node in graph.nodes:
        view = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(view, View) and (input := _only_input(node)) is not None:
            key = view.wide_layer, input, barrier
            calls.setdefault(key, {}).setdefault(view.conjoin_index, node)
            between.setdefault(key, pure)
        elif not hazards.is_pure(node, modules):
            barrier += 1
            pure = []
        elif node.op == "call_module":
            pure.append(str(node.target))
    relied: list[str] | None = None
    for key, group in calls.items():
        wide, input, _ = key
        if len(group) == len(wide.widths):
            siblings = [group[index] for index in range(len(group))]
            first = min(siblings)
            edit.replace(graph, siblings, first, f"{first.target}.{WIDE}", input, wide)
            relied = [*(relied or []), *between[key]]
    return relied


def _only_input(node: fx.Node) -> fx.Node | None:
    inputs = [*node.args, *node.kwargs.values()]
    return inputs[0] if len(inputs) == 1 and isinstance(inputs[0], fx.Node) else None
