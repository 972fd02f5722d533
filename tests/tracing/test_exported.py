"""An exported program's layers are found again, and compute what they did."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import conjoin
from conjoin.tracing.exported import lift


class Zoo(nn.Module):
    """Siblings of every kind, with settings that an export writes in different ways."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 4), nn.Linear(8, 6)
        self.norm = nn.BatchNorm1d(2)
        self.convs = nn.ModuleList(nn.Conv1d(2, n, 3, padding="same") for n in (3, 4))
        self.planes = nn.ModuleList(
            nn.Conv2d(2, n, 3, stride=(1, 2), dilation=1, padding=1, bias=False) for n in (3, 3)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(2, n, 3, stride=2, output_padding=1) for n in (3, 1)
        )
        self.tables = nn.ModuleList(nn.Embedding(5, n, padding_idx=1) for n in (3, 4))

    def forward(self, x, rows):
        y = self.norm(x.view(-1, 2, 4))
        branches = [conv(y) for conv in (*self.convs, *self.up)]
        z = y.unsqueeze(-1)
        planes = [conv(z) for conv in self.planes]
        return self.q(x), self.k(x), branches, planes, [table(rows) for table in self.tables]


class Functional(nn.Module):
    """Weights that belong to no layer, and a layer that is called in two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.layer = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        y = nn.functional.linear(x, self.weight) + nn.functional.linear(x, self.weight * 2)
        return y, self.layer(x), nn.functional.linear(x, self.layer.weight)


def exported(model, inputs):
    return torch.export.export(model, inputs).module(check_guards=False)


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Zoo(), (torch.randn(3, 8, dtype=torch.float64), torch.tensor([0, 1, 4]))),
        (Functional(), (torch.randn(3, 8, dtype=torch.float64),)),
    ],
    ids=["layers", "functional"],
)
def test_the_same_function(model, inputs):
    model = copy.deepcopy(model).double().eval()
    expected = pytree.tree_leaves(model(*inputs))
    found = pytree.tree_leaves(lift(exported(model, inputs))(*inputs))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_layers_stand_at_their_names():
    model = Zoo()
    lifted = lift(exported(model, (torch.randn(3, 8), torch.tensor([0, 1, 4]))))
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd)):
            assert repr(lifted.get_submodule(name)) == repr(layer)
            for key, tensor in layer.state_dict().items():
                assert torch.equal(lifted.get_submodule(name).state_dict()[key], tensor)


@pytest.mark.parametrize("observed", [True, False])
def test_its_report_is_the_model_s(observed):
    model, inputs = Zoo(), (torch.randn(3, 8), torch.tensor([0, 1, 4]))
    lifted = lift(exported(model, inputs))
    expected = conjoin.report(model, inputs if observed else None)
    found = conjoin.report(lifted, inputs if observed else None)
    assert [(g.kind, set(g.layers), g.fused) for g in found.groups] == [
        (g.kind, set(g.layers), g.fused) for g in expected.groups
    ]
    assert len(found.groups) == 5
    assert found.launches == expected.launches


def test_what_is_no_layer_stays_an_operation():
    lifted = lift(exported(Functional(), (torch.randn(3, 8),)))
    calls = [node.target for node in lifted.graph.nodes if node.op == "call_module"]
    assert calls == ["layer"]


class Norms(nn.Module):
    """Normalizations and other layers that follow wide layers, one of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.batch = nn.ModuleList((nn.BatchNorm2d(4, momentum=0.3), nn.BatchNorm1d(4)))
        self.instance = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.image = nn.InstanceNorm1d(4, affine=True)
        self.group, self.slope = nn.GroupNorm(2, 4, eps=1e-3), nn.PReLU()
        self.layer, self.root = nn.LayerNorm(6, bias=False), nn.RMSNorm((3, 6))

    def forward(self, x):
        flat = self.image(self.batch[1](x.flatten(2)))
        y = self.instance(self.batch[0](x)) + self.group(self.slope(x))
        return flat, self.layer(y), self.root(y), nn.functional.layer_norm(y, (6,))


@pytest.mark.parametrize("training", [True, False])
def test_normalizations_are_layers_again(training):
    model = Norms().double().train(training)
    x = torch.randn(3, 4, 3, 6, dtype=torch.float64)
    lifted = lift(exported(copy.deepcopy(model), (x,)))
    for name, layer in model.named_modules():
        if layer._parameters:
            found = lifted.get_submodule(name)
            assert repr(found) == repr(layer)
            assert found.training is training or layer._buffers.get("running_var") is None
    calls = [node for node in lifted.graph.nodes if node.op == "call_module"]
    assert len(calls) == 8
    assert not any(str(node.target).startswith("aten.add_") for node in lifted.graph.nodes)
    for a, b in zip(lifted(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(lifted.state_dict()[name], tensor)


class Counted(nn.Module):
    """A BatchNorm whose count is read, and one of a cumulative average."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.average = nn.BatchNorm1d(4), nn.BatchNorm1d(4, momentum=None)
        self.twice = nn.BatchNorm1d(4)

    def forward(self, x):
        y = self.read(x) * self.read.num_batches_tracked
        return self.twice(self.twice(y + x))


def test_a_count_that_is_read_stays_an_operation():
    model = Counted().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    lifted = lift(exported(copy.deepcopy(model), (x,)))
    calls = [node.target for node in lifted.graph.nodes if node.op == "call_module"]
    assert calls == ["twice", "twice"]
    torch.testing.assert_close(lifted(x), model(x), rtol=0, atol=0)
    assert lifted.state_dict()["twice.num_batches_tracked"] == 2


class Functions(nn.Module):
    """Functions that the passes know by the names of `torch`."""

    def forward(self, x):
        a, b = torch.cat([x, x * 2], 1).chunk(2, 1)
        c, d = torch.split(torch.stack([a, b], 1), [1, 1], 1)
        pooled = nn.functional.max_pool2d(a - b, 2) / 3
        padded = nn.functional.pad(-nn.functional.avg_pool2d(b, 2), (1, 1))
        normed = nn.functional.layer_norm(torch.matmul(a, b.mT), (6,))
        return c.squeeze(1).softmax(-1), d, pooled, padded, nn.functional.rms_norm(normed, (6,))


def test_functions_have_the_names_that_the_passes_know():
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    lifted = lift(exported(Functions(), (x,)))
    targets = {node.target for node in lifted.graph.nodes if node.op == "call_function"}
    left = {str(target) for target in targets if isinstance(target, torch._ops.OpOverload)}
    assert left == {"aten.squeeze.dim"}
    for a, b in zip(lifted(x), Functions()(x), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Beside(nn.Module):
    """A Linear written out, which holds another tensor that is no buffer."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 4))
        self.offset = torch.randn(width)

    def forward(self, x):
        return nn.functional.linear(x, self.weight) + self.offset


def test_a_layer_keeps_what_its_module_holds_beside():
    model, x = nn.ModuleList([Beside(3), Beside(2)]).double(), torch.randn(2, 4).double()
    model.forward = lambda x: [each(x) for each in model]
    program = torch.export.export(model, (x,))
    lifted = lift(program.module())
    lifted.graph.lint()
    torch.testing.assert_close(lifted(x), [*model.forward(x)])
    merged = {(group.layers, group.fused) for group in conjoin.report(program).groups}
    assert merged == {(("0", "1"), True)}


class Composed(nn.Module):
    """What is several operations in a decomposed graph."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.act, self.table = nn.MaxPool2d(2), nn.SiLU(), nn.Embedding(5, 4)

    def forward(self, x):
        table = self.table.weight.narrow(0, 1, 3)
        rows = torch.arange(3, device=x.device)
        looked_up = nn.functional.embedding(rows, table)
        return self.act(self.pool(x)).softmax(1), looked_up, x.flatten(1) @ (table * 2).reshape(-1)


class Halves(nn.Module):
    """What looks like it, and is read in the middle or rounds in another way."""

    def forward(self, x):
        values, places = nn.functional.max_pool2d(x, 2, return_indices=True)
        gate, half = x.sigmoid(), x.bfloat16()
        return values, places, x * gate, gate, half * half.sigmoid()


FUNCTIONS = {F.max_pool2d, F.silu, F.embedding, torch.softmax}


@pytest.mark.parametrize(
    ("model", "known"),
    [(Composed(), FUNCTIONS), (Halves(), set())],
    ids=["composed", "halves"],
)
def test_what_was_decomposed_has_a_name_again(model, known):
    model, x = model.double(), torch.randn(2, 1, 2, 6, dtype=torch.float64)
    program = torch.export.export(model, (x,)).run_decompositions()
    lifted = lift(program.module(check_guards=False))
    assert {node.target for node in lifted.graph.nodes} & FUNCTIONS == known
    for a, b in zip(lifted(x), model(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
