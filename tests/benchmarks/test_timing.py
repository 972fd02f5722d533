"""Ratios are taken within a round, so that what makes all slower for a while does not count."""

import pytest
from benchmarks import timing
from benchmarks.timing import FEWEST_ROUNDS, WARM_UP, Quartiles, compare


class Clock:
    """A clock that a step sets forward; from half of the rounds on everything takes ten times."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)

    def step(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds * (10 if len(self.calls) > 40 else 1)

        return run


def test_a_machine_that_becomes_busy_changes_no_ratio(monkeypatch):
    clock = Clock(monkeypatch)
    steps = {"plain": clock.step("plain", 0.01), "other": clock.step("other", 0.02)}
    times, rounds, count = compare(steps, seconds=1e9, most_rounds=36)
    assert (rounds, count) == (36, 1)
    assert times["other"].ratio.median == pytest.approx(2)
    assert times["other"].seconds.low == pytest.approx(0.02)
    assert times["other"].seconds.high == pytest.approx(0.2)
    assert times["plain"].ratio == Quartiles(1, 1, 1)


def test_every_round_has_everything_in_another_order(monkeypatch):
    clock = Clock(monkeypatch)
    steps = {name: clock.step(name, 0.01) for name in "abc"}
    _, rounds, _ = compare(steps, seconds=0)
    timed = clock.calls[3 * WARM_UP + 3 :]
    orders = [tuple(timed[i : i + 3]) for i in range(0, len(timed), 3)]
    assert rounds == len(orders) == FEWEST_ROUNDS
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 1


def test_quick_steps_are_timed_in_blocks(monkeypatch):
    clock = Clock(monkeypatch)
    times, _, count = compare({"quick": clock.step("quick", 1e-5)}, 0)
    assert count == round(timing.BLOCK / 1e-5)
    assert times["quick"].seconds.high == pytest.approx(1e-4)


def test_quartiles():
    assert Quartiles.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Quartiles(3.0, 2.0, 4.0)


def test_a_gpu_tells_the_time_itself(monkeypatch):
    ran = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(ran)

        def elapsed_time(self, end):
            return 2.0 * (end.at - self.at)  # Milliseconds.

    waits = []
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda: waits.append(len(ran)))
    times, _, count = compare({"plain": lambda: ran.append(None)}, seconds=0, device="cuda")
    assert times["plain"].seconds == Quartiles(2e-3, 2e-3, 2e-3)
    assert waits[-2:] == [len(ran) - count, len(ran)]
