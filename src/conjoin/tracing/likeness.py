"""Tells when what was traced of one module goes for another one too.

Models hold the same block many times. Where two modules are alike in all that a trace, and the
passes after it, may look at, one is traced and the other takes over what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from conjoin.layers.enclosing import ENCLOSES
from conjoin.layers.view import View
from conjoin.layers.wide import Wide
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.sandbox.constants import MUTABLE, frozen

HOLDERS = ("_modules", "_parameters", "_buffers")
"""The attributes of a module that hold its children and its tensors."""

OF_WIDE = (
    "biased",
    "contiguous",
    "together",
    "channels_last",
    "hidden",
    "training",
    "varies",
    "paid",
)
"""What a rewritten forward, or a pass, may ask of a wide layer beside its sizes."""


def likeness(
    module: nn.Module, standing: Callable[[nn.Module], Hashable], but: tuple[str, ...] = ()
) -> Hashable:
    """All that may decide what is traced of a module, its values aside.

    Args:
        module: the module.
        standing: what else is to be equal for one of the modules inside.
        but: the names of attributes that decide nothing.

    Returns:
        What is equal for modules of which the same is traced. An object that is no constant is
        equal to itself only.
    """
    paths: dict[nn.Module, str] = {}
    for path, inner in _inside(module):
        paths.setdefault(inner, path)
    numbers: dict[Hashable, int] = {}

    def number(thing: Hashable) -> int:
        return numbers.setdefault(thing, len(numbers))

    wides = {inner.wide_layer for inner in paths if isinstance(inner, View)}
    facts = {wide: _of_wide(wide) for wide in wides}
    apart = {*HOLDERS, ENCLOSES, *but}
    return tuple(
        (
            path,
            type(inner),
            standing(inner),
            _part(inner, number, facts) if isinstance(inner, View) else None,
            _held(inner, paths, number),
            tuple(
                [(name, _value(v, paths)) for name, v in vars(inner).items() if name not in apart]
            ),
        )
        for inner, path in paths.items()
    )


def _inside(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """A module and those in it at all their paths, wide layers aside."""
    yield path, module
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, Wide):
            yield from _inside(child, f"{path}.{name}")


def _part(
    view: View, number: Callable[[Hashable], int], facts: Mapping[Wide, Hashable]
) -> Hashable:
    """Which part of which wide layer a view is."""
    return number(view.wide_layer), view.conjoin_index, facts[view.wide_layer]


def _of_wide(wide: Wide) -> Hashable:
    """What is to be equal for wide layers."""
    facts = {name: value for name, value in vars(wide).items() if name in OF_WIDE}
    tensors = (wide.weight, wide.bias)
    return (
        wide.kind,
        _value(list(wide.settings.items()), {}),
        tuple(facts.items()),
        tuple(None if tensor is None else _facts(tensor) for tensor in tensors),
        tuple(wide.shapes),
        tuple(wide.widths),
        tuple(wide.running),
    )


def _held(
    module: nn.Module, paths: Mapping[nn.Module, str], number: Callable[[Hashable], int]
) -> Hashable:
    """The children and tensors of a module, and which are the same objects."""
    children = tuple(
        (name, paths.get(child) if child is not None else None)
        for name, child in module._modules.items()
        if not isinstance(child, Wide)
    )
    tensors = tuple(
        (name, None if tensor is None else (number(id(tensor)), *_facts(tensor)))
        for held in (module._parameters, module._buffers)
        for name, tensor in held.items()
    )
    return children, tensors


def _facts(tensor: Tensor) -> tuple[Hashable, ...]:
    if nn.parameter.is_lazy(tensor):
        return (type(tensor),)
    # Those of a fake tensor, which stands for a plain one, are its own affair.
    attributes = {} if isinstance(tensor, FakeTensor) else vars(tensor)
    return (
        type(tensor),
        tensor.shape,
        tensor.stride() if tensor.layout is torch.strided else (),
        tensor.dtype,
        tensor.device,
        tensor.layout,
        tensor.requires_grad,
        tuple((name, id(value)) for name, value in attributes.items()),
    )


def _value(value: Any, paths: Mapping[nn.Module, str]) -> Hashable:
    """A constant by what it is, and anything else by itself."""
    if type(value) in MUTABLE and not value:  # As most of what each module has.
        return "constant", (type(value),)
    try:
        return "constant", frozen(value, paths)
    except (UnsoundError, RecursionError):
        return "object", id(value)
