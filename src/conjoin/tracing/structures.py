"""The structure of a call: its arguments with every tensor replaced by a placeholder.

A structure is a tuple that can be hashed, so that a call finds what was traced for its like. A
call of plain tensors alone, by position, is the number of them.
"""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from conjoin.layers.lockstep import PLAIN_TENSORS, runs_python

Structure = int | tuple[Any, ...]
"""The number of tensors, or the structure of the arguments and that of the keyword arguments."""

VALUES = (bool, int, str, bytes, type(None), torch.dtype)
"""Types of argument, beside floats, that are a part of the structure themselves."""

NUMBERS = (int, float)
"""Those of which Dynamo may know only that they are some number."""

TENSOR = "tensor"
"""What stands for a tensor."""

Alike = tuple[int, ...]
"""A number for each tensor of a call, equal for those of one shape, dtype and device."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What was seen of the tensors of all calls of one structure.

    Attributes:
        alike: which were always alike.
        ranks: how many dimensions each always had, -1 where that differed.
    """

    alike: Alike = ()
    ranks: tuple[int, ...] = ()

    def with_call(self, tensors: Sequence[Tensor]) -> Observed:
        """The same with one call more."""
        ranks = tuple(tensor.ndim for tensor in tensors)
        if self.ranks:
            ranks = tuple(a if a == b else -1 for a, b in zip(self.ranks, ranks, strict=True))
        return Observed(alike(tensors, self.alike or None), ranks)


class _UnknownError(Exception):
    """An argument is neither a plain tensor nor a constant, nor a container of such."""


def structure_of(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Structure, tuple[Tensor, ...]] | None:
    """The structure of a call and its tensors; None where it has none."""
    if not kwargs and all(map(is_plain, args)):
        return len(args), args
    tensors: list[Tensor] = []
    try:
        found = _of(args, tensors), _of(kwargs, tensors)
    except _UnknownError:
        return None
    return found, tuple(tensors)


def alike(tensors: Sequence[Tensor], before: Alike | None = None) -> Alike:
    """Which tensors of a call are alike, and were so before."""
    numbers: dict[Any, int] = {}
    found = [(tuple(t.shape), t.dtype, t.device) for t in tensors]
    known = before or (0,) * len(found)
    return tuple(numbers.setdefault(key, len(numbers)) for key in zip(known, found, strict=True))


def is_plain(value: Any) -> bool:
    """Whether an argument is a tensor of no other class, which may not know all operations."""
    return type(value) in PLAIN_TENSORS and not value.is_nested


def _of(value: Any, tensors: list[Tensor]) -> Any:
    cls = type(value)
    if is_plain(value):
        tensors.append(value)
        return TENSOR
    if cls in NUMBERS and not runs_python():
        raise _UnknownError  # Dynamo would compile anew for each.
    if cls is float:
        return cls, value.hex()  # Not the value: 0.0 == -0.0, but no NaN equals itself.
    if cls in VALUES:
        return cls, value
    if cls is tuple or cls is list:
        return (cls, *[_of(item, tensors) for item in value])
    if cls is dict:
        return (dict, *[(_of(key, []), _of(item, tensors)) for key, item in value.items()])
    raise _UnknownError


def rebuilt(structure: Structure, tensors: Iterator[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments of a structure."""
    if isinstance(structure, int):
        return tuple(tensors), {}
    args, kwargs = structure
    return _rebuilt(args, tensors), _rebuilt(kwargs, tensors)


def _rebuilt(of: Any, tensors: Iterator[Any]) -> Any:
    if of == TENSOR:
        return next(tensors)
    cls, *parts = of
    if cls is float:
        return float.fromhex(parts[0])
    if cls is tuple or cls is list:
        return cls([_rebuilt(part, tensors) for part in parts])
    if cls is dict:
        return {_rebuilt(key, tensors): _rebuilt(item, tensors) for key, item in parts}
    return parts[0]


def names_of(structure: Structure, forward: Callable[..., Any]) -> list[str]:
    """A name for each tensor of a structure: that of the parameter that it is a part of."""
    if isinstance(structure, int):
        structure = (tuple, *[TENSOR] * structure), (dict,)
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    positional = [p for p in parameters if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)]
    args, kwargs = structure
    names: list[str] = []
    for number, of in enumerate(args[1:]):
        parameter = positional[min(number, len(positional) - 1)] if positional else None
        several = parameter is None or parameter.kind is parameter.VAR_POSITIONAL
        name = "input" if parameter is None else parameter.name
        names += _names(of, f"{name}_{number}" if several else name)
    for key, of in kwargs[1:]:
        names += _names(of, key[1])
    found: list[str] = []
    for name in names:
        plain = name.isidentifier() and not keyword.iskeyword(name) and name not in found
        found.append(name if plain else f"input_of_call_{len(found)}")
    return found


def _names(of: Any, name: str) -> Iterator[str]:
    if of == TENSOR:
        yield name
    elif of[0] in (tuple, list):
        for number, part in enumerate(of[1:]):
            yield from _names(part, f"{name}_{number}")
    elif of[0] is dict:
        for number, (_, part) in enumerate(of[1:]):
            yield from _names(part, f"{name}_{number}")


def required(forward: Callable[..., Any]) -> Structure | None:
    """The structure of a call with the required arguments alone; None where one has a name."""
    parameters = [*inspect.signature(forward).parameters.values()][1:]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in optional]
    return None if any(p.kind is p.KEYWORD_ONLY for p in needed) else len(needed)
