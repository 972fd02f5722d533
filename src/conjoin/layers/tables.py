"""Embeddings that read a tensor of row numbers each, such as a column.

x_i: (*) of row numbers, W_i: (rows_i, width). The tables W_i one below another are the wide weight
W: (sum rows_i, width), of which table i begins at row first_i. So with x: (n, *), the x_i stacked,

    y_i = W_i[x_i]           becomes        y = W[x + first]: (n, *, width)

A number that is negative or beyond its own table is an error, and must not be a row of another one:
it becomes -1, which is beyond all. The tables may differ in their number of rows, and in the row
that is for padding, which gets no gradient.

To stack, add, compare and choose are five launches on all numbers. Where the shapes are known, an
estimate decides whether they cost less than the launches that they save (`policy/gathering.py`).
Measured on one core, 16 and 26 tables of 1,000 rows take 0.4 to 0.8 of their time up to 256 rows a
batch, forward and in training, 0.9 to 1.1 at 1,024, and up to 1.8 above; 4 tables take 0.9 to 1.4.

Where no rewritten forward runs, each view reads its slice, and gives a gradient of the size of all.
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

from conjoin.layers.kind import Kind, Verdict
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
        """Also refuses `max_norm`, which changes the weight when called, and `sparse`."""
        for option in ("max_norm", "sparse"):
            if value := getattr(layer, option):
                return Reason.UNSUPPORTED_OPTION, f"{option}={value}"
        return super().check(layer)

    def kept(self, layers: Sequence[nn.Module]) -> dict[str, object]:
        """Also each table's row for padding among all, `OUTSIDE` where it has none."""
        rows = [_weight(layer).shape[0] for layer in layers]
        own = [cast("int | None", layer.padding_idx) for layer in layers]
        padding = [
            OUTSIDE if row is None else start + row
            for row, start in zip(own, itertools.accumulate(rows, initial=0), strict=False)
        ]
        return {**super().kept(layers), "padding": tuple(padding)}

    def outputs(self, wide: Wide) -> list[int]:
        """The widths of the tables; the blocks are as wide as they have rows."""
        return [width for _, width in wide.shapes]

    def constants(self, wide: Wide) -> tuple[Tensor, ...]:
        """The first and the last row of each table, and its row for padding: (n) each."""
        return () if wide.weight.is_meta else _rows_of(wide, wide.weight.device)

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """Tables that read one tensor are siblings, of another kind."""
        raise NotImplementedError("tables that read one tensor are merged as an Embedding")

    def apart(self, wide: Wide, input: Tensor) -> Tensor:
        """(n, *) of row numbers -> (n, *, width)."""
        if input.dtype not in NUMBERS:
            return F.embedding(input, wide.weight)  # Raises what the first table would have.
        kept = wide.constants
        if not kept or not _go_together(kept[0], input):
            kept = _rows_of(wide, input.device)
        first, last, padding = (row.view(-1, *[1] * (input.dim() - 1)) for row in kept)
        rows = input + first
        rows = rows.masked_fill(rows != rows.clamp(first, last), OUTSIDE)
        settings: dict[str, Any] = wide.settings
        padded = [row for row in settings["padding"] if row != OUTSIDE]
        only = padded[0] if len(padded) == 1 else None
        by_freq = settings["scale_grad_by_freq"]
        found = F.embedding(rows, wide.weight, only, scale_grad_by_freq=by_freq)
        if len(padded) < 2 or not found.requires_grad:
            return found
        # Rows for padding are read like any other and get no gradient.
        return torch.where((rows == padding).unsqueeze(-1), found.detach(), found)


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _rows_of(wide: Wide, device: torch.device) -> tuple[Tensor, ...]:
    """The first and the last row of each table, and its row for padding: (n) each."""
    starts: list[int] = wide.starts["weight"]
    padding = cast("tuple[int, ...]", wide.settings["padding"])
    rows = starts[:-1], [stop - 1 for stop in starts[1:]], padding
    return tuple(torch.tensor(each, device=device) for each in rows)


def _go_together(kept: Tensor, input: Tensor) -> bool:
    """Whether two tensors are on one device, and both real or both not."""
    fake = isinstance(kept, FakeTensor) is isinstance(input, FakeTensor)
    return fake and kept.device == input.device
