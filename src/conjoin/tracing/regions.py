"""Regions: modules whose forward is rewritten so that their wide layers run once.

A region is the smallest module that encloses the views of a wide layer. Where its forward traces
soundly (see `sound.py`), the traced graph goes through the passes and becomes new source, which
is installed as `forward` on a subclass of the module's class. The views stay where they are, so
the original forward is right as well, and it runs whenever the new one might not be: a call with
optional arguments, a hook on a module that the new forward does not call, a sibling replaced.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._C import _get_tracing_state
from torch.nn.modules import module as nn_module

from conjoin.graph.congruence import INPUTS, Inputs
from conjoin.graph.hazards import CALL_HOOKS
from conjoin.layers.lockstep import in_transform
from conjoin.layers.owner import Owner, copies_itself, owner_class, raw_parameters
from conjoin.layers.subclass import subclass
from conjoin.layers.view import View, views
from conjoin.layers.wide import Wide
from conjoin.merging import MERGER, Merger
from conjoin.nn import Split, Unite
from conjoin.passes import rewrite_traced
from conjoin.tracing import sound
from conjoin.tracing.likeness import likeness
from conjoin.tracing.objects import MISSING, held_at, holder_of
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.quick import Conditions
from conjoin.tracing.sandbox import frozen, plain_class, snapshots
from conjoin.tracing.sound import Traced
from conjoin.tracing.spelled import check_of
from conjoin.tracing.structures import Observed, Structure, is_plain, structure_of
from conjoin.tracing.undisturbed import putting_back

PLAN = "conjoin_plan"
"""The attribute of a region that holds its plan."""

WITHOUT_FORWARD = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
"""Modules that only hold others, or Parameters."""

_Structures = Mapping[Structure | None, Observed]
"""The structures of calls, the required arguments alone for None, and what was seen of them."""

MOST_ROUNDS = 8
"""How often a region is traced until no pass finds more layers to merge; passes merge and stop."""


@dataclass(slots=True)
class Variant:
    """A rewritten forward for calls of one structure, bound to the modules of one region.

    Attributes:
        traced: the forward, and what it takes for granted by path.
        conditions: what it takes for granted.
        spelled: a function of the region by which Dynamo finds the same, but for the containers.
        holds: whether the conditions hold; made when that is first asked.
        quick: the forward bound to the modules, and whether nothing stands between calls of the
            modules that it calls and their forwards; made when the forward is first called.
    """

    traced: Traced
    conditions: Conditions
    spelled: Callable[[nn.Module], bool]
    holds: Callable[[], bool] | None = None
    quick: tuple[Callable[..., Any], Callable[[], bool]] | None = None

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors of a call are as the new forward takes for granted."""
        for number, rank in self.traced.ranks:
            if tensors[number].ndim != rank:
                return False
        if self.traced.most is None:
            return True
        first: dict[int, Tensor] = {}
        for number, tensor in zip(self.traced.observed.alike, tensors, strict=False):
            if not _are_alike(first.setdefault(number, tensor), tensor):
                return False
        return sum([tensor.numel() for tensor in tensors]) <= self.traced.most

    def function(self, region: nn.Module, *, compiling: bool) -> Callable[..., Any] | None:
        """The new forward; None where something has happened that makes it another function."""
        if compiling:
            if not (self.spelled(region) and self.conditions.contents_hold()):
                return None
            return self.traced.function
        if self.holds is None:
            self.holds = self.conditions.check()
        if not self.holds():
            return None
        if self.quick is None:
            self.quick = self.traced.written.bound(region)
        function, usual = self.quick
        # `torch.jit.trace` takes notes of the modules that are called.
        return function if usual() and _get_tracing_state() is None else self.traced.function


def _are_alike(tensor: Tensor, other: Tensor) -> bool:
    return tensor is other or (
        tensor.shape == other.shape
        and tensor.dtype is other.dtype
        and tensor.device == other.device
        and tensor.requires_grad is other.requires_grad
    )


@dataclass(slots=True)
class Plan:
    """The rewritten forwards of one region.

    Attributes:
        variants: by the structure of the call; of those for one structure, the first that holds.
    """

    variants: dict[Structure, tuple[Variant, ...]]

    def find(
        self, region: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Tensor, ...]] | None:
        """The forward for a call, and the call's tensors; None where the original must run."""
        if not kwargs and all(map(is_plain, args)):
            structure: Structure = len(args)
        else:
            found = structure_of(args, kwargs)
            if found is None:
                return None
            structure, args = found
        variants = self.variants.get(structure)
        if variants is None or nn_module._has_any_global_hook():  # type: ignore[no-untyped-call]
            return None
        compiling = torch.compiler.is_compiling()
        if not compiling and in_transform():
            return None
        for variant in variants:
            fits = variant.fits(args)
            function = variant.function(region, compiling=compiling) if fits else None
            if function is not None:
                return function, args
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Unbound:
        """The forwards unbound; the copied region binds them to its own modules."""
        return self.unbound()

    def unbound(self) -> _Unbound:
        """The forwards, for other modules than those that they are bound to.

        Not those that are over, since a module that they call has another class by now: a copy
        could not tell.
        """
        return [
            (variant.traced, _marks([module for module, _ in variant.conditions.kinds]))
            for variants in self.variants.values()
            for variant in variants
            if all(type(module) is cls for module, cls in variant.conditions.kinds)
        ]

    def __reduce__(self) -> tuple[Any, ...]:
        """A pickle holds no code: the loaded region is traced anew."""
        calls = {of: variants[0].traced.observed for of, variants in self.variants.items()}
        return _traced_anew, (calls,)


def _traced_anew(structures: dict[Structure, Observed]) -> dict[Structure, Observed]:
    """What a pickle holds: the structures of the calls, and what was seen of them."""
    return structures


_Mark = tuple[type, int, int]
"""The class of a module; for a view also which wide layer it has, and which part of it it is."""

_Unbound = list[tuple[Traced, tuple[_Mark, ...]]]
"""What was traced, and what it found of the modules that it reached."""


def _marks(modules: Sequence[nn.Module]) -> tuple[_Mark, ...]:
    """What tells modules from a copy of them that no longer belong together as they did."""
    known: dict[nn.Module, int] = {}
    marks: list[_Mark] = []
    for module in modules:
        if isinstance(module, View):
            number = known.setdefault(module.wide_layer, len(known))
            marks.append((type(module), number, module.conjoin_index))
        else:
            marks.append((type(module), -1, -1))
    return tuple(marks)


def _bind(region: nn.Module, unbound: _Unbound) -> Plan:
    """The plan of a region for what was traced of it, or of the module that it is a copy of.

    Raises:
        KeyError: the region is not as it was when it was traced.
    """
    at = dict(region.named_modules())
    variants: dict[Structure, tuple[Variant, ...]] = {}
    for traced, marks in unbound:
        bound = _bound(at, traced, marks)
        variants[traced.structure] = (*variants.get(traced.structure, ()), bound)
    return Plan(variants)


def _bound(at: dict[str, nn.Module], traced: Traced, marks: tuple[_Mark, ...]) -> Variant:
    reached = [(at[path]._modules, name, at[path]._modules[name]) for path, name in traced.places]
    modules = [module for _, _, module in reached if module is not None]
    owners: dict[Any, type] = {
        plain_class(module): type(module) for module in at.values() if isinstance(module, Owner)
    }
    if [mark[1:] for mark in _marks(modules)] != [mark[1:] for mark in marks]:
        raise KeyError("its views have other wide layers")
    classes = (
        *((_last_class(cls, name, owners), name, value) for cls, name, value in traced.classes),
        *((held_at(at, place), "__class__", cls) for place, cls in traced.objects),
    )
    enclosed = tuple((cell, "cell_contents", value) for cell, value in traced.cells)
    conditions = Conditions(
        tuple(vars(module)[kind] for module in dict.fromkeys(modules) for kind in CALL_HOOKS),
        (
            *((vars(at[path]), "training", flag) for path, flag in traced.modes),
            *((_holder(at[path], h), name, value) for path, h, name, value in traced.attributes),
            *_held(at, traced),
            *reached,
            *traced.globals,
        ),
        tuple((module, mark[0]) for module, mark in zip(modules, marks, strict=True)),
        tuple((vars(at[path])[holder], name) for path, holder, name in traced.present),
        tuple((at[path]._modules, names) for path, names in traced.children),
        (*classes, *enclosed),
        (*traced.shared, *_contents(at, traced)),
    )
    return Variant(traced, conditions, check_of(traced, at, classes))


def _last_class(cls: Any, name: str, owners: Mapping[Any, type]) -> Any:
    """The class that regions of a class have, on which somebody may set an attribute as well."""
    last = owners.get(cls, cls)
    return cls if name == "forward" else _region_classes.get(last, last)


def _held(at: dict[str, nn.Module], traced: Traced) -> Iterator[tuple[Mapping[str, Any], str, Any]]:
    """The attributes that hold containers and objects, and those of the objects."""
    for place, _ in (*traced.contents, *traced.objects):
        holder = holder_of(at, place)
        if holder is not None:  # The others are in containers.
            yield (*holder, held_at(at, place))
    for place, value in traced.settings:
        holder = holder_of(at, place)
        if holder is None:
            raise KeyError(place)
        yield (*holder, value)


def _contents(at: dict[str, nn.Module], traced: Traced) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    paths = {module: path for path, module in reversed(at.items())}
    for place, before in traced.contents:
        value = held_at(at, place)
        if frozen(value, paths, objects=True) != before:
            raise KeyError(place)
        yield from snapshots(value)


def _marks_of(region: nn.Module, traced: Traced) -> tuple[_Mark, ...]:
    """What there is to know of the modules that were reached."""
    at = dict(region.named_modules())
    reached = [at[path]._modules[name] for path, name in traced.places]
    return _marks([module for module in reached if module is not None])


class Region(nn.Module):
    """A module with a rewritten forward; always together with its own class, see `region_class`."""

    conjoin_base: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the user's: a region is no new class of theirs."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        names = self.conjoin_names if isinstance(self, Owner) else ()
        return _new_region, (plain_class(self), names), self.__dict__.copy()

    def __setstate__(self, state: Any) -> None:
        """A copy is bound to its own modules; what comes out of a pickle is traced anew."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        held = vars(self).pop(PLAN, None)
        held = held.unbound() if isinstance(held, Plan) else held
        if not isinstance(held, list):
            self.__class__ = self.conjoin_base  # type: ignore[assignment]
            with putting_back(self):
                meta = {MERGER: Merger(self, frozen=True)}
                _become(self, _trace(self, held or {None: Observed()}, meta, {})[0])
            return
        try:
            vars(self)[PLAN] = _bind(self, held)
        except (KeyError, UnsoundError):  # It is not as it was when it was traced.
            self.__class__ = self.conjoin_base  # type: ignore[assignment]


_region_classes: dict[type, type[Region]] = {}


def region_class(base: type[nn.Module]) -> type[Region]:
    """The class of regions that are `base` modules: a subclass of `base` that goes by its name."""
    if base not in _region_classes:
        made = subclass(Region, base, _forward(base))
        _region_classes[base] = cast("type[Region]", made)
    return _region_classes[base]


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    """A forward that runs the plan where it holds, and otherwise the forward of `base`."""

    @functools.wraps(base.forward)
    def forward(self: Region, *args: Any, **kwargs: Any) -> Any:
        own = vars(self)
        # A replica of data parallelism has the plan, and with it the buffers, of the module itself.
        plan = None if "_is_replica" in own else own.get(PLAN)
        # A copy that was made past `__setstate__` has one that is bound to nothing.
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
    names = {module: name for name, module in model.named_modules()}
    within = {inner for region in _regions(model) for inner in region.modules()}
    found = {module for module in _enclosing(model) if module in names} - within
    known: _Known = {}
    with putting_back(model):
        # The outer ones are traced first: seen from within, one tensor that is handed over twice
        # is two, and what is merged then cannot be merged further.
        beyond = {} if merger.frozen else _trace_beyond(model, calls, meta, known)
        # The inner ones are installed first: an outer one is bound to the classes they have then.
        both = [each for each in names if each in found or each in beyond]
        for module in sorted(both, key=lambda m: (-names[m].count("."), names[m] == "")):
            if not _may_be_region(module):
                continue
            traced, state, merged = beyond.get(module, ([], None, False))
            if state != _state(module):
                traced, _ = _trace(module, _structures(calls, names[module]), meta, known)
            # Without calls that were seen, nobody knows whether a region within is ever run.
            if module in found or not calls or merged or _brings_more(module, traced):
                _become(module, traced)


def _regions(module: nn.Module) -> list[Region]:
    """The regions in a module."""
    return [inner for inner in module.modules() if isinstance(inner, Region)]


def covered(module: nn.Module) -> set[Wide]:
    """The wide layers that a rewritten forward of a region within the module runs."""
    return {
        cast(Wide, region.get_submodule(path))
        for region in _regions(module)
        for variants in vars(region)[PLAN].variants.values()
        for variant in variants
        for path, _ in variant.traced.cuts
    }


def cuts(module: nn.Module) -> dict[Wide, int]:
    """The wide layers of whose output no rewritten forward does more than a little and cut it.

    With the number of operations that run on it before, at most.
    """
    found: dict[Wide, list[int | None]] = {}
    for region in _regions(module):
        for variants in vars(region)[PLAN].variants.values():
            for path, count in itertools.chain(*(each.traced.cuts for each in variants)):
                found.setdefault(cast(Wide, region.get_submodule(path)), []).append(count)
    known = {wide: [n for n in counts if n is not None] for wide, counts in found.items()}
    return {wide: max(known[wide]) for wide, each in found.items() if None not in each}


def _structures(calls: Mapping[str, Mapping[Structure, Observed]] | None, name: str) -> _Structures:
    found: _Structures | None = (calls or {}).get(name)  # type: ignore[assignment]
    return found or {None: Observed()}


def _trace_beyond(
    model: nn.Module,
    calls: Mapping[str, Mapping[Structure, Observed]] | None,
    meta: dict[str, Any],
    known: _Known,
) -> dict[nn.Module, tuple[list[Traced], _State | None, bool]]:
    """Traces the largest modules that are traced soundly, whatever they hold.

    That may show more to merge than siblings: what follows them, siblings behind equal operations,
    and equal towers on different inputs. Where a module is not traced soundly, its children are
    looked at.

    Returns:
        What was traced of each module that was looked at, the state that it was in, and whether
        more was merged for that.
    """
    merger: Merger = meta[MERGER]
    pending = [("", model)]
    found: dict[nn.Module, tuple[list[Traced], _State | None, bool]] = {}
    while pending:
        name, module = pending.pop()
        layers = (m for m in module.modules() if merger.kind_of(m) is not None)
        held = itertools.chain(layers, raw_parameters(module))
        if isinstance(module, (View, Region)) or len([*itertools.islice(held, 2)]) < 2:
            continue
        is_sound = False
        has_forward = not isinstance(module, WITHOUT_FORWARD)
        runs = has_forward and (not calls or bool(calls.get(name)))
        if runs and not _is_chain(name, module, calls) and _may_be_region(module):
            before = _state(module)
            traced, is_sound = _trace(module, _structures(calls, name), meta, known)
            after = _state(module)
            found[module] = traced, after, after != before
        if not is_sound:
            prefix = f"{name}." if name else ""
            inner = [(prefix + child, each) for child, each in module.named_children()]
            pending += reversed(inner)
    return found


def _brings_more(module: nn.Module, traced: Sequence[Traced]) -> bool:
    """Whether the rewritten forwards of a module run at once what no region within it does."""
    batched = any(each.most is not None for each in traced)
    wide = {module.get_submodule(path) for each in traced for path, _ in each.cuts}
    return batched or not wide <= covered(module)


def _is_chain(
    name: str, module: nn.Module, calls: Mapping[str, Mapping[Structure, Observed]] | None
) -> bool:
    """Whether a module does no more than hand one tensor from each of its children to the next.

    Then no two of them have branches in common, and each is looked at by itself.
    """
    if not calls or plain_class(module).forward is not nn.Sequential.forward:
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
    return not copies_itself(plain_class(module))


def _become(module: nn.Module, traced: list[Traced]) -> None:
    """Makes a module a region with these forwards; with none it stays what it is."""
    if not traced:
        return
    try:
        cls = region_class(type(module))
        plan = _bind(module, [(each, _marks_of(module, each)) for each in traced])
    except Exception:  # noqa: BLE001 - A metaclass of the user's, which may refuse a subclass.
        return
    vars(module)[PLAN] = plan
    module.__class__ = cls


_Traces = tuple[list[Traced], bool]
"""What was traced of a module, and whether any trace of it was sound."""

_State = list[tuple[type, str]]
"""What merging changes of a module."""

_Known = dict[Hashable, _Traces]
"""The same by what decides it, for modules like one that was traced."""


def _trace(
    module: nn.Module, structures: _Structures, meta: dict[str, Any], known: _Known
) -> _Traces:
    """What is traced of a module, for calls of all structures and in both modes.

    A pass may merge more layers while it rewrites one trace, so all is traced again until the
    modules stay what they are.

    Args:
        module: the module.
        structures: the structures of its calls, and what was seen of them.
        meta: what the passes find.
        known: what was traced of other modules; takes what is traced of this one.
    """
    merger: Merger = meta[MERGER]
    for _ in range(MOST_ROUNDS):
        before, refused = _state(module), len(merger.refused)
        like = likeness(module, merger.standing, (PLAN,)), tuple(structures.items())
        if merger.rewritten is None and like in known:
            traced, is_sound = known[like]
            return [_renewed(each, module) for each in traced], is_sound
        seen: list[fx.GraphModule] = []
        traced = [
            each
            for of, observed in structures.items()
            for each in _in_both_modes(module, of, observed, meta, seen)
        ]
        if _state(module) == before:
            if len(merger.refused) == refused:
                known[like] = traced, bool(seen)
            return traced, bool(seen)
    return [], False


def _renewed(traced: Traced, module: nn.Module) -> Traced:
    """What was traced of a module that is like this one, with the constants of this one."""
    at = dict(module.named_modules())
    attributes = tuple(
        (path, holder, name, _holder(at[path], holder).get(name, MISSING))
        for path, holder, name, _ in traced.attributes
    )
    return dataclasses.replace(traced, attributes=attributes)


def _holder(module: nn.Module, name: str) -> Mapping[str, Any]:
    """The dictionary in which a module holds attributes, children or tensors."""
    found: Mapping[str, Any] = vars(module) if name == "__dict__" else vars(module)[name]
    return found


def _state(module: nn.Module) -> _State:
    """The classes of the modules, and which wide layers hold their parameters."""
    return [
        (plain_class(inner), inner.wide_layer.identity if isinstance(inner, View) else "")
        for inner in module.modules()
    ]


def _in_both_modes(
    module: nn.Module,
    structure: Structure | None,
    observed: Observed,
    meta: dict[str, Any],
    seen: list[fx.GraphModule],
) -> Iterator[Traced]:
    """Traces in training and in evaluation mode, or in one where nothing asks for the mode.

    Where one takes something for granted of the tensors of a call, another that does not follows.
    """
    asked: set[str] = set()

    def noted(graph_module: fx.GraphModule) -> bool:
        seen.append(graph_module)
        return rewrite_traced(graph_module)

    flags = [(vars(inner), inner.training) for inner in module.modules()]
    try:
        for mode in (True, False):
            for own, _ in flags:
                own["training"] = mode
            inputs = Inputs(observed.alike)
            given = {**meta, INPUTS: inputs}
            traced = sound.trace(module, noted, structure, given, asked, observed)
            found = [traced]
            if inputs.most is not None:
                found.append(sound.trace(module, noted, structure, meta, observed=observed))
            yield from (each for each in found if each is not None)
            if not (asked if traced is None else traced.modes):
                return
    finally:
        for own, flag in flags:
            own["training"] = flag
        for _, view in views(module):  # What was merged meanwhile has the mode of a trace.
            view.wide_layer.training = view.training


def _enclosing(model: nn.Module) -> Iterator[nn.Module]:
    """The smallest modules with a forward that enclose what the passes may rewrite.

    That is, all the views of a wide layer, or siblings that somebody wrote by hand.
    """
    paths: dict[nn.Module, list[list[str]]] = {}
    for name, view in views(model):
        paths.setdefault(view.wide_layer, []).append(name.split(".")[:-1])
    for name, module in model.named_modules():
        if isinstance(module, (Split, Unite)):
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
