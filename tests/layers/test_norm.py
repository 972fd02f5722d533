"""Normalizations side by side: one wide layer, whose running statistics are the siblings'."""

import copy

import pytest
import torch
from equivalence import assert_same_state
from scripted import randn
from torch import nn

from conjoin.layers import NORMS, kind_of
from conjoin.layers.wide import fuse, release

CASES = {
    "BatchNorm1d": (lambda width: nn.BatchNorm1d(width), ()),
    "in sequences": (lambda width: nn.BatchNorm1d(width, eps=0.1, momentum=0.5), (6,)),
    "BatchNorm2d": (lambda width: nn.BatchNorm2d(width), (5, 3)),
    "BatchNorm3d": (lambda width: nn.BatchNorm3d(width), (2, 3, 2)),
    "GroupNorm": (lambda width: nn.GroupNorm(width // 2, width), (5,)),
}

WIDTHS = [2, 6, 4]


def stirred(norm):
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return norm.double()


def both(make):
    norms = nn.ModuleList([stirred(make(width)) for width in WIDTHS])
    plain = copy.deepcopy(norms)
    return norms, plain, fuse(kind_of(norms[0], NORMS), list(norms), norms, together=False)


cases = pytest.mark.parametrize(("make", "space"), CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("training", [True, False])
def test_side_by_side(make, space, training):
    norms, plain, wide = both(make)
    norms.train(training), plain.train(training)
    for batch in (3, 2):
        x = randn(batch, sum(WIDTHS), *space)
        ours = wide(x, dim=-1 - len(space))
        theirs = [norm(part) for norm, part in zip(plain, x.split(WIDTHS, 1), strict=True)]
        torch.testing.assert_close(ours, torch.cat(theirs, 1), rtol=0, atol=1e-9)
    for ours, theirs in zip(norms.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@cases
def test_each_by_itself(make, space):
    """A view is called by itself, in turn with the wide layer, and shares its statistics."""
    norms, plain, wide = both(make)
    parts = [randn(3, width, *space) for width in WIDTHS]
    wide(torch.cat(parts, 1), dim=-1 - len(space))
    for norm, other, part in zip(norms, plain, parts, strict=True):
        other(part)
        torch.testing.assert_close(norm(part), other(part), rtol=0, atol=1e-9)
    for ours, theirs in zip(norms.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@cases
def test_released_to_the_bit(make, space):
    norms, plain, _ = both(make)
    assert_same_state(norms, plain)
    for norm in norms:
        release(norm)
    assert_same_state(norms, plain)
    (norms[0].running_mean if hasattr(norms[0], "running_mean") else norms[0].weight.data).zero_()
    assert_same_state(norms[1:], plain[1:])


REFUSED = {
    "no weight": nn.BatchNorm1d(4, affine=False),
    "no statistics": nn.BatchNorm1d(4, track_running_stats=False),
    "cumulative": nn.BatchNorm1d(4, momentum=None),
    "groups without weight": nn.GroupNorm(2, 4, affine=False),
}


@pytest.mark.parametrize("norm", REFUSED.values(), ids=REFUSED)
def test_refused(norm):
    assert kind_of(norm, NORMS).check(norm) is not None


def test_others_are_of_no_kind():
    for norm in (nn.LayerNorm(4), nn.InstanceNorm1d(4, affine=True), nn.SyncBatchNorm(4)):
        assert kind_of(norm, NORMS) is None


def test_the_statistics_of_one_are_asked_for():
    """Whatever is done to one, the others go on together."""
    norms, plain, wide = both(lambda width: nn.BatchNorm1d(width))
    x = randn(3, sum(WIDTHS))
    for model in (norms, plain):
        model[1].eval()
        model[2].running_var = torch.ones(4, dtype=torch.float64)
    theirs = [norm(part) for norm, part in zip(plain, x.split(WIDTHS, 1), strict=True)]
    torch.testing.assert_close(wide(x, dim=-1), torch.cat(theirs, 1), rtol=0, atol=1e-9)
    for ours, theirs in zip(norms.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
