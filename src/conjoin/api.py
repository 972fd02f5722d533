"""The public functions `optimize`, `unfuse` and `report`: what is done, step by step."""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, cast

from torch import nn
from torch.export import ExportedProgram

from conjoin import programs
from conjoin.applying import apply, restore
from conjoin.checking import check_for_program, check_model, checked_budget, example_calls
from conjoin.decision import decide_on
from conjoin.duplicates import deepcopy
from conjoin.foreign import quote
from conjoin.layers import KINDS, Kind, checked_kinds
from conjoin.memory import Memory, MemoryBudgetWarning
from conjoin.policy.deciding import note
from conjoin.policy.figures import Policy
from conjoin.reachable import remembering
from conjoin.reporting import report_model, report_program
from conjoin.reports.report import Report
from conjoin.tracing import graph_modules
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
            `ExportedProgram` of `torch.export`, which has example inputs of its own and is never
            changed itself. Its siblings are found in its graph, what becomes of them holds for all
            the sizes that it was exported for, and the wide parameters take the place of the
            siblings' in its `state_dict`.
        example_inputs: the positional arguments of a call, as in `torch.export.export`, or a list
            of such tuples. With them, siblings are found by observing the model run on fake
            tensors; without, by symbolic tracing, which cannot look into all Python code.
        example_kwargs: the keyword arguments that go with them.
        inplace: change `model` itself. It takes the memory of the weights of one group more, and
            what it takes to trace the model.
        kinds: the kinds of layer to merge, by default all that conjoin knows. `Kind` tells how to
            write one for layers of your own. Of several, that for the most specific class counts.
        policy: which groups are merged, of those that can be:

            - `"auto"`: all that are not slower by an estimate from the shapes of the example
              inputs. A group may become several wide layers.
            - `"measure"`: each group is timed by itself, on its device, and the quickest form is
              taken. One that cannot be run, such as on `meta`, is merged.
            - `"always"`: all.

            Layers behind the groups are merged unless an estimate is against it; with `"always"`
            all are. What is to be quick follows the model's mode: a step of training where it is in
            training mode and gradients are on, otherwise a forward pass. Of several calls, the
            first counts. Without example inputs no shapes are known, and all groups are merged.
        memory_budget: the memory that a call with the example inputs may need, forward and, where
            gradients are on, backward: bytes as an `int`, or a fraction of the memory of the
            model's device as a `float`. Groups that are predicted to need more, and more than the
            model as it is, become several wide layers, or stay apart. Where the budget is not met
            all the same, a `conjoin.MemoryBudgetWarning` says so, and a report.
            `conjoin.memory` tells what is counted.

    Returns:
        The optimized model: `model` itself with `inplace`, otherwise a copy.

    Raises:
        TypeError: `model` is no module, `example_inputs` is no tuple or list of tuples,
            `example_kwargs` is no dict of names, `kinds` is no tuple of kinds, or `memory_budget`
            is no number.
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
        kinds = checked_kinds(kinds)
        if isinstance(model, ExportedProgram):
            check_for_program(
                example_inputs=example_inputs,
                example_kwargs=example_kwargs,
                policy=policy,
                memory_budget=memory_budget,
                inplace=inplace,
            )
            return cast(Model, programs.optimize(model, kinds))
        calls = example_calls(example_inputs, example_kwargs)
        limit = checked_budget(model, calls, policy, memory_budget)
        # A graph is lifted before it is looked at, so of a model with graphs the copy is.
        optimized = model if inplace or not _has_graphs(model) else _copy(model)
        with graph_modules.lifted(optimized):
            decision = decide_on(optimized, calls, kinds, policy, limit, again=True)
            if warning := Memory(None, decision.peak, limit).warning:
                warnings.warn(warning, MemoryBudgetWarning, stacklevel=2)
            if optimized is model and not inplace:
                optimized = _copy(model)
            _, found = apply(optimized, decision)
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
        ValueError: the model cannot be copied; a graph in it does not lint; or a program's graph
            was changed after `optimize`.

    Example:
        >>> import torch, conjoin
        >>> model = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> plain = conjoin.unfuse(conjoin.optimize(model))
        >>> type(plain[1]).__name__, torch.equal(plain[1].weight, model[1].weight)
        ('Linear', True)
    """
    if isinstance(model, ExportedProgram):
        check_for_program(inplace=inplace)
        return cast(Model, programs.unfuse(model))
    check_model(model)
    graph_modules.check(model)
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
        TypeError: `model` is no module, `example_inputs` is no tuple or list of tuples,
            `example_kwargs` is no dict of names, `kinds` is no tuple of kinds, or `memory_budget`
            is no number.
        ValueError: the model cannot be copied, or does not run on the example inputs; two of the
            kinds are for one class; there is no such policy, or no example inputs to measure with;
            or `memory_budget` is not above 0, is a fraction above 1, or is given without example
            inputs.

    Example:
        >>> import torch, conjoin
        >>> model = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> report = conjoin.report(model, (torch.randn(4, 8),))
        >>> [(group.layers, group.fused, group.launches) for group in report.groups]
        [(('0', '1'), True, (2, 1))]
    """
    calls = example_calls(example_inputs, example_kwargs)
    kinds = checked_kinds(kinds)
    if isinstance(model, ExportedProgram):
        check_for_program(policy=policy, memory_budget=memory_budget)
        with _no_collection(), remembering():
            return report_program(model, calls, kinds)
    limit = checked_budget(model, calls, policy, memory_budget)
    model = _copy(model) if _has_graphs(model) else model
    # What the collector would find is counted as if it were alive until then.
    with _no_collection(), remembering():
        return report_model(model, calls, kinds, policy, limit)


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
        with undisturbed():  # A copy may be made by code of the model's own.
            return deepcopy(model)
    except Exception as error:  # That code may raise anything.
        raise ValueError(
            f"the model cannot be copied ({quote(error)}). Pass inplace=True to change it itself."
        ) from error
