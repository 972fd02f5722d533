"""Whether the tensors of a call are as a rewritten forward takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from conjoin.layers.lockstep import PLAIN_TENSORS
from conjoin.tracing.facts import Fact
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


def asked(traced: Traced, cls: type[nn.Module], names: Names) -> Iterator[Fact]:
    """What must be true of a `region` of a class and of its `args` and `kwargs`.

    That is all where the call is one with tensors only, and nothing where it is any other.
    """
    count = traced.structure
    if not isinstance(count, int):
        return
    yield Fact(f"type(region) is {names.name(cls)} and len(args) == {count} and not kwargs")
    for each in (f"args[{at}]" for at in range(count)):
        yield Fact(f"type({each}) in {names.name(PLAIN_TENSORS)} and not {each}.is_nested")
    yield from map(Fact, expressions(traced))


def fitting(traced: Traced) -> Callable[[Sequence[Tensor]], bool] | None:
    """A function of the tensors that tells whether they fit; None where all do."""
    found = expressions(traced)
    source = f"def fits(args):\n    return {' and '.join(found)}\n"
    return Names().define(source, "fits") if found else None
