"""Which groups are merged by which policy, in whole models."""

import copy
import dataclasses
import pickle

import pytest
import torch
from equivalence import assert_equivalent
from machines import HIDDEN, NONE, STEADY
from torch import nn

import conjoin
from conjoin.layers.view import wides
from conjoin.legality import Reason
from conjoin.policy import deciding, machine, race
from conjoin.policy.cost import Machine

ASKING = ((0.0, 0.0), (2**14, 1e-7), (2**14 + 1, 1.0), (2**15, 2.0))

SMALL = Machine(
    call=1e-6,
    cut=1e-6,
    step=0.0,
    rate=1e15,
    batched=1e15,
    bandwidth=1e15,
    shared=0.0,
    graph=0.0,
    alias=0.0,
    written=ASKING,
    joined=ASKING,
    few_rows=HIDDEN,
    convolved=NONE,
    convolved_back=NONE,
)
"""A machine that has to ask for each 16 KiB, and takes a second for that."""


class Heads(nn.Module):
    """n layers that read one tensor."""

    def __init__(self, count, width=16, features=32, names=None):
        super().__init__()
        self.features = features
        for name in names or [f"h{i}" for i in range(count)]:
            setattr(self, name, nn.Linear(features, width))

    def forward(self, x):
        return {name: layer(x) for name, layer in self.named_children()}


class Opaque(nn.Module):
    """A forward that is not rewritten, in which what is cut must be contiguous too."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 4, 1) for _ in range(3))

    def forward(self, x):
        if x.sum() > 1e9:
            return None
        return [layer(x).view(-1) for layer in (self.a, self.b, self.c)]


@pytest.fixture
def on(monkeypatch):
    """Lets the tests run on another machine."""

    def use(constants):
        monkeypatch.setattr(machine, "constants", lambda device, dtype: constants)

    return use


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(4, 32, dtype=torch.float64)


def heads(count=8, **options):
    torch.manual_seed(0)
    return Heads(count, **options).double()


def groups(report):
    return [(group.layers, group.fused) for group in report.groups]


@pytest.mark.parametrize("policy", ["auto", "always", "measure"])
def test_the_function_is_the_same(policy, x, on):
    on(SMALL)
    model = heads()
    optimized = conjoin.optimize(model, (x,), policy=policy)
    assert_equivalent(optimized, model, (x,))
    assert_equivalent(conjoin.unfuse(optimized), model, (x,))


def test_an_unknown_policy():
    for function in (conjoin.optimize, conjoin.report):
        with pytest.raises(ValueError, match="one of 'auto', 'always', 'measure', not 'never'"):
            function(heads(), policy="never")


def test_a_group_is_divided_where_that_is_quicker(x, on):
    on(SMALL)  # A weight has 4 KiB.
    optimized = conjoin.optimize(heads(), (x,))
    assert sorted(len(wide.widths) for wide in wides(optimized)) == [4, 4]
    report = conjoin.report(optimized, (x,))
    assert groups(report) == [
        (("h0", "h1", "h2", "h3"), True),
        (("h4", "h5", "h6", "h7"), True),
    ]
    assert report.groups[0].detail.startswith("one of 2 for 8 layers; estimate: ")
    assert report.groups[0].launches == (4, 1)
    assert not report.groups[0].figures.measured
    assert str(conjoin.report(heads(), (x,))) == str(report)


def test_a_group_that_does_not_pay_is_left_alone(x, on):
    on(SMALL)
    model = heads(2, width=48)
    optimized = conjoin.optimize(model, (x,))
    assert not wides(optimized)
    (group,) = conjoin.report(optimized, (x,)).groups
    assert group.reason is Reason.DOES_NOT_PAY
    assert group.detail.startswith("estimate: ")
    assert "as one layer" in group.detail
    assert group.figures.apart < group.figures.whole
    assert wides(conjoin.optimize(model, (x,), policy="always"))


def test_inference_has_no_gradients(x, on):
    on(SMALL)
    model = heads(2, width=48)
    assert wides(conjoin.optimize(model.eval(), (x,)))
    with torch.no_grad():
        assert wides(conjoin.optimize(model.train(), (x,)))
    assert wides(conjoin.optimize(model.requires_grad_(False), (x,)))


def test_without_shapes_or_constants_all_are_merged(x, on):
    on(SMALL)
    assert len(wides(conjoin.optimize(heads()))) == 1
    on(None)
    assert len(wides(conjoin.optimize(heads(), (x,)))) == 1


def test_fake_and_meta_models_are_merged_as_they_are(x, on):
    on(SMALL)
    model = heads().to("meta")
    for policy in ("auto", "measure"):
        assert len(wides(conjoin.optimize(model, (x.to("meta"),), policy=policy))) == 1


def test_the_order_of_declarations_decides_nothing(x, on):
    on(SMALL)
    names = [f"h{i}" for i in range(8)]
    found = set()
    for order in (names, names[::-1], names[3:] + names[:3]):
        report = conjoin.report(heads(names=order), (x,))
        found.add(frozenset((frozenset(layers), fused) for layers, fused in groups(report)))
    assert len(found) == 1


def test_it_is_the_same_each_time(x, on):
    on(SMALL)
    optimized = conjoin.optimize(heads(), (x,))
    held = {wide.identity for wide in wides(optimized)}
    again = conjoin.optimize(optimized, (x,), inplace=True)
    assert {wide.identity for wide in wides(again)} == held


def test_what_is_merged_stays_merged(x, on):
    on(STEADY)
    optimized = conjoin.optimize(heads(), (x,))
    on(SMALL)
    assert len(wides(conjoin.optimize(optimized, (x,)))) == 1
    assert groups(conjoin.report(optimized, (x,))) == [(tuple(f"h{i}" for i in range(8)), True)]


def test_what_was_decided_is_remembered(x, on):
    on(SMALL)
    optimized = conjoin.optimize(heads(2, width=48), (x,))
    told = str(conjoin.report(optimized, (x,)))
    on(STEADY)  # Where it would have been merged.
    for kept in (optimized, copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert str(conjoin.report(kept, (x,))) == told
    plain = conjoin.unfuse(optimized)
    assert deciding.DECIDED not in vars(plain)
    assert conjoin.report(plain, (x,)).groups[0].fused


def test_nothing_is_noted_where_all_is_merged(x):
    assert deciding.DECIDED not in vars(conjoin.optimize(heads(), (x,)))


@pytest.mark.parametrize("training", [True, False])
def test_where_no_forward_is_rewritten_copies_count(training):
    torch.manual_seed(0)
    model, x = Opaque().double().train(training), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with torch.set_grad_enabled(training):
        optimized = conjoin.optimize(model, (x,))
        report = conjoin.report(optimized, (x,))
        assert str(conjoin.report(model, (x,))) == str(report)
    # In training it saves more than it costs.
    (group,) = report.groups
    assert group.fused is bool(wides(optimized)) is training
    assert group.reason is (None if training else Reason.DOES_NOT_PAY)
    assert (group.figures is None) is training
    assert_equivalent(optimized, model, (x,))


class Straight(Opaque):
    """The same, where the forward is rewritten."""

    def forward(self, x):
        return [layer(x).view(-1) for layer in (self.a, self.b, self.c)]


def test_where_a_forward_is_rewritten_they_may_not_be_needed():
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        assert wides(conjoin.optimize(Straight(), (x,)))


class Asking(nn.Module):
    """A forward that is not rewritten, whose layers share runs."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 4) for _ in range(count))

    def forward(self, x):
        if x.sum() > 1e9:
            return None
        return [layer(x) for layer in self.layers]


class Told(Asking):
    """The same, where the forward is rewritten."""

    def forward(self, x):
        return [layer(x) for layer in self.layers]


@pytest.mark.parametrize("policy", ["auto", "measure"])
def test_what_it_takes_to_share_a_run_counts(policy, on, monkeypatch):
    def run(kind, layers, contiguous, input, among, *, training):
        return {form: 1e-6 * (2 * len(form)) for form in among}

    monkeypatch.setattr(race, "run", run)
    on(dataclasses.replace(STEADY, shared=STEADY.call))
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert wides(conjoin.optimize(Told(3), (x,), policy=policy))
        optimized = conjoin.optimize(Asking(3), (x,), policy=policy)
        assert not wides(optimized)
        (group,) = conjoin.report(optimized, (x,)).groups
        assert group.reason is Reason.DOES_NOT_PAY
        assert group.figures.measured is (policy == "measure")
        assert wides(conjoin.optimize(Asking(3), (x,), policy="always"))


@pytest.mark.parametrize(("groups", "pays"), [(1, True), (4, False)])
def test_what_convolutions_read_counts_for_each(groups, pays, on):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(8, 8, 1, groups=groups) for _ in range(2))

        def forward(self, x):
            return self.a(x), self.b(x)

    slow = dataclasses.replace(STEADY, cut=3 * STEADY.call)
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        on(slow)
        assert not wides(conjoin.optimize(Pair(), (x,)))
        on(dataclasses.replace(slow, convolved=((1, 1e-3), (2, 1e-3))))
        assert bool(wides(conjoin.optimize(Pair(), (x,)))) == pays


class Activated(Told):
    """The same, with something behind the layers that runs at once too."""

    def forward(self, x):
        return sum(layer(x).relu() for layer in self.layers)


@pytest.mark.parametrize("asks", [Asking, Told], ids=["in lockstep", "cut at once"])
def test_where_nothing_behind_gains_a_tie_does_not_pay(asks, on):
    on(dataclasses.replace(STEADY, cut=2.03 * STEADY.call))
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert wides(conjoin.optimize(Activated(3), (x,)))
        optimized = conjoin.optimize(asks(3), (x,))
        assert not wides(optimized)
    (group,) = conjoin.report(optimized, (x,)).groups
    assert group.figures.apart < group.figures.whole < 1.02 * group.figures.apart


def test_in_training_an_alias_counts_where_the_input_gets_a_gradient(on):
    on(dataclasses.replace(STEADY, alias=1e-3))
    model, x = Asking(3), torch.randn(4, 8)
    assert wides(conjoin.optimize(model, (x,)))
    passed_on = nn.Sequential(nn.Linear(8, 8), Asking(3))
    assert not wides(conjoin.optimize(passed_on, (x,)))
    with torch.no_grad():
        assert wides(conjoin.optimize(passed_on, (x,)))


def test_in_training_the_graph_of_a_run_counts(on):
    on(dataclasses.replace(STEADY, graph=1e-3))
    x = torch.randn(4, 8)
    assert wides(conjoin.optimize(Told(3), (x,)))
    assert not wides(conjoin.optimize(Asking(3), (x,)))
    with torch.no_grad():
        assert wides(conjoin.optimize(Asking(3), (x,)))


def test_in_training_what_a_rewritten_forward_asks_counts(on):
    on(dataclasses.replace(STEADY, shared=1e-3))
    model, x = Told(3), torch.randn(4, 8)
    assert not wides(conjoin.optimize(model, (x,)))
    with torch.no_grad():  # There modules are called less, which saves as much.
        assert wides(conjoin.optimize(model, (x,)))


@pytest.mark.parametrize("padding", [None, 0])
def test_in_training_rows_for_padding_count(padding, on):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Embedding(40, 8, padding_idx=padding) for _ in range(2))

        def forward(self, index):
            return self.a(index), self.b(index)

    on(dataclasses.replace(STEADY, step=0.0))
    model, index = Pair(), torch.randint(40, (2, 6))
    assert bool(wides(conjoin.optimize(model, (index,)))) is (padding is None)
    with torch.no_grad():
        assert wides(conjoin.optimize(model, (index,)))


def test_measured(x, monkeypatch):
    raced = []

    def run(kind, layers, contiguous, input, among, *, training):
        raced.append((len(layers), input.shape, input.requires_grad, training))
        return dict(zip(among, [3.0, 1.0, *[2.0] * (len(among) - 2)], strict=True))

    monkeypatch.setattr(race, "run", run)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = heads(4), heads(4), heads(2)

        def forward(self, x):
            return self.first(x), self.second(x.sin()), self.third(x.cos())

    optimized = conjoin.optimize(Two(), (x,), policy="measure")
    # Equal groups are raced once, and those of which the input gets no gradient without one.
    assert raced == [(4, x.shape, False, True), (2, x.shape, False, True)]
    report = conjoin.report(optimized, (x,))
    assert [(len(g.layers), g.fused, g.figures.measured) for g in report.groups] == [
        (2, True, True),
        (2, True, True),
        (2, True, True),
        (2, True, True),
        (2, False, True),
    ]
    assert report.groups[4].detail == ("measured: 1 s apart, 3 s as one layer, a training step")
    assert report.groups[0].detail == (
        "one of 2 for 4 layers; measured: 2 s apart, 3 s as one layer, 1 s as 2, a training step"
    )


def test_an_embedding_is_looked_up():
    class Tables(nn.Module):
        def __init__(self, *widths):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(50, width) for width in widths)

        def forward(self, index):
            return [table(index) for table in self.tables]

    index = torch.randint(50, (64,))
    for policy in ("auto", "measure"):
        conjoin.optimize(Tables(8, 8, 8), (index,), policy=policy)
    assert wides(conjoin.optimize(Tables(8, 8, 8), (index,)))
    with torch.no_grad():  # Tables of different widths are read one by one there, and joined.
        assert not wides(conjoin.optimize(Tables(8, 9, 10), (index,)))


class Mixed(nn.Module):
    """Layers that run in lockstep, and of two regions beside, each holds one of them."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Branch(), Branch()

    def forward(self, x):
        if x.sum() > 1e9:
            return None
        return [*self.one(x), *self.two(x)]


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        y = x.sin()
        return [self.conv(x).view(-1), self.a(y), self.b(y)]


def test_regions_know_what_was_left_apart():
    model, x = Mixed().double().eval(), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        optimized = conjoin.optimize(model, (x,))
        for branch in (optimized.one, optimized.two):
            assert type(branch.conv) is nn.Conv2d
            assert branch._get_name() == "Branch"
            assert type(branch) is not Branch  # A region, of which the plan holds.
            ((variant,),) = vars(branch)["conjoin_plan"].variants.values()
            assert variant.function(branch, (x,), {}) is not None
        report = conjoin.report(optimized, (x,))
        assert str(report) == str(conjoin.report(model, (x,)))
        assert {g.layers[0]: g.reason for g in report.groups}["one.conv"] is Reason.DOES_NOT_PAY
    assert_equivalent(optimized, model, (x,))


def test_a_second_time_what_was_divided_keeps_its_figures(x, on):
    on(SMALL)
    optimized = conjoin.optimize(heads(), (x,))
    again = conjoin.optimize(optimized, (x,), policy="always")
    assert str(conjoin.report(again, (x,))) == str(conjoin.report(optimized, (x,)))
    left = conjoin.optimize(heads(2, width=48), (x,))
    assert wides(conjoin.optimize(left, (x,), policy="always"))


def test_a_race_that_cannot_be_run_merges_all(x, monkeypatch):
    def run(*args, **options):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(race, "run", run)
    assert len(wides(conjoin.optimize(heads(), (x,), policy="measure"))) == 1


@pytest.mark.parametrize("look", [conjoin.optimize, conjoin.report])
def test_nothing_is_measured_without_inputs(look):
    with pytest.raises(ValueError, match="Pass example_inputs"):
        look(Mixed(), policy="measure")


class Carried(nn.Module):
    """Two layers, activations on what they give, and something that reads it as it lies."""

    def __init__(self, activations, *, joined=False):
        super().__init__()
        self.a, self.b = nn.Linear(32, 4), nn.Linear(32, 4)
        self.activations, self.joined = activations, joined

    def forward(self, x):
        branches = [self.a(x), self.b(x)]
        for _ in range(self.activations):
            branches = [torch.sigmoid(branch) for branch in branches]
        return torch.cat(branches, -1) if self.joined else tuple(branches)


class Branches(nn.Module):
    """Branches that read one tensor."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return tuple(branch(x) for branch in self.branches)


CUTTING = dataclasses.replace(SMALL, joined=((0.0, 0.0), (1.0, 5e-6), (2**20, 5e-6)))
"""A machine on which the cat of two gradients takes five microseconds."""


@pytest.mark.parametrize(
    ("activations", "joined", "fused"),
    [(0, False, False), (1, False, False), (4, False, True), (0, True, True)],
)
def test_what_is_only_cut_has_to_pay_by_itself(monkeypatch, activations, joined, fused):
    monkeypatch.setattr(machine, "constants", lambda device, dtype: CUTTING)
    model, x = Carried(activations, joined=joined), (torch.randn(1, 32),)
    made = conjoin.optimize(model, x)
    assert bool(wides(made)) is fused
    for told in (conjoin.report(model, x), conjoin.report(made, x)):
        (group,) = told.groups
        assert group.fused is fused
        assert fused or group.figures.apart < group.figures.whole
    assert wides(conjoin.optimize(model, x, policy="always"))


def test_what_is_behind_a_group_that_is_left_apart_is_too(monkeypatch):
    monkeypatch.setattr(machine, "constants", lambda device, dtype: CUTTING)
    norms = [nn.Sequential(nn.Linear(32, 4), nn.BatchNorm1d(4), nn.Sigmoid()) for _ in range(2)]
    model, x = Branches(norms).double(), (torch.randn(3, 32, dtype=torch.float64),)
    made = conjoin.optimize(model, x)
    assert not wides(made)
    assert [group.fused for group in conjoin.report(made, x).groups] == [False]
    assert_equivalent(made, model, x)
    assert len(wides(conjoin.optimize(model, x, policy="always"))) == 2
