"""What convolutions of one input take beyond a single one that is as wide.

A library lays out anew what a convolution reads, at each call; in training it does so again for the
gradient of the weight, and the gradient of the input is computed, and lies, once for each layer.
How much of that shows depends on the library and the processor, so it is what is left between two
convolutions and one where the cost model has told all else, by the bytes of what they read.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conjoin.policy.cost import Machine, Setting, Table, Work, seconds
from conjoin.policy.timing import ascending, in_turn

IMAGES = (2**14, 2**16, 2**18, 2**20, 2**22)
"""Bytes of what is read."""

CHANNELS = 64
"""How many channels that has, and what each of the two convolutions gives half as many of."""

TURNS = 3
"""How often both are timed in turn."""


def measured(known: Machine, device: torch.device, dtype: torch.dtype) -> Machine:
    """What is known of a device, and what convolutions take there.

    Args:
        known: the other constants.
        device: the device.
        dtype: the type of the numbers.
    """
    try:
        with torch.inference_mode(mode=False), torch.enable_grad():
            forward, training = (
                _table([_left(known, size, device, dtype, training=on) for size in IMAGES])
                for on in (False, True)
            )
    except RuntimeError:  # There are no convolutions of this type.
        forward = training = _table([0.0] * len(IMAGES))
    return dataclasses.replace(known, convolved=forward, convolved_back=training)


def _table(taken: Sequence[float]) -> Table:
    """What was measured, by the bytes."""
    return tuple(zip(map(float, IMAGES), ascending(taken), strict=True))


def _left(
    known: Machine, size: int, device: torch.device, dtype: torch.dtype, *, training: bool
) -> float:
    """The seconds that one of two convolutions of so many bytes takes beyond what is told of it."""
    pixels = size // dtype.itemsize // CHANNELS
    high = 2 ** (int(math.log2(pixels)) // 2)
    full: Any = functools.partial(torch.full, fill_value=0.5, device=device, dtype=dtype)
    image = full((1, CHANNELS, high, pixels // high), requires_grad=training)
    wide = full((CHANNELS, CHANNELS, 1, 1), requires_grad=training)
    both = [half.detach().requires_grad_(training) for half in wide.detach().chunk(2)]
    apart, together = in_turn([_step(image, both), _step(image, [wide])], TURNS, device)
    work = Work(
        input=image.nbytes,
        output=image.nbytes // 2,
        weight=wide.nbytes // 2,
        read=wide.nbytes // 2,
        operations=image.numel() * CHANNELS,
    )
    # Nothing is cut here, and no optimizer's step taken.
    known, setting = dataclasses.replace(known, step=0.0), Setting(training, cut=False)
    told = seconds(known, [[work], [work]], setting) - seconds(known, [[work, work]], setting)
    return max(0.0, apart - together - told)


def _step(image: Tensor, weights: Sequence[Tensor]) -> Any:
    """A forward pass, and a backward pass where there are gradients."""
    if not image.requires_grad:
        return lambda: [F.conv2d(image, weight) for weight in weights]
    with torch.no_grad():
        seeds = [F.conv2d(image, weight) for weight in weights]
    inputs = [image, *weights]
    return lambda: torch.autograd.grad([F.conv2d(image, w) for w in weights], inputs, seeds)
