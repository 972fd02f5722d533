"""Whose a class is, what it defines, and of which of the user's one of conjoin's was made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from conjoin.tracing.sandbox.objects import MISSING


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, for a view, an owner or a region that of the user's."""
    return plain_of(type(module))


def plain_of(cls: type[nn.Module]) -> type[nn.Module]:
    """The user's class that a class of conjoin's was made of, or the class itself."""
    while "conjoin_base" in vars(cls):
        cls = vars(cls)["conjoin_base"]
    return cls


def foreign(cls: type) -> Iterator[type]:
    """A class and its bases, but for PyTorch's and conjoin's own."""
    for base in cls.__mro__:
        if base.__module__.split(".")[0] not in ("torch", "conjoin", "builtins"):
            yield base


def static(cls: type, name: str) -> Any:
    """What a class or a base of it defines by a name."""
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return MISSING
