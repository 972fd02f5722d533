"""Narrows groups until the predicted peak of memory is within the budget.

A wide layer's output is alive until its last part is not needed any more, and so is the gradient of
it; the layers' own outputs come and go one by one. So groups are narrowed, the one with the largest
output first, until the predicted peak is within the budget; and then they are widened again as far
as there is room, since they may not have been those that mattered.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from conjoin.graph.siblings import Candidate
from conjoin.graph.site import Sightings
from conjoin.legality import Reason, Refusal
from conjoin.memory import in_words
from conjoin.policy.deciding import pieces
from conjoin.policy.forms import Form, forms


@dataclasses.dataclass(frozen=True, slots=True)
class Need:
    """What a model needs in which some groups are merged.

    Attributes:
        peak: the predicted peak of its memory in bytes.
        behind: the layers behind the groups that are merged too.
    """

    peak: int
    behind: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """What is to be merged within a limit of memory.

    Attributes:
        found: the groups and refusals.
        peak: the predicted peak of the memory of a call then, in bytes.
    """

    found: tuple[Candidate, ...]
    peak: int


def fit(
    found: Sequence[Candidate],
    sightings: Sightings,
    need: Callable[[Sequence[Candidate]], Need],
    plain: int,
    limit: int,
    merged: frozenset[str],
) -> Fitted:
    """The groups as they are to be merged, so that the predicted peak is within a limit.

    Where the plain model's is above it already, the groups are to add nothing to that. Each
    prediction runs the model on fake tensors once. For like groups there are about as many as the
    logarithm of their number.

    Args:
        found: the groups and refusals.
        sightings: what was seen of the model.
        need: predicts what it takes to merge such groups.
        plain: the predicted peak of the model as it was.
        limit: the limit in bytes.
        merged: the layers that were merged earlier, and stay so.
    """
    most = max(limit, plain)
    whole = need(found)
    if whole.peak <= most:
        return Fitted(tuple(found), whole.peak)
    known: dict[Hashable, Need] = {}

    def needs(tried: Sequence[_Choice], apart: tuple[Candidate, ...] = ()) -> Need:
        forms = (*(choice.at for choice in tried), len(apart))
        if forms not in known:
            known[forms] = need((*_candidates(tried), *apart))
        return known[forms]

    steps = list(_narrower([_Choice.of(candidate, sightings, merged) for candidate in found]))
    # The narrower the less, as a rule: so the first that is within the limit is found by halves.
    within = bisect.bisect_left(steps, True, key=lambda step: needs(step).peak <= most)
    choices = steps[min(within, len(steps) - 1)]
    apart: tuple[Candidate, ...] = ()
    last = needs(choices)
    while last.peak > most and last.behind:  # What is behind the groups takes memory as well.
        apart += tuple(_refused(each, _detail(last.peak, limit)) for each in last.behind)
        last = needs(choices, apart)

    def peak(tried: Sequence[_Choice]) -> int:
        return needs(tried, apart).peak

    for wider in range(max((choice.at for choice in choices), default=0)):
        choices = _widened(choices, wider, peak, most, limit)
    return Fitted((*_candidates(choices), *apart), peak(choices))


def _widened(
    choices: list[_Choice],
    wider: int,
    peak: Callable[[Sequence[_Choice]], int],
    most: int,
    limit: int,
) -> list[_Choice]:
    """The choices with as many as there is room for in a wider form, the first ones first.

    Args:
        choices: the choices.
        wider: the position of that form among theirs; those that have none so narrow stay.
        peak: the predicted peak of the memory with some choices.
        most: the most that it may be.
        limit: what is told of that.
    """
    waiting = [position for position, choice in enumerate(choices) if wider < choice.at]
    last: Hashable = None
    while waiting:
        fitting, needed = _fitting(choices, waiting, wider, peak, most)
        choices = _with(choices, waiting[:fitting], at=wider)
        refused, waiting = waiting[fitting : fitting + 1], waiting[fitting + 1 :]
        alike = [choices[position].likeness() for position in refused]
        if not fitting and alike == [last]:  # For neither of two, and so for no other one.
            more = [position for position in waiting if choices[position].likeness() == last]
            refused, waiting = refused + more, [each for each in waiting if each not in more]
        last = next(iter(alike), None)
        if wider == 0:
            choices = _with(choices, refused, detail=_detail(needed, limit))
    return choices


def _fitting(
    choices: list[_Choice],
    waiting: Sequence[int],
    wider: int,
    peak: Callable[[Sequence[_Choice]], int],
    most: int,
) -> tuple[int, int]:
    """How many of those that wait fit in a wider form at once; and the peak with one more."""
    known: dict[int, int] = {}

    def is_above(count: int) -> bool:
        known[count] = peak(_with(choices, waiting[:count], at=wider))
        return known[count] > most

    within, more, end = 0, 1, len(waiting)
    while not is_above(more):
        within, more = more, min(2 * more, end)  # Few may fit, or all.
        if within == end:
            return end, 0
    first = bisect.bisect_left(range(within + 1, more), True, key=is_above) + within + 1
    return first - 1, known[first]


def _with(choices: list[_Choice], positions: Sequence[int], **changes: Any) -> list[_Choice]:
    """Choices of which some are changed."""
    changed = [*choices]
    for position in positions:
        changed[position] = dataclasses.replace(changed[position], **changes)
    return changed


def _detail(needed: int, limit: int) -> str:
    return f"predicted: {in_words(needed)} with it, where {in_words(limit)} are allowed"


def _refused(candidate: Candidate, detail: str) -> Candidate:
    refusal = Refusal(candidate.layers, Reason.EXCEEDS_MEMORY, detail)
    return dataclasses.replace(candidate, refusal=refusal, note="")


def _narrower(choices: list[_Choice]) -> Iterator[list[_Choice]]:
    """The forms of all groups, the one with the largest output narrowed in each step."""
    yield choices
    while choices and (widest := max(choices, key=_Choice.size)).size():
        choices = [widest.narrowed() if each is widest else each for each in choices]
        yield choices


@dataclasses.dataclass(frozen=True, slots=True)
class _Choice:
    """A group, or a refusal, and in which form it is to run.

    Attributes:
        candidate: the group.
        among: the forms that it may have, the widest first; one for what stays as it is.
        at: the position of its form among them.
        outputs: how many numbers each layer gives.
        sightings: what was seen of the model.
        detail: what it would need as one layer.
    """

    candidate: Candidate
    among: tuple[Form, ...]
    at: int
    outputs: tuple[int, ...]
    sightings: Sightings
    detail: str = ""

    @classmethod
    def of(cls, candidate: Candidate, sightings: Sightings, merged: frozenset[str]) -> _Choice:
        """The widest form."""
        shapes = [sightings.shapes.get(name) for name in candidate.layers]
        known = all(shape is not None for shape in shapes)
        outputs = [math.prod(shape.output) for shape in shapes if shape is not None]
        widths = tuple(outputs) if known else candidate.widths
        among: tuple[Form, ...] = ((tuple(range(len(candidate.layers))),),)
        if candidate.refusal is None and merged.isdisjoint(candidate.layers):
            among = tuple(forms(widths, candidate.layers))
        return cls(candidate, among, 0, widths, sightings)

    @property
    def form(self) -> Form:
        """The form that it is to have."""
        return self.among[self.at]

    def size(self) -> int:
        """How many numbers its widest layer gives; 0 where it cannot become narrower."""
        if self.at == len(self.among) - 1:
            return 0
        return max(sum(self.outputs[i] for i in run) for run in self.form)

    def likeness(self) -> Hashable:
        """What is equal for groups that need about the same."""
        return self.candidate.kind, self.candidate.widths, self.outputs, self.at

    def narrowed(self) -> _Choice:
        """The next form."""
        return dataclasses.replace(self, at=self.at + 1)

    def candidates(self) -> list[Candidate]:
        """The groups that it becomes."""
        if self.at == 0:
            return [self.candidate]
        if self.at == len(self.among) - 1:
            return [_refused(self.candidate, self.detail)]
        count = f"one of {len(self.form)} for {len(self.candidate.layers)} layers"
        noted = dataclasses.replace(self.candidate, note=f"{count}, {self.detail}")
        return list(pieces(noted, self.form, self.sightings))


def _candidates(choices: Sequence[_Choice]) -> tuple[Candidate, ...]:
    return tuple(candidate for choice in choices for candidate in choice.candidates())
