"""Whether a call is as a rewritten forward takes for granted: its arguments and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from conjoin.layers.lockstep import PLAIN_TENSORS
from conjoin.tracing.conditions import WORDS
from conjoin.tracing.facts import Fact
from conjoin.tracing.source import Names
from conjoin.tracing.structures import TENSOR, Structure

if TYPE_CHECKING:
    from conjoin.tracing.sound import Traced


def expressions(traced: Traced, tensors: Sequence[str] | None = None) -> list[str]:
    """What must be true of the tensors of a call: of their ranks, likeness and size.

    Args:
        traced: the forward.
        tensors: what each tensor is in the expressions, by default `args[0]` and so on.
    """

    def at(number: int) -> str:
        return f"args[{number}]" if tensors is None else tensors[number]

    found = [f"{at(number)}.ndim == {rank}" for number, rank in traced.ranks]
    if traced.most is None:
        return found
    alike: dict[int, list[str]] = {}
    for number, like in enumerate(traced.observed.alike):
        alike.setdefault(like, []).append(at(number))
    for what in ("shape", "dtype", "device", "requires_grad"):
        for among in alike.values():
            if len(among) > 1:
                found.append(" == ".join(f"{tensor}.{what}" for tensor in among))
    every = map(at, range(len(traced.observed.alike))) if tensors is None else tensors
    elements = " + ".join(f"{each}.numel()" for each in every)
    unknown = "sum([each.numel() for each in args])" if tensors is None else "0"
    return [*found, f"{elements or unknown} <= {traced.most}"]


def fitting(traced: Traced) -> Callable[[Sequence[Tensor]], bool] | None:
    """A function of the tensors that tells whether they fit; None where all do."""
    found = expressions(traced)
    source = f"def fits(args):\n    return {' and '.join(found)}\n"
    return Names().define(source, "fits") if found else None


@dataclass(frozen=True, slots=True)
class StructureSource:
    """A structure as source of `args` and `kwargs`.

    Attributes:
        facts: what is true of calls of this structure, and of no others.
        tensors: the tensors of such a call.
    """

    facts: list[str]
    tensors: list[str]

    def function(self, names: Names) -> Callable[..., tuple[Tensor, ...]]:
        """A function of `args` and `kwargs` that gives the tensors."""
        given = "".join(f"{each}, " for each in self.tensors)
        return names.define(f"def tensors(args, kwargs):\n    return ({given})\n", "tensors")


def source_of(structure: Structure, names: Names) -> StructureSource | None:
    """A structure as source; None where a dictionary has other keys than words."""
    if isinstance(structure, int):
        structure = (tuple, *[TENSOR] * structure), (dict,)
    args, kwargs = structure
    tensors: list[str] = []
    try:
        facts = [*_listed(args, "args", names, tensors), *_mapped(kwargs, "kwargs", names, tensors)]
    except KeyError:
        return None
    return StructureSource(facts, tensors)


def asked(
    traced: Traced, call: StructureSource | None, cls: type[nn.Module], names: Names
) -> Iterator[Fact]:
    """What must be true of a `region` of a class and of its `args` and `kwargs`."""
    yield Fact(f"type(region) is {names.name(cls)}")
    if call is not None:
        yield from map(Fact, call.facts)
        yield from map(Fact, expressions(traced, call.tensors))


def _of(of: Any, at: str, names: Names, tensors: list[str]) -> Iterator[str]:
    """What is true of an argument that is like this; its tensors are added to those."""
    if of == TENSOR:
        tensors.append(at)
        yield f"type({at}) in {names.name(PLAIN_TENSORS)} and not {at}.is_nested"
        return
    cls, *parts = of
    if any(parts[:1] == [word] and cls is type(word) for word in WORDS):
        yield f"{at} is {parts[0]!r}"
        return
    yield f"type({at}) is {names.name(cls)}"
    if cls is float:
        yield f"{at}.hex() == {parts[0]!r}"
    elif cls is tuple or cls is list:
        yield from _listed(of, at, names, tensors)
    elif cls is dict:
        yield from _mapped(of, at, names, tensors)
    else:
        yield f"{at} == {names.name(parts[0])}"


def _listed(of: Any, at: str, names: Names, tensors: list[str]) -> Iterator[str]:
    _, *items = of
    yield f"len({at}) == {len(items)}"
    for number, item in enumerate(items):
        yield from _of(item, f"{at}[{number}]", names, tensors)


def _mapped(of: Any, at: str, names: Names, tensors: list[str]) -> Iterator[str]:
    _, *items = of
    if any(key[0] is not str for key, _ in items):
        raise KeyError(at)
    keys = tuple(key for (_, key), _ in items)
    yield f"(*{at},) == {names.name(keys)}"
    for key, (_, item) in zip(keys, items, strict=True):
        yield from _of(item, f"{at}[{names.name(key)}]", names, tensors)
