"""Binds a rewritten forward, and the check that it may run, to the modules of one region.

Small models spend most of a call in Python, so here is what Python looks up at each call looked up
once: source in which the dictionaries and modules of the region have names of their own. What
PyTorch's own modules do when they are called, look for hooks and then call `forward`, is left out;
there are none while `ready` is true. Dynamo, which would guard each of these names, gets the
forward as it was traced, and `spelled.py`.

All that must hold is one function: in a step of training little of this is in the processor's
caches, and what is looked at anew takes longer than what is computed.
"""

from __future__ import annotations

import functools
import keyword
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, MappingProxyType, MethodType
from typing import Any, cast

import torch
from torch import nn
from torch._C import _get_tracing_state
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from conjoin.layers.checks import CALL_HOOKS
from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View
from conjoin.layers.wide import Wide
from conjoin.tracing.sandbox.objects import MISSING

WORDS = (None, True, False)
"""Values that are what they are written as."""

PLAIN_MAPPINGS = (dict, OrderedDict)
"""Types of mapping in which an item is looked up without other code."""

END = "..."
"""What stands in source behind the last name of a mapping, and is no name."""

UNFLATTEN = "conjoin_unflatten"
"""The name of the method of that name without what PyTorch has in Python in front of it."""

UNFLATTENED = re.compile(r"\b(\w+)\.unflatten\((-1, \(\d+, -1\))\)")
"""How torch.fx writes the calls of it that the passes make."""

MODULE_CALL = nn.Module.__call__
"""What calls of modules do; tools put something else there for a while."""

CALL = "conjoin_call_"
"""What the names of modules in the source begin with."""

APART, ALONG = ", apart = True)", ", dim = "
"""How torch.fx writes the ways to call a wide layer."""

CALLS = re.compile(rf"\b({CALL}\d+)\(\w+({re.escape(APART)}|{ALONG}|)")
"""How it writes calls of modules."""


class Names(dict[str, Any]):
    """Values that source refers to, by the names that it has for them."""

    def __init__(self, held: Mapping[str, Any] = MappingProxyType({})) -> None:
        """With what there is by other names."""
        super().__init__(held)
        self._names: dict[int, str] = {}

    def name(self, value: Any) -> str:
        """A name for a value, one for each object."""
        name = self._names.setdefault(id(value), f"_{len(self._names)}")
        self[name] = value
        return name

    def define(self, source: str, name: str) -> Callable[..., Any]:
        """What `source` defines by a name."""
        held = dict(self)  # Python has a quick way to globals in a dict, and not in a subclass.
        exec(code(source), held)
        return cast("Callable[..., Any]", held.pop(name))


@functools.lru_cache
def code(source: str) -> CodeType:
    """Source as code, which like modules have in common."""
    return compile(source, "<conjoin>", "exec")


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a rewritten forward takes for granted, of the modules of one region.

    Attributes:
        hooks: the hooks of the modules that it calls or goes past, of which there must be none.
        values: dictionaries, names in them, and the values: flags, constants, functions, modules.
        kinds: modules, and their classes.
        present: dictionaries, and the names of what must not be None.
        children: the children of modules that may have been iterated over, and their names.
        classes: classes, functions, objects and cells, the names of attributes, and their values.
        contents: containers, and what is in them.
    """

    hooks: tuple[dict[int, Any], ...]
    values: tuple[tuple[Mapping[str, Any], str, Any], ...]
    kinds: tuple[tuple[nn.Module, type], ...]
    present: tuple[tuple[Mapping[str, Any], str], ...]
    children: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    classes: tuple[tuple[object, str, Any], ...]
    contents: tuple[tuple[Any, tuple[Any, ...]], ...]

    def check(self) -> Callable[[], bool]:
        """A function that tells whether all of it holds."""
        names = Names()
        return _all_of([*self.facts(names), *_unhooked(self.hooks, names)], names)

    def facts(self, names: Names) -> list[str]:
        """All but the hooks, as expressions."""
        facts = [
            *(_item(*each, names) for each in self.values),
            *(f"type({names.name(module)}) is {names.name(cls)}" for module, cls in self.kinds),
            *(_attribute(*each, names) for each in self.classes),
            *_listed(self.children, names),
            *(f"{names.name(mapping)}[{name!r}] is not None" for mapping, name in self.present),
        ]
        if self.contents:
            facts.append(f"{names.name(self.contents_hold)}()")
        return facts

    def contents_hold(self) -> bool:
        """Whether the containers hold what they did."""
        return all(_is_as_before(container, before) for container, before in self.contents)


def _is_as_before(container: Any, before: tuple[Any, ...]) -> bool:
    now = (*container, *container.values()) if isinstance(container, dict) else tuple(container)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _all_of(facts: Iterable[str], names: Names) -> Callable[[], bool]:
    """A function that tells whether all facts are true, which those before make sense of."""
    lines = "".join(f"            and {fact}\n" for fact in dict.fromkeys(facts))
    source = (
        "def holds():\n    try:\n        return (\n            True\n"
        f"{lines}        )\n    except (KeyError, AttributeError, ValueError):\n"
        "        return False\n"
    )
    return names.define(source, "holds")


def _item(mapping: Mapping[str, Any], name: str, value: Any, names: Names) -> str:
    at = names.name(mapping)
    if type(mapping) not in PLAIN_MAPPINGS:
        lookup, missing = names.name(dict.get), names.name(MISSING)
        return f"{lookup}({at}, {name!r}, {missing}) is {names.name(value)}"
    return f"{name!r} not in {at}" if value is MISSING else _same(f"{at}[{name!r}]", value, names)


def _attribute(owner: Any, name: str, value: Any, names: Names) -> str:
    at = names.name(owner)
    if value is MISSING:
        return f"not hasattr({at}, {name!r})"
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return _same(f"{at}.{name}" if plain else f"getattr({at}, {name!r})", value, names)


def _same(expression: str, value: Any, names: Names) -> str:
    known = any(value is word for word in WORDS)
    return f"{expression} is {value!r}" if known else f"{expression} is {names.name(value)}"


def _listed(
    children: Iterable[tuple[Mapping[str, Any], tuple[str, ...]]], names: Names
) -> Iterator[str]:
    """That all of these mappings have these names in this order; one list of all is quickest."""
    if found := {id(mapping): (mapping, held) for mapping, held in children}:
        listed = ", ".join(f"*{names.name(mapping)}, {END}" for mapping, _ in found.values())
        expected = tuple(name for _, held in found.values() for name in (*held, ...))
        yield f"({listed}) == {names.name(expected)}"


def _unhooked(hooks: Iterable[dict[int, Any]], names: Names) -> Iterator[str]:
    if found := tuple({id(each): each for each in hooks}.values()):
        yield f"not any({names.name(found)})"


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

    def bound(
        self, region: nn.Module, conditions: Conditions
    ) -> tuple[Callable[..., Any], Callable[[], bool]]:
        """The forward for the modules of a region, and what tells that it may run as it is.

        That is where the conditions hold, nothing stands between a call of a module and its
        forward, and nobody follows what is computed.
        """
        names = Names(self.globals)
        ways: dict[str, set[str]] = {}
        for found in CALLS.finditer(self.source):
            ways.setdefault(found[1], set()).add(found[2])
        modules = [at_path(region, path) for _, path in self.called]
        apart: set[str] = set()
        for (name, _), module in zip(self.called, modules, strict=True):
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
        function = storing(function, self.stored) if self.stored else function
        names = Names()
        return function, _all_of([*_alone(names), *usual(conditions, modules, names)], names)


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


def usual(conditions: Conditions, called: Sequence[nn.Module], names: Names) -> list[str]:
    """That all holds that a forward takes for granted that calls forwards, as expressions.

    Args:
        conditions: what was traced under.
        called: the modules that it calls, or whose forwards.
        names: the values that the expressions refer to.
    """
    modules = [*dict.fromkeys(called)]
    hooks = [vars(module)[kind] for module in modules for kind in CALL_HOOKS]
    return [
        *_unhooked((*conditions.hooks, *hooks), names),
        *conditions.facts(names),
        f"{names.name(nn.Module)}.__call__ is {names.name(MODULE_CALL)}",
        *(fact for module in modules for fact in _usual(module, names)),
    ]


def holding(conditions: Conditions, called: Sequence[nn.Module]) -> Callable[[], bool]:
    """A function that tells whether all of `usual` holds."""
    names = Names()
    return _all_of(usual(conditions, called, names), names)


def _alone(names: Names) -> Iterator[str]:
    """That no transform, no record of TorchScript and no hook of all modules follows a call."""
    yield f"{names.name(maybe_current_level)}() is None"
    yield f"{names.name(forward_ad)}._current_level < 0"
    yield f"{names.name(_get_tracing_state)}() is None"
    yield f"not {names.name(nn_module._has_any_global_hook)}()"


def _usual(module: nn.Module, names: Names) -> Iterator[str]:
    """That nothing stands between a call of a module and its forward, beside hooks."""
    own = vars(module)
    yield f"type({names.name(module)}) is {names.name(type(module))}"
    yield f"'forward' not in {names.name(own)}"
    if type(module) is Wide:
        held = names.name(own["_parameters"])
        yield f"{names.name(own)}['_parameters'] is {held}"
        yield from (f"{name!r} in {held}" for name in own["_parameters"])
