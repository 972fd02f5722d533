"""Runs one model from fixed seeds, each call with its backward pass."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from conjoin.tracing.copies import Call
from conjoin.tracing.keeping import KeepingTensors, own_tensors
from conjoin.tracing.modes import start_streams, unrounded
from conjoin.tracing.undisturbed import undisturbed
from conjoin.verifying import outcome
from conjoin.verifying.copying import arguments, exact, prepared
from conjoin.verifying.outcome import Pieces, tensors_in
from conjoin.verifying.settings import Setting
from conjoin.verifying.unlike import tolerance_of

SEED = 20
"""Where the random streams start, so that both models draw the same numbers."""

Left = tuple[Pieces, "Exception | None"]
"""What a call leaves behind, and what it raised."""


def run(
    model: nn.Module,
    calls: Sequence[Call],
    setting: Setting,
    convert: bool,
    watch: contextlib.AbstractContextManager[object],
) -> list[Left]:
    """The calls, one after another, of a copy of the model."""
    # What the code keeps in globals and on classes is put back, so that both find the same there.
    with undisturbed(model), unrounded():
        copied = prepared(model, setting, convert)
        if convert:  # What the code makes without naming a dtype goes with its weights.
            torch.set_default_dtype(exact(torch.get_default_dtype()))
        inputs = [arguments(call, setting, convert) for call in calls]
        run = contextvars.copy_context().run
        with KeepingTensors(own_tensors(copied)):
            return [
                run(_play, copied, call, leaves, setting.gradients, SEED + number, watch)
                for number, (call, leaves) in enumerate(inputs)
            ]


def _play(
    model: nn.Module,
    call: Call,
    leaves: Mapping[str, Tensor],
    gradients: bool,
    seed: int,
    watch: contextlib.AbstractContextManager[object],
) -> Left:
    """One call and, with `gradients`, its backward pass."""
    for parameter in model.parameters():
        parameter.grad = None
    args, kwargs = call
    start_streams(seed)
    with torch.set_grad_enabled(gradients), watch:
        output, failure = attempt(lambda: model(*args, **kwargs))
        grad_mode = outcome.piece_of(torch.is_grad_enabled())
    left: Pieces = {("error", "the forward pass"): outcome.raised(failure, message=True)}
    if failure is None:
        left |= outcome.described("output", "output", output)
    for given in (args, kwargs):
        left |= outcome.described("input", "input", given)
    if failure is None and gradients:
        with watch:
            _, failure = attempt(lambda: backward(output))
        # Its message may name operations of the graph, and those of a wide layer are others.
        left["error", "the backward pass"] = outcome.raised(failure, message=False)
        if failure is None:
            left |= outcome.gradients(model, leaves)
    left |= outcome.state(model) | outcome.streams()
    left["mode", "the grad mode afterwards"] = grad_mode
    return left, failure


def attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    """What a call gives, and what it raises."""
    try:
        return call(), None
    except Exception as error:  # noqa: BLE001 - A model's own code, which may raise anything.
        return None, error


def backward(output: object) -> None:
    """The backward pass from all outputs that train, with gradients that are random but fixed."""
    generator = torch.Generator().manual_seed(SEED)
    roots = [t for t in tensors_in(output) if t.requires_grad]
    roots = [t if t.layout is torch.strided else t.to_dense() for t in roots]
    gradients = [
        torch.randn(t.shape, generator=generator, dtype=exact(t.dtype)).to(t) for t in roots
    ]
    if roots:
        torch.autograd.backward(roots, gradients)


class LeastPrecise(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the least precise dtype in which something is computed."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = torch.float64

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.dtype = max(self.dtype, leaf.dtype, key=tolerance_of)
        return result
