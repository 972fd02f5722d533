"""Times steps on a device, for what is measured of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

ROUNDS = 5
"""How often each thing is timed. The least counts: what disturbs it only adds."""

BLOCK = 2e-4
"""Seconds that one timing takes at least, long beside a look at the clock."""


def in_turn(
    steps: Sequence[Callable[[], object]], turns: int, device: torch.device
) -> tuple[float, ...]:
    """The seconds that steps take that are compared with each other, and so are timed in turn.

    Args:
        steps: the steps.
        turns: how often it is each one's turn. The least counts.
        device: the device that they run on.
    """
    taken = [[least(step, device) for step in steps] for _ in range(turns)]
    return tuple(map(min, zip(*taken, strict=True)))


def ascending(taken: Sequence[float]) -> list[float]:
    """The seconds that ever more of something took: no less, since what disturbs only adds."""
    return [min(taken[place:]) for place in range(len(taken))]


def least(step: Callable[[], object], device: torch.device) -> float:
    """The seconds that a step takes where nothing disturbs it."""
    count, taken = 1, timed(step, 1, device)
    while (taken := timed(step, count, device)) * count < BLOCK:
        count *= 2
    return min(taken, *(timed(step, count, device) for _ in range(ROUNDS - 1)))


def timed(step: Callable[[], object], count: int, device: torch.device) -> float:
    """The seconds that a step takes, of `count` one after another."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / count


def synchronize(device: torch.device) -> None:
    """Waits until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
