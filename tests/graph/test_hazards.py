"""What a graph tells of changes in place, of aliases and of strides."""

import operator

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from conjoin.graph.hazards import follow, is_pure, trained
from conjoin.graph.strides import reads_strides


class Opaque(nn.Module):
    def forward(self, x):
        return x.add_(1)


class Marked(nn.Module):
    """A forward with the layer `a` before and `b` after what a function does to x."""

    def __init__(self, script, child=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.child = child
        self.script = script

    def forward(self, x):
        y = x + 1
        first = self.a(y)
        self.script(self, y)
        return first, self.b(y)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return True


def graph_of(model):
    return _Tracer().trace(model)


def changes(script, child=None):
    """How often y had been changed before `b` read it."""
    model = Marked(script, child)
    graph = graph_of(model)
    found = follow(graph, dict(model.named_modules()))[0]
    nodes = {str(node.target): node for node in graph.nodes}
    assert found[nodes["a"]] == 0
    return found[nodes["b"]]


def hooked():
    module = nn.ReLU()
    module.register_forward_hook(lambda module, args, output: args[0].zero_())
    return module


def python_function(y):
    return y.zero_()


fx.wrap("python_function")

CHANGES = {
    "method": lambda m, y: y.add_(1),
    "function": lambda m, y: torch.relu_(y),
    "functional": lambda m, y: F.relu(y, inplace=True),
    "copy": lambda m, y: y.copy_(y * 2),
    "out": lambda m, y: torch.add(y, 1, out=y),
    "second of out": lambda m, y: torch.max(y * 2, 0, out=(y, y)),
    "view": lambda m, y: y.view(-1).mul_(2),
    "view of a view": lambda m, y: y.t()[0].unsqueeze(0).zero_(),
    "reshape": lambda m, y: y.reshape(-1).zero_(),
    "flatten": lambda m, y: y.flatten().zero_(),
    "detach": lambda m, y: y.detach().zero_(),
    "data": lambda m, y: y.data.zero_(),
    "transposed": lambda m, y: y.T.zero_(),
    "chunk": lambda m, y: y.chunk(2)[0].zero_(),
    "torch.chunk": lambda m, y: torch.chunk(y, 2)[1].zero_(),
    "contiguous": lambda m, y: y.contiguous().zero_(),
    "same type": lambda m, y: y.float().zero_(),
    "expand": lambda m, y: torch.broadcast_to(y, (2, 3, 4))[0].zero_(),
    "narrow": lambda m, y: torch.narrow(y, 0, 0, 1).zero_(),
    "view_as_real": lambda m, y: torch.view_as_real(y).zero_(),
    "atleast": lambda m, y: torch.atleast_3d(y).zero_(),
    "dropout": lambda m, y: F.dropout(y, 0.5, training=False).zero_(),
    "squeeze_": lambda m, y: y.unsqueeze(0).squeeze_(0).zero_(),
    "foreach": lambda m, y: torch._foreach_add_([y], 1),
    "renorm": lambda m, y: nn.init.zeros_(y),
    "second argument": lambda m, y: torch.add(torch.ones(4), y, out=y),
}
MODULES = {
    "ReLU": nn.ReLU(inplace=True),
    "Dropout": nn.Dropout(0.5, inplace=True),
    "Hardswish": nn.Hardswish(inplace=True),
    "opaque": Opaque(),
    "hooked": hooked(),
}
NO_CHANGES = {
    "pure": lambda m, y: y * 2,
    "view": lambda m, y: y.view(-1),
    "clone": lambda m, y: y.clone().zero_(),
    "result": lambda m, y: (y * 2).add_(1),
    "other": lambda m, y: torch.add(y, 1, out=torch.empty(3, 4)),
    "requires_grad": lambda m, y: y.requires_grad_(),
}


@pytest.mark.parametrize("script", CHANGES.values(), ids=CHANGES)
def test_a_change_is_seen(script):
    assert changes(script) > 0


@pytest.mark.parametrize("child", MODULES.values(), ids=MODULES)
def test_a_change_by_a_module_is_seen(child):
    assert changes(lambda m, y: m.child(y), child) > 0


@pytest.mark.parametrize(
    "child", [nn.Identity(), nn.Flatten(0), nn.Unflatten(1, (2, 2)), nn.Dropout(0.5)], ids=str
)
def test_a_change_behind_a_module_that_shares_memory_is_seen(child):
    assert changes(lambda m, y: m.child(y).zero_(), child) > 0


def test_a_change_by_another_function_is_seen():
    assert changes(lambda m, y: python_function(y)) > 0


@pytest.mark.parametrize("script", NO_CHANGES.values(), ids=NO_CHANGES)
def test_what_changes_nothing(script):
    assert changes(script) == 0


def test_a_change_of_a_weight_counts_for_all():
    class Changed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            first = self.a(x)
            self.scale.add_(1)
            return first, self.b(x)

    model = Changed()
    graph = graph_of(model)
    found = follow(graph, dict(model.named_modules()))[0]
    assert [found[node] for node in graph.nodes if node.op == "call_module"] == [0, 1]


PURE = {
    "arithmetic": lambda m, y: y * 2,
    "function": lambda m, y: F.relu(y),
    "method": lambda m, y: y.softmax(-1),
    "view": lambda m, y: y.view(-1),
    "requires_grad": lambda m, y: y.requires_grad_(),
    "random": lambda m, y: torch.rand_like(y),
}


def pure(script, child=None):
    """Whether all nodes are."""
    model = Marked(script, child)
    modules = dict(model.named_modules())
    return all(is_pure(node, modules) for node in graph_of(model).nodes)


@pytest.mark.parametrize("script", CHANGES.values(), ids=CHANGES)
def test_a_change_is_not_pure(script):
    assert not pure(script)


@pytest.mark.parametrize("child", MODULES.values(), ids=MODULES)
def test_a_module_that_changes_is_not_pure(child):
    assert not pure(lambda m, y: m.child(y), child)


def test_python_functions_are_not_pure():
    assert not pure(lambda m, y: python_function(y))


def test_a_change_of_something_else_is_not_pure():
    """That is another question than the one of `versions`: whether nothing at all is changed."""
    assert not pure(lambda m, y: (y * 2).add_(1))
    assert not pure(lambda m, y: torch.add(y, 1, out=y.new_empty(3, 4)))


@pytest.mark.parametrize("script", PURE.values(), ids=PURE)
def test_what_is_pure(script):
    assert pure(script)


@pytest.mark.parametrize(
    "child", [nn.ReLU(), nn.Dropout(), nn.Identity(), nn.LayerNorm(4)], ids=str
)
def test_modules_that_are_pure(child):
    assert pure(lambda m, y: m.child(y), child)


@pytest.mark.parametrize("child", [nn.ReLU(), nn.Conv1d(4, 4, 1), nn.LayerNorm(4)], ids=str)
def test_modules_that_change_nothing(child):
    assert changes(lambda m, y: m.child(y), child) == 0


@pytest.mark.parametrize("function", [operator.iadd, operator.setitem])
def test_a_change_by_an_operator_is_seen(function):
    """Symbolic tracing has no such nodes; a graph from elsewhere may."""
    model = Marked(lambda m, y: y * 2)
    graph = graph_of(model)
    nodes = {str(node.target): node for node in graph.nodes}
    with graph.inserting_before(nodes["b"]):
        graph.call_function(function, (nodes["b"].args[0], 1))
    assert follow(graph, dict(model.named_modules()))[0][nodes["b"]] == 1


def test_a_change_of_a_part_of_the_input():
    """The whole is another value too."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            part = x[0]
            first = self.a(part)
            x.zero_()
            return first, self.b(part)

    model = Parts()
    graph = graph_of(model)
    found = follow(graph, dict(model.named_modules()))[0]
    assert [found[node] for node in graph.nodes if node.op == "call_module"] == [0, 1]


@pytest.mark.parametrize("reached", ["set_", "numpy"])
def test_changes_that_nobody_sees(reached):
    """Through the tensor that lent its memory, and through what is not a tensor."""
    graph = fx.Graph()
    x, other = graph.placeholder("x"), graph.placeholder("other")
    graph.call_method(reached, (x, other) if reached == "set_" else (x,))
    first = graph.call_module("a", (x,))
    graph.call_method("zero_", (other,))
    second = graph.call_module("b", (x,))
    modules = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}
    found = follow(graph, modules)[0]
    assert found[first] != found[second]


@torch.library.custom_op("conjoin_tests::scaled", mutates_args=())
def scaled(y: torch.Tensor) -> torch.Tensor:
    return y * 2


class Read(nn.Module):
    def __init__(self, script):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 1)
        self.identity, self.dropout, self.norm = nn.Identity(), nn.Dropout(), nn.BatchNorm2d(3)
        self.relu, self.flatten = nn.ReLU(inplace=True), nn.Flatten()
        self.hooked = nn.Sigmoid()
        self.hooked.register_forward_hook(lambda module, args, output: args[0].view(-1))
        self.script = script

    def forward(self, x):
        return self.script(self, self.conv(x)) + 1


READS = {
    "view": lambda m, y: y.view(2, -1),
    "stride": lambda m, y: y.stride()[0],
    "is_contiguous": lambda m, y: y.is_contiguous() + y,
    "as_strided": lambda m, y: y.as_strided((2,), (1,)),
    "torch.as_strided": lambda m, y: torch.as_strided(y, (2,), (1,)),
    "data_ptr": lambda m, y: y.data_ptr(),
    "view_as": lambda m, y: y.view_as(y),
    "view of a view": lambda m, y: y.transpose(1, 2).view(-1),
    "view of a part": lambda m, y: y[0].view(-1),
    "change of a view": lambda m, y: y.reshape(-1).add_(1),
    "a function of Python's own": lambda m, y: python_function(y),
    # Without shapes nobody knows whether they copy a slice, which they share with a tensor.
    "reshape": lambda m, y: y.reshape(-1),
    "flatten": lambda m, y: y.flatten(1),
    "torch.flatten": lambda m, y: torch.flatten(y, 1),
    "contiguous": lambda m, y: y.contiguous(),
    "view after Identity": lambda m, y: m.identity(y).view(-1),
    "view after Dropout": lambda m, y: m.dropout(y).view(-1),
    "view after a module in place": lambda m, y: m.relu(y).view(-1),
    "view after a change": lambda m, y: y.mul_(2).view(-1),
    "Flatten": lambda m, y: m.flatten(y),
    "a module with a hook": lambda m, y: m.hooked(y),
    "an aten operator": lambda m, y: torch.ops.aten.view(y, [-1]),
    "an operator of somebody else": lambda m, y: torch.ops.conjoin_tests.scaled(y),
    "random numbers in place": lambda m, y: y.normal_(),
    "resize": lambda m, y: y.resize_(2, 2),
}
READS_NOT = {
    "arithmetic": lambda m, y: y * 2,
    "unflatten": lambda m, y: y.unflatten(1, (1, 3)),
    "transpose": lambda m, y: y.transpose(1, 2),
    "a change": lambda m, y: y.add_(1),
    "a copy": lambda m, y: (y * 2).view(-1),
    "view after a module": lambda m, y: m.norm(y).view(-1),
    "another aten operator": lambda m, y: torch.ops.aten.mul(y, 2),
}


def why(script, *, escapes=False):
    model = Read(script)
    graph = graph_of(model)
    node = next(node for node in graph.nodes if node.op == "call_module")
    return reads_strides(node, dict(model.named_modules()), escapes=escapes)


@pytest.mark.parametrize("script", READS.values(), ids=READS)
def test_strides_are_read(script):
    assert why(script)


@pytest.mark.parametrize("script", READS_NOT.values(), ids=READS_NOT)
def test_strides_are_not_read(script):
    assert not why(script)


def test_an_output_may_escape():
    graph = graph_of(nn.Sequential(nn.Conv2d(2, 3, 1)))
    node = next(node for node in graph.nodes if node.op == "call_module")
    assert reads_strides(node, {}, escapes=True)
    assert not reads_strides(node, {}, escapes=False)


def test_trained():
    """No gradient comes back to what is detached, left out or made without gradients."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    known, hidden, unread, off = (graph.call_method("sin", (x,)) for _ in range(4))
    detached = graph.call_method("detach", (graph.call_method("neg", (hidden,)),))
    graph.call_method("neg", (unread,))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    without = graph.call_method("neg", (off,))
    graph.call_function(torch._C._set_grad_enabled, (True,))
    graph.output((known, detached, without))
    assert trained(graph, {}) - {x} == {known}
