"""Measures one case in one mode: every peer, in turn."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import kernels
from benchmarks.cases import Case, loss_of
from benchmarks.peers import Peer, UnavailableError
from benchmarks.timing import compare
from conjoin.launches import count_step

TOLERANCE = 1e-3
"""How far outputs may be apart, relative to the largest, before a peer is called wrong."""


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
    inputs = tuple(x.to(device) for x in case.inputs())
    plain = case.model().to(device).train(mode == "training")
    found: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    with torch.set_grad_enabled(mode == "training"):
        for peer in peers:
            try:
                steps[peer.name], found[peer.name] = _ready(peer, case, mode, plain, inputs)
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
    peer: Peer, case: Case, mode: str, plain: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Callable[[], object], dict[str, Any]]:
    """A step of a peer that was run once and gave the right outputs; and what that took."""
    if mode not in peer.modes:
        raise UnavailableError(f"it is for {' and '.join(peer.modes)} only")
    if peer.device is not None and inputs[0].device.type != peer.device:
        raise UnavailableError(f"it needs the device {peer.device}")
    expected = copy.deepcopy(plain)(*inputs)
    model = copy.deepcopy(plain)
    counters.clear()
    start = time.perf_counter()
    try:
        model = peer.build(case, model, inputs)
        outputs = model(*inputs)
        step = training_step(model, inputs) if mode == "training" else lambda: model(*inputs)
        step()
    except UnavailableError:
        raise
    except Exception as error:
        raise UnavailableError(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
    facts: dict[str, Any] = {"setup_seconds": time.perf_counter() - start}
    if (error := _error(outputs, expected)) > TOLERANCE:
        raise UnavailableError(f"its outputs are wrong by {error:.1e} of the largest")
    if peer.compiles:
        facts["merged_by_inductor"] = sum(
            number for name, number in counters["inductor"].items() if name.startswith("batch_")
        )
    else:
        facts["launches"] = _launches(model, inputs)
    return step, facts


def training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """A step: forward, loss, backward and Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()

    return step


def _error(outputs: Any, expected: Any) -> float:
    """The largest difference, relative to the largest value."""
    pairs = zip(_flat(outputs), _flat(expected), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def _flat(outputs: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [x.detach() for x in ([outputs] if isinstance(outputs, Tensor) else outputs)]


def _launches(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, int | None]:
    """Those of a forward and a backward pass, as conjoin counts them, and on a GPU as they were."""
    count = count_step(model, inputs)
    found = {"forward": count.forward, "backward": count.backward}
    if inputs[0].is_cuda:
        found["profiled_forward"] = kernels.profiled(lambda: model(*inputs))
    if inputs[0].is_cuda and torch.is_grad_enabled():
        found["profiled"] = kernels.profiled(lambda: _roots_backward(model(*inputs)))
    return found


def _roots_backward(outputs: Any) -> None:
    """The backward pass that `count_step` counts."""
    roots = [each for each in _attached(outputs) if each.grad_fn is not None]
    torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


def _attached(outputs: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
