"""What acts on the space of each channel, and softmax of parts."""

import pytest
import torch
from scripted import Scripted, randn
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph import channelwise, edit

FITTING = {
    "AvgPool1d": (nn.AvgPool1d(2), -2),
    "MaxPool2d": (nn.MaxPool2d(2, ceil_mode=True), -3),
    "AdaptiveAvgPool3d": (nn.AdaptiveAvgPool3d(1), -4),
    "LPPool2d": (nn.LPPool2d(2, 2), -3),
    "ZeroPad2d": (nn.ZeroPad2d(1), -3),
    "ReflectionPad1d": (nn.ReflectionPad1d(1), -2),
    "CircularPad2d": (nn.CircularPad2d(1), -3),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), -3),
    "pad": (lambda x: F.pad(x, (1, 1)), -3),
    "pad all of space": (lambda x: F.pad(x, (1, 1, 0, -1)), -3),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2), -3),
}

UNFIT = {
    "another rank": (nn.AvgPool1d(2), -3),
    "stacked": (nn.AvgPool2d(2), None),
    "along the channels": (nn.AvgPool1d(2), -1),
    "with indices": (nn.MaxPool2d(2, return_indices=True), -3),
    "indices by keyword": (lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True), -3),
    "indices by position": (lambda x: F.adaptive_max_pool2d(x, 2, True), -3),
    "pad the channels": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 1)), -3),
    "pad as the input says": (lambda x: F.pad(x, x.shape[-2:]), -3),
    "resize rows": (lambda x: F.interpolate(x, scale_factor=2), -1),
    "another operation": (lambda x: F.layer_norm(x, x.shape[-1:]), -3),
}


def call_of(function):
    model = Scripted(lambda m, x: (m.f if hasattr(m, "f") else function)(x))
    if isinstance(function, nn.Module):
        model.f = function
    traced = fx.symbolic_trace(model)
    x, *_, node, _ = traced.graph.nodes
    return node, x, edit.called_modules(traced)


@pytest.mark.parametrize(("function", "dim"), FITTING.values(), ids=FITTING)
def test_channels_by_themselves(function, dim):
    node, x, modules = call_of(function)
    assert channelwise.key(node, x, dim, modules) is not None
    for batch in ((2,), ()):
        whole = randn(*batch, 6, *[5] * (-1 - dim))
        ours = function(whole)
        try:
            theirs = torch.cat([function(part) for part in whole.split(3, dim)], dim)
        except (RuntimeError, ValueError):
            continue
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("function", "dim"), UNFIT.values(), ids=UNFIT)
def test_not_by_themselves(function, dim):
    node, x, modules = call_of(function)
    assert channelwise.key(node, x, dim, modules) is None


SOFTMAX = {
    "module": (nn.Softmax(dim=1), (1, False)),
    "function": (lambda x: F.softmax(x, -1), (-1, False)),
    "keyword": (lambda x: torch.log_softmax(x, dim=0), (0, True)),
    "method": (lambda x: x.softmax(2), (2, False)),
    "without dim": (nn.Softmax(), None),
    "with a type": (lambda x: F.softmax(x, 1, dtype=torch.float32), None),
    "with a type by position": (lambda x: torch.softmax(x, 1, torch.float32), None),
    "another": (lambda x: x.relu(), None),
}


@pytest.mark.parametrize(("function", "expected"), SOFTMAX.values(), ids=SOFTMAX)
def test_softmax_key(function, expected):
    node, x, modules = call_of(function)
    assert channelwise.softmax_key(node, x, modules) == expected


@pytest.mark.parametrize("logarithmic", [False, True])
@pytest.mark.parametrize("along", [-1, -2, -3, None])
@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3, 3, -4])
def test_softmax_of_parts(dim, along, logarithmic):
    parts = [randn(2, 3, 4) for _ in range(3)]
    whole = torch.stack(parts) if along is None else torch.cat(parts, along)
    function = torch.log_softmax if logarithmic else torch.softmax
    if dim in (3, -4):
        for call in (
            lambda: function(parts[0], dim),
            lambda: channelwise.softmax_of_parts(whole, dim, logarithmic, 3, along),
        ):
            with pytest.raises(IndexError, match=r"expected to be in range of \[-3, 2\]"):
                call()
        return
    expected = [function(part, dim) for part in parts]
    ours = channelwise.softmax_of_parts(whole, dim, logarithmic, 3, along)
    joined = torch.stack(expected) if along is None else torch.cat(expected, along)
    torch.testing.assert_close(ours, joined)
