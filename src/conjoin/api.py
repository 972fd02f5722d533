"""optimize, unfuse, report: the whole story on one page."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.export import ExportedProgram

from conjoin import memory, programs
from conjoin.budget import fit
from conjoin.cost import Policy
from conjoin.deciding import DECIDED, check_policy, decide, leave_apart, note, noted
from conjoin.graph.depth import Chain, Depths
from conjoin.graph.siblings import Candidate, candidates, in_order
from conjoin.graph.site import Sightings, Untraced
from conjoin.launches import UNCOUNTED, Count, Counted, Launches
from conjoin.layers import KINDS, PRODUCTS, Kind, activation, checked
from conjoin.layers.owner import raw_parameters, reclaim
from conjoin.layers.product import SUFFIX
from conjoin.layers.wide import Wide, release, unmark, views, wides
from conjoin.legality import Reason
from conjoin.memory import Memory
from conjoin.merging import MERGER, Level, Merger
from conjoin.reachable import remembering
from conjoin.report import Group, Report
from conjoin.tracing import graph_modules, regions
from conjoin.tracing.exported import lift
from conjoin.tracing.observe import Call, Copy, UncopyableError, observe
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
            the quickest form is taken. With `"always"` all. What is quick is looked at in the mode
            that the model is in: a step of training where it is in training mode and gradients
            are on, otherwise forward. Without example inputs no shapes are known, and all merge.
        memory_budget: bytes as an `int`, or a fraction of the memory of the model's device as a
            `float`, that a call with the example inputs may need, forward and, where gradients are
            on, backward. Groups for which the predicted peak would be above it, and above that of
            the model as it is, become several wide layers, or stay apart. `conjoin.memory` tells
            what is counted.

    Returns:
        The optimized model: `model` itself with `inplace`, otherwise a copy.

    Raises:
        TypeError: `model` is no module, `example_inputs` is no tuple or list of tuples, `kinds` is
            no tuple of kinds, or `memory_budget` is no number.
        ValueError: the model cannot be copied, or does not run on the example inputs; two of the
            kinds are for one class; there is no such policy; `memory_budget` is not above 0, is a
            fraction above 1, or is given without example inputs; or anything but `kinds` is given
            for an exported program.

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
            found, sightings = _find(optimized, calls, kinds)
            found = decide(optimized, noted(optimized, found, again=True), sightings, policy)
            if limit is not None:
                found = _fit(optimized, calls[0], found, sightings, kinds, limit)
            if optimized is model and not inplace:
                optimized = _copy(model)
            _, found = _merge(optimized, found, sightings, kinds)
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
    regions.uninstall(plain)
    graph_modules.give_back(plain)
    for _, view in list(views(plain)):
        release(view)
    for module in list(plain.modules()):
        reclaim(module)
        activation.forget(module)
        unmark(module)
        vars(module).pop(DECIDED, None)
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
            kinds are for one class; there is no such policy; or `memory_budget` is not above 0, is
            a fraction above 1, or is given without example inputs.
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
        found, sightings = _find(model, calls, kinds)
        found = decide(model, noted(model, found, again=False), sightings, policy)
        if limit is not None:
            found = _fit(model, calls[0], found, sightings, kinds, limit)
        if calls:
            counts = _count(model, calls[0], found, sightings, kinds)
        else:
            counts = _uncounted(model, found, sightings, kinds)
        groups = tuple(
            _group(candidate, counts)
            for candidate in in_order(counts.groups(found), model, sightings)
        )
    launches = Launches(counts.plain.count, counts.optimized.count)
    peaks = Memory(counts.plain.peak, counts.optimized.peak)
    return Report(groups, launches, sightings.untraced, bool(calls), peaks)


def _report_program(program: ExportedProgram, calls: list[Call], kinds: tuple[Kind, ...]) -> Report:
    """What is, or would be, merged in a program, with the launches of the program itself."""
    plain = programs.unfuse(program) if programs.is_current(program) else program
    fused = programs.optimize(plain, kinds)
    if not calls and plain.example_inputs:
        calls = [plain.example_inputs]
    inputs, kwargs = calls[0] if calls else (None, None)
    module = lift(plain.module(check_guards=False))
    found = report(module, inputs, example_kwargs=kwargs, policy="always")
    merged = programs.merged_layers(fused)
    groups = tuple(each for group in found.groups for each in _in_program(group, merged))
    if not calls:
        return dataclasses.replace(found, groups=groups)
    before, after = (_launches(each, calls[0]) for each in (plain, fused))
    return dataclasses.replace(found, groups=groups, launches=Launches(before, after))


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


def _launches(program: ExportedProgram, call: Call) -> Count:
    """The launches of a call of a program."""
    module = program.module(check_guards=False)
    with contextlib.suppress(UncopyableError):
        try:
            return Copy(module, fake=True).count(call, {}).count
        except Exception:  # noqa: BLE001 - As in `observe`: whatever fake tensors do not carry, the real run decides.
            return Copy(module, fake=False).count(call, {}).count
    return UNCOUNTED.count


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
    if budget is None:
        return None
    check_model(model)
    if not calls:
        raise ValueError(
            "memory_budget was given and example_inputs were not, which tell how large the model's "
            "tensors are. Pass example_inputs, the model's arguments as a tuple."
        )
    return memory.limit(budget, model)


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


def _merge(
    model: nn.Module,
    found: Sequence[Candidate],
    sightings: Sightings,
    kinds: tuple[Kind, ...],
    depths: Depths | None = None,
) -> tuple[Merger, tuple[Candidate, ...]]:
    """Merges what was found, and what the rewritten forwards can run at once beyond that.

    Returns:
        The merger, and what became of what was found.
    """
    merger = Merger(model, kinds, sightings, found)
    if depths is not None:
        merger.rewritten = depths.watch
    if merger.merge_all(found):
        regions.uninstall(model)  # They may know wide layers that are no more.
    called = graph_modules.rewrite_all(model, merger)
    while True:
        regions.install(model, sightings.calls, {MERGER: merger})
        running = regions.covered(model) | called
        merger.give_back(running)
        settled = leave_apart(model, found, running)
        if settled == tuple(found):
            return merger, settled
        merger.leave(settled)
        found = settled
        regions.uninstall(model)  # They know views that are none any more.


@dataclasses.dataclass(frozen=True)
class _Depth:
    """What is behind the siblings of a group.

    Attributes:
        chains: the chains of its branches.
        levels: the layers behind them that are merged, by level.
        launches: those of the chains before and after, but for layers.
    """

    chains: tuple[Chain, ...]
    levels: tuple[tuple[str, ...], ...]
    launches: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class _Counts:
    """The launches of a call of a model, plain and optimized.

    Attributes:
        plain: those of the plain model, also by layer.
        optimized: those of the optimized model, also by wide layer, by the least name of a layer.
        apart: those of layers whose wide layer did not run, without rewritten forwards.
        levels: what was merged beyond what was found at first, or runs in a rewritten forward.
        refused: products that read one tensor and stay as they are.
        found: what became of what was found; None where nothing was merged.
        depths: what is behind groups, by their layers.
    """

    plain: Counted = UNCOUNTED
    optimized: Counted = UNCOUNTED
    apart: Counted = UNCOUNTED
    levels: tuple[Level, ...] = ()
    depths: Mapping[frozenset[str], _Depth] = dataclasses.field(default_factory=dict)
    refused: tuple[Candidate, ...] = ()
    found: tuple[Candidate, ...] | None = None

    def groups(self, found: Sequence[Candidate]) -> Iterator[Candidate]:
        """What was found, and what was merged beyond, but for what is behind another group."""
        found = found if self.found is None else self.found
        known = {frozenset(names) for depth in self.depths.values() for names in depth.levels}
        levels = [Candidate(level.kind, level.layers, level.widths) for level in self.levels]
        told: set[str] = set()
        for candidate in (*found, *levels):
            told |= {*candidate.layers}
            if frozenset(candidate.layers) not in known:
                known.add(frozenset(candidate.layers))
                yield candidate
        # What one graph refuses another one may merge, or refuse for some other reason.
        for candidate in self.refused:
            if told.isdisjoint(candidate.layers):
                told |= {*candidate.layers}
                yield candidate

    def chains(self, layers: tuple[str, ...]) -> tuple[Chain, ...]:
        """The chains of a group's branches."""
        depth = self.depths.get(frozenset(layers))
        return () if depth is None else depth.chains

    def of(self, layers: tuple[str, ...]) -> tuple[int, int] | None:
        """The launches of a group before and after, with all that is behind it."""
        if self.plain.by_layer is None or self.optimized.by_layer is None:
            return None
        depth = self.depths.get(frozenset(layers))
        if depth is None:
            return self._within(layers)
        each = [depth.launches, *map(self._within, (layers, *depth.levels))]
        return sum(before for before, _ in each), sum(after for _, after in each)

    def _within(self, layers: tuple[str, ...]) -> tuple[int, int]:
        """The launches within layers before and after."""
        plain, optimized = self.plain.by_layer or {}, self.optimized.by_layer or {}
        before = sum(plain.get(name, 0) for name in layers)
        after = optimized.get(min(layers), 0)
        if not after:  # They were called one by one, or left apart.
            apart = self.apart.by_layer or {}
            after = sum(apart.get(name, plain.get(name, 0)) for name in layers)
        return before, after


def _fit(
    model: nn.Module,
    call: Call,
    found: tuple[Candidate, ...],
    sightings: Sightings,
    kinds: tuple[Kind, ...],
    limit: int,
) -> tuple[Candidate, ...]:
    """The groups with which a call stays within a limit of memory, predicted on copies."""

    def fitted(copied: Callable[[], Copy]) -> tuple[Candidate, ...]:
        def peak(groups: Sequence[Candidate]) -> int:
            merged = copied()
            _merge(merged.model, groups, sightings, kinds)
            return merged.count(call, {}).peak or 0

        plain = copied()
        unfuse(plain.model, inplace=True)
        merged = frozenset(name for name, _ in views(model))
        with undisturbed(plain.model):
            return fit(found, sightings, peak, plain.count(call, {}).peak or 0, limit, merged)

    settled = _on_copies(model, fitted)
    if settled is None:
        raise ValueError(
            "memory_budget was given, and how much memory the model needs is predicted on copies "
            "of it, which cannot be made. Leave memory_budget out."
        )
    return settled


Result = TypeVar("Result")


def _on_copies(model: nn.Module, work: Callable[[Callable[[], Copy]], Result]) -> Result | None:
    """What comes of work on copies of a model, fake ones if they carry it; None without copies."""
    with contextlib.suppress(UncopyableError):
        try:
            return work(functools.partial(Copy, model, fake=True))
        except Exception:  # noqa: BLE001 - As in `observe`: whatever fake tensors do not carry, the real run decides.
            return work(functools.partial(Copy, model, fake=False))
    return None


def _count(
    model: nn.Module,
    call: Call,
    found: Sequence[Candidate],
    sightings: Sightings,
    kinds: tuple[Kind, ...],
) -> _Counts:
    """The launches of a call of the model, plain and optimized."""
    counted = _on_copies(model, lambda copied: _count_on(copied, call, found, sightings, kinds))
    return counted or _Counts()


def _uncounted(
    model: nn.Module, found: Sequence[Candidate], sightings: Sightings, kinds: tuple[Kind, ...]
) -> _Counts:
    """What becomes of products with raw Parameters, which are found where a forward is traced."""
    if any(True for _ in raw_parameters(model)):
        with contextlib.suppress(UncopyableError), undisturbed(model):
            merger, _ = _merge(Copy(model, fake=False).model, found, sightings, kinds)
            levels = tuple(level for level in merger.levels if level.kind in PRODUCTS)
            return _Counts(levels=levels, refused=tuple(merger.refused.values()))
    return _Counts()


def _count_on(
    copied: Callable[[], Copy],
    call: Call,
    found: Sequence[Candidate],
    sightings: Sightings,
    kinds: tuple[Kind, ...],
) -> _Counts:
    """The launches, counted on copies of the model."""
    plain, optimized = copied(), copied()
    unfuse(plain.model, inplace=True)
    depths = Depths(optimized.model)
    merger, found = _merge(optimized.model, found, sightings, kinds, depths)
    levels = _levels(optimized.model)
    groups = [candidate.layers for candidate in (*found, *merger.refused.values())]
    groups += [level.layers for level in levels.values()]
    names = {name for layers in groups for name in layers}
    with undisturbed(plain.model):
        depths.noting = True
        optimized.count(call, {})
        depths.noting = False
        fused = optimized.count(call, {min(level.layers): wide for wide, level in levels.items()})
        launched = fused.by_layer or {}
        idle = [level.layers for level in levels.values() if not launched.get(min(level.layers))]
        return _Counts(
            plain.count(call, _named(plain.model, names), _products(plain.model, names)),
            fused,
            _count_apart(copied(), call, found, sightings, kinds, idle) if idle else UNCOUNTED,
            (*merger.levels, *map(levels.__getitem__, depths.roots)),
            _depths(depths, optimized.model),
            tuple(merger.refused.values()),
            tuple(found),
        )


def _count_apart(
    apart: Copy,
    call: Call,
    found: Sequence[Candidate],
    sightings: Sightings,
    kinds: tuple[Kind, ...],
    groups: Sequence[tuple[str, ...]],
) -> Counted:
    """The launches where no forward is rewritten, within the layers of groups."""
    Merger(apart.model, kinds, sightings, found).merge_all(found)
    names = {name for layers in groups for name in layers}
    counted = apart.count(call, _named(apart.model, names), _products(apart.model, names))
    return Counted(counted.count, {**dict.fromkeys(names, 0), **(counted.by_layer or {})})


def _named(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """The layers of these names, but for products that are none in this model."""
    return {name: module for name, module in model.named_modules() if name in names}


def _products(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    """The weights of products, by the names of their layers."""
    raw = (name for name in names if name.endswith(SUFFIX))
    return {name: model.get_parameter(name.removesuffix(SUFFIX)) for name in raw}


def _levels(model: nn.Module) -> dict[Wide, Level]:
    """What is merged in a model, by wide layer."""
    return {
        wide: Level(wide.kind, tuple(name for name, _ in members), tuple(wide.widths))
        for wide, members in wides(model).items()
    }


def _depths(depths: Depths, model: nn.Module) -> dict[frozenset[str], _Depth]:
    """What is behind each group of a model."""
    names = {wide: level.layers for wide, level in _levels(model).items()}
    found: dict[frozenset[str], _Depth] = {}
    for root in dict.fromkeys(depths.roots.values()):
        behind = [names[wide] for wide, at in depths.roots.items() if at is root is not wide]
        launches = depths.before[root], depths.after[root]
        chains = depths.chains.get(root, ())
        found[frozenset(names[root])] = _Depth(chains, tuple(behind), launches)
    return found


def _group(candidate: Candidate, counts: _Counts) -> Group:
    refusal = candidate.refusal
    return Group(
        kind=candidate.kind.name,
        layers=tuple(name.removesuffix(SUFFIX) for name in candidate.layers),
        fused=refusal is None,
        reason=None if refusal is None else refusal.reason,
        detail=candidate.note if refusal is None else refusal.detail.replace(SUFFIX, ""),
        widths=candidate.widths,
        launches=counts.of(candidate.layers),
        depth=counts.chains(candidate.layers),
        figures=candidate.figures,
    )
