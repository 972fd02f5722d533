"""What was found in a model and decided of it, done to the model; and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
from conjoin.policy.deciding import DECIDED, leave_apart
from conjoin.policy.levels import Levels
from conjoin.tracing import graph_modules, regions


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done to a model, or to a copy of it.

    Attributes:
        found: its groups and refusals.
        sightings: what was seen of it.
        kinds: the kinds of layer.
        levels: what decides of the layers behind its groups.
        peak: the predicted peak of the memory of a call, where that is limited.
    """

    found: Sequence[Candidate]
    sightings: Sightings
    kinds: tuple[Kind, ...]
    levels: Levels
    peak: int | None = None

    def merger(self, model: nn.Module) -> Merger:
        """What merges the layers of the model, or of a copy."""
        return Merger(model, self.kinds, self.sightings, self.found, asked=self.levels)


def apply(
    model: nn.Module, plan: Plan, depths: Depths | None = None
) -> tuple[Merger, tuple[Candidate, ...]]:
    """Merges groups, and what the rewritten forwards can run at once beyond them.

    Args:
        model: the model, changed in place.
        plan: what is to be done to it.
        depths: what watches the rewritten graphs, for a report.

    Returns:
        The merger, and what became of what was found.
    """
    merger, found = plan.merger(model), tuple(plan.found)
    if depths is not None:
        merger.rewritten = depths.watch
    if merger.merge_all(found):
        regions.uninstall(model)  # They may know wide layers that are no more.
    called = graph_modules.rewrite_all(model, merger)
    while True:
        regions.install(model, plan.sightings.calls, {MERGER: merger})
        runs = regions.runs(model)
        running = runs.keys() | called
        merger.give_back(running)
        settled = leave_apart(model, found, running, runs)
        if settled == found:
            return merger, settled
        found = settled
        regions.uninstall(model)  # They know views that are none any more.
        merger.take_back()  # It may be behind nothing now; what is not is merged once more.
        merger.leave(settled)


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
