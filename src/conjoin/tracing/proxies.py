"""What stands for a tensor while a forward is traced."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

from torch import fx


class UnsoundError(Exception):
    """The trace would not be the original forward on every call."""


class Proxy(fx.Proxy):
    """A proxy that takes no part in what only a value could answer."""

    def _refuse(self, *args: object) -> NoReturn:
        raise UnsoundError("Python looks at the value of a tensor")

    __hash__ = __format__ = __str__ = __bool__ = __index__ = _refuse
    __len__ = __contains__ = __setitem__ = _refuse

    def __setattr__(self, name: str, value: object) -> None:
        """Only what a proxy itself consists of; a forward that assigns `x.data` is refused."""
        if name not in ("tracer", "node", "__dict__") and "node" in vars(self):
            raise UnsoundError(f"it assigns the attribute {name} of a tensor")
        super().__setattr__(name, value)


def arguments(tracer: fx.Tracer) -> list[Any]:
    """The module that is traced, and a proxy for each argument without a default.

    Raises:
        UnsoundError: one of them must be given by name.
    """
    parameters = [*inspect.signature(type(tracer.root).forward).parameters.values()][1:]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in optional]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        raise UnsoundError("an argument must be given by name")
    return [tracer.root, *(tracer.create_proxy("placeholder", p.name, (), {}) for p in required)]
