"""What was found in a model and decided of it, done to the model; and the way back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from conjoin.graph.depth import Depths
from conjoin.graph.siblings import Candidate
from conjoin.graph.site import Sightings
from conjoin.layers import Kind, activation
from conjoin.layers.enclosing import unmark
from conjoin.layers.owner import reclaim
from conjoin.layers.releasing import release
from conjoin.layers.view import views
from conjoin.merging import MERGER, Merger
from conjoin.policy.cost import Policy
from conjoin.policy.deciding import DECIDED, leave_apart
from conjoin.policy.levels import Against
from conjoin.tracing import graph_modules, regions


def apply(
    model: nn.Module,
    found: Sequence[Candidate],
    sightings: Sightings,
    kinds: tuple[Kind, ...],
    against: Against | None = None,
    depths: Depths | None = None,
    policy: Policy = "auto",
) -> tuple[Merger, tuple[Candidate, ...]]:
    """Merges groups, and what the rewritten forwards can run at once beyond them.

    Args:
        model: the model, changed in place.
        found: its groups and refusals.
        sightings: what was seen of it.
        kinds: the kinds of layer.
        against: what is against merging layers behind the groups, if anything.
        depths: what watches the rewritten graphs, for a report.
        policy: which of the layers behind groups are merged, where that may not pay.

    Returns:
        The merger, and what became of what was found.
    """
    merger = Merger(model, kinds, sightings, found, against=against, policy=policy)
    if depths is not None:
        merger.rewritten = depths.watch
    if merger.merge_all(found):
        regions.uninstall(model)  # They may know wide layers that are no more.
    called = graph_modules.rewrite_all(model, merger)
    while True:
        regions.install(model, sightings.calls, {MERGER: merger})
        running = regions.covered(model) | called
        merger.give_back(running)
        settled = leave_apart(model, found, running, regions.cuts(model))
        if settled == tuple(found):
            return merger, settled
        merger.leave(settled)
        found = settled
        regions.uninstall(model)  # They know views that are none any more.


def restore(model: nn.Module) -> None:
    """Gives a model its own layers, classes and forwards back, with the values of now."""
    regions.uninstall(model)
    graph_modules.give_back(model)
    for _, view in list(views(model)):
        release(view)
    for module in list(model.modules()):
        reclaim(module)
        activation.forget(module)
        unmark(module)
        vars(module).pop(DECIDED, None)
