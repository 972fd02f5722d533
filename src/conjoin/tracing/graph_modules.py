"""GraphModules in a model, whose graph is what they run: the passes rewrite the graph itself.

A GraphModule needs no trace, and no forward stands behind its graph. Where its siblings are merged
it calls the wide layers, and tells so in `graph` and `code`; to look at it again, or to give the
layers back, each wide layer is taken apart there first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from conjoin.graph import parts, rewriting
from conjoin.graph.parts import Separation
from conjoin.layers.wide import Wide
from conjoin.merging import MERGER, Merger
from conjoin.passes import rewrite


def graph_modules(model: nn.Module) -> Iterator[tuple[str, fx.GraphModule]]:
    """The GraphModules of a model, the model itself among them, with their names."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, fx.GraphModule))


def check(model: nn.Module) -> None:
    """Refuses a model with a graph that does not lint.

    Raises:
        ValueError: a graph does not.
    """
    for name, module in graph_modules(model):
        rewriting.check(module, name)


def rewrite_all(model: nn.Module, meta: dict[str, Any]) -> None:
    """Rewrites the graph of every GraphModule of a model.

    Args:
        model: the model, whose siblings are views.
        meta: what the passes find in the `meta` of the GraphModules meanwhile.
    """
    merger: Merger = meta[MERGER]
    for _, module in list(graph_modules(model)):
        separate(module)
        escapes, merger.escapes = merger.escapes, module is not model
        with _holding(module, meta):
            rewrite(module)
        merger.escapes = escapes


@contextlib.contextmanager
def _holding(module: fx.GraphModule, meta: dict[str, Any]) -> Iterator[None]:
    module.meta.update(meta)
    try:
        yield
    finally:
        for key in meta:
            del module.meta[key]


def separate(module: fx.GraphModule) -> bool:
    """Makes a graph call the views in the place of their wide layers; whether it calls none then.

    The views stay views.
    """
    if not _calls_wide(module):
        return True
    modules = parts.reachable(module)
    before = {*module.graph.nodes}
    Separation(module.graph, modules, parts.separable(module, modules)).run()
    rewriting.finish(module, before)
    return not _calls_wide(module)


def separate_all(model: nn.Module) -> None:
    """Makes all graphs of a model call the views in the place of their wide layers.

    Raises:
        ValueError: a graph was changed since, so that this cannot be done.
    """
    for name, module in graph_modules(model):
        if not separate(module):
            raise ValueError(
                f"the graph{' of ' * bool(name)}{name} calls a wide layer in a way that conjoin "
                "does not know, so its layers cannot be given back. Call conjoin.unfuse before "
                "changing a graph that conjoin has rewritten."
            )


@contextlib.contextmanager
def separated(model: nn.Module) -> Iterator[None]:
    """Has all graphs of a model call the views for a while."""
    held = [(module, module.graph) for _, module in graph_modules(model) if _calls_wide(module)]
    for module, graph in held:
        module.graph = copy.deepcopy(graph)
        separate(module)
    try:
        yield
    finally:
        for module, graph in held:
            module.graph = graph


def _calls_wide(module: fx.GraphModule) -> bool:
    modules = parts.reachable(module)
    return any(
        node.op == "call_module" and isinstance(modules[str(node.target)], Wide)
        for node in module.graph.nodes
    )
