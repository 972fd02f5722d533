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
import traceback
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

import torch
from torch import nn

from conjoin.reachable import (
    CONTAINERS,
    attributes,
    contents,
    is_full,
    is_trusted,
    reachable_from,
    words,
)

MODES = ("cpu", "cuda", "mps", "xpu")
"""Types of device with an autocast mode of their own."""


@contextlib.contextmanager
def undisturbed(model: nn.Module | None = None, *, reached: bool = True) -> Iterator[None]:
    """Leaves the random streams and the modes as they were, and what the model's code keeps.

    Args:
        model: the model whose code runs, if it may keep something.
        reached: whether what is kept beyond the modules is put back too; without, `putting_back`
            does so, for many looks at once.
    """
    undos = [] if model is None else list(_snapshots(model, reached=reached))
    with _streams(), _modes():
        try:
            yield
        finally:
            for undo in undos:
                undo()


@contextlib.contextmanager
def putting_back(model: nn.Module) -> Iterator[None]:
    """Leaves what the model's code can reach and change as it was, but for the modules."""
    undos = [undo for value in reachable_from(model) for undo in _snapshot(value)]
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


Undo = Callable[[], object]


def _snapshots(model: nn.Module, *, reached: bool) -> Iterator[Undo]:
    """How to put back what the model's modules hold, and what their code can reach and change."""
    for module in model.modules():
        own = vars(module)
        held = [(value, value.copy()) for value in own.values() if type(value) in CONTAINERS]
        yield functools.partial(_put_back_module, own, dict(own), held)
    for value in reachable_from(model) if reached else ():
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
        if not is_trusted(value):
            yield functools.partial(_put_back_class, value, dict(vars(value)))
    elif type(value) is FunctionType:
        if not is_trusted(value):
            yield from _bindings(value)
    elif not is_trusted(type(value)) and (own := attributes(value)) is not None:
        yield functools.partial(_put_back, own, dict(own))


def _bindings(function: FunctionType) -> Iterator[Undo]:
    """How to put back the globals and the variables of enclosing functions that one names."""
    namespace, missing = function.__globals__, object()
    for name in words(function.__code__):
        if isinstance(name, str) and name.isidentifier():
            held = namespace.get(name, missing)
            yield functools.partial(_put_back_name, namespace, name, held, missing)
    for cell in function.__closure__ or ():
        if is_full(cell):
            yield functools.partial(setattr, cell, "cell_contents", cell.cell_contents)


def _put_back(value: Any, before: Any) -> None:
    if not value and not before:
        return
    keys = isinstance(value, dict) and list(value) != list(before)
    if keys or len(value) != len(before) or _differ(contents(value), contents(before)):
        value.clear()
        (value.update if isinstance(value, (dict, set)) else value.extend)(before)


def _differ(values: Iterable[object], before: Iterable[object]) -> bool:
    return not all(map(operator.is_, values, before))


def _put_back_module(
    own: dict[str, Any], before: dict[str, Any], held: list[tuple[Any, Any]]
) -> None:
    _put_back(own, before)
    for value, copied in held:
        _put_back(value, copied)


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
