"""Finds out whether a module encloses all siblings of a wide layer.

The smallest module that does carries a mark, so that a view that is listed can look whether it has
been passed on the way, or, where no memo tells that, whose listing is going on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

ENCLOSES = "_conjoin_encloses"
"""The attribute of a module in which it is noted which wide layers' siblings it encloses."""

LISTINGS = frozenset("modules named_modules parameters named_parameters _named_members".split())
"""The methods by which modules list what is below them, one calling another."""


def listing() -> tuple[set[nn.Module], str]:
    """The modules whose listing is going on, and the name of the module of code that asked for it.

    To be called while a method lists. In compiled code nothing is known of that.
    """
    modules: set[nn.Module] = set()
    if torch.compiler.is_compiling():
        return modules, ""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name not in LISTINGS:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_name in LISTINGS:
        if isinstance(module := frame.f_locals.get("self"), nn.Module):
            modules.add(module)
        frame = frame.f_back
    return modules, "" if frame is None else str(frame.f_globals.get("__name__"))


def mark(module: nn.Module, identity: str) -> None:
    """Notes that a module encloses the siblings of a wide layer, which goes by `identity`."""
    for held in _holders(module):
        held[ENCLOSES] = held.get(ENCLOSES, set()) | {identity}


def unmark(module: nn.Module, identity: str | None = None) -> None:
    """Forgets that a module encloses the siblings of a wide layer, or of any."""
    for held in _holders(module):
        left = held.get(ENCLOSES, set()) - {identity} if identity is not None else set()
        held[ENCLOSES] = left
        if not left:
            del held[ENCLOSES]


def encloses(module: nn.Module, identity: str) -> bool:
    """Whether it is noted that a module encloses the siblings of a wide layer."""
    if not isinstance(module, fx.GraphModule):
        return identity in vars(module).get(ENCLOSES, ())
    holders = list(_holders(module))
    found = set().union(*(held.get(ENCLOSES, ()) for held in holders))
    for held in holders if found else ():
        held[ENCLOSES] = found
    return identity in found


def _holders(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where it is noted which wide layers' siblings a module encloses.

    A copy of a GraphModule keeps its `meta` and not its attributes, and one that comes out of a
    pickle the reverse.
    """
    yield vars(module)
    if isinstance(module, fx.GraphModule):
        yield module.meta
