"""Does it pay to run tables at once that read tensors of their own?

    apart:     n lookups
    at once:   one lookup of as many rows; and before it one launch that joins the row numbers, and
               some that compute with them (`Kind.prepares`), each of which fills a new tensor

It is an estimate with the constants and by the rules of `cost.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from conjoin.graph.site import Shapes
from conjoin.layers import Kind
from conjoin.layers.checks import tensors
from conjoin.policy import machine
from conjoin.policy.cost import Machine, Setting, Work, seconds
from conjoin.policy.figures import LEAST_GAIN, Figures

NUMBER = 8
"""Bytes of a row number."""


def launches_fewer(kind: Kind, count: int) -> bool:
    """Whether so many tables launch fewer operations at once."""
    return count > 2 + kind.prepares


def against(
    kind: Kind, layers: Sequence[nn.Module], shapes: Sequence[Shapes | None], training: bool
) -> Figures | None:
    """What is against running tables at once that launch fewer operations then, if anything is.

    Args:
        kind: their kind.
        layers: the tables.
        shapes: what each read and gave; None where it was not run.
        training: whether there is a backward pass, where they train.
    """
    weights = [tensors(layer)["weight"] for layer in layers]
    known = [shape for shape in shapes if shape is not None]
    device = machine.constants(weights[0].device, weights[0].dtype)
    if device is None or len(known) < len(weights):
        return None
    works = [_work(weight, shape) for weight, shape in zip(weights, known, strict=True)]
    training &= weights[0].requires_grad
    apart, whole = _apart(device, works, training), _at_once(device, works, kind.prepares, training)
    # Gradients may be large, where an estimate misses most.
    if whole <= apart * (1 - LEAST_GAIN if training else 1):
        return None
    return Figures(apart, whole, apart, len(layers), measured=False, training=training)


def _work(weight: Tensor, shapes: Shapes) -> Work:
    """What one table does."""
    size, rows = weight.element_size(), math.prod(shapes.output) * weight.element_size()
    return Work(math.prod(shapes.input) * NUMBER, rows, weight.numel() * size, rows, operations=0)


def _apart(device: Machine, works: Sequence[Work], training: bool) -> float:
    setting = Setting(training, passed_on=False)
    return sum(seconds(device, [[work]], setting) for work in works)


def _at_once(device: Machine, works: Sequence[Work], launches: int, training: bool) -> float:
    numbers = sum(work.input for work in works)
    prepared = (1 + launches) * (device.call + device.new(numbers))
    return prepared + seconds(device, [works], Setting(training, passed_on=False))
