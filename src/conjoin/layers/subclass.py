"""Classes that are those of a user's modules and something more, and go by their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def subclass(mixin: type, base: type[nn.Module], forward: Callable[..., Any]) -> type:
    """A subclass of `base` by its name, which is one of `mixin` too, with a forward of its own.

    The mixin finds `base` as `conjoin_base`.
    """
    names = {
        "conjoin_base": base,
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (mixin, base), names)
