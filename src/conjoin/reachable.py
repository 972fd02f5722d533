"""What a model's objects and code can reach: containers, attributes, closures, globals, caches.

A model keeps things beside its parameters, buffers and children, and its code keeps things beside
the model.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import queue
import sys
import threading
from collections import ChainMap, Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from types import (
    CellType,
    CodeType,
    FunctionType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from conjoin.layers.subclass import plain
from conjoin.layers.wide import Wide

TRUSTED = frozenset({"torch", "conjoin", "numpy", "_pytest", *sys.stdlib_module_names}) - {
    "__main__"
}
"""Packages whose code is not looked into.

pytest's is what an `assert` in a test file refers to, and from there all of a session is reached.
"""

CONTAINERS = frozenset({list, dict, set, deque, OrderedDict, defaultdict, Counter})
"""Types of object whose contents are put back."""

BASES = (OrderedDict, dict, list, set, deque)
"""The classes of containers, each with its own way to hold what is in it."""

NAMESPACES = (SimpleNamespace, argparse.Namespace)
"""Classes of Python's own whose objects are what their attributes are, and nothing else."""

QUEUES = (queue.Queue, queue.LifoQueue, queue.PriorityQueue)
"""Classes of queues whose contents can be put back."""

WEAK = (WeakKeyDictionary, WeakValueDictionary, WeakSet, WeakIdKeyDictionary)
"""Classes of containers that do not keep alive what is in them."""

HOLDERS = (*NAMESPACES, UserDict, UserList, ChainMap, *WEAK, *QUEUES, threading.local)
"""Classes of Python's own that code keeps things in by their attributes."""

SIMPLE = frozenset(
    {*(bool, int, float, complex, str, bytes, type(None)), Tensor, torch.dtype, torch.device}
)
"""Types of object that hold nothing else."""

OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""

HOOKS = frozenset(name for name in OF_MODULES if name.endswith(("_hooks", "_hooks_with_kwargs")))
"""Those among them that hold functions."""


OF_ALL_MODULES = frozenset(
    name for name in vars(nn.modules.module) if name.startswith("_global_") and "hooks" in name
)
"""The hooks that are called for every module there is."""

Reached = dict[int, object]
"""Objects by their ids, which are kept alive so."""

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True, slots=True)
class _Known:
    """What was found of code.

    Attributes:
        closures: all that classes can reach, by the classes, and each by its id.
        made: what was made of what they can reach, by what made it and the id of that.
        words: the code that was read, by its id, with its names and constants.
    """

    closures: dict[frozenset[type], Reached] = dataclasses.field(default_factory=dict)
    made: dict[tuple[object, int], Any] = dataclasses.field(default_factory=dict)
    words: dict[int, tuple[CodeType, tuple[object, ...]]] = dataclasses.field(default_factory=dict)


_known: ContextVar[_Known | None] = ContextVar("conjoin_known", default=None)


@contextlib.contextmanager
def remembering() -> Iterator[None]:
    """Goes through code once, however often it is asked what it can reach.

    That is right as long as each look at a model puts back what it changed.
    """
    if _known.get() is not None:
        yield
        return
    token = _known.set(_Known())
    try:
        yield
    finally:
        _known.reset(token)


def functions_of(model: nn.Module) -> Iterator[FunctionType]:
    """The functions, PyTorch's own aside, that the model's code consists of and refers to."""
    for value in reachable_from(model):
        if type(value) is FunctionType and not is_trusted(value):
            yield value


def words(code: CodeType) -> tuple[object, ...]:
    """The names and constants in code and in the functions in it."""
    known = _known.get()
    if known is None:
        return tuple(_words(code))
    if id(code) not in known.words:
        known.words[id(code)] = code, tuple(_words(code))
    return known.words[id(code)][1]


def _words(code: CodeType) -> Iterator[object]:
    yield from (*code.co_names, *code.co_consts)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _words(constant)


def reachable_from(model: nn.Module) -> Iterator[object]:
    """What the model's modules hold, and what their code can reach, each object once."""
    modules = [*model.modules()]
    known = reached_by_code(modules)
    yield from known.values()
    # What the modules themselves can reach beside that.
    yield from _walk(_held_by_modules(modules), _inside, known.copy())


def reached_by_code(modules: Sequence[nn.Module]) -> Reached:
    """All that the code of a model's modules can reach, as their classes define it."""
    classes = frozenset(map(plain, {type(module) for module in modules}))
    known = _known.get() or _Known()
    if classes not in known.closures:
        found = known.closures[classes] = {}
        for _ in _walk([*classes], _inside, found):
            pass
    return known.closures[classes]


def _held_by_modules(modules: Sequence[nn.Module]) -> list[object]:
    """The classes of a model's modules, and what these hold beside what every module has."""
    found: list[object] = [*{type(module) for module in modules}]
    for module in modules:
        if isinstance(module, Wide):  # No code but conjoin's own knows of what it holds.
            found.append(module.kind)
            continue
        found += [
            value
            for name, value in vars(module).items()
            if (name not in OF_MODULES or (value and name in HOOKS)) and type(value) not in SIMPLE
        ]
    return found


def reached_beside(modules: Sequence[nn.Module], given: object = ()) -> Reached:
    """What code that runs can reach beside a model's modules and what their code can reach.

    That is what the modules hold, what they are given, what other modules hold that are reached,
    and the hooks of all modules.

    Args:
        modules: the model's modules.
        given: what it is called with.
    """
    known = reached_by_code(modules)
    seen = {key: value for key, value in known.items() if not isinstance(value, nn.Module)}
    seen |= {id(module): module for module in modules}
    pending = [value for value in known.values() if id(value) not in seen]
    hooks = [value for name, value in vars(nn.modules.module).items() if name in OF_ALL_MODULES]
    pending += [*_held_by_modules(modules), *hooks, *pytree.tree_leaves(given)]
    return {id(value): value for value in _walk(pending, _inside_modules, seen)}


def made_once(make: Callable[[Reached], Made], reached: Reached) -> Made:
    """What a function makes of objects, made once for as long as that is remembered."""
    known = _known.get() or _Known()
    key = make, id(reached)
    if key not in known.made:
        known.made[key] = make(reached)
    made: Made = known.made[key]
    return made


def held_by(value: object) -> Iterator[object]:
    """All that an object holds, itself included: what is in it and in its attributes, not code."""
    return _walk([value], _data, {})


def _walk(
    pending: list[object],
    inside: Callable[[object], Iterable[object]],
    seen: Reached,
) -> Iterator[object]:
    """Each object once.

    Args:
        pending: where to begin.
        inside: what an object holds.
        seen: the objects that are known, by id; takes those that are found, and keeps them alive,
            so that no id is used twice.
    """
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen[id(value)] = value
            yield value
            pending += () if type(value) in SIMPLE else inside(value)


def _data(value: Any) -> Iterable[object]:
    if isinstance(value, (type, ModuleType, Tensor, nn.Module)):
        return ()
    if type(value) in CONTAINERS:
        return contents(value)
    if type(value) is FunctionType:
        return [
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *(cell.cell_contents for cell in value.__closure__ or () if is_full(cell)),
        ]
    return *_wrapped(value), *_kept(value), *own_items(value)


def _inside(value: Any) -> Iterable[object]:
    """What an object holds or, of a class or function, what its code names; no modules'."""
    if isinstance(value, nn.Module):
        return ()
    if type(value) in CONTAINERS:
        return contents(value)
    if isinstance(value, type):
        return () if is_trusted(value) else _members(value)
    if type(value) is FunctionType:
        return () if is_trusted(value) else _referred(value)
    held = _wrapped(value)
    return (type(value), *held, *_kept(value), *own_items(value)) if keeps(value) else held


def _inside_modules(value: Any) -> Iterable[object]:
    """What an object holds, a module too."""
    if isinstance(value, nn.Module):
        return type(value), *vars(value).values()
    return _inside(value)


def is_trusted(value: Any) -> bool:
    """Whether a class or function is of a package whose code is not looked into."""
    return str(value.__module__).split(".")[0] in TRUSTED


def contents(value: Any) -> Iterable[object]:
    """The values of a container."""
    return value.values() if isinstance(value, dict) else value


def base_of(value: object) -> type[Any] | None:
    """The class of Python's own containers that an object is one of; None where it is none."""
    return next((cls for cls in BASES if isinstance(value, cls)), None)


def own_items(value: Any) -> list[Any]:
    """What is in a container of a class of the user's own, past the methods of that class."""
    base = base_of(value)
    if base is None:
        return []
    if issubclass(base, dict):
        return [each for item in base.items(value) for each in item]
    return [*base.__iter__(value)]


def attributes(value: object) -> dict[str, Any] | None:
    """The attributes that an object itself has; None where it cannot have any."""
    if isinstance(value, threading.local):
        return vars(value)  # Those of this thread.
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def slots(value: object) -> dict[Any, object]:
    """What an object holds in slots of its classes, by what reads and sets each."""
    found: dict[Any, object] = {}
    for cls in type(value).__mro__:
        # Members of classes that are written in C are none that can be set.
        declares = "__slots__" in vars(cls) and not is_trusted(cls)
        for member in vars(cls).values() if declares else ():
            if type(member) is MemberDescriptorType:
                with contextlib.suppress(AttributeError):  # Nothing is in it.
                    found[member] = member.__get__(value)
    return found


def keeps(value: object) -> bool:
    """Whether an object is one that the user's code may keep something in, by its attributes."""
    cls = type(value)
    return (cls in HOLDERS or not is_trusted(cls)) and not isinstance(value, ModuleType)


def _kept(value: object) -> tuple[object, ...]:
    """What an object holds in attributes and slots."""
    return *(attributes(value) or {}).values(), *slots(value).values()


def _members(cls: type) -> Iterator[object]:
    """What a class defines, and its bases."""
    yield from cls.__mro__[1:]
    yield from vars(cls).values()


def _wrapped(value: object) -> tuple[object, ...]:
    """What is behind a property, a method, a partial function, a cache or a cell, or in a tuple."""
    if isinstance(value, tuple):
        return (*tuple.__iter__(value),)  # Past the methods of a class of the user's.
    if isinstance(value, property):
        return value.fget, value.fset
    if isinstance(value, (staticmethod, classmethod)):
        return (value.__func__,)
    if isinstance(value, MethodType):
        return value.__func__, value.__self__
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, functools.partialmethod):
        return value.func, value.args, value.keywords
    if isinstance(value, functools.cached_property):
        return (value.func,)
    if isinstance(value, functools._lru_cache_wrapper):
        return (value.__wrapped__,)
    return ()


def _referred(function: FunctionType) -> Iterator[object]:
    """What a function names, also in modules, and what it has from its definition."""
    named = [name for name in words(function.__code__) if isinstance(name, str)]
    namespaces = [function.__globals__]
    for name in named:
        held = function.__globals__.get(name)
        if isinstance(held, ModuleType) and held.__name__.split(".")[0] not in TRUSTED:
            namespaces.append(vars(held))
    for namespace in namespaces:
        yield from (namespace[name] for name in named if name in namespace)
    yield vars(function)
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from (cell.cell_contents for cell in function.__closure__ or () if is_full(cell))
    yield getattr(function, "__wrapped__", None)


def is_full(cell: CellType) -> bool:
    """Whether a variable of an enclosing function has a value yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # The variable has no value yet.
        return False
    return True
