"""What acts on each element, what it is equal to, and what it keeps for backward."""

import functools
import operator

import pytest
import torch
from scripted import Scripted
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph import edit, elementwise

NUMBERS = {"clamp": (0, 1), "clip": (0, 1), "clamp_min": (0,), "clamp_max": (1,), "pow": (2.5,)}
NUMBERS |= dict.fromkeys(("add", "sub", "mul", "div", "true_divide"), (2.0,))
NUMBERS["threshold"] = (0.3, 0.2)
"""The arguments of functions that need some."""


def applied(function, numbers, x):
    return function(x, *numbers)


def functions():
    for name in sorted(elementwise.NAMES):
        numbers = NUMBERS.get(name, ())
        for spelling in (name, name + "_"):
            if hasattr(torch.Tensor, spelling):
                method = operator.methodcaller(spelling, *numbers)
                yield pytest.param(method, id=f"Tensor.{spelling}")
            for place in (torch, F):
                if function := getattr(place, spelling, None):
                    call = functools.partial(applied, function, numbers)
                    yield pytest.param(call, id=f"{place.__name__}.{spelling}")
    for function in sorted(elementwise.OPERATORS - {operator.neg}, key=str):
        yield pytest.param(lambda x, f=function: f(x, 2.5), id=function.__name__)
    yield pytest.param(lambda x: 2.5**x, id="power of a number")


def modules():
    for cls in sorted(elementwise.ACTIVATIONS, key=lambda cls: cls.__name__):
        module = cls(0.3, 0.2) if cls is nn.Threshold else cls()
        yield pytest.param(module, id=cls.__name__)
        if hasattr(module, "inplace"):
            module = cls(0.3, 0.2, True) if cls is nn.Threshold else cls(inplace=True)
            yield pytest.param(module, id=f"{cls.__name__} in place")


def call_of(function):
    """The graph of one call, and the call."""
    model = Scripted(lambda m, x: (m.f if hasattr(m, "f") else function)(x))
    if isinstance(function, nn.Module):
        model.f = function
    traced = fx.symbolic_trace(model)
    _, node, _ = traced.graph.nodes
    return node, edit.called_modules(traced)


def may_be_changed(function):
    """Whether backward goes on where the output was changed in place."""
    output = function((torch.rand(3, 4) / 2 + 0.1).requires_grad_() * 1)
    with torch.no_grad():
        output.add_(1)
    try:
        output.sum().backward()
    except RuntimeError as error:
        assert "modified by an inplace" in str(error)  # noqa: PT017
        return False
    return True


@pytest.mark.parametrize("function", [*functions(), *modules()])
def test_element_by_element(function):
    """Of a part what it is of the whole; and known where autograd keeps the output."""
    node, called = call_of(function)
    key = elementwise.key(node, node.args[0], called)
    if key is None:
        pytest.skip("not known")
    x = torch.rand(4, 6, dtype=torch.float64) / 2 + 0.1
    whole = function(x.clone())
    parts = [function(part.clone()) for part in x.split(3, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    assert elementwise.saves_output(node, called) or may_be_changed(function)


SETTINGS = {
    "numbers": lambda x: (x * 2, x * 3),
    "types": lambda x: (x * 2, x * 2.0),
    "signs of zero": lambda x: (x * 0.0, x * -0.0),
    "sides": lambda x: (x - 1, 1 - x),
    "places": lambda x: (F.relu(x), F.relu(x, inplace=True)),
    "tensors": lambda x: (x + x.sum(), x + x.sum()),
}


@pytest.mark.parametrize("script", SETTINGS.values(), ids=SETTINGS)
def test_unequal(script):
    traced = fx.symbolic_trace(Scripted(lambda m, x: script(x)))
    *_, output = traced.graph.nodes
    x = next(iter(traced.graph.nodes))
    first, second = (elementwise.key(node, x, {}) for node in output.args[0])
    assert first is not None
    assert first != second


def test_settings_can_be_compared_whatever_they_are():
    def key(**settings):
        module = nn.ReLU()
        vars(module).update(settings)
        return elementwise.module_key(module)

    assert len({key(odd={1: 2, "a": [3.0]}), key(odd={1: 2, "a": [3.0]}), key(odd={1: 2})}) == 2
    assert key(a=1, b=2) == key(b=2, a=1)
    for unknown in ({1}, torch.ones(2), [1, {2}]):
        assert len({key(odd=unknown), key(odd=unknown)}) == 2


@pytest.mark.parametrize("training", [True, False])
def test_dropout(training):
    """It is idle for good only where it drops nothing."""
    assert elementwise.module_key(nn.Dropout(0.5).train(training)) is None
    assert elementwise.module_key(nn.Dropout(0.0).train(training)) is not None


def test_hooks():
    module = nn.ReLU()
    module.register_forward_hook(lambda *args: None)
    assert elementwise.module_key(module) is None
