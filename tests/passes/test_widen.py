"""Calls of views become calls of their wide layer, where they make up a whole one."""

import pytest
import torch
from families import merge
from torch import fx, nn

from conjoin.layers.view import View
from conjoin.passes import PIPELINE, Widen


class Unknown(nn.Module):
    def forward(self, x):
        return x * 2


class Called(nn.Module):
    """Three siblings of one wide layer, called as a function says."""

    def __init__(self, script):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.relu = nn.ReLU(inplace=True)
        self.tanh, self.dropout = nn.Tanh(), nn.Dropout(0.5)
        self.unknown = Unknown()
        self.hooked = nn.Tanh()
        self.hooked.register_forward_hook(lambda module, args, output: None)
        self.script = script
        merge([self.a, self.b, self.c], enclosing=self)

    def forward(self, x):
        return self.script(self, x)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        known = isinstance(module, (View, Unknown))
        return known or super().is_leaf_module(module, name)


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


def changed_elsewhere(m, x):
    """What is changed may be an alias of what the siblings read, for all that is known."""
    y = x + 1
    first = m.a(x), m.b(x)
    m.relu(y)
    return *first, m.c(x), y


def written_elsewhere(m, x):
    """What is changed nobody else can see."""
    first = m.a(x)
    y = (x + 1).add_(1)
    return first, m.b(x), m.c(x), y


def unknown_between(m, x):
    first = m.a(x)
    return first, m.unknown(x + 1), m.b(x), m.c(x)


def hooked_between(m, x):
    first = m.a(x)
    return first, m.hooked(x + 1), m.b(x), m.c(x)


def drawn_between(m, x):
    """The order of what draws random numbers is as before."""
    first = m.a(x), m.dropout(x)
    return *first, m.b(x), torch.rand_like(x), m.c(x)


def with_modules_between(m, x):
    first = m.a(x)
    return first, m.tanh(x), m.b(x), m.dropout(first), m.c(x)


def with_modules_around(m, x):
    """They do not stand between, but that is not looked at so closely."""
    x = m.tanh(x)
    return m.dropout(m.a(x)), m.b(x), m.c(x)


def whole_before_a_change(m, x):
    first = m.a(x), m.b(x), m.tanh(m.c(x))
    y = x + 1
    return *first, m.relu(y), m.a(x), m.unknown(m.b(x))


def changed_before(m, x):
    y = (x + 1).mul_(2)
    return m.a(y), m.b(y), m.c(y)


def incomplete(m, x):
    return m.a(x), m.b(x), m.c(x + 1)


def changed_after(m, x):
    y = x + 1
    outputs = m.a(y), m.b(y), m.c(y)
    y.zero_()
    return outputs


VIEWS_LEFT = {
    twice: 1,
    with_other_work_between: 1,
    whole_before_a_change: 2,
    changed_between: 3,
    changed_elsewhere: 3,
    unknown_between: 3,
    hooked_between: 3,
    incomplete: 3,
}
"""Calls of views that are left as they are."""

SCRIPTS = {
    together: 1,
    in_other_order: 1,
    pyramid: 2,
    cell: 2,
    with_other_work_between: 1,
    with_modules_between: 1,
    with_modules_around: 1,
    twice: 1,
    changed_between: 0,
    changed_elsewhere: 0,
    drawn_between: 1,
    unknown_between: 0,
    hooked_between: 0,
    written_elsewhere: 1,
    whole_before_a_change: 1,
    incomplete: 0,
    changed_after: 1,
    changed_before: 1,
}
"""How many wide layers are called."""

scripts = pytest.mark.parametrize(
    ("script", "count"), SCRIPTS.items(), ids=[script.__name__ for script in SCRIPTS]
)


def widened(model):
    """The model's graph after the pass, and whether that changed it."""
    traced = fx.GraphModule(model, _Tracer().trace(model))
    result = Widen()(traced)
    traced.graph.lint()
    traced.recompile()
    assert result.graph_module is traced
    return traced, result.modified


@scripts
def test_widen(script, count):
    model = Called(script).double()
    traced, changed = widened(model)
    assert changed == (count > 0)
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    assert sum(target.endswith(".wide") for target in calls) == count
    assert sum(target in "abc" for target in calls) == VIEWS_LEFT.get(script, 0)
    x = torch.randn(3, 4, dtype=torch.float64)
    for mode in (True, False):
        found = []
        for each in (traced.train(mode), model.train(mode)):
            torch.manual_seed(0)
            found.append(each(x))
        torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@scripts
def test_a_second_time_changes_nothing(script, count):
    model = Called(script)
    traced, _ = widened(model)
    code = traced.code
    assert not Widen()(traced).modified
    assert traced.graph.python_code("self").src == code


def test_siblings_that_read_a_sibling():
    model = Called(lambda m, x: (m.p(y := m.b(x)), m.a(x), m.c(x), m.q(y))).double()
    model.p, model.q = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()
    merge([model.p, model.q], enclosing=model)
    traced, changed = widened(model)
    assert changed
    x = torch.randn(3, 4, dtype=torch.float64)
    assert str(traced.graph).count("call_module") == 2
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=1e-9)


def test_a_hook_on_a_view_between():
    """A view is PyTorch's own layer only as long as nobody hooks anything to it."""
    model = Called(lambda m, x: (m.a(x), m.p(x), m.b(x), m.c(x)))
    model.p, model.q = nn.Linear(4, 4), nn.Linear(4, 4)
    merge([model.p, model.q], enclosing=model)
    assert widened(model)[1]
    model.p.register_forward_hook(lambda module, args, output: args[0].zero_())
    assert not widened(model)[1]


def test_it_is_in_the_pipeline():
    assert any(isinstance(run, Widen) for run in PIPELINE)
