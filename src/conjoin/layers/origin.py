"""What a tensor was computed from, so that equal computations from one tensor are known as such.

Siblings may be hidden behind equal operations f without parameters, as the projections of a
U-Net's time embedding t are: z_i = W_i f(t), where every block computes an f(t) of its own. An
activation that stands before such a sibling notes that its output is f of t in this version. As
long as neither has changed, that says what the output's values are, whichever object it is.

Tensors are referred to weakly, and the notes are kept per thread.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Step = tuple[Callable[..., Tensor], tuple[tuple[str, Any], ...]]
"""A pure function of one tensor, and its settings by name."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Source:
    """A tensor, in one version, and the steps that lead from it to the output."""

    tensor: weakref.ref[Tensor]
    version: int
    steps: tuple[Step, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _Origin:
    """Where a tensor comes from; the sources are those before it, the nearest first."""

    output: weakref.ref[Tensor]
    version: int
    modes: tuple[object, ...]
    sources: tuple[_Source, ...]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.origins: dict[int, _Origin] = {}


_thread = _Thread()


def note(step: Step, input: Tensor, output: Tensor) -> None:
    """Notes that `output`, a new tensor, is what `step` makes of `input`."""
    modes = modes_for(input)
    known = _find(input)
    earlier = known.sources if known is not None and known.modes == modes else ()
    sources = (
        _Source(weakref.ref(input), input._version, (step,)),
        *(_Source(s.tensor, s.version, (*s.steps, step)) for s in earlier),
    )
    key = id(output)
    _thread.origins[key] = _Origin(_watch(output, key), output._version, modes, sources)


def resolve(input: Tensor) -> tuple[Tensor, tuple[Step, ...]] | None:
    """The farthest tensor that `input` is known to be computed from, and the steps in between.

    Returns:
        None where nothing is known, or where running the steps now might be another thing. The
        steps then lead from the tensor as it is now to the values that `input` has now.
    """
    origin = _find(input)
    if origin is None or origin.modes != modes_for(input):
        return None
    found: tuple[Tensor, tuple[Step, ...]] | None = None
    for source in origin.sources:
        tensor = source.tensor()
        if tensor is None:
            continue
        if tensor._version == source.version and _leads_to(tensor, input):
            found = tensor, source.steps
        if is_watched(tensor):
            break  # It is no mere step on the way from a tensor before it.
    return found


def _leads_to(tensor: Tensor, input: Tensor) -> bool:
    """Whether steps from `tensor` lead to a gradient where those to `input` did."""
    if not tensor.requires_grad:
        return not input.requires_grad  # It may have been detached since.
    return not tensor.is_leaf  # A leaf is held by every graph that is built on it.


def modes_for(tensor: Tensor) -> tuple[object, ...]:
    """The modes on which the result of an operation on `tensor` may depend."""
    device = tensor.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast and torch.get_autocast_dtype(device),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )


def _find(tensor: Tensor) -> _Origin | None:
    """Where a tensor comes from, if it has not changed and nobody wants a gradient of it alone."""
    origin = _thread.origins.get(id(tensor))
    if origin is None or origin.output() is not tensor or origin.version != tensor._version:
        return None
    return None if is_watched(tensor) else origin


def is_watched(tensor: Tensor) -> bool:
    """Whether somebody is told of the tensor's gradient, which equal tensors do not share."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


def _watch(output: Tensor, key: int) -> weakref.ref[Tensor]:
    origins = _thread.origins  # The output may die on another thread, whose notes are others.

    def forget(reference: weakref.ref[Tensor]) -> None:
        origin = origins.get(key)
        if origin is not None and origin.output is reference:
            del origins[key]

    return weakref.ref(output, forget)
