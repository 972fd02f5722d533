"""Subclasses of users' classes that go by the same name: views, owners, regions and the like."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn

_made: WeakKeyDictionary[type, WeakValueDictionary[Hashable, type]] = WeakKeyDictionary()
"""The classes that were made of others and are in use, by what they are for."""


def made_of(base: type, purpose: Hashable, make: Callable[[], type]) -> Any:
    """The class that is made of another one for a purpose: the same one while it is in use."""
    known = _made.setdefault(base, WeakValueDictionary())
    found = known.get(purpose)
    if found is None:
        found = known[purpose] = make()
    return found


def known_of(base: type, purpose: Hashable) -> type | None:
    """The class that is in use; None where there is none."""
    known = _made.get(base)
    return None if known is None else known.get(purpose)


def subclass(mixin: type, base: type[nn.Module], forward: Callable[..., Any]) -> type:
    """A subclass of `base` by its name, which is one of `mixin` too, with a forward of its own.

    The mixin finds `base` as `conjoin_base`. The forward gets code of its own, by a name of its
    own: Dynamo compiles each piece of code a few times at most, and takes a size that was another
    the last time for one that varies.
    """
    code = forward.__code__
    name = f"{base.__module__}.{base.__qualname__}.{code.co_name}"
    forward.__code__ = code.replace(co_name=name)
    names = {
        "conjoin_base": base,
        "forward": forward,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    return type(base.__name__, (mixin, base), names)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of a view, an owner, a region or the like, the user's own class."""
    return plain(type(module))


def plain(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that one was made of, as often as that was done; the class itself otherwise."""
    while "conjoin_base" in vars(cls):
        cls = vars(cls)["conjoin_base"]
    return cls
