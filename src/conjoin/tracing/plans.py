"""Plans: the rewritten forwards of a region, bound to its modules, and when each may run.

A plan looks at each call whether what was taken for granted still holds: the modules that were
reached, their classes, modes, constants and hooks, the structure of the call and its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

from torch import Tensor, is_grad_enabled, nn
from torch.compiler import assume_constant_result, is_compiling
from torch.nn.modules.module import _has_any_global_hook

from conjoin.layers.lockstep import in_functorch, in_transform
from conjoin.layers.owner import Owner
from conjoin.layers.subclass import known_of, plain_class
from conjoin.layers.view import View
from conjoin.tracing.conditions import Conditions, alone
from conjoin.tracing.facts import function_of
from conjoin.tracing.fitting import asked, fitting, source_of
from conjoin.tracing.inlined import BY_IDENTITY, RISES, finder_of, has_tensors
from conjoin.tracing.quick import at_path
from conjoin.tracing.sandbox.constants import frozen, snapshots
from conjoin.tracing.sandbox.objects import held_at, holder_of
from conjoin.tracing.sound import Traced
from conjoin.tracing.source import Names
from conjoin.tracing.structures import Observed, Structure, structure_of

PLAN = "conjoin_plan"
"""The attribute of a region that holds its plan."""

REGION_CLASS = "region"
"""What the classes of regions are made for."""


@dataclass(frozen=True, slots=True)
class Quick:
    """A rewritten forward, bound to the modules of a region.

    Attributes:
        function: the forward.
        holds: whether it may run as it is in a call, of a region, `args` and `kwargs`.
        tensors: the tensors of these; None where `holds` does not look at the structure of a call.
    """

    function: Callable[..., Any]
    holds: Callable[..., bool]
    tensors: Callable[..., tuple[Tensor, ...]] | None


@dataclass(slots=True)
class Variant:
    """A rewritten forward for calls of one structure, bound to the modules of one region.

    Attributes:
        traced: the forward, and what it takes for granted by path.
        number: its number in the plan.
        conditions: what it takes for granted.
        classes: classes and functions, the names of attributes, and their values, among that.
        way: for Dynamo, whether the forward may run; see `inlined.py`.
        fits: whether the tensors of a call do; None where all do.
        holds: whether the conditions hold; made when that is first asked.
        quick: the forward bound to the modules; made when it is first called.
    """

    traced: Traced
    number: int
    conditions: Conditions
    classes: tuple[tuple[Any, str, Any], ...]
    way: Callable[[], int]
    fits: Callable[[Sequence[Tensor]], bool] | None
    holds: Callable[[], bool] | None = None
    quick: Quick | None = None

    def exported(self) -> Callable[..., Any] | None:
        """The new forward for a graph of it; None where something makes it another function."""
        return self.traced.function if self._holds() else None

    def function(
        self, region: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[..., Any] | None:
        """The new forward; None where something has happened that makes it another function."""
        if self.quick is not None and self.quick.holds(region, args, kwargs):
            return self.quick.function
        if in_transform() or not self._holds():
            return None
        if self.quick is None:
            self.quick = self._quick(region)
            return self.function(region, args, kwargs)
        # Somebody follows the calls of the modules.
        return self.traced.function

    def _quick(self, region: nn.Module) -> Quick:
        written, names = self.traced.written, Names()
        call = source_of(self.traced.structure, names)
        facts = [
            *alone(names),
            *asked(self.traced, call, type(region), names),
            *self.conditions.facts(names, written.modules(region)),
        ]
        holds = function_of(facts, names, "region, args, kwargs")
        return Quick(written.bound(region), holds, None if call is None else call.function(names))

    def _holds(self) -> bool:
        if _has_any_global_hook():  # type: ignore[no-untyped-call]
            return False
        if self.holds is None:
            self.holds = self.conditions.check()
        return self.holds()


@dataclass(slots=True)
class Plan:
    """The rewritten forwards of one region.

    Attributes:
        cls: the class of the region; of a subclass of it, methods may be others.
        variants: by the structure of the call; of those for one structure, the first that holds.
        finder: what finds a forward where Dynamo traces; see `inlined.py`.
        holding: for that, what the variants take for granted, by their numbers.
        last: what ran last, which the next call may be like.
    """

    cls: type[nn.Module]
    variants: dict[Structure, tuple[Variant, ...]]
    finder: Callable[..., tuple[Callable[..., Any], tuple[Tensor, ...]] | None]
    holding: tuple[Conditions, ...]
    last: Quick | None = None

    def find(
        self, region: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Tensor, ...]] | None:
        """The forward for a call, and the call's tensors; None where the original must run."""
        last = self.last
        if last is not None and last.holds(region, args, kwargs):
            return last.function, last.tensors(args, kwargs)  # type: ignore[misc]
        if type(region) is not self.cls:
            return None
        found = structure_of(args, kwargs)
        if found is None:
            return None
        structure, tensors = found
        variants = self.variants.get(structure)
        if variants is None:
            return None
        # Not where Dynamo does, but where `torch.export` runs it.
        exported = is_compiling()
        # `vmap` knows no way to split without an alias.
        if exported and (in_functorch() or _has_any_global_hook()):  # type: ignore[no-untyped-call]
            return None
        for variant in variants:
            if variant.fits is None or variant.fits(tensors):
                if exported:
                    function = variant.exported()
                else:
                    function = variant.function(region, args, kwargs)
                if function is not None:
                    if variant.quick is not None and variant.quick.tensors is not None:
                        self.last = variant.quick
                    return function, tensors
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Unbound:
        """The forwards unbound; the copied region binds them to its own modules."""
        return Unbound(self.unbound())

    def unbound(self) -> list[tuple[Traced, tuple[_Mark, ...]]]:
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


def _traced_anew(structures: dict[Structure, Observed]) -> Unbound:
    """What a pickle holds: the structures of the calls, and what was seen of them."""
    return Unbound(None, structures)


_Mark = tuple[type, int, int]
"""The class of a module; for a view also which wide layer it has, and which part of it it is."""


@dataclass(frozen=True, slots=True)
class Unbound:
    """What a copy of a region has of its plan until it is bound, by which nothing is found.

    Attributes:
        traced: what was traced, and what it found of the modules that it reached; None where it is
            traced anew.
        calls: what was seen of the calls, by structure.
    """

    traced: list[tuple[Traced, tuple[_Mark, ...]]] | None
    calls: Mapping[Structure, Observed] | None = None

    def finder(self, *args: Any) -> None:
        """No forward."""


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


def bind(
    region: nn.Module,
    cls: type[nn.Module],
    unbound: Sequence[tuple[Traced, tuple[_Mark, ...]]],
) -> Plan:
    """The plan of a region for what was traced of it, or of the module that it is a copy of.

    Args:
        region: the module.
        cls: the class that it has as a region.
        unbound: what was traced.

    Raises:
        KeyError: the region is not as it was when it was traced.
    """
    at = dict(region.named_modules())
    variants: dict[Structure, tuple[Variant, ...]] = {}
    conditions: tuple[Conditions, ...] = ()
    for number, (traced, marks) in enumerate(unbound):
        bound = _bound(at, traced, marks, number)
        variants[traced.structure] = (*variants.get(traced.structure, ()), bound)
        conditions += (bound.conditions,)
    _regions.setdefault(cls, WeakValueDictionary())[id(region)] = region
    return Plan(cls, variants, finder_of(at, variants), conditions)


_regions: WeakKeyDictionary[type[nn.Module], WeakValueDictionary[int, nn.Module]]
_regions = WeakKeyDictionary()
"""The regions that there are of each class."""


def _way_of(region: nn.Module, traced: Traced, number: int) -> Callable[[], int]:
    """What tells Dynamo whether a forward may run, and how it is guarded.

    It does not hold the region, since Dynamo holds it for good.

    Args:
        region: the module.
        traced: the forward.
        number: its number in the region's plan.
    """
    held, called = ref(region), (*traced.written.called, *traced.rising.called)
    alone: bool | None = None

    def way() -> int:
        nonlocal alone
        region = held()
        plan = None if region is None else vars(region).get(PLAN)
        if type(plan) is not Plan or type(region) is not plan.cls:
            return 0
        if in_functorch() or _has_any_global_hook():  # type: ignore[no-untyped-call]
            return 0
        conditions = plan.holding[number]
        if not conditions.check()():
            return 0
        modules = [at_path(region, path) for _, path in called]
        if not (all(map(has_tensors, modules)) and conditions.check(modules)()):
            return 0
        if alone is None:  # Dynamo may trace twice, and other regions be collected meanwhile.
            alone = len(_regions[plan.cls]) == 1
        trains = RISES if is_grad_enabled() else 0
        return 1 | trains | (BY_IDENTITY if alone else 0)

    constant: Callable[[], int] = assume_constant_result(way)  # type: ignore[no-untyped-call]
    return constant


def _bound(
    at: dict[str, nn.Module], traced: Traced, marks: tuple[_Mark, ...], number: int
) -> Variant:
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
        values=(
            *((vars(at[path]), "training", flag) for path, flag in traced.modes),
            *(
                (dictionary_of(at[path], h), name, value)
                for path, h, name, value in traced.attributes
            ),
            *_held(at, traced),
            *reached,
            *traced.globals,
        ),
        kinds=tuple((module, mark[0]) for module, mark in zip(modules, marks, strict=True)),
        present=tuple((vars(at[path])[holder], name) for path, holder, name in traced.present),
        children=tuple((at[path]._modules, names) for path, names in traced.children),
        classes=(*classes, *enclosed),
        contents=(*traced.shared, *_contents(at, traced)),
    )
    way, fits = _way_of(at[""], traced, number), fitting(traced)
    return Variant(traced, number, conditions, classes, way, fits)


def _last_class(cls: Any, name: str, owners: Mapping[Any, type]) -> Any:
    """The class that regions of a class have, on which somebody may set an attribute as well."""
    last = owners.get(cls, cls)
    return cls if name == "forward" else known_of(last, REGION_CLASS) or last


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


def marks_of(region: nn.Module, traced: Traced) -> tuple[_Mark, ...]:
    """What there is to know of the modules that were reached."""
    at = dict(region.named_modules())
    reached = [at[path]._modules[name] for path, name in traced.places]
    return _marks([module for module in reached if module is not None])


def dictionary_of(module: nn.Module, name: str) -> Mapping[str, Any]:
    """The dictionary in which a module holds attributes, children or tensors."""
    found: Mapping[str, Any] = vars(module) if name == "__dict__" else vars(module)[name]
    return found
