"""What `isinstance`, `hasattr`, `getattr` and `super` answer in the sandbox."""

from __future__ import annotations

import enum
import sys
from abc import ABCMeta
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from conjoin.layers.view import View
from conjoin.tracing.known import is_tensor
from conjoin.tracing.proxies import INNARDS, UnsoundError
from conjoin.tracing.sandbox.objects import Object, value_of
from conjoin.tracing.sandbox.stand_ins import Class, Getter, Package, Super

if TYPE_CHECKING:
    from conjoin.tracing.sandbox.sandbox import Sandbox


def super_of(sandbox: Sandbox, *args: Any) -> Super:
    """What `super()` gives."""
    if not args:
        frame = sys._getframe(1)
        args = frame.f_locals["__class__"], frame.f_locals[frame.f_code.co_varnames[0]]
    cls, module = args
    cls = vars(cls)["_cls"] if isinstance(cls, Class) else cls
    if not isinstance(module, nn.Module) or isinstance(module, View):
        sandbox.refuse("super() of no module")
    return Super(sandbox, cls, module)


def has_attribute(sandbox: Sandbox, value: Any, name: str) -> bool:
    """What `hasattr` gives."""
    _check_object(sandbox, value)
    return hasattr(value, name)


def get_attribute(sandbox: Sandbox, value: Any, name: str, *default: Any) -> Any:
    """What `getattr` gives."""
    if default:
        _check_object(sandbox, value)
    if name in INNARDS or name.startswith("__"):
        sandbox.refuse(f"it reads {name}")
    if isinstance(value, nn.Module):
        try:
            found = sandbox.look_up(value, name, own=True)
        except AttributeError:
            return getattr(value, name, *default)
        return found.function(value) if type(found) is Getter else found
    return getattr(value, name, *default)


def _check_object(sandbox: Sandbox, value: object) -> None:
    if isinstance(value, (fx.Proxy, Package, Class, Super)):
        sandbox.refuse("it asks what attributes a value has")


def is_instance(sandbox: Sandbox, value: Any, info: Any) -> bool:
    """What `isinstance` gives."""
    classes = [*_classes(info)]
    for cls in classes:
        if type(cls) not in (type, ABCMeta, type(Tensor), enum.EnumMeta):
            sandbox.refuse("it asks for a class that decides by itself")
    if isinstance(value, (Package, Class, Super)):
        sandbox.refuse("it asks for the class of something that is no value")
    if not isinstance(value, fx.Proxy):
        plain = value_of(value) if isinstance(value, Object) else value
        return isinstance(plain, tuple(classes))
    if not is_tensor(value.node, sandbox.paths):
        sandbox.refuse("it asks for the class of a value")
    return issubclass(Tensor, tuple(classes))


def _classes(info: Any) -> Iterator[type]:
    if type(info) is tuple:
        for item in info:
            yield from _classes(item)
    elif type(info) is Class:
        yield vars(info)["_cls"]
    elif isinstance(info, type):
        yield info
    else:
        raise UnsoundError("it asks for the class of a value in an unknown way")
