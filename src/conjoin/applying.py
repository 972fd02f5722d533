"""Merges what was decided in a model, rewrites its forwards, and undoes both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from conjoin.graph.depth import Depths
from conjoin.graph.siblings import Candidate
from conjoin.layers import activation
from conjoin.layers.enclosing import unmark
from conjoin.layers.owner import reclaim
from conjoin.layers.releasing import release
from conjoin.layers.view import views
from conjoin.merging import MERGER, Merger
from conjoin.policy.deciding import DECIDED, leave_apart
from conjoin.tracing import graph_modules, regions

if TYPE_CHECKING:
    from conjoin.decision import Decision


def apply(
    model: nn.Module, decision: Decision, depths: Depths | None = None
) -> tuple[Merger, tuple[Candidate, ...]]:
    """Merges groups, and what the rewritten forwards can run at once beyond them.

    Args:
        model: the model, changed in place.
        decision: what is to be done to it.
        depths: what watches the rewritten graphs, for a report.

    Returns:
        The merger, and what became of what was found.
    """
    merger, found = decision.merger(model), tuple(decision.found)
    if depths is not None:
        merger.rewritten = depths.watch
    if merger.merge_all(found):
        regions.uninstall(model)  # They may know wide layers that are no more.
    called = graph_modules.rewrite_all(model, merger)
    while True:
        regions.install(model, decision.sightings.calls, {MERGER: merger})
        runs = regions.runs(model)
        running = runs.keys() | called
        merger.release_products(running)
        settled = leave_apart(model, found, running, runs)
        if settled == found:
            return merger, settled
        found = settled
        regions.uninstall(model)  # They know views that are none any more.
        merger.release_levels()  # It may be behind nothing now; what is not is merged once more.
        merger.leave(settled)


def restore(model: nn.Module) -> None:
    """Gives a model its own layers, classes and forwards back, with the values of now."""
    regions.uninstall(model)
    graph_modules.restore_all(model)
    for _, view in list(views(model)):
        release(view)
    for module in list(model.modules()):
        reclaim(module)
        activation.forget(module)
        unmark(module)
        vars(module).pop(DECIDED, None)
