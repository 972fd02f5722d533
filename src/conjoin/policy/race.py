"""Times several forms of one group in turn, on the device that they are on.

Every round runs all of them, in an order that is drawn anew, so that a machine that becomes busy
slows all. The group stands by itself, with copies of its layers: what is before and behind it in
the model has no part in it.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from conjoin.layers import Kind
from conjoin.merging import Merger
from conjoin.policy.forms import Form
from conjoin.policy.timing import timed
from conjoin.tracing import regions
from conjoin.tracing.undisturbed import undisturbed

SECONDS = 0.3
"""About how long a race takes, beside a warm-up."""

FEWEST_ROUNDS = 5
"""A median of fewer says little."""

WARM_UP = 3
"""Steps before anything is timed: memory is asked for, kernels are chosen."""

BLOCK = 5e-4
"""Seconds that one timing takes at least, long beside a look at the clock."""


class Siblings(nn.Module):
    """Layers that read one tensor, and nothing else."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        """Of these layers."""
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each layer makes of x."""
        return [layer(x) for layer in self.layers]


def run(
    kind: Kind,
    layers: Sequence[nn.Module],
    contiguous: frozenset[int],
    input: Tensor,
    among: Sequence[Form],
    *,
    training: bool,
) -> dict[Form, float]:
    """The median of the seconds that a step of each form takes.

    Args:
        kind: the kind of the layers.
        layers: the layers, which stay as they are.
        contiguous: the positions of those whose output must be contiguous.
        input: what they are called with.
        among: the forms.
        training: whether a step is forward, backward and Adam's, or forward only.

    Returns:
        The seconds, by form, in the order of `among`.
    """
    plain = Siblings(copy.deepcopy(list(layers))).train(training)
    # Hooks of all modules are called for these layers too, and may note that.
    with undisturbed(plain), torch.set_grad_enabled(training):
        steps = [_step(_as(plain, kind, contiguous, form), input, training) for form in among]
        return dict(zip(among, _median(steps, input.device), strict=True))


def _as(plain: Siblings, kind: Kind, contiguous: frozenset[int], form: Form) -> nn.Module:
    """The same layers, merged as a form says."""
    made = copy.deepcopy(plain)
    merger = Merger(made, (kind,))
    for members in form:
        if len(members) > 1:
            strided = frozenset(at for at, member in enumerate(members) if member in contiguous)
            together = [made.layers[member] for member in members]
            merger.wide(kind, together, together=True, contiguous=strided)
    regions.install(made)
    return made


def _step(model: nn.Module, input: Tensor, training: bool) -> Callable[[], object]:
    """A step of a model."""
    if not training:
        return lambda: model(input)
    seeds = [torch.ones_like(output) for output in model(input)]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> None:
        optimizer.zero_grad()
        input.grad = None
        torch.autograd.backward(model(input), seeds)
        optimizer.step()

    return step


def _median(steps: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    for step in steps:
        for _ in range(WARM_UP):
            step()
    count = max(1, round(BLOCK / min(timed(step, 1, device) for step in steps)))
    blocks: list[list[float]] = [[] for _ in steps]
    order, draw, until = list(range(len(steps))), random.Random(0), time.perf_counter() + SECONDS
    while len(blocks[0]) < FEWEST_ROUNDS or time.perf_counter() < until:
        draw.shuffle(order)
        for position in order:
            blocks[position].append(timed(steps[position], count, device))
    return [statistics.median(block) for block in blocks]
