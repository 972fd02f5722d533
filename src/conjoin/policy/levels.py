"""Does it pay to merge layers that read tensors of their own? Asked while graphs are rewritten."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from conjoin.graph.siblings import Candidate
from conjoin.graph.site import Sightings
from conjoin.layers import Kind
from conjoin.policy import gathering, machine
from conjoin.policy.cost import Layout, level
from conjoin.policy.figures import Figures, Policy
from conjoin.policy.workload import trains, workload_of


class LevelPolicy:
    """Decides on layers that read tensors of their own: those behind siblings, and tables.

    Attributes:
        policy: which of them to merge.
        training: whether a backward pass is to be quick too.
    """

    def __init__(self, model: nn.Module, sightings: Sightings, policy: Policy = "auto") -> None:
        """By what was seen of a model, which is in the mode that it is to be quick in."""
        self.policy = policy
        self.training = trains(model)
        self._model = model
        self._sightings = sightings

    def against(self, candidate: Candidate, layout: Layout) -> Figures | None:
        """What is against merging layers that read tensors that lie so; None where nothing is."""
        seen, names = self._sightings, candidate.layers
        if self.policy == "always" or not seen.shapes.keys() >= {*names}:
            return None
        layers = tuple(self._model.get_submodule(name) for name in names)
        group = workload_of(candidate, layers, seen, self.training)
        if group is None:
            return None
        known = machine.constants(group.weight.device, group.weight.dtype)
        if known is None:
            return None
        figures = level(known, group.works(), group.setting(), layout)
        return figures if figures.layers > 1 else None

    def against_gathering(
        self, kind: Kind, layers: Sequence[nn.Module], names: Sequence[str]
    ) -> Figures | None:
        """What is against running tables at once that launch fewer operations then.

        Args:
            kind: their kind.
            layers: the tables, of the model or of a copy.
            names: their qualified names.
        """
        if self.policy == "always":
            return None
        shapes = [self._sightings.shapes.get(name) for name in names]
        return gathering.against(kind, layers, shapes, self.training)

    def gathers(self, kind: Kind, count: int) -> bool:
        """Whether so many tables are looked at."""
        return self.policy == "always" or gathering.launches_fewer(kind, count)
