"""`verify`: are two models the same function?

Copies of both are converted to float64, where rounding cannot be taken for a difference, and run
side by side from the same seeds in every setting of `SETTINGS`. After each call and its backward
pass, all that it left behind is compared, in this order:

    what it raised, outputs, inputs, gradients, parameters, buffers, attributes, random streams
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from conjoin.checking import check_model, example_calls
from conjoin.tracing.copies import Call
from conjoin.tracing.observe import unfit
from conjoin.tracing.undisturbed import undisturbed
from conjoin.verifying.comparison import Comparison, compare
from conjoin.verifying.programs import compare_programs
from conjoin.verifying.unlike import unlike_weights
from conjoin.verifying.verification import Difference, Verification


def verify(
    original: nn.Module | ExportedProgram,
    optimized: nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] | list[tuple[Any, ...]] | None = None,
    *,
    example_kwargs: dict[str, Any] | None = None,
) -> Verification:
    """Runs two models side by side, and tells the first difference.

    Copies of both run in float64, in training and in evaluation mode, with and without gradients,
    from the same seeds. Compared are the outputs (types, shapes, dtypes, `requires_grad`, values),
    errors, what the inputs are afterwards, the gradients of the inputs and of every parameter under
    its original name, parameters, buffers, plain attributes and the random streams. The models, the
    inputs and the random streams stay as they are. Models that do not run in float64 run as they
    are, and the tolerance is that of their own dtype.

    A gradient of zeros where the original has none is no difference for a parameter that is part of
    a wide layer, since one wide weight has one gradient.

    Two exported programs run once, in the mode and the types that are written in their graphs, on
    each of the calls by itself.

    Args:
        original: the model as it was, or an exported program.
        optimized: the model that should be the same function, such as `optimize(original, ...)`.
        example_inputs: the positional arguments of a call, or a list of such tuples. Several calls
            run one after another, so that buffers carry on. For exported programs by default those
            that the original was exported with.
        example_kwargs: the keyword arguments that go with them.

    Returns:
        The verification: true where the models are equal.

    Raises:
        TypeError: one of the models is no module, or one only is an exported program, or
            `example_inputs` is no tuple or list of tuples, or `example_kwargs` no dict of names.
        ValueError: there is no example input, a model or input cannot be copied or is on the meta
            device, or the models do not run on the example inputs in any mode.

    Example:
        >>> import torch, conjoin
        >>> model = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> x = torch.randn(4, 8)
        >>> result = conjoin.verify(model, conjoin.optimize(model, (x,)), (x,))
        >>> bool(result), result.outputs, result.gradients
        (True, 2, 5)
    """
    calls = example_calls(example_inputs, example_kwargs)
    if isinstance(original, ExportedProgram) and isinstance(optimized, ExportedProgram):
        calls = calls or [original.example_inputs or ((), {})]
        return _result(compare_programs(original, optimized, calls), calls)
    if isinstance(original, ExportedProgram) or isinstance(optimized, ExportedProgram):
        raise TypeError(
            "an exported program is compared with another one: export the other model too."
        )
    check_model(original)
    check_model(optimized)
    _check_calls(calls)
    if any(_all_on_meta(model) for model in (original, optimized)):
        raise ValueError(
            "a model on the meta device has no values to compare: load its weights first, with "
            "to_empty and load_state_dict."
        )
    with undisturbed(original), undisturbed(optimized):
        unlike = unlike_weights(optimized, original)
        if unlike is not None:
            what = "the two models hold different weights"
            return Verification(Difference("", 0, what, " ".join(unlike)), len(calls))
        with torch.inference_mode(False), torch.enable_grad():
            found = compare(original, optimized, calls, convert=True)
            if found.raised:
                plain = compare(original, optimized, calls, convert=False)
                found = plain if found.raised - plain.raised else found
    return _result(found, calls)


def _result(found: Comparison, calls: Sequence[Call]) -> Verification:
    if found.failure is not None and len(found.raised) == found.ran and found.difference is None:
        raise ValueError(unfit(found.failure)) from found.failure
    return found.result(len(calls))


def _check_calls(calls: Sequence[Call]) -> None:
    if not calls:
        raise ValueError(
            "there is nothing to run the models on: pass a tuple of the arguments that the model "
            "is called with as example_inputs."
        )


def _all_on_meta(model: nn.Module) -> bool:
    parameters = list(model.parameters())
    return bool(parameters) and all(parameter.is_meta for parameter in parameters)
