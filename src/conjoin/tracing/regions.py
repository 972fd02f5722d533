"""Regions: modules whose forward is rewritten so that their wide layers run once.

A region is the smallest module that encloses the views of a wide layer. Where its forward traces
soundly (see `sound.py`), the traced graph goes through the passes and becomes new source, which
is installed as `forward` on a subclass of the module's class. The views stay where they are, so
the original forward is right as well, and it runs whenever the new one might not be: a call with
optional arguments, a hook on a module that the new forward does not call, a sibling replaced.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules import module as nn_module

from conjoin.graph.hazards import CALL_HOOKS
from conjoin.layers.wide import View, views
from conjoin.passes import PIPELINE
from conjoin.tracing import sound

PLAN = "conjoin_plan"
"""The attribute of a region that holds its plan."""

OWN_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__", "__getattribute__", "__slots__")
"""A class that defines one of these keeps its forward: a region would get in the way of it."""


@dataclass(slots=True)
class Plan:
    """A rewritten forward and the conditions under which it is the original.

    Attributes:
        function: the rewritten forward, called with the region and `arity` arguments.
        arity: the number of arguments.
        bypassed: modules that the new forward does not call though the old one did: the children
            of which module, the name, the module, its class.
        containers: the children of a container that was iterated over, and their number.
        constants: the attributes of a module that were read, the name and the value.
    """

    function: Callable[..., Any]
    arity: int
    bypassed: tuple[tuple[dict[str, nn.Module | None], str, nn.Module, type], ...]
    containers: tuple[tuple[dict[str, nn.Module | None], int], ...]
    constants: tuple[tuple[dict[str, Any], str, Any], ...]
    hooks: tuple[dict[int, Any], ...] = field(init=False)

    def __post_init__(self) -> None:
        """Collects the hooks of all modules that are bypassed."""
        self.hooks = tuple(
            vars(module)[hooks] for _, _, module, _ in self.bypassed for hooks in CALL_HOOKS
        )

    def holds(self) -> bool:
        """Whether nothing has happened since that makes the new forward another function."""
        if nn_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        if any(self.hooks):
            return False
        for children, name, module, cls in self.bypassed:
            if children.get(name) is not module or module.__class__ is not cls:
                return False
        for children, count in self.containers:
            if len(children) != count:
                return False
        return all(attributes.get(name) is value for attributes, name, value in self.constants)

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds no code: the plan is made anew when the module is used."""
        return _no_plan, ()


def _no_plan() -> None:
    return None


class Region(nn.Module):
    """A module with a rewritten forward; always together with its own class, see `region_class`."""

    conjoin_base: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_region, (self.conjoin_base,), self.__dict__.copy()


_region_classes: dict[type, type[Region]] = {}


def region_class(base: type[nn.Module]) -> type[Region]:
    """The class of regions that are `base` modules: a subclass of `base` that goes by its name."""
    if base not in _region_classes:
        names = {
            "conjoin_base": base,
            "forward": _forward(base),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        _region_classes[base] = cast("type[Region]", type(base.__name__, (Region, base), names))
    return _region_classes[base]


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    """A forward that runs the plan where it holds, and otherwise the forward of `base`."""

    @functools.wraps(base.forward)
    def forward(self: Region, *args: Any, **kwargs: Any) -> Any:
        plan = vars(self).get(PLAN) or _plan_again(self)
        if plan is not None and not kwargs and len(args) == plan.arity and plan.holds():
            return plan.function(self, *args)
        return base.forward(self, *args, **kwargs)

    return forward


def _new_region(base: type[nn.Module]) -> Region:
    cls = region_class(base)
    return cls.__new__(cls)


def _plan_again(region: Region) -> Plan | None:
    """The plan of a region that came out of a copy or a pickle, which hold none."""
    if torch.compiler.is_compiling():
        return None
    region.__class__ = region.conjoin_base  # type: ignore[assignment]
    vars(region).pop(PLAN, None)
    _install(region)
    return cast("Plan | None", vars(region).get(PLAN))


def install(model: nn.Module) -> None:
    """Rewrites the forward of every region of `model` that is traced soundly."""
    for module in {id(m): m for m in _enclosing(model)}.values():
        if not isinstance(module, Region):
            _install(module)


def uninstall(model: nn.Module) -> None:
    """Gives every region of `model` its own forward back."""
    for module in model.modules():
        if isinstance(module, Region):
            module.__class__ = module.conjoin_base  # type: ignore[assignment]
            vars(module).pop(PLAN, None)


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Gives every region of `model` its own forward back for a while."""
    held = [(module, type(module)) for module in model.modules() if isinstance(module, Region)]
    for module, cls in held:
        module.__class__ = cls.conjoin_base  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, cls in held:
            module.__class__ = cls


def _install(module: nn.Module) -> None:
    before = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    if any(name in vars(cls) for cls in before for name in OWN_COPYING):
        return
    traced = sound.trace(module, PIPELINE)
    if traced is None:
        return
    vars(module)[PLAN] = Plan(*traced)
    module.__class__ = region_class(type(module))


def _enclosing(model: nn.Module) -> Iterator[nn.Module]:
    """For each wide layer, the smallest module with a forward that encloses all of its views."""
    paths: dict[nn.Module, list[list[str]]] = {}
    for name, view in views(model):
        paths.setdefault(view.wide_layer, []).append(name.split(".")[:-1])
    for found in paths.values():
        common = 0
        while all(len(p) > common and p[common] == found[0][common] for p in found):
            common += 1
        chain = [model]
        for name in found[0][:common]:
            chain.append(chain[-1].get_submodule(name))
        with_forward = [m for m in chain if not isinstance(m, (nn.ModuleList, nn.ModuleDict, View))]
        if with_forward:
            yield with_forward[-1]
