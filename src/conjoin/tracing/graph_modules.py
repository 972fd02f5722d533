"""Rewrites the graphs of the GraphModules in a model, and undoes that.

A GraphModule needs no trace, and no forward stands behind its graph. Where its siblings are merged
it calls the wide layers, and tells so in `graph` and `code`; to look at it again, or to give the
layers back, each wide layer is taken apart there first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from torch import fx, nn

from conjoin import merging
from conjoin.graph import products, rewriting
from conjoin.graph.separation import Separation, all_modules, separable
from conjoin.layers.owner import lent_to
from conjoin.layers.view import View
from conjoin.layers.wide import Wide
from conjoin.merging import Merger
from conjoin.passes import Lift, rewrite


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


def rewrite_all(model: nn.Module, merger: Merger) -> set[Wide]:
    """Rewrites the graph of every GraphModule of a model.

    Args:
        model: the model, whose siblings are views.
        merger: its merger.

    Returns:
        The wide layers that the graphs call.
    """
    called: set[Wide] = set()
    watch = merger.rewritten

    def noted(module: fx.GraphModule) -> None:
        called.update(merging.wides_called(module).values())
        if watch is not None:  # Which may put another graph in the place of this one.
            watch(module)

    merger.rewritten = noted
    try:
        for _, module in list(graph_modules(model)):
            separate(module)
            with merging.of_graph(module, merger):
                rewrite(module)
    finally:
        merger.rewritten = watch
    return called


def separate(module: fx.GraphModule) -> bool:
    """Makes a graph call the views in the place of their wide layers; whether it calls none then.

    The views stay views.
    """
    if not _calls_wide(module):
        return True
    modules = all_modules(module)
    before = {*module.graph.nodes}
    Separation(module.graph, modules, separable(module, modules)).run()
    rewriting.finish(module, before)
    return not _calls_wide(module)


def separate_all(model: nn.Module) -> None:
    """Makes all graphs of a model call the views in the place of their wide layers."""
    for _, module in graph_modules(model):
        separate(module)


def restore_all(model: nn.Module) -> None:
    """Makes all graphs of a model what they were before they were rewritten, raw products too.

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
        lent = {
            f"{path}.{key}".lstrip("."): {t: f"{path}.{n}".lstrip(".") for t, n in names.items()}
            for path, inner in module.named_modules()
            for key, names in lent_to(inner).items()
        }
        if lent:
            before = {*module.graph.nodes}
            products.write_out(module.graph, all_modules(module), lent)
            rewriting.finish(module, before)


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


@contextlib.contextmanager
def lifted(model: nn.Module) -> Iterator[None]:
    """Has the graphs of a model call layers in the place of operations on their parameters.

    Those in which nothing is merged meanwhile are what they were in the end.
    """
    changed: list[tuple[fx.GraphModule, fx.Graph, dict[str, nn.Module]]] = []
    for _, module in list(graph_modules(model)):
        graph, held = copy.deepcopy(module.graph), dict(module.named_modules())
        result = Lift()(module)
        if result is not None and result.modified:
            changed.append((module, graph, held))
    try:
        yield
    finally:
        for module, graph, held in changed:
            layers = {n: m for n, m in module.named_modules() if held.get(n, m) is not m}
            if _calls_wide(module) or any(isinstance(layer, View) for layer in layers.values()):
                continue
            for name in layers:
                module.set_submodule(name, held[name])
            module.graph = graph


def _calls_wide(module: fx.GraphModule) -> bool:
    return bool(merging.wides_called(module))
