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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from conjoin.graph.hazards import CALL_HOOKS
from conjoin.layers.lockstep import PLAIN_TENSORS, in_transform
from conjoin.layers.wide import View, views
from conjoin.merging import MERGER, Merger
from conjoin.passes import rewrite
from conjoin.tracing import sound
from conjoin.tracing.sound import Traced

PLAN = "conjoin_plan"
"""The attribute of a region that holds its plan."""

OWN_COPYING = ("__reduce__", "__reduce_ex__", "__getstate__", "__getattribute__", "__slots__")
"""A class that defines one of these keeps its forward: a region would get in the way of it."""


@dataclass(slots=True)
class Plan:
    """A rewritten forward, bound to the modules of one region.

    Attributes:
        traced: the forward, and what it takes for granted by path.
        modules: the children in which a module must stand, its name, the module and its class.
        hooks: the hooks of these modules, of which there must be none.
        containers: the children of a module that may have been iterated over, and their names.
        constants: the attributes of a module, the name and the value.
    """

    traced: Traced
    modules: tuple[tuple[dict[str, nn.Module | None], str, nn.Module | None, type], ...]
    hooks: tuple[dict[int, Any], ...]
    containers: tuple[tuple[dict[str, nn.Module | None], tuple[str, ...]], ...]
    constants: tuple[tuple[Mapping[str, Any], str, Any], ...]

    def holds(self) -> bool:
        """Whether nothing has happened that makes the new forward another function."""
        if nn_module._has_any_global_hook() or any(self.hooks):  # type: ignore[no-untyped-call]
            return False
        if not torch.compiler.is_compiling() and in_transform():
            return False
        for children, name, module, cls in self.modules:
            if children.get(name) is not module or module.__class__ is not cls:
                return False
        for children, names in self.containers:
            if tuple(children) != names:
                return False
        for attributes, name, value in self.constants:
            if attributes.get(name, sound.MISSING) is not value:
                return False
        for namespace, name, value in self.traced.globals:
            if namespace.get(name) is not value:
                return False
        return all(cls.forward is forward for cls, forward in self.traced.forwards)

    def __deepcopy__(self, memo: dict[int, Any]) -> Traced:
        """The forward unbound; the copied region binds it to its own modules."""
        return self.traced

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds no code: the loaded region is traced anew."""
        return _nothing, ()


def _nothing() -> None:
    return None


def _bind(region: nn.Module, traced: Traced) -> Plan:
    """The plan of a region for what was traced of it, or of the module that it is a copy of."""
    at = dict(region.named_modules())
    modules = [
        (at[path]._modules, name, at[path]._modules.get(name), cls)
        for path, name, cls in traced.modules
    ]
    hooks = [vars(m)[kind] for _, _, m, _ in modules if m is not None for kind in CALL_HOOKS]
    return Plan(
        traced,
        tuple(modules),
        tuple(hooks),
        tuple((at[path]._modules, names) for path, names in traced.containers),
        tuple(
            (vars(at[path]), name, value) for path, name, value in traced.constants if path in at
        ),
    )


class Region(nn.Module):
    """A module with a rewritten forward; always together with its own class, see `region_class`."""

    conjoin_base: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the user's: a region is no new class of theirs."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_region, (self.conjoin_base,), self.__dict__.copy()

    def __setstate__(self, state: Any) -> None:
        """A copy is bound to its own modules; what comes out of a pickle is traced anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        held = vars(self).pop(PLAN, None)
        traced = held.traced if isinstance(held, Plan) else held
        if traced is None:
            self.__class__ = self.conjoin_base  # type: ignore[assignment]
            install(self)
            return
        try:
            vars(self)[PLAN] = _bind(self, traced)
        except KeyError:  # It has other modules than when it was traced.
            self.__class__ = self.conjoin_base  # type: ignore[assignment]


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
        plan: Plan | None = vars(self).get(PLAN)
        if plan is None or kwargs or len(args) != plan.traced.arity or not plan.holds():
            return base.forward(self, *args, **kwargs)
        if not all(map(_is_plain, args)):
            return base.forward(self, *args)
        return plan.traced.function(self, *args)

    return forward


def _is_plain(value: object) -> bool:
    """Whether an argument is no tensor of another class, which may not know all operations."""
    return not isinstance(value, Tensor) or (type(value) in PLAIN_TENSORS and not value.is_nested)


def _new_region(base: type[nn.Module]) -> Region:
    cls = region_class(base)
    return cls.__new__(cls)


def install(model: nn.Module, meta: Mapping[str, Any] | None = None) -> None:
    """Rewrites the forward of every region of `model` that is traced soundly.

    Args:
        model: the model, whose siblings have been merged.
        meta: for the passes; with a `Merger` of the model they merge what follows the siblings.
    """
    meta = {MERGER: Merger(model, frozen=True)} if meta is None else meta
    for module in {id(m): m for m in _enclosing(model)}.values():
        if not isinstance(module, Region):
            _install(module, meta)


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


def _install(module: nn.Module, meta: Mapping[str, Any]) -> None:
    before = type(module).__mro__[: type(module).__mro__.index(nn.Module)]
    if any(name in vars(cls) for cls in before for name in OWN_COPYING):
        return
    traced = sound.trace(module, rewrite, meta)
    if traced is None:
        return
    try:
        cls = region_class(type(module))
    except Exception:  # noqa: BLE001 - A metaclass of the user's, which may refuse a subclass.
        return
    vars(module)[PLAN] = _bind(module, traced)
    module.__class__ = cls


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
