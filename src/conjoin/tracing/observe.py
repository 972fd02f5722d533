"""Finds siblings by a run on example inputs: which layers receive the very same tensor object?

The model's example inputs are run once in training and once in evaluation mode, on a copy whose
tensors are fake: no arithmetic, no memory, and no trace on the model, its buffers, modes and
random streams. Where fake tensors do not carry the model (it branches on values, say), a real
copy runs instead.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import FunctionType

from torch import nn

from conjoin.foreign import quote
from conjoin.graph.site import Sightings, Untraced
from conjoin.layers import Kind
from conjoin.reachable import functions_of, words
from conjoin.tracing.copies import SEED, Call, Copy
from conjoin.tracing.modes import start_streams
from conjoin.tracing.undisturbed import undisturbed
from conjoin.tracing.watch import Watch

TUPLE = "Pass a tuple of the arguments that the model is called with, as model(*example_inputs)."
"""What to do where a model does not run."""


def observe(model: nn.Module, calls: Sequence[Call], kinds: tuple[Kind, ...]) -> Sightings:
    """What a run of the model on each of `calls` shows.

    Args:
        model: the model; it stays as it is.
        calls: the arguments of each run.
        kinds: the kinds of layer to look for.

    Returns:
        The sites, the stride-sensitive layers, and the modes in which the model did not run.

    Raises:
        ValueError: the model does not run on the arguments in any mode.
    """
    with undisturbed(model, calls):
        try:
            return _observe(Copy(model, fake=True), calls, kinds)
        except Exception:  # noqa: BLE001 - Whatever fake tensors do not carry, the real run decides.
            return _observe(Copy(model, fake=False), calls, kinds)


def _observe(copied: Copy, calls: Sequence[Call], kinds: tuple[Kind, ...]) -> Sightings:
    start_streams(SEED)  # So that what is found does not depend on what was drawn before.
    watch = Watch(copied.model, kinds)
    failures: dict[str, Exception] = {}
    ran = False
    for mode in _modes_of(copied.model):
        copied.model.train(mode)
        for number, call in enumerate(calls):
            try:
                with watch.running((mode, number)), watch:
                    watch.claim(copied.run(call))
                ran = True
            except Exception as error:  # The model's own code, which may raise anything.
                if copied.fake:
                    raise
                failures["training" if mode else "evaluation"] = error
                watch.discard((mode, number))
    if not ran:
        failure = next(iter(failures.values()))
        raise ValueError(unfit(failure)) from failure
    untraced = tuple(
        Untraced("", f"does not run in {mode} mode: {quote(error)}")
        for mode, error in failures.items()
    )
    return Sightings(
        tuple(watch.sites),
        watch.strided,
        untraced,
        watch.listings.found,
        frozenset(watch.changed),
        watch.calls,
        shapes=watch.shapes,
    )


def _modes_of(model: nn.Module) -> tuple[bool, ...]:
    """Training and evaluation mode, or only the present one where no code asks for the mode."""
    functions = itertools.chain(_layers_functions(model), functions_of(model))
    asks = any("training" in words(function.__code__) for function in functions)
    return (True, False) if asks else (model.training,)


def _layers_functions(model: nn.Module) -> Iterator[FunctionType]:
    """The functions of the classes of the model's modules, PyTorch's own among them."""
    for cls in {type(module) for module in model.modules()}:
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            yield from (value for value in vars(base).values() if type(value) is FunctionType)


def unfit(error: Exception) -> str:
    """What to say of example inputs on which the model raises `error`."""
    return (
        f"the model does not run on the example inputs: {quote(error).removesuffix('.')}. {TUPLE}"
    )
