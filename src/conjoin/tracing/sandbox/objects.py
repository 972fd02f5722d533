"""Objects that a module holds and that are no modules: settings, descriptions, plain records.

While a forward is traced, its code gets a stand-in for such an object. What it reads of it is
noted: a constant, a container, another object, a method, which runs in the sandbox like any other
function. All else, a change, a comparison, a call, is refused. A rewritten forward looks on each
call whether the object is still there, and what was read of it is still the same.
"""

from __future__ import annotations

from abc import ABCMeta
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn

from conjoin.reachable import NAMESPACES, TRUSTED
from conjoin.tracing.proxies import UnsoundError

if TYPE_CHECKING:
    from conjoin.tracing.sandbox.sandbox import Sandbox

MISSING = object()
"""The value of an attribute that there is not."""

Place = tuple[str, tuple[Any, ...]]
"""Where an object is held: the path of a module, and the steps from its attributes on.

A step is the key of an item of a container, or the name of an attribute of an object.
"""

_BUILT_IN = (int, float, complex, str, bytes, tuple, list, dict, set, frozenset, type)
"""Types of value that are more than what their attributes hold."""

_DECIDING = "__getattribute__ __getattr__".split()
"""Methods of a class that make its attributes something else than what an object holds."""


class Object:
    """Stands for an object while code is traced."""

    def __init__(self, sandbox: Sandbox, value: object, place: Place) -> None:
        vars(self).update(conjoin_sandbox=sandbox, conjoin_value=value, conjoin_place=place)

    def __getattr__(self, name: str) -> Any:
        return _read(vars(self)["conjoin_sandbox"], self, name)

    def _refuse(self, *args: object) -> NoReturn:
        raise UnsoundError("it does more with an object than read its attributes")

    __setattr__ = __delattr__ = __call__ = __bool__ = __len__ = __iter__ = __getitem__ = _refuse
    __eq__ = __hash__ = __contains__ = __str__ = __repr__ = __format__ = _refuse


def value_of(stand_in: Object) -> object:
    """What a stand-in stands for."""
    return vars(stand_in)["conjoin_value"]


def is_object(value: object) -> bool:
    """Whether a value is an object whose attributes are what it holds and what its class has."""
    cls = type(value)
    return cls in NAMESPACES or (
        type(cls) in (type, ABCMeta)
        and str(cls.__module__).split(".")[0] not in (*TRUSTED, "builtins")
        and not isinstance(value, (nn.Module, Tensor, BaseException, *_BUILT_IN))
        and isinstance(getattr(value, "__dict__", None), dict)
        and not any(name in vars(base) for base in cls.__mro__[:-1] for name in _DECIDING)
    )


def standing_in(sandbox: Sandbox, value: Any, place: Place) -> Any:
    """A value with stand-ins for the objects in it; itself where there are none."""
    if is_object(value):
        sandbox.objects[place] = type(value)
        return Object(sandbox, value, place)
    if not any(True for _ in _objects(value)):
        return value
    path, steps = place
    if isinstance(value, dict):
        return type(value)(
            (key, standing_in(sandbox, item, (path, (*steps, key)))) for key, item in value.items()
        )
    return type(value)(
        standing_in(sandbox, item, (path, (*steps, at))) for at, item in enumerate(value)
    )


def _objects(value: Any) -> Iterator[object]:
    """The objects in a value, itself included."""
    if is_of_items(value):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)
    elif is_object(value):
        yield value


def held_at(at: Mapping[str, nn.Module], place: Place) -> Any:
    """What stands at a place now.

    Raises:
        KeyError: nothing does.
    """
    path, steps = place
    value: Any = at[path]
    try:
        for step in steps:
            value = value[step] if is_of_items(value) else vars(value)[step]
    except (IndexError, TypeError) as error:
        raise KeyError(step) from error
    return value


def holder_of(at: Mapping[str, nn.Module], place: Place) -> tuple[dict[str, Any], str] | None:
    """The dictionary of attributes that leads to a place, and the name; None for an item.

    Raises:
        KeyError: nothing stands there.
    """
    path, (*before, name) = place
    holder = held_at(at, (path, tuple(before)))
    return None if is_of_items(holder) else (vars(holder), name)


def is_of_items(value: object) -> bool:
    """Whether steps from a value are the keys of its items."""
    return isinstance(value, (list, tuple, dict))


def _read(sandbox: Sandbox, stand_in: Object, name: str) -> Any:
    """An attribute of an object, or what stands for it."""
    value = value_of(stand_in)
    place: Place = vars(stand_in)["conjoin_place"]
    cls = type(value)
    found = next((vars(base)[name] for base in cls.__mro__ if name in vars(base)), MISSING)
    if name.startswith("__"):
        sandbox.refuse(f"it reads .{name}")
    getter = found.fget if isinstance(found, property) else None
    if hasattr(type(found), "__set__") and type(getter) is not FunctionType:
        sandbox.refuse(f"it reads .{name}")
    path, steps = place
    if getter is not None and name in vars(value):
        sandbox.refuse(f"it hides .{name}")
    if name in vars(value):
        return sandbox.of_object(vars(value)[name], (path, (*steps, name)))
    sandbox.settings[path, (*steps, name)] = MISSING
    if type(getter) is FunctionType:
        sandbox.classes[cls, name] = found
        return sandbox.run(getter)(stand_in)
    if found is MISSING:
        sandbox.classes[cls, name] = MISSING
        raise AttributeError(name)
    given = sandbox.of_class(cls, name)
    return MethodType(given, stand_in) if type(found) is FunctionType else given
