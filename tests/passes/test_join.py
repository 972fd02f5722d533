"""Products with weights of their own become one where it pays to join the weights at each call."""

import copy
import warnings

import pytest
import torch
from equivalence import assert_close, gradients, tensors
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.graph import functional
from conjoin.passes import Join


class Heads(nn.Module):
    """Many small layers on one tensor."""

    def __init__(self, heads=None, between=lambda m, x, i: None):
        super().__init__()
        self.heads = nn.ModuleList(heads or [nn.Linear(6, 2 + i % 3) for i in range(8)])
        self.between = between

    def forward(self, x):
        made = []
        for i, head in enumerate(self.heads):
            self.between(self, x, i)
            made.append(head(x).sin())
        return made


class Counting:
    """A backend that counts the products of the graphs that it is given."""

    def __init__(self):
        self.counts = []

    def __call__(self, graph_module, inputs):
        nodes = graph_module.graph.nodes
        self.counts.append(sum(functional.is_product(node) for node in nodes))
        return graph_module.forward


@pytest.fixture(autouse=True)
def _seeded():
    torch.compiler.reset()
    torch.manual_seed(0)


def assert_same(model, calls, products, *, grad=False):
    """The compiled model is the same function, with so many products in each graph."""
    torch.compiler.reset()
    inner = Counting()
    compiled = torch.compile(model, backend="conjoin", options={"backend": inner})
    state = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings(), torch.set_grad_enabled(grad):
        warnings.filterwarnings("ignore", "[0-9]+ layers of the compiled model")
        for args in calls:
            found = []
            for run in (model, compiled):
                model.load_state_dict(state)
                model.zero_grad()
                leaves = [each.detach().clone().requires_grad_(each.requires_grad) for each in args]
                outputs = dict(tensors(run(*leaves)))
                if any(each.requires_grad for each in outputs.values()):
                    sum((each * each).sum() for each in outputs.values()).backward()
                input_gradients = {str(i): leaf.grad for i, leaf in enumerate(leaves)}
                strides = [each.stride() for each in outputs.values()]
                found.append((outputs, gradients(model), input_gradients, strides))
            for ours, theirs in zip(found[1][:3], found[0][:3], strict=True):
                assert_close(ours, theirs)
            assert found[0][3] == found[1][3]
    assert set(inner.counts) == {products}
    return inner


def batches(*shape, grad=False):
    return [(torch.randn(n, *shape).double().requires_grad_(grad),) for n in (3, 5, 7)]


def test_many_small_layers_are_joined():
    inner = assert_same(Heads().double(), batches(6), 1)
    assert len(inner.counts) == 2, "once for the first batch, once for any"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions(dimensions, transposed):
    cls = getattr(nn, f"Conv{'Transpose' * transposed}{dimensions}d")
    model = Heads([cls(3, 2 + i % 2, 2, bias=False) for i in range(8)]).double()
    assert_same(model, batches(3, *[3] * dimensions), 1)


def test_they_stay_apart_where_gradients_come_back():
    assert_same(Heads().double(), batches(6, grad=True), 8, grad=True)
    model = Heads().double().requires_grad_(False)
    assert_same(model, batches(6), 1, grad=True)
    assert_same(model, batches(6, grad=True), 8, grad=True)


def test_only_those_of_which_no_gradient_is_wanted():
    model = Heads([nn.Linear(6, 2) for _ in range(16)]).double()
    for head in model.heads[::2]:
        head.requires_grad_(False)
    assert_same(model, batches(6), 9, grad=True)
    assert_same(model, batches(6), 1)


class Leaving(Heads):
    """What the layers give leaves the graph as it is."""

    def forward(self, x):
        return [head(x) for head in self.heads]


def test_parts_that_leave_the_graph_are_copied_and_that_counts():
    assert_same(Leaving().double(), batches(6), 8)


def test_parts_are_copied_where_somebody_could_tell():
    assert_same(Asked([nn.Linear(6, 2) for _ in range(16)]).double(), batches(6), 1)


class Asked(Heads):
    """How some of what the layers give lies in memory is asked."""

    def forward(self, x):
        made = [head(x) for head in self.heads]
        return [made[0].view(-1).sin(), *(each.sin() * each.stride(0) for each in made[1:])]


def test_few_layers_and_large_weights_stay_apart():
    assert_same(Heads([nn.Linear(6, 2) for _ in range(2)]).double(), batches(6), 2)
    large = Heads([nn.Linear(512, 512) for _ in range(4)]).double()
    assert_same(large, batches(512), 4)


def test_groups_stay_apart():
    model = Heads([nn.Conv1d(4, 4, 2, groups=2) for _ in range(8)]).double()
    assert_same(model, batches(4, 3), 8)


def test_layers_without_a_bias_stay_with_one_another():
    model = Heads([nn.Linear(6, 2, bias=i % 2 == 0) for i in range(16)]).double()
    assert_same(model, batches(6), 2)


def _change_weight(model, x, i):
    if i == 8:
        with torch.no_grad():
            model.heads[9].weight.mul_(2)


def _change_input(model, x, i):
    if i == 8:
        x.mul_(2)


@pytest.mark.parametrize("between", [_change_weight, _change_input], ids=["weight", "input"])
def test_nothing_moves_past_a_change(between):
    model = Heads([nn.Linear(6, 2) for _ in range(16)], between).double()
    assert_same(model, batches(6), 2)


class Computed(nn.Module):
    """Products with what is no parameter."""

    def __init__(self, weight):
        super().__init__()
        self.given = nn.ParameterList(nn.Parameter(torch.randn(2, 6)) for _ in range(8))
        self.weight = weight
        for i in range(8):
            self.register_buffer(f"b{i}", torch.randn(2, 6))

    def forward(self, x):
        return [F.linear(x, self.weight(self, i)).sin() for i in range(8)]


@pytest.mark.parametrize(
    "weight",
    [lambda m, i: m.given[i] * 2, lambda m, i: getattr(m, f"b{i}")],
    ids=["computed", "buffers"],
)
def test_only_parameters_are_joined(weight):
    assert_same(Computed(weight).double(), batches(6), 8)


def test_autocast():
    model = Heads()
    inner = Counting()
    compiled = torch.compile(model, backend="conjoin", options={"backend": inner})
    x = torch.randn(3, 6)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(compiled(x), model(x), strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
    assert inner.counts == [8]


def test_a_machine_that_is_not_measured(monkeypatch):
    monkeypatch.setattr(conjoin.policy.machine, "constants", lambda device, dtype: None)
    assert_same(Heads().double(), batches(6), 8)


def test_alone_it_changes_dynamos_graph_and_no_other():
    traced = torch.fx.symbolic_trace(Heads().double())
    assert not Join()(traced).modified
