"""Which of the groups that may be merged are, and in how many wide layers.

What is refused here could be merged exactly; it is left alone because it does not pay, or because a
call would need more memory than it may. That is noted in the model, and so is what was measured, so
that a report of it says later what was done and why.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import get_args

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from conjoin.graph.siblings import Candidate, activations
from conjoin.graph.site import Shapes, Sightings
from conjoin.layers import Kind
from conjoin.layers.checks import tensors
from conjoin.layers.kind import common
from conjoin.layers.releasing import release
from conjoin.layers.view import View
from conjoin.layers.wide import Wide
from conjoin.legality import Reason, Refusal
from conjoin.policy import machine, race
from conjoin.policy.cost import Cut, Figures, Machine, Policy, Setting, Work, choose, likely, pick
from conjoin.policy.forms import Form

DECIDED = "_conjoin_decided"
"""The attribute of an optimized model that holds the groups that were left alone by choice, and
those of which the time was measured."""

CHOICES = frozenset({Reason.DOES_NOT_PAY, Reason.EXCEEDS_MEMORY})
"""The reasons why a group that could be merged is left alone."""


MANY = 4
"""Rows from which on a library has a way of its own for a product; of one row it is another one."""


def check_policy(policy: object) -> None:
    """Raises ValueError where there is no such policy."""
    known = get_args(Policy)
    if policy not in known:
        raise ValueError(f"policy is one of {', '.join(map(repr, known))}, not {policy!r}.")


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Layers that may be merged, in what was seen of them.

    Attributes:
        kind: their kind.
        names: their qualified names.
        layers: the layers.
        shapes: what each read and gave.
        contiguous: the positions of those whose output must be contiguous.
        training: whether a backward pass is to be quick too.
    """

    kind: Kind
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    shapes: tuple[Shapes, ...]
    contiguous: frozenset[int]
    training: bool

    @property
    def weight(self) -> Tensor:
        """The weight of one of them; it is on the device of all, and of their dtype."""
        return tensors(self.layers[0])["weight"]

    def works(self) -> list[Work]:
        """What each layer does."""
        return [self._work(position) for position in range(len(self.layers))]

    def _work(self, position: int) -> Work:
        shapes, held = self.shapes[position], tensors(self.layers[position])
        weight, size = held["weight"], held["weight"].element_size()
        outputs, width = math.prod(shapes.output), weight.shape[self.kind.weight_dim]
        looked_up = _is_index(shapes.dtype)
        return Work(
            input=math.prod(shapes.input) * shapes.dtype.itemsize,
            output=outputs * size,
            weight=weight.numel() * size,
            read=(outputs if looked_up else weight.numel()) * size,
            operations=0 if looked_up else 2 * outputs * weight.numel() // max(width, 1),
            biased="bias" in held,
            contiguous=position in self.contiguous,
            few=not looked_up and 1 < outputs // max(width, 1) < MANY,
        )

    def setting(self, *, cut: bool = True) -> Setting:
        """What their calls have in common; `cut` as in `Setting`."""
        widths = [tensors(layer)["weight"].shape[self.kind.weight_dim] for layer in self.layers]
        passed_on = any(shapes.passed_on for shapes in self.shapes)
        joined = self.kind.joins(widths)
        one_by_one = self.kind.reads_one_by_one(widths, training=self.training)
        stacked = bool(self.kind.stacked)
        return Setting(self.training, passed_on, joined, one_by_one, cut, stacked)

    def key(self) -> Hashable:
        """What is equal for groups that take the same time."""
        keys = [common(self.kind, layer, tensors(layer)) for layer in self.layers]
        settings = tuple(tuple(key.items()) for key in keys)
        return self.kind, settings, self.shapes, tuple(self.works()), self.training


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
    group = None if policy == "always" else group_of(candidate, layers, sightings, trains(model))
    if group is None:
        return (candidate,)
    known = machine.constants(group.weight.device, group.weight.dtype)
    if policy == "auto":
        return (candidate,) if known is None else _estimated(candidate, group, known, sightings)
    try:
        form, figures = _raced(group, known, raced)
    except RuntimeError:  # No memory for the copies, or no such operation on what they read here.
        return (candidate,)
    return _chosen(candidate, form, figures, sightings)


def trains(model: nn.Module) -> bool:
    """Whether a step of training is to be quick, or forward only."""
    return model.training and torch.is_grad_enabled()


def group_of(
    candidate: Candidate, layers: tuple[nn.Module, ...], sightings: Sightings, training: bool
) -> Group | None:
    """A candidate in what was seen of it; None where its layers were not run, or are not real."""
    if not all(name in sightings.shapes for name in candidate.layers):
        return None
    if any(isinstance(layer, View) for layer in layers):  # Something has changed since.
        return None
    held = [tensor for layer in layers for tensor in tensors(layer).values()]
    if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in held):
        return None
    training = training and any(tensor.requires_grad for tensor in held)
    shapes = tuple(sightings.shapes[name] for name in candidate.layers)
    contiguous = candidate.contiguous
    return Group(candidate.kind, candidate.layers, layers, shapes, contiguous, training)


def _raced(
    group: Group, known: Machine | None, raced: dict[Hashable, dict[Form, float]]
) -> tuple[Form, Figures]:
    """How to run a group by a race, which groups that are equal run once."""
    among = likely(known, group.works(), group.names, group.setting())
    key = group.key(), among
    if key not in raced:
        raced[key] = race.run(
            group.kind,
            group.layers,
            group.contiguous,
            _example(group),
            among,
            training=group.training,
        )
    return pick(raced[key], measured=True, training=group.training)


def _estimated(
    candidate: Candidate, group: Group, known: Machine, sightings: Sightings
) -> Iterator[Candidate]:
    """What becomes of a candidate by an estimate.

    Where a forward is rewritten, what is behind the layers may run wide too, so that nothing is cut
    or copied there. So that counts only where none is.
    """
    works = group.works()
    form, figures = choose(known, works, group.names, group.setting(cut=False))
    apart = tuple((position,) for position in range(len(works)))
    in_lockstep, cut = choose(known, works, group.names, group.setting())
    if in_lockstep == apart:
        candidate = dataclasses.replace(candidate, lockstep=cut)
    # A forward that is rewritten reads a part as it lies, nearly everywhere.
    works = [dataclasses.replace(work, contiguous=False) for work in works]
    rewritten, cut = choose(known, works, group.names, group.setting())
    if rewritten == apart:
        spared = known.call * (len(works) - 1) * (1 + group.training)
        candidate = dataclasses.replace(candidate, cut=Cut(cut, spared))
    return _chosen(candidate, form, figures, sightings)


def _is_index(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _example(group: Group) -> Tensor:
    """Something that the layers of a group can be called with."""
    shapes = group.shapes[0]
    value = 0 if _is_index(shapes.dtype) else 0.5
    example = torch.full(shapes.input, value, dtype=shapes.dtype, device=group.weight.device)
    return example.requires_grad_(group.training and shapes.passed_on)


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
    cuts: Mapping[Wide, int],
) -> tuple[Candidate, ...]:
    """Undoes what does not pay where no forward is rewritten, or does no more than cut it.

    Args:
        model: the model, in which the groups are merged.
        found: the groups and refusals.
        running: the wide layers that a rewritten forward runs.
        cuts: those whose output is cut, and after how many operations.

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
    candidate: Candidate, wide: Wide, running: Collection[Wide], cuts: Mapping[Wide, int]
) -> Figures | None:
    """What is against a wide layer in the way in which it runs."""
    if wide not in running:
        return candidate.lockstep
    cut = candidate.cut if wide in cuts else None
    return None if cut is None or cut.pays(cuts[wide]) else cut.figures


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
