"""What it takes siblings in lockstep to share a run, beyond what that run itself takes.

Each sibling looks whether another one has run the wide layer on this input, and whether nothing has
changed since, which is Python. Where there is a backward pass, the wide layer reads an alias of the
input, which is an operation written in Python. Small layers take less than that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conjoin.layers.fusing import fuse
from conjoin.layers.linear import Linear
from conjoin.layers.lockstep import alias_of

COUNT = 4
"""How many siblings are measured, since the first one takes longer than the others."""

FEATURES = 8
"""How wide they are."""

Least = Callable[[Callable[[], object], torch.device], float]
"""What tells the seconds of something on a device."""


def measure(
    device: torch.device, dtype: torch.dtype, call: float, cut: float, least: Least
) -> tuple[float, float]:
    """The seconds for each sibling, and for each alias.

    Args:
        device: the device.
        dtype: the type of the numbers.
        call: what a layer takes that has next to nothing to do.
        cut: what it takes to cut a tensor in two.
        least: what measures.
    """
    with torch.inference_mode(mode=False), torch.enable_grad():
        row = torch.full((1, FEATURES), 0.5, device=device, dtype=dtype)
        plain, views = (_layers(device, dtype) for _ in range(2))
        fuse(Linear(), [*views], views)
        with torch.no_grad():
            runs = (functools.partial(_run, layers, row) for layers in (plain, views))
            apart, together = (least(run, device) for run in runs)
        row.requires_grad_()
        passes = (functools.partial(_pass, make, row) for make in (alias_of, torch.neg))
        alias, other = (least(each, device) for each in passes)
    # Layers are called in the same way in both; a shared run is one launch and one cut.
    shared = (together - cut - call - (apart - COUNT * call)) / COUNT
    return max(0.0, shared), max(0.0, alias - other + call)


def _layers(device: torch.device, dtype: torch.dtype) -> nn.ModuleList:
    """Some layers, for which no random numbers are drawn."""
    shape: dict[str, Any] = {"in_features": FEATURES, "out_features": FEATURES, "dtype": dtype}
    made = nn.ModuleList(nn.Linear(**shape, device="meta") for _ in range(COUNT))
    made.to_empty(device=device)
    for parameter in made.parameters():
        nn.init.constant_(parameter, 0.5)
    return made


def _run(layers: nn.ModuleList, input: Tensor) -> None:
    for layer in layers:
        layer.forward(input)  # Not as modules, whose calls somebody may follow.


def _pass(make: Callable[..., Tensor], input: Tensor) -> None:
    """A forward and a backward pass of one operation."""
    torch.autograd.grad(make(input), input, input.detach())
