"""A deep model: how to build it, what to call it with, and what it should come to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from zoo.specimen import stir

Expected = Mapping[str, tuple[int, int | range]]
"""By group of operations (see counting.py), their number in the plain model and in the optimized.

A range is for what is not conjoin's promise, such as a cat that can, but need not go.
"""


@dataclasses.dataclass(frozen=True)
class Deep:
    """A model at a small size, in float64.

    Attributes:
        build: gives the model; called under a fixed seed.
        inputs: gives the positional arguments of a call, for a size of the batch.
        expected: the operations of a call.
        training: what differs from that in training mode.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]
    expected: Expected
    training: Expected = dataclasses.field(default_factory=dict)

    def model(self) -> nn.Module:
        """The model: the same weights each time, none of them constant."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.build().double()
            stir(model)
        return model

    def call(self, batch: int, seed: int = 1) -> tuple[Any, ...]:
        """The arguments: the same values each time for a seed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.inputs(batch)

    def operations(self, *, training: bool) -> Expected:
        """The operations of a call in a mode."""
        return {**self.expected, **(self.training if training else {})}


def randn(*shape: int) -> Tensor:
    """Random values in float64."""
    return torch.randn(shape, dtype=torch.float64)


def between(least: int, most: int) -> range:
    """Any number from `least` to `most`."""
    return range(least, most + 1)
