"""Looking at a model leaves no trace on it, nor on the process.

A run or a trace of the model's code may draw random numbers, break off between entering a mode
and leaving it, and keep things: in attributes of its modules, in globals, on classes, in defaults
and closures, in caches of functions. All of that is put back. What was kept during a run on fake
tensors would be fake, and the model would find it there later.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

TRUSTED = frozenset({"torch", "conjoin", "numpy", *sys.stdlib_module_names}) - {"__main__"}
"""Packages whose code is not looked into."""

CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)
"""Types of object whose contents are put back."""

SIMPLE = (bool, int, float, complex, str, bytes, type(None), Tensor, torch.dtype, torch.device)
"""Types of object that hold nothing else."""

OF_MODULES = frozenset(vars(nn.Module()))
"""The attributes that every module has."""

HOOKS = frozenset(name for name in OF_MODULES if name.endswith(("_hooks", "_hooks_with_kwargs")))
"""Those among them that hold functions."""

MODES = ("cpu", "cuda", "mps", "xpu")
"""Types of device with an autocast mode of their own."""


@contextlib.contextmanager
def undisturbed(model: nn.Module | None = None) -> Iterator[None]:
    """Leaves the random streams and the modes as they were, and what the model's code keeps.

    Args:
        model: the model whose code runs, if it may keep something.
    """
    undos = [] if model is None else list(_snapshots(model))
    with _streams(), _modes():
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


def functions_of(model: nn.Module) -> Iterator[FunctionType]:
    """The functions, PyTorch's own aside, that the model's code consists of and refers to."""
    for value in _reachable(model):
        if type(value) is FunctionType and not _is_trusted(value):
            yield value


def words(code: CodeType) -> Iterator[object]:
    """The names and constants in code and in the functions in it."""
    yield from (*code.co_names, *code.co_consts)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from words(constant)


def _reachable(model: nn.Module) -> Iterator[object]:
    """What the model's modules hold, and what their code can reach, each object once."""
    pending: list[object] = [*{type(module) for module in model.modules()}]
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) not in SIMPLE and (name not in OF_MODULES or (value and name in HOOKS)):
                pending.append(value)
    seen: dict[int, object] = {}  # Alive, so that no id is used twice.
    while pending:
        value = pending.pop()
        simple = type(value) in SIMPLE or isinstance(value, nn.Module)
        if not simple and id(value) not in seen:
            seen[id(value)] = value
            yield value
            pending += _inside(value)


def _inside(value: Any) -> Iterable[object]:
    """What an object holds or, of a class or function, what its code names."""
    if type(value) in CONTAINERS:
        return _contents(value)
    if isinstance(value, type):
        return () if _is_trusted(value) else _members(value)
    if type(value) is FunctionType:
        return () if _is_trusted(value) else _referred(value)
    if (held := _wrapped(value)) or _is_trusted(type(value)) or isinstance(value, ModuleType):
        return held
    return type(value), *(_attributes(value) or {}).values()


Undo = Callable[[], object]


def _snapshots(model: nn.Module) -> Iterator[Undo]:
    """How to put back what the model's modules hold, and what their code can reach and change."""
    for module in model.modules():
        attributes = vars(module)
        held = [(value, value.copy()) for value in attributes.values() if type(value) in CONTAINERS]
        yield functools.partial(_put_back_module, attributes, dict(attributes), held)
    for value in _reachable(model):
        yield from _snapshot(value)


def _snapshot(value: Any) -> Iterator[Undo]:
    if type(value) in CONTAINERS:
        yield functools.partial(_put_back, value, value.copy())
    elif isinstance(value, torch.Generator):
        yield functools.partial(value.set_state, value.get_state())
    elif isinstance(value, random.Random):
        yield functools.partial(value.setstate, value.getstate())
    elif type(value).__name__ == "Generator" and type(value).__module__.startswith("numpy."):
        yield functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif isinstance(value, functools._lru_cache_wrapper):
        yield functools.partial(_put_back_cache, value, value.cache_info())
    elif isinstance(value, type):
        if not _is_trusted(value):
            yield functools.partial(_put_back_class, value, dict(vars(value)))
    elif type(value) is FunctionType:
        if not _is_trusted(value):
            yield from _bindings(value)
    elif not _is_trusted(type(value)) and (own := _attributes(value)) is not None:
        yield functools.partial(_put_back, own, dict(own))


def _is_trusted(value: Any) -> bool:
    return str(value.__module__).split(".")[0] in TRUSTED


def _contents(value: Any) -> Iterable[object]:
    return value.values() if isinstance(value, dict) else value


def _attributes(value: object) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if type(found) is dict else None


def _members(cls: type) -> Iterator[object]:
    """What a class defines, and its bases."""
    yield from cls.__mro__[1:]
    yield from vars(cls).values()


def _wrapped(value: object) -> tuple[object, ...]:
    """What is behind a property, a method, a partial function, a cache or a cell, or in a tuple."""
    if isinstance(value, tuple):
        return value
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
    yield from (cell.cell_contents for cell in function.__closure__ or () if _is_full(cell))
    yield getattr(function, "__wrapped__", None)


def _is_full(cell: CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:  # The variable has no value yet.
        return False
    return True


def _bindings(function: FunctionType) -> Iterator[Undo]:
    """How to put back the globals and the variables of enclosing functions that one names."""
    namespace, missing = function.__globals__, object()
    for name in words(function.__code__):
        if isinstance(name, str) and name.isidentifier():
            held = namespace.get(name, missing)
            yield functools.partial(_put_back_name, namespace, name, held, missing)
    for cell in function.__closure__ or ():
        if _is_full(cell):
            yield functools.partial(setattr, cell, "cell_contents", cell.cell_contents)


def _put_back(value: Any, before: Any) -> None:
    if not value and not before:
        return
    keys = isinstance(value, dict) and list(value) != list(before)
    if keys or len(value) != len(before) or _differ(_contents(value), _contents(before)):
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(before)


def _differ(values: Iterable[object], before: Iterable[object]) -> bool:
    return not all(map(operator.is_, values, before))


def _put_back_module(
    attributes: dict[str, Any], before: dict[str, Any], held: list[tuple[Any, Any]]
) -> None:
    _put_back(attributes, before)
    for value, contents in held:
        _put_back(value, contents)


def _put_back_name(namespace: dict[str, Any], name: str, held: object, missing: object) -> None:
    if namespace.get(name, missing) is held:
        return
    if held is missing:
        del namespace[name]
    else:
        namespace[name] = held


def _put_back_class(cls: type, before: dict[str, Any]) -> None:
    for name in [name for name in vars(cls) if name not in before]:
        delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name) is not value:
            setattr(cls, name, value)


def _put_back_cache(cache: Any, before: Any) -> None:
    if cache.cache_info() != before:
        cache.cache_clear()
