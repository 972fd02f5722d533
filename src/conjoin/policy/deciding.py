"""Decides which of the groups that may be merged are, and in how many wide layers.

What is refused here could be merged exactly; it is left alone because it does not pay, or because a
call would need more memory than it may. That is noted in the model, and so is what was measured, so
that a report of it says later what was done and why.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import get_args

from torch import nn

from conjoin.graph.siblings import Candidate, activations
from conjoin.graph.site import Sightings
from conjoin.layers.releasing import release
from conjoin.layers.view import View
from conjoin.layers.wide import Wide
from conjoin.legality import Reason, Refusal
from conjoin.policy import machine, race
from conjoin.policy.cost import Machine, choose, likely
from conjoin.policy.figures import Cut, Figures, Policy, pick
from conjoin.policy.forms import Form
from conjoin.policy.workload import Workload, trains, workload_of

DECIDED = "_conjoin_decided"
"""The attribute of an optimized model that holds the groups that were left alone by choice, and
those of which the time was measured."""

CHOICES = frozenset({Reason.DOES_NOT_PAY, Reason.EXCEEDS_MEMORY})
"""The reasons why a group that could be merged is left alone."""


def check_policy(policy: object) -> None:
    """Raises ValueError where there is no such policy."""
    known = get_args(Policy)
    if policy not in known:
        raise ValueError(f"policy is one of {', '.join(map(repr, known))}, not {policy!r}.")


def decide(
    model: nn.Module, found: Iterable[Candidate], sightings: Sightings, policy: Policy
) -> tuple[Candidate, ...]:
    """The groups as they are to be merged, by the policy.

    What is merged already stays so, and where shapes are not known, all is merged.

    Args:
        model: the model, in the mode that it is to be quick in.
        found: its groups and refusals.
        sightings: what was seen of it.
        policy: which groups to merge.
    """
    raced: dict[Hashable, dict[Form, float]] = {}
    each = (_decided(model, candidate, sightings, policy, raced) for candidate in found)
    return tuple(itertools.chain.from_iterable(each))


def _decided(
    model: nn.Module,
    candidate: Candidate,
    sightings: Sightings,
    policy: Policy,
    raced: dict[Hashable, dict[Form, float]],
) -> Iterable[Candidate]:
    """What becomes of one candidate."""
    if candidate.refusal is not None:
        return (candidate,)
    layers = tuple(model.get_submodule(name) for name in candidate.layers)
    if (merged := _as_merged(layers)) is not None:
        return pieces(candidate, merged, sightings)
    group = None if policy == "always" else workload_of(candidate, layers, sightings, trains(model))
    if group is None:
        return (candidate,)
    known = machine.constants(group.weight.device, group.weight.dtype)
    if policy == "auto":
        return (candidate,) if known is None else _estimated(candidate, group, known, sightings)
    try:
        form, figures = _raced(group, known, raced)
    except RuntimeError:  # No memory for the copies, or no such operation on what they read here.
        return (candidate,)
    if known is not None and len(form) == 1:
        candidate = dataclasses.replace(
            candidate, lockstep=_against_lockstep(known, group, figures)
        )
    return _chosen(candidate, form, figures, sightings)


def _against_lockstep(known: Machine, group: Workload, figures: Figures) -> Figures | None:
    """What is against a wide layer that won a race, where its siblings are called one by one."""
    whole = figures.whole + known.together(len(group.layers), group.setting(lockstep=True))
    if whole <= figures.apart:
        return None
    chosen, layers = figures.apart, len(group.layers)
    return dataclasses.replace(figures, whole=whole, chosen=chosen, layers=layers, lockstep=True)


def _raced(
    group: Workload, known: Machine | None, raced: dict[Hashable, dict[Form, float]]
) -> tuple[Form, Figures]:
    """How to run a group by a race, which groups that are equal run once."""
    among = likely(known, group.works(), group.names, group.setting())
    key = group.key(), among
    if key not in raced:
        raced[key] = race.run(
            group.kind,
            group.layers,
            group.contiguous,
            group.example(),
            among,
            training=group.training,
        )
    return pick(raced[key], measured=True, training=group.training)


def _estimated(
    candidate: Candidate, group: Workload, known: Machine, sightings: Sightings
) -> Iterator[Candidate]:
    """What becomes of a candidate by an estimate.

    Where a forward is rewritten, what is behind the layers may run wide too. So the form is chosen
    as if nothing were cut or copied right behind them. What would be against it where it is, in
    lockstep or in a rewritten forward, is kept for `leave_apart`, which knows how the layers run.
    """
    works = group.works()
    form, figures = choose(known, works, group.names, group.setting(cut=False))
    apart = tuple((position,) for position in range(len(works)))
    in_lockstep, cut = choose(known, works, group.names, group.setting(lockstep=True))
    if in_lockstep == apart:
        slower = dataclasses.replace(cut, lockstep=True)
        candidate = dataclasses.replace(candidate, lockstep=slower)
    # A forward that is rewritten reads a part as it lies, nearly everywhere.
    works = [dataclasses.replace(work, contiguous=False) for work in works]
    rewritten, cut = choose(known, works, group.names, group.setting())
    if rewritten == apart:
        spared = known.call * (len(works) - 1) * (1 + group.training)
        candidate = dataclasses.replace(candidate, cut=Cut(cut, spared))
    return _chosen(candidate, form, figures, sightings)


def _as_merged(layers: Sequence[nn.Module]) -> Form | None:
    """How layers are merged already; None where some are not, or with others than these."""
    parts: dict[Wide, list[int]] = {}
    for position, layer in enumerate(layers):
        if not isinstance(layer, View):
            return None
        parts.setdefault(layer.wide_layer, []).append(position)
    if any(len(positions) < len(wide.widths) for wide, positions in parts.items()):
        return None
    return tuple(map(tuple, parts.values()))


def _chosen(
    candidate: Candidate, form: Form, figures: Figures, sightings: Sightings
) -> Iterator[Candidate]:
    """What becomes of a candidate that is to run in some form."""
    if len(form) == len(candidate.layers):
        yield _left_alone(candidate, figures)
    elif len(form) > 1:
        note = f"one of {len(form)} for {len(candidate.layers)} layers; {figures}"
        noted = dataclasses.replace(candidate, figures=figures, note=note)
        yield from pieces(noted, form, sightings)
    elif figures.measured:
        yield dataclasses.replace(candidate, figures=figures, note=str(figures))
    else:
        yield candidate


def _left_alone(candidate: Candidate, figures: Figures) -> Candidate:
    refusal = Refusal(candidate.layers, Reason.DOES_NOT_PAY, str(figures))
    return dataclasses.replace(candidate, refusal=refusal, figures=figures, note="")


def pieces(candidate: Candidate, form: Form, sightings: Sightings) -> Iterator[Candidate]:
    """The parts of a candidate that are merged by themselves."""
    if len(form) == 1 and len(form[0]) == len(candidate.layers):
        yield candidate
        return
    for members in form:
        names = tuple(candidate.layers[member] for member in members)
        yield dataclasses.replace(
            candidate,
            layers=names,
            widths=tuple(candidate.widths[member] for member in members),
            contiguous=frozenset(
                at for at, member in enumerate(members) if member in candidate.contiguous
            ),
            activations=activations(s for s in sightings.sites if s.layer in names),
        )


def leave_apart(
    model: nn.Module,
    found: Iterable[Candidate],
    running: Collection[Wide],
    cuts: Mapping[Wide, int | None],
) -> tuple[Candidate, ...]:
    """Releases groups that do not pay the way they run: in lockstep, or with outputs cut at once.

    Args:
        model: the model, in which the groups are merged.
        found: the groups and refusals.
        running: the wide layers that a rewritten forward runs.
        cuts: those whose output such a forward cuts, and after how many operations, or None.

    Returns:
        The groups as they are then.
    """
    left: list[Candidate] = []
    for candidate in found:
        against = candidate.lockstep or candidate.cut
        views = (model.get_submodule(name) for name in candidate.layers if against)
        held = [view for view in views if isinstance(view, View)]
        figures = _against(candidate, held[0].wide_layer, running, cuts) if held else None
        if figures is not None:
            for view in held:
                release(view)
            candidate = _left_alone(candidate, figures)
        left.append(candidate)
    return tuple(left)


def _against(
    candidate: Candidate, wide: Wide, running: Collection[Wide], cuts: Mapping[Wide, int | None]
) -> Figures | None:
    """The figures that are against a wide layer, the way it runs; None where nothing is."""
    if wide not in running:
        return candidate.lockstep
    cut, carried = candidate.cut, cuts.get(wide)
    return None if cut is None or carried is None or cut.pays(carried) else cut.figures


def note(model: nn.Module, decided: Iterable[Candidate]) -> None:
    """Notes in a model what a report of it could not find out later."""
    kept = tuple(each for each in decided if each.note or _is_choice(each))
    vars(model).pop(DECIDED, None)
    if kept:
        vars(model)[DECIDED] = kept


def _is_choice(candidate: Candidate) -> bool:
    return candidate.refusal is not None and candidate.refusal.reason in CHOICES


def noted(model: nn.Module, found: Iterable[Candidate], *, again: bool) -> Iterator[Candidate]:
    """The groups of an optimized model, with what was decided where that was noted.

    Args:
        model: the model.
        found: its groups and refusals.
        again: whether it is to be decided again what becomes of groups that were left alone.
    """
    known: tuple[Candidate, ...] = vars(model).get(DECIDED, ())
    told: set[str] = set()
    for candidate in found:
        told |= {*candidate.layers}
        within = [each for each in known if {*each.layers} <= {*candidate.layers}]
        whole = sum(len(each.layers) for each in within) == len(candidate.layers)
        stays = whole and not (again and any(each.refusal for each in within))
        if candidate.refusal is None and stays and all(_holds(model, each) for each in within):
            yield from within
        else:
            yield candidate
    for each in () if again else known:  # What is behind groups, and was left alone.
        if each.refusal is not None and told.isdisjoint(each.layers) and _holds(model, each):
            yield each


def _holds(model: nn.Module, decided: Candidate) -> bool:
    """Whether layers are as it was decided that they be."""
    modules = dict(model.named_modules())
    # A product with raw Parameters is no layer as long as it is left alone.
    layers = [modules[name] for name in decided.layers if name in modules]
    if decided.refusal is None:
        return _as_merged(layers) == (tuple(range(len(layers))),)
    return not any(isinstance(layer, View) for layer in layers)
