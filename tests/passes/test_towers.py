"""The next layers of the branches become one, whatever else happens meanwhile."""

import pytest
import torch
from scripted import (
    Scripted,
    assert_released_to_the_bit,
    assert_same,
    assert_trains_alike,
    both,
    branches,
    called,
    last,
    layers,
    linears,
    randn,
    targets,
)
from torch import nn
from torch.nn import functional as F

from conjoin.passes import Separate, Towers


def activated(m, h, name):
    return F.relu(h)


def viewed(m, h, name):
    return h.view(-1).sin().sum()


ROWS = randn(3, 4), randn(2, 4), randn(2, 3, 4), randn(4)
IMAGES = randn(2, 4, 8, 7), randn(4, 6, 6), randn(1, 4, 5, 5)

KINDS = {
    "Linear": (lambda: nn.Linear(4, 4), ROWS),
    "without bias": (lambda: nn.Linear(4, 4, bias=False), ROWS),
    "Conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), IMAGES),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), IMAGES),
    "reflected": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(4, 4, 3), IMAGES),
    "Conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), (randn(2, 4, 6), randn(4, 5))),
}


@pytest.mark.parametrize(("layer", "inputs"), KINDS.values(), ids=KINDS)
def test_towers(layer, inputs):
    first = layers(
        lambda: type(layer())(4, 4, *([3] if len(inputs) == 2 or inputs is IMAGES else []))
    )
    model = Scripted(
        branches(activated, called("2"), activated, called("3"), last),
        **first,
        **layers(layer, "2", "3"),
    )
    traced, plain = both(model)
    assert targets(traced).count("sin") == 1
    assert_same(traced, plain, *inputs)
    assert_trains_alike(traced, plain, *inputs)
    assert_released_to_the_bit(*both(model))


def test_transposed_and_grouped():
    """The weight has the channels of one group."""
    second = layers(lambda: nn.ConvTranspose2d(4, 4, 3, groups=2, bias=False), "2")
    convs = layers(lambda: nn.Conv2d(4, 4, 3))
    traced, plain = both(Scripted(branches(activated, called("2"), last), **convs, **second))
    assert_same(traced, plain, *IMAGES)


@pytest.mark.parametrize("convs", [False, True])
def test_what_is_read_by_strides(convs):
    make = (lambda: nn.Conv2d(4, 4, 3)) if convs else (lambda: nn.Linear(4, 4))
    model = Scripted(branches(activated, called("2"), viewed), **layers(make, "", "2"))
    assert_same(*both(model), *(IMAGES if convs else ROWS))


def turned(layer, x):
    """A tensor that is no part of a wide one as it is, of a shape that follows from that of x."""
    return F.gelu(layer(x).transpose(0, 1)).transpose(0, 1)


def changed_before(m, x):
    h, g, k = turned(m.a, x), turned(m.b, x), turned(m.c, x)
    changed = h.mul_(2)
    return m.a2(h).sin(), m.b2(g).sin(), m.c2(k).sin(), changed


def changed_after(m, x):
    h, g, k = turned(m.a, x), turned(m.b, x), turned(m.c, x)
    outputs = m.a2(h).sin(), m.b2(g).sin(), m.c2(k).sin()
    return *outputs, h.detach().clone().mul_(2)


def drawn_between(m, x):
    outputs = []
    for name in "abc":
        h = F.dropout(turned(getattr(m, name), x), 0.5)
        noise = torch.rand_like(h)
        outputs.append(getattr(m, name + "2")(h).sin() + noise + (h * 1).uniform_())
    return outputs


def crossed(m, x):
    a = m.a(x).sin()
    b = m.a2(2 * x).sin()
    return m.b(a.unsqueeze(0)).sin(), m.b2(b).sin(), m.c(m.c2(x)).sin()


def one_reads_another(m, x):
    h = m.a2(m.a(x).relu()).relu()
    g = m.b2(m.b(x).relu() + h).relu()
    return m.c2(m.c(x).relu() + g)


def of_unknown_length(m, x):
    outputs = []
    for name in "abc":
        h = getattr(m, name)(x)
        outputs.append(getattr(m, name + "2")(h[torch.where(h.relu())[0]]).sin())
    return outputs


def of_known_length(m, x):
    return [getattr(m, name + "2")(turned(getattr(m, name), x)).sin() for name in "abc"]


def alike_by_accident(m, x):
    """x and its rows in two halves; as long as each other in one of the examples only."""
    halves = x.repeat(2, 1)
    return m.a2(m.a(x)).sin(), m.b2(m.b(halves[: x.shape[0]])).sin(), m.c2(m.c(halves)).sin()


def masked(m, x):
    outputs = []
    for name in "abc":
        h = getattr(m, name)(x)
        outputs.append(getattr(m, name + "2")(h[h.sum(-1) > 0]).sin())
    return outputs


SCRIPTS = [
    changed_before,
    changed_after,
    drawn_between,
    crossed,
    one_reads_another,
    of_unknown_length,
    of_known_length,
    alike_by_accident,
    masked,
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_different_inputs(script):
    traced, plain = both(Scripted(script, **linears("", "2")))
    assert any(target.endswith("2.wide") for target in targets(traced)) == (
        script not in (crossed, one_reads_another, of_unknown_length, alike_by_accident, masked)
    )
    assert_same(traced, plain, randn(3, 4), randn(5, 4))


def normalized(m, x):
    """Each on a tensor of its own."""
    return [getattr(m, name + "n")(turned(getattr(m, name), x)).sin().sum(-1) for name in "abc"]


LAYER_NORMS = {
    "LayerNorm": (lambda: nn.LayerNorm(4), True),
    "without bias": (lambda: nn.LayerNorm(4, eps=0.1, bias=False), True),
    "RMSNorm": (lambda: nn.RMSNorm(4), False),
    "of another shape": (lambda: nn.LayerNorm((3, 4)), False),
}


@pytest.mark.parametrize(("norm", "gathered"), LAYER_NORMS.values(), ids=LAYER_NORMS)
def test_normalizations_of_different_inputs(norm, gathered):
    model = Scripted(normalized, **linears(), **layers(norm, "n"))
    traced, plain = both(model)
    assert ("an.wide" in targets(traced)) == gathered
    assert targets(traced).count("sin") == (1 if gathered else 3)
    assert_same(traced, plain, randn(3, 4), randn(2, 3, 4))
    assert_trains_alike(traced, plain.train(), randn(3, 4))
    traced, plain = both(model)
    Separate()(traced)
    assert sorted(targets(traced)) == sorted(targets(plain))
    assert_same(traced, plain, randn(3, 4))
    assert_released_to_the_bit(*both(model))


def test_normalizations_that_are_joined():
    """The parts lie as the joint wants them, in its order."""

    def script(m, x):
        h = {name: getattr(m, name + "n")(turned(getattr(m, name), x)) for name in "abc"}
        return torch.cat([h[name] for name in "bca"], -1).sin()

    traced, plain = both(Scripted(script, **linears(), **layers(lambda: nn.LayerNorm(4), "n")))
    assert "bn.wide" in targets(traced)
    assert "cat" not in targets(traced)
    assert_same(traced, plain, randn(3, 4), randn(2, 3, 4))


def two_norms(m, x):
    return m.an(turned(m.a, x)).sin(), m.bn(turned(m.b, x)).sin()


def norms_and_strides(m, x):
    return [y.view(-1).sin() for y in norms_that_are_returned(m, x)]


def norms_that_are_returned(m, x):
    return [getattr(m, name + "n")(turned(getattr(m, name), x)) for name in "abc"]


def norms_one_after_another(m, x):
    return m.cn(turned(m.c, m.bn(turned(m.b, m.an(turned(m.a, x)))))).sin()


NOT_GATHERED = [two_norms, norms_and_strides, norms_that_are_returned, norms_one_after_another]


@pytest.mark.parametrize("script", NOT_GATHERED)
def test_normalizations_left_alone(script):
    traced, plain = both(Scripted(script, **linears(), **layers(lambda: nn.LayerNorm(4), "n")))
    assert "an.wide" not in targets(traced)
    assert_same(traced, plain, randn(3, 4))


def test_two_inputs_that_are_alike_in_the_example():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.a(x).sin(), self.b(y).sin()

    traced, plain = both(Two())
    assert targets(traced) == targets(plain)


def test_a_hook_set_after_merging():
    merged, plain = both(Scripted(of_known_length, **linears("", "2")))
    assert "a2.wide" in targets(merged)
    for model in (merged, plain):
        model.a2.register_forward_hook(lambda module, args, output: output * 2)

    def call(m, x):
        return of_known_length(m, x)

    again, expected = (Scripted(call, **dict(model.named_children())) for model in (merged, plain))
    assert_same(both(again)[0], expected, randn(3, 4))


def test_deep():
    names = [str(i) for i in range(2, 40)]
    steps = [each for name in names for each in (activated, called(name))]
    traced, plain = both(Scripted(branches(*steps, last), **linears("", *names)))
    assert sum(target.endswith(".wide") for target in targets(traced)) == 39
    assert_same(traced, plain, randn(3, 4))
    assert not Towers()(traced).modified
