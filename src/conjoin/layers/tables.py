"""The kind `Tables`: embeddings that read a tensor of row numbers each, such as a column.

x_i: (*) of row numbers, W_i: (rows_i, width). The tables W_i one below another are the wide weight
W: (sum rows_i, width), of which table i begins at row first_i. So with x: (n, *), the x_i stacked,

    y_i = W_i[x_i]           becomes        y = W[x + first]: (n, *, width)

A number that is negative or beyond its own table is an error, and must not be a row of another one:
it becomes -1, which is beyond all. The tables may differ in their number of rows, and in the row
that is for padding, which gets no gradient.

To stack, add, compare and choose are five launches on all numbers. Where the shapes are known, an
estimate decides whether they cost less than the launches that they save (`policy/gathering.py`).
`dlrm` in the benchmark is a model with 16 tables. In training what matters is the size of the
weight: a gradient of many rows may be asked of the system at each step, and then tables stay apart.

Where no rewritten forward runs, each view reads its slice (`slices.py`).
The numbers first_i are a tensor that the wide layer keeps, for which an exported program has no
place: tables stay apart there.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from conjoin.layers.checks import Verdict
from conjoin.layers.kind import Kind
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide

NUMBERS = (torch.int32, torch.int64)
"""The types of row numbers that a table takes."""

OUTSIDE = -1
"""A row number that no table has."""


class Tables(Kind):
    """`nn.Embedding`, where each reads a tensor of its own."""

    layer = nn.Embedding
    settings = ("scale_grad_by_freq",)
    siblings = False
    stacked = True
    prepares = 4

    def check(self, layer: nn.Module) -> Verdict | None:
        """Also refuses `max_norm`, which changes the weight when called, `sparse`, and no rows."""
        for option in ("max_norm", "sparse"):
            if value := getattr(layer, option):
                return Reason.UNSUPPORTED_OPTION, f"{option}={value}"
        if layer.num_embeddings == 0:  # There is no first row, nor a last one.
            return Reason.UNSUPPORTED_OPTION, "num_embeddings=0"
        return super().check(layer)

    def kept(self, layers: Sequence[nn.Module]) -> dict[str, object]:
        """Also the rows for padding in the wide weight: one, or of each table, -1 for none."""
        rows = [cast(Tensor, layer.weight).shape[0] for layer in layers]
        own = [cast("int | None", layer.padding_idx) for layer in layers]
        starts = itertools.accumulate(rows, initial=0)
        padding = [OUTSIDE if p is None else s + p for p, s in zip(own, starts, strict=False)]
        held = [row for row in padding if row != OUTSIDE]
        only = held[0] if len(held) == 1 else None
        return {**super().kept(layers), "only": only, "padding": padding if len(held) > 1 else []}

    def outputs(self, wide: Wide) -> list[int]:
        """The widths of the tables; the blocks are as wide as they have rows."""
        return [width for _, width in wide.shapes]

    def constants(self, wide: Wide) -> tuple[Tensor, ...]:
        """The first and last rows of the tables, and those for padding where there are several."""
        return () if wide.weight.is_meta else _rows_of(wide, wide.weight.device)

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """Tables that read one tensor are siblings, of another kind."""
        raise NotImplementedError("tables that read one tensor are merged as an Embedding")

    def apart(self, wide: Wide, input: Tensor) -> Tensor:
        """(n, *) of row numbers -> (n, *, width)."""
        if input.dtype not in NUMBERS:
            return F.embedding(input, wide.weight)  # Raises what the first table would have.
        settings: dict[str, Any] = wide.settings
        kept = wide.constants
        if not kept or not _go_together(kept[0], input):
            kept = _rows_of(wide, input.device)
        if input.dim() != 2:
            kept = tuple(each.view(-1, *[1] * (input.dim() - 1)) for each in kept)
        first, last, *padding = kept
        rows = input + first
        rows = rows.masked_fill_(rows != rows.clamp(first, last), OUTSIDE)  # A copy is a launch.
        by_freq = settings["scale_grad_by_freq"]
        found = F.embedding(rows, wide.weight, settings["only"], scale_grad_by_freq=by_freq)
        if not padding or not found.requires_grad:
            return found
        # Rows for padding are read like any other and get no gradient.
        return torch.where((rows == padding[0]).unsqueeze(-1), found.detach(), found)


def _rows_of(wide: Wide, device: torch.device) -> tuple[Tensor, ...]:
    """The first and last rows, and those for padding where there are several: (n, 1) each."""
    starts: list[int] = wide.starts["weight"]
    rows: list[Any] = [starts[:-1], [stop - 1 for stop in starts[1:]], wide.settings["padding"]]
    return tuple(torch.tensor(each, device=device).unsqueeze(1) for each in rows if each)


def _go_together(kept: Tensor, input: Tensor) -> bool:
    """Whether two tensors are on one device, and both real or both not."""
    fake = isinstance(kept, FakeTensor) is isinstance(input, FakeTensor)
    return fake and kept.device == input.device
