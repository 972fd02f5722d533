"""Finds the groups of a model, and decides which of them are merged, and how wide."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from torch import nn

from conjoin.applying import apply, restore
from conjoin.graph.siblings import Candidate, candidates
from conjoin.graph.site import Sightings, Untraced
from conjoin.layers import Kind
from conjoin.layers.view import views
from conjoin.merging import Merger
from conjoin.policy.budget import Fitted, Need, fit
from conjoin.policy.deciding import decide, noted
from conjoin.policy.figures import Policy
from conjoin.policy.levels import LevelPolicy
from conjoin.tracing.copies import Call, Copy, UncopyableError, on_copies
from conjoin.tracing.observe import observe
from conjoin.tracing.symbolic import trace
from conjoin.tracing.undisturbed import undisturbed


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """What was found in a model, and decided of it.

    Attributes:
        found: its groups and refusals.
        sightings: what was seen of it.
        kinds: the kinds of layer.
        level_policy: what decides on the layers behind its groups.
        peak: the predicted peak of the memory of a call, where that is limited.
    """

    found: Sequence[Candidate]
    sightings: Sightings
    kinds: tuple[Kind, ...]
    level_policy: LevelPolicy
    peak: int | None = None

    def merger(self, model: nn.Module) -> Merger:
        """What merges the layers of the model, or of a copy."""
        return Merger(model, self.kinds, self.sightings, self.found, level_policy=self.level_policy)


def decide_on(
    model: nn.Module,
    calls: list[Call],
    kinds: tuple[Kind, ...],
    policy: Policy,
    limit: int | None,
    *,
    again: bool,
) -> Decision:
    """Finds the groups of a model, and decides on them by the policy and a limit of memory.

    Args:
        model: the model.
        calls: its example calls.
        kinds: the kinds of layer.
        policy: which groups to merge.
        limit: the bytes that a call may need, if that is limited.
        again: whether groups that were left alone are decided again.
    """
    found, sightings = _find(model, calls, kinds)
    found = decide(model, noted(model, found, again=again), sightings, policy)
    decision = Decision(found, sightings, kinds, LevelPolicy(model, sightings, policy))
    return decision if limit is None else _fit(model, calls[0], decision, limit)


def _fit(model: nn.Module, call: Call, decision: Decision, limit: int) -> Decision:
    """Narrows the groups until a call is predicted, on copies, to stay within a limit of memory."""

    def fitted(copied: Callable[[], Copy]) -> Fitted:
        def need(groups: Sequence[Candidate]) -> Need:
            merged = copied()
            merger, _ = apply(merged.model, dataclasses.replace(decision, found=groups))
            return Need(merged.count(call, {}).peak or 0, tuple(merger.levels))

        plain = copied()
        restore(plain.model)
        merged = frozenset(name for name, _ in views(model))
        peak = plain.count(call, {}).peak or 0
        return fit(tuple(decision.found), decision.sightings, need, peak, limit, merged)

    with undisturbed(model, call):
        settled = on_copies(model, fitted)
    if settled is None:
        raise ValueError(
            "memory_budget was given, and how much memory the model needs is predicted on copies "
            "of it, which cannot be made. Leave memory_budget out."
        )
    return dataclasses.replace(decision, found=settled.found, peak=settled.peak)


def _find(
    model: nn.Module, calls: list[Call], kinds: tuple[Kind, ...]
) -> tuple[tuple[Candidate, ...], Sightings]:
    """The groups and refusals of a model, and what was seen of it."""
    # A lazy layer does not run on fake tensors; a trace shows which siblings it would have.
    lazy = any(nn.parameter.is_lazy(parameter) for parameter in model.parameters())
    try:
        sightings = observe(model, calls, kinds) if calls and not lazy else trace(model, kinds)
    except UncopyableError as error:
        untraced = Untraced("", f"it was traced and not run, since it cannot be copied: {error}")
        sightings = trace(model, kinds)
        sightings = dataclasses.replace(sightings, untraced=(untraced, *sightings.untraced))
    return candidates(model, sightings, kinds), sightings
