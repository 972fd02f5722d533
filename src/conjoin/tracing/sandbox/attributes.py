"""Attributes of modules that code in the sandbox reads and sets."""

from __future__ import annotations

import functools
from types import FunctionType, MappingProxyType, MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from conjoin.layers.owner import LENT
from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View
from conjoin.reachable import OF_MODULES, is_trusted
from conjoin.tracing.sandbox.allowed import LISTINGS
from conjoin.tracing.sandbox.asking import get_attribute
from conjoin.tracing.sandbox.classes import static
from conjoin.tracing.sandbox.constants import is_constant, is_container
from conjoin.tracing.sandbox.objects import MISSING, is_object
from conjoin.tracing.sandbox.stand_ins import Getter

if TYPE_CHECKING:
    from conjoin.tracing.sandbox.sandbox import Sandbox

REGISTERED = ("_modules", "_parameters", "_buffers")
"""The attributes of `nn.Module` that hold what it looks for where it has no such attribute."""


COMPILED = "_compiled_call_impl"
"""The attribute of a module that is called in its place once it is compiled."""


def read(sandbox: Sandbox, module: nn.Module, name: str, *, own: bool) -> Any:
    """An attribute of a module, for the user's `own` code or that of PyTorch."""
    path = sandbox.paths.get(module)
    raw = functools.partial(object.__getattribute__, module)
    if path is None:
        if own:
            sandbox.refuse("it reads a module of somewhere else")
        return raw(name)
    if (path, name) in sandbox.stored:
        return sandbox.stored[path, name]
    held = raw("__dict__")
    if name == "forward" and not own:
        if sandbox.stack[-1] is not module:
            return raw(name)
        return MethodType(sandbox.forward_of(module), module)
    if name == "training":
        if type(held.get(name)) is not bool:
            sandbox.refuse("its training is no flag")
        sandbox.modes[path] = held[name]
        return held[name]
    if own and name == "__getattr__":
        return functools.partial(_child, sandbox, module)
    if name in OF_MODULES or name.startswith("__") or name == COMPILED:
        if own and name != "_modules":
            sandbox.refuse(f"it reads .{name}")
        if name == "_modules":
            sandbox.children[path] = tuple(held[name])
            sandbox.places |= dict.fromkeys((path, child) for child in held[name])
            return MappingProxyType(held[name]) if own else held[name]
        if name == COMPILED:
            # A block that somebody compiles by itself is called for that, and not looked into.
            if held.get(name) is not None:
                sandbox.refuse("it is compiled")
            sandbox.attributes[path, "__dict__", name] = held.get(name, MISSING)
        return raw(name)
    if name in held.get(LENT, {}) and held["_parameters"].get(name, MISSING) is None:
        return _lent(sandbox, path, held, name)
    found = static(plain_class(module), name)
    if isinstance(found, property):
        return _property(sandbox, module, name, found, own=own)
    if name in held:
        value = held[name]
        if is_container(value) or (own and is_object(value)):
            return sandbox.hand_out(value, (path, (name,)))
        sandbox.attributes[path, "__dict__", name] = value
        return sandbox.given(value, name) if own or is_constant(value) else value
    if found is MISSING:
        if not _registered(sandbox, path, held, name):
            sandbox.attributes[path, "__dict__", name] = MISSING
            sandbox.classes[plain_class(module), name] = MISSING
        return raw(name)
    sandbox.attributes[path, "__dict__", name] = MISSING
    return _inherited(sandbox, module, name, found, own=own)


def write(sandbox: Sandbox, module: nn.Module, name: str, value: Any) -> None:
    """Notes an attribute that code sets, for the end of the forward.

    Nobody else may see it before, so a trace in which something is not traced is refused.
    """
    path = sandbox.paths.get(module)
    if path is None or isinstance(module, View) or name in OF_MODULES or name[:2] == "__":
        sandbox.refuse(f"it sets .{name} of a module")
    held = object.__getattribute__(module, "__dict__")
    found = static(plain_class(module), name)
    registered = any(name in held[holder] for holder in REGISTERED) or name in held.get(LENT, {})
    if registered or not (found is MISSING or is_constant(found)):
        sandbox.refuse(f"it sets .{name}, which is no plain attribute")
    if (path, "__dict__", name) in sandbox.attributes or (path, (name,)) in sandbox.handed_out:
        sandbox.refuse(f"it sets .{name}, which it has read")
    for holder in REGISTERED:
        sandbox.attributes[path, holder, name] = MISSING
    sandbox.classes[plain_class(module), name] = found
    sandbox.stored[path, name] = value


def _lent(sandbox: Sandbox, path: str, held: dict[str, Any], name: str) -> Any:
    """A Parameter of a module that lent it."""
    product, tensor = held[LENT][name]
    sandbox.attributes[path, "_parameters", name] = None
    sandbox.places[path, product] = None
    full = f"{path}.{name}".lstrip(".")
    sandbox.lent[full] = f"{path}.{product}".lstrip("."), tensor
    return sandbox.parameter(full)


def _child(sandbox: Sandbox, module: nn.Module, name: str) -> Any:
    """What `module.__getattr__(name)` gives, which does not look at plain attributes."""
    if name not in object.__getattribute__(module, "_modules"):
        sandbox.refuse(f"it reads {name}")
    return get_attribute(sandbox, module, name)


def _registered(sandbox: Sandbox, path: str, held: dict[str, Any], name: str) -> bool:
    """Notes a child, a parameter or a buffer, or that there is none; whether there is one."""
    holders = [holder for holder in REGISTERED if name in held[holder]]
    for holder in holders or REGISTERED:
        value = held[holder].get(name, MISSING)
        if value is MISSING or value is None:
            sandbox.attributes[path, holder, name] = value
        elif holder == "_modules":
            sandbox.places[path, name] = None
        else:
            sandbox.present[path, holder, name] = None
    return bool(holders)


def _property(sandbox: Sandbox, module: nn.Module, name: str, found: property, *, own: bool) -> Any:
    sandbox.classes[plain_class(module), name] = found
    if type(found.fget) is FunctionType and not is_trusted(found.fget):
        return Getter(sandbox.run(found.fget))
    if own:
        sandbox.refuse(f"it reads .{name}")
    return object.__getattribute__(module, name)


def _inherited(sandbox: Sandbox, module: nn.Module, name: str, found: Any, *, own: bool) -> Any:
    """An attribute of the module's class."""
    function = found.__func__ if isinstance(found, staticmethod) else found
    if type(function) is FunctionType:
        sandbox.classes[plain_class(module), name] = function
        if not is_trusted(function):
            copied = sandbox.run(function)
            return copied if isinstance(found, staticmethod) else MethodType(copied, module)
        if own and name not in LISTINGS:
            sandbox.refuse(f"it calls .{name}")
        return object.__getattribute__(module, name)
    if not own and not is_constant(found):
        return object.__getattribute__(module, name)
    if hasattr(type(found), "__get__") and not callable(found):
        sandbox.refuse(f"it reads .{name}")
    sandbox.classes[plain_class(module), name] = found
    return sandbox.given(found, name)
