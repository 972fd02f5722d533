"""What a rewritten forward takes for granted of the modules of one region."""

from __future__ import annotations

import keyword
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.compiler
from torch import nn
from torch._C import _get_tracing_state
from torch._C._functorch import maybe_current_level
from torch.autograd import forward_ad
from torch.nn.modules import module as nn_module

from conjoin.layers.checks import CALL_HOOKS
from conjoin.layers.wide import Wide
from conjoin.tracing.facts import Fact, function_of
from conjoin.tracing.sandbox.objects import MISSING
from conjoin.tracing.source import Names

WORDS = (None, True, False)
"""Values that are what they are written as."""

PLAIN_MAPPINGS = (dict, OrderedDict)
"""Types of mapping in which an item is looked up without other code."""

GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in CALL_HOOKS)
"""The names by which PyTorch has the hooks of all modules."""

MODULE_CALL = nn.Module.__call__
"""What calls of modules do; tools put something else there for a while."""


def alone(names: Names) -> Iterator[Fact]:
    """That no transform, compiler, record of TorchScript or hook of all modules follows a call."""
    yield Fact(f"{names.name(maybe_current_level)}() is None")
    yield Fact(f"{names.name(_get_tracing_state)}() is None")
    levels, compiling = vars(forward_ad), vars(torch.compiler)
    yield Fact(f"{names.name(levels)}['_current_level'] < 0", levels)
    yield _item(compiling, "_is_compiling_flag", False, names)
    yield from _unhooked([(vars(nn_module), name) for name in GLOBAL_HOOKS], names)


@dataclass(frozen=True, slots=True)
class Conditions:
    """What a rewritten forward takes for granted, of the modules of one region.

    Attributes:
        values: dictionaries, names in them, and the values: flags, constants, functions, modules.
        kinds: the modules that it calls or goes past, of which none has a hook, and their classes.
        present: dictionaries, and the names of what must not be None.
        children: the children of modules that may have been iterated over, and their names.
        classes: classes, functions, objects and cells, the names of attributes, and their values.
        contents: containers, and what is in them.
    """

    values: tuple[tuple[Mapping[str, Any], str, Any], ...]
    kinds: tuple[tuple[nn.Module, type], ...]
    present: tuple[tuple[Mapping[str, Any], str], ...]
    children: tuple[tuple[Mapping[str, Any], tuple[str, ...]], ...]
    classes: tuple[tuple[object, str, Any], ...]
    contents: tuple[tuple[Any, tuple[Any, ...]], ...]

    def check(self, called: Sequence[nn.Module] = ()) -> Callable[[], bool]:
        """A function that tells whether all of it holds; `called` as for `facts`."""
        names = Names()
        return function_of(self.facts(names, called), names)

    def facts(self, names: Names, called: Sequence[nn.Module] = ()) -> list[Fact]:
        """All of it.

        Args:
            names: what the facts refer to.
            called: modules between whose calls and forwards there must be nothing either.
        """
        modules = [*dict.fromkeys(called)]
        facts = [
            *_classes({module: type(module) for module in modules} | dict(self.kinds), names),
            *(_attribute(*each, names) for each in self.classes),
            *(_item(*each, names) for each in self.values),
            *(_listed(*each, names) for each in self.children),
            *(_present(*each, names) for each in self.present),
            *_direct(modules, names),
        ]
        if self.contents:
            facts.append(Fact(f"{names.name(self.contents_hold)}()"))
        return facts

    def contents_hold(self) -> bool:
        """Whether the containers hold what they did."""
        return all(_is_as_before(container, before) for container, before in self.contents)


def _is_as_before(container: Any, before: tuple[Any, ...]) -> bool:
    now = (*container, *container.values()) if isinstance(container, dict) else tuple(container)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def _classes(kinds: Mapping[nn.Module, type], names: Names) -> Iterator[Fact]:
    """That the modules have these classes, and no hooks."""
    modules, classes = map(names.name, (tuple(kinds), [*kinds.values()]))
    # Classes are equal where they are the same.
    yield Fact(f"[*map(type, {modules})] == {classes}", reads=tuple(kinds))
    yield from _unhooked([(vars(each), name) for each in kinds for name in CALL_HOOKS], names)


def _unhooked(places: Sequence[tuple[Mapping[str, Any], str]], names: Names) -> Iterator[Fact]:
    """That there are no hooks in the dictionaries by these names."""
    hooks = tuple(mapping[name] for mapping, name in places)
    yield Fact(f"not any({names.name(hooks)})", reads=hooks)
    yield from (_item(mapping, name, mapping[name], names) for mapping, name in places)


def _item(mapping: Mapping[str, Any], name: str, value: Any, names: Names) -> Fact:
    at = names.name(mapping)
    if type(mapping) not in PLAIN_MAPPINGS:
        lookup, missing = names.name(dict.get), names.name(MISSING)
        return Fact(f"{lookup}({at}, {name!r}, {missing}) is {names.name(value)}", mapping)
    if value is MISSING:
        return Fact(f"{name!r} not in {at}", mapping)
    return Fact(_same(f"{at}[{name!r}]", value, names), mapping)


def _attribute(owner: Any, name: str, value: Any, names: Names) -> Fact:
    at = names.name(owner)
    if value is MISSING:
        return Fact(f"not hasattr({at}, {name!r})")
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return Fact(_same(f"{at}.{name}" if plain else f"getattr({at}, {name!r})", value, names))


def _same(expression: str, value: Any, names: Names) -> str:
    known = any(value is word for word in WORDS)
    return f"{expression} is {value!r}" if known else f"{expression} is {names.name(value)}"


def _listed(children: Mapping[str, Any], held: tuple[str, ...], names: Names) -> Fact:
    """That a mapping has these names in this order."""
    return Fact(f"(*{names.name(children)},) == {names.name(held)}", children)


def _present(mapping: Mapping[str, Any], name: str, names: Names) -> Fact:
    return Fact(f"{names.name(mapping)}[{name!r}] is not None", mapping)


def _direct(modules: Sequence[nn.Module], names: Names) -> Iterator[Fact]:
    """That nothing stands between a call of a module and its forward, beside hooks."""
    if modules:
        yield Fact(f"{names.name(nn.Module)}.__call__ is {names.name(MODULE_CALL)}")
    for module in modules:
        own = vars(module)
        yield _item(own, "forward", MISSING, names)
        if type(module) is Wide:
            held = own["_parameters"]
            yield _item(own, "_parameters", held, names)
            yield from (Fact(f"{name!r} in {names.name(held)}", held) for name in held)
