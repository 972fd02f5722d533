"""optimize, unfuse, report: the whole story on one page."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from conjoin.graph.siblings import Candidate, candidates
from conjoin.graph.site import Sightings, Untraced
from conjoin.launches import UNCOUNTED, Counted, Launches
from conjoin.layers import KINDS
from conjoin.layers.wide import ENCLOSES, View, fuse, release, views
from conjoin.report import Group, Report
from conjoin.tracing import regions
from conjoin.tracing.observe import Call, Copy, UncopyableError, observe
from conjoin.tracing.symbolic import trace
from conjoin.tracing.undisturbed import undisturbed

Model = TypeVar("Model", bound=nn.Module)


def optimize(
    model: Model,
    example_inputs: tuple[Any, ...] | list[tuple[Any, ...]] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
    inplace: bool = False,
) -> Model:
    """Merges sibling layers, those that read the same tensor, into wide layers.

    Call it before the optimizer is built: the wide layers own the parameters from here on. The
    model keeps its class, methods, attributes, module names and `state_dict` keys.

    Args:
        model: the model; with its weights already loaded, or to be loaded later.
        example_inputs: the positional arguments of a call, as in `torch.export.export`, or a list
            of such tuples. With them, siblings are found by observing the model run on fake
            tensors; without, by symbolic tracing, which cannot look into all Python code.
        example_kwargs: the keyword arguments that go with them.
        inplace: change `model` itself. The extra memory is then that of the largest group at most.

    Returns:
        The optimized model: `model` itself with `inplace`, otherwise a copy.

    Raises:
        TypeError: `model` is no module, or `example_inputs` is no tuple or list of tuples.
        ValueError: the model cannot be copied, or does not run on the example inputs.

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
    with _no_collection():
        found, sightings = _find(model, example_calls(example_inputs, example_kwargs))
        optimized = model if inplace else _copy(model)
        if _fuse_all(optimized, found):
            regions.uninstall(optimized)  # They may know wide layers that are no more.
        regions.install(optimized, sightings.calls)
    return optimized


def unfuse(model: Model, *, inplace: bool = False) -> Model:
    """Gives the original layers back, with the values that the wide layers have now.

    Args:
        model: an optimized model, or any other, which stays as it is.
        inplace: change `model` itself.

    Returns:
        The model with layers, classes and names as they were before `optimize`.

    Raises:
        TypeError: `model` is no module.
        ValueError: the model cannot be copied.
    """
    check_model(model)
    plain = model if inplace else _copy(model)
    regions.uninstall(plain)
    for _, view in list(views(plain)):
        release(view)
    for module in plain.modules():
        vars(module).pop(ENCLOSES, None)
    return plain


def report(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | list[tuple[Any, ...]] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
) -> Report:
    """Tells which siblings are, or would be, merged, which are not and why, and what that saves.

    It changes nothing: on a model that was not optimized it is a dry run.

    Args:
        model: the model, optimized or not.
        example_inputs: as for `optimize`. With them, launches are counted, on fake tensors and in
            the mode (training or evaluation) that the model is in; of several calls, the first is.
        example_kwargs: the keyword arguments that go with them.

    Returns:
        The report; `str()` of it is a table.

    Raises:
        TypeError: `model` is no module, or `example_inputs` is no tuple or list of tuples.
        ValueError: the model cannot be copied, or does not run on the example inputs.
    """
    calls = example_calls(example_inputs, example_kwargs)
    found, sightings = _find(model, calls)
    before, after = _count(model, calls[0], found) if calls else (UNCOUNTED, UNCOUNTED)
    groups = tuple(_group(candidate, before.by_layer, after.by_layer) for candidate in found)
    return Report(groups, Launches(before.count, after.count), sightings.untraced, bool(calls))


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


def _copy(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"the model cannot be copied ({error}). Pass inplace=True to change it itself."
        ) from error


def _find(model: nn.Module, calls: list[Call]) -> tuple[tuple[Candidate, ...], Sightings]:
    check_model(model)
    # A lazy layer does not run on fake tensors; a trace shows which siblings it would have.
    lazy = any(nn.parameter.is_lazy(parameter) for parameter in model.parameters())
    try:
        sightings = observe(model, calls, KINDS) if calls and not lazy else trace(model, KINDS)
    except UncopyableError as error:
        untraced = Untraced("", f"it was traced and not run, since it cannot be copied: {error}")
        sightings = trace(model, KINDS)
        sightings = dataclasses.replace(sightings, untraced=(untraced, *sightings.untraced))
    return candidates(model, sightings, KINDS), sightings


def _fuse_all(model: nn.Module, found: Sequence[Candidate]) -> bool:
    """Merges the candidates that may be merged and are not yet; whether there were any."""
    changed = False
    modules = dict(model.named_modules())
    order = {name: position for position, name in enumerate(modules)}
    for candidate in found:
        if candidate.refusal is not None:
            continue
        leader = min(
            range(len(candidate.layers)), key=[order[n] for n in candidate.layers].__getitem__
        )
        layers = [modules[name] for name in candidate.layers]
        fused = [layer for layer in layers if isinstance(layer, View)]
        if len(fused) == len(layers) and len({view.wide_layer for view in fused}) == 1:
            continue
        for view in fused:
            release(view)
        enclosing = model.get_submodule(_common(candidate.layers))
        fuse(candidate.kind, layers, enclosing, candidate.contiguous, leader)
        changed = True
    return changed


def _common(names: Sequence[str]) -> str:
    """The name of the smallest module that holds the modules of these names."""
    paths = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in shared)


def _count(model: nn.Module, call: Call, found: Sequence[Candidate]) -> tuple[Counted, Counted]:
    """The launches of a call of the model, plain and optimized."""
    with contextlib.suppress(UncopyableError):
        return _counted(model, call, found)
    return UNCOUNTED, UNCOUNTED


def _counted(model: nn.Module, call: Call, found: Sequence[Candidate]) -> tuple[Counted, Counted]:
    try:
        return _count_on(Copy(model, fake=True), Copy(model, fake=True), call, found)
    except Exception:  # noqa: BLE001 - As in `observe`: whatever fake tensors do not carry, the real run decides.
        return _count_on(Copy(model, fake=False), Copy(model, fake=False), call, found)


def _count_on(
    plain: Copy, optimized: Copy, call: Call, found: Sequence[Candidate]
) -> tuple[Counted, Counted]:
    unfuse(plain.model, inplace=True)
    _fuse_all(optimized.model, found)
    names = [name for candidate in found for name in candidate.layers]
    with undisturbed(plain.model):
        return plain.count(call, names), optimized.count(call, names)


def _group(
    candidate: Candidate, before: Mapping[str, int] | None, after: Mapping[str, int] | None
) -> Group:
    launches = None
    if before is not None and after is not None:
        launches = (
            sum(before.get(name, 0) for name in candidate.layers),
            sum(after.get(name, 0) for name in candidate.layers),
        )
    refusal = candidate.refusal
    return Group(
        kind=candidate.kind.name,
        layers=candidate.layers,
        fused=refusal is None,
        reason=None if refusal is None else refusal.reason,
        detail="" if refusal is None else refusal.detail,
        widths=candidate.widths,
        launches=launches,
    )
