"""The predicted peak is that of the tensors that are alive."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import conjoin
from conjoin.launches import count_layers
from conjoin.memory import Memory, MemoryTracker, in_bytes, in_words

ROW = 4 * 64
"""Bytes of 64 numbers."""


class Sum(nn.Module):
    """Sums what n layers make of one tensor, so that one output at a time is alive."""

    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(count))

    def forward(self, x):
        total = torch.zeros_like(x)
        for layer in self.layers:
            total = total + layer(x).relu()
        return total


def peak(model, *args):
    return count_layers(model, args, {}, {}).peak


@pytest.mark.parametrize("fake", [True, False])
def test_forward(fake):
    with FakeTensorMode() if fake else contextlib.nullcontext(), torch.no_grad():
        model, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU()), torch.randn(10, 64)
        # The weight, the input, what the layer gives, and that again behind the ReLU.
        assert peak(model, x) == (64 + 10 + 10 + 10) * ROW


@pytest.mark.parametrize("fake", [True, False])
def test_training_keeps_what_backward_needs(fake):
    with FakeTensorMode() if fake else contextlib.nullcontext():
        model, x = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU()), torch.randn(10, 64)
        # The weight, the input, the ReLU's output, its gradient, the gradient before the ReLU and
        # that of the weight.
        assert peak(model, x) == (64 + 10 + 10 + 10 + 10 + 64) * ROW


def test_memory_that_tensors_share_counts_once_and_until_the_last_is_gone():
    with MemoryTracker() as tracker:
        x = torch.zeros(64)
        views = [x.view(8, 8), x[:32]]
        assert tracker.now == ROW
        del x
        assert tracker.now == ROW
        views.clear()
        assert tracker.now == 0
    assert tracker.peak == ROW


def test_tensors_without_memory_of_their_own():
    with MemoryTracker() as tracker:
        torch.eye(4).to_sparse()
    assert tracker.peak >= 64


def test_the_report_tells_the_peak():
    model, x = Sum(8), torch.randn(100, 64)
    with torch.no_grad():
        report = conjoin.report(model, (x,))
        plain = peak(copy.deepcopy(model), x)
        fused = peak(conjoin.optimize(model, (x,)), x)
    assert report.memory == Memory(plain, fused)
    assert fused > plain
    assert f"{in_words(plain)} -> {in_words(fused)}" in str(report)
    assert f"{in_words(plain)} -> {in_words(fused)}" in report.to_markdown()
    assert conjoin.report(model).memory == Memory(None, None)
    assert "memory" not in str(conjoin.report(model))


@pytest.mark.parametrize(
    ("budget", "error", "words"),
    [
        ("8GiB", TypeError, "a number of bytes as an int"),
        (True, TypeError, "not bool"),
        (0, ValueError, "not 0"),
        (-5, ValueError, "above 0"),
        (1.5, ValueError, "up to 1"),
        (float("nan"), ValueError, "not nan"),
    ],
)
def test_budgets_that_are_none(budget, error, words):
    with pytest.raises(error, match=words):
        conjoin.optimize(Sum(2), (torch.randn(2, 64),), memory_budget=budget)


def test_a_number_of_numpy_is_one_too():
    assert in_bytes(np.int64(10**6), Sum(1)) == in_bytes(10**6, Sum(1)) == 10**6
    with pytest.raises(ValueError, match="not -1"):
        in_bytes(np.int64(-1), Sum(1))


def test_a_budget_needs_example_inputs():
    with pytest.raises(ValueError, match="Pass example_inputs"):
        conjoin.report(Sum(2), memory_budget=10**9)


def test_a_fraction_of_the_device():
    half, all_of_it = in_bytes(0.5, Sum(1)), in_bytes(1.0, Sum(1))
    assert all_of_it > 2**20
    assert abs(all_of_it - 2 * half) <= 1
    with pytest.raises(ValueError, match="Give it in bytes"):
        in_bytes(0.5, Sum(1).to("meta"))


@pytest.mark.parametrize(
    ("size", "words"),
    [(17, "17 bytes"), (2048, "2 KiB"), (5 * 2**19, "2.5 MiB"), (1000 * 2**20, "1000 MiB")],
)
def test_sizes_in_words(size, words):
    assert in_words(size) == words
