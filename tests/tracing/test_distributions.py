"""Forwards that make distributions are rewritten; the objects are made on each call as ever."""

import pytest
import torch
import torch.distributions as td
from equivalence import assert_equivalent
from torch import nn
from torch.distributions import Categorical, Normal

import conjoin
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.critic = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.log_std = nn.Parameter(torch.randn(3))
        self.drop = nn.Dropout(0.5)


def gaussian(self, x):
    mean = self.actor(x)
    policy = Normal(mean, self.log_std.exp().expand_as(mean))
    return policy, self.critic(x)


def evaluated(self, x):
    policy = torch.distributions.normal.Normal(self.actor(x), scale=self.log_std.exp())
    action = policy.sample()
    return action, policy.log_prob(action).sum(1), policy.entropy().sum(1), self.critic(x)


def discrete(self, x):
    policy = td.Categorical(logits=self.actor(x))
    action = policy.sample()
    return action, policy.log_prob(action), self.critic(x)


def of_probabilities(self, x):
    return Categorical(self.actor(x).softmax(-1)).entropy(), self.critic(x)


def drawn_twice(self, x):
    """Draws are as many as before, and in the order in which they were"""
    policy = Normal(self.actor(x), self.log_std.exp())
    first = self.drop(policy.rsample())
    second, third = policy.rsample((2,)), torch.rand_like(x)
    policy.sample()
    return first, second, third, self.drop(self.critic(x)), policy.sample()


def standard(self, x):
    return self.actor(x) + Normal(0.0, 1.0).sample((3,)), self.critic(x)


def validated(self, x):
    return Normal(self.actor(x), self.log_std.exp(), validate_args=True), self.critic(x)


REWRITTEN = [gaussian, evaluated, discrete, of_probabilities, drawn_twice, standard, validated]


def changed_through_it(self, x):
    mean = self.actor(x)
    policy = Normal(mean, self.log_std.exp())
    policy.loc.mul_(2)
    return policy.sample(), mean, self.critic(x)


def its_mean(self, x):
    return Normal(self.actor(x), self.log_std.exp()).mean, self.critic(x)


def asked_for(self, x):
    policy = Normal(self.actor(x), self.log_std.exp())
    return policy.sample() if isinstance(policy, Normal) else x, self.critic(x)


def of_another_class(self, x):
    return td.Laplace(self.actor(x), self.log_std.exp()).sample(), self.critic(x)


LEFT = [changed_through_it, its_mean, asked_for, of_another_class]

X = torch.randn(5, 4, dtype=torch.float64)


def with_forward(forward):
    return type("Model", (ActorCritic,), {"forward": forward})().double()


def each_of(forwards):
    return pytest.mark.parametrize("forward", forwards, ids=lambda forward: forward.__name__)


@each_of(REWRITTEN + LEFT)
def test_exact(forward):
    model = with_forward(forward)
    optimized = conjoin.optimize(model, (X,))
    assert isinstance(optimized, Region) == (forward in REWRITTEN)
    for x in (X, X[:2]):
        if forward in REWRITTEN:
            assert vars(optimized)[PLAN].find(optimized, (x,), {}) is not None
        assert_equivalent(optimized, model, (x,))


def test_towers_run_at_once():
    model = with_forward(gaussian)
    report = conjoin.report(model, (X,))
    [[chain]] = [group.depth for group in report.groups]
    assert (chain.branches, chain.operations) == (2, ("Linear", "Tanh", "Linear"))


def test_values_that_are_not_allowed_are_refused_as_before():
    model = with_forward(validated)
    optimized = conjoin.optimize(model, (X,))
    for each in (model, optimized):
        with pytest.raises(ValueError, match="loc"):
            each(X * torch.nan)


def test_who_gets_a_distribution_may_view_what_it_holds():
    """As parts of a wide tensor they could not be viewed"""
    model = with_forward(gaussian)
    optimized = conjoin.optimize(model, (X,))
    torch.testing.assert_close(optimized(X)[0].loc.view(-1), model(X)[0].loc.view(-1))


def test_compiled():
    model = with_forward(gaussian).eval()
    optimized = conjoin.optimize(model, (X,))
    torch.compiler.reset()
    compiled = torch.compile(optimized, backend="aot_eager")
    torch.testing.assert_close(compiled(X)[0].loc, model(X)[0].loc, rtol=0, atol=1e-9)
    torch.testing.assert_close(compiled(X)[1], model(X)[1], rtol=0, atol=1e-9)
