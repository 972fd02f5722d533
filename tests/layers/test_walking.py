"""Modules are gone through in PyTorch's order, past wide layers."""

import torch
from torch import nn

import conjoin
from conjoin.layers.view import Own
from conjoin.layers.walking import walk
from conjoin.layers.wide import Wide


class Nested(nn.Module):
    """Siblings, a module at two names, one that is missing, and one that holds its holder."""

    def __init__(self, depth=2):
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})
        self.last, self.missing = nn.ReLU(), None
        self.inner = Nested(depth - 1) if depth else None
        self.again = self.heads["a"]

    def forward(self, x):
        found = [head(x) for head in self.heads.values()]
        return found if self.inner is None else [*found, *self.inner(x)]


def test_as_pytorch_does():
    model = Nested()
    assert [*walk(model)] == [*model.named_modules()]


def test_a_loop():
    model = Nested()
    model.inner.last.outer = model
    assert [*walk(model)] == [*model.named_modules()]


def test_past_wide_layers():
    fused = conjoin.optimize(Nested(), (torch.randn(2, 4),))
    listed = [*fused.named_modules()]
    assert any(isinstance(module, Wide) for _, module in listed)
    assert [*walk(fused)] == [each for each in listed if not isinstance(each[1], (Wide, Own))]
