"""Does it pay to join the weights of layers at each call, in a compiled graph?

Where a graph holds parameters that somebody else owns, a wide weight can only be made in the call:

    W = cat(W_1, W_2, ...),   y = f(x, W)

Forward that is what the cost model says of a group whose wide layer joins its weights
(`Setting.joined`), with one more copy for the biases. What an estimate misses here is all on one
side: a compiled graph launches for less than the eager calls that the constants were measured with.
So it must be for much.

Where there is a backward pass the weights stay apart. It has as many launches fewer, but Inductor
writes the gradients of the parts into one tensor in strides, and each weight's gradient still has
its own way to its parameter. So little is gained on few rows, and lost on many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from conjoin.policy.cost import Layout, Machine, Setting, Work, level, seconds
from conjoin.policy.figures import MARGIN

LEAST_GAIN = 0.2
"""What share of the time it must save, by the estimate, to join weights at each call.

Many small layers gain more. Few layers whose weights are large beside what they are multiplied with
lose, though the estimate may promise a little."""


@dataclass(frozen=True, slots=True)
class Joining:
    """What a group takes in seconds, by an estimate.

    Attributes:
        training: whether there is a backward pass.
        apart: the layers by themselves.
        joined: one wide layer, whose weights are joined at each call.
        whole: one wide layer, whose weight is one.
    """

    training: bool
    apart: float
    joined: float
    whole: float

    @property
    def pays(self) -> bool:
        """Whether the weights are to be joined."""
        return not self.training and self.joined <= self.apart * (1 - LEAST_GAIN)

    @property
    def pays_whole(self) -> bool:
        """Whether one layer pays whose weights are one as they are."""
        return self.whole <= self.apart * (1 - LEAST_GAIN)

    @property
    def now(self) -> float:
        """What the group takes when that is decided."""
        return self.joined if self.pays else self.apart

    @property
    def misses(self) -> bool:
        """Whether a wide weight would still be quicker."""
        return self.whole < self.now * (1 - MARGIN)


def estimate(machine: Machine, works: Sequence[Work], setting: Setting) -> Joining:
    """What a group takes apart, joined at each call, and as one wide layer.

    Args:
        machine: what is measured of the device.
        works: what each layer does.
        setting: what they have in common, but for how they run.
    """
    copies = any(work.biased for work in works) * machine.call
    joined = dataclasses.replace(setting, joined=True)
    return Joining(
        training=setting.training,
        apart=seconds(machine, [[work] for work in works], setting),
        joined=seconds(machine, [works], joined) + copies,
        whole=seconds(machine, [works], setting),
    )


def estimate_level(
    machine: Machine, works: Sequence[Work], setting: Setting, layout: Layout
) -> Joining:
    """The same for layers that read the parts of one tensor, which are a batched product as one.

    Args:
        machine: what is measured of the device.
        works: what each layer does.
        setting: what they have in common.
        layout: how the parts lie.
    """
    figures = level(machine, works, dataclasses.replace(setting, stacked=True), layout)
    copies = (1 + any(work.biased for work in works)) * machine.call
    joined = figures.whole + copies + machine.copy(sum(work.weight for work in works))
    return Joining(setting.training, figures.apart, joined, figures.whole)
