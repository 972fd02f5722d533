"""When weights are joined at each call, by the estimate."""

import dataclasses

import pytest
from machines import STEADY

from conjoin.policy.cost import Setting, Work
from conjoin.policy.joining import estimate

FORWARD = Setting(training=False)
TRAINING = Setting(training=True)


def linear(width, rows, features, **changes):
    size, weight = 4 * rows * width, 4 * features * width
    operations = 2 * rows * width * features
    return Work(4 * rows * features, size, weight, weight, operations, **changes)


@pytest.mark.parametrize(
    ("layers", "setting", "pays"),
    [
        ([linear(16, 32, 32)] * 8, FORWARD, True),
        ([linear(16, 32, 32)] * 32, TRAINING, True),
        ([linear(256, 16, 256)] * 8, FORWARD, False),
        ([linear(512, 1, 512)] * 3, FORWARD, False),
        ([linear(512, 512, 512)] * 3, TRAINING, False),
        ([linear(32, 64, 256)] * 2, FORWARD, False),
    ],
)
def test_it_pays_for_many_small_layers(layers, setting, pays):
    assert estimate(STEADY, layers, setting).pays == pays


def test_the_figures_are_in_order():
    found = estimate(STEADY, [linear(16, 32, 32, biased=True)] * 8, TRAINING)
    assert found.whole < found.joined < found.apart
    assert found.now == found.joined
    assert found.misses


def test_biases_are_one_more_copy():
    plain, biased = (
        estimate(STEADY, [linear(16, 32, 32, biased=biased)] * 8, FORWARD)
        for biased in (False, True)
    )
    assert biased.joined - plain.joined == pytest.approx(STEADY.call)


def test_a_step_of_the_optimizer_is_the_same_either_way():
    slow = dataclasses.replace(STEADY, step=1.0)
    layers = [linear(16, 32, 32)] * 8
    assert estimate(slow, layers, TRAINING) == estimate(STEADY, layers, TRAINING)
