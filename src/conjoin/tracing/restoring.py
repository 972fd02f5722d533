"""Notes how the objects are that a model's code can reach, and puts that back.

Caches and counters of Python's cannot be put back. What stands in their place meanwhile is a cache
of the same function, and a counter that goes on from there.
"""

from __future__ import annotations

import array
import ast
import copy
import functools
import itertools
import operator
import random
from collections.abc import Callable, Iterable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from conjoin.reachable import (
    CONTAINERS,
    Reached,
    attributes,
    base_of,
    contents,
    is_full,
    is_trusted,
    keeps,
    own_items,
    slots,
    words,
)

Undo = Callable[[], object]

_MISSING = object()


WARNED = "__warningregistry__"
"""The global that Python notes the warnings in that it has shown, to show them once."""

SHARED = (functools._lru_cache_wrapper, itertools.count, *map(type, map(iter, ([], (), range(0)))))
"""Types of caches and counters that others stand in for."""

MAY_BE_SHARED = frozenset({*SHARED, staticmethod, classmethod})
"""Types of them, and of what may hold one."""


def savers(reached: Reached) -> list[Callable[[], Undo]]:
    """What notes how objects are now, and says how to put that back, for each that can change."""
    callers = vars(nn.modules.module)
    namespaces = {id(callers): (callers, {WARNED})}
    found: list[Callable[[], Undo]] = []
    for value in reached.values():
        if type(value) is not FunctionType:
            save = _saver_of(value)
            found += [] if save is None else [functools.partial(save, value)]
        elif not is_trusted(value):
            space = value.__globals__
            names = namespaces.setdefault(id(space), (space, {WARNED}))[1]
            words_in = words(value.__code__)
            names.update(word for word in words_in if isinstance(word, str) and word.isidentifier())
            found += [functools.partial(_save_cell, cell) for cell in value.__closure__ or ()]
    found += [functools.partial(_save_names, held, tuple(n)) for held, n in namespaces.values()]
    return found


def _saver_of(value: Any) -> Callable[[Any], Undo] | None:
    """What notes how an object is; None where it cannot change, or is not the model's affair."""
    if isinstance(value, (Tensor, nn.Module)):  # Those of the model itself may have to change.
        return None
    if type(value) in CONTAINERS:
        return _save_container
    if isinstance(value, torch.Generator):
        return lambda generator: functools.partial(generator.set_state, generator.get_state())
    if isinstance(value, random.Random):
        return lambda generator: functools.partial(generator.setstate, generator.getstate())
    if type(value).__name__ == "Generator" and type(value).__module__.startswith("numpy."):
        return lambda generator: functools.partial(
            setattr, generator.bit_generator, "state", generator.bit_generator.state
        )
    if type(value).__name__ == "RandomState" and type(value).__module__.startswith("numpy."):
        return lambda generator: functools.partial(generator.set_state, generator.get_state())
    if type(value) in (array.array, bytearray) or _is_numbers(value):
        return lambda numbers: functools.partial(_put_back_numbers, numbers, copy.copy(numbers))
    if isinstance(value, functools._lru_cache_wrapper):
        return lambda cache: functools.partial(_put_back_cache, cache, cache.cache_info())
    if isinstance(value, type):
        return None if is_trusted(value) else _save_class
    if not keeps(value):
        return None
    return _save_attributes if base_of(value) is None else _save_items


def save_module(module: nn.Module) -> Undo:
    """How to put back what a module holds, and what is in the containers among that."""
    own = vars(module)
    held = [(v, v.copy() if v else ()) for v in own.values() if type(v) in CONTAINERS]
    undo = functools.partial(_put_back_module, own, dict(own), held)
    _lend(own)
    return undo


def save_tensor(tensor: Tensor) -> Undo:
    """How to put back what is known of a tensor beside its values, which `keeping` puts back."""
    with torch._C.DisableTorchFunction():
        plain = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
        if not plain or tensor.layout is not torch.strided or tensor.is_inference():
            return functools.partial(bool)
        gradient = tensor.grad if tensor.is_leaf or tensor.retains_grad else _MISSING
        held = tensor.data, tensor._version, tensor.requires_grad, gradient, dict(vars(tensor))
        return functools.partial(_put_back_tensor, tensor, *held)


def _save_container(value: Any) -> Undo:
    undo = functools.partial(_put_back, value, value.copy() if value else ())
    if isinstance(value, dict):
        _lend(value)
    elif isinstance(value, list):
        for at, held in enumerate(value):
            if _is_shared(held):
                value[at] = _stand_in(held)
    return undo


def _save_class(cls: type) -> Undo:
    before = dict(vars(cls))
    for name, value in before.items():
        if _is_shared(value):
            type.__setattr__(cls, name, _stand_in(value))  # Whatever its own class thinks of it.
    return functools.partial(_put_back_class, cls, before)


def _save_attributes(value: Any) -> Undo:
    own = attributes(value)
    own = {} if own is None else own
    undo = functools.partial(_put_back_attributes, value, own, own.copy(), slots(value))
    _lend(own)
    return undo


def _save_items(value: Any) -> Undo:
    """How to put back a container of a class of the user's own, past the methods of that class."""
    return functools.partial(_put_back_items, value, own_items(value), _save_attributes(value))


def _is_numbers(value: Any) -> bool:
    """Whether a value is an array of NumPy's that may change."""
    cls = type(value)
    return cls.__name__ == "ndarray" and cls.__module__ == "numpy" and value.flags.writeable


def _save_cell(cell: CellType) -> Undo:
    """How to put back the variable of an enclosing function."""
    if not is_full(cell):
        return functools.partial(bool)
    before = cell.cell_contents
    if _is_shared(before):
        cell.cell_contents = _stand_in(before)
    return functools.partial(setattr, cell, "cell_contents", before)


def _save_names(namespace: dict[str, Any], names: tuple[str, ...]) -> Undo:
    """How to put back the globals that functions name."""
    held = [*map(namespace.get, names, itertools.repeat(_MISSING))]
    for name, value in zip(names, held, strict=True):
        if _is_shared(value):
            namespace[name] = _stand_in(value)
    warned = namespace.get(WARNED, {})
    return functools.partial(_put_back_names, namespace, names, held, warned, warned.copy())


def _lend(held: dict[Any, Any]) -> None:
    """Has others stand in for the caches and counters that are held."""
    if MAY_BE_SHARED.isdisjoint(map(type, held.values())):
        return
    for name, value in held.items():
        if _is_shared(value):
            held[name] = _stand_in(value)


def _is_shared(value: object) -> bool:
    """Whether a value is a cache or a counter, or a method that is one."""
    if isinstance(value, (staticmethod, classmethod)):
        return type(value.__func__) in SHARED
    return type(value) in SHARED


def _stand_in(value: Any) -> Any:
    """Another cache of the same function, with nothing in it; or a counter that is as far."""
    if isinstance(value, (staticmethod, classmethod)):
        return type(value)(_stand_in(value.__func__))
    if isinstance(value, functools._lru_cache_wrapper):
        made = functools.lru_cache(**value.cache_parameters())(value.__wrapped__)
        vars(made).update(vars(value))
        return made
    if isinstance(value, itertools.count):  # Which later versions of Python do not copy.
        at = ast.literal_eval(repr(value).removeprefix("count"))
        return itertools.count(*(at if isinstance(at, tuple) else (at,)))
    return copy.copy(value)


def _put_back(value: Any, before: Any) -> None:
    if not value and not before:
        return
    changed = len(value) != len(before) or _differ(value, before)
    if changed or _differ(contents(value), contents(before)):
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(before)


def _differ(values: Iterable[object], before: Iterable[object]) -> bool:
    return not all(map(operator.is_, values, before))


def _put_back_items(value: Any, before: list[Any], attributes_too: Undo) -> None:
    base: Any = base_of(value)
    now = own_items(value)
    if len(now) != len(before) or _differ(now, before):
        base.clear(value)
        if issubclass(base, dict):
            for key, item in zip(before[::2], before[1::2], strict=True):
                base.__setitem__(value, key, item)
        else:
            (set.update if base is set else base.extend)(value, before)
    attributes_too()


def _put_back_numbers(value: Any, before: Any) -> None:
    value[... if _is_numbers(value) else slice(None)] = before


def _put_back_module(
    own: dict[str, Any], before: dict[str, Any], held: list[tuple[Any, Any]]
) -> None:
    _put_back(own, before)
    for value, copied in held:
        _put_back(value, copied)


def _put_back_tensor(
    tensor: Tensor,
    data: Tensor,
    version: int,
    trains: bool,
    gradient: Any,
    before: dict[str, Any],
) -> None:
    with torch._C.DisableTorchFunction():
        if tensor.untyped_storage()._cdata != data.untyped_storage()._cdata:
            tensor.data = data
        if tensor.requires_grad != trains:
            tensor.requires_grad_(trains)
        if gradient is not _MISSING and tensor.grad is not gradient:
            tensor.grad = gradient
        if tensor._version != version:  # A fake view counts what is done to it here.
            torch._C._autograd._unsafe_set_version_counter((tensor,), (version,))
    _put_back(vars(tensor), before)


def _put_back_attributes(
    value: Any, own: dict[str, Any], before: dict[str, Any], kept: dict[Any, object]
) -> None:
    _put_back(own, before)
    now = slots(value)
    for member in now.keys() - kept.keys():
        member.__delete__(value)
    for member, held in kept.items():
        if now.get(member, _MISSING) is not held:
            member.__set__(value, held)


def _put_back_names(
    namespace: dict[str, Any],
    names: Iterable[str],
    held: Iterable[Any],
    warned: dict[Any, Any],
    before: dict[Any, Any],
) -> None:
    _put_back(warned, before)
    for name, value in zip(names, held, strict=True):
        if namespace.get(name, _MISSING) is value:
            continue
        if value is _MISSING:
            del namespace[name]
        else:
            namespace[name] = value


def _put_back_class(cls: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(cls) if name not in before]:
        type.__delattr__(cls, name)
    for name, value in before.items():
        if vars(cls).get(name) is not value:
            type.__setattr__(cls, name, value)


def _put_back_cache(cache: Any, before: Any) -> None:
    if cache.cache_info() != before:
        cache.cache_clear()
