"""Normalizations side by side: one wide layer, whose running statistics are the siblings'."""

import copy
import functools
import pickle

import pytest
import torch
from equivalence import assert_same_state
from scripted import randn
from torch import nn

from conjoin.layers import NORMS, kind_of
from conjoin.layers.fusing import fuse
from conjoin.layers.releasing import release

CASES = {
    "BatchNorm1d": (lambda width: nn.BatchNorm1d(width), ()),
    "in sequences": (lambda width: nn.BatchNorm1d(width, eps=0.1, momentum=0.5), (6,)),
    "BatchNorm2d": (lambda width: nn.BatchNorm2d(width), (5, 3)),
    "BatchNorm3d": (lambda width: nn.BatchNorm3d(width), (2, 3, 2)),
    "GroupNorm": (lambda width: nn.GroupNorm(width // 2, width), (5,)),
    "InstanceNorm1d": (lambda width: nn.InstanceNorm1d(width, affine=True), (5,)),
    "InstanceNorm2d": (lambda width: nn.InstanceNorm2d(width, eps=0.1, affine=True), (5, 3)),
    "InstanceNorm3d": (lambda width: tracked(nn.InstanceNorm3d)(width), (2, 3, 2)),
    "tracked": (lambda width: tracked(nn.InstanceNorm2d)(width, momentum=0.4), (5, 3)),
    "PReLU": (lambda width: nn.PReLU(width), (5, 3)),
}

WIDTHS = [2, 6, 4]


def tracked(norm):
    return functools.partial(norm, affine=True, track_running_stats=True)


def stirred(norm):
    for tensor in (*norm.parameters(), *norm.buffers()):
        if tensor.is_floating_point():
            tensor.data.uniform_(0.5, 2)
    return norm.double()


def both(make, widths=WIDTHS):
    norms = nn.ModuleList([stirred(make(width)) for width in widths])
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


@pytest.mark.parametrize("make", [CASES["BatchNorm2d"][0], CASES["tracked"][0]])
def test_a_schedule_of_the_momentum(make):
    """The siblings run one by one while some have another momentum, and stay merged."""
    norms, plain, wide = both(make)
    parameters = [*wide.parameters()]
    for changed, momentum, eps in ((1, 0.5, 0.1), (3, 0.5, 0.1), (2, 0.25, 0.1), (3, 0.25, 0.01)):
        for norm in (*norms[:changed], *plain[:changed]):
            norm.momentum, norm.eps = momentum, eps
        x = randn(2, sum(WIDTHS), 5, 3)
        theirs = [norm(part) for norm, part in zip(plain, x.split(WIDTHS, 1), strict=True)]
        copied = copy.deepcopy(norms)
        for ours in (wide, copied[0].wide_layer):
            torch.testing.assert_close(ours(x, dim=-3), torch.cat(theirs, 1), rtol=0, atol=1e-9)
        for ours, other in zip(norms.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-9)
        assert wide.unequal == (changed != 3)
    assert all(ours is other for ours, other in zip(wide.parameters(), parameters, strict=True))


@cases
def test_released_to_the_bit(make, space):
    norms, plain, _ = both(make)
    assert_same_state(norms, plain)
    for norm in norms:
        release(norm)
    assert_same_state(norms, plain)
    statistics = getattr(norms[0], "running_mean", None)
    (norms[0].weight.data if statistics is None else statistics).zero_()
    assert_same_state(norms[1:], plain[1:])


REFUSED = {
    "no weight": nn.BatchNorm1d(4, affine=False),
    "no statistics": nn.BatchNorm1d(4, track_running_stats=False),
    "cumulative": nn.BatchNorm1d(4, momentum=None),
    "groups without weight": nn.GroupNorm(2, 4, affine=False),
    "instances without weight": nn.InstanceNorm1d(4),
    "statistics without weight": nn.InstanceNorm1d(4, track_running_stats=True),
    "last dimension without weight": nn.LayerNorm(4, elementwise_affine=False),
    "two dimensions": nn.LayerNorm((3, 4)),
}


@pytest.mark.parametrize("norm", REFUSED.values(), ids=REFUSED)
def test_refused(norm):
    assert kind_of(norm, NORMS).check(norm) is not None


def test_others_are_of_no_kind():
    for norm in (nn.LocalResponseNorm(4), nn.SyncBatchNorm(4), nn.RReLU()):
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


LAST = {
    "LayerNorm": lambda width: nn.LayerNorm(width),
    "without bias": lambda width: nn.LayerNorm(width, eps=0.1, bias=False),
    "RMSNorm": lambda width: nn.RMSNorm(width),
    "with eps": lambda width: nn.RMSNorm(width, eps=0.1),
    "PReLU of one number": lambda width: nn.PReLU(),
}

SHAPES = [(), (3,), (2, 3), (2, 1, 3), (0,), (1,)]


def gradients_of(outputs, leaves):
    loss = sum(output.tanh().square().sum() for output in outputs)
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    second = torch.autograd.grad(sum(each.square().sum() for each in first), leaves)
    return [*first, *second]


@pytest.mark.parametrize("make", LAST.values(), ids=LAST)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_the_last_dimension(make, shape):
    """Values, gradients and gradients of these."""
    _, plain, wide = both(make, [4, 4, 4])
    x = randn(*shape, 12).requires_grad_()
    ours = wide(x, dim=-1).split(4, -1)
    theirs = [norm(part) for norm, part in zip(plain, x.split(4, -1), strict=True)]
    torch.testing.assert_close(ours, tuple(theirs), rtol=0, atol=1e-9)
    ours = gradients_of(ours, [x, *wide.parameters()])
    theirs = gradients_of(theirs, [x, *plain.parameters()])
    kinds = len(list(wide.parameters()))
    joined = [
        torch.cat(theirs[start + 1 + kind : start + 1 + 3 * kinds : kinds])
        for start in (0, 1 + 3 * kinds)
        for kind in range(kinds)
    ]
    expected = [theirs[0], *joined[:kinds], theirs[1 + 3 * kinds], *joined[kinds:]]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", LAST.values(), ids=LAST)
def test_on_the_meta_device(make):
    norms, _, wide = both(make, [4, 4, 4])
    norms.to("meta")
    assert wide(torch.empty(3, 12, dtype=torch.float64, device="meta"), dim=-1).shape == (3, 12)


@pytest.mark.parametrize("make", [LAST["LayerNorm"], LAST["RMSNorm"]])
@pytest.mark.parametrize("types", [(torch.bfloat16, torch.float32), (torch.float16,) * 2])
def test_of_other_types(make, types):
    """Of mixed types, the output has that of the input, as before."""
    norms, plain, wide = both(make, [4, 4, 4])
    x = randn(3, 12).to(types[0])
    for model in (norms, plain):
        model.to(types[1])
    ours = wide(x, dim=-1)
    theirs = torch.cat([norm(part) for norm, part in zip(plain, x.split(4, -1), strict=True)], -1)
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(3, 8, 4, 5), (8, 4, 5), (2, 3, 8), (8,)], ids=str)
@pytest.mark.parametrize("sizes", [[4, 2, 2], [2, 4, 2], None], ids=str)
def test_one_slope_for_each_branch(shape, sizes):
    """Its gradient is the sum over the channels of the branch."""
    _, plain, wide = both(lambda width: nn.PReLU(), WIDTHS if sizes else WIDTHS[:2])
    for dim in range(-len(shape), 0):
        if shape[dim] != 8:
            continue
        x = randn(*shape).requires_grad_()
        parts = x.split(sizes or 4, dim)
        ours = wide(x, dim=dim, sizes=sizes)
        theirs = torch.cat([norm(part) for norm, part in zip(plain, parts, strict=True)], dim)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
        ours = gradients_of([ours], [x, wide.weight])
        theirs = gradients_of([theirs], [x, *plain.parameters()])
        count = len(plain)
        expected = [theirs[0], torch.cat(theirs[1 : 1 + count])]
        expected += [theirs[1 + count], torch.cat(theirs[2 + count :])]
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, tracked(nn.InstanceNorm2d)])
def test_images_without_a_batch(norm):
    norms, plain, wide = both(lambda width: norm(width, affine=True))
    x = randn(sum(WIDTHS), 5, 3)
    theirs = [norm(part) for norm, part in zip(plain, x.split(WIDTHS), strict=True)]
    torch.testing.assert_close(wide(x, dim=-3), torch.cat(theirs), rtol=0, atol=1e-9)
    for ours, theirs in zip(norms.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, tracked(nn.InstanceNorm2d)])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_buffer_that_was_given_other_memory_is_copied_as_it_is(norm, copied):
    norms, _, _ = both(lambda width: norm(width, affine=True))
    norms[1].running_var.data = torch.full_like(norms[1].running_var, 3)
    other = copied(norms)
    assert_same_state(other, norms)
    for each in other:
        release(each)
    assert_same_state(other, norms)
    assert other[1].running_var.eq(3).all()


@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, tracked(nn.InstanceNorm2d)])
def test_images_without_a_space_raise_what_a_branch_raises(norm):
    _, plain, wide = both(lambda width: norm(width, affine=True))
    x = randn(2, sum(WIDTHS), 1, 1)
    with pytest.raises(ValueError, match="spatial element") as theirs:
        plain[0](x[:, : WIDTHS[0]])
    with pytest.raises(ValueError, match="spatial element") as ours:
        wide(x, dim=-3)
    assert str(ours.value) == str(theirs.value)
