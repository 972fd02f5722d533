"""Families: like layers that read one tensor, of every kind of layer, and a model that has one."""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from conjoin.layers import kind_of
from conjoin.layers.fusing import fuse
from conjoin.layers.wide import Wide

WIDTHS = {"two": (3, 3), "three": (2, 5, 1), "four": (2, 2, 2, 2), "five": (2, 3, 1, 4, 2)}
"""How many siblings of which widths: equal and different, odd and even in number."""


class Family(nn.Module):
    """Siblings, and nothing else."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *args: Any) -> list[Tensor]:
        return [layer(x, *args) for layer in self.layers]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer of a kind with some settings, and an input that it takes.

    Attributes:
        layer: gives a layer of a width, with or without bias.
        shape: the shape of the input; its channels are in the layer's settings.
        rows: for a table, the number of its rows; the input are row numbers then.
    """

    layer: Callable[..., nn.Module]
    shape: tuple[int, ...]
    rows: int = 0

    def family(self, widths: Sequence[int] = (3, 3), **settings: Any) -> Family:
        """Siblings of these widths, in float64."""
        return Family([self.layer(width, **settings) for width in widths]).double()

    def input(self) -> Tensor:
        """A random input."""
        if self.rows:
            return torch.randint(self.rows, self.shape)
        return torch.randn(self.shape, dtype=torch.float64)


def case(layer: Callable[..., nn.Module], channels: int, shape: tuple[int, ...], **settings: Any):
    """A case of a layer that is built as `layer(channels, width, **settings)`."""
    return Case(lambda width, **more: layer(channels, width, **settings, **more), shape)


def table(rows: int, shape: tuple[int, ...], **settings: Any) -> Case:
    """A case of an embedding, which has no bias."""
    return Case(lambda width, **_: nn.Embedding(rows, width, **settings), shape, rows)


EVERY_KIND = {
    "Linear": case(nn.Linear, 4, (2, 4)),
    "Conv1d": case(nn.Conv1d, 2, (2, 2, 7), kernel_size=3),
    "Conv2d": case(nn.Conv2d, 2, (2, 2, 5, 6), kernel_size=3),
    "Conv3d": case(nn.Conv3d, 2, (2, 2, 4, 3, 5), kernel_size=2),
    "ConvTranspose1d": case(nn.ConvTranspose1d, 2, (2, 2, 5), kernel_size=3),
    "ConvTranspose2d": case(nn.ConvTranspose2d, 2, (2, 2, 3, 4), kernel_size=3),
    "ConvTranspose3d": case(nn.ConvTranspose3d, 2, (2, 2, 2, 3, 2), kernel_size=2),
    "Embedding": table(7, (2, 5)),
}
"""One case of each kind."""


def fused(family: Family, contiguous: frozenset[int] = frozenset()) -> Family:
    """A copy of the family whose layers are views of one wide layer."""
    copied = copy.deepcopy(family)
    merge(copied.layers, contiguous, enclosing=copied)
    return copied


def merge(
    layers: Sequence[nn.Module],
    contiguous: frozenset[int] = frozenset(),
    leader: int = 0,
    enclosing: nn.Module | None = None,
) -> Wide:
    """Merges layers that go together, without asking whether they do."""
    kind = kind_of(layers[0])
    assert kind is not None
    return fuse(kind, list(layers), enclosing or nn.ModuleList(layers), contiguous, leader)


@contextlib.contextmanager
def wide_runs() -> Iterator[list[Wide]]:
    """Notes the runs of wide layers, in the list that it gives.

    As if a tool followed the calls of modules: rewritten forwards call them as modules then.
    """
    runs: list[Wide] = []
    forward, run, call = Wide.forward, Wide.run, nn.Module.__call__

    def followed(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(module, *args, **kwargs)

    def noted(wide: Wide, x: Tensor, **how: Any) -> Tensor:
        runs.append(wide)
        return forward(wide, x, **how)

    def noted_in_lockstep(wide: Wide, x: Tensor) -> Tensor:
        if wide._parameters:  # Otherwise it calls `forward`.
            runs.append(wide)
        return run(wide, x)

    Wide.forward, Wide.run = noted, noted_in_lockstep
    try:
        with mock.patch.object(nn.Module, "__call__", followed):
            yield runs
    finally:
        Wide.forward, Wide.run = forward, run


def assert_runs_once(model: nn.Module, *args: Any) -> None:
    """A call of the model runs one wide layer once."""
    with wide_runs() as runs:
        model(*args)
    assert len(runs) == 1
