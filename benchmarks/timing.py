"""Times several ways to do one thing, in turn, in one process.

`torch.utils.benchmark.Timer` times one statement after another, so that a machine that becomes
busy between the two makes one of them slower; and each of its measurements warms up anew. Here
every round times all of them, in an order that is drawn anew, and a round is short. What is told
of each is the ratio within a round, over the rounds: its median and its quartiles.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Step = Callable[[], object]

WARM_UP = 3
"""Steps before anything is timed."""

BLOCK = 5e-4
"""About how long, in seconds, a block of quick steps takes: long beside a look at the clock, and
short beside a time slice, so that few blocks are interrupted where the machine is busy."""

FEWEST_ROUNDS = 12
"""Quartiles of fewer say little; slow cases take longer than they were given."""


@dataclass(frozen=True)
class Quartiles:
    """The median, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Quartiles:
        """Those of two values or more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


@dataclass(frozen=True)
class Times:
    """What was measured of one way.

    Attributes:
        seconds: of one step.
        ratio: to a step of the first way, in the same round.
    """

    seconds: Quartiles
    ratio: Quartiles


def compare(
    steps: Mapping[str, Step], seconds: float, device: str = "cpu", most_rounds: int = 1000
) -> tuple[dict[str, Times], int, int]:
    """Times `steps` in turn.

    Args:
        steps: what to time, by name; the first is what the others are compared with.
        seconds: about how long to go on; for `FEWEST_ROUNDS` in any case.
        device: the device that they run on.
        most_rounds: where to stop earlier.

    Returns:
        The times by name, the number of rounds, and the number of steps in each block.
    """
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    once = min(_block(step, 1, device) for step in steps.values())
    count = max(1, round(BLOCK / once))
    blocks: dict[str, list[float]] = {name: [] for name in steps}
    order, draw = list(steps), random.Random(0)
    until, rounds = time.perf_counter() + seconds, 0
    while rounds < most_rounds and (rounds < FEWEST_ROUNDS or time.perf_counter() < until):
        draw.shuffle(order)
        for name in order:
            blocks[name].append(_block(steps[name], count, device))
        rounds += 1
    first = next(iter(blocks.values()))
    times = {
        name: Times(
            Quartiles.of(taken),
            Quartiles.of([one / other for one, other in zip(taken, first, strict=True)]),
        )
        for name, taken in blocks.items()
    }
    return times, rounds, count


def _block(step: Step, count: int, device: str) -> float:
    """The seconds that a step takes, of `count` one after another."""
    if torch.device(device).type == "cuda":
        return _block_on_cuda(step, count)
    start = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - start) / count


def _block_on_cuda(step: Step, count: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(count):
        step()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / count
