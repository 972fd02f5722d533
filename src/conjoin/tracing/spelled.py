"""The check that a rewritten forward may run, as source that Dynamo traces to few guards.

While Dynamo traces, whatever is looked at becomes guards, which run on every call. A loop over
tuples of what must hold guards the tuples too, several guards for each item, and the dictionaries
in them with all their keys. So the check is spelled out, with names and plain values in the
source, and goes from the region to its modules as the forward does, whose guards it shares.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType
from typing import Any, cast

from torch import nn

from conjoin.layers.checks import CALL_HOOKS
from conjoin.tracing.quick import Names
from conjoin.tracing.sandbox.objects import MISSING, Place, held_at, holder_of, is_of_items
from conjoin.tracing.sandbox.sandbox import FUNCTION_PARTS
from conjoin.tracing.sound import Traced

WORDS = (type(None), bool)
"""Types of values that are what they are written as."""

PLAIN = (int, str)
"""Types of values that are equal to what they are written as."""


class _Constants(Names):
    """The values that the source cannot spell out, by the names that it has for them."""

    def literal(self, value: Any) -> str:
        """An expression for a constant."""
        return repr(value) if type(value) in (*WORDS, *PLAIN) else self.name(value)

    def same(self, expression: str, value: Any) -> str:
        """That an expression gives the value."""
        if type(value) in WORDS:
            return f"{expression} is {value!r}"
        if type(value) in PLAIN:
            return f"type({expression}) is {type(value).__name__} and {expression} == {value!r}"
        if type(value) is tuple and all(type(each) in (*WORDS, *PLAIN) for each in value):
            items = (self.same(f"{expression}[{at}]", each) for at, each in enumerate(value))
            # Dynamo makes another tuple of one that it reads.
            return " and ".join(
                (f"type({expression}) is tuple and len({expression}) == {len(value)}", *items)
            )
        return f"{expression} is {self.name(value)}"


def check_of(
    traced: Traced, at: dict[str, nn.Module], classes: Iterable[tuple[Any, str, Any]]
) -> Callable[[nn.Module], bool]:
    """A function of the region that tells whether all holds but what is in containers.

    Args:
        traced: the forward, and what it takes for granted.
        at: the modules of the region by path, which are as it takes for granted now.
        classes: classes and functions, the names of attributes, and their values.
    """
    constants = _Constants()
    cells = {f"_cell_{number}": cell for number, (cell, _) in enumerate(traced.cells)}
    found = itertools.chain(
        _places(traced, at, constants),
        _values(traced, at, constants),
        (
            _variable(constants.name(owner), name, value, constants)
            for owner, name, value in classes
            if name not in FUNCTION_PARTS
        ),
        (_global(*each, constants) for each in traced.globals),
        map(constants.same, cells, (value for _, value in traced.cells)),
    )
    facts = "".join(f"        if not ({fact}): return False\n" for fact in found)
    outer = "".join(f"    {name} = None\n" for name in cells) + "    def check(self):\n"
    source = f"def enclosing():\n{outer}{facts}        return True\n    return check\n"
    enclosing = cast(FunctionType, constants.define(source, "enclosing"))
    code = next(each for each in enclosing.__code__.co_consts if isinstance(each, CodeType))
    # Dynamo knows the variables of an enclosing function, and not the cells that hold them.
    held = tuple(cells[name] for name in code.co_freevars)
    check = FunctionType(code, enclosing.__globals__, "check", None, held)
    return cast("Callable[[nn.Module], bool]", check)


def _places(traced: Traced, at: dict[str, nn.Module], constants: _Constants) -> Iterator[str]:
    """That the modules are where they were, the outer ones first, which lead to the inner ones."""
    rows: Any = (traced.modes, traced.attributes, traced.present, traced.children)
    held = (place for place, _ in (*traced.contents, *traced.objects))
    paths = {row[0] for row in itertools.chain(*rows, held)}
    paths |= {f"{path}.{name}".lstrip(".") for path, name in traced.places}
    paths = {".".join(p.split(".")[: n + 1]) for p in paths if p for n in range(p.count(".") + 1)}
    for path in sorted(paths, key=lambda path: (path.count("."), path)):
        parent, _, name = path.rpartition(".")
        module = at[parent]._modules[name]
        yield _item(f"{_module(parent)}._modules", name, module, constants)
    reached: dict[nn.Module | None, str] = {}
    for path, name in traced.places:
        reached[at[path]._modules[name]] = _module(f"{path}.{name}")
    for module, expression in reached.items():
        if module is not None:
            yield from (f"not {expression}.{hooks}" for hooks in CALL_HOOKS)
            yield f"{expression}.__class__ is {constants.name(type(module))}"


def _values(traced: Traced, at: dict[str, nn.Module], constants: _Constants) -> Iterator[str]:
    """That what was read of the modules is as it was."""
    for path, flag in traced.modes:
        yield f"{_module(path)}.training is {flag}"
    for path, holder, name, value in traced.attributes:
        yield _item(f"{_module(path)}.{holder}", name, value, constants)
    for place, _ in traced.contents:
        yield from _at_place(place, held_at(at, place), at, constants)
    for place, cls in traced.objects:
        yield f"type({_expression(at, place, constants)}) is {constants.name(cls)}"
    for place, value in traced.settings:
        yield from _at_place(place, value, at, constants)
    for path, holder, name in traced.present:
        yield f"{_module(path)}.{holder}.get({name!r}) is not None"
    for path, names in traced.children:
        yield f"tuple({_module(path)}._modules) == {names!r}"


def _at_place(
    place: Place, value: Any, at: dict[str, nn.Module], constants: _Constants
) -> Iterator[str]:
    """That an attribute of a module, or of an object that one holds, is as it was."""
    path, (*before, name) = place
    holder = held_at(at, (path, tuple(before)))
    if isinstance(holder, nn.Module):
        yield _item(f"{_module(path)}.__dict__", name, value, constants)
    elif holder_of(at, place) is not None:
        of = _expression(at, (path, tuple(before)), constants)
        of_class = inspect.getattr_static(type(holder), name, MISSING)
        yield _got(of, name, value, of_class, constants)


def _got(of: str, name: str, value: Any, of_class: Any, constants: _Constants) -> str:
    """That an object gives what it held, or what its class has where it held nothing.

    To get that is how Dynamo finds out that the object has nothing of its own.
    """
    if value is MISSING and isinstance(of_class, property):
        return f"hasattr({of}, {name!r})"  # Not what it gives, which Dynamo may have a symbol for.
    got = f"getattr({of}, {name!r}, {constants.name(MISSING)})"
    if value is not MISSING or of_class is MISSING:
        return constants.same(got, value)
    if type(of_class) is FunctionType:
        return f"{got}.__func__ is {constants.name(of_class)}"
    return constants.same(got, getattr(of_class, "__func__", of_class))


def _expression(at: dict[str, nn.Module], place: Place, constants: _Constants) -> str:
    """What leads from the region to an object."""
    path, steps = place
    found, holder = _module(path), at[path]
    for number, step in enumerate(steps):
        if is_of_items(holder):
            found = f"{found}[{constants.literal(step)}]"
        elif isinstance(holder, nn.Module):
            found = f"{found}.__dict__[{step!r}]"
        else:
            found = f"getattr({found}, {step!r})"
        holder = held_at(at, (path, steps[: number + 1]))
    return found


def _module(path: str) -> str:
    return "self" + "".join(f"._modules[{name!r}]" for name in path.split(".") if name)


def _item(mapping: str, name: str, value: Any, constants: _Constants) -> str:
    if value is MISSING:
        return f"{name!r} not in {mapping}"
    same = constants.same(f"{mapping}[{name!r}]", value)
    return f"{name!r} in {mapping} and {same}"


def _global(namespace: dict[str, Any], name: str, value: Any, constants: _Constants) -> str:
    """A global variable; of a module, in whose place a namespace would be guarded as a whole."""
    module = sys.modules.get(namespace.get("__name__", ""))
    if module is None or vars(module) is not namespace:
        return _item(constants.name(namespace), name, value, constants)
    return _variable(constants.name(module), name, value, constants)


def _variable(owner: str, name: str, value: Any, constants: _Constants) -> str:
    if value is MISSING:
        return f"not hasattr({owner}, {name!r})"
    return constants.same(f"getattr({owner}, {name!r}, {constants.name(MISSING)})", value)
