"""What a kind looks at before layers are merged: each layer by itself, and what they share."""

import copy
import inspect

import pytest
import torch
from equivalence import assert_equivalent
from families import EVERY_KIND, Family, fused
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import conjoin
from conjoin.layers import KINDS, kind_of
from conjoin.layers.checks import tensors
from conjoin.layers.equal import common
from conjoin.legality import Reason

every_kind = pytest.mark.parametrize("case", EVERY_KIND.values(), ids=EVERY_KIND)


def test_every_kind_has_a_case():
    assert [kind.name for kind in KINDS] == list(EVERY_KIND)


def test_a_kind_is_told_by_its_name_in_signatures():
    assert "(Linear(), Conv1d(), Conv2d()," in str(inspect.signature(conjoin.optimize))


@every_kind
def test_a_plain_layer_may_be_merged(case):
    layer = case.layer(3)
    kind = kind_of(layer)
    assert kind.layer is type(layer)
    assert kind.check(layer) is None


@every_kind
def test_a_frozen_half_precision_layer_may_be_merged(case):
    layer = case.layer(3).to(torch.bfloat16).requires_grad_(False)
    assert kind_of(layer).check(layer) is None


class OwnForward(nn.Linear):
    def forward(self, x):
        return super().forward(x) + 1


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight * 2, bias)


class OwnLoading(nn.Linear):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)


class OwnCall(nn.Linear):
    def __call__(self, x):
        return super().__call__(x) + 1


class Scaled(nn.Linear):
    """An equalized learning rate: the weight is computed by a property."""

    def __init__(self, *args):
        super().__init__(*args)
        self.scale = 2.0

    @property
    def weight(self):
        return self.scale * self._parameters["weight"]


class Normed(nn.Linear):
    """What is computed is the same as in the plain layer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.extra = "an attribute"

    def reset_parameters(self):
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)


def patched():
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x
    return layer


def changed(change):
    layer = nn.Linear(4, 3)
    change(layer)
    return layer


class Quantized(nn.Parameter):
    pass


def with_parameter(made):
    layer = nn.Linear(4, 3)
    layer.weight = made(layer.weight.detach())
    return layer


def integer():
    layer = nn.Linear(4, 3)
    layer.weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.int8), requires_grad=False)
    return layer


REFUSED = {
    "own forward": (lambda: OwnForward(4, 3), Reason.OWN_FORWARD, "OwnForward defines forward"),
    "part of a forward": (lambda: OwnConvForward(2, 3, 1), Reason.OWN_FORWARD, "_conv_forward"),
    "own loading": (lambda: OwnLoading(4, 3), Reason.OWN_FORWARD, "_load_from_state_dict"),
    "own call": (lambda: OwnCall(4, 3), Reason.OWN_FORWARD, "__call__"),
    "patched": (patched, Reason.OWN_FORWARD, "replaced on the instance"),
    "forward hook": (
        lambda: changed(lambda layer: layer.register_forward_hook(lambda *_: None)),
        Reason.HOOKS,
        "forward hooks",
    ),
    "forward pre-hook": (
        lambda: changed(lambda layer: layer.register_forward_pre_hook(lambda *_: None)),
        Reason.HOOKS,
        "forward pre hooks",
    ),
    "backward hook": (
        lambda: changed(lambda layer: layer.register_full_backward_hook(lambda *_: None)),
        Reason.HOOKS,
        "backward hooks",
    ),
    "state_dict hook": (
        lambda: changed(lambda layer: layer.register_state_dict_post_hook(lambda *_: None)),
        Reason.HOOKS,
        "state dict hooks",
    ),
    "loading hook": (
        lambda: changed(lambda layer: layer.register_load_state_dict_pre_hook(lambda *_: None)),
        Reason.HOOKS,
        "load state dict pre hooks",
    ),
    "hook on the weight": (
        lambda: changed(lambda layer: layer.weight.register_hook(lambda grad: grad)),
        Reason.HOOKS,
        "a hook on weight",
    ),
    "hook after accumulation": (
        lambda: changed(
            lambda layer: layer.bias.register_post_accumulate_grad_hook(lambda p: None)
        ),
        Reason.HOOKS,
        "a hook on bias",
    ),
    "weight_norm": (lambda: weight_norm(nn.Linear(4, 3)), Reason.PARAMETRIZED, "weight"),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(4, 3)), Reason.PARAMETRIZED, "weight"),
    "pruning": (
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.5),
        Reason.PARAMETRIZED,
        "weight",
    ),
    "pruned bias": (
        lambda: prune.l1_unstructured(nn.Linear(4, 3), "bias", 0.5),
        Reason.PARAMETRIZED,
        "bias",
    ),
    "parametrization": (
        lambda: parametrizations.orthogonal(nn.Linear(4, 3)),
        Reason.PARAMETRIZED,
        "weight is computed by a parametrization",
    ),
    "lazy": (lambda: nn.LazyLinear(3), Reason.UNINITIALIZED, "weight"),
    "class of parameter": (lambda: with_parameter(Quantized), Reason.CUSTOM_PARAMETER, "Quantized"),
    "integers": (integer, Reason.CUSTOM_PARAMETER, "int8"),
    "groups": (lambda: nn.ConvTranspose1d(4, 6, 1, groups=2), Reason.GROUPED, "groups=2"),
    "max_norm": (
        lambda: nn.Embedding(4, 3, max_norm=1.5),
        Reason.UNSUPPORTED_OPTION,
        "max_norm=1.5",
    ),
    "sparse": (lambda: nn.Embedding(4, 3, sparse=True), Reason.UNSUPPORTED_OPTION, "sparse=True"),
    "scaled by frequency": (
        lambda: nn.Embedding(4, 3, scale_grad_by_freq=True),
        Reason.UNSUPPORTED_OPTION,
        "scale_grad_by_freq=True",
    ),
}


@pytest.mark.parametrize(("build", "reason", "detail"), REFUSED.values(), ids=REFUSED)
def test_refused(build, reason, detail):
    layer = build()
    kind = kind_of(layer)
    found, why = kind.check(layer)
    assert found is reason
    assert detail in why


def bias_as(hold):
    layer = nn.Linear(4, 3)
    bias = layer.bias.detach()
    del layer.bias
    hold(layer, bias)
    return layer


COMPUTED = {
    "weight by a property": lambda: Scaled(4, 3),
    "bias a plain tensor": lambda: bias_as(lambda layer, bias: setattr(layer, "bias", bias)),
    "bias a buffer": lambda: bias_as(lambda layer, bias: layer.register_buffer("bias", bias)),
}


@pytest.mark.parametrize("build", COMPUTED.values(), ids=COMPUTED)
def test_what_is_no_parameter_is_refused(build):
    layer = build()
    assert kind_of(layer).check(layer) is not None


def test_a_subclass_that_only_starts_otherwise_may_be_merged():
    assert kind_of(Normed(4, 3)).check(Normed(4, 3)) is None


def test_a_lazy_layer_may_be_merged_once_it_has_a_shape():
    layer = nn.LazyConv2d(3, 1)
    assert kind_of(layer).check(layer)[0] is Reason.UNINITIALIZED
    layer(torch.randn(1, 2, 4, 4))
    assert kind_of(layer).check(layer) is None


DIFFERENCES = {
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "dilation": {"dilation": 2},
    "kernel_size": {"kernel_size": 1},
    "padding_mode": {"padding_mode": "circular", "padding": 1},
    "bias": {"bias": False},
    "dtype": {"dtype": torch.float64},
    "device": {"device": "meta"},
}


def in_common(layer):
    return common(kind_of(layer), layer, tensors(layer))


@pytest.mark.parametrize(("name", "settings"), DIFFERENCES.items(), ids=DIFFERENCES)
def test_what_must_be_equal(name, settings):
    base = {"kernel_size": 3}
    one, other = nn.Conv2d(2, 3, **base), nn.Conv2d(2, 3, **{**base, **settings})
    mine, theirs = in_common(one), in_common(other)
    assert name in {key for key in mine if mine[key] != theirs[key]}
    assert mine == in_common(nn.Conv2d(2, 5, **base))


def assigned(layer, **settings):
    """With settings that somebody assigns later, as segmentation models do."""
    for name, value in settings.items():
        setattr(layer, name, value)
    return layer


def conv(kernel_size=3, **settings):
    return nn.Conv2d(2, 3, kernel_size, **settings)


ONE_SETTING = {
    "same": (conv(padding=1), conv(padding="same")),
    "same dilated": (conv(padding=(2, 2), dilation=2), conv(padding="same", dilation=2)),
    "valid": (conv(), conv(padding="valid")),
    "number": (conv(stride=2), assigned(conv(), stride=2)),
    "list": (conv(stride=(2, 1)), assigned(conv(), stride=[2, 1])),
    "for all": (conv(stride=2), assigned(conv(), stride=(2,))),
    "assigned": (conv(padding=2, dilation=2), assigned(conv(), padding=2, dilation=(2, 2))),
    "assigned same": (
        conv(padding=2, dilation=2),
        assigned(conv(padding="same"), dilation=(2, 2)),
    ),
    "without effect": (
        assigned(conv(padding_mode="reflect"), padding=1),
        conv(padding_mode="reflect"),
    ),
    "dilation of 1x1": (conv(1, dilation=2), conv(1)),
    "dilation of 1x3": (conv((1, 3), dilation=(2, 1)), conv((1, 3))),
    "same 1x1": (conv(1, padding="same", dilation=2), conv(1)),
    "transposed": (
        nn.ConvTranspose2d(2, 3, 3, stride=2),
        assigned(nn.ConvTranspose2d(2, 3, 3), stride=[2], output_padding=0, dilation=1),
    ),
    "strides": (conv(), assigned(conv(), weight=nn.Parameter(torch.randn(3, 2, 5, 3)[:, :, ::2]))),
}


@pytest.mark.parametrize("layers", ONE_SETTING.values(), ids=ONE_SETTING)
def test_one_setting_in_two_spellings(layers):
    plain = Family(copy.deepcopy(layers)).double()
    assert in_common(plain.layers[0]) == in_common(plain.layers[1])
    for each in (plain, Family(plain.layers[::-1])):
        x = torch.randn(2, 2, 6, 7, dtype=torch.float64)
        assert_equivalent(fused(each), each, (x,))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_a_setting_for_too_many_dimensions(name):
    layer = assigned(conv(), **{name: (1, 1, 1)})
    assert in_common(layer) != in_common(conv())
    with pytest.raises(RuntimeError):
        fused(Family([layer, copy.deepcopy(layer)]))(torch.randn(2, 2, 5, 5))


def test_weights_of_other_sizes_than_the_settings_say():
    for one, other, name, shape in (
        (nn.Linear(4, 3), nn.Linear(4, 3), "in_features", (3, 5)),
        (conv(), conv(), "kernel_size", (3, 2, 5, 5)),
        (nn.Embedding(4, 3), nn.Embedding(4, 3), "num_embeddings", (5, 3)),
    ):
        other.weight = nn.Parameter(torch.randn(shape))
        assert getattr(one, name) == getattr(other, name)
        assert in_common(one) != in_common(other)


def test_a_padding_that_is_not_the_same_on_both_sides_stays_one_of_its_own():
    layers = [nn.Conv2d(2, 3, 2, padding=padding) for padding in (1, "same")]
    assert in_common(layers[0]) != in_common(layers[1])


def test_parameters_of_unusual_shapes():
    layer = nn.Linear(4, 3)
    layer.bias = nn.Parameter(torch.ones(1))
    assert kind_of(layer).check(layer) == (
        Reason.UNSUPPORTED_OPTION,
        "bias has the shape (1,)",
    )
    layer = nn.Linear(4, 3, bias=False)
    layer.weight = nn.Parameter(torch.ones(4))
    assert kind_of(layer).check(layer)[0] is Reason.UNSUPPORTED_OPTION


def test_a_class_of_layers_whose_forward_was_replaced(monkeypatch):
    layer = nn.Linear(4, 3)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    assert kind_of(layer).check(layer) == (Reason.OWN_FORWARD, "Linear.forward was replaced")


def test_memory_format_and_requires_grad_must_be_equal():
    mine = in_common(nn.Conv2d(2, 3, 3))
    assert mine != in_common(nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last))
    assert mine != in_common(nn.Conv2d(2, 3, 3).requires_grad_(False))
    half = nn.Conv2d(2, 3, 3)
    half.bias.requires_grad_(False)
    assert mine != in_common(half)


def test_attributes_of_parameters_must_be_equal():
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    one.weight.learning_rate = 0.1
    assert in_common(one) != in_common(other)
    other.weight.learning_rate = one.weight.learning_rate
    assert in_common(one) == in_common(other)
