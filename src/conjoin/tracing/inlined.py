"""What Dynamo traces in the place of a region's forward, as source that leads to few guards.

While Dynamo traces, whatever is looked at becomes guards, which run on every call: each attribute
on the way, each global name, each function that is called. So all that finds a rewritten forward
is one piece of source for each region, in which an operation is one name and a wide layer a product
with its Parameters. Whether all holds that is taken for granted is asked once, by a function whose
result Dynamo takes as a constant; what `spelled.py` writes has it guard the same.
"""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from conjoin.layers.activation import PURE
from conjoin.layers.checks import TENSORS
from conjoin.layers.embedding import unstack
from conjoin.layers.wide import Wide
from conjoin.tracing.fitting import expressions
from conjoin.tracing.quick import CALL, Written, at_path, calls_forward
from conjoin.tracing.source import Names, code
from conjoin.tracing.spelled import CELL, condition_of, module_at
from conjoin.tracing.structures import Structure, structure_of

if TYPE_CHECKING:
    from conjoin.tracing.plans import Variant
    from conjoin.tracing.sound import Traced

RISES, BY_IDENTITY = 2, 4
"""Bits of what `Variant.way` tells, which is 0 where the forward may not run.

With the first the forward is the one for steps of training; with the second it is the views
themselves that are guarded, and not what they are to each other."""

CALLED = re.compile(rf"\b({CALL}\d+)\((?:(\w+)(, apart = True)?\))?")
"""How torch.fx writes calls of modules; one with one tensor is found as a whole."""

TOLD = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""Types of values that are equal where they are written alike."""

DEFINED = "def forward("
"""What the definition of a forward begins with."""

STRING = r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\""
"""A string in source."""


def finder_of(
    at: Mapping[str, nn.Module], variants: Mapping[Structure, Sequence[Variant]]
) -> Callable[..., Any]:
    """A function of a region and a call's arguments that finds the forward for the call.

    It gives the forward and the call's tensors, or None where the original must run.

    Args:
        at: the modules of the region by path.
        variants: its rewritten forwards, by the structure of the call.
    """
    names = Names()
    of_tensors, of_others, functions, enclosed = "", "", "", []
    for position, (structure, found) in enumerate(variants.items()):
        attempts = ""
        for variant in found:
            number = variant.number
            condition = condition_of(variant.traced, at, variant.classes, names)
            if variant.traced.cells:
                functions += _check(number, condition, len(variant.traced.cells))
                enclosed.append((f"check_{number}", variant.traced))
                condition = f"check_{number}(self, known)"
            functions += _forwards(number, variant.traced, at, names)
            attempts += _attempt(number, variant, condition)
        of_others += f"if number == {position}:\n" + _within(attempts)
        if isinstance(structure, int) and structure:
            plain = " and ".join(_is_plain(f"args[{n}]", names) for n in range(structure))
            of_tensors += f"if not kwargs and args[{structure - 1}:] and not args[{structure}:]:\n"
            of_tensors += _within(f"if {plain}:\n" + _within(f"{attempts}return None\n"))
    known = {structure: position for position, structure in enumerate(variants)}
    body = (
        f"if '_is_replica' in self.__dict__: return None\n{of_tensors}"
        f"found = {names.name(structure_of)}(args, kwargs)\n"
        f"if found is None: return None\nargs = found[1]\n"
        f"number = {names.name(known)}.get(found[0])\n"
        f"{of_others}return None\n"
    )
    every = itertools.chain(*variants.values())
    held = {**names, **{f"way_{each.number}": each.way for each in every}}
    source = f"{functions}def find(self, args, kwargs):\n{_within(body)}{_legend(names, known)}"
    exec(code(source), held)
    for name, traced in enclosed:
        held[name] = _enclosed(held[name], traced)
    return cast("Callable[..., Any]", held.pop("find"))


def _legend(names: Names, known: Mapping[Structure, int]) -> str:
    """What the names stand for, as a comment.

    Dynamo takes regions of one source for one function, which they are if that is the same too.
    """
    told = [
        repr(value) if value is known or type(value) in TOLD else str(id(value))
        for value in names.values()
    ]
    return f"# {told}\n"


def _check(number: int, condition: str, count: int) -> str:
    """A function for a condition that is of variables of enclosing functions."""
    cells = "".join(f"{CELL}{n} = None\n" for n in range(count))
    body = f"def check(self, known):\n    return {condition}\nreturn check\n"
    return f"def check_{number}():\n{_within(cells + body)}"


def _enclosed(enclosing: Any, traced: Traced) -> FunctionType:
    """The function within another, with the variables that a forward found around it."""
    cells = {f"{CELL}{number}": cell for number, (cell, _) in enumerate(traced.cells)}
    inner = next(each for each in enclosing.__code__.co_consts if isinstance(each, CodeType))
    held = tuple(cells[name] for name in inner.co_freevars)
    return FunctionType(inner, enclosing.__globals__, "check", None, held)


def _within(source: str) -> str:
    return textwrap.indent(source, "    ")


def _is_plain(tensor: str, names: Names) -> str:
    """That an argument is a tensor; what else the graph may take is told by `structure_of`."""
    return f"{tensor}.__class__ is {names.name(Tensor)} and not {tensor}.is_nested"


def _attempt(number: int, variant: Variant, condition: str) -> str:
    """What returns the forward of a variant, if it may run."""
    fits = " and ".join(("True", *expressions(variant.traced)))
    return (
        f"way = way_{number}() if {fits} else 0\nknown = way & {BY_IDENTITY}\n"
        f"if way and {condition}:\n"
        f"    return (risen_{number} if way & {RISES} else forward_{number}), args\n"
    )


def _forwards(number: int, traced: Traced, at: Mapping[str, nn.Module], names: Names) -> str:
    """The source of both forwards of a variant."""
    if traced.written.restores or traced.written.stored:  # They are functions around the source.
        names[f"forward_{number}"], names[f"risen_{number}"] = traced.function, traced.risen
        return ""
    forward = _forward(traced.written, f"forward_{number}", at, names)
    if traced.rising is traced.written:
        return f"{forward}risen_{number} = forward_{number}\n"
    return forward + _forward(traced.rising, f"risen_{number}", at, names)


def _forward(written: Written, name: str, at: Mapping[str, nn.Module], names: Names) -> str:
    """A rewritten forward, by a name."""
    source = _resolved(written, names)
    # In front of it torch.fx tells itself which of the functions it is not to trace.
    source = source[source.index(DEFINED) :].strip().replace(DEFINED, f"def {name}(", 1)
    if unstack in written.globals.values():
        source = re.sub(rf"\b{names.name(unstack)}\((\w+), \d+\)", _parts(r"\1", names), source)
    head, body = source.split("\n", 1)
    modules = {each: at_path(at[""], path) for each, path in written.called}
    found = "".join(f"    {each} = {module_at(path)}\n" for each, path in written.called)
    body = CALLED.sub(lambda call: _call(call, modules[call[1]], names), body)
    return f"{head}\n{found}{body}\n"


def has_tensors(module: nn.Module) -> bool:
    """Whether a module has the Parameters that the source takes from it."""
    return type(module) is not nn.Linear or all(name in module._parameters for name in TENSORS)


def _parts(stack: str, names: Names) -> str:
    """`unstack`, which asks more of what it is called with."""
    part, cut = names.name(torch.ops.aten._unsafe_view), names.name(torch.unsafe_split)
    return f"[{part}(p, p.shape[1:]) for p in {cut}({stack}, 1, 0)]"


def _resolved(written: Written, names: Names) -> str:
    """The source with a name of its own for each function and constant of a module."""
    held = "|".join(map(re.escape, written.globals))
    if not held:
        return written.source
    known = re.compile(rf"{STRING}|(?<![\w.])(?P<name>{held})(?P<rest>(?:\.\w+)*)(?!\w|\s*=(?!=))")

    def name(found: re.Match[str]) -> str:
        if found["name"] is None:
            return found[0]
        value, rest = written.globals[found["name"]], found["rest"].split(".")[1:]
        while rest and isinstance(value, ModuleType):
            value = getattr(value, rest.pop(0))
        return ".".join((names.name(value), *rest))

    return known.sub(name, written.source)


def _call(found: re.Match[str], module: nn.Module, names: Names) -> str:
    """A call of a module, past what finds its forward."""
    called, input, apart = found.groups()
    if isinstance(module, Wide):
        if input is None:
            return found[0]
        kind, way = module.kind, bool(apart)
        inlined = kind.inlined(module, f"{called}._parameters", input, names.name, apart=way)
        method = type(kind).apart if apart else type(kind).run
        return inlined or f"{names.name(method)}({names.name(kind)}, {called}, {input})"
    if input is not None and not apart:
        function, settings = PURE.get(type(module), (None, ()))
        if function is not None and not settings and not getattr(module, "inplace", False):
            return f"{names.name(function)}({input})"
        if type(module) is nn.Linear:
            held = (f"{called}._parameters[{name!r}]" for name in TENSORS)
            return f"{names.name(nn.functional.linear)}({input}, {', '.join(held)})"
    if not calls_forward(module):
        return found[0]
    return f"{names.name(type(module).forward)}({called}, {found[0].partition('(')[2]}"
