"""What it takes siblings in lockstep to share a run, beyond what that run itself takes.

Each sibling looks whether another one has run the wide layer on this input, and whether nothing has
changed since, which is Python. Where there is a backward pass, the wide layer also reads an alias
of the input, which is an operation written in Python. Small layers take less than that.

It is what is left between siblings that share runs and layers that do not, where the cost model has
told all else.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conjoin.layers.fusing import fuse
from conjoin.layers.linear import Linear
from conjoin.policy.cost import Machine, Setting, Work, seconds

COUNT = 4
"""How many siblings are measured, since the first one takes longer than the others."""

FEATURES = 8
"""How wide they are."""

TURNS = 5
"""How often both are timed in turn. The least counts: what disturbs a timing only adds."""

Least = Callable[[Callable[[], object], torch.device], float]
"""What tells the seconds of something on a device."""


def measured(known: Machine, device: torch.device, dtype: torch.dtype, least: Least) -> Machine:
    """What is known of a device, and what it takes there to share a run.

    Args:
        known: the other constants.
        device: the device.
        dtype: the type of the numbers.
        least: what measures.
    """
    known = dataclasses.replace(known, shared=0.0, alias=0.0)
    with torch.inference_mode(mode=False), torch.enable_grad():
        row = torch.full((1, FEATURES), 0.5, device=device, dtype=dtype, requires_grad=True)
        plain, views = (_layers(device, dtype) for _ in range(2))
        fuse(Linear(), [*views], views)

        def more(training: bool) -> float:
            """The seconds that views take more than layers, and more than is known."""
            run = _train if training else _infer
            steps = [functools.partial(run, layers, row) for layers in (plain, views)]
            # In turn, since it is their difference that decides.
            taken = [[least(step, device) for step in steps] for _ in range(TURNS)]
            apart, together = map(min, zip(*taken, strict=True))
            beyond: float = together - apart - _told(known, training, dtype)
            return beyond

        shared = max(0.0, more(training=False) / COUNT)
        alias = max(0.0, more(training=True) - COUNT * shared)
    return dataclasses.replace(known, shared=shared, alias=alias)


def _told(known: Machine, training: bool, dtype: torch.dtype) -> float:
    """How many seconds one wide layer takes more than several, as far as is known."""
    row, weight = FEATURES * dtype.itemsize, FEATURES**2 * dtype.itemsize
    works = [Work(row, row, weight, weight, 2 * FEATURES**2, biased=True, rows=1)] * COUNT
    without_optimizer, setting = dataclasses.replace(known, step=0.0), Setting(training)
    whole = seconds(without_optimizer, [works], setting)
    return whole - seconds(without_optimizer, [[work] for work in works], setting)


def _layers(device: torch.device, dtype: torch.dtype) -> nn.ModuleList:
    """Some layers, for which no random numbers are drawn."""
    shape: dict[str, Any] = {"in_features": FEATURES, "out_features": FEATURES, "dtype": dtype}
    made = nn.ModuleList(nn.Linear(**shape, device="meta") for _ in range(COUNT))
    made.to_empty(device=device)
    for parameter in made.parameters():
        nn.init.constant_(parameter, 0.5)
    return made


def _run(layers: nn.ModuleList, input: Tensor) -> list[Tensor]:
    return [layer.forward(input) for layer in layers]  # Somebody may follow calls of modules.


def _infer(layers: nn.ModuleList, row: Tensor) -> None:
    with torch.no_grad():
        _run(layers, row.detach())


def _train(layers: nn.ModuleList, row: Tensor) -> None:
    outputs = _run(layers, row.neg())
    torch.autograd.grad(outputs, [row, *layers.parameters()], [each.detach() for each in outputs])
