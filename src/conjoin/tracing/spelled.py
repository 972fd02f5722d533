"""The check that a rewritten forward may run, as source that Dynamo traces to few guards.

A loop over tuples of what must hold guards the tuples too, several guards for each item, and the
dictionaries in them with all their keys. So the check is spelled out, with plain values in the
source, and goes from the region to its modules as the forward does, whose guards it shares. Two
names of one object are a guard in Python, which is slower than many others; so where to look at a
value is to have it guarded, it is not compared with itself.

What is guarded is what Dynamo guards of a model that is not rewritten, and no more: hooks and
methods are not looked for again, but classes, flags and constants are. Beside that, a view must be
the same part of the same wide layer. Where no other region is of its class, the views are guarded
themselves; where there are many like it, which Dynamo is to compile once, it is what they are to
each other.
"""

from __future__ import annotations

import inspect
import itertools
import keyword
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

from torch import nn

from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View
from conjoin.layers.wide import WIDE
from conjoin.tracing.sandbox.constants import MUTABLE
from conjoin.tracing.sandbox.objects import (
    MISSING,
    Place,
    held_at,
    holder_of,
    is_object,
    is_of_items,
)
from conjoin.tracing.sound import Traced
from conjoin.tracing.source import Names

WORDS = (type(None), bool)
"""Types of values that are what they are written as."""

PLAIN = (int, str)
"""Types of values that are equal to what they are written as."""

GUARDED = (FunctionType, BuiltinFunctionType, ModuleType, type)
"""Types of values of which Dynamo guards more than the type."""

CELL = "_cell_"
"""What the names of variables of enclosing functions begin with."""

ALWAYS = ("_call_impl", "_compiled_call_impl")
"""What makes calls of modules something else, which Dynamo passes by, in every model."""


DEFAULTS = ("__defaults__", "__kwdefaults__")
"""Parts of functions that Dynamo looks up at a call that leaves arguments out."""


def condition_of(
    traced: Traced,
    at: Mapping[str, nn.Module],
    classes: Iterable[tuple[Any, str, Any]],
    names: Names,
) -> str:
    """An expression by which Dynamo guards all that must hold, and which is true where it does.

    It is of `self`, the region; of `known`, whether the views are guarded themselves; and of a
    variable for each of enclosing functions.

    Args:
        traced: the forward, and what it takes for granted.
        at: the modules of the region by path, which are as it takes for granted now.
        classes: classes and functions, the names of attributes, and their values.
        names: the values that the source refers to.
    """
    found = itertools.chain(
        _places(traced, at),
        _values(traced, at, names),
        _classes(classes, plain_class(at[""]), names),
        (_global(*each, names) for each in traced.globals),
        (_same(f"{CELL}{n}", value, names) for n, (_, value) in enumerate(traced.cells)),
    )
    facts = [f"({fact})" for fact in dict.fromkeys(found)]
    if views := _views(traced, at):
        known = " and ".join(f"{names.name(id)}({module_at(path)})" for path, _ in views)
        facts.append(f"(({known}) if known else ({' and '.join(_together(views))}))")
    return f"({' and '.join(facts) or 'True'})"


def _literal(value: Any, names: Names) -> str:
    """An expression for a constant."""
    return repr(value) if type(value) in (*WORDS, *PLAIN) else names.name(value)


def _same(expression: str, value: Any, names: Names) -> str:
    """That an expression gives the value."""
    if type(value) in WORDS:
        return f"{expression} is {value!r}"
    if type(value) in PLAIN:
        return f"{expression} == {value!r}"
    if type(value) in (*MUTABLE, tuple):
        return " and ".join(_holds(expression, value, {}, names))
    if isinstance(value, GUARDED):
        return f"{expression} is not None"  # Another name of it is another guard, and a slow one.
    return f"{expression} is {names.name(value)}"


def _paths(traced: Traced) -> list[str]:
    """The paths of the modules that something is known of, the outer ones first."""
    rows: Any = (traced.modes, traced.attributes, traced.present, traced.children)
    held = (place for place, _ in (*traced.contents, *traced.objects))
    paths = {row[0] for row in itertools.chain(*rows, held)}
    paths |= {f"{path}.{name}".lstrip(".") for path, name in traced.places}
    paths = {".".join(p.split(".")[: n + 1]) for p in paths if p for n in range(p.count(".") + 1)}
    return sorted(paths, key=lambda path: (path.count("."), path))


def _places(traced: Traced, at: Mapping[str, nn.Module]) -> Iterator[str]:
    """That modules of these classes stand where they stood: to look is to have that guarded."""
    for path in _paths(traced):
        parent, _, name = path.rpartition(".")
        none = "is not" if at[parent]._modules[name] is not None else "is"
        yield f"{module_at(path)} {none} None"


def _views(traced: Traced, at: Mapping[str, nn.Module]) -> list[tuple[str, View]]:
    """The views among them."""
    held = ((path, at.get(path)) for path in _paths(traced))
    return [(path, module) for path, module in held if isinstance(module, View)]


def _together(views: Sequence[tuple[str, View]]) -> Iterator[str]:
    """That they are the same parts of one wide layer, or of several, as they were."""
    first: dict[nn.Module, str] = {}
    for path, view in views:
        yield f"{module_at(path)}.conjoin_index == {view.conjoin_index}"
        wide = f"{module_at(path)}._modules[{WIDE!r}]"
        known = first.setdefault(view.wide_layer, wide)
        if known != wide:
            yield f"{wide} is {known}"


def _values(traced: Traced, at: Mapping[str, nn.Module], names: Names) -> Iterator[str]:
    """That what was read of the modules is as it was."""
    for path, flag in traced.modes:
        yield f"{module_at(path)}.training is {flag}"
    for path, holder, name, value in traced.attributes:
        if holder == "__dict__":
            yield from _attribute(module_at(path), name, value, at[path], names)
        else:
            yield _item(f"{module_at(path)}.{holder}", name, value, names)
    paths = {module: path for path, module in reversed([*at.items()])}
    for place, _ in traced.contents:
        yield from _holds(_expression(at, place, names), held_at(at, place), paths, names)
    for place, cls in traced.objects:
        yield f"type({_expression(at, place, names)}) is {names.name(cls)}"
    for place, value in traced.settings:
        yield from _at_place(place, value, at, names)
    for path, holder, name in traced.present:
        yield f"{module_at(path)}.{holder}.get({name!r}) is not None"
    for path, children in traced.children:
        # No other way to list them has Dynamo guard all of them, and their order.
        yield f"[name for name in {module_at(path)}._modules] == {[*children]!r}"


def _holds(of: str, value: Any, paths: Mapping[nn.Module, str], names: Names) -> Iterator[str]:
    """That a container is one of the same type, and holds the same.

    Which object it is does not matter, as it does not where Dynamo traces a model, which makes
    another tuple of one that it reads. What objects it holds is told by their own places.
    """
    yield f"type({of}) is {names.name(type(value))}"
    if isinstance(value, dict):
        yield f"[*{of}] == [{', '.join(_literal(key, names) for key in value)}]"
        items = [(f"{of}[{_literal(key, names)}]", item) for key, item in value.items()]
    else:
        yield f"len({of}) == {len(value)}"
        items = [(f"{of}[{number}]", item) for number, item in enumerate(value)]
    if isinstance(value, set):
        yield from (f"{_literal(item, names)} in {of}" for item in value)
        return
    for found, item in items:
        if type(item) in (*MUTABLE, tuple):
            yield from _holds(found, item, paths, names)
        elif isinstance(item, nn.Module) and item in paths:
            yield f"{found} is {module_at(paths[item])}"
        elif not is_object(item):
            yield _same(found, item, names)


def _attribute(module: str, name: str, value: Any, held: nn.Module, names: Names) -> Iterator[str]:
    """That a module has an attribute, or not one of its own, but what its class has.

    To get it is how Dynamo finds out, and guards it.
    """
    of_class = inspect.getattr_static(type(held), name, MISSING)
    if hasattr(type(of_class), "__set__"):
        yield _item(f"{module}.__dict__", name, value, names)
    elif value is MISSING and of_class is MISSING:
        yield f"not hasattr({module}, {name!r})"
    elif name not in ALWAYS:
        found = getattr(of_class, "__func__", of_class) if value is MISSING else value
        yield _same(_of(module, name), found, names)


def _classes(classes: Iterable[tuple[Any, str, Any]], region: Any, names: Names) -> Iterator[str]:
    """That classes have what they had.

    Dynamo does not look again for methods, in no model, but for the forward that is called first.
    """
    for owner, name, value in classes:
        if isinstance(owner, FunctionType):
            seen = name in DEFAULTS and bool(value)
        else:
            seen = type(value) is not FunctionType or (owner, name) == (region, "forward")
        if seen:
            yield _variable(names.name(owner), name, value, names)


def _at_place(place: Place, value: Any, at: Mapping[str, nn.Module], names: Names) -> Iterator[str]:
    """That an attribute of a module, or of an object that one holds, is as it was."""
    path, (*before, name) = place
    holder = held_at(at, (path, tuple(before)))
    if isinstance(holder, nn.Module):
        yield _item(f"{module_at(path)}.__dict__", name, value, names)
    elif holder_of(at, place) is not None:
        of = _expression(at, (path, tuple(before)), names)
        of_class = inspect.getattr_static(type(holder), name, MISSING)
        yield _got(of, name, value, of_class, names)


def _got(of: str, name: str, value: Any, of_class: Any, names: Names) -> str:
    """That an object gives what it held, or what its class has where it held nothing.

    To get that is how Dynamo finds out that the object has nothing of its own.
    """
    if value is MISSING and isinstance(of_class, property):
        return f"hasattr({of}, {name!r})"  # Not what it gives, which Dynamo may have a symbol for.
    got = f"getattr({of}, {name!r}, {names.name(MISSING)})"
    if value is not MISSING or of_class is MISSING:
        return _same(got, value, names)
    if type(of_class) is FunctionType:
        # With newer versions of Dynamo the method leaves no guard on the class.
        function, method = names.name(of_class), _of(f"type({of})", name)
        return f"{got}.__func__ is {function} and {method} is {function}"
    return _same(got, getattr(of_class, "__func__", of_class), names)


def _expression(at: Mapping[str, nn.Module], place: Place, names: Names) -> str:
    """What leads from the region to an object."""
    path, steps = place
    found, holder = module_at(path), at[path]
    for number, step in enumerate(steps):
        if is_of_items(holder):
            found = f"{found}[{_literal(step, names)}]"
        elif isinstance(holder, nn.Module):
            found = f"{found}.__dict__[{step!r}]"
        else:
            found = f"getattr({found}, {step!r})"
        holder = held_at(at, (path, steps[: number + 1]))
    return found


def module_at(path: str) -> str:
    """What leads from the region to a module."""
    return "self" + "".join(f"._modules[{name!r}]" for name in path.split(".") if name)


def _item(mapping: str, name: str, value: Any, names: Names) -> str:
    if value is MISSING:
        return f"{name!r} not in {mapping}"
    return _same(f"{mapping}[{name!r}]", value, names)


def _global(namespace: dict[str, Any], name: str, value: Any, names: Names) -> str:
    """A global variable; of a module, in whose place a namespace would be guarded as a whole."""
    module = sys.modules.get(namespace.get("__name__", ""))
    if module is None or vars(module) is not namespace:
        return _item(names.name(namespace), name, value, names)
    return _variable(names.name(module), name, value, names)


def _variable(owner: str, name: str, value: Any, names: Names) -> str:
    if value is MISSING:
        return f"not hasattr({owner}, {name!r})"
    return _same(_of(owner, name), value, names)


def _of(owner: str, name: str) -> str:
    plain = name.isidentifier() and not keyword.iskeyword(name)
    return f"{owner}.{name}" if plain else f"getattr({owner}, {name!r})"
