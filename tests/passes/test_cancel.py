"""Joining the parts of a tensor again gives the tensor, where nobody could tell."""

import itertools

import pytest
import torch
from counting import OperationCounter
from scripted import (
    Scripted,
    assert_released_to_the_bit,
    assert_same,
    both,
    branches,
    layers,
    linears,
    randn,
    targets,
)
from torch import nn
from torch.nn import functional as F

from conjoin import optimize
from conjoin.nn import Split, Unite
from conjoin.passes import Cancel, Separate


def parts(m, x, function=lambda h: h):
    return [function(getattr(m, name)(x)) for name in "abc"]


GONE = {
    "cat": lambda m, x: torch.cat(parts(m, x), -1).sin(),
    "cat by keyword": lambda m, x: torch.cat(tensors=parts(m, x), dim=-1).sin(),
    "after an activation": lambda m, x: torch.cat(parts(m, x, torch.tanh), -1).sin(),
    "after a softmax": lambda m, x: torch.cat(parts(m, x, lambda h: h.softmax(-1)), -1).sin(),
    "changed after": lambda m, x: torch.cat(parts(m, x), -1).add_(1).sin(),
    "changed after gelu": lambda m, x: torch.cat(parts(m, x, F.gelu), -1).add_(1).sin(),
    "stack": lambda m, x: torch.stack(parts(m, x), 1).sin().sum(1),
    "stack in front": lambda m, x: torch.stack(parts(m, x)).sin().sum(0),
    "stack at the end": lambda m, x: torch.stack(parts(m, x), -1).sin().sum(0),
    "another order": lambda m, x: torch.cat(parts(m, x)[::-1], -1).sin(),
    "another order of a stack": lambda m, x: torch.stack(parts(m, x, F.gelu)[::-1], 1).sin().sum(1),
    "unsqueezed": lambda m, x: torch.cat(parts(m, x, lambda h: h.unsqueeze(0)), 0).sin().sum(0),
}

LEFT = {
    "another dimension": lambda m, x: torch.cat(parts(m, x), 0).sin(),
    "some": lambda m, x: torch.cat((p := parts(m, x))[:2], -1).sin() + p[2].sum(),
    "read by others": lambda m, x: torch.cat(p := parts(m, x), -1).sin() + p[0].sum(),
    "changed after tanh": lambda m, x: torch.cat(parts(m, x, torch.tanh), -1).add_(1).sin(),
    "returned after tanh": lambda m, x: torch.cat(parts(m, x, torch.tanh), -1),
    "a stack of strides": lambda m, x: torch.stack(parts(m, x), 1).view(-1).sin(),
}


@pytest.mark.parametrize("script", GONE.values(), ids=GONE)
def test_gone(script):
    traced, plain = both(Scripted(script, **linears()))
    assert not {"cat", "stack", "unsafe_split_with_sizes"} & {*targets(traced)}
    assert_same(traced, plain, randn(3, 4), randn(2, 4, 4), randn(4))


def in_a_stack(m, x):
    """Layers on tensors of their own, of which the last gives a stack."""
    return [getattr(m, name + "2")(getattr(m, name)(x).sin()) for name in "abc"]


OF_A_STACK = {
    "cat at the end": lambda m, x: torch.cat(in_a_stack(m, x), -1).sin(),
    "cat in front": lambda m, x: torch.cat(in_a_stack(m, x)).sin(),
    "cat along another dimension": lambda m, x: torch.cat(in_a_stack(m, x), 1).sin(),
    "cat along another one from behind": lambda m, x: torch.cat(in_a_stack(m, x), -2).sin(),
}


@pytest.mark.parametrize("script", OF_A_STACK.values(), ids=OF_A_STACK)
def test_of_a_stack(script):
    traced, plain = both(Scripted(script, **linears("", "2")))
    assert not {"cat", "unstack"} & {*targets(traced)}
    inputs = randn(3, 4), randn(1, 4), randn(2, 5, 4), randn(4)
    assert_same(traced, plain, *inputs)
    Separate()(traced)
    assert targets(traced).count("cat") == 1
    assert_same(traced, plain, *inputs)


@pytest.mark.parametrize("reader", [lambda h: h.view(-1), lambda h: h])
def test_a_cat_of_a_stack_that_is_read_by_strides(reader):
    script = Scripted(lambda m, x: reader(torch.cat(in_a_stack(m, x), -1)), **linears("", "2"))
    traced, plain = both(script)
    assert "cat" in targets(traced)
    assert_same(traced, plain, randn(3, 4), randn(1, 4))


@pytest.mark.parametrize("script", LEFT.values(), ids=LEFT)
def test_left(script):
    traced, plain = both(Scripted(script, **linears()))
    assert {"cat", "stack"} & {*targets(traced)}
    assert_same(traced, plain, randn(3, 4), randn(2, 4, 4), randn(4))


def among(m, x, function=lambda h: h):
    return [x, *parts(m, x, function), x.cos()]


AMONG_OTHERS = {
    "cat": lambda m, x: torch.cat(among(m, x), -1).sin(),
    "cat after an activation": lambda m, x: torch.cat(among(m, x, torch.tanh), -1).sin(),
    "cat with some behind": lambda m, x: torch.cat([*parts(m, x), x], -1).sin(),
    "stack": lambda m, x: torch.stack([x.exp(), *in_a_stack(m, x)], 1).sin().sum(1),
    "stack in front": lambda m, x: torch.stack([*in_a_stack(m, x), x.exp()]).sin().sum(0),
    "stack at the end": lambda m, x: torch.stack([x.exp(), *in_a_stack(m, x)], -1).sin().sum(-1),
    "changed after tanh": lambda m, x: torch.cat(among(m, x, torch.tanh), -1).add_(1).sin(),
}

LEFT_AMONG_OTHERS = {
    "another dimension": lambda m, x: torch.cat([x.exp(), *parts(m, x)], 0).sin(),
    "twice": lambda m, x: torch.cat([p := m.a(x), m.b(x), m.c(x), p], -1).sin(),
    "read by others": lambda m, x: torch.cat([x, *(p := parts(m, x))], -1).sin() + p[0].sum(),
    "with others between": lambda m, x: torch.cat([m.a(x), x, m.b(x), m.c(x)], -1).sin(),
    "a cat of a stack": lambda m, x: torch.cat([x, *in_a_stack(m, x)], -1).sin(),
    "few among many": lambda m, x: torch.cat([x] * 4 + parts(m, x), -1).sin(),
    "strides": lambda m, x: torch.stack([x, *in_a_stack(m, x)], 1).view(-1).sin(),
}


@pytest.mark.parametrize("script", AMONG_OTHERS.values(), ids=AMONG_OTHERS)
def test_among_others(script):
    traced, plain = both(Scripted(script, **linears("", "2")))
    assert not {"stack", "unstack", "unsafe_split_with_sizes"} & {*targets(traced)}
    assert_same(traced, plain, randn(3, 4), randn(2, 4, 4), randn(4))
    Separate()(traced)
    assert_same(traced, plain, randn(3, 4))


@pytest.mark.parametrize("script", LEFT_AMONG_OTHERS.values(), ids=LEFT_AMONG_OTHERS)
def test_left_among_others(script):
    traced, plain = both(Scripted(script, **linears("", "2")))
    assert {"unstack", "unsafe_split_with_sizes"} & {*targets(traced)}
    assert_same(traced, plain, randn(3, 4))


def test_what_does_not_go_together_raises_among_others_as_well():
    traced, plain = both(Scripted(AMONG_OTHERS["stack"], **linears("", "2")))
    for model in (plain, traced):
        with pytest.raises(RuntimeError):
            model(randn(4, 5))


def test_neither_the_tensor_is_cut_nor_its_gradient_joined():
    traced, _ = both(Scripted(AMONG_OTHERS["cat"], **linears()))
    with OperationCounter() as counter:
        traced(randn(3, 4)).sum().backward()
    assert (counter.counts().joins, counter.counts().splits) == (1, 0)


def split_and_joined(sizes, dim=-1, source=lambda m, x: m.a(x)):
    def script(m, x):
        pieces = torch.split(source(m, x), sizes, dim)
        return torch.cat([pieces[i] for i in range(len(sizes))], dim)

    return script


SOURCES = {
    "layer": (lambda m, x: m.a(x), True),
    "activation": (lambda m, x: F.gelu(m.a(x)), True),
    "input": (lambda m, x: x, False),
    "view": (lambda m, x: m.a(x).view(-1, 4), False),
    "another order in memory": (lambda m, x: F.gelu(x.transpose(0, -1)), False),
    "dropout": (lambda m, x: F.dropout(x, 0.5, training=False), False),
}


@pytest.mark.parametrize(("source", "gone"), SOURCES.values(), ids=SOURCES)
def test_splits_of_others(source, gone):
    """The result has memory of its own, and lies as `torch.cat` puts it."""
    script = split_and_joined([1, 3], -1, source)
    traced, plain = both(Scripted(script, **linears()), [Cancel()])
    assert ("cat" not in targets(traced)) == gone
    assert_same(traced, plain, randn(4, 4), randn(2, 3, 4))
    output = traced(x := randn(4, 4))
    assert output.is_contiguous()
    assert output.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert not Cancel()(traced).modified


@pytest.mark.parametrize("sizes", [[1, 2], [2, 3]])
def test_sizes_that_do_not_sum(sizes):
    traced, plain = both(Scripted(split_and_joined(sizes), **linears()), [Cancel()])
    for model in (traced, plain):
        with pytest.raises(RuntimeError, match="sum exactly to 4"):
            model(randn(3, 4))


def test_a_source_that_is_read_by_others():
    def script(m, x):
        h = m.a(x)
        pieces = torch.split(h, [1, 3], -1)
        return torch.cat([pieces[0], pieces[1]], -1).add_(1).sin() + h

    traced, plain = both(Scripted(script, **linears()), [Cancel()])
    assert targets(traced) == targets(plain)


def recut(m, x):
    first, second, third = torch.split(torch.cat([m.a(x), m.b(x.cos()), m.c(x.sin())], -1), 4, -1)
    return first.tanh(), second.relu(), third


def test_a_split_of_what_several_layers_gave_stays():
    traced, plain = both(Scripted(recut, **linears()))
    assert "cat" in targets(traced)
    assert "split" in targets(traced)
    assert_same(traced, plain, randn(3, 4))


def test_a_piece_that_the_loss_leaves_out_gives_its_layer_zeros():
    traced, plain = both(Scripted(recut, **linears()))
    for model in (traced, plain):
        model(randn(3, 4))[0].sum().backward()
        assert model.b.weight.grad.eq(0).all()
        assert model.a.weight.grad.ne(0).any()


SUMS = {
    "two": lambda m, x: m.a(x) + m.b(x),
    "three": lambda m, x: m.a(x) + m.b(x) + m.c(x),
    "of a list": lambda m, x: sum([m.a(x), m.b(x)]),
    "of a stack": lambda m, x: torch.stack([m.a(x), m.b(x)]).sum(0),
}


@pytest.mark.parametrize("script", SUMS.values(), ids=SUMS)
def test_a_sum_of_branches_stays_a_sum(script):
    """One wide product, and each branch gets its own gradient."""
    traced, plain = both(Scripted(lambda m, x: script(m, x).sin(), **linears()))
    assert [target for target in targets(traced) if "wide" in target] == ["a.wide"]
    assert {"add", "sum"} & {*targets(traced)}
    assert_same(traced, plain, randn(3, 4), randn(2, 4, 4), randn(4))
    assert_released_to_the_bit(traced, plain)


ORDERS = [list(order) for order in itertools.permutations("abc")]


@pytest.mark.parametrize("order", ORDERS, ids="".join)
@pytest.mark.parametrize("declared", ORDERS[::2], ids="".join)
@pytest.mark.parametrize("called", [sorted, list], ids=["called in turn", "called as joined"])
def test_any_order(order, declared, called):
    """Whatever the orders of declarations, calls and parts, the joint is gone."""

    def script(m, x):
        h = {name: getattr(m, name)(x).cos() for name in called(order)}
        return torch.cat([h[name] for name in order], -1).sin()

    modules = {name: nn.Linear(4, "abc".index(name) + 2) for name in declared}
    traced, plain = both(Scripted(script, **modules))
    assert targets(traced).count("cos") == 1
    assert not {"cat", "unsafe_split_with_sizes"} & {*targets(traced)}
    assert_same(traced, plain, randn(3, 4))
    assert_released_to_the_bit(traced, plain)


def test_two_joints_of_one_layer():
    """The first one that is called has the say."""

    def script(m, x):
        first = torch.cat([m.c(x), m.a(x), m.b(x)], -1).sin()
        return first, torch.cat([m.b(2 * x), m.a(2 * x), m.c(2 * x)], -1).sin()

    traced, plain = both(Scripted(script, **linears()))
    assert targets(traced).count("cat") == 1
    assert_same(traced, plain, randn(3, 4))


def test_towers_that_are_stacked_in_another_order():
    def script(m, x):
        h = {name: getattr(m, name)(x).transpose(0, 1).relu() for name in "abc"}
        for name in "abc":
            h[name] = getattr(m, name + "2")(h[name])
        return torch.stack([h[name] for name in "bca"]).sin()

    traced, plain = both(Scripted(script, **linears("", "2")))
    assert [target for target in targets(traced) if "wide" in target] == ["a.wide", "b2.wide"]
    assert targets(traced).count("stack") == 1
    assert_same(traced, plain, randn(4, 4), randn(2, 4, 4))


IMAGES = {
    "batched": (randn(2, 3, 6, 7), randn(1, 3, 5, 5)),
    "unbatched": (randn(3, 6, 7), randn(3, 9, 7)),
    "channels last": (randn(2, 3, 6, 7).to(memory_format=torch.channels_last),),
    "one pixel": (randn(2, 3, 3, 3),),
    "of another rank": (randn(3, 4),),
}


@pytest.mark.parametrize("inputs", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("dim", [1, -3, 0, 2, 3])
def test_images(inputs, dim):
    """Dimension 1 of what comes without a batch is no channel."""
    convs = {name: nn.Conv2d(3, width, 3) for name, width in zip("abc", (4, 2, 4), strict=True)}
    steps = branches(lambda m, h, name: F.gelu(h), names="cab")
    traced, plain = both(Scripted(lambda m, x: torch.cat(steps(m, x), dim).sin(), **convs))
    assert ("cat" not in targets(traced)) == (dim in (1, -3))
    assert_same(traced, plain, *inputs)


def test_what_is_left_of_a_joint_is_taken_apart():
    convs = layers(lambda: nn.Conv2d(3, 4, 3))
    traced, plain = both(Scripted(lambda m, x: torch.cat(parts(m, x), 1).sin(), **convs))
    Separate()(traced)
    assert "cat" in targets(traced)
    assert_same(traced, plain, randn(2, 3, 6, 7), randn(3, 6, 7))


def test_a_rejoined_image_is_not_copied():
    convs = layers(lambda: nn.Conv2d(3, 4, 3))
    traced, _ = both(Scripted(lambda m, x: torch.cat(parts(m, x), 1).sin(), **convs))
    with OperationCounter() as counter:
        traced(randn(2, 3, 6, 7))
    assert (counter.counts().joins, counter.counts().convolutions) == (0, 1)


CUTS = {
    "split": lambda h: torch.split(h, [2, 3, 4], -1),
    "method": lambda h: h.split((2, 3, 4), dim=-1),
    "with sizes": lambda h: h.split_with_sizes([2, 3, 4], -1),
}

OTHER_CUTS = {
    "other sizes": lambda h: torch.split(h, [3, 2, 4], -1),
    "one size": lambda h: torch.split(h, 3, -1),
    "another dimension": lambda h: torch.split(h, [2, 3, 4], 1),
}


def joined_and_cut(cut, end):
    modules = {name: nn.Linear(4, width) for name, width in zip("abc", (2, 3, 4), strict=True)}

    def script(m, x):
        pieces = cut(torch.cat(parts(m, x, F.gelu), -1))
        return [end(pieces[index]).sum(-1) for index in range(3)]

    return both(Scripted(script, **modules))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_cut_again(cut):
    """What is done to the pieces is done to all of them at once."""
    traced, plain = joined_and_cut(cut, torch.sin)
    assert targets(traced).count("sin") == 1
    assert_same(traced, plain, randn(3, 4), randn(2, 3, 4))


@pytest.mark.parametrize("cut", OTHER_CUTS.values(), ids=OTHER_CUTS)
def test_cut_in_another_way(cut):
    traced, plain = joined_and_cut(cut, torch.sin)
    assert targets(traced).count("sin") == 3
    assert_same(traced, plain, randn(3, 4), randn(2, 9, 4))


def test_equal_parts_cut_again():
    def script(m, x):
        pieces = torch.cat(parts(m, x), -1).chunk(3, dim=-1)
        return [pieces[index].sin().sum(-1) for index in range(3)]

    traced, plain = both(Scripted(script, **linears()))
    assert targets(traced).count("sin") == 1
    assert_same(traced, plain, randn(3, 4), randn(2, 3, 4))


def test_a_piece_that_is_changed_in_place():
    """What `split` gives raises then, and must go on."""
    traced, plain = joined_and_cut(CUTS["split"], torch.sin_)
    assert targets(traced).count("sin_") == 3
    assert_same(traced, plain, randn(3, 4))


def test_split_unite_split():
    """Nothing is joined, and nothing is copied, whatever the sizes are the second time."""
    model = Scripted(
        lambda m, x: [part.sin() for part in m.again(m.unite(m.split(x)))],
        split=Split(nn.Linear(4, 6), sizes=[2, 4], dim=-1),
        unite=Unite(dim=-1),
        again=Split(nn.Identity(), sizes=[3, 3], dim=-1),
    ).double()
    optimized = optimize(model, (randn(3, 4),))
    x = randn(3, 4)
    with OperationCounter() as counter:
        optimized(x)
    counts = counter.counts()
    assert (counts.joins, counts.copies, counts.splits) == (0, 0, 1)
    assert_same(optimized, model, randn(3, 4), randn(2, 3, 4))
