"""Under `torch.compile`, splits move only to joints, and go with them."""

import copy
import warnings

import pytest
import torch
from compiled import Inner, assert_same_compiled
from torch import nn
from torch.nn import functional as F

from conjoin.compiling import PreGradPass
from conjoin.layers import kind_of
from conjoin.layers.fusing import fuse


class Branches(nn.Module):
    """Layers on one tensor, of which some are merged, behind a branch on values."""

    def __init__(self, layers, end):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.end = end

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        return self.end([layer(x) for layer in self.layers], x)


def linears(*widths):
    return [nn.Linear(6, width) for width in widths]


def convolutions(*widths):
    return [nn.Conv2d(4, width, 1) for width in widths]


def check(layers, end, calls, *, merged=None, grad=True, **options):
    """The compiled function is the plain one; the inner backend with what it was given."""
    torch.manual_seed(0)
    plain = Branches(layers, end).double()
    fused = copy.deepcopy(plain)
    among = [*fused.layers[slice(0, merged)]]
    fuse(kind_of(among[0]), among, fused)
    return assert_same_compiled(fused, calls, plain=plain, grad=grad, **options)


def rows(*sizes, grad=False):
    return [(torch.randn(*n, 6).double().requires_grad_(grad),) for n in sizes or [(3,), (5,)]]


def images(memory_format=torch.contiguous_format):
    return [
        (torch.randn(n, 4, 5, 5).double().contiguous(memory_format=memory_format),) for n in (3, 5)
    ]


def joined(*steps, dim=-1):
    """The function that does these steps to each branch and joins them."""

    def end(made, x):
        for step in steps:
            made = [step(each) for each in made]
        return torch.cat(made, dim) * 2

    return end


TAKEN_OUT = {
    "nothing between": (linears(4, 2, 3), joined(), rows()),
    "an activation": (linears(4, 2, 3), joined(F.relu), rows()),
    "several": (linears(4, 2), joined(F.gelu, lambda y: y * 3, torch.sigmoid), rows()),
    "in place": (linears(4, 2), joined(F.relu_), rows()),
    "more dimensions": (linears(4, 2), joined(torch.tanh), rows((2, 3), (4, 3))),
    "softmax of each": (linears(4, 4), joined(lambda y: y.softmax(-1)), rows()),
    "images": (convolutions(4, 2, 3), joined(F.silu, dim=1), images()),
    "pooled": (convolutions(4, 2), joined(lambda y: F.max_pool2d(y, 2), dim=1), images()),
    "channels last": (convolutions(4, 2), joined(F.relu, dim=1), images(torch.channels_last)),
}
"""Layers, what joins them, and what they are called with."""


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("layers", "end", "calls"), TAKEN_OUT.values(), ids=TAKEN_OUT)
def test_a_joint_goes_with_its_split(layers, end, calls, grad):
    inner = check(copy.deepcopy(layers), end, calls, grad=grad, dynamic=True)
    assert inner.count("cat", "unsafe_split_with_sizes", "getitem") == {0}
    assert inner.count("linear", "conv2d") == {0, 1}


STAY = {
    "no joint": (linears(4, 4), lambda made, x: made[0].relu() * made[1].relu(), rows()),
    "unlike": (
        linears(4, 4),
        lambda made, x: torch.cat([made[0].sin(), made[1].cos()], -1),
        rows(),
    ),
    "another dimension": (linears(4, 4), joined(F.relu, dim=0), rows()),
    "another order": (linears(4, 4), lambda made, x: torch.cat(made[::-1], -1), rows()),
    "twice": (linears(4, 4), lambda made, x: torch.cat([*made, made[0]], -1), rows()),
    "read elsewhere": (
        linears(4, 4),
        lambda made, x: (torch.cat(made, -1), made[0].sin()),
        rows(),
    ),
    "drawn": (linears(4, 4), joined(lambda y: y + torch.ones_like(y)), rows()),
}
"""Where it stays, and so do the splits."""


@pytest.mark.parametrize(("layers", "end", "calls"), STAY.values(), ids=STAY)
def test_where_no_joint_goes_nothing_moves(layers, end, calls):
    inner = check(copy.deepcopy(layers), end, calls)
    assert inner.count("unsafe_split_with_sizes") == {0, 1}
    assert inner.count("relu", "sin", "cos", "add") <= {0, 1, 2}


def stacked(dim, *steps):
    def end(made, x):
        for step in steps:
            made = [step(each) for each in made]
        return torch.stack(made, dim).mul(2).sum(dim)

    return end


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_a_stack_of_parts(dim):
    inner = check(linears(4, 4, 4), stacked(dim, F.gelu), rows())
    assert inner.count("stack") == {0}
    assert inner.count("unsafe_split_with_sizes") == {0}
    assert inner.count("gelu") == {0, 1}


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y,
        lambda y: y.view(-1).sin(),
        lambda y: (y * 2).view(-1).sin(),
        lambda y: y.transpose(0, 1),
        lambda y: y.exp(),
    ],
    ids=["leaves", "viewed", "viewed behind", "turned", "strides that go on"],
)
def test_a_stack_that_lies_in_another_way_only_where_nobody_can_tell(read):
    inner = check(linears(4, 4), lambda made, x: read(torch.stack(made)), rows())
    assert inner.count("stack") == {0, 1}


def test_a_stack_that_is_multiplied():
    inner = check(linears(4, 4), lambda made, x: torch.stack(made, 1) @ x[0, :4], rows())
    assert inner.count("stack") == {0}


def test_neighbours_that_are_joined_beside_others_that_are_not():
    def end(made, x):
        *first, last = made
        return torch.cat([each.relu() for each in first], -1) * last.softmax(-1)

    inner = check(linears(2, 2, 4), end, rows())
    assert inner.count("cat") == {0}
    assert inner.count("relu") == {0, 1}

    def as_they_are(made, x):
        *first, last = made
        return torch.cat(first, -1), last.sin()

    inner = check(linears(2, 2, 4), as_they_are, rows())
    assert inner.count("cat") == {0, 1}, "it would be a slice"


def test_experts_beside_their_gate():
    def end(made, x):
        *experts, gate = made
        stack = torch.stack([each.relu() for each in experts], 1)
        return (gate.softmax(-1).unsqueeze(1) @ stack).squeeze(1)

    inner = check(linears(4, 4, 4, 3), end, rows())
    assert inner.count("stack") == {0}
    assert inner.count("relu") == {0, 1}


def test_joined_with_others():
    def end(made, x):
        return torch.cat([x, *(each.relu() for each in made), x], -1) * 2

    inner = check(linears(4, 2), end, rows())
    assert inner.count("cat") == {0, 1}


@pytest.mark.parametrize("grad", [True, False])
def test_what_backward_reads_is_not_changed_in_place(grad):
    def end(made, x):
        return torch.cat([each.relu() for each in made], -1).add_(1)

    inner = check(linears(4, 2), end, rows(), grad=grad)
    assert inner.count("cat") == ({0, 1} if grad else {0})


def test_nothing_moves_past_a_change():
    def end(made, x):
        first = made[0].relu()
        made[1].mul_(2)
        return torch.cat([first, made[1].relu()], -1)

    check(linears(4, 2), end, rows())


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu")])
def test_modes(mode):
    check(linears(4, 2), joined(F.gelu), rows(), mode=mode)


def test_the_pass_for_stock_inductor():
    inner = Inner()

    def backend(graph_module, inputs):
        PreGradPass()(graph_module.graph)
        graph_module.recompile()
        return inner(graph_module, inputs)

    plain = Branches(linears(4, 2), joined(F.gelu))
    fused = copy.deepcopy(plain)
    fuse(kind_of(fused.layers[0]), [*fused.layers], fused)
    x = torch.randn(3, 6)
    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(fused, backend=backend)(x), plain(x))
    assert inner.count("cat", "getitem") == {0}
    assert inner.count("linear") == {0, 1}


def test_through_aot_autograd():
    inner = check(linears(4, 2, 2), joined(F.gelu), rows(grad=True), inner=Inner("aot_eager"))
    assert inner.count("cat") == {0}


def test_what_is_joined_as_images_lies_as_it_did():
    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

        def forward(self, x):
            return torch.cat([self.a(x).unsqueeze(1), self.b(x).unsqueeze(1)], 1)

    model = Joined().double()
    x = torch.randn(2, 4, 2, 3).double().contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="conjoin", options={"backend": "eager"})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[0-9]+ layers of the compiled model")
        made, expected = compiled(x), model(x)
    torch.testing.assert_close(made, expected)
    assert made.stride() == expected.stride()
