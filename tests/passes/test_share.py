"""Equal operations on one tensor become one, unless somebody could tell."""

import pytest
import torch
from scripted import Scripted, assert_same, both, randn, targets
from torch import nn
from torch.nn import functional as F

from conjoin.passes import Share


def noted(module, note):
    module.note = note
    return module


def hooked(module):
    module.register_forward_hook(lambda module, args, output: output * 2)
    return module


def modules():
    return {
        "layer": nn.Linear(4, 4),
        "norm": nn.LayerNorm(4),
        "hooked": hooked(nn.Linear(4, 4)),
        "r": nn.ReLU(),
        "s": nn.ReLU(),
        "i": nn.ReLU(inplace=True),
        "d": nn.Dropout(0.5),
        "e": nn.Dropout(0.5),
        "z": nn.Dropout(0.0),
        "lists": noted(nn.ReLU(), []),
        "lists2": noted(nn.ReLU(), []),
        "tensors": noted(nn.ReLU(), torch.ones(2)),
        "tensors2": noted(nn.ReLU(), torch.ones(2)),
    }


def changed_through_an_alias(m, x):
    y, z = x * 2, x * 2
    z.view(-1).add_(1)
    return y.sin(), z.sin()


def changed_between(m, x):
    h = x * 3
    y = h * 2
    h.add_(1)
    return y.sin(), (h * 2).sin(), h


SHARED = {
    "functions": lambda m, x: F.silu(x).sin() + F.silu(x).cos(),
    "methods": lambda m, x: x.relu().sin() + x.relu().cos(),
    "modules": lambda m, x: m.r(x).sin() + m.s(x).cos(),
    "numbers on the left": lambda m, x: (1 - x).sin() + (1 - x).cos(),
    "views": lambda m, x: x.flatten(0).sin() + x.flatten(0).cos(),
    "chains": lambda m, x: F.silu(x).exp().sin() + F.silu(x).exp().cos(),
    "lists": lambda m, x: m.lists(x).sin() + m.lists2(x).cos(),
    "a layer that is called twice": lambda m, x: m.layer(x).sin() + m.layer(x).cos(),
    "a norm that is called twice": lambda m, x: m.norm(x).sin() + m.norm(x).cos(),
    "idle dropout": lambda m, x: m.z(x).sin() + m.r(x).cos() + m.z(x).cos(),
}

APART = {
    "other settings": lambda m, x: F.leaky_relu(x, 0.1).sin() + F.leaky_relu(x, 0.2).cos(),
    "another number": lambda m, x: (x * 2).sin() + (x * 3).cos(),
    "zeros of two signs": lambda m, x: ((x * 0.0).sin(), (x * -0.0).reciprocal().sign()),
    "dropout": lambda m, x: m.d(x).sin() + m.e(x).cos(),
    "a layer with a hook": lambda m, x: m.hooked(x).sin() + m.hooked(x).cos(),
    "a layer that is changed later": lambda m, x: m.layer(x).mul_(2).sin() + m.layer(x).sin(),
    "outputs": lambda m, x: (F.silu(x), F.silu(x)),
    "in-place": lambda m, x: m.i(x * 1).sin() + m.i(x * 1).cos(),
    "changed later": lambda m, x: F.silu(x).mul_(2).sin() + F.silu(x).sin(),
    "an alias changed": changed_through_an_alias,
    "another tensor": lambda m, x: (x + x.sin()).exp() + (x + x.cos()).exp(),
    "random numbers": lambda m, x: torch.rand_like(x).sin() + torch.rand_like(x).cos(),
    "tensors": lambda m, x: m.tensors(x).sin() + m.tensors2(x).cos(),
    "changed between": changed_between,
}


@pytest.mark.parametrize("script", SHARED.values(), ids=SHARED)
def test_shared(script):
    traced, plain = both(Scripted(script, **modules()), [Share()])
    assert len(targets(traced)) < len(targets(plain))
    assert_same(traced, plain, randn(3, 4), randn(2, 3))
    assert not Share()(traced).modified


@pytest.mark.parametrize("script", APART.values(), ids=APART)
def test_left_apart(script):
    traced, plain = both(Scripted(script, **modules()), [Share()])
    assert targets(traced) == targets(plain)
    assert_same(traced, plain, randn(3, 4), randn(2, 3))


def test_dropout_that_is_idle_for_now():
    """In evaluation mode the two give the same; the graph may be trained later."""
    traced, plain = both(Scripted(APART["dropout"], **modules()).eval(), [Share()])
    assert_same(traced, plain, randn(3, 4))


def test_outputs_that_the_caller_changes():
    traced, _ = both(Scripted(APART["outputs"]), [Share()])
    first, second = traced(x := randn(3, 4))
    first.zero_()
    torch.testing.assert_close(second, F.silu(x))
