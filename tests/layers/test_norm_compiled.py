"""Normalizations of branches under `torch.compile`: side by side, on buffers of their own."""

import copy
from collections import Counter

import pytest
import torch
from equivalence import assert_close, gradients, tensors
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.nn import functional as F

import conjoin

WIDTHS = (2, 6, 4)


class Branches(nn.Module):
    """Convolutions of one tensor, each normalized; `make` is the class of the normalization."""

    def __init__(self, make):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, width, 1) for width in WIDTHS)
        self.norms = nn.ModuleList(make(width) for width in WIDTHS)

    def forward(self, x):
        pairs = zip(self.convs, self.norms, strict=True)
        return torch.cat([F.relu(norm(conv(x))) for conv, norm in pairs], 1)


NORMS = {
    "BatchNorm": lambda width: nn.BatchNorm2d(width, eps=0.1, momentum=0.3),
    "InstanceNorm": lambda width: nn.InstanceNorm2d(width, affine=True),
    "tracked InstanceNorm": lambda width: nn.InstanceNorm2d(
        width, affine=True, track_running_stats=True
    ),
    "GroupNorm": lambda width: nn.GroupNorm(width // 2, width),
    "PReLU": nn.PReLU,
}


class Counting:
    """An inner backend that keeps what the graphs call."""

    def __init__(self, name="aot_eager"):
        self.name, self.graphs = name, []

    def __call__(self, graph_module, inputs):
        names = (getattr(node.target, "__name__", "") for node in graph_module.graph.nodes)
        self.graphs.append(Counter(names))
        return lookup_backend(self.name)(graph_module, inputs)


@pytest.fixture(autouse=True)
def _compile_anew():
    torch.compiler.reset()
    torch.manual_seed(0)


def images(batch=3):
    return torch.randn(batch, 3, 5, 4, dtype=torch.float64)


def compiled(make, name="aot_eager"):
    """A model, its optimized form, that compiled, and the counting backend."""
    plain = Branches(make).double()
    for norm in plain.norms:
        for tensor in (*norm.parameters(), *norm.buffers()):
            if tensor.is_floating_point():
                tensor.data.uniform_(0.5, 2)
    fused = conjoin.optimize(copy.deepcopy(plain), (images(),))
    inner = Counting(name)
    return plain, fused, torch.compile(fused, backend=inner, fullgraph=True), inner


def assert_same_steps(plain, fused, ours, count=1):
    """Equal outputs, gradients and buffers; a step in each batch size."""
    for batch in range(3, 3 + count):
        x = images(batch)
        found, wanted = ours(x), plain(x)
        assert_close(dict(tensors(found)), dict(tensors(wanted)))
        if wanted.requires_grad:
            for model, output in ((fused, found), (plain, wanted)):
                model.zero_grad()
                (output * output).sum().backward()
            assert_close(gradients(fused), gradients(plain))
        assert_close(fused.state_dict(), plain.state_dict())


def normalizations(graph):
    return sum(graph[name] for name in ("batch_norm", "instance_norm", "group_norm", "prelu"))


@pytest.mark.parametrize(
    ("make", "name"),
    [*((make, "aot_eager") for make in NORMS.values()), (NORMS["BatchNorm"], "eager")],
    ids=[*NORMS, "with eager behind"],
)
def test_side_by_side(make, name):
    plain, fused, ours, inner = compiled(make, name)
    for training in (True, False):
        plain.train(training), fused.train(training)
        assert_same_steps(plain, fused, ours, 2)
        with torch.no_grad():
            assert_same_steps(plain, fused, ours)
    assert {normalizations(graph) for graph in inner.graphs} == {1}


def test_with_inductor():
    plain, fused, ours, inner = compiled(NORMS["BatchNorm"], "inductor")
    assert_same_steps(plain, fused, ours, 2)
    plain.eval(), fused.eval()
    assert_same_steps(plain, fused, ours)
    assert {normalizations(graph) for graph in inner.graphs} == {1}


def other_memory(norm, value):
    norm.running_mean.data = torch.full_like(norm.running_mean, value)


def replaced(norm, value):
    norm.running_var = torch.full_like(norm.running_var, value)


def changed(norm, value):
    norm.running_mean.fill_(value)


def of_another_mode(norm, value):
    norm.train(not norm.training)


def counted(norm, value):
    norm.num_batches_tracked.data = torch.tensor(7)


def of_another_momentum(norm, value):
    norm.momentum = value / 3


CHANGES = [other_memory, replaced, changed, of_another_mode, counted, of_another_momentum]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [True, False], ids=["compiled before", "compiled after"])
def test_what_is_done_to_the_buffers_of_one(change, late):
    plain, fused, ours, _ = compiled(NORMS["BatchNorm"])
    if late:
        assert_same_steps(plain, fused, ours)
    for training in (True, False):
        plain.train(training), fused.train(training)
        for model in (plain, fused):
            change(model.norms[1], 1.5)
        assert_same_steps(plain, fused, ours)
        x = images()
        assert_close({"eager": fused(x)}, {"eager": plain(x)})
        assert_close(fused.state_dict(), plain.state_dict())


def test_buffers_of_two_that_are_one_tensor():
    plain, fused, ours, _ = compiled(lambda width: nn.BatchNorm2d(width))
    for model in (plain, fused):
        model.norms[0].num_batches_tracked = model.norms[2].num_batches_tracked
    assert_same_steps(plain, fused, ours, 2)
    assert plain.norms[2].num_batches_tracked == 4


def test_in_turn_with_eager_calls():
    plain, fused, ours, _ = compiled(NORMS["BatchNorm"])
    x = images()
    for call in (ours, fused, ours, fused):
        assert_close({"y": call(x)}, {"y": plain(x)})
        assert_close(fused.state_dict(), plain.state_dict())


@pytest.mark.parametrize("make", [NORMS["BatchNorm"], NORMS["tracked InstanceNorm"]])
def test_no_recompilation_that_the_plain_model_would_not_have(make):
    plain, fused, _, _ = compiled(make)
    seen = []
    for model in (plain, fused):
        torch.compiler.reset()
        inner = Counting()
        ours = torch.compile(model, backend=inner)
        for training in (True, False, True):
            model.train(training)
            for batch in (2, 3, 4):
                ours(images(batch))
        with torch.no_grad():
            ours(images())
        seen.append(len(inner.graphs))
    assert seen[0] == seen[1]
