"""When weights are joined at each call, by the estimate."""

import pytest
from machines import STEADY

from conjoin.policy.cost import Setting, Work
from conjoin.policy.joining import estimate, estimate_level

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
        ([linear(4, 256, 128)] * 64, FORWARD, True),
        ([linear(16, 32, 32)] * 32, TRAINING, False),
        ([linear(256, 16, 256)] * 8, FORWARD, False),
        ([linear(512, 1, 512)] * 3, FORWARD, False),
        ([linear(512, 512, 512)] * 3, TRAINING, False),
        ([linear(32, 64, 256)] * 2, FORWARD, False),
    ],
)
def test_it_pays_for_many_small_layers(layers, setting, pays):
    assert estimate(STEADY, layers, setting).pays == pays


@pytest.mark.parametrize("setting", [FORWARD, TRAINING])
def test_the_figures_are_in_order(setting):
    found = estimate(STEADY, [linear(16, 32, 32, biased=True)] * 8, setting)
    assert found.whole < found.joined < found.apart
    assert found.now == (found.apart if setting.training else found.joined)
    assert found.misses


def test_biases_are_one_more_copy():
    plain, biased = (
        estimate(STEADY, [linear(16, 32, 32, biased=biased)] * 8, FORWARD)
        for biased in (False, True)
    )
    assert biased.joined - plain.joined == pytest.approx(STEADY.call)


@pytest.mark.parametrize(
    ("layers", "setting", "stacked", "whole"),
    [
        ([linear(16, 32, 16)] * 16, FORWARD, True, True),
        ([linear(16, 32, 16)] * 16, TRAINING, False, True),
        ([linear(512, 64, 512)] * 8, FORWARD, False, False),
        ([linear(64, 256, 64)] * 2, FORWARD, False, False),
    ],
)
def test_second_layers_are_stacked_where_there_are_many_small_ones(layers, setting, stacked, whole):
    found = estimate_level(STEADY, layers, setting, "beside")
    assert (found.pays, found.pays_whole) == (stacked, whole)
    assert found.whole < found.joined


def test_stacked_biases_are_one_more_copy():
    plain, biased = (
        estimate_level(STEADY, [linear(16, 32, 32, biased=biased)] * 8, FORWARD, "stack")
        for biased in (False, True)
    )
    assert biased.joined - plain.joined == pytest.approx(STEADY.call)
