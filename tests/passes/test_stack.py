"""Second layers of the branches become one batched product, where it pays to stack weights."""

import copy
import itertools

import pytest
import torch
from compiled import Inner, assert_same_compiled
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.layers import kind_of
from conjoin.layers.fusing import fuse
from conjoin.passes import Stack

EXPERTS = 16


class Experts(nn.Module):
    """Experts whose outputs are listed, behind a branch on values."""

    def __init__(self, count=EXPERTS, width=6, layers=2, between=F.relu, bias=True):
        super().__init__()
        sizes = [6, *[width] * layers]
        self.experts = nn.ModuleList(
            nn.ModuleList(nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes))
            for _ in range(count)
        )
        self.between = between

    def branches(self, x):
        made = []
        for layers in self.experts:
            y = x
            for layer in layers:
                y = self.between(layer(y))
            made.append(y if isinstance(y, torch.Tensor) else y[0])
        return made

    def forward(self, x):
        if x.sum() > 1e9:
            return [x]
        return self.end(self.branches(x))

    def end(self, made):
        return [each.sin() for each in made]


class Gated(Experts):
    """A multi-gate mixture of them."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Linear(6, len(self.experts))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        experts = torch.stack(self.branches(x), -2)
        return (self.gate(x).softmax(-1).unsqueeze(-2) @ experts).squeeze(-2)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def batches(*shape, grad=False):
    return [(torch.randn(n, *shape).double().requires_grad_(grad),) for n in (3, 5, 7)]


def optimized(model, args):
    fused = conjoin.optimize(copy.deepcopy(model), args, policy="always")
    assert any(group.fused for group in conjoin.report(fused, args).groups)
    return fused


PRODUCTS = ("linear", "baddbmm", "bmm")


@pytest.mark.parametrize(
    ("layers", "before", "dynamic"), [(2, False, None), (2, True, True), (3, True, None)]
)
def test_later_layers_are_batched_products(layers, before, dynamic):
    plain = Experts(layers=layers).double()
    calls = batches(6)
    model = optimized(plain, calls[0]) if before else plain
    inner = assert_same_compiled(model, calls, plain=plain, dynamic=dynamic)
    assert inner.count("baddbmm") == {0, layers - 1}
    assert inner.count(*PRODUCTS) == {0, layers}
    assert inner.count("relu") == {0, layers - 1 + EXPERTS}, "the last ones gain nothing"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_a_mixture_is_joined_with_nothing(name, mode):
    plain = Gated().double().eval()
    calls = batches(6)
    model = optimized(plain, calls[0])
    inner = assert_same_compiled(model, calls, plain=plain, inner=Inner(name), mode=mode)
    assert inner.count(*PRODUCTS) == {0, 2}
    assert inner.count("stack") == {0, 2}, "the weights and the biases"


def test_rows_of_several_dimensions_and_no_bias():
    plain = Gated(bias=False).double()
    inner = assert_same_compiled(plain, batches(4, 6), dynamic=True)
    assert inner.count("bmm") == {0, 1}
    assert inner.count("stack") == {0, 1}


def test_they_stay_apart_where_gradients_come_back():
    for calls in (batches(6), batches(6, grad=True)):
        plain = Experts().double()
        inner = assert_same_compiled(plain, calls, grad=True)
        assert inner.count("linear") == {0, 2 * EXPERTS}
        fused = optimized(plain, calls[0])
        inner = assert_same_compiled(fused, calls, plain=plain, grad=True)
        assert inner.count("linear") == {0, 1 + EXPERTS}
        assert inner.count("relu") == {0, 2 * EXPERTS}, "nothing is moved for its own sake"


def merged(plain):
    """A model of which both levels were merged, and whose forward is not rewritten."""
    fused = copy.deepcopy(plain)
    for level in range(2):
        layers = [expert[level] for expert in fused.experts]
        fuse(kind_of(layers[0]), layers, fused)
    return fused


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
@pytest.mark.parametrize("bias", [True, False])
def test_what_was_merged_is_a_stack_as_it_is_with_gradients_too(bias, name):
    plain = Gated(bias=bias).double()
    for grad in (True, False):
        calls = batches(6, grad=grad)
        inner = assert_same_compiled(
            merged(plain), calls, plain=plain, grad=grad, inner=Inner(name)
        )
        assert inner.count(*PRODUCTS) == {0, 3}, "the gate is no sibling here"
        assert inner.count("stack", "cat") == {0}


def test_slices_in_another_order_stay_apart():
    plain = Experts().double()
    fused = copy.deepcopy(plain)
    for level, step in ((0, 1), (1, -1)):
        layers = [expert[level] for expert in fused.experts][::step]
        fuse(kind_of(layers[0]), layers, fused)
    inner = assert_same_compiled(fused, batches(6), plain=plain)
    assert inner.count("linear") == {0, 1 + EXPERTS}


def test_large_weights_and_few_experts_stay_apart():
    plain = Experts(width=256).double()
    inner = assert_same_compiled(optimized(plain, batches(6)[0]), batches(6), plain=plain)
    assert inner.count("linear") == {0, 1 + EXPERTS}
    plain = Experts(2).double()
    inner = assert_same_compiled(optimized(plain, batches(6)[0]), batches(6), plain=plain)
    assert inner.count("linear") == {0, 3}


def test_one_row_stays_apart():
    plain = Experts().double()
    calls = [(torch.randn(1, 6).double(),)] * 2
    inner = assert_same_compiled(optimized(plain, calls[0]), calls, plain=plain)
    assert inner.count("linear") == {0, 1 + EXPERTS}


class Unlike(Experts):
    """Half of the experts have another activation in between."""

    def branches(self, x):
        made = []
        for i, (first, second) in enumerate(self.experts):
            y = first(x)
            y = y.tanh() if i < EXPERTS // 2 else y.sigmoid()
            made.append(second(y))
        return made


def test_only_neighbours_that_are_alike():
    plain = Unlike().double()
    inner = assert_same_compiled(optimized(plain, batches(6)[0]), batches(6), plain=plain)
    assert inner.count("baddbmm") == {0, 2}


class Changed(Experts):
    """Something changes between the layers of one expert and those of the next."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def branches(self, x):
        made = []
        for i, (first, second) in enumerate(self.experts):
            y = first(x).sin()
            if i == EXPERTS - 1:
                self.change(self, y)
            made.append(second(y))
        return made


def _change_weight(model, y):
    with torch.no_grad():
        model.experts[0][1].weight.mul_(2)


def _change_input(model, y):
    y.mul_(2)


@pytest.mark.parametrize("change", [_change_weight, _change_input])
def test_nothing_moves_past_a_change(change):
    plain = Changed(change).double()
    fused = optimized(Changed(lambda model, y: None).double(), batches(6)[0])
    fused.change = change
    fused.load_state_dict(plain.state_dict())
    assert_same_compiled(fused, batches(6), plain=plain)


class InPlace(Experts):
    """Activations in place, and outputs that are changed in place and that leave the graph."""

    def branches(self, x):
        made = [second(F.relu(first(x), inplace=True)) for first, second in self.experts]
        made[0].mul_(3)
        return made

    def end(self, made):
        made[1] += 1
        return [*made, made[0].view(-1)]


@pytest.mark.parametrize("name", ["eager", "aot_eager"])
def test_in_place_and_leaving(name):
    plain = InPlace().double()
    fused = optimized(plain, batches(6)[0])
    inner = assert_same_compiled(fused, batches(6), plain=plain, inner=Inner(name))
    assert inner.count("baddbmm") == {0, 1}


class Placed(Experts):
    """What is read is given by its place in memory."""

    def end(self, made):
        return [each.as_strided((2, 3), (3, 1), 0).sin() for each in made]


def test_places_in_memory():
    plain = Placed(between=lambda y: y).double()
    inner = assert_same_compiled(optimized(plain, batches(6)[0]), batches(6), plain=plain)
    assert inner.count("baddbmm") == {0}


def test_autocast():
    plain = Experts()
    inner = Inner()

    def mode():
        return torch.autocast("cpu", torch.bfloat16)

    with torch.no_grad():
        fused = optimized(plain, (torch.randn(3, 6),))
        assert_same_compiled(fused, [(torch.randn(3, 6),)], plain=plain, inner=inner, mode=mode)
    assert inner.count("baddbmm") == {0}


def test_a_machine_that_is_not_measured(monkeypatch):
    plain = Experts().double()
    fused = optimized(plain, batches(6)[0])
    monkeypatch.setattr(conjoin.policy.machine, "constants", lambda device, dtype: None)
    inner = assert_same_compiled(fused, batches(6), plain=plain)
    assert inner.count("linear") == {0, 1 + EXPERTS}


def test_alone_it_changes_dynamos_graph_and_no_other():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    assert not Stack()(traced).modified
