"""Calls of views become calls of their wide layer, where they make up a whole one."""

import pytest
import torch
from families import merge
from torch import fx, nn

from conjoin.layers.wide import View
from conjoin.passes import PIPELINE, widen


class Called(nn.Module):
    """Three siblings of one wide layer, called as a function says."""

    def __init__(self, script):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.script = script
        merge([self.a, self.b, self.c])

    def forward(self, x):
        return self.script(self, x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, View) or super().is_leaf_module(module, name)


def together(m, x):
    return m.a(x), m.b(x), m.c(x)


def in_other_order(m, x):
    return m.c(x), m.a(x), m.b(input=x)


def pyramid(m, x):
    return [layer(level) for level in (x, x + 1) for layer in (m.a, m.b, m.c)]


def cell(m, x):
    for _ in range(2):
        x = m.a(x) + m.b(x) * m.c(x)
    return x


def with_other_work_between(m, x):
    first = m.a(x)
    second = m.b(x + 0 * first)
    return first, second, m.b(x), m.c(x)


def twice(m, x):
    return m.a(x), m.b(x), m.c(x), m.a(x)


def changed_between(m, x):
    y = x + 1
    first = m.a(y), m.b(y)
    m.relu(y)
    return *first, m.c(y)


def incomplete(m, x):
    return m.a(x), m.b(x), m.c(x + 1)


def changed_after(m, x):
    y = x + 1
    outputs = m.a(y), m.b(y), m.c(y)
    y.zero_()
    return outputs


SCRIPTS = {
    together: 1,
    in_other_order: 1,
    pyramid: 2,
    cell: 2,
    with_other_work_between: 1,
    twice: 1,
    changed_between: 0,
    incomplete: 0,
    changed_after: 1,
}
scripts = pytest.mark.parametrize(
    ("script", "count"), SCRIPTS.items(), ids=[script.__name__ for script in SCRIPTS]
)


@scripts
def test_widen(script, count):
    model = Called(script).double()
    graph = _Tracer().trace(model)
    assert widen(graph, dict(model.named_modules())) == count
    graph.lint()
    calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    assert sum(target.endswith(".wide") for target in calls) == count
    x = torch.randn(3, 4, dtype=torch.float64)
    ours, theirs = fx.GraphModule(model, graph)(x), model(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@scripts
def test_a_second_time_changes_nothing(script, count):
    model = Called(script)
    graph = _Tracer().trace(model)
    widen(graph, dict(model.named_modules()))
    code = graph.python_code("self").src
    assert widen(graph, dict(model.named_modules(remove_duplicate=False))) == 0
    assert graph.python_code("self").src == code


def test_it_is_in_the_pipeline():
    assert widen in PIPELINE
