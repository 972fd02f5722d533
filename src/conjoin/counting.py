"""Counts what a report tells of each group: launches before and after, and how deep it goes.

All is counted on copies of the model, of which one is optimized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

from torch import nn

from conjoin.applying import apply, restore
from conjoin.decision import Decision
from conjoin.graph.depth import Chain, Depths
from conjoin.graph.siblings import Candidate, merged_in
from conjoin.launches import UNCOUNTED, StepCount
from conjoin.layers.product import SUFFIX
from conjoin.layers.wide import Wide
from conjoin.reports.report import Group
from conjoin.tracing.copies import Call, Copy, on_copies
from conjoin.tracing.undisturbed import undisturbed


@dataclasses.dataclass(frozen=True)
class Depth:
    """What is behind the siblings of a group.

    Attributes:
        chains: the chains of its branches.
        levels: the layers behind them that are merged, by level.
        launches: those of the chains before and after, but for layers.
    """

    chains: tuple[Chain, ...]
    levels: tuple[tuple[str, ...], ...]
    launches: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Counts:
    """The launches of a call of a model, plain and optimized.

    Attributes:
        plain: those of the plain model, also by layer.
        optimized: those of the optimized model, also by wide layer, by the least name of a layer.
        apart: those of layers whose wide layer did not run, without rewritten forwards.
        levels: what was merged beyond what was found at first, or runs in a rewritten forward.
        refused: what was found in graphs and stays as it is.
        found: what became of what was found; None where nothing was merged.
        depths: what is behind groups, by their layers.
    """

    plain: StepCount = UNCOUNTED
    optimized: StepCount = UNCOUNTED
    apart: StepCount = UNCOUNTED
    levels: tuple[Candidate, ...] = ()
    depths: Mapping[frozenset[str], Depth] = dataclasses.field(default_factory=dict)
    refused: tuple[Candidate, ...] = ()
    found: tuple[Candidate, ...] | None = None

    def groups(self, found: Sequence[Candidate]) -> Iterator[Candidate]:
        """What was found, and what was merged beyond, but for what is behind another group."""
        found = found if self.found is None else self.found
        known = {frozenset(names) for depth in self.depths.values() for names in depth.levels}
        merged = {name for level in self.levels for name in level.layers}
        told: set[str] = set()
        for candidate in (*found, *self.levels):
            told |= {*candidate.layers}
            # Tables that are no siblings may still run at once with others.
            elsewhere = candidate.refusal is not None and merged.issuperset(candidate.layers)
            if frozenset(candidate.layers) not in known and not elsewhere:
                known.add(frozenset(candidate.layers))
                yield candidate
        # What one graph refuses another one may merge, or refuse for some other reason.
        for candidate in self.refused:
            if told.isdisjoint(candidate.layers):
                told |= {*candidate.layers}
                yield candidate

    def chains(self, layers: tuple[str, ...]) -> tuple[Chain, ...]:
        """The chains of a group's branches."""
        depth = self.depths.get(frozenset(layers))
        return () if depth is None else depth.chains

    def of(self, layers: tuple[str, ...]) -> tuple[int, int] | None:
        """The launches of a group before and after, with all that is behind it."""
        if self.plain.by_layer is None or self.optimized.by_layer is None:
            return None
        depth = self.depths.get(frozenset(layers))
        if depth is None:
            return self._within(layers)
        each = [depth.launches, *map(self._within, (layers, *depth.levels))]
        return sum(before for before, _ in each), sum(after for _, after in each)

    def _within(self, layers: tuple[str, ...]) -> tuple[int, int]:
        """The launches within layers before and after."""
        plain, optimized = self.plain.by_layer or {}, self.optimized.by_layer or {}
        before = sum(plain.get(name, 0) for name in layers)
        after = optimized.get(min(layers), 0)
        if not after:  # They were called one by one, or left apart.
            apart = self.apart.by_layer or {}
            after = sum(apart.get(name, plain.get(name, 0)) for name in layers)
        return before, after


def count_model(model: nn.Module, call: Call) -> StepCount:
    """The launches and the memory of a call of a model as it is."""
    with undisturbed(model, call):
        return on_copies(model, lambda copied: copied().count(call, {})) or UNCOUNTED


def count_groups(model: nn.Module, call: Call, decision: Decision) -> Counts:
    """The launches of a call of the model, plain and optimized."""
    with undisturbed(model, call):
        return on_copies(model, lambda copied: _count_on(copied, call, decision)) or Counts()


def find_levels(model: nn.Module, decision: Decision) -> Counts:
    """What is merged beyond what was found, where there is no call to count it in."""
    with undisturbed(model):
        return on_copies(model, lambda copied: _levels_on(copied().model, decision)) or Counts()


def _levels_on(model: nn.Module, decision: Decision) -> Counts:
    """That of a copy, which is optimized."""
    merger, found = apply(model, decision)
    return Counts(levels=tuple(merger.levels), refused=tuple(merger.refused.values()), found=found)


def _count_on(copied: Callable[[], Copy], call: Call, decision: Decision) -> Counts:
    """The launches, counted on copies of the model."""
    plain, optimized = copied(), copied()
    restore(plain.model)
    depths = Depths(optimized.model)
    merger, found = apply(optimized.model, decision, depths)
    decision, refused = dataclasses.replace(decision, found=found), tuple(merger.refused.values())
    merged = merged_in(optimized.model)
    told = (*found, *refused, *merged.values())
    names = {name for candidate in told for name in candidate.layers}
    depths.noting = True
    optimized.count(call, {})
    depths.noting = False
    fused = optimized.count(call, {min(each.layers): wide for wide, each in merged.items()})
    launched = fused.by_layer or {}
    idle = [each.layers for each in merged.values() if not launched.get(min(each.layers))]
    return Counts(
        plain=plain.count(call, _named(plain.model, names), _products(plain.model, names)),
        optimized=fused,
        apart=_count_apart(copied(), call, decision, idle) if idle else UNCOUNTED,
        levels=(*merger.levels, *map(merged.__getitem__, depths.roots)),
        depths=_depths(depths, merged),
        refused=refused,
        found=found,
    )


def _count_apart(
    apart: Copy, call: Call, decision: Decision, groups: Sequence[tuple[str, ...]]
) -> StepCount:
    """The launches where no forward is rewritten, within the layers of groups."""
    decision.merger(apart.model).merge_all(decision.found)
    names = {name for layers in groups for name in layers}
    made = apart.count(call, _named(apart.model, names), _products(apart.model, names))
    return StepCount(made.count, {**dict.fromkeys(names, 0), **(made.by_layer or {})})


def _named(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The layers of these names, but for products that are none in this model."""
    return {name: module for name, module in model.named_modules() if name in names}


def _products(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The weights of products, by the names of their layers."""
    raw = (name for name in names if name.endswith(SUFFIX))
    return {name: model.get_parameter(name.removesuffix(SUFFIX)) for name in raw}


def _depths(depths: Depths, merged: Mapping[Wide, Candidate]) -> dict[frozenset[str], Depth]:
    """What is behind each group of a model, of what is merged in it."""
    names = {wide: candidate.layers for wide, candidate in merged.items()}
    found: dict[frozenset[str], Depth] = {}
    for root in dict.fromkeys(depths.roots.values()):
        behind = [names[wide] for wide, at in depths.roots.items() if at is root is not wide]
        launches = depths.before[root], depths.after[root]
        chains = depths.chains.get(root, ())
        found[frozenset(names[root])] = Depth(chains, tuple(behind), launches)
    return found


def group_of(candidate: Candidate, counts: Counts) -> Group:
    """The row of a report for a candidate."""
    refusal = candidate.refusal
    return Group(
        kind=candidate.kind.name,
        layers=tuple(name.removesuffix(SUFFIX) for name in candidate.layers),
        fused=refusal is None,
        reason=None if refusal is None else refusal.reason,
        detail=candidate.note if refusal is None else refusal.detail.replace(SUFFIX, ""),
        widths=candidate.widths,
        launches=counts.of(candidate.layers),
        depth=counts.chains(candidate.layers),
        figures=candidate.figures,
    )
