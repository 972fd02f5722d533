"""Notes what a tensor was computed from, so that equal computations are known as such.

Siblings may be hidden behind equal operations f without parameters, as the projections of a
U-Net's time embedding t are: z_i = W_i f(t), where every block computes an f(t) of its own. An
activation that stands before such a sibling notes that its output is f of t in this version. As
long as neither has changed, that says what the output's values are, whichever object it is.

Tensors are referred to weakly, and the notes are kept per thread. What a mode may do to an
activation shows in its output: autocast in the dtype, `no_grad` in `requires_grad`.
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


LIMIT = 256
"""How many notes there may be before those on tensors that are no more are looked for."""


@dataclasses.dataclass(slots=True)
class _Origin:
    """Where a tensor, the output, comes from: a step from a source in one version of it.

    Attributes:
        before: where the source comes from.
        modes: how many modes that may change operations were on.
    """

    output: weakref.ref[Tensor]
    version: int
    step: Step
    source: weakref.ref[Tensor]
    source_version: int
    before: _Origin | None
    modes: tuple[int, int]


class _Thread(threading.local):
    def __init__(self) -> None:
        self.origins: dict[int, _Origin] = {}
        self.limit = LIMIT

    def clear(self) -> None:
        """Drops the notes on tensors that are no more; quicker than to watch every one die."""
        self.origins = {k: o for k, o in self.origins.items() if o.output() is not None}
        self.limit = max(LIMIT, 2 * len(self.origins))


_thread = _Thread()


def note(step: Step, input: Tensor, output: Tensor) -> None:
    """Notes that `output`, a new tensor, is what `step` makes of `input`."""
    thread = _thread
    thread.origins[id(output)] = _Origin(
        weakref.ref(output),
        output._version,
        step,
        weakref.ref(input),
        input._version,
        _find(input),
        _modes(),
    )
    if len(thread.origins) > thread.limit:
        thread.clear()


def resolve(input: Tensor) -> tuple[Tensor, tuple[Step, ...]] | None:
    """The farthest tensor that `input` is known to be computed from, and the steps in between.

    Returns:
        None where nothing is known. The steps lead from the tensor as it is now to the values
        that `input` has now.
    """
    found: tuple[Tensor, tuple[Step, ...]] | None = None
    steps: tuple[Step, ...] = ()
    origin, modes = _find(input), _modes()
    while origin is not None and origin.modes == modes:
        steps = (origin.step, *steps)
        source = origin.source()
        if source is not None:
            if source._version == origin.source_version and _leads_to(source, input):
                found = source, steps
            if is_watched(source):
                break  # It is no mere step on the way from a tensor before it.
        origin = origin.before
    return found


def _leads_to(tensor: Tensor, input: Tensor) -> bool:
    """Whether steps from `tensor` lead to a gradient where those to `input` did."""
    if not tensor.requires_grad:
        return not input.requires_grad  # It may have been detached since.
    return not tensor.is_leaf  # A leaf is held by every graph that is built on it.


def _modes() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def _find(tensor: Tensor) -> _Origin | None:
    """Where a tensor comes from, if it has not changed and nobody wants a gradient of it alone."""
    origin = _thread.origins.get(id(tensor))
    if origin is None or origin.output() is not tensor or origin.version != tensor._version:
        return None
    return None if is_watched(tensor) else origin


def is_watched(tensor: Tensor) -> bool:
    """Whether somebody is told of the tensor's gradient, which equal tensors do not share."""
    return bool(tensor._backward_hooks) or tensor.retains_grad
