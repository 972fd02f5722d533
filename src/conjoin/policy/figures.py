"""What a group takes in each form, and which of the forms is taken then.

The seconds are those of an estimate (`conjoin.policy.cost`) or of a race (`conjoin.policy.race`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from conjoin.policy.forms import Form

Policy = Literal["auto", "always", "measure"]
"""Which groups are fused: those that an estimate is not against, all, or those that won a race."""

LEAST_GAIN = 0.2
"""What share of the time it must save, by an estimate, to divide a group into several wide layers.

A group is divided where tensors become large, and there an estimate misses most: an allocator that
is given much back at once gives it to the system, and asks for it again in the next step
(`time_projections` in the benchmark, by hand, in training)."""

MARGIN = 0.02
"""By how much slower than the quickest form another may be and still be taken.

The constants are not exact to more. Near the edge one wide layer is taken: what is behind the
layers may gain from it. Where its output is cut at once nothing does, so there it must be the
quickest."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a group takes in seconds.

    Attributes:
        apart: the layers by themselves.
        whole: one wide layer of all of them.
        chosen: the form that was chosen, which may be one of these.
        layers: how many layers run in that form.
        measured: whether that was measured; otherwise it is an estimate.
        training: whether it is a step of training, or forward only.
        lockstep: whether the wide layers are those of siblings in lockstep.
    """

    apart: float
    whole: float
    chosen: float
    layers: int
    measured: bool
    training: bool
    lockstep: bool = False

    def __str__(self) -> str:
        """In words: ``estimate: 41 us apart, 63 us as one layer, forward``."""
        several = f", {_time(self.chosen)} as {self.layers}"
        parts = [
            f"{'measured' if self.measured else 'estimate'}: {_time(self.apart)} apart",
            f", {_time(self.whole)} as one layer{' in lockstep' if self.lockstep else ''}",
            several if self.chosen not in (self.apart, self.whole) else "",
            ", a training step" if self.training else ", forward",
        ]
        return "".join(parts)


@dataclass(frozen=True, slots=True)
class Cut:
    """What a group takes where its output is cut.

    Attributes:
        figures: what it takes where that is at once.
        spared: what each operation spares that runs on the output before.
    """

    figures: Figures
    spared: float

    def pays(self, carried: int) -> bool:
        """Whether one wide layer does with so many operations behind it."""
        whole, margin = self.figures.whole - carried * self.spared, MARGIN if carried else 0.0
        return whole <= self.figures.apart * (1 + margin)


def pick(
    taken: Mapping[Form, float], *, measured: bool, training: bool, margin: float = MARGIN
) -> tuple[Form, Figures]:
    """One wide layer where that is within a margin of the quickest form, or else several.

    Of those that are, the narrowest, since what an estimate misses grows with the size of tensors.
    Apart, where no wide form is near, or where it is not measured and saves too little.

    Args:
        taken: what each form takes in seconds, in the order of `forms`.
        measured: whether that was measured.
        training: whether it is a step of training.
        margin: by how much slower than the quickest form another may be.
    """
    whole, *several, apart = taken
    if not measured:
        several = [f for f in several if taken[f] <= taken[apart] * (1 - LEAST_GAIN)]
    among = (whole, *reversed(several), apart)
    most = min(taken[form] for form in among) * (1 + margin)
    chosen = next(form for form in among if taken[form] <= most)
    seconds = taken[apart], taken[whole], taken[chosen]
    return chosen, Figures(*seconds, len(chosen), measured, training)


def _time(taken: float) -> str:
    """Seconds in a unit that leaves a number from 1 to 1,000, with three digits."""
    for unit, size in (("us", 1e-6), ("ms", 1e-3)):
        if taken < 1000 * size:
            return f"{taken / size:.3g} {unit}"
    return f"{taken:.3g} s"
