"""What forms take by the model, and which is chosen, on machines that are made up."""

import dataclasses

import pytest
from choices import apart, names, whole
from machines import HIDDEN, MEGABYTE, STEADY

from conjoin.policy.cost import Machine, Setting, Work, choose, likely, seconds

FORWARD = Setting(training=False)
TRAINING = Setting(training=True)
NONE = ((0.0, 0.0), (1e9, 0.0))
FLAT = Machine(
    *(1.0, 0.5, 0.0, 1.0, 1.0, 1e9, 0, 0, 0),
    written=NONE,
    joined=NONE,
    few_rows=HIDDEN,
    convolved=NONE,
    convolved_back=NONE,
)
"""A machine on which only calls and arithmetic take time."""


def linear(width, rows=2, features=8, **changes):
    size, weight = 4 * rows * width, 4 * features * width
    return Work(4 * rows * features, size, weight, weight, 0, **changes)


def test_new_bytes_are_interpolated_and_go_on_beyond():
    machine = dataclasses.replace(STEADY, written=((100, 0.0), (200, 1.0), (400, 5.0)))
    taken = [machine.new(size) for size in (0, 100, 150, 200, 300, 400, 600)]
    assert taken == [0, 0, 0.5, 1, 3, 5, 9]


def test_a_call_is_a_launch_and_its_arithmetic():
    work = dataclasses.replace(linear(4), operations=7)
    assert seconds(FLAT, [[work]], FORWARD) == pytest.approx(8)
    assert seconds(FLAT, [[work], [work]], FORWARD) == pytest.approx(16)
    # Forward, and a gradient each of the weight and of the input.
    assert seconds(FLAT, [[work]], TRAINING) == pytest.approx(24)


def test_what_a_wide_layer_spares_and_costs():
    three = [linear(4, biased=True) for _ in range(3)]
    by_themselves = [[work] for work in three]
    assert seconds(FLAT, [three], FORWARD) == pytest.approx(1 + 0.5)
    assert seconds(FLAT, [three], Setting(False, cut=False)) == pytest.approx(1)
    assert seconds(FLAT, by_themselves, FORWARD) == pytest.approx(3)
    # Each has three gradients, and those of the input are added up; wide, there is a cat.
    assert seconds(FLAT, by_themselves, TRAINING) == pytest.approx(3 * 4 + 2)
    assert seconds(FLAT, [three], TRAINING) == pytest.approx(1 + 0.5 + 3 + 1)
    assert seconds(FLAT, by_themselves, Setting(True, passed_on=False)) == pytest.approx(3 * 3)


@pytest.mark.parametrize(
    ("changes", "setting", "extra"),
    [
        ({"contiguous": True}, FORWARD, 3),
        ({"contiguous": True}, Setting(False, cut=False), 0),
        ({}, Setting(False, joined=True), 1),
        ({}, Setting(True, joined=True), 2),
    ],
)
def test_copies(changes, setting, extra):
    plain = seconds(FLAT, [[linear(4)] * 3], dataclasses.replace(setting, joined=False))
    assert seconds(FLAT, [[linear(4, **changes)] * 3], setting) == pytest.approx(plain + extra)


def test_each_parameter_is_a_step_of_the_optimizer():
    stepping = dataclasses.replace(FLAT, step=100.0)
    three = [linear(4, biased=True) for _ in range(3)]
    for works, parameters in (([three], 2), ([[work] for work in three], 6)):
        without = seconds(FLAT, works, TRAINING)
        assert seconds(stepping, works, TRAINING) == pytest.approx(without + 100 * parameters)
        assert seconds(stepping, works, FORWARD) == seconds(FLAT, works, FORWARD)


def test_what_runs_one_by_one_saves_nothing():
    setting = Setting(False, joined=True, one_by_one=True)
    assert seconds(FLAT, [[linear(4)] * 3], setting) == pytest.approx(3 + 1)


def test_a_bias_on_some_is_laid_out():
    works = [linear(4, biased=True), linear(4), linear(4)]
    same = [linear(4)] * 3
    assert seconds(FLAT, [works], FORWARD) == pytest.approx(seconds(FLAT, [same], FORWARD) + 1)


def test_small_layers_become_one():
    works = [linear(4, rows=64, biased=True) for _ in range(8)]
    for setting in (FORWARD, TRAINING):
        form, figures = choose(STEADY, works, names(8), setting)
        assert form == whole(8)
        assert figures.chosen == figures.whole < figures.apart
        assert not figures.measured
        assert figures.training is setting.training


def test_a_gradient_that_the_system_is_asked_for_divides_a_group():
    # 22 time projections, 1280 to 320: their weights have 36 MB together.
    works = [linear(320, features=1280) for _ in range(22)]
    assert sum(work.weight for work in works) > 32 * MEGABYTE
    slow = dataclasses.replace(STEADY, step=1e-3)
    form, figures = choose(slow, works, names(22), TRAINING)
    assert 1 < len(form) < 22
    assert figures.chosen < figures.apart < figures.whole
    assert choose(slow, works, names(22), FORWARD)[0] == whole(22)


def test_a_group_is_not_divided_for_a_small_gain():
    works = [linear(320, features=1280) for _ in range(22)]
    form, figures = choose(STEADY, works, names(22), TRAINING)
    assert form == apart(22)
    assert figures.apart < figures.whole


def test_what_only_costs_stays_apart():
    works = [linear(4, contiguous=True) for _ in range(3)]
    form, figures = choose(STEADY, works, names(3), FORWARD)
    assert form == apart(3)
    assert figures.chosen == figures.apart < figures.whole


def test_a_wide_output_leaves_the_cache_before_it_is_read():
    # From 64 bytes on a second for each to lay it out elsewhere, half of it to write.
    cached = dataclasses.replace(
        FLAT, written=((0, 0.0), (64, 0.0), (128, 32.0)), joined=((0, 0.0), (64, 0.0), (128, 64.0))
    )
    two = [linear(8)] * 2
    assert [cached.again(two[0].output), cached.again(2 * two[0].output)] == [0, 32]
    by_themselves = [[work] for work in two]
    assert seconds(cached, by_themselves, FORWARD) == seconds(FLAT, by_themselves, FORWARD)
    assert seconds(cached, [two], FORWARD) == pytest.approx(seconds(FLAT, [two], FORWARD) + 32 + 32)
    # What is kept for a backward pass does not come and go.
    written = dataclasses.replace(cached, joined=cached.written)
    uncut = dataclasses.replace(TRAINING, cut=False)
    assert written.again(128) == 0
    assert seconds(cached, [two], uncut) == seconds(written, [two], uncut)


def test_forms_for_a_race():
    works = [linear(320, features=1280) for _ in range(22)]
    unknown = likely(None, works, names(22), TRAINING)
    assert [len(form) for form in unknown] == [1, 2, 3, 4, 22]
    known = likely(STEADY, works, names(22), TRAINING)
    assert known[0] == whole(22)
    assert known[-1] == apart(22)
    slow = dataclasses.replace(STEADY, step=1e-3)
    assert choose(slow, works, names(22), TRAINING)[0] in likely(slow, works, names(22), TRAINING)
    assert likely(None, works[:2], names(2), TRAINING) == (whole(2), apart(2))


SLOW = (
    (2, ((1e3, ((1, 0.02), (2, 0.01))), (2e3, ((1, 0.06), (2, 0.01))))),
    (4, ((1e3, ((1, 0.0), (2, 0.0))), (2e3, ((1, 0.0), (2, 0.0))))),
)
"""Seconds for each byte by rows, bytes of all weights, and weights."""


@pytest.mark.parametrize(
    ("rows", "weight", "each", "both"),
    [
        (2, 500, 5.0, 20.0),
        (2, 1000, 10.0, 120.0),
        (2, 750, 7.5, 60.0),  # In between.
        (3, 1000, 5.0, 60.0),
        (2, 5000, 50.0, 600.0),  # Beyond what was measured.
        (2, 100, 1.0, 4.0),
        (4, 1000, 0.0, 0.0),
        (64, 1000, 0.0, 0.0),
        (1, 1000, 0.0, 0.0),
        (0, 1000, 0.0, 0.0),
    ],
)
def test_a_large_weight_beside_few_rows_is_read_slowly(rows, weight, each, both):
    slow = dataclasses.replace(FLAT, few_rows=SLOW)
    works = [dataclasses.replace(linear(8), weight=weight, rows=rows) for _ in range(2)]
    taken = [choose(machine, works, names(2), FORWARD)[1] for machine in (FLAT, slow)]
    assert taken[1].apart - taken[0].apart == pytest.approx(2 * each)
    assert taken[1].whole - taken[0].whole == pytest.approx(both)
    assert taken[1].layers == (2 if both > 2 * each + 1 else 1)


@pytest.mark.parametrize(("setting", "each"), [(FORWARD, 3.0), (Setting(training=True), 70.0)])
def test_each_convolution_of_an_input_takes_more(setting, each):
    laid = {"convolved": ((100.0, 2.0), (200.0, 4.0)), "convolved_back": ((100, 60), (200, 80))}
    slow = dataclasses.replace(FLAT, **laid)
    works = [linear(8, image=150) for _ in range(3)]
    taken = [choose(machine, works, names(3), setting)[1] for machine in (FLAT, slow)]
    assert taken[1].apart - taken[0].apart == pytest.approx(3 * each)
    assert taken[1].whole - taken[0].whole == pytest.approx(each)
    other = [choose(machine, [linear(8)] * 3, names(3), setting)[1] for machine in (FLAT, slow)]
    assert other[0] == other[1]
