"""Looking at a model leaves no trace on it, nor on the process."""

from __future__ import annotations

import contextlib
import random
import sys
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the random streams of Python, NumPy and PyTorch as they were, and the grad mode."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else []
    try:
        with torch.random.fork_rng(devices), torch.set_grad_enabled(torch.is_grad_enabled()):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undoes what a trace sets on the modules: attributes, and the contents of containers."""
    held = [(module, dict(vars(module))) for module in model.modules()]
    contents: list[tuple[Any, Any]] = [
        (value, value.copy())
        for _, attributes in held
        for value in attributes.values()
        if type(value) in (list, dict, set, OrderedDict)
    ]
    try:
        yield
    finally:
        for module, attributes in held:
            vars(module).clear()
            vars(module).update(attributes)
        for value, before in contents:
            value.clear()
            (value.extend if isinstance(value, list) else value.update)(before)
