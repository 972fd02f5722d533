"""Measures one case in one mode: every peer, in turn."""

from __future__ import annotations

import copy
import dataclasses
import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import kernels
from benchmarks.cases import Case, Outputs, listed, loss_of
from benchmarks.peers import Peer, UnavailableError
from benchmarks.timing import compare
from conjoin.launches import count_step

TOLERANCE = 1e-3
"""How far outputs may be apart, relative to the largest, and the norm of the gradients, before
a peer is called wrong."""

ROUNDED = 1e-2
"""The same on a GPU, where convolutions round to ten binary digits what they multiply."""


def measure(
    case: Case, mode: str, peers: Iterable[Peer], device: str, seconds: float
) -> dict[str, Any]:
    """What came out, as it is kept in JSON.

    Args:
        case: the case.
        mode: `"inference"` or `"training"`.
        peers: the peers, the plain model first.
        device: the device to run on.
        seconds: how long to time, beside what it takes to make and to compile.
    """
    torch.compiler.reset()
    gc.collect()  # What was measured before is not to count among the regions of a class.
    inputs = tuple(x.to(device) for x in case.inputs())
    plain = case.model().to(device).train(mode == "training")
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    with torch.set_grad_enabled(mode == "training"):
        _, expected = _run(copy.deepcopy(plain), mode, inputs)
        for peer in peers:
            try:
                ready = _ready(peer, case, mode, plain, inputs, expected)
                steps[peer.name], found[peer.name] = ready
            except UnavailableError as error:
                found[peer.name] = {"unavailable": str(error)}
        times, rounds, count = compare(steps, seconds, device)
    for name, each in times.items():
        found[name] |= dataclasses.asdict(each)
    return {
        "case": case.name,
        "about": case.about,
        "mode": mode,
        "rounds": rounds,
        "steps": count,
        "peers": found,
    }


def _ready(
    peer: Peer, case: Case, mode: str, plain: nn.Module, inputs: tuple[Tensor, ...], expected: Done
) -> tuple[Callable[[], object], dict[str, Any]]:
    """A step of a peer that was run and did the right thing; and what that took."""
    if mode not in peer.modes:
        raise UnavailableError(f"it is for {' and '.join(peer.modes)} only")
    if peer.device is not None and inputs[0].device.type != peer.device:
        raise UnavailableError(f"it needs the device {peer.device}")
    counters.clear()
    start = time.perf_counter()
    try:
        model = peer.build(case, copy.deepcopy(plain), inputs)
        step, done = _run(model, mode, inputs)
        facts: dict[str, Any] = {"setup_seconds": time.perf_counter() - start}
        done.check(expected)
        if peer.compiles:
            facts["merged_by_inductor"] = sum(
                number for name, number in counters["inductor"].items() if name.startswith("batch_")
            )
        elif not peer.replays:
            facts["launches"] = _launches(model, inputs)
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {first_line(error)}") from error
    return step, facts


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next(iter(str(error).splitlines()), "it does not say why")


@dataclasses.dataclass(frozen=True)
class Done:
    """What a model did.

    Attributes:
        outputs: what it gave.
        gradient: the norm of all its gradients after a step of training, which does not depend on
            how the parameters are laid out; None in inference.
    """

    outputs: list[Tensor]
    gradient: Tensor | None

    def check(self, expected: Done) -> None:
        """Raises UnavailableError where this is not what was expected."""
        shapes, wanted = ([tuple(x.shape) for x in done.outputs] for done in (self, expected))
        if shapes != wanted:
            raise UnavailableError(f"its outputs are {shapes} where {wanted} were expected")
        tolerance = ROUNDED if self.outputs[0].is_cuda else TOLERANCE
        pairs = [*zip(self.outputs, expected.outputs, strict=True)]
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
        if not error <= tolerance:  # Nor is it where it is no number.
            raise UnavailableError(f"its outputs are wrong by {error:.1e} of the largest")
        if self.gradient is not None and expected.gradient is not None:
            error = abs(self.gradient / expected.gradient - 1).item()
            if not error <= tolerance:
                raise UnavailableError(f"its gradients are wrong by {error:.1e}")


def _run(
    model: nn.Module, mode: str, inputs: tuple[Tensor, ...]
) -> tuple[Callable[[], object], Done]:
    """A step, and what the model did in a first one."""
    outputs = [x.detach() for x in listed(model(*inputs))]
    if mode == "inference":
        return lambda: model(*inputs), Done(outputs, None)
    step = training_step(model, inputs)
    step()
    gradients = [x.grad for x in model.parameters() if x.grad is not None]
    return step, Done(outputs, nn.utils.get_total_norm(gradients))


def training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """A step: forward, loss, backward and Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()

    return step


def _launches(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int | None]:
    """Those of a forward and a backward pass, as conjoin counts them, and on a GPU as they were."""
    count = count_step(model, inputs)
    found = {"forward": count.forward, "backward": count.backward}
    if inputs[0].is_cuda:
        found["profiled_forward"] = kernels.profiled(lambda: model(*inputs))
    if inputs[0].is_cuda and torch.is_grad_enabled():
        found["profiled"] = kernels.profiled(counted_step(model, inputs))
    return found


def counted_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """What `count_step` counts: no seeds are made, and no gradient is added to another one."""
    seeds = [torch.ones_like(root) for root in _roots(model(*inputs))]

    def step() -> None:
        model.zero_grad()
        torch.autograd.backward(_roots(model(*inputs)), seeds)

    return step


def _roots(outputs: Outputs) -> list[Tensor]:
    return [each for each in listed(outputs) if each.grad_fn is not None]
