"""The only place where a graph is changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, fx
from torch.fx.node import map_arg


def replace(
    graph: fx.Graph,
    siblings: Sequence[fx.Node],
    first: fx.Node,
    target: str,
    input: fx.Node,
    split: Callable[[Tensor], Sequence[Tensor]],
) -> None:
    """Puts one call of a module and its split in the place of the calls of siblings.

    Args:
        graph: the graph, changed in place.
        siblings: the calls, in the order of the parts.
        first: the call that comes first in the graph; the new one stands in its place.
        target: the module that is called instead.
        input: what it is called with.
        split: gives the parts of its output; run on a proxy, so that its operations are recorded.
    """
    with graph.inserting_before(first):
        whole = graph.call_module(target, (input,))
        whole.meta = dict(first.meta)
        parts = split(fx.Proxy(whole))  # type: ignore[arg-type]
    made = {
        sibling: part.node  # type: ignore[attr-defined]
        for sibling, part in zip(siblings, parts, strict=True)
    }
    for sibling, node in made.items():
        node.meta = dict(sibling.meta)
    # All at once: a node that reads a thousand siblings is rewritten once, not a thousand times.
    for user in {user: None for sibling in siblings for user in sibling.users}:
        user.args = map_arg(user.args, lambda node: made.get(node, node))
        user.kwargs = map_arg(user.kwargs, lambda node: made.get(node, node))
    for sibling in siblings:
        graph.erase_node(sibling)
