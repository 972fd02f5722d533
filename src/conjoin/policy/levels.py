"""Does it pay to run layers behind the siblings at once? Asked while graphs are rewritten."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from conjoin.graph.siblings import Candidate
from conjoin.graph.site import Sightings
from conjoin.policy import machine
from conjoin.policy.cost import Figures, Lie, Policy, level
from conjoin.policy.deciding import group_of, trains

Against = Callable[[Candidate, Lie], Figures | None]
"""What is against merging layers that read tensors that lie so; None where nothing is."""


def estimates(model: nn.Module, sightings: Sightings, policy: Policy) -> Against | None:
    """What an estimate is against; None where all is merged, whatever it takes.

    Args:
        model: the model, in the mode that it is to be quick in.
        sightings: what was seen of it.
        policy: which layers to merge.
    """
    if policy == "always" or not sightings.shapes:
        return None
    training = trains(model)

    def against(candidate: Candidate, lie: Lie) -> Figures | None:
        if not sightings.shapes.keys() >= {*candidate.layers}:
            return None
        layers = tuple(model.get_submodule(name) for name in candidate.layers)
        group = group_of(candidate, layers, sightings, training)
        if group is None:
            return None
        known = machine.constants(group.weight.device, group.weight.dtype)
        if known is None:
            return None
        figures = level(known, group.works(), group.setting(), lie)
        return figures if figures.layers > 1 else None

    return against
