"""optimize, unfuse, report: the whole story on one page."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.export import ExportedProgram

from conjoin import memory, programs
from conjoin.applying import Plan, apply, restore
from conjoin.counting import count, counted, group_of, on_copies, uncounted
from conjoin.graph.siblings import Candidate, candidates, in_order
from conjoin.graph.site import Sightings, Untraced
from conjoin.launches import Launches
from conjoin.layers import KINDS, Kind, checked
from conjoin.layers.view import views
from conjoin.legality import Reason
from conjoin.memory import Memory, MemoryBudgetWarning
from conjoin.policy.budget import Fitted, Need, fit
from conjoin.policy.cost import Policy
from conjoin.policy.deciding import check_policy, decide, note, noted
from conjoin.policy.levels import Levels
from conjoin.reachable import remembering
from conjoin.reports.report import Group, Report
from conjoin.tracing import graph_modules
from conjoin.tracing.copies import Call, Copy, UncopyableError
from conjoin.tracing.exported import lift
from conjoin.tracing.observe import observe
from conjoin.tracing.symbolic import trace
from conjoin.tracing.undisturbed import undisturbed

Model = TypeVar("Model", bound="nn.Module | ExportedProgram")
Module = TypeVar("Module", bound=nn.Module)


def optimize(
    model: Model,
    example_inputs: tuple[Any, ...] | list[tuple[Any, ...]] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    inplace: bool = False,
    kinds: Sequence[Kind] = KINDS,
    policy: Policy = "auto",
    memory_budget: float | None = None,
) -> Model:
    """Merges sibling layers, those that read the same tensor, into wide layers.

    Call it before the optimizer is built: the wide layers own the parameters from here on. The
    model keeps its class, methods, attributes, module names and `state_dict` keys.

    Args:
        model: the model; with its weights already loaded, or to be loaded later. Or an
            `ExportedProgram` of `torch.export`, which is never changed itself, and has example
            inputs of its own: its siblings are found in its graph, and hold for all the sizes that
            it was exported for. Its wide parameters are in its `state_dict` in the place of the
            siblings'.
        example_inputs: the positional arguments of a call, as in `torch.export.export`, or a list
            of such tuples. With them, siblings are found by observing the model run on fake
            tensors; without, by symbolic tracing, which cannot look into all Python code.
        example_kwargs: the keyword arguments that go with them.
        inplace: change `model` itself. Beside its weights, those of one group at a time are in
            memory then, and what it takes to trace the model.
        kinds: the kinds of layer to merge, by default all that conjoin knows. `Kind` tells how to
            write one for layers of your own; that for the most specific class counts.
        policy: which groups are merged, of those that can be. With `"auto"` all but those that an
            estimate from the shapes of the example inputs is against; it may divide a group into
            several wide layers. With `"measure"` each group is timed by itself, on its device, and
            the quickest form is taken; one that cannot be run, such as on `meta`, is merged. With
            `"always"` all. Layers behind the groups are merged where an estimate is not against
            it, but with `"always"`. What is quick is looked at in the mode that the model is in: a
            step of training where it is in training mode and gradients are on, otherwise forward;
            of several calls, the first counts. Without example inputs no shapes are known, and all
            merge.
        memory_budget: bytes as an `int`, or a fraction of the memory of the model's device as a
            `float`, that a call with the example inputs may need, forward and, where gradients are
            on, backward. Groups for which the predicted peak would be above it, and above that of
            the model as it is, become several wide layers, or stay apart. Where the peak is above
            it all the same, as that of the model as it is may be, a `MemoryBudgetWarning` of
            `conjoin.memory` says so, and a report. That module tells what is counted.

    Returns:
        The optimized model: `model` itself with `inplace`, otherwise a copy.

    Raises:
        TypeError: `model` is no module, `example_inputs` is no tuple or list of tuples, `kinds` is
            no tuple of kinds, or `memory_budget` is no number.
        ValueError: the model cannot be copied, or does not run on the example inputs; two of the
            kinds are for one class; there is no such policy, or no example inputs to measure with;
            `memory_budget` is not above 0, is a fraction above 1, or is given without example
            inputs; or anything but `kinds` is given for an exported program.

    Example:
        >>> import torch, conjoin
        >>> class Heads(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean, self.log_var = torch.nn.Linear(8, 2), torch.nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         return self.mean(x), self.log_var(x)
        >>> fused = conjoin.optimize(Heads(), (torch.randn(4, 8),))
        >>> [tuple(p.shape) for p in fused.parameters()]
        [(4, 8), (4,)]
    """
    with _no_collection(), remembering():
        kinds = checked(kinds)
        if isinstance(model, ExportedProgram):
            _check_alone(example_inputs, example_kwargs, policy, memory_budget, inplace)
            return cast(Model, programs.optimize(model, kinds))
        calls = example_calls(example_inputs, example_kwargs)
        limit = _limits(model, calls, policy, memory_budget)
        # A graph is lifted before it is looked at, so of a model with graphs the copy is.
        optimized = model if inplace or not _has_graphs(model) else _copy(model)
        with graph_modules.lifted(optimized):
            plan = _plan(optimized, calls, kinds, policy, limit, again=True)
            if warning := Memory(None, plan.peak, limit).warning:
                warnings.warn(warning, MemoryBudgetWarning, stacklevel=2)
            if optimized is model and not inplace:
                optimized = _copy(model)
            _, found = apply(optimized, plan)
            note(optimized, found)
    return optimized


def unfuse(model: Model, *, inplace: bool = False) -> Model:
    """Gives the original layers back, with the values that the wide layers have now.

    Args:
        model: an optimized model or exported program, or any other, which stays as it is.
        inplace: change `model` itself.

    Returns:
        The model with layers, classes and names as they were before `optimize`; of an exported
        program the graph as it was.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model cannot be copied; or a program's graph was changed after `optimize`.
    """
    if isinstance(model, ExportedProgram):
        _check_alone(None, None, inplace=inplace)
        return cast(Model, programs.unfuse(model))
    check_model(model)
    plain = model if inplace else _copy(model)
    restore(plain)
    return plain


def report(
    model: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] | list[tuple[Any, ...]] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    kinds: Sequence[Kind] = KINDS,
    policy: Policy = "auto",
    memory_budget: float | None = None,
) -> Report:
    """Tells which siblings are, or would be, merged, which are not and why, and what that saves.

    It changes nothing: on a model that was not optimized it is a dry run.

    Args:
        model: the model, optimized or not; or an exported program, with inputs of its own.
        example_inputs: as for `optimize`. With them, launches are counted, on fake tensors and in
            the mode (training or evaluation) that the model is in; of several calls, the first is.
            A group's row counts what its branches run behind the siblings too, as far as that runs
            for several at once. What is saved beside the groups, by computing equal operations
            once, is in the totals only.
        example_kwargs: the keyword arguments that go with them.
        kinds: as for `optimize`. Layers that were merged earlier count also without.
        policy: as for `optimize`, where that has not decided earlier.
        memory_budget: likewise.

    Returns:
        The report; `str()` of it is a table.

    Raises:
        TypeError: `model` is no module, `example_inputs` is no tuple or list of tuples, `kinds` is
            no tuple of kinds, or `memory_budget` is no number.
        ValueError: the model cannot be copied, or does not run on the example inputs; two of the
            kinds are for one class; there is no such policy, or no example inputs to measure with;
            or `memory_budget` is not above 0, is a fraction above 1, or is given without example
            inputs.
    """
    calls = example_calls(example_inputs, example_kwargs)
    kinds = checked(kinds)
    if isinstance(model, ExportedProgram):
        _check_alone(None, None, policy, memory_budget)
        return _report_program(model, calls, kinds)
    limit = _limits(model, calls, policy, memory_budget)
    model = _copy(model) if _has_graphs(model) else model
    # What the collector would find is counted as if it were alive until then.
    with _no_collection(), remembering(), graph_modules.lifted(model):
        plan = _plan(model, calls, kinds, policy, limit, again=False)
        counts = count(model, calls[0], plan) if calls else uncounted(model, plan)
        groups = tuple(
            group_of(candidate, counts)
            for candidate in in_order(counts.groups(plan.found), model, plan.sightings)
        )
    launches = Launches(counts.plain.count, counts.optimized.count)
    peaks = Memory(counts.plain.peak, counts.optimized.peak, limit)
    return Report(groups, launches, plan.sightings.untraced, bool(calls), peaks)


def _report_program(program: ExportedProgram, calls: list[Call], kinds: tuple[Kind, ...]) -> Report:
    """What is, or would be, merged in a program, with the launches of the program itself."""
    plain = programs.unfuse(program) if programs.is_current(program) else program
    fused = programs.optimize(plain, kinds)
    if not calls and plain.example_inputs:
        calls = [plain.example_inputs]
    inputs, kwargs = calls[0] if calls else (None, None)
    module = lift(plain.module(check_guards=False))
    found = report(module, inputs, example_kwargs=kwargs, kinds=kinds, policy="always")
    merged = programs.merged_layers(fused)
    groups = tuple(each for group in found.groups for each in _in_program(group, merged))
    if not calls:
        return dataclasses.replace(found, groups=groups)
    modules = (each.module(check_guards=False) for each in (plain, fused))
    before, after = (counted(each, calls[0]) for each in modules)
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


def _check_alone(
    inputs: object,
    kwargs: object,
    policy: object = "auto",
    budget: object = None,
    inplace: bool = False,
) -> None:
    """Raises ValueError where something is given that an exported program does not need."""
    if policy not in ("auto", "always") or budget is not None:
        raise ValueError(
            "the layers of an ExportedProgram are merged wherever that is exact: leave out policy "
            "and memory_budget, or optimize the model before exporting it."
        )
    if inputs is not None or kwargs is not None:
        raise ValueError(
            "an ExportedProgram has example inputs of its own: leave out example_inputs and "
            "example_kwargs."
        )
    if inplace:
        raise ValueError("an ExportedProgram is not changed in place: leave out inplace.")


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without Python's cycle collector, which would go through all the new nodes many times."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_model(model: object) -> None:
    """Raises TypeError where `model` is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module as model, not {type(model).__name__}.")


def example_calls(inputs: object, kwargs: dict[str, Any] | None) -> list[Call]:
    """The example calls; none where neither arguments nor keyword arguments were given.

    Raises:
        TypeError: `inputs` is no tuple or list of tuples.
    """
    if inputs is None:
        return [] if kwargs is None else [((), kwargs)]
    calls: list[Call] = []
    for call in inputs if isinstance(inputs, list) else [inputs]:
        if not isinstance(call, tuple):
            hint = "(x,)" if isinstance(call, Tensor) else "(x, y)"
            raise TypeError(
                f"example_inputs is a tuple of the model's arguments such as {hint}, or a list of "
                f"such tuples, not {type(call).__name__}."
            )
        calls.append((call, kwargs or {}))
    return calls


def _limits(
    model: nn.Module, calls: list[Call], policy: object, budget: float | None
) -> int | None:
    """Checks the policy and the budget, and gives the budget in bytes."""
    check_policy(policy)
    if policy == "measure" and not calls:
        raise ValueError(
            "policy='measure' times groups on tensors like those of a call, and example_inputs "
            "were not given. Pass example_inputs, the model's arguments as a tuple."
        )
    if budget is None:
        return None
    check_model(model)
    if not calls:
        raise ValueError(
            "memory_budget was given and example_inputs were not, which tell how large the model's "
            "tensors are. Pass example_inputs, the model's arguments as a tuple."
        )
    return memory.in_bytes(budget, model)


def _has_graphs(model: nn.Module) -> bool:
    """Whether there are GraphModules in a model.

    Raises:
        TypeError: it is no module.
        ValueError: a graph does not lint.
    """
    check_model(model)
    graph_modules.check(model)
    return any(True for _ in graph_modules.graph_modules(model))


def _copy(model: Module) -> Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"the model cannot be copied ({error}). Pass inplace=True to change it itself."
        ) from error


def _plan(
    model: nn.Module,
    calls: list[Call],
    kinds: tuple[Kind, ...],
    policy: Policy,
    limit: int | None,
    *,
    again: bool,
) -> Plan:
    """What is found in a model, and decided of it by the policy and a limit of memory.

    Args:
        model: the model.
        calls: its example calls.
        kinds: the kinds of layer.
        policy: which groups to merge.
        limit: the bytes that a call may need, if that is limited.
        again: whether groups that were left alone are decided again.
    """
    found, sightings = _find(model, calls, kinds)
    found = decide(model, noted(model, found, again=again), sightings, policy)
    plan = Plan(found, sightings, kinds, Levels(model, sightings, policy))
    return plan if limit is None else _fit(model, calls[0], plan, limit)


def _fit(model: nn.Module, call: Call, plan: Plan, limit: int) -> Plan:
    """What is to be done for a call to stay within a limit of memory, predicted on copies."""

    def fitted(copied: Callable[[], Copy]) -> Fitted:
        def need(groups: Sequence[Candidate]) -> Need:
            merged = copied()
            merger, _ = apply(merged.model, dataclasses.replace(plan, found=groups))
            behind = (Candidate(each.kind, each.layers, each.widths) for each in merger.levels)
            return Need(merged.count(call, {}).peak or 0, tuple(behind))

        plain = copied()
        restore(plain.model)
        merged = frozenset(name for name, _ in views(model))
        with undisturbed(plain.model):
            peak = plain.count(call, {}).peak or 0
            return fit(tuple(plan.found), plan.sightings, need, peak, limit, merged)

    settled = on_copies(model, fitted)
    if settled is None:
        raise ValueError(
            "memory_budget was given, and how much memory the model needs is predicted on copies "
            "of it, which cannot be made. Leave memory_budget out."
        )
    return dataclasses.replace(plan, found=settled.found, peak=settled.peak)


def _find(
    model: nn.Module, calls: list[Call], kinds: tuple[Kind, ...]
) -> tuple[tuple[Candidate, ...], Sightings]:
    # A lazy layer does not run on fake tensors; a trace shows which siblings it would have.
    lazy = any(nn.parameter.is_lazy(parameter) for parameter in model.parameters())
    try:
        sightings = observe(model, calls, kinds) if calls and not lazy else trace(model, kinds)
    except UncopyableError as error:
        untraced = Untraced("", f"it was traced and not run, since it cannot be copied: {error}")
        sightings = trace(model, kinds)
        sightings = dataclasses.replace(sightings, untraced=(untraced, *sightings.untraced))
    return candidates(model, sightings, kinds), sightings
