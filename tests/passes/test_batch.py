"""A layer that is called with several tensors of one shape runs once on all of them."""

import copy
import pickle

import pytest
import torch
from equivalence import assert_same_state
from scripted import Scripted, assert_same, assert_trains_alike, both, randn, targets
from torch import nn
from torch.nn import functional as F

import conjoin
from conjoin.launches import LaunchCounter
from conjoin.passes import Batch, Separate
from conjoin.passes.batch import STACKED

ROWS = randn(3, 4), randn(2, 3, 4), randn(4), randn(0, 4), randn(3, 5), randn()


def mlp(*between):
    return nn.Sequential(
        *(nn.Linear(4, 5), *between, nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 5), nn.Tanh()),
        *(nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 5), nn.GELU(), nn.Linear(5, 5), nn.ELU()),
        *(nn.Linear(5, 3), nn.RMSNorm(3)),
    )


def made(x, count=2):
    """Tensors of the shape of x."""
    return [F.gelu(x + number) for number in range(count)]


def ended(y):
    """What is no part of any rewrite."""
    return y.sum(-1).cos()


def of_two(m, x):
    return [ended(m.f(t)) for t in made(x)]


def of_four(m, x):
    return [ended(m.f(t)) for t in made(x, 4)]


def one_by_one(m, x):
    """All the first layers before all the second ones."""
    values = made(x)
    for layer in m.f:
        values = [layer(value) for value in values]
    return [ended(value) for value in values]


def of_a_wide_layer(m, x):
    return [ended(m.f(h.relu())) for h in (m.a(x), m.b(x))]


def calls(graph_module):
    """How often each layer of `f` is called."""
    found = [target for target in targets(graph_module) if target.startswith("f.")]
    return {target: found.count(target) for target in found}


@pytest.mark.parametrize("script", [of_two, of_four, one_by_one, of_a_wide_layer])
def test_a_shared_mlp(script):
    layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)} if script is of_a_wide_layer else {}
    traced, plain = both(Scripted(script, f=mlp(), **layers))
    assert {*calls(traced).values()} == {1}
    assert targets(traced).count("batched") == (script is not of_a_wide_layer)
    assert_same(traced, plain, *ROWS)
    assert_trains_alike(traced, plain, *ROWS[:2])
    assert not Batch()(traced).modified


def test_separate():
    traced, plain = both(Scripted(of_two, f=mlp()))
    assert Separate()(traced).modified
    assert sorted(targets(traced)) == sorted(targets(plain))
    assert_same(traced, plain, *ROWS[:2])


def of_indices(m, x):
    indices = [(x * number).sigmoid().round().long() for number in range(1, 14)]
    return [ended(m.f(index)) for index in indices]


def test_a_shared_embedding():
    traced, plain = both(Scripted(of_indices, f=nn.Sequential(nn.Embedding(3, 4, padding_idx=1))))
    assert calls(traced) == {"f.0": 1}
    assert_same(traced, plain, *ROWS)


@pytest.mark.parametrize("count", [4, 5])
def test_siblings_on_each(count):
    """Siblings on several tensors are one product."""

    def script(m, x):
        return [(m.q(t).softmax(-1) * m.k(t).softmax(-1)).sum() for t in made(x, count)]

    traced, plain = both(Scripted(script, q=nn.Linear(4, 4), k=nn.Linear(4, 4)))
    assert sum(target.endswith(".wide") for target in targets(traced)) == 1
    assert_same(traced, plain, *ROWS)


def frozen(module):
    return module.requires_grad_(False)


def hooked(module):
    module[0].register_forward_hook(lambda layer, args, output: output * 2)
    return module


def in_turn(m, x):
    first = m.f(F.gelu(x))
    return first, m.f(F.gelu(x + F.pad(first, (0, 1))))


def detached(m, x):
    first, second = made(x)
    return ended(m.f(first)), ended(m.f(second).detach())


def left_out(m, x):
    first, second = made(x)
    m.f(second)
    return ended(m.f(first))


def changed_between(m, x):
    first, second = made(x)
    outputs = [ended(m.f(first))]
    second.mul_(2)
    return [*outputs, ended(m.f(second))]


def changed_before(m, x):
    first, second = made(x)
    second = second.mul_(2)
    return [ended(m.f(first)), ended(m.f(second))]


def of_two_shapes(m, x):
    return [ended(m.f(F.gelu(t))) for t in (x, torch.cat([x, x]))]


APART = {
    "frozen": (of_two, frozen(mlp())),
    "hooked": (of_two, hooked(mlp())[:1]),
    "one reads another": (in_turn, mlp()),
    "detached": (detached, mlp()),
    "left out": (left_out, mlp()),
    "changed between": (changed_between, mlp()),
    "of two shapes": (of_two_shapes, mlp()),
    "little follows": (of_two, mlp()[:4]),
    "two dimensions": (of_four, nn.Sequential(nn.LayerNorm((4, 4)))),
    "convolution": (of_four, nn.Sequential(nn.Conv1d(3, 3, 1))),
}


@pytest.mark.parametrize(("script", "f"), APART.values(), ids=APART)
def test_apart(script, f):
    traced, plain = both(Scripted(script, f=f))
    assert "batched" not in targets(traced)
    assert_same(traced, plain, *ROWS, randn(4, 4), randn(2, 3, 4))


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str
)
def test_embeddings_that_know_the_batch(options):
    traced, _ = both(Scripted(of_indices, f=nn.Sequential(nn.Embedding(3, 4, **options))))
    assert calls(traced) == {"f.0": 13}


def test_changed_before_both():
    traced, plain = both(Scripted(changed_before, f=mlp()))
    assert_same(traced, plain, *ROWS)


@pytest.mark.parametrize("between", [nn.BatchNorm1d(5), nn.Dropout(0.5)], ids=str)
def test_what_knows_the_batch_stays_apart(between):
    """The layers before it and behind it run once; it runs for each tensor, in order."""

    def script(m, x):
        return [ended(m.f(t)) for t in made(x, 8)]

    traced, plain = both(Scripted(script, f=mlp(nn.ReLU(), between)))
    assert calls(traced)["f.2"] == 8
    assert {count for layer, count in calls(traced).items() if layer != "f.2"} == {1}
    assert_same(traced, plain, *ROWS)
    assert_trains_alike(traced, plain, *ROWS[:1])


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = mlp(nn.Dropout(0.5))

    def forward(self, a, b):
        return self.f(a), self.f(b)


class Target(Siamese):
    """One network reads several tensors without gradients, and one with."""

    def forward(self, a, b):
        with torch.no_grad():
            target = self.f(2 * b), self.f(3 * b)
        return self.f(a), *target


class Twins(nn.Module):
    """Two critics of two actions."""

    def __init__(self):
        super().__init__()
        self.f, self.g = (
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), *mlp()[2:8], nn.Linear(5, 1))
            for _ in range(2)
        )

    def forward(self, state, a, b):
        both = torch.cat([state, a], -1), torch.cat([state, b], -1)
        return [(self.f(x), self.g(x)) for x in both]


class Retrieval(nn.Module):
    """A query, and documents of one length."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def read(self, tokens):
        h = self.embed(tokens)
        return (self.q(h).softmax(-1) * self.k(h).tanh()).mean(1)

    def forward(self, query, *documents):
        return [self.read(query) * self.read(document) for document in documents]


def tokens(*shape):
    return torch.randint(9, shape)


MODELS = {
    "siamese": (Siamese, (randn(3, 4), randn(3, 4)), (randn(2, 4), randn(5, 4))),
    "target": (Target, (randn(3, 4), randn(3, 4)), (randn(2, 4), randn(5, 4))),
    "critics": (Twins, (randn(3, 4), randn(3, 2), randn(3, 2)), None),
    "retrieval": (
        Retrieval,
        (tokens(3, 2), *(tokens(3, 5) for _ in range(4))),
        (tokens(3, 2), *(tokens(3, length) for length in (4, 5, 5, 5))),
    ),
}


def launches(model, *inputs):
    with LaunchCounter() as counter:
        model(*inputs)
    return counter.count


@pytest.mark.parametrize(("cls", "alike", "other"), MODELS.values(), ids=MODELS)
def test_models(cls, alike, other):
    original = cls().double()
    model = conjoin.optimize(original, alike)
    assert launches(model, *alike) < launches(original, *alike)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert conjoin.verify(original, each, alike)
        assert launches(each, *alike) == launches(model, *alike)
    if other is not None:
        assert conjoin.verify(original, model, other)
    assert_same_state(conjoin.unfuse(model), original)
    assert type(conjoin.unfuse(model)) is cls


def test_what_a_call_must_be_like():
    """Tensors that are not alike, or large, go one by one."""
    a, b = randn(3, 4), randn(3, 4)
    original = Siamese().double()
    model = conjoin.optimize(original, (a, b))
    once, twice = launches(model, a, b), launches(original, a, b)
    assert once < twice
    rows = STACKED // 2 // 4
    assert launches(model, randn(rows, 4), randn(rows, 4)) == once
    assert launches(model, randn(rows + 1, 4), randn(rows + 1, 4)) == twice
    assert launches(model, a, b[:2]) == twice
    assert launches(model, a.requires_grad_(), b) == twice
    assert launches(model, a, b.requires_grad_()) == once
    model.f[0].register_forward_hook(lambda layer, args, output: None)
    assert launches(model, a, b) == twice


def test_tensors_that_were_not_alike_in_one_example():
    original = Siamese().double()
    examples = [(randn(3, 4), randn(3, 4)), (randn(3, 4), randn(2, 4))]
    model = conjoin.optimize(original, examples)
    assert type(model) is Siamese
    assert all(conjoin.verify(original, model, call) for call in examples)


def deep():
    return nn.Sequential(*(layer for _ in range(8) for layer in (nn.Linear(6, 6), nn.ReLU())))


class Sliced(nn.Module):
    """What the layers are called with has sizes that are computed."""

    def __init__(self):
        super().__init__()
        self.layers = deep()

    def forward(self, x):
        return [self.layers(x[: x.shape[0] - k]) for k in (1, 2, 3)]


class Masked(nn.Module):
    """What the layers are called with is as long as a mask says."""

    def __init__(self):
        super().__init__()
        self.layers = deep()

    def forward(self, x, *masks):
        return [self.layers(x[mask]) for mask in masks]


def test_sizes_that_are_computed():
    model, x = Sliced().double(), randn(5, 6)
    for ours, theirs in zip(conjoin.optimize(model, (x,))(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_masks():
    model, x = Masked().double(), randn(5, 6)
    masks = [torch.tensor([i, 1, 0, 1, 1 - i]).bool() for i in (0, 1)]
    fused = conjoin.optimize(model, (x, *masks))
    for found in (masks, [masks[0], masks[0] | masks[1]]):
        for ours, theirs in zip(fused(x, *found), model(x, *found), strict=True):
            torch.testing.assert_close(ours, theirs)
