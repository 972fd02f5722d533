"""Binds a rewritten forward to the modules of one region.

Small models spend most of a call in Python, so here is what Python looks up at each call looked up
once: source in which the modules of the region have names of their own. What PyTorch's own modules
do when they are called, look for hooks and then call `forward`, is left out; there are none while
the conditions hold. Dynamo, which would guard each of these names, gets the forward as it was
traced, and `spelled.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, cast

import torch
from torch import nn

from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View
from conjoin.layers.wide import Wide
from conjoin.tracing.source import Names

UNFLATTEN = "conjoin_unflatten"
"""The name of the method of that name without what PyTorch has in Python in front of it."""

UNFLATTENED = re.compile(r"\b(\w+)\.unflatten\((-1, \(\d+, -1\))\)")
"""How torch.fx writes the calls of it that the passes make."""

CALL = "conjoin_call_"
"""What the names of modules in the source begin with."""

APART, ALONG = ", apart = True)", ", dim = "
"""How torch.fx writes the ways to call a wide layer."""

CALLS = re.compile(rf"\b({CALL}\d+)\(\w+({re.escape(APART)}|{ALONG}|)")
"""How it writes calls of modules."""


@dataclass(frozen=True, slots=True)
class Written:
    """The source of a rewritten forward.

    Attributes:
        source: with a name for each module that it calls.
        globals: what else it refers to.
        called: these names, and the paths of the modules.
        restores: whether it changes the gradient mode, and must leave it as it was.
        stored: paths of modules, and names of attributes, whose values it gives beside the output.
    """

    source: str
    globals: Mapping[str, Any]
    called: tuple[tuple[str, str], ...]
    restores: bool
    stored: tuple[tuple[str, str], ...]

    def modules(self, region: nn.Module) -> list[nn.Module]:
        """The modules that it calls, of a region."""
        return [at_path(region, path) for _, path in self.called]

    def bound(self, region: nn.Module) -> Callable[..., Any]:
        """The forward for the modules of a region.

        It may run where nothing stands between a call of a module and its forward, and nobody
        follows what is computed.
        """
        names = Names(self.globals)
        ways: dict[str, set[str]] = {}
        for found in CALLS.finditer(self.source):
            ways.setdefault(found[1], set()).add(found[2])
        apart: set[str] = set()
        for (name, _), module in zip(self.called, self.modules(region), strict=True):
            if type(module) is Wide and len(ways.get(name, ())) == 1:
                [way] = ways[name]
                names[name] = module.direct(apart=way == APART, along=way == ALONG)
                apart |= {name} if way == APART else set()
            else:
                names[name] = _called(module)
        source = CALLS.sub(
            lambda found: found[0].replace(APART, ")") if found[1] in apart else found[0],
            self.source,
        )
        names[UNFLATTEN] = torch._C.TensorBase.unflatten
        source = UNFLATTENED.sub(rf"{UNFLATTEN}(\1, \2)", source)
        function = names.define(source, "forward")
        function = restoring_mode(function) if self.restores else function
        return storing(function, self.stored) if self.stored else function


def restoring_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that leaves the gradient mode as it was also where it breaks off."""

    def restoring(*args: Any) -> Any:
        enabled = torch.is_grad_enabled()
        try:
            return function(*args)
        finally:
            torch._C._set_grad_enabled(enabled)

    return restoring


def storing(
    function: Callable[..., Any], places: tuple[tuple[str, str], ...]
) -> Callable[..., Any]:
    """A function that sets attributes of modules once it has computed all."""

    def stores(region: nn.Module, *args: Any) -> Any:
        output, values = function(region, *args)
        for (path, name), value in zip(places, values, strict=True):
            setattr(region.get_submodule(path), name, value)
        return output

    return stores


def at_path(region: nn.Module, path: str) -> nn.Module:
    """The module at a path, past what views have by the name of their wide layer."""
    found: Any = region
    for name in path.split("."):
        found = found._modules[name]
    return cast(nn.Module, found)


def _called(module: nn.Module) -> Callable[..., Any]:
    """What a call of a module without hooks comes to."""
    return MethodType(type(module).forward, module) if calls_forward(module) else module


def calls_forward(module: nn.Module) -> bool:
    """Whether a call of a module without hooks comes to a function, its forward."""
    cls = plain_class(module)
    known = type(module) is cls or isinstance(module, View)
    plain = known and cls.__module__.startswith("torch.nn.modules.")
    return plain and type(type(module).forward) is FunctionType
