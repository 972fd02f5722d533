"""Products with raw Parameters that read one tensor become one product."""

import pytest
import torch
from counting import count
from equivalence import assert_close, assert_equivalent, assert_same_state, assert_same_structure
from products import MODELS, build, normal
from torch import nn

import conjoin

every_model = pytest.mark.parametrize("name", MODELS)


@every_model
@pytest.mark.parametrize("training", [True, False])
def test_products_run_at_once(name, training):
    model, inputs = build(name)
    fused = conjoin.optimize(model, inputs)
    before, after = MODELS[name][2:]
    assert count(model, inputs, training=training).products == before
    assert count(fused, inputs, training=training).products == after


@every_model
def test_is_the_same_function(name):
    model, inputs = build(name)
    fused = conjoin.optimize(model, inputs)
    assert_equivalent(fused, model, inputs)
    assert conjoin.verify(model, fused, inputs)


@every_model
def test_trains_alike(name):
    """Three steps of Adam, and evaluation after each."""
    model, inputs = build(name)
    fused = conjoin.optimize(model, inputs)
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.1) for each in (model, fused)]
    for _ in range(3):
        outputs = []
        for trained, optimizer in zip((model, fused), optimizers, strict=True):
            torch.manual_seed(0)
            output = trained.train()(*inputs)
            loss = sum(
                o.square().sum()
                for o in (output if isinstance(output, (list, tuple)) else [output])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            outputs.append(trained.eval()(*inputs))
        torch.testing.assert_close(*outputs, rtol=1e-9, atol=1e-9)
    assert_close(fused.state_dict(), model.state_dict())


@every_model
def test_unfuse_gives_back_the_original(name):
    model, inputs = build(name)
    plain = conjoin.unfuse(conjoin.optimize(model, inputs))
    assert_same_state(plain, model)
    assert_same_structure(plain, model)
    assert [type(m) for m in plain.modules()] == [type(m) for m in model.modules()]
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in model.modules()]


@every_model
def test_report_lists_the_group(name):
    model, inputs = build(name)
    report = conjoin.report(model, inputs)
    names = {name for group in report.groups if group.fused for name in group.layers}
    raw = {name for name, _ in model.named_parameters()} & names
    assert raw
    again = conjoin.report(conjoin.optimize(model, inputs), inputs)
    assert [(g.kind, g.layers, g.fused, g.launches) for g in again.groups] == [
        (g.kind, g.layers, g.fused, g.launches) for g in report.groups
    ]
    before, after = (sum(g.launches[i] for g in report.groups) for i in (0, 1))
    assert before - after <= report.launches.before.forward - report.launches.after.forward


class Pair(nn.Module):
    """Two weights, and a forward that is given."""

    def __init__(self, script, shapes=((6, 4), (6, 4)), **settings):
        super().__init__()
        self.a, self.b = (normal(*shape) for shape in shapes)
        self.bias = normal(4)
        for name, value in settings.items():
            setattr(self, name, value)
        self.script = script

    def forward(self, x):
        return self.run(x)


def pair(script, **settings):
    """A model with this function as a forward of its own."""
    cls = type("Pair", (Pair,), {"forward": script, "__module__": __name__})
    model = cls(None, **settings).double()
    del model.script
    return model
