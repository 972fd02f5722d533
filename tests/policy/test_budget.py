"""Groups that need more memory than there may be become narrower, or stay apart."""

import warnings

import pytest
import torch
from test_memory import ROW, Sum
from torch import nn

import conjoin
from conjoin import decision
from conjoin.legality import Reason
from conjoin.memory import Memory


def fused_to(budget, model, x):
    optimized = conjoin.optimize(model, (x,), memory_budget=budget)
    report = conjoin.report(optimized, (x,))
    return optimized, report


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Sum(8).double()


@pytest.fixture
def x():
    return torch.randn(500, 64, dtype=torch.float64)


def test_a_group_above_the_budget_becomes_several(model, x):
    with torch.no_grad():
        whole = conjoin.report(model, (x,)).memory
        budget = (whole.before + whole.after) // 2
        optimized, report = fused_to(budget, model, x)
        assert whole.before < report.memory.after <= budget
        assert torch.allclose(optimized(x), model(x), rtol=1e-12, atol=1e-12)
    assert len(report.groups) == 2
    assert all(group.fused and len(group.layers) == 4 for group in report.groups)
    assert "one of 2 for 8 layers" in report.groups[0].detail


def test_a_dry_run_tells_the_same(model, x):
    with torch.no_grad():
        whole = conjoin.report(model, (x,)).memory
        for budget in (whole.before, (whole.before + whole.after) // 2, whole.after):
            dry = conjoin.report(model, (x,), memory_budget=budget)
            assert str(dry) == str(fused_to(budget, model, x)[1])


def test_a_group_that_does_not_fit_is_refused(model, x):
    with torch.no_grad():
        plain = conjoin.report(model, (x,)).memory.before
        for budget in (plain, 1):  # Below what the model needs as it is, nothing may be added.
            _, report = fused_to(budget, model, x)
            (group,) = report.groups
            assert group.reason is Reason.EXCEEDS_MEMORY
            assert "predicted" in group.detail
            assert report.memory == Memory(plain, plain)


def test_a_group_that_fits_stays_whole(model, x):
    with torch.no_grad():
        needed = conjoin.report(model, (x,)).memory.after
        _, report = fused_to(needed, model, x)
    (group,) = report.groups
    assert group.fused
    assert group.detail == ""


def test_only_the_group_that_matters_is_narrowed(x):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.large, self.small = Sum(4).double(), Sum(4).double()

        def forward(self, x):
            return self.large(x).sum() + self.small(x[:250]).sum()

    model = Two()
    with torch.no_grad():
        plain = conjoin.report(model, (x,)).memory.before
        _, report = fused_to(plain + 1100 * 2 * ROW, model, x)
    fused = {group.layers[0].split(".")[0] for group in report.groups if group.fused}
    assert fused == {"large", "small"}
    assert [len(g.layers) for g in report.groups if g.layers[0].startswith("small")] == [4]
    assert all(len(g.layers) < 4 for g in report.groups if g.layers[0].startswith("large"))


def test_what_is_merged_stays_merged(model, x):
    with torch.no_grad():
        optimized = conjoin.optimize(model, (x,))
        report = conjoin.report(optimized, (x,), memory_budget=1)
        assert [group.fused for group in report.groups] == [True]
        again = conjoin.optimize(optimized, (x,), memory_budget=1)
        assert conjoin.report(again, (x,)).groups == report.groups


def test_a_model_without_siblings_has_no_budget_to_keep(x):
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).double()
    optimized = conjoin.optimize(model, (x,), memory_budget=1)
    assert conjoin.report(optimized, (x,)).groups == ()


def test_a_model_that_cannot_be_copied(model, x):
    class Uncopyable(Sum):
        def __deepcopy__(self, memo):
            raise TypeError("there is one of it only")

    with pytest.raises(ValueError, match="which cannot be made"):
        conjoin.optimize(Uncopyable(2).double(), (x,), memory_budget=10**9, inplace=True)


class Towers(nn.Module):
    """Layers behind siblings, which take memory as stacks too."""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 32))
            for _ in range(8)
        )

    def forward(self, x):
        return sum(tower(x) for tower in self.towers)


def test_what_is_behind_a_group_stays_within_the_budget():
    torch.manual_seed(0)
    model, x = Towers().double(), torch.randn(64, 32, dtype=torch.float64)
    whole = conjoin.report(model, (x,)).memory
    assert whole.after > whole.before
    for budget in (whole.before, whole.before // 2, 1):
        optimized, report = fused_to(budget, model, x)
        assert report.memory.after <= whole.before
        assert torch.allclose(optimized(x), model(x), rtol=1e-12, atol=1e-12)
        left = [group for group in report.groups if group.reason is Reason.EXCEEDS_MEMORY]
        assert {*left[0].layers} == {f"towers.{i}.0" for i in range(8)}
        assert len(left) > 1


class Raw(nn.Module):
    """Products with raw Parameters, which are merged where the forward is rewritten."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(64, 64)) for _ in range(8))

    def forward(self, x):
        return sum((x @ weight).relu() for weight in self.weights)


def test_products_with_raw_parameters_stay_within_the_budget():
    model, x = Raw().double(), torch.randn(500, 64, dtype=torch.float64)
    with torch.no_grad():
        whole = conjoin.report(model, (x,)).memory
        assert whole.after > whole.before
        _, report = fused_to(whole.before, model, x)
    assert report.memory.after <= whole.before
    assert [group.reason for group in report.groups] == [Reason.EXCEEDS_MEMORY]


def test_a_budget_that_is_not_met_is_said(model, x):
    with torch.no_grad():
        plain = conjoin.report(model, (x,)).memory.before
        with pytest.warns(
            conjoin.MemoryBudgetWarning, match="memory_budget of 1000 bytes is not met"
        ):
            conjoin.optimize(model, (x,), memory_budget=1000)
        told = conjoin.report(model, (x,), memory_budget=1000)
        assert told.memory == Memory(plain, plain, 1000)
        for text in (str(told), told.to_markdown()):
            assert "is not met" in " ".join(text.split())
        assert '"limit": 1000' in told.to_json()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            conjoin.optimize(model, (x,), memory_budget=plain)
        assert "is not met" not in str(conjoin.report(model, (x,), memory_budget=plain))


def test_what_was_merged_earlier_may_be_above_the_budget(model, x):
    with torch.no_grad():
        optimized = conjoin.optimize(model, (x,))
        needed = conjoin.report(optimized, (x,)).memory
        with pytest.warns(UserWarning, match="is not met"):
            conjoin.optimize(optimized, (x,), memory_budget=needed.before)


class Blocks(nn.Module):
    """Blocks in a row, whose activations are all alive until their backward pass."""

    def __init__(self, count):
        super().__init__()
        self.blocks = nn.ModuleList(Sum(4) for _ in range(count))

    def forward(self, x):
        for block in self.blocks:
            x = block(x).sigmoid()
        return x


@pytest.mark.parametrize("share", [0, 0.8])
def test_like_groups_are_not_tried_one_by_one(monkeypatch, share):
    torch.manual_seed(0)
    count, predicted = 10, []
    model, x = Blocks(count).double(), torch.randn(100, 64, dtype=torch.float64)
    fit = decision.fit

    def counting(found, sightings, need, *limits):
        def needed(groups):
            predicted.append(need(groups))
            return predicted[-1]

        return fit(found, sightings, needed, *limits)

    monkeypatch.setattr(decision, "fit", counting)
    whole = conjoin.report(model, (x,)).memory
    budget = int(whole.before + share * (whole.after - whole.before))
    report = conjoin.report(model, (x,), memory_budget=budget)
    assert report.memory.after <= budget
    fused = [group for group in report.groups if group.fused]
    # As many as there is room for, and no more; few predictions.
    assert share * count - 2 <= len([group for group in fused if len(group.layers) == 4])
    assert len(predicted) < 2 * count
    left = [group for group in report.groups if not group.fused or "one of" in group.detail]
    assert all("predicted" in group.detail for group in left)
