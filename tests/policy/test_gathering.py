"""Which tables run at once: where the estimate says that it pays."""

import pickle

import pytest
import torch
from machines import STEADY
from torch import nn

import conjoin
from conjoin.layers.view import wides
from conjoin.passes import rewrite
from conjoin.policy import machine
from conjoin.tracing.regions import runs


class Columns(nn.Module):
    """n tables of a column each."""

    def __init__(self, count, rows, width=8):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(count))

    def forward(self, x):
        return torch.cat([t(x[:, i]) for i, t in enumerate(self.tables)], -1).sin()


@pytest.fixture(autouse=True)
def steady(monkeypatch):
    monkeypatch.setattr(machine, "constants", lambda device, dtype: STEADY)


CASES = {
    "many": (12, 50, 16, False, True),
    "few": (3, 50, 16, False, False),
    "many rows a batch": (12, 50, 2**16, False, False),
    "few in training": (3, 50, 16, True, False),  # More is launched then.
    "large gradients": (12, 100_000, 16, True, False),
    "large tables without gradients": (12, 100_000, 16, False, True),
}


@pytest.mark.parametrize(
    ("count", "rows", "batch", "training", "expected"), CASES.values(), ids=CASES
)
def test_pays(count, rows, batch, training, expected):
    x = torch.zeros(batch, count, dtype=torch.int64)
    model = Columns(count, rows).train(training)
    for policy in ("auto", "measure"):
        merged = conjoin.optimize(model, (x,), policy=policy)
        assert bool(wides(merged)) == expected
    assert wides(conjoin.optimize(model, (x,), policy="always"))
    groups = conjoin.report(model, (x,)).groups
    # Too few of them would launch no less at once, and what would save nothing is not told of.
    assert bool(groups) == (count > 6)
    for group in groups:
        assert group.fused == expected
        assert len(group.layers) == count
        if not expected:
            assert group.reason is conjoin.Reason.DOES_NOT_PAY
            assert group.detail == str(group.figures)
    made = conjoin.optimize(model, (x,))
    assert [g.fused for g in conjoin.report(made, (x,)).groups] == [g.fused for g in groups]


@pytest.mark.parametrize(
    "again",
    [
        lambda model, x: pickle.loads(pickle.dumps(model)),
        lambda model, x: conjoin.optimize(model, x),
    ],
    ids=["pickled", "optimized again"],
)
def test_what_is_merged_runs_at_once(again):
    """Also where so few would not have been merged."""
    x = torch.zeros(4, 3, dtype=torch.int64)
    merged = conjoin.optimize(Columns(3, 50), (x,), policy="always")
    made = again(merged, (x,))
    assert len(runs(made)) == len(runs(merged)) == 1
    assert torch.equal(made(x), merged(x))


@pytest.mark.parametrize("count", [6, 7])
def test_unknown_shapes(count):
    """Merged where fewer are launched."""
    traced = torch.fx.symbolic_trace(Columns(count, 50))
    assert rewrite(traced) == (count > 6)
    assert bool(wides(conjoin.optimize(Columns(count, 50)))) == (count > 6)


def test_unknown_machine(monkeypatch):
    monkeypatch.setattr(machine, "constants", lambda device, dtype: None)
    x = torch.zeros(4, 7, dtype=torch.int64)
    assert wides(conjoin.optimize(Columns(7, 50), (x,)))
    assert not wides(conjoin.optimize(Columns(6, 50), (x[:, :6],)))
