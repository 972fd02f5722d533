"""What a report tells of a model's groups: the launches before and after, and how deep they go.

All is counted on copies of the model, of which one is optimized.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

from conjoin.applying import Plan, apply, restore
from conjoin.graph.depth import Chain, Depths
from conjoin.graph.siblings import Candidate
from conjoin.launches import UNCOUNTED, Counted
from conjoin.layers import PRODUCTS
from conjoin.layers.owner import raw_parameters
from conjoin.layers.product import SUFFIX
from conjoin.layers.view import wides
from conjoin.layers.wide import Wide
from conjoin.merging import Level
from conjoin.reports.report import Group
from conjoin.tracing.copies import Call, Copy, UncopyableError
from conjoin.tracing.undisturbed import undisturbed

Result = TypeVar("Result")


def on_copies(model: nn.Module, work: Callable[[Callable[[], Copy]], Result]) -> Result | None:
    """What comes of work on copies of a model, fake ones if they carry it; None without copies."""
    with contextlib.suppress(UncopyableError):
        try:
            return work(functools.partial(Copy, model, fake=True))
        except Exception:  # noqa: BLE001 - As in `observe`: whatever fake tensors do not carry, the real run decides.
            return work(functools.partial(Copy, model, fake=False))
    return None


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

    plain: Counted = UNCOUNTED
    optimized: Counted = UNCOUNTED
    apart: Counted = UNCOUNTED
    levels: tuple[Level, ...] = ()
    depths: Mapping[frozenset[str], Depth] = dataclasses.field(default_factory=dict)
    refused: tuple[Candidate, ...] = ()
    found: tuple[Candidate, ...] | None = None

    def groups(self, found: Sequence[Candidate]) -> Iterator[Candidate]:
        """What was found, and what was merged beyond, but for what is behind another group."""
        found = found if self.found is None else self.found
        known = {frozenset(names) for depth in self.depths.values() for names in depth.levels}
        levels = [Candidate(level.kind, level.layers, level.widths) for level in self.levels]
        merged = {name for level in levels for name in level.layers}
        told: set[str] = set()
        for candidate in (*found, *levels):
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


def counted(model: nn.Module, call: Call) -> Counted:
    """The launches and the memory of a call of a model as it is."""
    return on_copies(model, lambda copied: copied().count(call, {})) or UNCOUNTED


def count(model: nn.Module, call: Call, plan: Plan) -> Counts:
    """The launches of a call of the model, plain and optimized."""
    return on_copies(model, lambda copied: _count_on(copied, call, plan)) or Counts()


def uncounted(model: nn.Module, plan: Plan) -> Counts:
    """What becomes of products with raw Parameters, which are found where a forward is traced."""
    if any(True for _ in raw_parameters(model)):
        with contextlib.suppress(UncopyableError), undisturbed(model):
            merger, _ = apply(Copy(model, fake=False).model, plan)
            levels = tuple(level for level in merger.levels if level.kind in PRODUCTS)
            return Counts(levels=levels, refused=tuple(merger.refused.values()))
    return Counts()


def _count_on(copied: Callable[[], Copy], call: Call, plan: Plan) -> Counts:
    """The launches, counted on copies of the model."""
    plain, optimized = copied(), copied()
    restore(plain.model)
    depths = Depths(optimized.model)
    merger, found = apply(optimized.model, plan, depths)
    plan = dataclasses.replace(plan, found=found)
    levels = _levels(optimized.model)
    groups = [candidate.layers for candidate in (*found, *merger.refused.values())]
    groups += [level.layers for level in levels.values()]
    names = {name for layers in groups for name in layers}
    with undisturbed(plain.model):
        depths.noting = True
        optimized.count(call, {})
        depths.noting = False
        fused = optimized.count(call, {min(level.layers): wide for wide, level in levels.items()})
        launched = fused.by_layer or {}
        idle = [level.layers for level in levels.values() if not launched.get(min(level.layers))]
        return Counts(
            plain.count(call, _named(plain.model, names), _products(plain.model, names)),
            fused,
            _count_apart(copied(), call, plan, idle) if idle else UNCOUNTED,
            (*merger.levels, *map(levels.__getitem__, depths.roots)),
            _depths(depths, optimized.model),
            tuple(merger.refused.values()),
            found,
        )


def _count_apart(apart: Copy, call: Call, plan: Plan, groups: Sequence[tuple[str, ...]]) -> Counted:
    """The launches where no forward is rewritten, within the layers of groups."""
    plan.merger(apart.model).merge_all(plan.found)
    names = {name for layers in groups for name in layers}
    made = apart.count(call, _named(apart.model, names), _products(apart.model, names))
    return Counted(made.count, {**dict.fromkeys(names, 0), **(made.by_layer or {})})


def _named(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The layers of these names, but for products that are none in this model."""
    return {name: module for name, module in model.named_modules() if name in names}


def _products(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The weights of products, by the names of their layers."""
    raw = (name for name in names if name.endswith(SUFFIX))
    return {name: model.get_parameter(name.removesuffix(SUFFIX)) for name in raw}


def _levels(model: nn.Module) -> dict[Wide, Level]:
    """What is merged in a model, by wide layer."""
    return {
        wide: Level(wide.kind, tuple(name for name, _ in members), tuple(wide.kind.outputs(wide)))
        for wide, members in wides(model).items()
    }


def _depths(depths: Depths, model: nn.Module) -> dict[frozenset[str], Depth]:
    """What is behind each group of a model."""
    names = {wide: level.layers for wide, level in _levels(model).items()}
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
