"""What convolutions take beyond what else is told of them can have been measured."""

import dataclasses

import pytest
import torch
from machines import STEADY

from conjoin.policy import convolving

CPU = torch.device("cpu")


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_more_bytes_take_no_less(mode, monkeypatch):
    monkeypatch.setattr(convolving, "IMAGES", (2**12, 2**14, 2**16))
    with mode():
        found = convolving.measured(STEADY, CPU, torch.float32)
    for table in (found.convolved, found.convolved_back):
        assert [size for size, _ in table] == [2**12, 2**14, 2**16]
        taken = [seconds for _, seconds in table]
        assert taken == sorted(taken)
        assert taken[0] >= 0


def test_without_convolutions_of_a_type_nothing_is_told(monkeypatch):
    def conv2d(*given):
        raise RuntimeError('"slow_conv2d_cpu" not implemented')

    monkeypatch.setattr(convolving.F, "conv2d", conv2d)
    found = convolving.measured(STEADY, CPU, torch.float16)
    assert found.convolved == found.convolved_back
    assert [seconds for _, seconds in found.convolved] == [0.0] * len(convolving.IMAGES)


@pytest.mark.parametrize("training", [False, True])
def test_it_is_what_is_left_of_one_of_two(training, monkeypatch):
    def in_turn(steps, turns, device):
        assert [len(step()) for step in steps] == ([3, 2] if training else [2, 1])
        return 9e-3, 4e-3

    monkeypatch.setattr(convolving, "in_turn", in_turn)
    free = dataclasses.replace(STEADY, call=0.0, rate=1e30, bandwidth=1e30)
    free = dataclasses.replace(free, written=STEADY.convolved, joined=STEADY.convolved)
    left = convolving._left(free, 2**14, CPU, torch.float64, training=training)
    assert left == pytest.approx(5e-3)
    told = dataclasses.replace(free, call=1e-3)  # A launch forward, and two and a sum backward.
    left = convolving._left(told, 2**14, CPU, torch.float64, training=training)
    assert left == pytest.approx(1e-3 if training else 4e-3)
