"""What a sibling reads that runs by itself: plain slices of the wide weight and bias.

Outside of its forward, a sibling's `weight` acts as the Parameter that it was (see `part.py`), and
code of PyTorch's own that only computes with it needs none of that. Siblings on tensors of their
own are mostly called one after another, and so take their slices from one cut of the wide tensors:

    dW = cat(dW_1, ..., dW_n)        instead of        dW = pad(dW_1) + ... + pad(dW_n)

with every pad as large as the wide tensor. So do siblings that read one tensor, where they share no
run since a CUDA graph is captured.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conjoin.layers.checks import TENSORS
from conjoin.layers.lockstep import is_traced, state_of
from conjoin.layers.streams import is_captured
from conjoin.layers.wide import Sibling, Wide

Slices = dict[str, Tensor | None]
"""The slices of a weight and a bias, or None, by name."""


class _Running(threading.local):
    view: Sibling | None = None
    slices: Slices | None = None


_running = _Running()


def read(view: Sibling, name: str) -> tuple[bool, Tensor | None]:
    """Whether a sibling runs now, and its slice if it does."""
    if _running.view is not view or _running.slices is None:
        return False, None
    return True, _running.slices[name]


def run(view: Sibling, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs a forward of PyTorch's own, which finds plain slices as `weight` and `bias`."""
    before = _running.view, _running.slices
    _running.view, _running.slices = view, _take(view)
    try:
        return forward(view, *args, **kwargs)
    finally:
        _running.view, _running.slices = before


def _take(view: Sibling) -> Slices:
    """A sibling's slices, from a cut that it has taken nothing of yet."""
    wide = view.wide_layer
    if (wide.together and not is_captured(wide.weight)) or wide.kind.weight_dim != 0:
        return {name: view.slice_of(name) for name in TENSORS}
    state, index = state_of(wide), view.conjoin_index
    known, left = wide.cut or (None, {})
    found = left.pop(index, None) if known == state else None
    if found is None:  # Other threads take from the same cut.
        left = _cut(wide)
        found = left.pop(index)
        wide.cut = state, left
    return found


def _cut(wide: Wide) -> dict[int, Slices]:
    """The slices of all siblings, whose output channels are the weight's first dimension."""
    cut: dict[int, Slices] = {
        index: {"weight": weight, "bias": None}
        for index, weight in enumerate(wide.weight.split_with_sizes(wide.widths))
    }
    if wide.bias is not None:
        biased = [index for index, has in enumerate(wide.biased) if has]
        biases = wide.bias.split_with_sizes([wide.widths[index] for index in biased])
        for index, bias in zip(biased, biases, strict=True):
            cut[index]["bias"] = bias
    return cut


def may_run() -> bool:
    """Whether siblings may run on plain slices now, whose cut others take over."""
    return not (torch.compiler.is_compiling() or is_traced())
