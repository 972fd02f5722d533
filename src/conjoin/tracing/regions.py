"""Regions: modules whose forward is rewritten so that their wide layers run once.

A region is the smallest module that encloses the views of a wide layer. Where its forward traces
soundly (see `sound.py`), the traced graph goes through the passes and becomes new source, which
is installed as `forward` on a subclass of the module's class. The views stay where they are, so
the original forward is right as well, and it runs whenever the new one might not be: a call with
optional arguments, a hook on a module that the new forward does not call, a sibling replaced.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from conjoin.layers.owner import Owner, copies_itself, owner_class, raw_parameters
from conjoin.layers.subclass import made_of, plain_class, subclass
from conjoin.layers.view import View
from conjoin.layers.walking import walk
from conjoin.layers.wide import Wide
from conjoin.merging import MERGER, Merger
from conjoin.nn import Split, Unite
from conjoin.tracing.plans import PLAN, REGION_CLASS, Plan, Unbound, bind, marks_of
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.rounds import Known, State, Structures, state_of, trace
from conjoin.tracing.sound import Traced
from conjoin.tracing.structures import Observed, Structure
from conjoin.tracing.undisturbed import putting_back

WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that only hold others, or Parameters."""


class Region(nn.Module):
    """A module with a rewritten forward; always together with its own class, see `region_class`."""

    conjoin_base: type[nn.Module]
    conjoin_plan: Plan | Unbound | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the user's: a region is no new class of theirs."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        names = self.conjoin_names if isinstance(self, Owner) else ()
        if "conjoin_base" not in vars(type(self)):  # Somebody has put a class of theirs before it.
            return copyreg.__newobj__, (type(self),), self.__dict__.copy()  # type: ignore[attr-defined]
        return _new_region, (plain_class(self), names), self.__dict__.copy()

    def __setstate__(self, state: Any) -> None:
        """A copy is bound to its own modules; what comes out of a pickle is traced anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        held = vars(self).pop(PLAN, None)
        if "conjoin_base" not in vars(type(self)):
            return
        traced = held.unbound() if isinstance(held, Plan) else held and held.traced
        if traced is None:
            self.__class__ = self.conjoin_base  # type: ignore[assignment]
            calls = held.calls if held else None
            with putting_back(self):
                meta = {MERGER: Merger(self, frozen=True)}
                _become(self, trace(self, dict(calls or {None: Observed()}), meta, {})[0])
            return
        try:
            vars(self)[PLAN] = bind(self, type(self), traced)
        except (KeyError, UnsoundError):  # It is not as it was when it was traced.
            self.__class__ = self.conjoin_base  # type: ignore[assignment]


def region_class(base: type[nn.Module]) -> type[Region]:
    """The class of regions that are `base` modules: a subclass of `base` that goes by its name."""
    made = made_of(base, REGION_CLASS, lambda: subclass(Region, base, _forward(base)))
    return cast("type[Region]", made)


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    """A forward that runs the plan where it holds, and otherwise the forward of `base`."""

    @functools.wraps(base.forward)
    def forward(self: Region, *args: Any, **kwargs: Any) -> Any:
        # A copy that was made past `__setstate__` has a plan that is bound to nothing.
        if is_dynamo_compiling():
            plan = self.conjoin_plan
            found = plan.finder(self, args, kwargs) if plan is not None else None
        else:
            own = vars(self)
            # A replica of data parallelism has the plan, and with it the buffers, of the module.
            plan = None if "_is_replica" in own else own.get(PLAN)
            found = plan.find(self, args, kwargs) if type(plan) is Plan else None
        if found is None:
            return base.forward(self, *args, **kwargs)
        return found[0](self, *found[1])

    return forward


def _new_region(base: type[nn.Module], names: tuple[str, ...] = ()) -> Region:
    cls = region_class(owner_class(base, names))
    return cls.__new__(cls)


def install(
    model: nn.Module,
    calls: Mapping[str, Mapping[Structure, Observed]] | None = None,
    meta: dict[str, Any] | None = None,
) -> None:
    """Rewrites the forward of every region of `model` that is traced soundly.

    Args:
        model: the model, whose siblings are views.
        calls: the structures of the calls of each module, by its name, where they were observed,
            and what was seen of their tensors.
        meta: what the passes find in the `meta` of the graph modules that they rewrite; with a
            `Merger` of the model they merge what follows the siblings.
    """
    merger: Merger = (meta or {}).get(MERGER) or Merger(model, frozen=True)
    meta = {**(meta or {}), MERGER: merger}
    names = {module: name for name, module in walk(model)}
    within = {inner for region in _regions(model) for _, inner in walk(region)}
    found = {module for module in _enclosing(model) if module in names} - within
    known: Known = {}
    with putting_back(model):
        # The outer ones are traced first: seen from within, one tensor that is handed over twice
        # is two, and what is merged then cannot be merged further.
        beyond = {} if merger.frozen else _trace_beyond(model, calls, meta, known)
        # The inner ones are installed first: an outer one is bound to the classes they have then.
        both = [each for each in names if each in found or each in beyond]
        for module in sorted(both, key=lambda m: (-names[m].count("."), names[m] == "")):
            if not _may_be_region(module):
                continue
            traced, state = beyond.get(module, ([], None))
            if state != state_of(module):
                traced, _ = trace(module, _structures(calls, names[module]), meta, known)
            # Without calls that were seen, nobody knows whether a region within is ever run.
            if module in found or not calls or _brings_more(module, traced):
                _become(module, traced)


def _regions(module: nn.Module) -> list[Region]:
    """The regions in a module."""
    return [inner for _, inner in walk(module) if isinstance(inner, Region)]


def runs(module: nn.Module) -> dict[Wide, int | None]:
    """The wide layers that rewritten forwards of regions within the module run.

    Returns:
        For each the largest number of operations that run on its output before that is cut; None
        where a forward does more with it than cut it.
    """
    found: dict[Wide, int | None] = {}
    for region in _regions(module):
        for variants in vars(region)[PLAN].variants.values():
            for path, count in itertools.chain(*(each.traced.cuts for each in variants)):
                wide = cast(Wide, region.get_submodule(path))
                before = found.get(wide, count)
                found[wide] = None if count is None or before is None else max(before, count)
    return found


def _structures(calls: Mapping[str, Mapping[Structure, Observed]] | None, name: str) -> Structures:
    found: Structures | None = (calls or {}).get(name)  # type: ignore[assignment]
    return found or {None: Observed()}


def _trace_beyond(
    model: nn.Module,
    calls: Mapping[str, Mapping[Structure, Observed]] | None,
    meta: dict[str, Any],
    known: Known,
) -> dict[nn.Module, tuple[list[Traced], State]]:
    """Traces the largest modules that are traced soundly, whatever they hold.

    That may show more to merge than siblings: what follows them, siblings behind equal operations,
    and equal towers on different inputs. Where a module is not traced soundly, its children are
    looked at.

    Returns:
        What was traced of each module that was looked at, and the state that it was in.
    """
    merger: Merger = meta[MERGER]
    pending = [("", model)]
    found: dict[nn.Module, tuple[list[Traced], State]] = {}
    while pending:
        name, module = pending.pop()
        layers = (each for _, each in walk(module) if merger.kind_of(each) is not None)
        held = itertools.chain(layers, raw_parameters(module))
        if isinstance(module, (View, Region)) or len([*itertools.islice(held, 2)]) < 2:
            continue
        is_sound = False
        has_forward = not isinstance(module, WITHOUT_FORWARD)
        runs = has_forward and (not calls or bool(calls.get(name)))
        if runs and not _is_chain(name, module, calls) and _may_be_region(module):
            traced, is_sound = trace(module, _structures(calls, name), meta, known)
            found[module] = traced, state_of(module)
        if not is_sound:
            prefix = f"{name}." if name else ""
            inner = [(prefix + child, each) for child, each in module.named_children()]
            pending += reversed(inner)
    return found


def _brings_more(module: nn.Module, traced: Sequence[Traced]) -> bool:
    """Whether the rewritten forwards of a module run at once what no region within it does."""
    batched = any(each.most is not None for each in traced)
    wide = {module.get_submodule(path) for each in traced for path, _ in each.cuts}
    return batched or not wide <= runs(module).keys()


def _is_chain(
    name: str, module: nn.Module, calls: Mapping[str, Mapping[Structure, Observed]] | None
) -> bool:
    """Whether a module does no more than hand one tensor from each of its children to the next.

    Then no two of them have branches in common, and each is looked at by itself.
    """
    if not calls or getattr(plain_class(module), "forward", None) is not nn.Sequential.forward:
        return False
    holders = (f"{name}.{key}".lstrip(".") for key, child in module._modules.items() if _has(child))
    return all({*calls.get(holder, ())} == {1} for holder in holders)


def _has(module: nn.Module | None) -> bool:
    """Whether there is a module that has children."""
    return module is not None and bool(module._modules) and not isinstance(module, View)


def uninstall(model: nn.Module) -> None:
    """Gives every region of `model` its own forward back."""
    for region in _regions(model):
        region.__class__ = region.conjoin_base  # type: ignore[assignment]
        vars(region).pop(PLAN, None)


@contextlib.contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Gives every region of `model` its own forward back for a while."""
    held = [(region, type(region)) for region in _regions(model)]
    for module, cls in held:
        module.__class__ = cls.conjoin_base  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, cls in held:
            module.__class__ = cls


def _may_be_region(module: nn.Module) -> bool:
    scripted = isinstance(module, torch.jit.ScriptModule)
    return not scripted and not copies_itself(plain_class(module))


def _become(module: nn.Module, traced: list[Traced]) -> None:
    """Makes a module a region with these forwards; with none it stays what it is."""
    if not traced:
        return
    try:
        cls = region_class(type(module))
    except Exception:  # noqa: BLE001 - A metaclass of the user's, which may refuse a subclass.
        return
    try:
        plan = bind(module, cls, [(each, marks_of(module, each)) for each in traced])
    except KeyError:  # It reaches modules that are not inside it.
        return
    vars(module)[PLAN] = plan
    module.__class__ = cls


def _enclosing(model: nn.Module) -> Iterator[nn.Module]:
    """The smallest modules with a forward that enclose what the passes may rewrite.

    That is, all the views of a wide layer, or siblings that somebody wrote by hand.
    """
    paths: dict[nn.Module, list[list[str]]] = {}
    for name, module in walk(model):
        if isinstance(module, View):
            paths.setdefault(module.wide_layer, []).append(name.split(".")[:-1])
        elif isinstance(module, (Split, Unite)):
            paths[module] = [name.split(".")[:-1]]
    for found in paths.values():
        common = 0
        while all(len(p) > common and p[common] == found[0][common] for p in found):
            common += 1
        chain = [model]
        for name in found[0][:common]:
            chain.append(chain[-1].get_submodule(name))
        with_forward = [m for m in chain if not isinstance(m, (*WITHOUT_FORWARD, View))]
        if with_forward:
            yield with_forward[-1]
