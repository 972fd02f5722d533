"""Whether the tensors of a call are as a rewritten forward takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from conjoin.tracing.source import Names

if TYPE_CHECKING:
    from conjoin.tracing.sound import Traced


def expressions(traced: Traced) -> list[str]:
    """What must be true of `args`, the tensors: of their ranks, likeness and size."""
    found = [f"args[{number}].ndim == {rank}" for number, rank in traced.ranks]
    if traced.most is None:
        return found
    alike: dict[int, list[str]] = {}
    for at, number in enumerate(traced.observed.alike):
        alike.setdefault(number, []).append(f"args[{at}]")
    for what in ("shape", "dtype", "device", "requires_grad"):
        for tensors in alike.values():
            if len(tensors) > 1:
                found.append(" == ".join(f"{tensor}.{what}" for tensor in tensors))
    elements = " + ".join(f"args[{at}].numel()" for at in range(len(traced.observed.alike)))
    return [*found, f"{elements or 'sum([each.numel() for each in args])'} <= {traced.most}"]


def fitting(traced: Traced) -> Callable[[Sequence[Tensor]], bool] | None:
    """A function of the tensors that tells whether they fit; None where all do."""
    found = expressions(traced)
    source = f"def fits(args):\n    return {' and '.join(found)}\n"
    return Names().define(source, "fits") if found else None
