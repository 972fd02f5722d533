"""The kind `Embedding`: tables that read one tensor.

x: (*) of row numbers, W_i: (rows, width_i). Tables of one width are a stack (n, rows, width), read
in one lookup along the rows, so that a row number out of range is an error as before.

Tables of different widths cannot be read with one lookup unless their rows are interleaved in
memory, and then a checkpoint could not hold them as views. They are joined to (rows, sum width_i)
at each call that needs a gradient, which touches every row anyway, and read one by one otherwise.

Tables that read a tensor each, such as a column, are of another kind (`tables.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from conjoin.layers.checks import Verdict
from conjoin.layers.kind import Kind
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


MASKS = 5
"""The operations by which rows for padding get no gradient: they are told, two are chosen from, and
likewise in the backward pass."""


class Embedding(Kind):
    """`nn.Embedding`."""

    layer = nn.Embedding
    settings = ("num_embeddings", "padding_idx")
    weight_dim = 1

    def check(self, layer: nn.Module) -> Verdict | None:
        """Also refuses what acts on a whole table: `max_norm`, `scale_grad_by_freq`, `sparse`."""
        for option in ("max_norm", "scale_grad_by_freq", "sparse"):
            if value := getattr(layer, option):
                return Reason.UNSUPPORTED_OPTION, f"{option}={value}"
        return super().check(layer)

    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """(*) -> (n, *, width) for a stack of tables, (*, sum width_i) otherwise."""
        padding: Any = wide.settings["padding_idx"]
        if _stacked(wide):
            stack = wide.weight.view(len(wide.widths), *wide.shapes[0])
            return read_stack(stack, input, padding)
        if torch.is_grad_enabled() and wide.weight.requires_grad:
            return F.embedding(input, self.joined(wide), padding)
        tables = [wide.part("weight", wide.weight, i) for i in range(len(wide.widths))]
        return torch.cat([F.embedding(input, table, padding) for table in tables], dim=-1)

    def inlined(
        self, wide: Wide, held: str, input: str, name: Callable[[object], str], *, apart: bool
    ) -> str | None:
        """`run` of a stack of tables."""
        if apart or not _stacked(wide):
            return None
        stack = f"{held}['weight'].view({(len(wide.widths), *wide.shapes[0])})"
        return f"{name(read_stack)}({stack}, {input}, {wide.settings['padding_idx']!r})"

    def joins(self, widths: Sequence[int]) -> bool:
        """A stack of tables of one width is read as it is."""
        return len(set(widths)) > 1

    def extra(self, layers: Sequence[nn.Module]) -> int:
        """Each joined table's gradient is cut out; of a stack, rows for padding are masked."""
        if self.joins([cast(nn.Embedding, layer).embedding_dim for layer in layers]):
            return len(layers)
        return 0 if cast(nn.Embedding, layers[0]).padding_idx is None else MASKS

    def reads_one_by_one(self, widths: Sequence[int], *, training: bool) -> bool:
        """Tables of different widths are, where no gradient touches all their rows."""
        return self.joins(widths) and not training

    def split(self, wide: Wide) -> tuple[Callable[..., Sequence[Tensor]], tuple[Any, ...]]:
        """Along the stack for a stack of tables, along the channels otherwise."""
        return (unstack, (len(wide.widths),)) if _stacked(wide) else super().split(wide)


def read_stack(stack: Tensor, input: Tensor, padding: int | None) -> Tensor:
    """What n tables (n, rows, width) of one shape have in the rows (*): (n, *, width).

    Args:
        stack: the tables.
        input: the numbers of the rows.
        padding: the number of the row that gets no gradient, if there is one.
    """
    count, _, width = stack.shape
    rows = stack.index_select(1, input.reshape(-1)).view(count, *input.shape, width)
    if padding is None or not rows.requires_grad:
        return rows
    # The padding row is read like any other and gets no gradient.
    return torch.where((input == padding).unsqueeze(-1), rows.detach(), rows)


def unstack(stack: Tensor, count: int) -> Sequence[Tensor]:
    """(n, *) -> n times (*), none of them a view, which `detach_` and others would not take.

    The count is n: a graph shows it, also where not all the parts are read.
    """
    if has_torch_function_unary(stack):  # A graph that is traced again keeps the call.
        return handle_torch_function(unstack, (stack,), stack, count)
    number = stack.numel()
    # In an export the sizes are symbols, which may be 0, also where Dynamo says that they are not.
    sized = not (isinstance(number, torch.SymInt) or torch.compiler.is_exporting())
    if sized and number and stack.dim() > 1 and stack.is_contiguous():
        # Not an operation for each.
        return torch.unsafe_split(stack.flatten(0, 1), stack.shape[1], 0)
    return [torch.ops.aten._unsafe_view(p, p.shape[1:]) for p in torch.unsafe_split(stack, 1, 0)]


def _stacked(wide: Wide) -> bool:
    return len(wide.widths) > 1 and len(set(wide.widths)) == 1
