"""Awkward models: each is small, named for its hazard, and has siblings that read one tensor.

`HAZARDS` is the table: the hazard, what plain symbolic tracing or naive fusion does to it, and what
conjoin does: the siblings are fused exactly, or refused for a `Reason`.
"""

import collections
import copy
import dataclasses
import enum
import functools
import math
import random
import threading
import types
import unittest.mock
import warnings
from collections.abc import Callable

import numpy
import torch
from own_kinds import OWN_KINDS, OwnHeads
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import conjoin
from conjoin.legality import Reason

EXACT = None
"""The outcome of siblings that are fused."""

BATCHES = (4, 3, 1)
"""The batch size of each call."""


def normal(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def rows(call):
    return (normal(BATCHES[call], 6),), {}


def single_rows(call):
    return (normal(BATCHES[call], 6, dtype=torch.float32),), {}


def many_rows(call):
    return (normal(BATCHES[call], 2, 6),), {}


def even_rows(call):
    return (normal(2 * BATCHES[call], 6),), {}


def one_row(call):
    return (normal(6),), {}


def no_rows(call):
    return (normal(0, 6),), {}


def images(call):
    return (normal(BATCHES[call], 4, 5, 5),), {}


def channels_last_images(call):
    return (normal(BATCHES[call], 4, 5, 5).to(memory_format=torch.channels_last),), {}


def indices(call):
    return (torch.randint(0, 7, (BATCHES[call], 2)),), {}


def with_or_without_mask(call):
    mask = (normal(3),) if call % 2 else ()
    return (normal(BATCHES[call], 6), *mask), {}


def with_or_without_keyword(call):
    return (), {"x": normal(BATCHES[call], 6), **({"scale": 2.0} if call % 2 else {})}


def one_or_two_tensors(call):
    return tuple(normal(BATCHES[call], 6) for _ in range(1 + call % 2)), {}


def listed_rows(call):
    return ([normal(BATCHES[call], 6)],), {}


def two_or_three_parts(call):
    return (normal(BATCHES[call], 6 + 3 * (call % 2)),), {}


def right_and_wrong_widths(call):
    return (normal(BATCHES[call], 6 + call % 2),), {}


def identical(y):
    return y


class TwoHeads(nn.Module):
    """Nothing awkward, so that the whole forward is rewritten"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3).double(), nn.Linear(6, 5).double()

    def forward(self, x):
        return self.a(x), identical(self.b(x))


class Undecided(TwoHeads):
    """Python decides, so that the forward stays and the siblings run in lockstep"""

    def forward(self, x):
        if x.sum() is True:
            return None
        return self.a(x), identical(self.b(x))


class Branches(nn.Module):
    """The siblings lie in modules of their own"""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.b = nn.ModuleDict({"c": nn.Linear(6, 4).double()})

    def forward(self, x):
        return self.a(x), self.b["c"](x)


class FrozenHeads(TwoHeads):
    """Frozen, so that what the layers read may change before the backward pass"""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class HiddenHeads(TwoHeads):
    """Each sibling reads the output of an activation of its own"""

    def __init__(self):
        super().__init__()
        self.before_a, self.before_b = nn.SiLU(), nn.SiLU()

    def forward(self, x):
        if x.sum() is None:
            return None
        return self.a(self.before_a(x)), self.b(self.before_b(x))


class HiddenInputChanged(HiddenHeads):
    """`x.mul_(2)` between equal activations of x"""

    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            y = self.a(self.before_a(x))
            x.mul_(2)
            return y, self.b(self.before_b(x))


class HiddenOutputChanged(HiddenHeads):
    """`h.mul_(2)` on what one of two equal activations gave"""

    def forward(self, x):
        h = self.before_b(x)
        h.mul_(2)
        return self.a(self.before_a(x)), self.b(h)


class HiddenInPlace(HiddenHeads):
    """Activations in place, of which the second reads what the first has left"""

    def __init__(self):
        super().__init__()
        self.before_a, self.before_b = nn.LeakyReLU(inplace=True), nn.LeakyReLU(inplace=True)
        self.requires_grad_(False)


class HiddenNoGrad(HiddenHeads):
    """`torch.no_grad()` around one of two equal activations"""

    def forward(self, x):
        with torch.no_grad():
            h = self.before_a(x)
        return self.a(h), self.b(self.before_b(x))


class HiddenCheckpointed(HiddenHeads):
    """Each sibling is checkpointed together with its activation"""

    def forward(self, x):
        def a(x):
            return self.a(self.before_a(x))

        def b(x):
            return self.b(self.before_b(x))

        return checkpoint(a, x, use_reentrant=False), checkpoint(b, x, use_reentrant=False)


# What the code of forward decides, remembers or draws.


class TrainingBranch(TwoHeads):
    """A branch on `self.training`"""

    def forward(self, x):
        y = self.a(x)
        if self.training:
            y = y * 2
        return y, self.b(x)


class TrainingFactor(TwoHeads):
    """Arithmetic with `self.training`"""

    def forward(self, x):
        return self.a(x) * (2 - self.training), self.b(x)


class FunctionalDropout(TwoHeads):
    """`F.dropout(y, p, self.training)`"""

    def forward(self, x):
        return F.dropout(self.a(x), 0.5, self.training), self.b(x)


class NestedFlag(TwoHeads):
    """The flag of a nested module, also in a mixed mode"""

    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x) if self.training else x

    def __init__(self):
        super().__init__()
        self.noise, self.drop = self.Noise(), nn.Dropout(0.5)

    def forward(self, x):
        return self.noise(self.a(x)), self.drop(self.b(x))


class NestedMethod(TwoHeads):
    """A method of a nested module that reads its own flag"""

    class Scale(nn.Module):
        def factor(self):
            return 2.0 if self.training else 1.0

    def __init__(self):
        super().__init__()
        self.scale = self.Scale()

    def forward(self, x):
        return self.a(x) * self.scale.factor(), self.b(x)


class NoGradAround(TwoHeads):
    """`torch.no_grad()` around the siblings"""

    def forward(self, x):
        with torch.no_grad():
            y, z = self.a(x), self.b(x)
        return y, z + x.sum()


class NoGradAroundOne(TwoHeads):
    """`torch.no_grad()` around one sibling"""

    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        return y, self.b(x)


class InferenceModeAroundOne(TwoHeads):
    """`torch.inference_mode()` around one sibling"""

    def forward(self, x):
        with torch.inference_mode():
            y = self.a(x)
        return y.clone(), self.b(x)


class AutocastAround(TwoHeads):
    """`torch.autocast` around the siblings"""

    def __init__(self):
        super().__init__()
        self.float()

    def forward(self, x):
        x = x.detach()
        with torch.autocast("cpu", torch.bfloat16):
            return self.a(x), self.b(x)


class AutocastAroundOne(TwoHeads):
    """`torch.autocast` around one sibling"""

    def __init__(self):
        super().__init__()
        self.float()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.a(x)
        return y, self.b(x)


class GradModeSet(TwoHeads):
    """`torch.set_grad_enabled` between the siblings"""

    def forward(self, x):
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        y = self.a(x)
        torch.set_grad_enabled(before)
        return y, self.b(x)


class GradModeRead(TwoHeads):
    """`torch.is_grad_enabled()` in the arithmetic"""

    def forward(self, x):
        return self.a(x) * torch.is_grad_enabled(), self.b(x)


class FreshNoise(TwoHeads):
    """`torch.randn` without the input among its arguments"""

    def forward(self, x):
        return self.a(x) + torch.randn(3, dtype=x.dtype), self.b(x)


class NoiseOfShape(TwoHeads):
    """`torch.randn` of the input's shape"""

    def forward(self, x):
        return self.a(x) + torch.randn(x.shape[0], 3, dtype=x.dtype), self.b(x)


class FreshBuffer(TwoHeads):
    """A fresh tensor that is changed in place"""

    def forward(self, x):
        total = torch.zeros(3, dtype=x.dtype)
        total += self.a(x).sum(0)
        return total, self.b(x)


class PythonsRandom(TwoHeads):
    """A number from `random`"""

    def forward(self, x):
        return self.a(x) * random.random(), self.b(x)


class NumpysRandom(TwoHeads):
    """A number from `numpy.random`"""

    def forward(self, x):
        return self.a(x) * numpy.random.rand(), self.b(x)


class SeedInside(TwoHeads):
    """A random stream that forward seeds"""

    def forward(self, x):
        torch.manual_seed(7)
        return F.dropout(self.a(x)), self.b(x)


class DropoutBetween(TwoHeads):
    """Dropout on the siblings' outputs, below the split"""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(self.a(x)), self.drop(self.b(x))


class Counter(TwoHeads):
    """A counter on the module"""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.a(x) * self.calls, self.b(x)


class InheritedCounter(Counter):
    """A counter in a method that `super()` reaches"""

    def forward(self, x):
        return super().forward(x)


class CountingObject(TwoHeads):
    """An object that counts the calls, and what was computed last on the module"""

    def __init__(self):
        super().__init__()
        self.state, self.last = Settings(), None

    def forward(self, x):
        self.state.count += 1
        before, self.last = self.last, self.a(x).detach()
        return self.b(x) * self.state.count, self.last if before is None else before


class SharedObject(TwoHeads):
    """An object that a nested module changes and the model reads"""

    def __init__(self):
        super().__init__()
        self.settings = Settings()
        self.counter = CountsOnSettings(self.settings)

    def forward(self, x):
        x = self.counter(x)
        return self.a(x) * self.settings.count, self.b(x)


class Settings:
    """What a model shares with the modules in it."""

    def __init__(self):
        self.count = 0


class CountsOnSettings(nn.Module):
    """Changes what it shares with the model"""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings

    def forward(self, x):
        self.settings.count += 1
        return x * 1


class KeptAndRead(TwoHeads):
    """An output that is kept on the module, where a nested module reads it"""

    def __init__(self):
        super().__init__()
        self.reader = ReadsOfAnother(self)

    def forward(self, x):
        self.last = self.a(x)
        y = self.reader(x)
        self.last = y
        return self.b(x), y


class ReadsOfAnother(nn.Module):
    """Reads what the model keeps while it runs"""

    def __init__(self, model):
        super().__init__()
        self.models = [model]

    def forward(self, x):
        return self.models[0].last + x.sum()


class DistributionChanged(TwoHeads):
    """A distribution, whose mean is changed in place"""

    def forward(self, x):
        mean = self.a(x)
        policy = torch.distributions.Normal(mean, 1.0)
        policy.loc.mul_(2)
        return mean, policy.log_prob(mean), self.b(x)


class KeptOutput(TwoHeads):
    """An output that is kept on the module, and a list that grows"""

    def __init__(self):
        super().__init__()
        self.last, self.log = None, []

    def forward(self, x):
        self.last = self.a(x).detach()
        self.log.append(len(x))
        return self.last * len(self.log), self.b(x)


class BufferUpdated(TwoHeads):
    """Buffers that forward updates, in place and by assignment"""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        y = self.a(x)
        self.calls += 1
        self.mean = self.mean.lerp(y.detach().mean(0), 0.1)
        return y - self.mean, self.b(x) * self.calls


class BatchNorms(nn.Module):
    """BatchNorm on the siblings' outputs"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 1).double(), nn.Conv2d(4, 5, 1).double()
        self.norm_a, self.norm_b = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(5).double()

    def forward(self, x):
        return self.norm_a(self.a(x)), self.norm_b(self.b(x))


class ShapeBranch(TwoHeads):
    """A branch on the shape"""

    def forward(self, x):
        if x.shape[0] > 2:
            return self.a(x), self.b(x)
        return self.b(x), self.a(x)


class ShapeArithmetic(TwoHeads):
    """Numbers computed from the shape"""

    def forward(self, x):
        count, width = x.shape
        return self.a(x)[:, : count % 3] / math.sqrt(count), self.b(x).reshape(count, -1) / width


class ShapeUnpacked(TwoHeads):
    """A starred shape, `*x.shape[:-1]`"""

    def forward(self, x):
        return self.a(x).reshape(*x.shape[:-1], 1, 3), self.b(x)


class ValueBranch(TwoHeads):
    """A branch on the values"""

    def forward(self, x):
        y = self.a(x)
        return (y if y.sum() > 0 else -y), self.b(x)


class LoopOnValue(TwoHeads):
    """A loop that a value ends"""

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        while y.abs().max() > 0.1:
            y = y / 2
        return y, z


class TypeBranch(TwoHeads):
    """A branch on the type of the argument"""

    def forward(self, x):
        x = x * 2 if isinstance(x, torch.Tensor) else torch.as_tensor(x)
        return self.a(x), self.b(x)


class NoneTest(TwoHeads):
    """`x is None` in the arithmetic"""

    def forward(self, x):
        return self.a(x) * (x is None), self.b(x)


class DtypeTest(TwoHeads):
    """Comparisons of `dim()`, `dtype` and `device`"""

    def forward(self, x):
        return self.a(x) * (x.dim() == 2) * (x.dtype == torch.float64), self.b(
            x
        ) * x.is_floating_point()


class ShapeInKey(TwoHeads):
    """A string made from the shape"""

    def forward(self, x):
        return {f"a{x.shape[0]}": self.a(x), "b%d" % x.shape[1]: self.b(x)}  # noqa: UP031


class Looked(TwoHeads):
    """A dictionary looked up by a property of the input"""

    def forward(self, x):
        return self.a(x) * {2: 2.0, 3: 3.0}.get(x.dim(), 7.0), self.b(x)


class SetOfShape(TwoHeads):
    """A set made from the shape"""

    def forward(self, x):
        return self.a(x) * len({x.shape[0], x.shape[1], 4}), self.b(x)


class Assertion(TwoHeads):
    """An `assert`, which must go on raising"""

    def forward(self, x):
        assert x.shape[-1] == 6, "six features"
        return self.a(x), self.b(x)


class WrongInput(TwoHeads):
    """Inputs of a wrong shape, and PyTorch's own error"""


class Caught(TwoHeads):
    """An exception between the siblings"""

    def forward(self, x):
        y = self.a(x)
        try:
            int("three")
        except ValueError:
            y = y * 3
        return y, self.b(x)


class EarlyReturn(TwoHeads):
    """A sibling that is called in training only"""

    def forward(self, x):
        y = self.a(x)
        return (y, self.b(x)) if self.training else y


class Generated(TwoHeads):
    """Siblings called in a generator"""

    def outputs(self, x):
        for layer in (self.a, self.b):
            yield layer(x)

    def forward(self, x):
        return [y * 2 for y in self.outputs(x)]


class Recursive(TwoHeads):
    """A forward that calls itself"""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(6, 6).double()

    def forward(self, x, depth=2):
        y, z = self.a(x), self.b(x)
        if depth == 0:
            return y, z
        deeper = self.forward(self.step(x * 1), depth - 1)
        return y + deeper[0], z + deeper[1]


class Children(TwoHeads):
    """A loop over `self.children()`"""

    def forward(self, x):
        return [layer(x) for layer in self.children() if isinstance(layer, nn.Linear)]


class OwnAttribute(TwoHeads):
    """`__getattr__` that counts"""

    def __init__(self):
        super().__init__()
        self.reads = [0]

    def __getattr__(self, name):
        if name != "factor":
            return super().__getattr__(name)
        self.reads[0] += 1
        return float(self.reads[0])

    def forward(self, x):
        return self.a(x) * self.factor, self.b(x)


class OwnCall(nn.Module):
    """A nested module with its own `__call__`"""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.calls = nn.Linear(6, 3).double(), 0

        def __call__(self, x):
            self.calls += 1
            return super().__call__(x) * self.calls

        def forward(self, x):
            return self.layer(x)

    def __init__(self):
        super().__init__()
        self.a, self.b = self.Counted(), nn.Linear(6, 5).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class OwnIteration(nn.Module):
    """A container whose `__iter__` reads the mode"""

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.held = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 5)]).double()

        def __iter__(self):
            return iter(list(self.held)[:: 1 if self.training else -1])

    def __init__(self):
        super().__init__()
        self.layers = self.Layers()

    def forward(self, x):
        return [layer(x) for layer in self.layers]


class LiveProperty(TwoHeads):
    """A property that reads an object which changes"""

    def __init__(self):
        super().__init__()
        self.settings = {"factor": 1.0}

    @property
    def factor(self):
        return self.settings["factor"]

    def forward(self, x):
        self.settings["factor"] += 1
        return self.a(x) * self.factor, self.b(x)


class InsideCheckpoint(TwoHeads):
    """Siblings that a checkpoint computes again"""

    reentrant = False

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def inner(self, x):
        return self.drop(self.a(x)).sin(), self.b(x).cos()

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class InsideReentrantCheckpoint(InsideCheckpoint):
    """Siblings that a reentrant checkpoint computes again"""

    reentrant = True


class GradientInside(TwoHeads):
    """`torch.autograd.grad` inside forward"""

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_() * 1
            y, z = self.a(x), self.b(x)
            (slope,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return slope, z


class BackwardBetween(TwoHeads):
    """`backward()` between the siblings"""

    def forward(self, x):
        x = x * 1
        y = self.a(x)
        y.sum().backward(retain_graph=True)
        return y.detach(), self.b(x)


class StepBetween(TwoHeads):
    """A change of the weights between the siblings"""

    def forward(self, x):
        y = self.a(x)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(0.9)
        return y.detach(), self.b(x)


# Arguments and outputs.


class OptionalArgument(TwoHeads):
    """An argument that may be None"""

    def forward(self, x, mask=None):
        y = self.a(x)
        if mask is not None:
            y = y * mask
        return y, self.b(x)


class DefaultArgument(TwoHeads):
    """A default that some calls replace"""

    def forward(self, x, scale=1.0):
        return self.a(x) * scale, self.b(x)


class KeywordOnly(TwoHeads):
    """Keyword arguments, given and left out"""

    def forward(self, *, x, scale=1.0):
        return self.a(x) * scale, self.b(x)


class StarredArguments(TwoHeads):
    """`*args` of any length"""

    def forward(self, *tensors):
        return [layer(x) for x in tensors for layer in (self.a, self.b)]


class ListArgument(TwoHeads):
    """An argument that is a list"""

    def forward(self, tensors):
        return self.a(tensors[0]), self.b(tensors[0])


class DictOutput(TwoHeads):
    """A dictionary with tensors, numbers, strings and None"""

    def forward(self, x):
        y = self.a(x)
        return {"a": y, "list": [y, (self.b(x),)], "none": None, "shape": x.shape, "text": "b"}


class NamedTupleOutput(TwoHeads):
    """A named tuple"""

    Output = collections.namedtuple("Output", "a b")

    def forward(self, x):
        return self.Output(self.a(x), self.b(x))


class DataclassOutput(TwoHeads):
    """A dataclass of the model's own"""

    @dataclasses.dataclass
    class Output:
        a: torch.Tensor
        b: torch.Tensor

    def forward(self, x):
        return self.Output(self.a(x), b=self.b(x))


class BranchLeftOut(TwoHeads):
    """A loss that leaves a branch out"""

    def forward(self, x):
        return self.a(x), self.b(x).detach()


# In-place changes and strides.


class InPlaceOnOutputs(TwoHeads):
    """In-place operations on the outputs"""

    def forward(self, x):
        return F.relu_(self.a(x)), self.b(x).add_(1).mul_(2)


class InPlaceModule(TwoHeads):
    """`ReLU(inplace=True)` on the outputs"""

    def __init__(self):
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.a(x)), self.act(self.b(x))


class InPlaceAfterSaving(TwoHeads):
    """An in-place change of what backward needs, which must go on raising"""

    def forward(self, x):
        y = self.a(x).tanh()
        z = y * y
        y.add_(1)
        return z, self.b(x)


class ElementSet(TwoHeads):
    """An element of an output that is set"""

    def forward(self, x):
        y = self.a(x)
        y[0] = 0
        return y, self.b(x)


class InPlaceThroughView(TwoHeads):
    """An output changed through a view of it"""

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        y.transpose(0, 1).exp_()
        z[:, 1:].mul_(2)
        return y, z


class InPlaceThroughReshape(TwoHeads):
    """An output changed through what `reshape` gives"""

    def forward(self, x):
        y = self.a(x)
        flat = y.reshape(-1)
        flat.add_(1)
        return y, self.b(x)


class InPlaceThroughContiguous(TwoHeads):
    """An output changed through what `contiguous` gives"""

    def forward(self, x):
        y = self.a(x)
        y.contiguous().add_(1)
        return y, self.b(x)


class Viewed(TwoHeads):
    """`.view(-1)` on an output"""

    def forward(self, x):
        return self.a(x).view(-1), self.b(x).view(x.shape[0], 5, 1)


class ViewedByTorch(nn.Module):
    """Outputs viewed as complex numbers"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3).double(), nn.Linear(6, 4).double()

    def forward(self, x):
        pairs = self.b(x).reshape(x.shape[0], -1, 2)
        return self.a(x), torch.view_as_real(torch.view_as_complex(pairs))


class Strided(TwoHeads):
    """`as_strided` on an output"""

    def forward(self, x):
        y = self.a(x)
        return y.as_strided((y.numel(),), (1,)).clone(), self.b(x)


class StrideRead(TwoHeads):
    """Arithmetic with `stride()`"""

    def forward(self, x):
        y = self.a(x)
        return y * y.stride(0), self.b(x)


class ContiguityRead(TwoHeads):
    """A branch on `is_contiguous()`"""

    def forward(self, x):
        y = self.a(x)
        return (y if y.is_contiguous() else -y), self.b(x)


class OwnFunction(TwoHeads):
    """A custom `autograd.Function` that relies on the strides"""

    class Flat(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.as_strided(x, (x.numel(),), (1,)).clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.view(-1, 3)

    def forward(self, x):
        return self.Flat.apply(self.a(x)), self.b(x)


# The shared input changes between the siblings.


@torch.library.custom_op("conjoin_tests::doubled", mutates_args=())
def doubled(y: torch.Tensor) -> torch.Tensor:
    if not y.is_contiguous():
        raise ValueError("it must be contiguous")
    return y * 2


doubled.register_fake(torch.empty_like)
doubled.register_autograd(lambda ctx, grad: grad * 2)


class OwnOperator(TwoHeads):
    """An operator of `torch.library` that relies on the strides"""

    def forward(self, x):
        return doubled(self.a(x)), doubled(self.b(x))


class AtenViewed(TwoHeads):
    """`torch.ops.aten.view` and `as_strided`"""

    def forward(self, x):
        y = torch.ops.aten.view(self.a(x), [-1])
        return y, torch.ops.aten.as_strided.default(self.b(x), [2], [3])


class ViewedByKeyword(TwoHeads):
    """`torch.flatten(input=...)`, whose result is changed in place"""

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        torch.flatten(input=y).mul_(2)
        return y, z


class ViewedAfterIdentity(TwoHeads):
    """`.view(-1)` after modules that give back what they got"""

    def __init__(self):
        super().__init__()
        self.same, self.drop, self.relu = nn.Identity(), nn.Dropout(0.0), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.same(self.a(x)).view(-1), self.relu(self.drop(self.b(x))).view(-1)


class FlattenedByModule(nn.Module):
    """`nn.Flatten`, whose result is changed in place"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 3).double(), nn.Conv2d(4, 5, 3).double()
        self.flatten = nn.Flatten()

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        self.flatten(y).mul_(2)
        return y, z


class FilledWithNoise(TwoHeads):
    """Random numbers drawn into an output"""

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        y.detach().normal_()
        return y, z.detach().uniform_(), z


class Resized(TwoHeads):
    """`resize_` on an output, and the length of its storage"""

    def forward(self, x):
        with torch.no_grad():
            y, z = self.a(x), self.b(x)
            length = z.untyped_storage().nbytes()
            y.resize_(len(x), 5).fill_(7)
        return y, z, length


def viewed_in_evaluation(module, y):
    return y if module.training else y.view(-1)


class ViewedInOneMode(TwoHeads):
    """A function beside the model that asks for its mode, and views an output in one of them"""

    def forward(self, x):
        return viewed_in_evaluation(self, self.a(x)), self.b(x)


class InputChangedByMethod(FrozenHeads):
    """`x.mul_(2)` between the siblings"""

    def forward(self, x):
        y = self.a(x)
        x.mul_(2)
        return y, self.b(x)


class InputChangedAndTrained(TwoHeads):
    """`x.mul_(2)` between trained siblings, which must go on raising in backward"""

    def forward(self, x):
        y = self.a(x)
        x.mul_(2)
        return y, self.b(x)


class InputChangedByOperator(FrozenHeads):
    """`h += 1` on another name of the input"""

    def forward(self, x):
        y = self.a(x)
        h = x
        h += 1
        return y, self.b(x)


class InputChangedByElement(FrozenHeads):
    """`x[0] = 7`"""

    def forward(self, x):
        y = self.a(x)
        x[0] = 7
        return y, self.b(x)


class InputChangedByFunction(FrozenHeads):
    """`F.relu(x, True)`"""

    def forward(self, x):
        y = self.a(x)
        F.relu(x, True)
        return y, self.b(x)


class InputChangedThroughView(FrozenHeads):
    """A change through a view of the input"""

    def forward(self, x):
        y = self.a(x)
        x.view(-1).add_(1)
        return y, self.b(x)


class InputChangedThroughSlice(FrozenHeads):
    """A change through a slice of the input"""

    def forward(self, x):
        y = self.a(x)
        x[:, 1:3].mul_(2)
        return y, self.b(x)


class InputChangedThroughAlias(FrozenHeads):
    """A change through what only looks like a copy"""

    def forward(self, x):
        y = self.a(x)
        x.cpu().contiguous().mul_(2)
        return y, self.b(x)


class InputChangedByOut(FrozenHeads):
    """`out=` on the input"""

    def forward(self, x):
        x = x.detach()
        y = self.a(x)
        torch.add(x, 1, out=x)
        return y, self.b(x)


class InputChangedByForeach(FrozenHeads):
    """`torch._foreach_mul_`"""

    def forward(self, x):
        x = x.detach()
        y = self.a(x)
        torch._foreach_mul_([x], 2.0)
        return y, self.b(x)


class InputChangedByOverload(FrozenHeads):
    """An aten operation called directly"""

    def forward(self, x):
        y = self.a(x)
        torch.ops.aten.mul_.Tensor(x, 2.0)
        return y, self.b(x)


class InputChangedByModule(FrozenHeads):
    """`ReLU(inplace=True)` between the siblings, in a Sequential"""

    def __init__(self):
        super().__init__()
        self.act = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))

    def forward(self, x):
        y = self.a(x)
        self.act(x)
        return y, self.b(x)


class InputChangedByOpaque(FrozenHeads):
    """A module of the model's own that changes its input"""

    class Double(nn.Module):
        def forward(self, x):
            x.mul_(2)

    def __init__(self):
        super().__init__()
        self.double_input = self.Double()

    def forward(self, x):
        y = self.a(x)
        self.double_input(x)
        return y, self.b(x)


class InputChangedByFunctionClass(FrozenHeads):
    """A custom `autograd.Function` that marks its input dirty"""

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    def forward(self, x):
        y = self.a(x)
        self.Double.apply(x)
        return y, self.b(x)


class InputChangedThroughData(TwoHeads):
    """`x.data.mul_(2)`, which the version counter does not see"""

    def forward(self, x):
        y = self.a(x)
        x.data.mul_(2)
        return y, self.b(x)


class InputChangedThroughNumpy(TwoHeads):
    """A NumPy array on the input's memory"""

    def forward(self, x):
        y = self.a(x)
        x.detach().numpy()[:] *= 2
        return y, self.b(x)


class InputOnOthersMemory(TwoHeads):
    """`x.data`, changed through `x`, whose version counter is another"""

    def forward(self, x):
        x = x * 1
        inner = x.data
        y = self.a(inner)
        x.mul_(2)
        return y, self.b(inner)


class InputGivenOthersMemory(TwoHeads):
    """`h.data = x`, and a change through `x`"""

    def forward(self, x):
        x, h = x * 1, x + 1
        h.data = x
        y = self.a(h)
        x += 1
        return y, self.b(h)


class InputChangedByEarlierNumpy(TwoHeads):
    """A NumPy array on the input's memory that was there before"""

    def forward(self, x):
        array = x.detach().numpy()
        y = self.a(x)
        array *= 2
        return y, self.b(x)


# The layers and their parameters.


class TiedWeight(nn.Module):
    """Two layers that are tied"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 5).double(), nn.Linear(6, 5).double()
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.a(x), self.b(x)


class SharedMemory(nn.Module):
    """Two Parameters on the same memory"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6).double(), nn.Linear(6, 6).double()
        self.b.weight.data = self.a.weight.data.t()

    def forward(self, x):
        return self.a(x), self.b(x)


class KeptMemory(TwoHeads):
    """A tensor on a weight's memory in a plain list"""

    def __init__(self):
        super().__init__()
        self.held = [self.a.weight.data]

    def forward(self, x):
        return self.a(x), self.b(x), self.held[0].sum()


class TwoNames(TwoHeads):
    """A layer that stands at two names"""

    def __init__(self):
        super().__init__()
        self.c = self.a

    def forward(self, x):
        return self.c(x), self.b(x)


class HiddenLayer(TwoHeads):
    """A layer that stands in a plain list too"""

    def __init__(self):
        super().__init__()
        self.held = [self.a]

    def forward(self, x):
        return self.held[0](x), self.b(x)


class CalledTwice(TwoHeads):
    """Siblings that are called twice, on two tensors"""

    def forward(self, x):
        y = x * 2
        return self.a(x) + self.a(y), self.b(x) + self.b(y)


class TreeOfCalls(TwoHeads):
    """Siblings that are called equally often, in another order"""

    def forward(self, x):
        z = x * 2
        first = self.a(x), self.b(x)
        return *first, self.b(z), self.a(z)


class OneCalledTwice(TwoHeads):
    """A sibling that is called more often than the other"""

    def forward(self, x):
        return self.a(x), self.b(x), self.a(x + 1)


class FrozenOne(TwoHeads):
    """One frozen sibling"""

    def __init__(self):
        super().__init__()
        self.a.requires_grad_(False)


class FrozenBiases(TwoHeads):
    """Frozen biases"""

    def __init__(self):
        super().__init__()
        self.a.bias.requires_grad_(False)
        self.b.bias.requires_grad_(False)


class BiasOnSome(TwoHeads):
    """A bias on some of several siblings"""

    def __init__(self):
        super().__init__()
        self.c = nn.Linear(6, 2, bias=False).double()

    def forward(self, x):
        return self.a(x), self.c(x), self.b(x)


class BiasOnOne(nn.Module):
    """A bias on one of two siblings"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3, bias=False).double(), nn.Linear(6, 5).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class TwoDtypes(nn.Module):
    """Siblings of two dtypes"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(7, 3), nn.Embedding(7, 3).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class TwoDevices(nn.Module):
    """Siblings on two devices"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3).double(), nn.Linear(6, 5, device="meta").double()

    def forward(self, x):
        y = self.a(x)
        try:
            return y, self.b(x)
        except RuntimeError:
            return y, None


class Lazy(nn.Module):
    """Lazy layers, before their first call"""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.LazyLinear(width, dtype=torch.float64) for width in (3, 5))

    def forward(self, x):
        return self.a(x), self.b(x)


class MadeFromLazy(Lazy):
    """Lazy layers, after their first call"""

    def __init__(self):
        super().__init__()
        self(normal(2, 6))


class GroupedQueries(nn.Module):
    """Widths that differ, as in grouped-query attention"""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, width).double() for width in (8, 2, 2))

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 2))
        k, v = self.k(x)[:, None], self.v(x)[:, None]
        return F.scaled_dot_product_attention(q, k, v)


class NoWidth(nn.Module):
    """A sibling without any output"""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.a, self.b = nn.Linear(6, 0).double(), nn.Linear(6, 5).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class ForwardHook(TwoHeads):
    """A hook on a layer"""

    def __init__(self):
        super().__init__()
        self.a.register_forward_hook(lambda module, args, output: output * 2)


class HookOnContainer(nn.Module):
    """Hooks on the modules around the siblings"""

    def __init__(self):
        super().__init__()
        self.heads = TwoHeads()
        self.heads.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.heads.register_forward_hook(lambda module, args, output: output[::-1])

    def forward(self, x):
        return self.heads(x)


class Parametrized(TwoHeads):
    """A parametrized weight"""

    class Doubled(nn.Module):
        def forward(self, weight):
            return weight * 2

    def __init__(self):
        super().__init__()
        parametrize.register_parametrization(self.a, "weight", self.Doubled())


class WeightNorm(TwoHeads):
    """weight_norm"""

    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.a)
        parametrizations.weight_norm(self.b)


class SpectralNorm(TwoHeads):
    """spectral_norm, which changes a buffer at each call"""

    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.a)
        nn.utils.spectral_norm(self.b)


class Pruned(TwoHeads):
    """Pruning"""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            prune.random_unstructured(self.a, "weight", 0.5)


class Subclassed(nn.Module):
    """A subclass with its own forward"""

    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    def __init__(self):
        super().__init__()
        self.a, self.b = self.Doubled(6, 3).double(), self.Doubled(6, 5).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class SubclassedCall(Subclassed):
    """A subclass with its own `__call__`"""

    class Doubled(nn.Linear):
        def __call__(self, x):
            return super().__call__(x) * 2


class SubclassedInside(nn.Module):
    """A convolution with its own `_conv_forward`"""

    class Doubled(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, weight * 2, bias)

    def __init__(self):
        super().__init__()
        self.a, self.b = self.Doubled(4, 3, 1).double(), self.Doubled(4, 5, 1).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class SubclassedForMore(nn.Module):
    """A subclass that only adds parameters"""

    class Scaled(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.scale = nn.Parameter(torch.ones(self.out_features))

    def __init__(self):
        super().__init__()
        self.a, self.b = self.Scaled(6, 3).double(), self.Scaled(6, 5).double()

    def forward(self, x):
        return self.a(x) * self.a.scale, self.b(x) * self.b.scale


class Patched(TwoHeads):
    """`layer.forward` that was replaced"""

    def __init__(self):
        super().__init__()
        self.a.forward = functools.partial(self.double, self.a)

    @staticmethod
    def double(layer, x):
        return F.linear(x, layer.weight, layer.bias) * 2


class OwnParameter(TwoHeads):
    """A Parameter class of the model's own"""

    class Kept(nn.Parameter):
        pass

    def __init__(self):
        super().__init__()
        self.a.weight = self.Kept(self.a.weight.detach())


class Quantized(nn.Module):
    """Layers that are quantized dynamically, beside some that are not"""

    def __init__(self):
        super().__init__()
        quantized = nn.Sequential(nn.Linear(6, 3), nn.Linear(6, 5))
        quantized = torch.ao.quantization.quantize_dynamic(quantized)
        self.layers = nn.ModuleList([*quantized, nn.Linear(6, 3), nn.Linear(6, 5)])

    def forward(self, x):
        return [layer(x) for layer in self.layers]


class QuantizationAware(nn.Module):
    """Layers that observe and round their weights, for quantization later"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 5)
        self.qconfig = torch.ao.quantization.get_default_qat_qconfig()
        torch.ao.quantization.prepare_qat(self, inplace=True)

    def forward(self, x):
        return self.a(x), self.b(x)


class Adapted(nn.Module):
    """Layers with an adapter of low rank around them, as LoRA makes them"""

    class LowRank(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base.requires_grad_(False)
            self.down = nn.Linear(base.in_features, 2, bias=False).double()
            self.up = nn.Linear(2, base.out_features, bias=False).double()

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    def __init__(self):
        super().__init__()
        self.a, self.b = (self.LowRank(nn.Linear(6, width).double()) for width in (3, 5))

    def forward(self, x):
        return self.a(x), self.b(x)


class Grouped(nn.Module):
    """Grouped convolutions"""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(4, 4, 3, groups=2).double() for _ in range(2))

    def forward(self, x):
        return self.a(x), self.b(x)


class GroupedTransposed(Grouped):
    """Transposed convolutions with groups"""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.ConvTranspose2d(4, 4, 3, groups=2).double() for _ in range(2))


class TwoKernelSizes(nn.Module):
    """Convolutions with kernels of two sizes"""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 3, 1).double()
        self.b = nn.Conv2d(4, 3, 3, padding=1).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class SpelledInTwoWays(nn.Module):
    """Settings that are assigned later, as numbers or in words"""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 3, 3, padding="same", dilation=2).double()
        self.b = nn.Conv2d(4, 3, 3).double()
        self.b.dilation, self.b.padding, self.b.stride = 2, (2, 2), [1, 1]

    def forward(self, x):
        return self.a(x), self.b(x)


class Padded(nn.Module):
    """Convolutions with another padding mode"""

    def __init__(self):
        super().__init__()
        settings = {"padding": "same", "padding_mode": "reflect"}
        self.a = nn.Conv2d(4, 3, 3, **settings).double()
        self.b = nn.Conv2d(4, 5, 3, **settings).double()

    def forward(self, x):
        return self.a(x), self.b(x).view(x.shape[0], -1)


class Transposed(nn.Module):
    """Transposed convolutions called with an output size"""

    def __init__(self):
        super().__init__()
        self.a = nn.ConvTranspose2d(4, 3, 3, stride=2).double()
        self.b = nn.ConvTranspose2d(4, 5, 3, stride=2).double()

    def forward(self, x):
        return self.a(x, output_size=(12, 12)), self.b(x, output_size=(12, 12))


class RenormedRows(nn.Module):
    """Embeddings that renormalize their weight when called"""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Embedding(7, 3, max_norm=0.5).double() for _ in range(2))

    def forward(self, x):
        return self.a(x), self.b(x)


class PaddedRows(nn.Module):
    """Embeddings with a row that gets no gradient"""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Embedding(7, 3, padding_idx=1).double() for _ in range(2))

    def forward(self, x):
        return self.a(x), self.b(x)


class WeightPenalty(TwoHeads):
    """A penalty on a weight"""

    def forward(self, x):
        return self.a(x), self.b(x), self.a.weight.norm() + self.b.bias.sum()


class WeightUsedElsewhere(TwoHeads):
    """`F.linear` with a layer's weight"""

    def forward(self, x):
        return F.linear(x + 1, self.a.weight, self.a.bias), self.a(x), self.b(x)


class WeightInList(TwoHeads):
    """Weights in a plain list"""

    def __init__(self):
        super().__init__()
        self.held = [self.a.weight, self.b.weight]

    def forward(self, x):
        return self.a(x), self.b(x), sum(weight.pow(2).sum() for weight in self.held)


class ParameterLoop(TwoHeads):
    """A penalty on all of `self.parameters()`"""

    def forward(self, x):
        return self.a(x), self.b(x), sum(p.pow(2).sum() for p in self.parameters())


class OptimizerInside(TwoHeads):
    """An optimizer that the model keeps, and that steps in forward"""

    def __init__(self):
        super().__init__()
        self.optimizer = torch.optim.SGD(self.parameters(), 0.1)

    def forward(self, x):
        if torch.is_grad_enabled():
            self.optimizer.zero_grad()
            (self.a(x).sum() + self.b(x).pow(2).sum()).backward()
            self.optimizer.step()
        return self.a(x), self.b(x)


class WeightInPartial(TwoHeads):
    """A weight in a partial function, an object and a nested list"""

    def __init__(self):
        super().__init__()
        self.again = functools.partial(F.linear, weight=self.a.weight)
        self.held = types.SimpleNamespace(weights=[[self.b.weight]])

    def forward(self, x):
        return self.a(x), self.b(x), self.again(x), x @ self.held.weights[0][0].T


class NormsOfParameters(TwoHeads):
    """The norm of each of `self.parameters()`, by name too"""

    def forward(self, x):
        norms = [parameter.norm() for parameter in self.parameters()]
        named = dict(self.named_parameters())
        return self.a(x), self.b(x), norms, named["a.weight"].norm()


class CountOfModules(TwoHeads):
    """Modules that are counted, and asked for a weight"""

    def forward(self, x):
        weights = [module.weight.sum() for module in self.modules() if hasattr(module, "weight")]
        return self.a(x), self.b(x), weights, len(list(self.modules()))


class FirstParameter(TwoHeads):
    """The dtype and device of the first of `self.parameters()`"""

    def forward(self, x):
        first = next(self.parameters())
        return self.a(x.to(first.dtype)), self.b(x.to(first.device))


class GradientOfWeight(TwoHeads):
    """`torch.autograd.grad` with respect to a weight, inside forward"""

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        if not torch.is_grad_enabled():
            return y, z
        return y, z, torch.autograd.grad(y.pow(2).sum(), self.a.weight, create_graph=True)


class TargetUpdated(TwoHeads):
    """A sibling whose weight follows another's, without gradients, after the other's call"""

    def __init__(self):
        super().__init__()
        self.b = nn.Linear(6, 3).double()

    def forward(self, x):
        x = x.tanh()
        y, z = self.a(x), self.b(x)
        with torch.no_grad():
            self.b.weight.lerp_(self.a.weight, 0.1)
        return y, z.detach()


class FrozenInside(TwoHeads):
    """A sibling that forward freezes"""

    def forward(self, x):
        for parameter in self.a.parameters():
            parameter.requires_grad_(False)
        return self.a(x), self.b(x)


class NumbersOfNumpy(TwoHeads):
    """Attributes of NumPy's own kinds of number, and of subclasses of str and int"""

    class Name(str):
        pass

    def __init__(self):
        super().__init__()
        self.scale, self.name, self.level = numpy.sqrt(2.0), self.Name("a"), Level.HIGH

    def forward(self, x):
        return self.a(x) * self.scale, self.b(x), self.name, self.level


class Level(enum.IntEnum):
    HIGH = 3


class Unpacked(nn.Module):
    """Parts that must be as many as there are names for them"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 5).double()

    def forward(self, x):
        left, right = x.split(3, -1)
        rows, columns = x.shape
        return self.a(left) * rows, self.b(left) * columns, right


class PartialForward(nn.Module):
    """A forward that `functools.partialmethod` makes of another method"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3).double(), nn.Linear(6, 5).double()

    def run(self, factor, x):
        if self.training:
            factor = -factor
        return self.a(x) * factor, self.b(x)

    forward = functools.partialmethod(run, 2)


class WeightIsParameter(TwoHeads):
    """`isinstance(layer.weight, nn.Parameter)`"""

    def forward(self, x):
        return [f(x) * (1 + isinstance(f.weight, nn.Parameter)) for f in (self.a, self.b)]


class RawWeights(nn.Module):
    """Products with Parameters that the model holds itself"""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.a, self.b = (nn.Parameter(normal(6, 3)) for _ in range(2))
        self.last = nn.Parameter(normal(3, 2))

    def forward(self, x):
        return (x @ self.a).tanh() * self.scale, (x @ self.b).relu() @ self.last


class RawWeightsInLists(nn.Module):
    """Products with Parameters in a `ParameterList` and a `ParameterDict`"""

    def __init__(self):
        super().__init__()
        self.gates = nn.ParameterList([nn.Parameter(normal(3, 6)) for _ in range(2)])
        self.named = nn.ParameterDict({"up": normal(6, 3), "down": normal(6, 3)})

    def forward(self, x):
        gates = [F.linear(x, gate).softmax(-1) for gate in self.gates]
        return gates, torch.mm(x, self.named["up"]), x.mm(self.named.down)


class RawWeightPenalized(RawWeights):
    """The norm of such a Parameter, in the same forward"""

    def forward(self, x):
        return *super().forward(x), self.a.norm()


class RawWeightPenalizedInTraining(RawWeights):
    """The norm of such a Parameter in training only"""

    def forward(self, x):
        outputs = super().forward(x)
        return (*outputs, self.a.norm()) if self.training else outputs


class RawWeightUpdated(RawWeights):
    """Such a Parameter is changed between the products"""

    def forward(self, x):
        first = x @ self.a
        with torch.no_grad():
            self.a.add_(0.1)
        return first.detach(), x @ self.b


class ForwardDirectly(TwoHeads):
    """`layer.forward(x)` without the call"""

    def forward(self, x):
        return self.a.forward(x), self.b.forward(x)


class ManyDimensions(TwoHeads):
    """Inputs of more dimensions"""


class OneDimension(TwoHeads):
    """An input of one dimension"""


class EmptyBatch(TwoHeads):
    """An empty batch"""


class ChannelsLast(nn.Module):
    """channels_last"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 3, 3).double(), nn.Conv2d(4, 5, 3).double()

    def forward(self, x):
        return self.a(x), self.b(x)


class SparseInput(TwoHeads):
    """A sparse tensor"""

    def forward(self, x):
        x = x.detach().to_sparse()
        return self.a(x), self.b(x)


class ComplexInput(nn.Module):
    """Complex numbers"""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3, dtype=torch.complex128)
        self.b = nn.Linear(6, 5, dtype=torch.complex128)

    def forward(self, x):
        x = torch.complex(x, x * 2)
        return self.a(x).abs(), self.b(x).abs()


# What the code of forward keeps outside of the model.


@functools.lru_cache
def cached_mask(width):
    return torch.arange(width, dtype=torch.float64)


class CachedByFunction(TwoHeads):
    """A mask from a function with `functools.lru_cache`"""

    def forward(self, x):
        return self.a(x) + cached_mask(3), self.b(x) + cached_mask(5)


masks = {}
last_mask = None


class CachedInGlobal(TwoHeads):
    """A mask in a global dictionary, and one in a global variable"""

    def forward(self, x):
        global last_mask
        if x.shape not in masks:
            masks[x.shape] = torch.ones(5, dtype=x.dtype)
        if last_mask is None:
            last_mask = torch.ones(3, dtype=x.dtype)
        return self.a(x) + last_mask, self.b(x) + masks[x.shape]


class CachedInClass(TwoHeads):
    """A mask on the class, and one in the default of an argument"""

    masks: dict = {}  # noqa: RUF012
    mask = None

    def masked(self, y, kept={}):  # noqa: B006
        if y.shape not in kept:
            kept[y.shape] = torch.ones(y.shape[-1], dtype=y.dtype)
        return y + kept[y.shape]

    def forward(self, x):
        if self.mask is None:
            type(self).mask = torch.ones(3, dtype=x.dtype)
        if 5 not in self.masks:
            self.masks[5] = torch.ones(5, dtype=x.dtype)
        return self.masked(self.a(x) + self.mask), self.b(x) + self.masks[5]


def masking():
    kept = None

    def mask(y):
        nonlocal kept
        if kept is None:
            kept = torch.ones(y.shape[-1], dtype=y.dtype)
        return y + kept

    return mask


class CachedInClosure(TwoHeads):
    """A mask in a variable of an enclosing function"""

    masked = staticmethod(masking())

    def forward(self, x):
        return self.masked(self.a(x)), self.b(x)


class Meter:
    def __init__(self):
        self.total, self.seen = 0, []

    def update(self, y):
        self.total = self.total + y.detach().sum()
        self.seen.append(y.detach())


class KeptInObject(TwoHeads):
    """Outputs that an object, nested lists and a deque keep, and streams of random numbers"""

    def __init__(self):
        super().__init__()
        self.meter = Meter()
        self.history = {"a": [], "counts": collections.Counter()}
        self.latest = collections.deque(maxlen=2)
        self.generator = torch.Generator().manual_seed(0)
        self.python, self.numpy = random.Random(0), numpy.random.default_rng(0)

    def forward(self, x):
        y, z = self.a(x), self.b(x)
        y = y + torch.rand((), generator=self.generator, dtype=y.dtype)
        z = z + self.python.random() + self.numpy.random()
        self.meter.update(y)
        self.history["a"].append(y.detach())
        self.history["counts"]["calls"] += 1
        self.latest.append(z.detach())
        return y, z, self.meter.total, list(self.history["a"]), list(self.latest)


class DefaultDtypeSet(TwoHeads):
    """A default dtype that is set and set back"""

    def forward(self, x):
        torch.set_default_dtype(torch.float64)
        factor = torch.ones(()) * float(x.sum() * 0 + 2)
        torch.set_default_dtype(torch.float32)
        return self.a(x) * factor, self.b(x)


class ModeEnteredByHand(TwoHeads):
    """Modes that are entered and left by hand, with a value read between"""

    def forward(self, x):
        modes = torch.autocast("cpu", torch.bfloat16), torch.inference_mode()
        for mode in modes:
            mode.__enter__()
        factor = float(x.double().sum() * 0 + 2)
        for mode in reversed(modes):
            mode.__exit__(None, None, None)
        return self.a(x) * factor, self.b(x)


class MappedInside(TwoHeads):
    """`torch.vmap` and `jacrev` of what holds the siblings, inside forward"""

    def heads(self, x):
        return torch.cat([self.a(x), self.b(x)], -1)

    def forward(self, x):
        return torch.vmap(self.heads)(x), torch.func.jacrev(self.heads)(x[0]), self.heads(x)


# Life after optimize: each is done to the model and to its original, and gives what is compared.


def replace_activation(model, x):
    """Another activation before one sibling"""
    model.before_a = nn.Tanh()


def hook_activation(model, x):
    """A hook on the activation before one sibling, which changes what it gives"""
    model.before_b.register_forward_hook(lambda module, args, output: output + 1)


def freeze_one(model, x):
    """`requires_grad_(False)` on one sibling"""
    model.a.requires_grad_(False)


def freeze_weight(model, x):
    """`requires_grad = False` on one weight"""
    model.a.weight.requires_grad = False


def freeze_and_thaw(model, x):
    """`requires_grad_` on the model, there and back"""
    model.requires_grad_(False)
    frozen = model(x)
    model.requires_grad_(True)
    return frozen


def initialize(model, x):
    """`apply` with an initialization"""

    def fill(module):
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)

    model.apply(fill)


def halve_own_parameters(model, x):
    """`apply` with the parameters of each module"""

    def halve(module):
        for parameter in module.parameters(recurse=False):
            parameter.data.mul_(0.5)

    model.apply(halve)


def assign_data(model, x):
    """`weight.data = ...`"""
    model.a.weight.data = torch.randn_like(model.a.weight)


def assign_weight(model, x):
    """A new Parameter"""
    model.a.weight = nn.Parameter(normal(3, 6))


def assign_gradient(model, x):
    """`weight.grad = ...` and an optimizer step"""
    model.a.weight.grad = torch.ones(3, 6, dtype=torch.float64)
    torch.optim.SGD(model.parameters(), 0.1).step()


def train_steps(model, x):
    """Steps of an optimizer"""
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sum(y.pow(2).sum() for y in model(x)).backward()
        optimizer.step()


def vectorize(model, x):
    """The parameters to a vector and back"""
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 2, model.parameters())


def hook_weight(model, x):
    """A gradient hook on a weight, later"""
    model.a.weight.register_hook(lambda grad: grad * 2)


def hook_layers(model, x):
    """Hooks on siblings and on the model, later"""
    model.a.register_forward_hook(lambda module, args, output: output * 2)
    model.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    model.b.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def hook_state(model, x):
    """A hook on the state_dict of a sibling"""
    model.a.register_state_dict_post_hook(
        lambda module, state, prefix, local: state.__setitem__(f"{prefix}extra", torch.ones(1))
    )


def capture(model, x):
    """`get_submodule`, `get_parameter` and hooks that keep what passes"""
    seen = []
    layer = model.get_submodule("a")
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    handle.remove()
    return seen, model.get_parameter("a.weight").detach().clone()


def replace(model, x):
    """A sibling replaced by assignment"""
    model.a = nn.Linear(6, 2).double()


def delete(model, x):
    """A sibling deleted, and its call with it"""
    layer = copy.deepcopy(model.a)
    del model.a
    model.a = nn.Sequential(layer)


def patch(model, x):
    """`layer.forward = ...`, later"""
    model.a.forward = lambda x: F.linear(x, model.a.weight) * 3


def change_part(model, x):
    """A setting of a layer changed, later"""
    model.a.bias = None


def to_single_and_back(model, x):
    """`float()`, `half()`, `to(dtype)`"""
    outputs = model.float()(x.float())
    half = {name: value.clone() for name, value in model.half().state_dict().items()}
    model.to(torch.float64)
    return outputs, half


def one_to_single(model, x):
    """Another dtype for one sibling"""
    return model.a.float()(x.float()), model.a.double()(x)


def to_meta_and_back(model, x):
    """`to_empty` from the meta device, and loading"""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


def load(model, x):
    """`load_state_dict`"""
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    return str(model.load_state_dict(state))


def load_assigning(model, x):
    """`load_state_dict(assign=True)`"""
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    return str(model.load_state_dict(state, assign=True))


def load_some(model, x):
    """`load_state_dict(strict=False)` with missing and unexpected keys"""
    state = {"a.weight": normal(3, 6), "c.weight": normal(1)}
    return str(model.load_state_dict(state, strict=False))


def load_wrongly(model, x):
    """Missing, unexpected and wrong values, in PyTorch's own words"""
    messages = []
    for state in ({}, {"a.weight": normal(2, 2)}, {"a.weight": normal(3, 6), "c": normal(1)}):
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def copy_part(model, x):
    """`deepcopy` of one sibling"""
    return copy.deepcopy(model.a)(x), copy.copy(model)(x)


def replicate(model, x):
    """Replicas as `nn.DataParallel` makes them"""
    modules = list(model.modules())
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, twin in zip(modules, copies, strict=True):
        for name, child in module._modules.items():
            setattr(twin, name, copies[modules.index(child)])
        for name, parameter in module._parameters.items():
            if parameter is not None:
                setattr(twin, name, parameter.clone())
    return copies[0](x)


def in_threads(function, count=4):
    """What `function` gives in each of several threads that start at once."""
    results: list = [None] * count
    barrier = threading.Barrier(count)

    def run(number):
        barrier.wait()
        try:
            results[number] = function()
        except Exception as error:  # noqa: BLE001 - Errors are compared too.
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def share_among_threads(model, x):
    """Threads that share the model"""
    return in_threads(lambda: [model(x) for _ in range(20)])


def copy_for_threads(model, x):
    """A fresh copy whose first calls come from several threads at once"""
    copies = [copy.deepcopy(model) for _ in range(10)]
    return [in_threads(lambda twin=twin: twin(x)) for twin in copies]


def checkpointed(model, x, reentrant):
    drawn = x.clone().requires_grad_()
    outputs = checkpoint(model, drawn, use_reentrant=reentrant)
    sum(y.pow(2).sum() for y in outputs).backward()
    gradients = [model.get_parameter(f"{name}.weight").grad.clone() for name in "ab"]
    return outputs, drawn.grad, gradients


def checkpoint_model(model, x):
    """Activation checkpointing"""
    return checkpointed(model, x, reentrant=False)


def checkpoint_model_reentrant(model, x):
    """Reentrant activation checkpointing"""
    return checkpointed(model, x, reentrant=True)


def call_functionally(model, x):
    """`functional_call` with other parameters"""
    values = {name: 2 * value.detach() for name, value in model.named_parameters()}
    return torch.func.functional_call(model, values, (x,))


def vectorized_map(model, x):
    """`vmap`"""
    return torch.vmap(model)(x)


def jacobians(model, x):
    """`jacrev`, `jacfwd`, `grad` and `jvp`"""
    return (
        torch.func.jacrev(model)(x),
        torch.func.jacfwd(model)(x),
        torch.func.grad(lambda x: model(x)[0].pow(3).sum())(x),
        torch.func.jvp(model, (x,), (torch.ones_like(x),)),
    )


def forward_mode(model, x):
    """Forward-mode differentiation"""
    with torch.autograd.forward_ad.dual_level():
        outputs = model(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return [torch.autograd.forward_ad.unpack_dual(y).tangent for y in outputs]


def differentiate_twice(model, x):
    """Double backward"""
    x = x.clone().requires_grad_()
    total = sum(y.pow(3).sum() for y in model(x))
    (slope,) = torch.autograd.grad(total, x, create_graph=True)
    slope.pow(2).sum().backward()
    return slope, x.grad, [model.get_parameter(f"{name}.weight").grad.clone() for name in "ab"]


def gradient_of_input(model, x):
    """`torch.autograd.grad` with respect to the input and the weights"""
    x = x.clone().requires_grad_()
    y, z = model(x)
    return torch.autograd.grad(y.sum() + z.pow(2).sum(), x)


def autocast_around(model, x):
    """Autocast in bf16 around the model"""
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return model.float()(x.float()), model.double().training


def no_gradients_then_in_place(model, x):
    """Outputs computed without gradients, changed in place with them"""
    with torch.no_grad():
        y, _ = model(x)
    factor = torch.ones(3, dtype=x.dtype, requires_grad=True)
    y.mul_(factor).sum().backward()
    return factor.grad


def inference(model, x):
    """Inference mode around the model"""
    with torch.inference_mode():
        outputs = model(x)
    return outputs, [y.is_inference() for y in outputs]


def one_sibling_alone(model, x):
    """A sibling called by itself, twice, and the other after that"""
    return model.a(x), model.a(x), model.b(x), model.b(x)


def siblings_after_error(model, x):
    """A call that raises between those of the siblings"""
    y = model.a(x)
    try:
        model.b(x[:, :2])
    except RuntimeError as error:
        return y, model.b(x), str(error)


def siblings_after_change(model, x):
    """The input and the weights changed between direct calls"""
    with torch.no_grad():
        x, y = x.clone(), model.a(x)
        first = model.a(x)
        x.mul_(2)
        second = model.b(x), model.a(x)
        for parameter in model.parameters():
            parameter.mul_(0.5)
        return y, first, second, model.b(x)


def clear_gradients(model, x):
    """`zero_grad`, with zeros and with None"""
    for to_none in (False, True):
        sum(y.sum() for y in model(x)).backward()
        model.zero_grad(set_to_none=to_none)


def reset(model, x):
    """`reset_parameters` of a sibling"""
    model.a.reset_parameters()


def list_modules(model, x):
    """Names of the parameters of a sibling, children, state and attributes"""
    return (
        [name for name, _ in model.a.named_parameters()],
        [name for name, _ in model.named_children()],
        list(model.state_dict()),
        [model.a.in_features, model.a.out_features, model.a.weight.shape],
        [isinstance(layer, nn.Linear) for layer in (model.a, model.b)],
    )


# What looks like no change, and what goes deeper.


def change_nothing(model, x):
    """Conversions and assignments that change nothing"""
    layer = model.a.requires_grad_(True).cpu().double().to(x.dtype)
    layer.in_features = layer.in_features
    layer.weight = layer.weight
    return layer is model.a


def freeze_listed(model, x):
    """The parameters of a sibling frozen one by one"""
    for parameter in model.a.parameters():
        parameter.requires_grad = False


def wrap_forward(model, x):
    """`layer.forward` wrapped in a function that calls the old one"""
    old = model.a.forward
    model.a.forward = lambda x: old(x) * 2
    return model(x)


def patch_classes(model, x):
    """The forwards of the classes replaced for a while"""
    outputs = []
    for cls in (nn.Linear, type(model).__mro__[-3]):
        with unittest.mock.patch.object(cls, "forward", lambda self, x: x * 2):
            outputs.append(model(x))
    return outputs


def replace_function(model, x):
    """A global function replaced for a while"""
    with unittest.mock.patch.dict(globals(), {"identical": torch.neg}):
        return model(x)


def hook_all_modules(model, x):
    """Hooks on all modules of the process"""
    seen = []

    def double(module, args, output):
        seen.append(type(module).__name__)
        return output * 2 if isinstance(module, nn.Linear) else None

    handle = nn.modules.module.register_module_forward_hook(double)
    try:
        return model(x), sorted(seen)
    finally:
        handle.remove()


def delete_bias(model, x):
    """A bias deleted, and registered anew"""
    del model.a.bias
    model.a.register_parameter("bias", None)
    model.b.register_parameter("weight", nn.Parameter(torch.ones(5, 6, dtype=x.dtype)))


def add_to_layer(model, x):
    """A module and a parameter added to a sibling"""
    model.a.add_module("low_rank", nn.Linear(6, 2).double())
    model.b.register_parameter("scale", nn.Parameter(torch.ones(1)))
    return [[name for name, _ in layer.named_parameters()] for layer in (model.a, model.b)]


def make_another(model, x):
    """Another layer made of a sibling's type"""
    return type(model.a)(6, 2).double()(x).shape


def assign_wrong_gradient(model, x):
    """Gradients that do not fit, in PyTorch's own words"""
    messages = []
    for gradient in (torch.ones(1), torch.ones(3, 6), "text"):
        try:
            model.a.weight.grad = gradient
        except (RuntimeError, TypeError) as error:
            messages.append(str(error))
    return messages


def keep_variables(model, x):
    """`state_dict(keep_vars=True)`"""
    sum(y.sum() for y in model(x)).backward()
    state = model.state_dict(keep_vars=True)
    return [(isinstance(p, nn.Parameter), p.requires_grad, p.grad) for p in state.values()]


def gradient_of_weights(model, x):
    """`torch.autograd.grad` with respect to weights of siblings"""
    y, z = model(x)
    weights = model.a.weight, model.b.bias, model.b.weight
    return torch.autograd.grad(y.sum() + z.pow(3).sum(), weights)


def prune_later(model, x):
    """Pruning, later"""
    prune.l1_unstructured(model.a, "weight", 0.5)
    outputs = model(x)
    prune.remove(model.a, "weight")
    return outputs


def multiply_all(model, x):
    """`_apply` of a function that must be applied once"""
    model._apply(lambda tensor: tensor * 2)


def checkpoint_each(model, x):
    """A checkpoint around each sibling, many times"""
    layers = model.a, model.b
    for _ in range(12):
        drawn = x.clone().requires_grad_()
        sum(checkpoint(layer, drawn, use_reentrant=False).sum() for layer in layers).backward()
    return drawn.grad


def wait_in_vain(model, x):
    """A checkpoint around one sibling, and the other called beside it, many times"""
    for _ in range(12):
        drawn = x.clone().requires_grad_()
        y = checkpoint(model.a, drawn, use_reentrant=False)
        (y.sum() + model.b(drawn).sum()).backward()
    return drawn.grad


# The same, of a module that holds some of the siblings.


def freeze_branch(model, x):
    """`requires_grad_(False)` on a module that holds one of the siblings"""
    model.a.requires_grad_(False)
    sum(y.pow(2).sum() for y in model(x)).backward()
    return [p.grad for p in model.a.parameters()], [p.requires_grad for p in model.b.parameters()]


def freeze_parameters(model, x):
    """`requires_grad = False` on the parameters of a module that holds one of the siblings"""
    for parameter in model.b.parameters():
        parameter.requires_grad = False


def freeze_and_thaw_branch(model, x):
    """A branch frozen and thawed while its optimizer goes on"""
    optimizer = torch.optim.SGD(model.b.parameters(), 0.01, momentum=0.9)
    for flag in (True, False, True):
        model.b.requires_grad_(flag)
        optimizer.zero_grad()
        sum(y.pow(2).sum() for y in model(x)).backward()
        optimizer.step()


def train_branches(model, x):
    """An optimizer for each branch, as for actor and critic"""
    optimizers = [
        torch.optim.Adam(model.a.parameters(), 0.01),
        torch.optim.SGD(model.b.parameters(), 0.1, momentum=0.9, weight_decay=0.1),
    ]
    for step in range(4):
        optimizer = optimizers[step % 2]
        optimizer.zero_grad()
        model(x)[step % 2].pow(2).sum().backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.1)
        optimizer.step()
    return [list(optimizer.state_dict()["state"]) for optimizer in optimizers]


def train_one_branch(model, x):
    """An optimizer for one branch, which leaves the others as they are"""
    optimizer = torch.optim.AdamW(model.a.parameters(), 0.01, foreach=True)
    for _ in range(3):
        optimizer.zero_grad()
        sum(y.pow(2).sum() for y in model(x)).backward()
        optimizer.step()


def convert_then_train(model, x):
    """An optimizer for one branch that was built before the model was converted"""
    optimizer = torch.optim.SGD(model.a.parameters(), 0.1)
    model.float().double()
    sum(y.pow(2).sum() for y in model(x)).backward()
    optimizer.step()


def penalize_branch(model, x):
    """A penalty on the parameters of a branch"""
    model.zero_grad()
    penalty = sum(parameter.pow(2).sum() for parameter in model.b.parameters())
    (penalty + model(x)[0].sum()).backward()
    return [parameter.grad for parameter in model.b.parameters()]


def clear_branch(model, x):
    """`zero_grad` of a branch"""
    sum(y.sum() for y in model(x)).backward()
    model.b.zero_grad()
    return [parameter.grad for parameter in model.a.parameters()]


def initialize_branch(model, x):
    """A branch initialized, by its parameters and by its modules"""
    for parameter in model.a.parameters():
        nn.init.normal_(parameter)
    for module in model.b.modules():
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight)


def look_at_branch(model, x):
    """A branch's parameters: their number, shapes, leaves, names and identity"""
    listed = list(model.a.parameters())
    return (
        [(p.shape, p.is_leaf, p.grad_fn, p.requires_grad) for p in listed],
        [p is q for p, q in zip(listed, model.a.parameters(), strict=True)],
        [len({id(p) for p in model.a.parameters()} - {id(p) for p in listed})],
        [isinstance(p, nn.Parameter) for p in listed],
        list(model.a.state_dict()),
    )


def copy_branch(model, x):
    """`deepcopy` of a branch"""
    branch = copy.deepcopy(model.a)
    optimizer = torch.optim.SGD(branch.parameters(), 0.1)
    branch(x).pow(2).sum().backward()
    optimizer.step()
    return branch(x), [parameter.shape for parameter in branch.parameters()]


def average_branch(model, x):
    """A branch that follows another one by a moving average"""
    average = copy.deepcopy(model.a)
    for ours, theirs in zip(average.parameters(), model.a.parameters(), strict=True):
        ours.data.mul_(0.9).add_(theirs.data, alpha=0.1)
    return average(x)


def convert_branch(model, x):
    """One branch converted to another dtype"""
    model.a.float()
    y = model.a(x.float())
    return y, [parameter.dtype for parameter in model.b.parameters()]


def tie_weights(model, x):
    """A weight tied to one of another branch, and to one of a layer elsewhere"""
    other = nn.Linear(6, 4).double()
    other.weight = model.b["c"].weight = model.a[0].weight
    both = nn.ModuleList([model, other])
    optimizer = torch.optim.SGD(both.parameters(), 0.01, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        (sum(y.pow(2).sum() for y in model(x)) + other(x).pow(2).sum()).backward()
        optimizer.step()
    return other.weight, other.bias.grad


def optimize_again(model, x):
    """A part optimized first, or once more, and the whole after that"""
    plain = conjoin.unfuse(model)
    conjoin.optimize(plain.b, inplace=True)
    outputs = conjoin.optimize(plain, (x,), inplace=True)(x)
    return outputs, conjoin.optimize(conjoin.optimize(model, (x,)))(x)


@dataclasses.dataclass(frozen=True)
class Hazard:
    """One row of the table.

    Attributes:
        subject: the awkward model's class, or what is done to a model after `optimize`; its
            docstring is the hazard.
        naive: what plain symbolic tracing or naive fusion does to it.
        outcome: EXACT, or the reason why the siblings are left apart.
        inputs: the arguments and keyword arguments of the call of this number.
        models: the classes of the models that something is done to after `optimize`.
        kinds: the kinds of layer that are merged.
    """

    subject: Callable
    naive: str
    outcome: Reason | None = EXACT
    inputs: Callable[[int], tuple] = rows
    models: tuple[type[nn.Module], ...] = (TwoHeads, Undecided)
    kinds: tuple[conjoin.Kind, ...] = conjoin.KINDS

    @property
    def name(self):
        return self.subject.__name__


FROZEN = "frozen at trace time"
ONCE = "happens once, at trace time"
GONE = "vanishes from the graph"
RAISES = "tracing raises"
GIVEN = "a Proxy is never None, so it is traced as given"
STRIDES = "a slice along channels is not contiguous"
STALE = "the second sibling gets what was computed before the change"
UNSEEN = "the change is hidden from the graph"
LOST = "the wide layer does not know of it"
WRONG = "the wide layer computes something else"
SHARED = "what is done to one branch is done to the other"
COPY = "a copy in a GraphModule does not follow"
SPLIT = "the wide layer is not the sibling alone"

HAZARDS = (
    Hazard(TwoHeads, "nothing: the plain case"),
    Hazard(Undecided, RAISES),
    Hazard(Branches, "no module holds the wide layer and each branch"),
    Hazard(HiddenHeads, "no two layers read the same tensor"),
    Hazard(HiddenInputChanged, STALE, Reason.INPUT_MUTATED),
    Hazard(HiddenOutputChanged, STALE, Reason.INPUT_MUTATED),
    Hazard(HiddenInPlace, STALE, Reason.INPUT_MUTATED),
    Hazard(HiddenNoGrad, GONE, Reason.CALLED_APART),
    Hazard(HiddenCheckpointed, "runs every sibling once for each"),
    Hazard(TrainingBranch, FROZEN),
    Hazard(TrainingFactor, FROZEN),
    Hazard(FunctionalDropout, FROZEN),
    Hazard(NestedFlag, FROZEN),
    Hazard(NestedMethod, FROZEN),
    Hazard(NoGradAround, GONE),
    Hazard(NoGradAroundOne, GONE, Reason.CALLED_APART),
    Hazard(InferenceModeAroundOne, GONE, Reason.CALLED_APART),
    Hazard(AutocastAround, GONE, inputs=single_rows),
    Hazard(AutocastAroundOne, GONE, Reason.CALLED_APART, single_rows),
    Hazard(GradModeSet, GONE, Reason.CALLED_APART),
    Hazard(GradModeRead, FROZEN),
    Hazard(FreshNoise, "the same noise for ever"),
    Hazard(NoiseOfShape, "the same noise for ever"),
    Hazard(FreshBuffer, "a stored constant that grows"),
    Hazard(PythonsRandom, ONCE),
    Hazard(NumpysRandom, ONCE),
    Hazard(SeedInside, ONCE),
    Hazard(DropoutBetween, "dropout above the split draws another random stream"),
    Hazard(Counter, ONCE),
    Hazard(InheritedCounter, ONCE),
    Hazard(CountingObject, "the object counts once, at trace time"),
    Hazard(SharedObject, "the object counts once, at trace time"),
    Hazard(KeptAndRead, "a Proxy is left on the module"),
    Hazard(DistributionChanged, "the mean is no tensor of the graph"),
    Hazard(KeptOutput, "a Proxy is left on the module"),
    Hazard(BufferUpdated, "a Proxy is left in a buffer"),
    Hazard(BatchNorms, "running statistics of the wide layer are lost", inputs=images),
    Hazard(CachedByFunction, "a Proxy or a fake tensor stays in the cache"),
    Hazard(CachedInGlobal, "a Proxy or a fake tensor stays there"),
    Hazard(CachedInClass, "a Proxy or a fake tensor stays there"),
    Hazard(CachedInClosure, "a Proxy or a fake tensor stays there"),
    Hazard(KeptInObject, "Proxies are left in them"),
    Hazard(DefaultDtypeSet, "stays set, where tracing breaks off"),
    Hazard(ModeEnteredByHand, "stay on, where tracing breaks off"),
    Hazard(MappedInside, RAISES),
    Hazard(ShapeBranch, FROZEN),
    Hazard(ShapeArithmetic, FROZEN, inputs=even_rows),
    Hazard(ShapeUnpacked, RAISES),
    Hazard(ValueBranch, RAISES),
    Hazard(LoopOnValue, RAISES),
    Hazard(TypeBranch, "a Proxy is no tensor: the other branch"),
    Hazard(NoneTest, FROZEN),
    Hazard(DtypeTest, FROZEN),
    Hazard(ShapeInKey, "a Proxy's name in the key"),
    Hazard(Looked, "a Proxy is in no dictionary: the default"),
    Hazard(SetOfShape, "Proxies are all different"),
    Hazard(Assertion, GONE, inputs=right_and_wrong_widths),
    Hazard(WrongInput, "the error speaks of the wide layer", inputs=right_and_wrong_widths),
    Hazard(Caught, "the handler never runs"),
    Hazard(EarlyReturn, FROZEN, Reason.CALLED_APART),
    Hazard(Generated, "the generator runs at trace time"),
    Hazard(Recursive, "three runs of one wide layer are taken for one"),
    Hazard(Children, "the wide layer is one child more"),
    Hazard(OwnAttribute, ONCE),
    Hazard(OwnCall, "is not run, or once"),
    Hazard(OwnIteration, FROZEN),
    Hazard(LiveProperty, ONCE),
    Hazard(InsideCheckpoint, GONE),
    Hazard(InsideReentrantCheckpoint, GONE),
    Hazard(GradientInside, RAISES),
    Hazard(BackwardBetween, "frees the graph of the wide layer"),
    Hazard(StepBetween, "the second runs with the old weights", Reason.PARAMETERS_CHANGED),
    Hazard(OptionalArgument, GIVEN, inputs=with_or_without_mask),
    Hazard(DefaultArgument, FROZEN, inputs=with_or_without_mask),
    Hazard(KeywordOnly, GIVEN, inputs=with_or_without_keyword),
    Hazard(StarredArguments, FROZEN, inputs=one_or_two_tensors),
    Hazard(ListArgument, "the Proxy stands for the list", inputs=listed_rows),
    Hazard(DictOutput, "numbers and strings become Proxies"),
    Hazard(NamedTupleOutput, "the class is lost"),
    Hazard(DataclassOutput, RAISES),
    Hazard(BranchLeftOut, "no gradient becomes a gradient of zeros"),
    Hazard(InPlaceOnOutputs, "raises under autograd on what `split` gives"),
    Hazard(InPlaceModule, "raises under autograd on what `split` gives"),
    Hazard(InPlaceAfterSaving, "`unsafe_split` hides the error"),
    Hazard(ElementSet, "fails in backward on what `narrow` gives"),
    Hazard(InPlaceThroughView, "changes the other sibling's part, or raises"),
    Hazard(InPlaceThroughReshape, "`reshape` of a slice copies, and the change is lost"),
    Hazard(InPlaceThroughContiguous, "`contiguous` of a slice copies, and the change is lost"),
    Hazard(Viewed, STRIDES),
    Hazard(ViewedByTorch, STRIDES),
    Hazard(Strided, STRIDES),
    Hazard(StrideRead, STRIDES),
    Hazard(ContiguityRead, STRIDES),
    Hazard(OwnFunction, STRIDES),
    Hazard(OwnOperator, STRIDES),
    Hazard(AtenViewed, STRIDES),
    Hazard(ViewedByKeyword, "the result is a copy of a slice, and the change is lost"),
    Hazard(ViewedAfterIdentity, STRIDES),
    Hazard(
        FlattenedByModule, "the result is a copy of a slice, and the change is lost", inputs=images
    ),
    Hazard(FilledWithNoise, "in a slice, the numbers come in another order"),
    Hazard(Resized, "the other sibling's part is overwritten"),
    Hazard(ViewedInOneMode, STRIDES),
    Hazard(InputChangedByMethod, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedAndTrained, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedByOperator, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedByElement, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedByFunction, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedThroughView, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedThroughSlice, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedThroughAlias, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedByOut, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedByForeach, STALE),
    Hazard(InputChangedByOverload, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedByModule, STALE, Reason.INPUT_MUTATED),
    Hazard(InputChangedByOpaque, UNSEEN, Reason.INPUT_MUTATED),
    Hazard(InputChangedByFunctionClass, UNSEEN, Reason.INPUT_MUTATED),
    Hazard(InputChangedThroughData, UNSEEN, Reason.INPUT_MUTATED),
    Hazard(InputChangedThroughNumpy, UNSEEN, Reason.INPUT_MUTATED),
    Hazard(InputOnOthersMemory, UNSEEN, Reason.INPUT_MUTATED),
    Hazard(InputGivenOthersMemory, UNSEEN, Reason.INPUT_MUTATED),
    Hazard(InputChangedByEarlierNumpy, UNSEEN, Reason.INPUT_MUTATED),
    Hazard(TiedWeight, "the tie is cut", Reason.SHARED_PARAMETER),
    Hazard(SharedMemory, "the tie is cut", Reason.SHARED_PARAMETER),
    Hazard(KeptMemory, "the tensor goes stale", Reason.SHARED_PARAMETER),
    Hazard(TwoNames, "merged with itself"),
    Hazard(HiddenLayer, "the layer in the list goes stale"),
    Hazard(CalledTwice, "the parts of two runs are mixed"),
    Hazard(TreeOfCalls, "the parts of two runs are mixed"),
    Hazard(OneCalledTwice, "the wide layer runs for one part", Reason.CALLED_APART),
    Hazard(FrozenOne, "the frozen sibling trains", Reason.DIFFERENT_REQUIRES_GRAD),
    Hazard(FrozenBiases, "the frozen biases train"),
    Hazard(BiasOnSome, "the missing bias trains"),
    Hazard(BiasOnOne, "the missing bias trains", Reason.BIAS_ON_SOME),
    Hazard(TwoDtypes, "promotes one of them", Reason.DIFFERENT_DTYPE, indices),
    Hazard(TwoDevices, "`cat` raises", Reason.DIFFERENT_DEVICE),
    Hazard(Lazy, "there is no weight to merge yet", Reason.UNINITIALIZED),
    Hazard(MadeFromLazy, "nothing: they are plain layers by now"),
    Hazard(GroupedQueries, "`chunk` cuts in equal parts"),
    Hazard(NoWidth, "an empty block"),
    Hazard(ForwardHook, "never runs", Reason.HOOKS),
    Hazard(HookOnContainer, "never runs"),
    Hazard(Parametrized, LOST, Reason.PARAMETRIZED),
    Hazard(WeightNorm, LOST, Reason.PARAMETRIZED),
    Hazard(SpectralNorm, "the buffer stays as it was", Reason.PARAMETRIZED),
    Hazard(Pruned, LOST, Reason.PARAMETRIZED),
    Hazard(Subclassed, LOST, Reason.OWN_FORWARD),
    Hazard(SubclassedCall, LOST, Reason.OWN_FORWARD),
    Hazard(SubclassedInside, LOST, Reason.OWN_FORWARD, images),
    Hazard(OwnHeads, "has no kind for them", kinds=OWN_KINDS),
    Hazard(SubclassedForMore, "the parameter is lost"),
    Hazard(Patched, LOST, Reason.OWN_FORWARD),
    Hazard(OwnParameter, "the class is lost", Reason.CUSTOM_PARAMETER),
    Hazard(Quantized, "has no kind for them", inputs=single_rows),
    Hazard(QuantizationAware, LOST, Reason.OWN_FORWARD, single_rows),
    Hazard(Adapted, "frozen and trained weights in one"),
    Hazard(Grouped, WRONG, inputs=images),
    Hazard(GroupedTransposed, WRONG, Reason.GROUPED, images),
    Hazard(TwoKernelSizes, WRONG, Reason.DIFFERENT_SETTINGS, images),
    Hazard(SpelledInTwoWays, "a comparison tells them apart", inputs=images),
    Hazard(Padded, STRIDES, inputs=images),
    Hazard(Transposed, "the output size is lost", inputs=images),
    Hazard(RenormedRows, WRONG, Reason.UNSUPPORTED_OPTION, indices),
    Hazard(PaddedRows, "the row gets a gradient", inputs=indices),
    Hazard(WeightPenalty, "a stale copy of the weight gets the gradient"),
    Hazard(WeightUsedElsewhere, "a stale copy of the weight is used"),
    Hazard(WeightInList, "stale copies get the gradient", Reason.SHARED_PARAMETER),
    Hazard(ParameterLoop, "counts the weights twice, or not at all", Reason.PARAMETERS_LISTED),
    Hazard(OptimizerInside, "the optimizer trains what is used no more", Reason.SHARED_PARAMETER),
    Hazard(WeightInPartial, "stale copies get the gradient", Reason.SHARED_PARAMETER),
    Hazard(
        NormsOfParameters, "the norm of both siblings' weights at once", Reason.PARAMETERS_LISTED
    ),
    Hazard(CountOfModules, "the wide layer is one module more", Reason.PARAMETERS_LISTED),
    Hazard(FirstParameter, "nothing: all that is asked for is the same"),
    Hazard(GradientOfWeight, "the slice is not what the output was computed from"),
    Hazard(TargetUpdated, "backward takes it for a change of both", Reason.PARAMETERS_CHANGED),
    Hazard(FrozenInside, "both are frozen"),
    Hazard(NumbersOfNumpy, "generated code has no name for them"),
    Hazard(Unpacked, "what is left over is dropped", inputs=two_or_three_parts),
    Hazard(PartialForward, FROZEN),
    Hazard(WeightIsParameter, "a slice is no Parameter"),
    Hazard(RawWeights, "a graph has no layers to merge"),
    Hazard(RawWeightsInLists, "a graph has no layers to merge"),
    Hazard(RawWeightPenalized, "the Parameter is gone", Reason.PARAMETERS_READ),
    Hazard(RawWeightPenalizedInTraining, "the Parameter is gone"),
    Hazard(RawWeightUpdated, "backward takes it for a change of both", Reason.PARAMETERS_CHANGED),
    Hazard(ForwardDirectly, "a graph has calls of layers only"),
    Hazard(ManyDimensions, "splits along another dimension", inputs=many_rows),
    Hazard(OneDimension, "splits along the batch", inputs=one_row),
    Hazard(EmptyBatch, "nothing to run", inputs=no_rows),
    Hazard(ChannelsLast, "the memory format is lost", inputs=channels_last_images),
    Hazard(SparseInput, "a sparse tensor has no slices"),
    Hazard(ComplexInput, "the gradients' conjugates"),
)
"""The models."""

LIFE = (
    *(
        Hazard(subject, LOST)
        for subject in (
            freeze_one,
            freeze_weight,
            freeze_and_thaw,
            initialize,
            halve_own_parameters,
            assign_data,
            assign_weight,
            assign_gradient,
            train_steps,
            vectorize,
            clear_gradients,
            reset,
            change_nothing,
            freeze_listed,
            delete_bias,
            add_to_layer,
            make_another,
            assign_wrong_gradient,
            keep_variables,
            gradient_of_weights,
            prune_later,
            multiply_all,
            wrap_forward,
            patch_classes,
            replace_function,
            hook_all_modules,
            hook_weight,
            hook_layers,
            hook_state,
        )
    ),
    *(
        Hazard(subject, COPY)
        for subject in (
            capture,
            replace,
            delete,
            patch,
            change_part,
            to_single_and_back,
            one_to_single,
            to_meta_and_back,
            load,
            load_assigning,
            load_some,
            load_wrongly,
            list_modules,
            copy_part,
            replicate,
        )
    ),
    *(
        Hazard(subject, SPLIT)
        for subject in (
            share_among_threads,
            copy_for_threads,
            checkpoint_model,
            checkpoint_model_reentrant,
            checkpoint_each,
            wait_in_vain,
            call_functionally,
            vectorized_map,
            jacobians,
            forward_mode,
            differentiate_twice,
            gradient_of_input,
            autocast_around,
            no_gradients_then_in_place,
            inference,
            one_sibling_alone,
            siblings_after_error,
            siblings_after_change,
        )
    ),
    Hazard(replace_activation, COPY, models=(HiddenHeads,)),
    Hazard(hook_activation, LOST, models=(HiddenHeads,)),
    *(
        Hazard(subject, SHARED, models=(Branches,))
        for subject in (
            freeze_branch,
            freeze_parameters,
            freeze_and_thaw_branch,
            train_branches,
            train_one_branch,
            convert_then_train,
            penalize_branch,
            clear_branch,
            initialize_branch,
            look_at_branch,
            copy_branch,
            average_branch,
            convert_branch,
            tie_weights,
            optimize_again,
        )
    ),
)
"""What may be done to an optimized model."""
