"""How deep branches go in what the rewritten forwards run, and what that launches."""

import pytest
import torch
from depth import MODELS
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.graph.depth import Chain


class Critics(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 1)) for _ in range(2)
        )

    def forward(self, x):
        return self.a(x), self.b(x)


class Parting(nn.Module):
    """Four siblings: three with a norm, of which two go on; the last is alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 4, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        a, b, c, d = [layer(x) for layer in self.layers]
        a, b, c = self.norms[0](a), self.norms[1](b), self.norms[2](c)
        return self.pool(F.relu(a)) * self.pool(F.relu(b)), torch.sigmoid(c).sum(), d.sum()


class Towers(nn.Module):
    """Three siblings, and three towers that read tensors of their own."""

    def __init__(self):
        super().__init__()
        self.gates = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)) for _ in range(3)
        )

    def forward(self, x):
        gated = [gate(x) * x for gate in self.gates]
        return [tower(each) for tower, each in zip(self.towers, gated, strict=True)]


class Joined(nn.Module):
    """The joint that is taken out is the group's.

    One behind what keeps its output for backward stays, since the caller may change the result.
    """

    def __init__(self, activation):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 5)
        self.activation = activation

    def forward(self, x):
        return torch.cat([self.activation(self.a(x)), self.activation(self.b(x))], -1)


class Modes(Critics):
    """What runs in one mode only is not reported in the other."""

    def forward(self, x):
        a, b = self.a[0](x), self.b[0](x)
        if self.training:
            return torch.relu(a) * torch.relu(b)
        return torch.tanh(a) * torch.tanh(b)


def rows(report):
    return [(group.layers, group.launches, group.depth) for group in report.groups]


def saved(report):
    """What the rows say, and what the totals say."""
    before, after = report.launches.before.forward, report.launches.after.forward
    return sum(group.launches[0] - group.launches[1] for group in report.groups), before - after


def test_layers_behind_siblings():
    report = conjoin.report(Critics(), (torch.randn(3, 6),))
    chain = Chain(2, ("Linear", "ReLU", "Linear"), ("a.2", "b.2"))
    assert rows(report) == [(("a.0", "b.0"), (6, 3), (chain,))]


@pytest.mark.parametrize("training", [True, False])
def test_branches_that_part_ways(training):
    report = conjoin.report(Parting().train(training), (torch.randn(3, 3, 4, 4),))
    (group,) = report.groups
    assert {(chain.branches, chain.operations) for chain in group.depth} == {
        (2, ("Conv2d", "BatchNorm2d", "relu", "MaxPool2d")),
        (3, ("Conv2d", "BatchNorm2d")),
    }
    assert [name for chain in group.depth for name in chain.layers] == [
        "norms.0",
        "norms.1",
        "norms.2",
    ]
    assert len(set(saved(report))) == 1


def test_towers_without_siblings_have_a_row():
    """The stack of what they read is one of its launches."""
    report = conjoin.report(Towers(), (torch.randn(3, 4),))
    siblings, group = report.groups
    assert siblings.launches == (3, 1)
    assert group.layers == tuple(f"towers.{i}.0" for i in range(3))
    assert group.launches == (9, 1 + 3)
    assert [chain.operations for chain in group.depth] == [("Linear", "Tanh", "Linear")]


JOINTS = {F.silu: ((5, 2), 2), torch.tanh: ((4, 2), 3)}
"""The launches of the group's row, and of the whole forward, which takes 5 at first."""


@pytest.mark.parametrize(("activation", "launches"), JOINTS.items())
def test_a_joint_is_the_groups_where_it_is_taken_out(activation, launches):
    report = conjoin.report(Joined(activation), (torch.randn(3, 4),))
    row, after = launches
    assert rows(report) == [(("a", "b"), row, (Chain(2, ("Linear", activation.__name__)),))]
    assert (report.launches.before.forward, report.launches.after.forward) == (5, after)


def test_the_mode_that_the_model_is_in():
    model = Modes()
    for training, name in ((True, "relu"), (False, "tanh")):
        report = conjoin.report(model.train(training), (torch.randn(3, 6),))
        assert [chain.operations for chain in report.groups[0].depth] == [("Linear", name)]


def test_nothing_goes_on():
    model = conjoin.nn.Parallel(nn.Linear(4, 2), nn.Linear(4, 3))
    (group,) = conjoin.report(model, (torch.randn(3, 4),)).groups
    assert group.depth == ()
    assert group.launches == (2, 1)


def test_nothing_is_counted_without_inputs():
    assert all(group.depth == () for group in conjoin.report(Critics()).groups)


@pytest.mark.parametrize("model", [Critics, Modes], ids=lambda model: model.__name__)
def test_an_optimized_model_has_the_same_report(model):
    args = (torch.randn(3, 6),)
    plain = model()
    assert rows(conjoin.report(conjoin.optimize(plain, args), args)) == rows(
        conjoin.report(plain, args)
    )


DEEP = ["twins_td3", "two_branches", "mmoe_dict", "agent_cleanrl", "head_norms", "fcos"]


@pytest.mark.parametrize("name", DEEP)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_rows_add_up_to_the_totals(name, training):
    deep = MODELS[name]
    report = conjoin.report(deep.model().train(training), deep.call(4))
    rows, total = saved(report)
    assert rows == total > 0
    names = [layer for group in report.groups for layer in group.layers]
    names += [layer for group in report.groups for c in group.depth for layer in c.layers]
    assert len(set(names)) == len(names)
