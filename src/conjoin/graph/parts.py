"""A wide value as the tensors of its branches.

`conjoin.graph.separation` takes a graph apart with these: it computes no wide value, but knows the
nodes of its parts and how they would lie in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True, slots=True)
class Parts:
    """A wide value as its parts.

    Attributes:
        nodes: the node of each part, in order.
        dim: the dimension that they lie along; counted from the end where side by side.
        stacked: whether they are stacked along a dimension of their own, or lie side by side.
        sizes: their sizes along `dim`; None where they are equal and not known.
        names: the layer that each part comes from last; none where that is not known.
        root: the call of the wide layer that the parts came from first.
        branches: which of the parts of the root they are.
        path: the operations from the root on, in the graph with the wide values.
    """

    nodes: tuple[fx.Node, ...]
    dim: int
    stacked: bool
    sizes: tuple[int, ...] | None
    names: tuple[str, ...]
    root: fx.Node | None
    branches: tuple[int, ...]
    path: tuple[fx.Node, ...]

    @property
    def equal(self) -> bool:
        """Whether all parts have one size."""
        return self.sizes is None or len(set(self.sizes)) == 1

    def some(self, start: int, stop: int) -> Parts:
        """The parts from `start` to `stop`."""
        return dataclasses.replace(
            self,
            nodes=self.nodes[start:stop],
            sizes=self.sizes and self.sizes[start:stop],
            names=self.names[start:stop],
            branches=self.branches[start:stop],
        )

    def cut(self, sizes: Sequence[int]) -> tuple[fx.Node | Parts, ...] | None:
        """The items of a split into `sizes` along `dim`; None where one ends within a part."""
        if self.sizes is None:
            alike = len(sizes) == len(self.nodes) and len(set(sizes)) == 1
            return self.nodes if alike else None
        items: list[fx.Node | Parts] = []
        start = 0
        for size in sizes:
            stop = start
            while stop < len(self.sizes) and sum(self.sizes[start:stop]) < size:
                stop += 1
            if sum(self.sizes[start:stop]) != size or (start == stop and not self.stacked):
                return None
            alone = stop - start == 1 and not self.stacked
            items.append(self.nodes[start] if alone else self.some(start, stop))
            start = stop
        return tuple(items) if start == len(self.nodes) else None
