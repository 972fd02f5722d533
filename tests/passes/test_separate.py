"""What the other passes made one is several again: the same calls, the same bits."""

import copy

import pytest
import torch
from equivalence import assert_same_state, assert_same_step, step
from torch import fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

from conjoin.layers.fusing import fuse
from conjoin.layers.linear import Linear
from conjoin.layers.view import View, views, wides
from conjoin.passes import PIPELINE, Separate, rewrite


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.q(x), self.k(x).transpose(0, 1), torch.sigmoid(self.v(x))


def unit(inputs, outputs, kernel):
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Three branches go on alike, then two of them, and one is alone."""

    def __init__(self):
        super().__init__()
        self.one = unit(4, 3, 1)
        self.two = nn.Sequential(unit(4, 2, 1), unit(2, 3, 3))
        self.three = nn.Sequential(unit(4, 2, 1), unit(2, 3, 3))
        self.pool = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x):
        pooled = F.max_pool2d(self.pool(x), 3, 1, 1)
        return torch.cat([self.one(x), self.two(x), self.three(x), pooled], 1)


class Critics(nn.Module):
    def __init__(self):
        super().__init__()
        self.q1, self.q2 = (
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 1))
            for _ in range(2)
        )

    def forward(self, state, action):
        both = torch.cat([state, action], -1)
        return self.q1(both), self.q2(both)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 1))
            for _ in range(3)
        )

    def forward(self, x):
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        gates = [torch.softmax(gate(x), -1) for gate in self.gates]
        mixed = [(gate.unsqueeze(-1) * experts).sum(1) for gate in gates]
        return [tower(each) for tower, each in zip(self.towers, mixed, strict=True)]


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(6, 5)
        self.mean, self.log_var = nn.Linear(5, 2), nn.Linear(5, 2)
        self.decoder = nn.Linear(2, 6)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        mean, log_var = self.mean(x), self.log_var(x)
        return self.decoder(mean + torch.exp(0.5 * log_var)), mean, log_var


class Joined(nn.Module):
    """The wide tensor is read by others: a joint of the parts that was taken out."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)
        self.after = nn.Linear(8, 3)
        self.p, self.q = nn.Linear(8, 2), nn.Linear(8, 3)

    def forward(self, x):
        joint = torch.cat([torch.tanh(self.a(x)), torch.tanh(self.b(x))], -1)
        return self.after(joint), self.p(joint), self.q(joint)


class Tables(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(7, 3), nn.Embedding(7, 3)

    def forward(self, x):
        return torch.stack([self.a(x), self.b(x)], 1), x + 1


class GroupNorms(nn.Module):
    """Normalizations that read stacked towers side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 4), nn.GroupNorm(2, 4))
            for _ in range(2)
        )

    def forward(self, x):
        return self.a(x) * self.b(x)


class LastNorms(nn.Module):
    """Normalizations of the last dimension, with weights and without, beside and stacked."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6, 4),
                nn.LayerNorm(4),
                nn.PReLU(),
                nn.Linear(4, 4),
                nn.RMSNorm(4),
                nn.PReLU(4),
                nn.Linear(4, 4),
                nn.PReLU(),
            )
            for _ in range(3)
        )

    def forward(self, x):
        a, b, c = (F.layer_norm(self.branches[i](x), (4,)) for i in range(3))
        return a.sin() * b * F.rms_norm(c, (4,)).cos()


class Styles(nn.Module):
    """Normalizations of images, in branches of different widths."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(4, width, 3),
                nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
                nn.PReLU(),
                nn.MaxPool2d(2),
                nn.InstanceNorm2d(width, affine=True),
                nn.PReLU(width),
            )
            for width in (3, 2, 3)
        )

    def forward(self, x):
        return torch.cat([self.branches[2](x), self.branches[0](x), self.branches[1](x)], 1)


def flat():
    return (torch.randn(5, 6, dtype=torch.float64),)


CASES = {
    Attention: lambda: (torch.randn(5, 3, 8, dtype=torch.float64),),
    Inception: lambda: (torch.randn(3, 4, 5, 5, dtype=torch.float64),),
    Critics: lambda: (
        torch.randn(5, 4, dtype=torch.float64),
        torch.randn(5, 2, dtype=torch.float64),
    ),
    Experts: flat,
    Autoencoder: flat,
    Joined: flat,
    Tables: lambda: (torch.randint(7, (5,)),),
    GroupNorms: flat,
    LastNorms: flat,
    Styles: lambda: (torch.randn(3, 4, 8, 8, dtype=torch.float64),),
}

models = pytest.mark.parametrize("model", CASES, ids=lambda model: model.__name__)
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def calls(graph):
    """How often each module is called, and each operation done."""
    return sorted(
        str(node.target)
        if node.op in ("call_module", "call_method")
        else getattr(node.target, "__name__", str(node.target))
        for node in graph.nodes
        if node.op.startswith("call")
    )


def separated(model):
    graph_module = fx.symbolic_trace(model)
    assert rewrite(graph_module)
    result = Separate()(graph_module)
    assert result.modified
    assert result.graph_module is graph_module
    graph_module.graph.lint()
    return graph_module


@models
@MODES
def test_as_it_was(model, training):
    torch.manual_seed(0)
    plain = model().double().train(training)
    expected = fx.symbolic_trace(copy.deepcopy(plain))
    found = separated(copy.deepcopy(plain))
    assert calls(found.graph) == calls(expected.graph)
    assert not list(views(found))
    assert [type(m) for m in found.modules()][1:] == [type(m) for m in expected.modules()][1:]
    assert_same_state(found, expected)
    names = [name for name, _ in found.named_parameters()]
    assert names == [name for name, _ in expected.named_parameters()]
    args = CASES[model]()
    assert_same_step(step(found, args, training=training), step(expected, args, training=training))


@models
def test_the_values_of_now(model):
    """Trained while it was wide, it has the trained values afterwards."""
    torch.manual_seed(0)
    plain = model().double()
    graph_module = fx.symbolic_trace(copy.deepcopy(plain))
    rewrite(graph_module)
    args = CASES[model]()
    optimizer = torch.optim.SGD(graph_module.parameters(), lr=0.1)
    step(graph_module, args)
    optimizer.step()
    state = copy.deepcopy(graph_module.state_dict())
    wide = step(copy.deepcopy(graph_module), args, training=False)
    Separate()(graph_module)
    expected = fx.symbolic_trace(plain)
    expected.load_state_dict(state)
    assert_same_state(graph_module, expected)
    assert_same_step(step(graph_module, args, training=False), wide)


@models
def test_a_second_run_changes_nothing(model):
    found = separated(model().double())
    code = found.code
    assert not Separate()(found).modified
    assert found.code == code


@models
def test_there_and_back_and_there(model):
    """What was taken apart can be merged again."""
    model_ = model().double()
    first = fx.symbolic_trace(copy.deepcopy(model_))
    rewrite(first)
    again = separated(copy.deepcopy(model_))
    assert rewrite(again)
    assert calls(again.graph) == calls(first.graph)


@models
def test_in_a_pass_manager(model):
    plain = model().double()
    graph_module = fx.symbolic_trace(copy.deepcopy(plain))
    result = PassManager(passes=[*PIPELINE, Separate()])(graph_module)
    assert result.modified
    assert not wides(result.graph_module)
    args = CASES[model]()
    assert_same_step(step(result.graph_module, args), step(plain, args))


def test_nothing_to_do():
    graph_module = fx.symbolic_trace(Critics())
    code = graph_module.code
    assert not Separate()(graph_module).modified
    assert graph_module.code == code


def test_a_sibling_that_is_not_there():
    """Half of a wide layer stays half of a wide layer."""
    model = Critics()
    fuse(Linear(), [model.q1[0], model.q2[0]], model)
    graph_module = fx.symbolic_trace(model.q1)
    assert not Separate()(graph_module).modified
    assert isinstance(graph_module.get_submodule("0"), View)


def test_a_wide_layer_on_something_unknown():
    """It is left as it is, and so is what it makes; the others are taken apart."""
    model = Critics().double()
    graph_module = fx.symbolic_trace(copy.deepcopy(model))
    rewrite(graph_module)
    apart = [n for n in graph_module.graph.nodes if "apart" in n.kwargs]
    with graph_module.graph.inserting_before(apart[-1]):
        copied = graph_module.graph.call_method("clone", (apart[-1].args[0],))
    apart[-1].replace_input_with(apart[-1].args[0], copied)
    graph_module.recompile()
    assert Separate()(graph_module).modified
    assert {name for name, _ in views(graph_module)} == {"q1.4", "q2.4"}
    args = CASES[Critics]()
    assert_same_step(step(graph_module, args), step(model, args))


def change_the_joint(joint):
    joint.select(-1, 0).fill_(1)
    return joint


def change_an_alias(joint):
    joint.neg_().select(-1, 0).fill_(1)
    return joint


def change_a_view(joint):
    joint.unflatten(-1, (2, -1)).select(-1, 0).fill_(1)
    return joint


@pytest.mark.parametrize("change", [change_the_joint, change_an_alias, change_a_view])
def test_what_is_changed_in_place(change):
    """A joint that somebody changes stays changed for who reads it later."""

    class Changed(Joined):
        def forward(self, x):
            joint = change(torch.cat([self.a(x), self.b(x)], -1))
            return self.after(joint), torch.tanh(joint)

    plain = Changed().double()
    found = separated(copy.deepcopy(plain))
    args = flat()
    assert_same_step(step(found, args), step(fx.symbolic_trace(plain), args))


def test_a_joint_that_is_first_read_without_gradients():
    """What reads it later has gradients."""

    class Watched(Joined):
        def forward(self, x):
            joint = torch.cat([self.a(x), self.b(x)], -1)
            return joint.sum(0), joint.cumsum(0)

    graph_module = fx.symbolic_trace(Watched().double())
    assert rewrite(graph_module)
    (first,) = (node for node in graph_module.graph.nodes if node.target == "sum")
    with graph_module.graph.inserting_before(first):
        graph_module.graph.call_function(torch._C._set_grad_enabled, (False,))
    with graph_module.graph.inserting_after(first):
        graph_module.graph.call_function(torch._C._set_grad_enabled, (True,))
    graph_module.recompile()
    Separate()(graph_module)
    assert not list(views(graph_module))
    assert [out.requires_grad for out in graph_module(*flat())] == [False, True]


def test_each_branch_has_its_own_activation():
    found = separated(Inception())
    called = [str(node.target) for node in found.graph.nodes if node.op == "call_module"]
    assert len(called) == len(set(called))
    assert {"one.2", "two.0.2", "three.0.2", "two.1.2", "three.1.2"} <= {*called}


def test_it_is_in_no_pipeline():
    assert not any(isinstance(run, Separate) for run in PIPELINE)


@pytest.mark.parametrize("training", [True, False])
def test_normalizations_without_weights(training):
    """They are functions of all parts at once, and then of each."""

    class Unweighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.images = nn.ModuleList(
                nn.Sequential(nn.Conv2d(4, width, 3), nn.InstanceNorm2d(width), nn.ReLU())
                for width in (3, 2)
            )
            self.rows = nn.ModuleList(
                nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4, elementwise_affine=False))
                for _ in range(3)
            )

        def forward(self, x):
            images = [branch(x).sum((-1, -2)) for branch in self.images]
            x = x[..., 0]
            return images, [branch(x).sin() * 2 for branch in self.rows]

    plain = Unweighted().double().train(training)
    found = separated(copy.deepcopy(plain))
    assert not list(views(found))
    called = calls(found.graph)
    assert called.count("instance_norm_of_images") == 2
    assert called.count("layer_norm") == 3
    args = (torch.randn(2, 4, 6, 6, dtype=torch.float64),)
    assert_same_step(step(found, args), step(fx.symbolic_trace(plain), args))
