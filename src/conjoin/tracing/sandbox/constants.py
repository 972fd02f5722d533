"""Values that cannot change, and snapshots that tell whether a container has changed."""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from conjoin.reachable import is_trusted
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.sandbox.classes import users_classes
from conjoin.tracing.sandbox.objects import Object, is_object

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of value that a trace may take as they are, as long as they are watched."""

MUTABLE = (list, dict, set, OrderedDict)
"""Types of container that a trace may look into, as long as the contents are watched."""


def is_constant(value: object) -> bool:
    """Whether a value cannot change."""
    if type(value) is tuple:
        return all(map(is_constant, value))
    if isinstance(value, enum.Enum):
        own = [v for base in users_classes(type(value)) for v in vars(base).values()]
        methods = (v for v in own if type(v) is FunctionType and not is_trusted(v))
        return is_constant(value.value) and not any(methods)
    return type(value) in CONSTANTS


def is_container(value: object) -> bool:
    """Whether a value holds others, and may change or hold what does."""
    return type(value) in (*MUTABLE, tuple) and not is_constant(value)


def frozen(
    value: Any,
    paths: Mapping[nn.Module, str] = MappingProxyType({}),
    *,
    objects: bool = False,
) -> Any:
    """A container as nested tuples, which are equal only where trace and call cannot differ.

    Args:
        value: the container, or something in it.
        paths: the modules that it may hold, and their paths.
        objects: whether it may hold objects, which are looked at by themselves.

    Raises:
        UnsoundError: it holds something else than constants and these modules.
    """
    cls = type(value)
    if cls is set:
        return (cls, *[frozen(item, paths) for item in value])
    if cls in (list, tuple):
        return (cls, *[frozen(item, paths, objects=objects) for item in value])
    if cls in (dict, OrderedDict):
        items = value.items()
        return (cls, *[(frozen(k, paths), frozen(v, paths, objects=objects)) for k, v in items])
    if objects and (cls is Object or is_object(value)):
        return Object, id(value) if cls is Object else cls
    if isinstance(value, nn.Module) and value in paths:
        return nn.Module, paths[value]
    if cls is float or cls is complex:
        return cls, repr(value)
    if isinstance(value, fx.Proxy):
        return fx.Proxy, id(value)
    if not is_constant(value):
        raise UnsoundError("a container with something else than constants")
    return cls, value


def snapshots(value: Any) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """The containers in a container that can change, itself included, and what is in each."""
    if type(value) in (dict, OrderedDict):
        yield value, (*value, *value.values())
        inside: Any = value.values()
    elif type(value) in (list, set, tuple):
        if type(value) is not tuple:
            yield value, tuple(value)
        inside = value
    else:
        return
    for item in inside:
        yield from snapshots(item)
