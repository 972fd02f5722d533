"""What it takes siblings in lockstep to share a run, beyond what that run itself takes.

Each sibling looks whether another one has run the wide layer on this input, and whether nothing has
changed since, which is Python. In training the graph of the run is watched too, and where the input
gets a gradient, the wide layer reads an alias of it, which is an operation written in Python. Small
layers take less than that.

It is what is left between two siblings that share a run and two layers that do not, in inference
and in steps of training, where the cost model has told all else. In between other memory is read,
as in a model that has other layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from conjoin.layers.fusing import fuse
from conjoin.layers.linear import Linear
from conjoin.policy.cost import Machine, Setting, Work, seconds
from conjoin.policy.timing import in_turn
from conjoin.tracing.undisturbed import undisturbed

COUNT = 2
"""How many siblings are measured: what the first one takes is the most of it."""

FEATURES = 8
"""How wide they are."""

BETWEEN = 2**21
"""Bytes that are read in between: about what the cache next to a core holds, or more."""

STEPS = ((False, False), (True, False), (True, True))
"""What is measured: whether there is a backward pass, and whether the input gets a gradient."""

TURNS = 5
"""How often both are timed in turn. The least counts: what disturbs a timing only adds."""


def measured(known: Machine, device: torch.device, dtype: torch.dtype) -> Machine:
    """What is known of a device, and what it takes there to share a run.

    Args:
        known: the other constants.
        device: the device.
        dtype: the type of the numbers.
    """
    full: Any = functools.partial(torch.full, fill_value=0.5, device=device, dtype=dtype)
    # Hooks of all modules are called for these layers too, and may note that.
    unseen = undisturbed(nn.Module())
    with unseen, torch.inference_mode(mode=False), torch.enable_grad():
        between, row = full((BETWEEN // dtype.itemsize,)), full((1, FEATURES))
        plain, views = (_layers(device, dtype) for _ in range(2))
        fuse(Linear(), [*views], views)

        def left(setting: Setting) -> float:
            """The seconds that a step takes more with views than with layers, and none told of."""
            make = _training if setting.training else _inference
            steps = [
                _after(between, make(layers, row.requires_grad_(setting.passed_on)))
                for layers in (plain, views)
            ]
            apart, together = in_turn(steps, TURNS, device)
            return together - apart - _told(known, dtype, setting)

        found = [max(0.0, left(Setting(training, passed_on))) for training, passed_on in STEPS]
    inference, training, passed_on = itertools.accumulate(found, max)
    return dataclasses.replace(
        known,
        shared=inference / COUNT,
        graph=training - inference,
        alias=passed_on - training,
    )


def _told(known: Machine, dtype: torch.dtype, setting: Setting) -> float:
    """How many seconds one wide layer takes more than several, as far as is known."""
    row, weight = FEATURES * dtype.itemsize, FEATURES**2 * dtype.itemsize
    works = [Work(row, row, weight, weight, 2 * FEATURES**2, biased=True, rows=1)] * COUNT
    whole, apart = [works], [[work] for work in works]
    return seconds(known, whole, setting) - seconds(known, apart, setting)


def _layers(device: torch.device, dtype: torch.dtype) -> nn.ModuleList:
    """Some layers, for which no random numbers are drawn."""
    shape: dict[str, Any] = {"in_features": FEATURES, "out_features": FEATURES, "dtype": dtype}
    made = nn.ModuleList(nn.Linear(**shape, device="meta") for _ in range(COUNT))
    made.to_empty(device=device)
    for parameter in made.parameters():
        nn.init.constant_(parameter, 0.5)
    return made


def _after(between: Tensor, step: Callable[[], object]) -> Callable[[], None]:
    def after() -> None:
        between.sum()
        step()

    return after


def _run(layers: nn.ModuleList, input: Tensor) -> list[Tensor]:
    return [layer.forward(input) for layer in layers]  # Somebody may follow calls of modules.


def _inference(layers: nn.ModuleList, row: Tensor) -> Callable[[], object]:
    return torch.no_grad()(lambda: _run(layers, row.detach()))


def _training(layers: nn.ModuleList, row: Tensor) -> Callable[[], object]:
    """A step of training, in which the row gets a gradient as well if it requires one."""
    parameters = list(layers.parameters())
    step = step_of_adam([parameter.detach() for parameter in parameters])
    inputs = [*parameters, *([row] if row.requires_grad else [])]

    def train() -> None:
        outputs = _run(layers, row.neg())
        seeds = [output.detach() for output in outputs]
        gradients = torch.autograd.grad(outputs, inputs, seeds)
        step([*gradients[: len(parameters)]])

    return train


def step_of_adam(parameters: list[Tensor]) -> Callable[[list[Tensor]], None]:
    """A step of Adam as a function of the gradients. The optimizer itself would import Dynamo."""
    means, squares = ([torch.zeros_like(each) for each in parameters] for _ in range(2))
    steps = [torch.zeros((), device="cpu") for _ in parameters]
    rates: Any = {"beta1": 0.9, "beta2": 0.999, "lr": 0.0, "weight_decay": 0.0, "eps": 1e-8}
    settings = rates | {"amsgrad": False, "maximize": False}

    def step(gradients: list[Tensor]) -> None:
        adam(parameters, gradients, means, squares, [], steps, **settings)

    return step
