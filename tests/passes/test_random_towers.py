"""Random towers: `rewrite` changes nothing that anybody could tell.

Up to four branches of random layers on one input, joined in some way. A failure shows the seed,
from which `towers` makes the model again.
"""

import random

import pytest
import torch
from scripted import Scripted, assert_released_to_the_bit, assert_same, both, randn
from torch import nn
from torch.nn import functional as F

from conjoin.passes import PIPELINE

SEEDS = range(24)

FUNCTIONS = {
    "relu": F.relu,
    "relu in place": lambda h: F.relu(h, inplace=True),
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "double": lambda h: h * 2,
    "from one": lambda h: 1 - h,
    "add in place": lambda h: h.add_(0.5),
    "softmax": lambda h: F.softmax(h, dim=1),
    "with its mean": lambda h: h - h.mean(),
    "contiguous": lambda h: h.contiguous(),
}

IN_SPACE = {
    "pool": lambda h: F.avg_pool2d(h, 3, stride=1, padding=1),
    "pad": lambda h: F.pad(h, (1, 0)),
    "instance_norm": lambda h: F.instance_norm(h),
}

JOINS = {
    "cat": lambda outputs: torch.cat(outputs, 1),
    "cat from the end": lambda outputs: torch.cat(outputs, -1),
    "cat backwards": lambda outputs: torch.cat(outputs[::-1], 1),
    "stack": lambda outputs: torch.stack(outputs, 1).sum(1),
    "sum": sum,
    "returned": list,
}


def towers(seed):
    """A model, and inputs for it: steps that all branches take, but for an exception or two."""
    draw = random.Random(seed)
    images = draw.random() < 0.5
    names = "abcd"[: draw.randint(2, 4)]
    functions = {**FUNCTIONS, **(IN_SPACE if images else {})}
    makers = {
        "layer": (lambda: nn.Conv2d(4, 4, 3, padding=1)) if images else (lambda: nn.Linear(4, 4)),
        "norm": (lambda: nn.BatchNorm2d(4)) if images else (lambda: nn.BatchNorm1d(4)),
        "groups": lambda: nn.GroupNorm(2, 4),
        "instances": (lambda: nn.InstanceNorm2d(4, affine=draw.random() < 0.8))
        if images
        else (lambda: nn.LayerNorm(4, bias=draw.random() < 0.8)),
        "tracked": (lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        if images
        else (lambda: nn.RMSNorm(4)),
        "slopes": lambda: nn.PReLU(draw.choice([1, 1, 4])),
        "dropout": lambda: nn.Dropout(0.3),
    }
    common = ["layer"]
    for _ in range(draw.randint(1, 6)):
        common.append(draw.choice([*makers, *functions, "layer"]))
    modules, plans = {}, {}
    for name in names:
        plan = list(common)
        if draw.random() < 0.3:
            plan[draw.randrange(len(plan))] = draw.choice([*functions])
        plans[name] = plan
        for number, what in enumerate(plan):
            if what in makers:
                modules[f"{name}{number}"] = makers[what]()
    join = draw.choice([*JOINS])
    by_level = draw.random() < 0.5

    def script(m, x):
        # A branch that begins with a change in place is on a tensor of its own.
        values = {name: x * 1 if plans[name][0] != "layer" else x for name in names}
        order = [(number, name) for number in range(len(common)) for name in names]
        for number, name in order if by_level else sorted(order, key=lambda each: each[1]):
            what = plans[name][number]
            known = functions.get(what)
            h = values[name]
            values[name] = known(h) if known else getattr(m, f"{name}{number}")(h)
        return JOINS[join]([values[name] for name in names])

    inputs = [(3, 4, 6, 5), (2, 4, 7, 7)] if images else [(3, 4), (5, 4), (4, 4, 4)]
    return Scripted(script, **modules), [randn(*shape) for shape in inputs]


@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_as_before(seed):
    model, inputs = towers(seed)
    traced, plain = both(model)
    assert_same(traced, plain, *inputs)
    assert not any(each(traced).modified for each in PIPELINE)
    assert_released_to_the_bit(traced, plain)
