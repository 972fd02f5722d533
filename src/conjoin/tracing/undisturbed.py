"""Puts back what a look at a model may change, on the model and in the process.

A run or a trace of the model's code may draw random numbers, break off between entering a mode
and leaving it, and keep things: in attributes of its modules, in globals, on classes, in defaults
and closures, in caches of functions. All of that is put back. What was kept during a run on fake
tensors would be fake, and the model would find it there later.
"""

from __future__ import annotations

import array
import contextlib
import copy
import functools
import itertools
import operator
import random
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from conjoin.reachable import (
    CONTAINERS,
    Reached,
    attributes,
    base_of,
    contents,
    is_full,
    is_trusted,
    keeps,
    made_once,
    own_items,
    reached_beyond,
    reached_by_code,
    slots,
    words,
)

MODES = ("cpu", "cuda", "mps", "xpu")
"""Types of device with an autocast mode of their own."""

Undo = Callable[[], object]

_MISSING = object()


@contextlib.contextmanager
def undisturbed(model: nn.Module | None = None, *, reached: bool = True) -> Iterator[None]:
    """Leaves the random streams and the modes as they were, and what the model's code keeps.

    Args:
        model: the model whose code runs, if it may keep something.
        reached: whether what is kept beyond the modules is put back too; without, `putting_back`
            does so, for many looks at once.
    """
    undos = [] if model is None else list(_snapshots(model, reached=reached))
    # Dynamo never again compiles a function that is called within a dispatch mode, as a look is.
    with _streams(), _modes(), torch.compiler.set_stance("force_eager"):
        try:
            yield
        finally:
            for undo in undos:
                undo()


@contextlib.contextmanager
def putting_back(model: nn.Module) -> Iterator[None]:
    """Leaves what the model's code can reach and change as it was, but for the modules."""
    undos = list(_reached(model))
    try:
        yield
    finally:
        for undo in undos:
            undo()


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Leaves the random streams of Python, NumPy and PyTorch as they were."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def start_streams(seed: int) -> None:
    """Starts the random streams of Python, NumPy and PyTorch anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


@contextlib.contextmanager
def _modes() -> Iterator[None]:
    """Leaves the modes as they were, also where the code inside broke off within one."""
    gradients, dtype = torch.is_grad_enabled(), torch.get_default_dtype()
    autocast = [
        (mode, torch.is_autocast_enabled(mode), torch.get_autocast_dtype(mode)) for mode in MODES
    ]
    cached = torch.is_autocast_cache_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    functions = torch._C._len_torch_function_stack()
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(gradients)
            yield
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        for mode, enabled, precision in autocast:
            torch.set_autocast_enabled(mode, enabled)
            torch.set_autocast_dtype(mode, precision)
        torch.set_autocast_cache_enabled(cached)
        if torch.are_deterministic_algorithms_enabled() != deterministic:
            torch.use_deterministic_algorithms(deterministic, warn_only=warns)
        while torch._C._len_torch_function_stack() > functions:
            torch._C._pop_torch_function_stack()


@contextlib.contextmanager
def letting_go() -> Iterator[None]:
    """Frees what the frames of failed code hold before the error goes on.

    A mode that it entered by hand and never left must be undone while those around it are on.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def _snapshots(model: nn.Module, *, reached: bool) -> Iterator[Undo]:
    """How to put back what the model's modules hold, and what their code can reach and change."""
    for module in model.modules():
        own = vars(module)
        held = [(value, value.copy()) for value in own.values() if type(value) in CONTAINERS]
        yield functools.partial(_put_back_module, own, dict(own), held)
    if reached:
        yield from _reached(model)


def _reached(model: nn.Module) -> Iterator[Undo]:
    """How to put back what the model's code can reach and change, but for the modules."""
    known = reached_by_code(model)
    for save in made_once(_savers, known):
        yield save()
    for save in _savers({id(value): value for value in reached_beyond(model, known)}):
        yield save()


def _savers(reached: Reached) -> list[Callable[[], Undo]]:
    """What notes how objects are now, and says how to put that back, for each that can change."""
    namespaces: dict[int, tuple[dict[str, Any], set[str]]] = {}
    savers: list[Callable[[], Undo]] = []
    for value in reached.values():
        if type(value) is not FunctionType:
            save = _saver_of(value)
            savers += [] if save is None else [functools.partial(save, value)]
        elif not is_trusted(value):
            names = namespaces.setdefault(id(value.__globals__), (value.__globals__, set()))[1]
            words_in = words(value.__code__)
            names.update(word for word in words_in if isinstance(word, str) and word.isidentifier())
            savers += [functools.partial(_save_cell, cell) for cell in value.__closure__ or ()]
    savers += [functools.partial(_save_names, held, tuple(n)) for held, n in namespaces.values()]
    return savers


def _saver_of(value: Any) -> Callable[[Any], Undo] | None:
    """What notes how an object is; None where it cannot change, or is not the model's affair."""
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


def _save_container(value: Any) -> Undo:
    return functools.partial(_put_back, value, value.copy())


def _save_class(cls: type) -> Undo:
    return functools.partial(_put_back_class, cls, dict(vars(cls)))


def _save_attributes(value: Any) -> Undo:
    own = attributes(value) or {}
    return functools.partial(_put_back_attributes, value, own, own.copy(), slots(value))


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
    return functools.partial(setattr, cell, "cell_contents", cell.cell_contents)


def _save_names(namespace: dict[str, Any], names: tuple[str, ...]) -> Undo:
    """How to put back the globals that functions name."""
    held = [*map(namespace.get, names, itertools.repeat(_MISSING))]
    return functools.partial(_put_back_names, namespace, names, held)


def _put_back(value: Any, before: Any) -> None:
    if not value and not before:
        return
    keys = isinstance(value, dict) and list(value) != list(before)
    if keys or len(value) != len(before) or _differ(contents(value), contents(before)):
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


def _put_back_names(namespace: dict[str, Any], names: Iterable[str], held: Iterable[Any]) -> None:
    for name, value in zip(names, held, strict=True):
        if namespace.get(name, _MISSING) is value:
            continue
        if value is _MISSING:
            del namespace[name]
        else:
            namespace[name] = value


def _put_back_class(cls: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(cls) if name not in before]:
        delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name) is not value:
            setattr(cls, name, value)


def _put_back_cache(cache: Any, before: Any) -> None:
    if cache.cache_info() != before:
        cache.cache_clear()
