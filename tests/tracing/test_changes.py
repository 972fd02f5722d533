"""Whatever is changed between calls, a rewritten forward does what the model's own would do."""

import collections
import random

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import conjoin
from conjoin.tracing.regions import PLAN


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
        self.scale, self.options = 1.0, {"gain": 2.0}

    def forward(self, x):
        return self.layers(x) * self.scale * self.options["gain"]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(Branch() for _ in range(3))
        self.dropout, self.all = nn.Dropout(0.0), True

    def forward(self, x, mask=None, *, negative=False):
        parts = [branch(self.dropout(x)) for branch in self.branches]
        y = sum(parts) if self.all else parts[0] - parts[1]
        y = y if mask is None else y * mask
        return -y if negative else y


ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.Sigmoid)


def one_more(module, args, output):
    return output + 1


def half(x):
    return x * 0.5


def of(model, branch, number):
    """A module of the model, the same one for the same numbers."""
    layers = model.branches[branch].layers
    return [model.branches[branch], layers, *layers, model.dropout][number]


CHANGES = {
    "mode": lambda m, i, n, v: m.train(not m.training),
    "constant": lambda m, i, n, v: setattr(m.branches[i], "scale", v),
    "constant by hand": lambda m, i, n, v: vars(m.branches[i]).update(scale=v),
    "item": lambda m, i, n, v: m.branches[i].options.update(gain=v),
    "dictionary": lambda m, i, n, v: setattr(m.branches[i], "options", {"gain": v}),
    "flag": lambda m, i, n, v: setattr(m, "all", not m.all),
    "hook": lambda m, i, n, v: of(m, i, n).register_forward_hook(one_more),
    "hook by hand": lambda m, i, n, v: of(m, i, n)._forward_hooks.update({99: one_more}),
    "hooks cleared": lambda m, i, n, v: of(m, i, n)._forward_hooks.clear(),
    "hooks taken away": lambda m, i, n, v: setattr(
        of(m, i, n), "_forward_hooks", collections.OrderedDict()
    ),
    "child": lambda m, i, n, v: setattr(m.branches[i].layers, "1", ACTIVATIONS[n % 3]()),
    "child by hand": lambda m, i, n, v: m.branches[i].layers._modules.update(
        {"1": ACTIVATIONS[n % 3]()}
    ),
    "weight": lambda m, i, n, v: m.branches[i].layers[0].weight.data.mul_(v),
    "forward": lambda m, i, n, v: setattr(m.branches[i].layers[1], "forward", half),
    "forward gone": lambda m, i, n, v: vars(m.branches[i].layers[1]).pop("forward", None),
    "class": lambda m, i, n, v: setattr(
        m.branches[i].layers[1], "__class__", (nn.Tanh, nn.Sigmoid)[n % 2]
    ),
    "something else": lambda m, i, n, v: setattr(m.branches[i].layers[1], "more", v),
}


@pytest.mark.parametrize("seed", range(16))
def test_changes_between_calls(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    original = Model().double()
    x, mask = torch.randn(4, 6).double(), torch.rand(4, 4).double()
    optimized = conjoin.optimize(original, [(x,), (x, mask)], policy="always")
    for _ in range(3):
        optimized(x)
    assert vars(optimized)[PLAN].last is not None  # It is quick as long as nothing changes.
    done = []
    for _ in range(30):
        name, place, value = draw.choice([*CHANGES]), (draw.randrange(3), draw.randrange(6)), 1.1
        done.append((name, place))
        for model in (original, optimized):
            CHANGES[name](model, *place, value + len(done) / 100)
        for _ in range(draw.choice((1, 1, 2, 4))):
            args = draw.choice([(x,), (x, mask), (x[:1],)])
            settings = draw.choice([{}, {}, {"negative": True}])
            with torch.set_grad_enabled(draw.random() < 0.5):
                ours, theirs = optimized(*args, **settings), original(*args, **settings)
            assert_close(ours, theirs, msg=lambda told: f"{told}\n{done}")
