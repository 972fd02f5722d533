"""Which layers are siblings, and why some may not be merged: one test a reason."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from conjoin.graph.siblings import candidates
from conjoin.graph.site import Sightings, Site
from conjoin.layers import KINDS
from conjoin.legality import Reason
from conjoin.tracing.observe import observe
from conjoin.tracing.symbolic import trace

X = torch.randn(3, 4)


class Called(nn.Module):
    """Layers a, b, ... that are called as a function says."""

    def __init__(self, script, *layers):
        super().__init__()
        for name, layer in zip("abcdefgh", layers, strict=False):
            setattr(self, name, layer)
        self.script = script

    def forward(self, x):
        return self.script(self, x)


def all_on_one(model, x):
    return [layer(x) for layer in model.children()]


def linears(*widths, **settings):
    return [nn.Linear(4, width, **settings) for width in widths]


def found(model, x=X):
    """What both ways to look at a model tell of it; they must agree."""
    groups = observed(model, x)
    traced = candidates(model, trace(model, KINDS), KINDS)
    assert [(c.layers, reason(c)) for c in groups] == [(c.layers, reason(c)) for c in traced]
    return groups


def observed(model, x=X):
    return candidates(model, observe(model, [((x,), {})], KINDS), KINDS)


def reason(candidate):
    return candidate.refusal and candidate.refusal.reason


def only(groups):
    assert len(groups) == 1, groups
    return groups[0]


def settings(**other):
    return [nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, **{"kernel_size": 3, **other})]


def changed(change, layer=None):
    layer = layer or nn.Linear(4, 3)
    change(layer)
    return layer


def tied():
    layers = linears(3, 3)
    layers[1].weight = layers[0].weight
    return layers


def overlapping():
    layers = linears(3, 3)
    storage = torch.randn(5, 4)
    for layer, rows in zip(layers, (slice(0, 3), slice(2, 5)), strict=True):
        layer.weight = nn.Parameter(storage[rows])
    return layers


def frozen():
    layers = linears(3, 3)
    layers[1].requires_grad_(False)
    return layers


def frozen_bias():
    layers = linears(3, 3)
    layers[1].bias.requires_grad_(False)
    return layers


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Quantized(nn.Parameter):
    pass


def quantized(layer):
    layer.weight = Quantized(layer.weight.detach())


IMAGE = torch.randn(3, 2, 6, 6)
REFUSALS = {
    "kernel_size": (
        settings(kernel_size=1),
        Reason.DIFFERENT_SETTINGS,
        ["kernel_size=(1, 1)", "(3, 3)"],
    ),
    "stride": (settings(stride=2), Reason.DIFFERENT_SETTINGS, ["stride=(2, 2)", "(1, 1)"]),
    "padding": (settings(padding=1), Reason.DIFFERENT_SETTINGS, ["padding=(1, 1)", "(0, 0)"]),
    "dilation": (settings(dilation=2), Reason.DIFFERENT_SETTINGS, ["dilation=(2, 2)"]),
    "padding_mode": (
        settings(padding_mode="circular", padding=1),
        Reason.DIFFERENT_SETTINGS,
        ["padding_mode=circular", "zeros"],
    ),
    "strides of the weights": (
        [nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)],
        Reason.DIFFERENT_SETTINGS,
        ["memory_format", "channels_last", "contiguous"],
    ),
    "groups": (
        [nn.ConvTranspose2d(2, 4, 1, groups=2), nn.ConvTranspose2d(2, 4, 1, groups=2)],
        Reason.GROUPED,
        ["groups=2"],
    ),
    "bias": ([*linears(3), *linears(3, bias=False)], Reason.BIAS_ON_SOME, ["bias=False", "True"]),
    "requires_grad": (frozen(), Reason.DIFFERENT_REQUIRES_GRAD, ["requires_grad=False", "True"]),
    "requires_grad of a bias": (frozen_bias(), Reason.DIFFERENT_REQUIRES_GRAD, ["bias", "False"]),
    "tied": (tied(), Reason.SHARED_PARAMETER, ["a.weight", "b.weight"]),
    "overlapping": (overlapping(), Reason.SHARED_PARAMETER, ["a.weight", "b.weight"]),
    "subclass": ([Own(4, 3), *linears(3)], Reason.OWN_FORWARD, ["a: Own defines forward"]),
    "patched": (
        [*linears(3), changed(lambda layer: setattr(layer, "forward", lambda x: x))],
        Reason.OWN_FORWARD,
        ["b", "instance"],
    ),
    "hook": (
        [changed(lambda layer: layer.register_forward_hook(lambda *_: None)), *linears(3)],
        Reason.HOOKS,
        ["a: forward hooks"],
    ),
    "hook on a weight": (
        [changed(lambda layer: layer.weight.register_hook(lambda grad: grad)), *linears(3)],
        Reason.HOOKS,
        ["a: a hook on weight"],
    ),
    "weight_norm": (
        [weight_norm(nn.Linear(4, 3)), *linears(3)],
        Reason.PARAMETRIZED,
        ["a: weight"],
    ),
    "parametrized weight_norm": (
        [parametrizations.weight_norm(nn.Linear(4, 3)), *linears(3)],
        Reason.PARAMETRIZED,
        ["a: weight"],
    ),
    "spectral_norm": (
        [spectral_norm(nn.Linear(4, 3)), *linears(3)],
        Reason.PARAMETRIZED,
        ["a: weight"],
    ),
    "pruning": (
        [prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5), *linears(3)],
        Reason.PARAMETRIZED,
        ["a: weight"],
    ),
    "parameter": ([changed(quantized), *linears(3)], Reason.CUSTOM_PARAMETER, ["a", "Quantized"]),
    "attribute of a parameter": (
        [changed(lambda layer: setattr(layer.weight, "rate", 0.1)), *linears(3)],
        Reason.CUSTOM_PARAMETER,
        ["attributes"],
    ),
    "option": (
        [nn.Embedding(5, 3, max_norm=1.0), nn.Embedding(5, 3, max_norm=1.0)],
        Reason.UNSUPPORTED_OPTION,
        ["max_norm=1.0"],
    ),
    "padding_idx": (
        [nn.Embedding(5, 3, padding_idx=1), nn.Embedding(5, 3)],
        Reason.DIFFERENT_SETTINGS,
        ["padding_idx=None", "1"],
    ),
    "rows": (
        [nn.Embedding(5, 3), nn.Embedding(6, 3)],
        Reason.DIFFERENT_SETTINGS,
        ["num_embeddings=6", "5"],
    ),
}


def input_of(layer):
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[1, 2], [0, 1]])
    return IMAGE if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)) else X


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("layers", "why", "words"), REFUSALS.values(), ids=REFUSALS)
def test_refused(layers, why, words):
    group = only(found(Called(all_on_one, *layers), input_of(layers[0])))
    assert group.layers == ("a", "b")
    assert reason(group) is why
    for word in words:
        assert word in group.refusal.detail


SEEN = Sightings((Site("a", "x", 0), Site("b", "x", 0)), {})
UNRUNNABLE = {
    "dtype": (torch.float64, None, Reason.DIFFERENT_DTYPE, ["torch.float64", "torch.float32"]),
    "device": (None, "meta", Reason.DIFFERENT_DEVICE, ["meta", "cpu"]),
}


@pytest.mark.parametrize(("dtype", "device", "why", "words"), UNRUNNABLE.values(), ids=UNRUNNABLE)
def test_refused_though_it_does_not_run(dtype, device, why, words):
    model = Called(all_on_one, *linears(3), *linears(3, dtype=dtype, device=device))
    refusal = only(candidates(model, SEEN, KINDS)).refusal
    assert refusal.reason is why
    assert all(word in refusal.detail for word in words)


def test_lazy_layers():
    model = Called(all_on_one, nn.LazyLinear(3), nn.LazyLinear(2))
    refusal = only(candidates(model, SEEN, KINDS)).refusal
    assert refusal.reason is Reason.UNINITIALIZED
    assert "a: weight" in refusal.detail


def apart(model, x):
    return model.a(x), model.b(x), model.a(x + 1)


def more_often(model, x):
    return model.a(x), model.b(x), model.b(x)


def changed_between(model, x):
    y = x * 1
    first = model.a(y)
    y.add_(1)
    return first, model.b(y)


def changed_by_a_view(model, x):
    y = x * 1
    first = model.a(y)
    y.view(-1).mul_(2)
    return first, model.b(y)


def changed_by_a_module(model, x):
    y = x * 1
    first = model.a(y)
    model.c(y)
    return first, model.b(y)


CALLS = {
    "apart": (apart, Reason.CALLED_APART, "it reads 1 tensor in 1 call, and a 2 tensors in 2"),
    "more often": (
        more_often,
        Reason.CALLED_APART,
        "it reads 1 tensor in 2 calls, and a 1 tensor in 1",
    ),
    "changed": (changed_between, Reason.INPUT_MUTATED, "other values"),
    "changed by a view": (changed_by_a_view, Reason.INPUT_MUTATED, "other values"),
    "changed by a module": (changed_by_a_module, Reason.INPUT_MUTATED, "other values"),
}


@pytest.mark.parametrize(("script", "why", "words"), CALLS.values(), ids=CALLS)
def test_calls_that_do_not_go_together(script, why, words):
    group = only(found(Called(script, *linears(3, 3), nn.ReLU(inplace=True))))
    assert (group.layers, reason(group)) == (("a", "b"), why)
    assert words in group.refusal.detail


def gradients_off(model, x):
    first = model.a(x)
    with torch.no_grad():
        return first, model.b(x)


def test_other_modes():
    group = only(observed(Called(gradients_off, *linears(3, 3))))
    assert reason(group) is Reason.CALLED_APART
    assert "gradients" in group.refusal.detail


def pyramid(model, x):
    return [layer(level) for level in (x, x + 1, x * 2) for layer in (model.a, model.b)]


def cell(model, x):
    for _ in range(3):
        x = model.a(x).tanh() + model.b(x)
    return x


@pytest.mark.parametrize("script", [pyramid, cell])
def test_siblings_called_several_times_together(script):
    group = only(found(Called(script, *linears(4, 4))))
    assert group.refusal is None
    assert group.layers == ("a", "b")


def test_each_layer_is_in_one_group():
    """Five on one tensor: two pairs that go together, and one alone."""
    frozen = [layer.requires_grad_(False) for layer in linears(3, 5)]
    layers = [*linears(3, 2), *frozen, Own(4, 3)]
    groups = found(Called(all_on_one, *layers))
    assert [(g.layers, reason(g)) for g in groups] == [
        (("a", "b"), None),
        (("c", "d"), None),
        (("e",), Reason.OWN_FORWARD),
    ]


def chain_of_inputs(model, x):
    y = x + 1
    return model.a(x), model.b(x), model.b(y), model.c(y)


def test_each_layer_is_in_one_group_though_it_reads_several_tensors():
    groups = found(Called(chain_of_inputs, *linears(3, 3, 3)))
    assert sorted(name for group in groups for name in group.layers) == ["a", "b", "c"]
    assert {reason(group) for group in groups} == {Reason.CALLED_APART}


def test_a_group_and_what_is_apart_from_it():
    def script(model, x):
        return model.a(x), model.b(x), model.c(x), model.c(x + 1)

    groups = found(Called(script, *linears(3, 2, 1)))
    assert [(g.layers, reason(g)) for g in groups] == [
        (("a", "b"), None),
        (("c",), Reason.CALLED_APART),
    ]


def test_different_kinds_are_no_siblings():
    conv = nn.Conv1d(4, 3, 1)
    assert not found(Called(all_on_one, nn.Linear(4, 3), conv), torch.randn(3, 4, 4))


def test_groups_of_several_kinds_on_one_tensor():
    layers = [nn.Linear(4, 3), nn.Conv1d(4, 3, 1), nn.Linear(4, 2), nn.Conv1d(4, 1, 1)]
    groups = found(Called(all_on_one, *layers), torch.randn(3, 4, 4))
    assert [(g.kind.name, g.layers) for g in groups] == [
        ("Linear", ("a", "c")),
        ("Conv1d", ("b", "d")),
    ]


def test_layers_at_two_names():
    layers = linears(3, 2)
    group = only(found(Called(all_on_one, *layers, nn.ModuleList(layers)[0])))
    assert set(group.layers) == {"a", "b"}


def test_tied_with_a_layer_elsewhere():
    layers = linears(4, 4, 4)
    layers[2].weight = layers[0].weight
    group = only(found(Called(lambda m, x: (m.a(x), m.b(x), m.c(x + 1)), *layers)))
    assert reason(group) is Reason.SHARED_PARAMETER
    assert "c.weight" in group.refusal.detail


def test_tied_with_a_buffer():
    model = Called(all_on_one, *linears(3, 3))
    model.register_buffer("copy", model.a.weight.detach())
    assert only(found(model)).refusal.reason is Reason.SHARED_PARAMETER


@pytest.mark.parametrize("base", [dict, list, set, tuple])
def test_tied_with_what_an_attribute_of_a_container_holds(base):
    """As of a configuration that is a dictionary too."""
    model = Called(all_on_one, *linears(3, 3))
    model.settings = type("Settings", (base,), {})([(1, 2)])
    model.settings.first = model.a.weight
    assert only(found(model)).refusal.reason is Reason.SHARED_PARAMETER


def test_widths_and_order_of_calls():
    group = only(found(Called(lambda m, x: (m.c(x), m.a(x), m.b(x)), *linears(3, 2, 1))))
    assert group.layers == ("c", "a", "b")
    assert group.widths == (1, 3, 2)


def test_nothing_is_lost_or_told_twice():
    """Many layers on few tensors: every layer that shares a tensor is told of once."""
    torch.manual_seed(0)
    layers = [nn.Linear(4, 3, bias=bool(i % 3)) for i in range(8)]

    def script(model, x):
        tensors = [x, x + 1, x * 2]
        return [layer(tensors[i % 3 - (i == 7)]) for i, layer in enumerate(model.children())]

    names = [name for group in found(Called(script, *layers)) for name in group.layers]
    assert len(names) == len(set(names))
    assert set(names) >= set("abcdefg")
