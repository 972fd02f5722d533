"""Siblings on tensors of their own that run one after another, on slices of one cut."""

import copy
import pickle
import threading

import pytest
import torch
from equivalence import assert_equivalent
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import conjoin
from conjoin.layers.part import Part


class Experts(nn.Module):
    """In training the second layers cannot run at once: the random numbers have an order."""

    def __init__(self, width=5, count=4, bias=True):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6, width),
                nn.Dropout(0.5),
                nn.Linear(width, 3, bias=bias),
                nn.ReLU(),
                nn.Dropout(0.5),
            )
            for _ in range(count)
        )

    def forward(self, x):
        return torch.stack([expert(x) for expert in self.experts])


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def second(model):
    """The second layers: views of one wide layer."""
    return [expert[2] for expert in model.experts]


@pytest.fixture
def pair():
    torch.manual_seed(0)
    model = Experts().double()
    x = torch.randn(7, 6, dtype=torch.float64)
    fused = conjoin.optimize(model, (x,))
    first, *_ = second(fused)
    assert len(first.wide_layer.widths) == 4
    assert not first.wide_layer.together
    return model, fused, x


@pytest.mark.parametrize("bias", [True, False])
def test_exact(bias):
    model = Experts(bias=bias).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    assert_equivalent(conjoin.optimize(model, (x,)), model, (x,))


def test_the_gradient_is_one_cat(pair):
    _, fused, x = pair
    output = fused(x)
    with Names() as backward:
        output.sum().backward()
    assert "slice_backward" not in backward.names
    assert backward.names.count("cat") <= 3  # The weight's, the bias's, and that of the first.


def test_no_part_is_made(pair, monkeypatch):
    _, fused, x = pair

    def fail(*args):
        raise AssertionError("a Part")

    monkeypatch.setattr(Part, "of", fail)
    fused(x)


def run_each(model, positions, x):
    layers = second(model)
    return sum(layers[position](x[:, :5] * position).square().sum() for position in positions)


@pytest.mark.parametrize(
    "positions",
    [[0, 1, 2, 3], [3, 1], [0, 0, 0], [0, 1, 0, 1, 2, 3, 2, 3]],
    ids=["all", "some", "one again", "twice"],
)
def test_whatever_is_called(pair, positions):
    model, fused, x = pair
    for _ in range(3):  # Gradients add up, with what is left of the cuts before.
        for each in (model, fused):
            run_each(each, positions, x).backward()
            run_each(each, positions[:1], x).backward()
    for index in {*positions}:
        name = f"experts.{index}.2.weight"
        torch.testing.assert_close(
            fused.get_submodule(name.rpartition(".")[0]).weight.grad, model.get_parameter(name).grad
        )


def changes():
    def step(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        run_each(model, [0, 1], torch.ones(2, 6, dtype=torch.float64)).backward()
        optimizer.step()
        optimizer.zero_grad()

    def freeze(model):
        for layer in second(model):
            layer.requires_grad_(False)

    def freeze_all(model):
        model.requires_grad_(False)

    def assign(model):
        for layer in second(model):
            layer.weight.data = torch.ones_like(layer.weight)

    def write(model):
        with torch.no_grad():
            for layer in second(model):
                layer.weight.mul_(2)

    def load(model):
        model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})

    def convert(model):
        model.float().double()

    def prune_one(model):
        second(model)[2].weight = nn.Parameter(torch.ones(3, 5, dtype=torch.float64))

    return [step, freeze, freeze_all, assign, write, load, convert, prune_one]


@pytest.mark.parametrize("change", changes(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.filterwarnings("ignore:.*taken out of its wide layer")
def test_what_is_left_of_a_cut_is_not_used_after(pair, change, grad):
    model, fused, x = pair
    results = []
    for each in (model, fused):
        with torch.set_grad_enabled(grad):
            run_each(each, [0, 1], x)
        change(each)
        loss = run_each(each, [2, 3], x)
        if loss.requires_grad:
            loss.backward()
        grads = [layer.weight.grad for layer in second(each)]
        results.append((loss.detach(), grads))
    (ours, our_grads), (theirs, their_grads) = results
    torch.testing.assert_close(ours, theirs)
    for our_grad, their_grad in zip(our_grads[2:], their_grads[2:], strict=True):
        assert (our_grad is None) == (their_grad is None)
        if our_grad is not None:
            torch.testing.assert_close(our_grad, their_grad)


def test_what_is_left_is_not_copied(pair):
    model, fused, x = pair
    run_each(fused, [0], x)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(run_each(copied, [1], x), run_each(model, [1], x))
        run_each(copied, [1, 2], x).backward()
        assert second(fused)[1].weight.grad is None


def test_what_is_left_holds_no_memory_that_was(pair):
    _, fused, x = pair
    run_each(fused, [0], x)
    fused.float()
    assert second(fused)[1].wide_layer.cut is None


def test_no_grad_then_with(pair):
    model, fused, x = pair
    with torch.no_grad():
        run_each(fused, [0], x)
    with torch.inference_mode():
        run_each(fused, [1], x)
    for each in (model, fused):
        run_each(each, [1, 2], x).backward()
    torch.testing.assert_close(second(fused)[1].weight.grad, second(model)[1].weight.grad)


def test_checkpoints(pair):
    model, fused, x = pair
    x = x.requires_grad_()
    for each in (model, fused):
        torch.manual_seed(1)
        for position in range(4):
            expert = each.experts[position]
            checkpoint(expert, x, use_reentrant=False).sum().backward()
    assert_same_gradients_of_parts(fused, model)


def assert_same_gradients_of_parts(fused, model):
    for ours, theirs in zip(second(fused), second(model), strict=True):
        torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
        torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_threads(pair):
    model, fused, x = pair
    expected = [run_each(model, [position], x).item() for position in range(4)]
    wrong = []

    def work(offset):
        for step in range(200):
            position = (step + offset) % 4
            with torch.set_grad_enabled(step % 3 > 0):
                loss = run_each(fused, [position], x)
            if loss.item() != expected[position] or loss.requires_grad != (step % 3 > 0):
                wrong.append(position)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Reading(nn.Linear):
    """Code of a user's own reads its weight as a Parameter."""

    def forward(self, x):
        assert isinstance(self.weight, nn.Parameter)
        return super().forward(x)


def test_code_of_the_users_own_finds_a_parameter():
    model = Experts().double()
    for expert in model.experts:
        expert[2].__class__ = Reading
    x = torch.randn(7, 6, dtype=torch.float64)
    assert_equivalent(conjoin.optimize(model, (x,)), model, (x,))
