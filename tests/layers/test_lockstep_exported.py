"""Siblings share a run of the wide layer while `torch.export` runs their Python."""

import copy
import gc

import pytest
import torch
from calling import INPUT_CHANGES, SAME_INPUT, SCRIPTS, Calls, between
from equivalence import assert_close, gradients
from families import EVERY_KIND, case, fused, merge
from torch import nn
from torch.export import Dim, ExportedProgram, export, unflatten
from torch.utils import _pytree as pytree

import conjoin
from conjoin.layers import lockstep

CHANGES = {f"input changed, {name}": between(change) for name, change in INPUT_CHANGES.items()}
EVERY_SCRIPT = {**SCRIPTS, **CHANGES}

PRODUCTS = "aten.linear", "aten.conv", "aten.embedding"


def products(program: ExportedProgram) -> int:
    """How many products or look-ups in tables a program has."""
    return sum(str(node.target).startswith(PRODUCTS) for node in program.graph.nodes)


def exported(model: nn.Module, *args: torch.Tensor, **options: object) -> ExportedProgram:
    return export(model, args, dynamic_shapes=[{0: Dim.DYNAMIC} for _ in args], **options)


def merged(plain: Calls) -> Calls:
    model = copy.deepcopy(plain)
    merge(model.layers, enclosing=model)
    return model


def assert_same(program: ExportedProgram, plain: nn.Module, *args: torch.Tensor) -> None:
    found, expected = (
        pytree.tree_leaves(model(*copy.deepcopy(args))) for model in (program.module(), plain)
    )
    assert_close(dict(enumerate(found)), dict(enumerate(expected)))


@pytest.fixture
def linear():
    return case(nn.Linear, 4, (3, 4)).family((4, 4, 4))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", EVERY_SCRIPT)
def test_every_way_to_call(linear, name):
    plain = Calls(linear, EVERY_SCRIPT[name])
    program = exported(merged(plain), torch.randn(3, 4, dtype=torch.float64))
    for rows in (3,) if name == "one chained" else (3, 5):
        assert_same(program, plain, torch.randn(rows, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", SAME_INPUT)
def test_one_product_for_all(linear, name):
    model = merged(Calls(linear, SCRIPTS[name]))
    program = exported(model, torch.randn(3, 4, dtype=torch.float64))
    assert products(program) == 1
    decomposed = program.run_decompositions()
    assert_same(decomposed, Calls(linear, SCRIPTS[name]), torch.randn(5, 4, dtype=torch.float64))
    assert list(program.state_dict) == ["layers.0.wide.weight", "layers.0.wide.bias"]


@pytest.mark.parametrize("kind", EVERY_KIND.values(), ids=EVERY_KIND)
def test_one_product_for_every_kind_and_its_gradients(kind):
    plain = kind.family((2, 3))
    model, x = fused(plain), kind.input()
    program = exported(model, x)
    assert products(program) == 1
    found = program.module()
    for run in (plain, found):
        sum(y.sin().sum() for y in run(x)).backward()
    for name, parameter in found.named_parameters():
        model.get_parameter(name).grad = parameter.grad
    assert_close(gradients(model), gradients(plain), "gradient of")


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_groups_are_not_bound_to_a_size(strict):
    plain = case(nn.Conv2d, 4, (2, 4, 5, 6), kernel_size=3, groups=2).family((4, 4))
    x, some = torch.randn(2, 4, 5, 6, dtype=torch.float64), Dim.DYNAMIC
    shapes = ({0: some, 2: some, 3: some},)
    program = export(fused(plain), (x,), dynamic_shapes=shapes, strict=strict)
    assert products(program) == (2 if strict else 1)
    for sizes in ((3, 4, 5, 6), (2, 4, 90, 90)):
        assert_same(program, plain, torch.randn(sizes, dtype=torch.float64))


class Grouped(nn.Module):
    """Siblings with groups, whose wide layer a rewritten forward calls."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 3, groups=2) for _ in range(3))

    def forward(self, x):
        x = self.stem(x).relu()
        return [layer(x).sin() for layer in self.layers]


def test_groups_in_rewritten_forwards():
    plain, x = Grouped().double(), torch.randn(2, 3, 5, 6, dtype=torch.float64)
    model = conjoin.optimize(plain, (x,))
    program = exported(model, x)
    assert products(program) == 2
    assert_same(program, plain, torch.randn(3, 3, 5, 6, dtype=torch.float64))


def test_dynamo_reads_views_as_ever(linear):
    x = torch.randn(3, 4, dtype=torch.float64)
    program = exported(fused(linear), x, strict=True)
    assert products(program) == 3
    assert_same(program, linear, torch.randn(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", ["in order", "one left out"])
def test_nothing_is_kept(linear, name):
    model = merged(Calls(linear, SCRIPTS[name]))
    before = {*lockstep._thread.runs}
    program = exported(model, torch.randn(3, 4, dtype=torch.float64))
    gc.collect()
    assert not lockstep._thread.exported
    assert {*lockstep._thread.runs} <= before
    assert_same(program, model, torch.randn(5, 4, dtype=torch.float64))


class Block(nn.Module):
    """Reads what all blocks read, behind an activation of its own."""

    def __init__(self):
        super().__init__()
        self.act, self.time, self.own = nn.SiLU(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, t):
        return self.own(x) + self.time(self.act(t)) if x.mean().ndim == 0 else x


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = Block(), Block(), Block()

    def forward(self, x, t):
        t = t * 2
        return self.three(self.two(self.one(x, t), t), t)


@pytest.fixture
def blocks():
    return Blocks().double(), torch.randn(3, 4).double(), torch.randn(3, 4).double()


def test_siblings_behind_equal_activations(blocks):
    plain, *inputs = blocks
    model = conjoin.optimize(plain, tuple(inputs), policy="always")
    program = exported(model, *inputs)
    assert products(program) == 4
    assert_same(program, plain, *(torch.randn(5, 4).double() for _ in inputs))


@pytest.mark.parametrize(
    ("preserved", "number"),
    [((), 4), (("two",), 6), (("two.time", "three"), 6)],
    ids=str,
)
def test_calls_that_are_to_stay_calls_take_no_part(blocks, preserved, number):
    plain, *inputs = blocks
    model = copy.deepcopy(plain)
    merge([model.one.time, model.two.time, model.three.time], enclosing=model)
    for block in (model.one, model.two, model.three):
        block.act = nn.Identity()
    apart = copy.deepcopy(plain)
    for block in (apart.one, apart.two, apart.three):
        block.act = nn.Identity()
    program = exported(model, *inputs, preserve_module_call_signature=preserved)
    assert products(program) == number
    for found in (program, conjoin.optimize(program)):
        assert_same(found, apart, *inputs)
        outputs = unflatten(found)(*inputs)
        assert_close({"": outputs}, {"": apart(*inputs)})


def test_modules_that_have_another_name_too(linear):
    """PyTorch lets others stand in for all modules then."""
    plain = Calls(linear, SCRIPTS["in order"])
    model = merged(plain)
    model.again = model.layers[0].again = nn.Identity()
    program = exported(model, torch.randn(3, 4, dtype=torch.float64))
    assert products(program) == 1
    assert_same(program, plain, torch.randn(5, 4, dtype=torch.float64))


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("part", ["layers.1", "some"])
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "ConvTranspose1d", "Embedding"])
def test_a_part_of_the_model_that_holds_some_siblings(name, part, strict):
    kind = EVERY_KIND[name]
    plain, x = kind.family((2, 3, 2)), kind.input()
    plain.some = nn.Sequential(plain.layers[1])
    model = fused(plain)
    program = export(model.get_submodule(part), (x,), strict=strict)
    assert_same(program, plain.get_submodule(part), x)
    made = {
        tuple(n.meta["val"].shape)
        for n in program.graph.nodes
        if str(n.target).startswith(PRODUCTS)
    }
    assert made == {tuple(plain.layers[1](x).shape)}  # Nothing of the others is computed.
    for each in (conjoin.optimize(program), program.run_decompositions()):
        assert_same(each, plain.get_submodule(part), x)


class Branches(nn.Module):
    """Branches with norms, and a number among the arguments."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
            for _ in range(3)
        )

    def forward(self, x, scale=1.0):
        return self.one(x).sin(), self.two(x).cos() * scale, self.three(x).exp()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("given", [{}, {"scale": 3.0}], ids=["default", "given"])
def test_rewritten_forwards(given, training):
    plain = Branches().double().train(training)
    x = torch.randn(3, 4, dtype=torch.float64)
    model = conjoin.optimize(plain, (x,), example_kwargs=given, policy="always")
    program = export(
        model, (x,), given, dynamic_shapes={"x": {0: Dim.DYNAMIC}, **dict.fromkeys(given)}
    )
    called = [str(node.target) for node in program.graph.nodes]
    products = [t for t in called if t.startswith(("aten.linear", "aten.baddbmm", "aten.bmm"))]
    assert len(products) == 2
    assert called.count("aten.batch_norm.default") == (3 if training else 1)
    rows = torch.randn(5, 4, dtype=torch.float64)
    found = copy.deepcopy(program).module()(rows, **given)
    assert_close(dict(enumerate(found)), dict(enumerate(copy.deepcopy(plain)(rows, **given))))


class Experts(nn.Module):
    """Equal branches, whose second layers run as one product of a stack."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))
        self.second = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x):
        each = zip(self.first, self.second, strict=True)
        return [second(first(x).relu()) for first, second in each]


@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
def test_stacks_are_not_bound_to_a_batch(strict):
    plain, x = Experts().double(), torch.randn(3, 4, dtype=torch.float64)
    model = conjoin.optimize(plain, (x,), policy="always")
    batch = Dim("batch", min=1, max=64)
    program = export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert len(program.state_dict) == 4
    for rows in (1, 5, 64):
        assert_same(program, plain, torch.randn(rows, 4, dtype=torch.float64))


def test_norms_whose_buffers_are_not_the_wide_layers():
    plain = Branches().double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    model = conjoin.optimize(plain, (x,), policy="always")
    for each in (plain, model):
        each.two[1].running_mean = torch.arange(4.0).double()
        each.three[1].running_var.data = torch.arange(1.0, 5.0).double()
    assert_same(export(model, (x,)), plain, x)
    for each in (plain, model):
        each.two[1].train()
    assert_same(export(model, (x,)), copy.deepcopy(plain), x)


class Choice(nn.Module):
    """Calls a sibling in a branch that is a graph of its own."""

    def __init__(self, family):
        super().__init__()
        self.layers = family.layers

    def forward(self, x):
        x = x * 2
        a, b, c = self.layers
        first = a(x)
        chosen = torch.cond(x.sum() > 0, lambda x: b(x).sin(), lambda x: c(x).cos(), (x,))
        return first, chosen, b(x)


def test_a_branch_has_a_graph_of_its_own(linear):
    plain = Choice(linear)
    model = copy.deepcopy(plain)
    merge(model.layers, enclosing=model)
    x = torch.randn(3, 4, dtype=torch.float64)
    program = export(model, (x,))
    for sign in (1, -1):
        assert_same(program, plain, x.abs() * sign)
