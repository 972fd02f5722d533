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
    between: dict[tuple[Wide, fx.Node, int], list[fx.Node]] = {}
    pure: list[fx.Node] = []
    barrier = 0
    for node in graph.nodes:
        if not hazards.is_pure(node, modules):
            barrier += 1
            pure = []
        elif node.op == "call_module":
            pure.append(node)
            view = modules[str(node.target)]
            if isinstance(view, View) and (input := edit.only_input(node)) is not None:
                key = view.wide_layer, input, barrier
                calls.setdefault(key, {}).setdefault(view.conjoin_index, node)
                between.setdefault(key, pure)
    whole = {key: group for key, group in calls.items() if len(group) == len(key[0].widths)}
    merged = {node for group in whole.values() for node in group.values()}
    for (wide, _, _), group in whole.items():
        siblings = [group[index] for index in range(len(group))]
        edit.replace(graph, siblings, f"{min(siblings).target}.{WIDE}", wide)
    if not whole:
        return None
    relied = {node: None for key in whole for node in between[key] if node not in merged}
    return [str(node.target) for node in relied]
