"""Whose a class is, and what it defines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from conjoin.tracing.sandbox.objects import MISSING


def users_classes(cls: type) -> Iterator[type]:
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
