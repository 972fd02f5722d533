"""Values are congruent where they have one shape whatever the inputs are."""

import math

import pytest
import torch
from scripted import Scripted, layers
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph import congruence, edit
from conjoin.layers import activation


def classes_of(script, **modules):
    """The classes of what a script gives."""
    traced = fx.symbolic_trace(Scripted(script, **modules))
    found = congruence.classes(traced.graph, edit.called_modules(traced))
    *_, output = traced.graph.nodes
    return [found[node] for node in output.args[0]]


def modules():
    return {
        **layers(lambda: nn.Linear(4, 3)),
        "other": nn.Linear(4, 5),
        "precise": nn.Linear(4, 3).double(),
    }


CONGRUENT = {
    "layers": lambda m, x: (m.a(x), m.b(x)),
    "behind layers": lambda m, x: (F.relu(m.a(x)).view(-1), F.relu(m.b(x)).view(-1)),
    "sizes": lambda m, x: (m.a(x).view(x.size(0), -1), m.b(x).view(x.size(0), -1)),
    "parts of one size": lambda m, x: [
        torch.unsafe_split_with_sizes(x, [2, 1, 2], -1)[i] for i in (0, 2)
    ],
    "columns": lambda m, x: (x[:, 0], x[:, 2]),
    "columns from behind": lambda m, x: (x[..., 0], x[..., -1]),
    "columns that are selected": lambda m, x: (x.select(1, 0), x.select(1, 2)),
    "rows of what is a tensor": lambda m, x: (x.t()[0], x.t()[1]),
    "parts that are unbound": lambda m, x: [x.unbind(1)[i] for i in (0, 1)],
    "chosen elements": lambda m, x: (torch.where(x > 0, m.a(x), 0 * m.a(x)),) * 2,
}

OTHERS = {
    "other widths": lambda m, x: (m.a(x), m.other(x)),
    "other types": lambda m, x: (m.a(x), m.precise(x)),
    "input": lambda m, x: (x, m.a(x)),
    "parts of other sizes": lambda m, x: [
        torch.unsafe_split_with_sizes(x, [2, 1, 2], -1)[i] for i in (0, 1)
    ],
    "chunks": lambda m, x: [x.chunk(2)[i] for i in (0, 1)],
    "slices": lambda m, x: (x[1:], x[2:]),
    "items of what may be no tensor": lambda m, x: (x[0], x[1]),
    "a column and a mask": lambda m, x: (x[:, 0], x[:, True]),
    "columns along other dimensions": lambda m, x: (x.select(0, 0), x.select(1, 0)),
    "rows and an element": lambda m, x: (m.a(x)[[0, 1]], m.b(x)[0, 1]),
    "what is not zero": lambda m, x: (
        x[torch.where(m.a(x))[0]],
        x[torch.where(m.b(x))[0]],
    ),
    "masks": lambda m, x: (x[m.a(x) > 0], x[m.b(x) > 0]),
    "nonzero": lambda m, x: (m.a(x).nonzero(), m.b(x).nonzero()),
    "masked_select": lambda m, x: (x.masked_select(m.a(x) > 0), x.masked_select(m.b(x) > 0)),
    "numbers": lambda m, x: (m.a(x).expand(2, 3, 3), m.b(x).expand(3, 3, 3)),
}


@pytest.mark.parametrize("script", CONGRUENT.values(), ids=CONGRUENT)
def test_congruent(script):
    first, second = classes_of(script, **modules())
    assert first == second


def test_activations_that_note_are_activations():
    noting, plain = nn.ReLU(), nn.ReLU()
    activation.listen(noting)
    first, second = classes_of(lambda m, x: (m.noting(x), m.plain(x)), noting=noting, plain=plain)
    assert first == second


@pytest.mark.parametrize("script", OTHERS.values(), ids=OTHERS)
def test_not_congruent(script):
    first, second = classes_of(script, **modules())
    assert first != second


def test_hooks():
    known = modules()
    known["b"].register_forward_hook(lambda module, args, output: output[:1])
    first, second = classes_of(CONGRUENT["layers"], **known)
    assert first != second


def test_numbers_and_inputs():
    """Numbers do not change a shape; inputs have one where that is given."""

    def forward(x, y, z):
        return (x + 1).relu(), (x + 2).relu(), (y * 1.5).relu(), z.relu(), x.relu()

    graph = fx.symbolic_trace(forward).graph
    outputs = [node for node in graph.nodes if node.target == "relu"]

    def numbers(*alike):
        found = congruence.classes(graph, {}, alike)
        return [found[output] for output in outputs]

    first, second, third, fourth, plain = numbers(0, 0, 1)
    assert first == second
    assert len({first, third, fourth, plain}) == 4
    assert numbers(0, 0, 0)[3] == numbers(0, 0, 0)[4]
    assert numbers()[3] != numbers()[4]


SIZED = {
    "products of sizes": lambda x, k: x.view(x.shape[0] * k, -1, 6),
    "sums of sizes": lambda x, k: x.new_zeros(1).expand(x.size(0) + k, 6),
    "what is left": lambda x, k: x[: x.shape[0] - k],
    "rounded": lambda x, k: x.expand(math.floor(x.dim() / 2) * k, *[-1] * 3),
}


@pytest.mark.parametrize("sized", SIZED.values(), ids=SIZED)
def test_numbers_that_sizes_are_made_of_count(sized):
    graph = fx.symbolic_trace(lambda x: (sized(x, 1), sized(x, 2))).graph
    first, second = graph.output_node().args[0]
    found = congruence.classes(graph, {}, (0,))
    assert found[first] != found[second]


def test_an_index_that_may_be_a_mask():
    def forward(x, m, n):
        return x[m], x[n], x[:, m.shape[0]], x[:, n.shape[0]]

    graph = fx.symbolic_trace(forward).graph
    masked, other, *columns = graph.output_node().args[0]
    found = congruence.classes(graph, {}, (0, 1, 1))
    assert found[masked] != found[other]
    assert found[columns[0]] == found[columns[1]]
