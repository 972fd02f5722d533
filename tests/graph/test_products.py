"""What is a product with a Parameter in a graph, and what is done with it."""

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph import products
from conjoin.layers.product import LinearProduct, Matmul


class Model(nn.Module):
    def __init__(self, script):
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
        self.b = nn.Parameter(torch.randn(4))
        self.script = script

    def forward(self, x):
        return self.script(self, x)


def graph_of(script):
    return fx.Tracer().trace(Model(script))


def found(script):
    """The products of a graph: function, equation, weight and bias."""
    return [
        (call.function, call.equation, call.weight.target, call.bias and call.bias.target)
        for call in products.calls(graph_of(script))
    ]


def einsum(equation):
    return lambda m, x: torch.einsum(equation, x, m.w)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (lambda m, x: F.linear(x, m.w), ("linear", "", "w", None)),
        (lambda m, x: F.linear(x, weight=m.w, bias=m.b), ("linear", "", "w", "b")),
        (lambda m, x: F.linear(x, m.w, None), ("linear", "", "w", None)),
        (lambda m, x: x @ m.w, ("matmul", "", "w", None)),
        (lambda m, x: x.mm(m.w), ("mm", "", "w", None)),
        (lambda m, x: torch.tensordot(x, m.w, dims=1), ("tensordot", "1", "w", None)),
        (lambda m, x: torch.tensordot(x, m.w, ([-1], [0])), ("tensordot", "", "w", None)),
        (einsum("abc, cd -> abd"), ("einsum", "abc,cd->abd", "w", None)),
        (einsum("...c,cd->...d"), ("einsum", "...c,cd->...d", "w", None)),
        (einsum("c,cd->d"), ("einsum", "c,cd->d", "w", None)),
        (einsum("bc, dc -> bd"), ("einsum", "bc,dc->bd", "w", None)),
        (einsum("...c,dc->...d"), ("einsum", "...c,dc->...d", "w", None)),
        (lambda m, x: x @ m.w.t(), ("matmul", "", "w", None)),
        (lambda m, x: x @ m.w.T, ("matmul", "", "w", None)),
        (lambda m, x: x.mm(m.w.mT), ("mm", "", "w", None)),
        (lambda m, x: torch.matmul(x, torch.transpose(m.w, 0, 1)), ("matmul", "", "w", None)),
        (lambda m, x: x @ m.w.permute(1, 0), ("matmul", "", "w", None)),
        (lambda m, x: torch.addmm(m.b, x, m.w), ("addmm", "", "w", "b")),
        (lambda m, x: torch.addmm(m.b, x, m.w.t()), ("addmm", "", "w", "b")),
        (lambda m, x: F.conv1d(x, m.w, m.b, 2, padding=1), ("conv1d", "", "w", "b")),
        (lambda m, x: F.conv_transpose2d(x, m.w), ("conv_transpose2d", "", "w", None)),
    ],
)
def test_products(script, expected):
    assert found(script) == [expected]


@pytest.mark.parametrize(
    "script",
    [
        lambda m, x: m.w @ x,
        lambda m, x: x @ m.w.t().t(),
        lambda m, x: x @ m.w.transpose(0, 0),
        lambda m, x: x @ m.w.H,
        lambda m, x: torch.addmm(m.b, x, m.w, beta=2),
        lambda m, x: torch.addmm(x, m.w, m.v),
        lambda m, x: F.conv1d(x, m.w, groups=2),
        lambda m, x: F.conv1d(x, m.w, padding=x.shape[0]),
        lambda m, x: F.conv2d(m.w, x),
        lambda m, x: x * m.w,
        lambda m, x: F.linear(x, m.w, m.b * 2),
        lambda m, x: torch.tensordot(x, m.w, dims=2),
        lambda m, x: torch.tensordot(x, m.w, dims=([0], [0])),
        lambda m, x: torch.tensordot(x, m.w, dims=([-1], [1])),
        *map(
            einsum, ("ab,cb->ca", "ab,bc->ca", "aa,ab->ab", "ab,bc->abc", "ab,ba->a", "ab,bb->ab")
        ),
        *map(einsum, ("...b,bc->ac", "ab,bc", "ab,b...->a...")),
    ],
)
def test_no_products(script):
    try:
        assert not found(script)
    except RuntimeError:  # An equation that PyTorch refuses is none either.
        pytest.fail("the trace raised")


def test_read_otherwise():
    graph = graph_of(lambda m, x: (x @ m.w, F.linear(x, m.v, m.b), m.b.sum(), F.relu(x) @ m.w))
    assert products.read_otherwise(graph, products.calls(graph)) == {"b"}
    graph = graph_of(lambda m, x: (x @ m.w, F.linear(x, m.w), x @ m.v))
    assert products.read_otherwise(graph, products.calls(graph)) == {"w"}
    graph = graph_of(lambda m, x: (x @ m.w.t(), x @ m.w.T, x @ m.v, x @ m.v.t()))
    assert products.read_otherwise(graph, products.calls(graph)) == {"v"}
    graph = graph_of(lambda m, x: _and_its_transpose(x, m.w.t()))
    assert products.read_otherwise(graph, products.calls(graph)) == {"w"}


def _and_its_transpose(x, turned):
    return x @ turned, turned + 1


def test_call_puts_a_layer_in_the_place_of_its_product_only():
    model = Model(lambda m, x: (x @ m.w, x.mm(m.w), F.linear(x, m.v, m.b), F.linear(x, m.v)))
    graph = fx.Tracer().trace(model)
    layers = {"p": Matmul("matmul", model.w), "q": LinearProduct("linear", model.v, model.b)}
    lent = {"w": ("p", "weight"), "v": ("q", "weight"), "b": ("q", "bias")}
    products.call(graph, lent, layers)
    graph.lint()
    called = [(node.op, str(node.target)) for node in graph.nodes if node.op.startswith("call")]
    assert [target for op, target in called if op == "call_module"] == ["p", "q"]
    assert [op for op, _ in called] == [
        "call_module",
        "call_method",
        "call_module",
        "call_function",
    ]
    assert [n.target for n in graph.nodes if n.op == "get_attr"] == ["w", "v"]


def test_offsets_are_noticed():
    assert products.tells_offsets(graph_of(lambda m, x: x.as_strided((2,), (1,))))
    assert not products.tells_offsets(graph_of(lambda m, x: x.view(-1)))


WRITTEN = {
    "linear": lambda m, x: F.linear(x, m.w, m.b),
    "matmul": lambda m, x: x @ m.w,
    "turned": lambda m, x: x @ m.w.t(),
    "addmm": lambda m, x: torch.addmm(m.b, x, m.w),
    "addmm turned": lambda m, x: torch.addmm(m.b, x, m.w.T),
    "tensordot": lambda m, x: torch.tensordot(x, m.w, dims=1),
    "einsum": einsum("ab,bc->ac"),
    "einsum turned": einsum("ab,cb->ac"),
}


@pytest.mark.parametrize("script", WRITTEN.values(), ids=WRITTEN)
def test_a_layer_is_written_as_the_product_that_it_was(script):
    """With proxies it is written into a graph."""
    model, x = Model(script), torch.randn(3, 4)
    (call,) = products.calls(fx.Tracer().trace(model))
    layer = call.layer(model.w, None if call.bias is None else model.b, stacked=False)
    assert layer(x).equal(model(x))
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    input = fx.Proxy(graph.placeholder("x"), tracer)
    weight = fx.Proxy(graph.get_attr("w"), tracer)
    bias = None if call.bias is None else fx.Proxy(graph.get_attr("b"), tracer)
    graph.output(layer.written(input, weight, bias).node)
    assert fx.GraphModule(model, graph)(x).equal(model(x))
    (again,) = products.calls(graph)
    assert again.reads == call.reads
