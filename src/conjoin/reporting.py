"""Reports on models and on exported programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from torch import nn
from torch.export import ExportedProgram

from conjoin import programs
from conjoin.counting import count_groups, count_model, find_levels, group_of
from conjoin.decision import decide_on
from conjoin.graph.siblings import in_order
from conjoin.launches import Launches
from conjoin.layers import Kind
from conjoin.legality import Reason
from conjoin.memory import Memory
from conjoin.policy.figures import Policy
from conjoin.reports.report import Group, Report
from conjoin.tracing import graph_modules
from conjoin.tracing.copies import Call
from conjoin.tracing.exported import lift


def report_model(
    model: nn.Module,
    calls: list[Call],
    kinds: tuple[Kind, ...],
    policy: Policy,
    limit: int | None,
) -> Report:
    """What is, or would be, merged in a model, and what that saves.

    Args:
        model: the model, whose graphs are lifted meanwhile.
        calls: its example calls, of which the first is counted.
        kinds: the kinds of layer.
        policy: which groups to merge.
        limit: the bytes that a call may need, if that is limited.
    """
    with graph_modules.lifted(model):
        decision = decide_on(model, calls, kinds, policy, limit, again=False)
        counts = count_groups(model, calls[0], decision) if calls else find_levels(model, decision)
        sightings = decision.sightings
        found = in_order(counts.groups(decision.found), model, sightings)
        groups = tuple(group_of(candidate, counts) for candidate in found)
    launches = Launches(counts.plain.count, counts.optimized.count)
    peaks = Memory(counts.plain.peak, counts.optimized.peak, limit)
    return Report(groups, launches, sightings.untraced, bool(calls), peaks)


def report_program(program: ExportedProgram, calls: list[Call], kinds: tuple[Kind, ...]) -> Report:
    """What is, or would be, merged in a program, with the launches of the program itself."""
    plain = programs.unfuse(program) if programs.is_current(program) else program
    fused = programs.optimize(plain, kinds)
    if not calls and plain.example_inputs:
        calls = [plain.example_inputs]
    module = lift(plain.module(check_guards=False))
    found = report_model(module, calls[:1], kinds, "always", None)
    merged = programs.merged_layers(fused)
    groups = tuple(each for group in found.groups for each in _in_program(group, merged))
    if not calls:
        return dataclasses.replace(found, groups=groups)
    modules = (each.module(check_guards=False) for each in (plain, fused))
    before, after = (count_model(each, calls[0]) for each in modules)
    launches, peaks = Launches(before.count, after.count), Memory(before.peak, after.peak)
    return dataclasses.replace(found, groups=groups, launches=launches, memory=peaks)


def _in_program(group: Group, merged: list[set[str]]) -> Iterator[Group]:
    """What has become of a group of a model in a program with these layers merged."""
    if not group.fused or any(wide.issuperset(group.layers) for wide in merged):
        yield group
        return
    left = {*group.layers}
    for wide in merged:
        if len(wide & left) > 1:
            yield _some_of(group, wide & left)
            left -= wide
    if left:
        yield dataclasses.replace(_some_of(group, left), fused=False, reason=Reason.IN_PROGRAM)


def _some_of(group: Group, layers: Collection[str]) -> Group:
    """Some of the layers of a group, of which nothing is counted."""
    pairs = zip(group.layers, group.widths, strict=True)
    names, widths = zip(*((name, width) for name, width in pairs if name in layers), strict=True)
    return dataclasses.replace(group, layers=names, widths=widths, launches=None, depth=())
