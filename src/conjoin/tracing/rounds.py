"""Traces a module in both modes and for all structures of calls, until no pass merges more."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from torch import fx, nn

from conjoin.graph.congruence import INPUTS, Inputs
from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View, views
from conjoin.layers.walking import walk
from conjoin.merging import MERGER, Merger
from conjoin.passes import rewrite_traced
from conjoin.tracing import sound
from conjoin.tracing.likeness import likeness
from conjoin.tracing.plans import PLAN, dictionary_of
from conjoin.tracing.sandbox.objects import MISSING
from conjoin.tracing.sound import Traced
from conjoin.tracing.structures import Observed, Structure

Structures = Mapping[Structure | None, Observed]
"""The structures of calls, the required arguments alone for None, and what was seen of them."""

MOST_ROUNDS = 8
"""How often a region is traced until no pass finds more layers to merge; passes merge and stop."""

Traces = tuple[list[Traced], bool]
"""What was traced of a module, and whether any trace of it was sound."""

State = list[tuple[type, str]]
"""What merging changes of a module."""

Known = dict[Hashable, Traces]
"""What was traced, by all that decides it; modules that are alike in that share it."""


def trace(module: nn.Module, structures: Structures, meta: dict[str, Any], known: Known) -> Traces:
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
        before, refused = state_of(module), len(merger.refused)
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
        if state_of(module) == before:
            if len(merger.refused) == refused:
                known[like] = traced, bool(seen)
            return traced, bool(seen)
    return [], False


def _renewed(traced: Traced, module: nn.Module) -> Traced:
    """What was traced of a module that is like this one, with the constants of this one."""
    at = dict(module.named_modules())
    attributes = tuple(
        (path, holder, name, dictionary_of(at[path], holder).get(name, MISSING))
        for path, holder, name, _ in traced.attributes
    )
    return dataclasses.replace(traced, attributes=attributes)


def state_of(module: nn.Module) -> State:
    """The classes of the modules, and which wide layers hold their parameters."""
    return [
        (plain_class(inner), inner.wide_layer.identity if isinstance(inner, View) else "")
        for _, inner in walk(module)
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
