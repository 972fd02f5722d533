"""Products with neighbouring slices of one weight become one."""

import copy
import operator

import pytest
import torch
from equivalence import assert_close
from torch import fx, nn
from torch.nn import functional as F

import conjoin
from conjoin.graph.functional import PRODUCTS
from conjoin.passes import Rejoin


class Sliced(nn.Module):
    """What the views of a wide layer compute, as functions."""

    def __init__(self, function, rows, weight, bias=True, **settings):
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.randn(weight.shape[0])) if bias else None
        self.function, self.rows, self.settings = function, rows, settings

    def forward(self, x):
        outputs = []
        for start, size in self.rows:
            weight = self.weight.narrow(0, start, size)
            bias = None if self.bias is None else self.bias.narrow(0, start, size)
            outputs.append(self.function(x, weight, bias, **self.settings).tanh())
        return outputs


def rewritten(model):
    traced = fx.symbolic_trace(model)
    changed = Rejoin()(traced).modified
    traced.recompile()
    traced.graph.lint()
    return traced, changed


def products(traced):
    return sum(node.target in PRODUCTS for node in traced.graph.nodes)


def assert_same(model, x):
    traced, _ = rewritten(model)
    x = x.double()
    for index, (ours, theirs) in enumerate(zip(traced(x), model(x), strict=True)):
        assert_close({index: ours}, {index: theirs})
    wanted = torch.autograd.grad(sum(y.square().sum() for y in model(x)), model.weight)
    found = torch.autograd.grad(sum(y.square().sum() for y in traced(x)), traced.weight)
    assert_close({"weight": found[0]}, {"weight": wanted[0]})
    return traced


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(0, 2), (2, 4), (6, 1)], 1),
        ([(2, 4), (6, 1), (0, 2)], 1),
        ([(0, 2), (2, 2)], 1),
        ([(1, 2), (3, 2)], 1),
        ([(0, 2), (3, 2)], 2),
        ([(0, 2), (0, 2)], 2),
        ([(0, 2), (2, 2), (5, 1), (6, 1)], 2),
        ([(0, 2), (1, 3)], 2),
    ],
)
def test_linear(rows, expected, bias):
    model = Sliced(F.linear, rows, torch.randn(7, 3), bias).double()
    assert products(assert_same(model, torch.randn(4, 3))) == expected


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions(dimensions):
    function = (torch.conv1d, torch.conv2d, torch.conv3d)[dimensions - 1]
    weight = torch.randn(5, 3, *[2] * dimensions)
    model = Sliced(function, [(0, 2), (2, 3)], weight, stride=2, padding=1).double()
    assert products(assert_same(model, torch.randn(2, 3, *[5] * dimensions))) == 1


@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_transposed_convolutions(dimensions):
    function = getattr(torch, f"conv_transpose{dimensions}d")

    def forward(m, x):
        made = []
        for start, width in ((0, 2), (2, 3), (5, 1)):
            weight = m.w.narrow(0, start * size, width * size)
            kernel = (2,) * dimensions
            made.append(function(x, weight.view(3, width, *kernel), stride=2).tanh())
        return made

    size = 3 * 2**dimensions
    model = Mixed(forward, torch.randn(6 * size)).double()
    traced, changed = rewritten(model)
    x = torch.randn(2, 3, *[4] * dimensions).double()
    assert changed
    assert products(traced) == 1
    assert_close(dict(enumerate(traced(x))), dict(enumerate(model(x))))


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({}, True),
        ({"padding_idx": 1}, True),
        ({"padding_idx": -1}, False),
        ({"max_norm": 1.0}, False),
        ({"scale_grad_by_freq": True}, False),
    ],
)
def test_tables(options, alike):
    def forward(m, x):
        tables = [m.w.narrow(0, 12 * i, 12).view(4, 3) for i in range(3)]
        return [F.embedding(x, table, **options) for table in tables]

    model = Mixed(forward, torch.randn(36)).double()
    traced, changed = rewritten(model)
    assert changed == alike
    x = torch.randint(4, (2, 5))
    assert_close(dict(enumerate(traced(x))), dict(enumerate(model(x))))
    found, wanted = (
        torch.autograd.grad(sum((y * y).sum() for y in each(x)), each.w)[0].to_dense()
        for each in (traced, model)
    )
    assert_close({"w": found}, {"w": wanted})
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|DATA bounds)"):
        traced(x + 4)


def test_groups_stay_apart_where_the_input_is_not_known():
    weight = torch.randn(6, 1, 3)
    model = Sliced(torch.conv1d, [(0, 3), (3, 3)], weight, groups=3).double()
    assert products(assert_same(model, torch.randn(2, 3, 5))) == 2


class Mixed(nn.Module):
    """Products that lack something."""

    def __init__(self, forward, weight=None):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3) if weight is None else weight)
        self.b = nn.Parameter(torch.randn(4))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


def _changed(m, x):
    y = F.linear(x, m.w.narrow(0, 0, 2)).tanh()
    x.mul_(2)
    return y, F.linear(x, m.w.narrow(0, 2, 2)).tanh()


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (
            F.linear(x, m.w.narrow(0, 0, 2), m.b.narrow(0, 0, 2)).tanh(),
            F.linear(x, m.w.narrow(0, 2, 2)).tanh(),
        ),
        lambda m, x: (
            F.linear(x, m.w.narrow(0, 0, 2), m.b.narrow(0, 2, 2)).tanh(),
            F.linear(x, m.w.narrow(0, 2, 2), m.b.narrow(0, 0, 2)).tanh(),
        ),
        lambda m, x: (
            F.linear(x, m.w.narrow(0, 0, 2)).tanh(),
            F.linear(x + 1, m.w.narrow(0, 2, 2)).tanh(),
        ),
        _changed,
        # How these outputs lie in memory is not known here, so no part can be made like them.
        lambda m, x: (F.linear(x, m.w.narrow(0, 0, 2)), F.linear(x, m.w.narrow(0, 2, 2))),
    ],
    ids=["one bias", "crossed biases", "two inputs", "changed between", "leave the graph"],
)
def test_what_differs_stays_apart(forward):
    traced, changed = rewritten(Mixed(forward))
    assert not changed
    assert products(traced) == 2


def test_parts_may_be_changed_in_place():
    def forward(m, x):
        y, z = F.linear(x, m.w.narrow(0, 0, 2)), F.linear(x, m.w.narrow(0, 2, 2))
        return (y.relu_() + operator.iadd(z, 1)).tanh()

    model = Mixed(forward).double()
    traced, changed = rewritten(model)
    x = torch.randn(5, 3).double()
    assert changed
    assert_close({"y": traced(x)}, {"y": model(x)})
    traced(x).sum().backward()


class OneChannel(nn.Module):
    """What is joined lies as its first part does, which has one channel and so several formats."""

    def __init__(self):
        super().__init__()
        self.one, self.more = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        if x.shape[0] > 9:
            return x, x
        one = self.one(x)
        joined = torch.cat([one, self.more(x).relu_()], 1)
        return one, joined, joined.as_strided((4,), (1,))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_copied_part_of_one_channel_has_its_strides(memory_format):
    torch.manual_seed(0)
    model = OneChannel().double()
    x = torch.randn(3, 4, 2, 3).double().contiguous(memory_format=memory_format)
    fused = conjoin.optimize(copy.deepcopy(model), (x,), policy="always")
    torch.compiler.reset()
    compiled = torch.compile(fused, backend="conjoin", options={"backend": "eager"})
    made, expected = compiled(x), model(x)
    assert_close(dict(enumerate(made)), dict(enumerate(expected)))
    assert [each.stride() for each in made] == [each.stride() for each in expected]
