"""Exported programs: as few products as in the rewritten model, the same function, and back."""

import copy
import random
import shutil
from collections.abc import Callable

import pytest
import torch
from counting import count
from depth import MODELS
from programs_alike import (
    Unmoded,
    assert_close,
    assert_same,
    assert_to_and_fro,
    exported,
    file_of,
)
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from zoo import ZOO

import conjoin
from conjoin.legality import Reason
from conjoin.programs import fakes

BATCHES = 4, 7
"""The batch that a program is exported with, and another one."""


DEEP = [
    *("concurrent", "retinanet_norm", "by_hand", "mmoe_parameters", "twins_td3", "head_norms"),
]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", DEEP)
def test_as_few_products_and_the_same_function(name: str, training: bool) -> None:
    model = MODELS[name].model().train(training)
    inputs = [MODELS[name].call(batch) for batch in BATCHES]
    program = exported(model, *inputs[0])
    before = str(program)
    fused = conjoin.optimize(program)
    assert str(program) == before
    products = count(conjoin.optimize(model, inputs[0]), inputs[0], training=training).products
    assert count(Unmoded(fused), inputs[0]).products <= products
    assert_to_and_fro(program, fused, inputs)


DECOMPOSED = {
    "concurrent": (6, 3),
    "retinanet_norm": (12, 8),
    "by_hand": (3, 3),
    "mmoe_dict": (20, 7),
    "two_branches": (6, 4),
    "yolox": (16, 10),
    "twins_td3": (6, 3),
    "head_norms": (9, 6),
}
"""Models, and the products of their decomposed programs before and after, in evaluation mode."""


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", DECOMPOSED)
def test_decomposed_programs_stay_decomposed(name: str, training: bool) -> None:
    model = MODELS[name].model().train(training)
    inputs = [MODELS[name].call(batch) for batch in BATCHES]
    program = exported(model, *inputs[0]).run_decompositions()
    fused = conjoin.optimize(program)
    assert fakes.is_decomposed(program.graph)
    assert fakes.is_decomposed(fused.graph)
    before, after = (count(Unmoded(each), inputs[0]).products for each in (program, fused))
    if not training:  # In training BatchNorms give their buffers anew, and stay as they are.
        assert (before, after) == DECOMPOSED[name]
    assert after <= before
    assert_to_and_fro(program, fused, inputs)


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["bert", "llama", "unet_conditioned", "bn_inception", "swin"])
def test_public_models(name: str) -> None:
    model = ZOO[name].model().eval()
    args, kwargs = ZOO[name].call()
    program = export(model, args, kwargs)
    fused = conjoin.optimize(program)
    products = count(conjoin.optimize(model, args, example_kwargs=kwargs), args, kwargs).products
    found = count(_Keywords(fused), args, kwargs).products
    assert found <= products < count(model, args, kwargs).products
    assert bool(conjoin.verify(program, file_of(fused)))
    assert_same(file_of(program), conjoin.unfuse(file_of(fused)))


OPTIMIZED = (
    *("bert", "llama", "unet_conditioned", "stable_diffusion3", "bn_inception", "rec_mmoe"),
    *("rec_ple", "critics", "agents_mixed", "table_sequential_attention"),
)
"""Models whose siblings run in a rewritten forward, in lockstep, or both."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", OPTIMIZED)
def test_public_models_that_were_optimized(name: str) -> None:
    pytest.importorskip(ZOO[name].package)
    model = ZOO[name].model().eval()
    args, kwargs = ZOO[name].call()
    fused = conjoin.optimize(copy.deepcopy(model), args, example_kwargs=kwargs)
    products = count(fused, args, kwargs).products
    assert products < count(model, args, kwargs).products
    program = export(fused, args, kwargs)
    for each in (program, conjoin.optimize(program)):
        keywords = _Keywords(each)
        assert count(keywords, args, kwargs).products <= products
        found, expected = (pytree.tree_leaves(m(*args, **kwargs)) for m in (keywords, model))
        assert_close(found, expected)


class _Keywords(Unmoded):
    def forward(self, *args: object, **kwargs: object) -> object:
        return self.run[0](*args, **kwargs)


class Heads(nn.Module):
    """Two heads, two branches with norms, and what a program can hold beside that."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.body = nn.ModuleDict({name: nn.Linear(8, 6) for name in "ab"})
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(2))
        self.tied, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.tied.weight = self.stem.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scale", torch.full((6,), 2.0), persistent=False)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        self.calls.add_(1)
        h = self.stem(x).relu()
        a, b = (n(self.body[k](h)).relu() for n, k in zip(self.norms, "ab", strict=True))
        constant = torch.tensor([1.0, 2.0], dtype=x.dtype).sum()
        return {
            "sum": a * self.scale + constant,
            "b": b.exp(),
            "tied": self.tied(h) + self.other(h),
        }


@pytest.fixture
def heads() -> ExportedProgram:
    torch.manual_seed(0)
    return exported(Heads().double(), torch.randn(4, 8, dtype=torch.float64))


def test_wide_parameters_stand_in_the_place_of_the_first_sibling(heads: ExportedProgram) -> None:
    fused = conjoin.optimize(heads)
    gone = {"norms.0.weight", "norms.1.weight", "norms.0.running_mean", "norms.1.running_mean"}
    assert gone <= {*heads.state_dict}
    assert gone.isdisjoint(fused.state_dict)
    specs = {spec.target for spec in fused.graph_signature.input_specs if spec.target}
    assert specs <= {*fused.state_dict, *fused.constants}
    assert [n for n in fused.state_dict if "norms" in n] == [
        f"norms.0.wide.{name}"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    assert fused.state_dict["norms.0.wide.num_batches_tracked"].shape == (2,)
    assert fused.range_constraints == heads.range_constraints
    fused.validate()
    fused.graph.lint()


def test_what_else_a_program_holds_stays(heads: ExportedProgram) -> None:
    fused = conjoin.optimize(heads)
    assert fused.state_dict["tied.weight"] is fused.state_dict["stem.weight"]
    assert {*fused.constants} == {*heads.constants}
    assert {"stem.weight", "tied.weight"} <= {*fused.state_dict}  # What is tied is not merged.
    x = torch.randn(5, 8, dtype=torch.float64)
    module, plain = fused.module(), copy.deepcopy(heads).module()
    for _ in range(2):
        assert_close(module(x), plain(x))
    assert module.calls == 2
    assert module.get_buffer("norms.0.wide.num_batches_tracked").tolist() == [2, 2]
    # The tensors are the optimized program's own.
    assert heads.state_dict["calls"] == 0


def test_modules_with_two_names_are_merged_at_both() -> None:
    model = nn.Module()
    model.first = model.second = conjoin.nn.Parallel(nn.Linear(4, 2), nn.Linear(4, 3))
    model.forward = lambda x: [y.exp() for y in model.second(x)]
    program = exported(model, torch.randn(3, 4))
    assert len(program.state_dict) == 8
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) == 2
    plain = conjoin.unfuse(file_of(fused))
    assert_same(file_of(program), file_of(plain))
    names = sorted(plain.state_dict)
    for name in names[:4]:
        other = plain.state_dict[name.replace("first", "second")]
        assert plain.state_dict[name] is other


class SecondName(nn.Module):
    """A sibling that has another name, under which a program reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.q

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).sin() + self.k(x).cos()


@pytest.mark.parametrize("strict", [False, True])
def test_programs_of_modules_with_two_names_are_verified_from_files(strict: bool) -> None:
    program = file_of(exported(SecondName().double(), torch.randn(4, 8).double(), strict=strict))
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) < 4
    found = conjoin.verify(program, fused)
    assert found, found
    assert_same(program, conjoin.unfuse(fused))
    for name in program.graph_signature.parameters:
        other = copy.deepcopy(program)
        other.state_dict[name].data.add_(1)
        assert not conjoin.verify(other, fused)


def test_gradients_are_those_of_the_parts(heads: ExportedProgram) -> None:
    fused = conjoin.optimize(heads)
    result = conjoin.verify(heads, fused)
    assert bool(result)
    assert (result.gradients, result.buffers) == (13, 8)
    fused.state_dict["norms.0.wide.weight"].data[3] += 1e-3
    assert "different" in str(conjoin.verify(heads, fused))


def test_metadata_is_carried(heads: ExportedProgram) -> None:
    fused = conjoin.optimize(heads)
    names = {node.name for node in heads.graph.nodes}
    for node in fused.graph.nodes:
        if node.op == "call_function":
            assert "forward" in node.meta["stack_trace"]
            assert "val" in node.meta
            path = [path for path, _ in node.meta["nn_module_stack"].values()][-1]
            if node.name not in names and node.target is torch.ops.aten.batch_norm.default:
                assert path == ""  # The module that calls both.
    outputs = [spec.arg.name for spec in heads.graph_signature.output_specs]
    assert [spec.arg.name for spec in fused.graph_signature.output_specs] == outputs


def test_values_of_now_come_back(heads: ExportedProgram) -> None:
    fused = conjoin.optimize(heads)
    with torch.no_grad():
        for tensor in fused.state_dict.values():
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    plain = conjoin.unfuse(fused)
    assert torch.equal(plain.state_dict["norms.1.bias"], torch.arange(6.0, 12.0).double())
    assert plain.state_dict["norms.1.num_batches_tracked"] == 1
    x = torch.randn(4, 8, dtype=torch.float64)
    assert_close(plain.module()(x), fused.module()(x))


def test_optimizing_again_changes_nothing(heads: ExportedProgram) -> None:
    fused = conjoin.optimize(heads)
    again = conjoin.optimize(fused)
    assert str(again) == str(fused)
    assert_same(heads, conjoin.unfuse(again))
    assert_same(heads, conjoin.unfuse(heads))


def test_decomposed_programs(heads: ExportedProgram) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    fused = conjoin.optimize(heads).run_decompositions()
    assert_close(fused.module()(x), copy.deepcopy(heads).module()(x))
    with pytest.raises(ValueError, match="unfuse it before other passes"):
        conjoin.unfuse(fused)
    functional = heads.run_decompositions({})
    assert functional.graph_signature.buffers_to_mutate
    fused = conjoin.optimize(functional)
    assert_same(functional, conjoin.unfuse(fused))
    assert_close(fused.module()(x), functional.module()(x))


class Raw(nn.Module):
    """Products with raw Parameters, each with a sibling."""

    def __init__(self) -> None:
        super().__init__()
        for name, rows in zip("abcdef", (4, 5, 6, 3, 2, 8), strict=True):
            self.register_parameter(name, nn.Parameter(torch.randn(rows, 8)))
        self.bias, self.other = (nn.Parameter(torch.randn(n)) for n in (3, 2))
        self.square = nn.ParameterList(nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.kernels = nn.ParameterList(nn.Parameter(torch.randn(n, 1, 3)) for n in (2, 3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = x.sin()
        transposed = x @ self.a.t(), x @ self.b.T, x @ self.c.mT
        added = (
            torch.addmm(self.bias, y, self.d.transpose(0, 1)),
            torch.addmm(self.other, y, self.e.t()),
        )
        plain = [torch.mm(y, weight) for weight in self.square]
        convolved = [F.conv1d(y.unsqueeze(1), kernel, padding=1) for kernel in self.kernels]
        return [each.cos() for each in (*transposed, *added, *plain, *convolved)]


@pytest.mark.parametrize("decomposed", [False, True])
def test_raw_products(decomposed: bool) -> None:
    torch.manual_seed(0)
    inputs = [(torch.randn(n, 8, dtype=torch.float64),) for n in BATCHES]
    program = exported(Raw().double(), *inputs[0])
    program = program.run_decompositions() if decomposed else program
    fused = conjoin.optimize(program)
    assert [count(Unmoded(each), inputs[0]).products for each in (program, fused)] == [9, 4]
    assert sum(group.fused for group in conjoin.report(program).groups) == 4
    assert_to_and_fro(program, fused, inputs)


class ReadToo(nn.Module):
    """Weights of siblings that something else reads too, behind casts to the type that is there."""

    def __init__(self, use) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(8, 4)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(1, n, 3) for n in (2, 3))
        self.use = use

    def forward(self, x: torch.Tensor) -> object:
        y, z = self.a(x.to(x.dtype)).sin(), self.b(x).cos()
        ups = [up(x.unsqueeze(1)).exp() for up in self.ups]
        return y, z, ups, self.use(self)


READ_TOO = {
    "norms": (lambda m: [each.weight.norm(dim=1) for each in (m.a, m.b, *m.ups)], 2),
    "casts": (lambda m: m.a.weight.to(m.a.weight.dtype).sum() + m.ups[1].weight.flatten()[3:], 2),
    "given": (lambda m: m.a.weight, 3),
}
"""What is done with weights, and the products that are left of four."""


@pytest.mark.parametrize("name", READ_TOO)
@pytest.mark.parametrize("decomposed", [False, True])
def test_weights_may_be_read_too(name: str, decomposed: bool) -> None:
    use, products = READ_TOO[name]
    inputs = [(torch.randn(n, 8, dtype=torch.float64),) for n in BATCHES]
    program = exported(ReadToo(use).double(), *inputs[0])
    program = program.run_decompositions() if decomposed else program
    fused = conjoin.optimize(program)
    assert [count(Unmoded(each), inputs[0]).products for each in (program, fused)] == [4, products]
    assert_to_and_fro(program, fused, inputs)


def test_weights_that_a_program_changes_stay_apart() -> None:
    def double(model: ReadToo) -> torch.Tensor:
        with torch.no_grad():
            return model.b.weight.mul_(2).sum()

    x = torch.randn(4, 8, dtype=torch.float64)
    program = exported(ReadToo(double).double(), x)
    fused = conjoin.optimize(program)
    assert count(Unmoded(fused), (x,)).products == 3
    modules = [copy.deepcopy(each).module() for each in (program, fused)]
    for _ in range(2):
        ours, theirs = (pytree.tree_leaves(module(x)) for module in modules)
        assert_close(ours, theirs)


class NormOnOne(nn.Module):
    """Convolutions, behind one of which is a GroupNorm; decomposed it reads contiguous memory."""

    def __init__(self, *, affine: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1)
        self.norm = nn.GroupNorm(2, 4, affine=affine)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = x[..., None, None].expand(*x.shape, 3, 2)
        return self.norm(self.a(images)).sin(), self.b(images).cos()


@pytest.mark.parametrize("affine", [True, False])
def test_a_decomposed_norm_reads_contiguous_memory(affine: bool) -> None:
    inputs = [(torch.randn(n, 8, dtype=torch.float64),) for n in BATCHES]
    model = NormOnOne(affine=affine).double()
    program = exported(model, *inputs[0]).run_decompositions()
    fused = conjoin.optimize(program)
    assert count(Unmoded(fused), inputs[0]).products == 1
    assert_to_and_fro(program, fused, inputs)
    graph = make_fx(model)(*inputs[0])
    assert_close(conjoin.optimize(graph)(*inputs[0]), model(*inputs[0]))


class Block(nn.Module):
    """Siblings in a module."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).sin() + self.k(x)


class Blocks(nn.Module):
    """Siblings in modules, and beside them; and modules that go on alike."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.own = Block(), Block(), nn.Linear(8, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 4) for _ in range(2))
        self.ends = nn.ModuleList(nn.ReLU() for _ in range(2))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        y = self.first(x) * self.second(x) + self.own(x).cos()
        return [end(head(y)) * 2 for head, end in zip(self.heads, self.ends, strict=True)]


PRESERVED = {
    "none": ((), 2),
    "modules": (("first", "second"), 5),
    "a layer": (("first.q",), 4),
    "what goes on alike": (("ends.0", "ends.1"), 7),
    "a module that holds a head": (("heads.0",), 3),
}
"""Modules whose calls stay calls, and the products that are left of seven."""


@pytest.mark.parametrize("name", PRESERVED)
def test_calls_that_are_preserved_are_there_when_it_is_unflattened(name: str) -> None:
    preserve, products = PRESERVED[name]
    inputs = [(torch.randn(n, 8, dtype=torch.float64),) for n in BATCHES]
    program = exported(Blocks().double(), *inputs[0], preserve_module_call_signature=preserve)
    fused = conjoin.optimize(program)
    assert [count(Unmoded(each), inputs[0]).products for each in (program, fused)] == [7, products]
    assert_to_and_fro(program, fused, inputs)
    flat, wide = (torch.export.unflatten(each) for each in (program, fused))
    for args in inputs:
        assert_close(wide(*args), flat(*args))
    for path in preserve:
        assert type(wide.get_submodule(path)) is type(flat.get_submodule(path))


class Printing(nn.Module):
    """Siblings, and an operation with an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x).sin() * self.b(x)
        torch.ops.aten._print("so far")
        return y + 1


@pytest.mark.parametrize("decomposed", [False, True])
def test_effects_stay(decomposed: bool, capfd: pytest.CaptureFixture[str]) -> None:
    inputs = [(torch.randn(n, 8, dtype=torch.float64),) for n in BATCHES]
    program = exported(Printing().double(), *inputs[0])
    program = program.run_decompositions() if decomposed else program
    fused = conjoin.optimize(program)
    kinds = [[s.kind for s in each.graph_signature.output_specs] for each in (program, fused)]
    assert kinds[0] == kinds[1]
    assert [count(Unmoded(each), inputs[0]).products for each in (program, fused)] == [2, 1]
    capfd.readouterr()
    fused.module()(*inputs[0])
    assert capfd.readouterr().out.count("so far") == 1
    assert_to_and_fro(program, fused, inputs)


class Branching(nn.Module):
    """Siblings in front of and behind a branch on a value, and a size that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(5))

    def forward(self, x: torch.Tensor) -> object:
        a, b = self.layers[0](x), self.layers[1](x)
        with torch.no_grad():
            c = a.sin() + 1
        y = torch.cond(x.sum() > 0, lambda p: p.sin(), lambda p: p.cos() * 2, (b * a + c,))
        rows = y[y[:, 0] > -2]
        return self.layers[2](rows).relu().exp(), self.layers[3](rows).relu(), self.layers[4](y)


def test_higher_order_operations_and_sizes_of_values() -> None:
    x = torch.randn(6, 4, dtype=torch.float64)
    program = exported(Branching().double(), x)
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) < len(program.state_dict)
    for args in (x, -x[:3]):
        assert_close(fused.module()(args), program.module()(args))
    assert_same(program, conjoin.unfuse(fused))
    assert_same(file_of(program), file_of(conjoin.unfuse(file_of(fused))))


class Quiet(nn.Module):
    """Siblings with a graph of its own between them, which runs without gradients."""

    def __init__(self, *, changes: bool) -> None:
        super().__init__()
        self.a, self.b, self.changes = nn.Linear(4, 4), nn.Linear(4, 4), changes

    def forward(self, x: torch.Tensor) -> object:
        y = x * 1
        a = self.a(y)
        with torch.no_grad():
            c = y.mul_(2) if self.changes else y.sin()
        return (self.b(y) + c + a).exp()


@pytest.mark.parametrize("changes", [True, False])
def test_graphs_in_another_mode_are_looked_into(changes: bool) -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    program = exported(Quiet(changes=changes).double(), x)
    assert any("set_grad_enabled" in str(node.target) for node in program.graph.nodes)
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) == (4 if changes else 2)
    assert_close(fused.module()(x), program.module()(x))


class Mutating(nn.Module):
    """Changes its input between siblings, and gives a part out that is viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> object:
        a, c = self.a(x), self.c(x)
        x.mul_(2)
        return self.b(x), a.view(-1), c.add_(1)


def test_mutations_keep_siblings_apart() -> None:
    x = torch.randn(5, 4, dtype=torch.float64)
    program = exported(Mutating().double(), x)
    fused = conjoin.optimize(program)
    assert "b.weight" in fused.state_dict
    assert "a.wide.weight" in fused.state_dict
    mine, theirs = x.clone(), x.clone()
    assert_close(fused.module()(mine), program.module()(theirs))
    assert torch.equal(mine, theirs)


class OfPicky(type(conjoin.KINDS[0])):
    """Linear, whose wide form asks for the size of the batch."""

    layer = nn.Linear

    def run(self, wide: object, input: torch.Tensor) -> torch.Tensor:
        return super().run(wide, input) if input.shape[0] > 5 else super().run(wide, input * 1)


def test_what_depends_on_an_open_size_stays_apart() -> None:
    model = conjoin.nn.Parallel(nn.Linear(8, 2), nn.Linear(8, 3))
    x = torch.randn(4, 8)
    kinds = (OfPicky(),)
    static = conjoin.optimize(exported(model, x, dynamic=False), kinds=kinds)
    assert len(static.state_dict) == 2
    program = exported(model, x)
    before = str(program), len(program.graph.nodes)
    fused = conjoin.optimize(program, kinds=kinds)
    assert_same(program, fused)
    assert (str(program), len(program.graph.nodes)) == before
    (group,) = conjoin.report(program, kinds=kinds).groups
    assert (group.fused, group.reason) == (False, Reason.IN_PROGRAM)


@pytest.mark.parametrize("look", [conjoin.report, conjoin.optimize, conjoin.verify])
def test_the_random_streams_stay(look: Callable[..., object], heads: ExportedProgram) -> None:
    before, python = torch.get_rng_state(), random.getstate()
    call = () if look is conjoin.optimize else (heads.example_inputs[0],)
    look(heads, *([heads] if look is conjoin.verify else []), *call)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python


def test_the_report_counts_the_program() -> None:
    model = nn.Sequential(conjoin.nn.Parallel(nn.Linear(8, 2), nn.Linear(8, 3)), conjoin.nn.Unite())
    program = exported(model, torch.randn(4, 8))
    found = conjoin.report(program)
    assert (found.launches.before.forward, found.launches.after.forward) == (3, 1)
    assert [(group.layers, group.fused) for group in found.groups] == [(("0.0", "0.1"), True)]
    assert conjoin.report(conjoin.optimize(program)) == found


def test_equal_paddings_hide_no_siblings() -> None:
    convs = (nn.Conv1d(2, n, 3, padding=1, padding_mode="circular") for n in (3, 4))
    x = torch.randn(2, 2, 6)
    program = exported(conjoin.nn.Parallel(*convs), x)
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) == 2
    assert bool(conjoin.verify(program, fused))


class Depthwise(nn.Module):
    """Separable convolutions, each with a norm between its two."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
                nn.BatchNorm2d(8),
                nn.ReLU6(),
                nn.Conv2d(8, 4, 1),
            )
            for _ in range(3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        return torch.cat([branch(x) for branch in self.branches], 1).sin()


@pytest.mark.parametrize("dynamic", [False, True], ids=["one size", "any batch"])
@pytest.mark.parametrize(("size", "products"), [(6, 3), (96, 7)], ids=["small", "large"])
def test_groups_run_at_once_where_the_example_is_small(
    size: int, products: int, dynamic: bool
) -> None:
    model, x = Depthwise().double().eval(), torch.randn(2, 3, size, size).double()
    program = exported(model, x, dynamic=dynamic)
    fused = conjoin.optimize(program)
    assert count(Unmoded(fused), (x,)).products == products
    assert_to_and_fro(program, fused, [(x,), (torch.cat([x, x]) if dynamic else x,)])


class Attention(nn.Module):
    """Queries, keys and values that are viewed as heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (x.shape[0], x.shape[1], 2, 4)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v)


def test_heads_are_viewed_without_a_copy() -> None:
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    program = exported(Attention().double(), x)
    fused = conjoin.optimize(program)
    targets = [str(node.target) for node in fused.graph.nodes]
    assert targets.count("aten.linear.default") == 1
    assert "aten.clone.default" not in targets
    assert bool(conjoin.verify(program, fused, [(x,), (x[:1],)]))
    launches = conjoin.report(program).launches
    assert launches.before.forward - launches.after.forward == 2


def test_wrong_arguments(heads: ExportedProgram) -> None:
    x = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match="example inputs of its own"):
        conjoin.optimize(heads, (x,))
    with pytest.raises(ValueError, match="not changed in place"):
        conjoin.optimize(heads, inplace=True)
    with pytest.raises(ValueError, match="not changed in place"):
        conjoin.unfuse(heads, inplace=True)
    with pytest.raises(TypeError, match="export the other model too"):
        conjoin.verify(Heads(), heads)


@pytest.mark.parametrize(
    "harm",
    [
        lambda record: record["nodes"].append({**_removed(record), "name": "x = evil()"}),
        lambda record: _removed(record).update(target="aten.nothing.default"),
        lambda record: _removed(record).update(target="os.system"),
        lambda record: _removed(record).update(args={"node": "nobody"}),
        lambda record: record["tensors"].clear(),
        lambda record: record["tensors"]["norms.0.weight"].__setitem__(3, 10**6),
        lambda record: record["order"].append("nothing"),
        lambda record: record.pop("order"),
    ],
)
def test_a_record_that_is_wrong_is_one_error(harm: object, heads: ExportedProgram) -> None:
    fused = conjoin.optimize(heads)
    harm(fused.graph_module.meta["custom"]["conjoin"])
    with pytest.raises(ValueError, match="export the model that it came from again"):
        conjoin.unfuse(fused)


def _removed(record: dict) -> dict:
    return next(node for node in record["nodes"] if isinstance(node, dict) and "args" in node)


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_packaged_with_aot_inductor(tmp_path: object) -> None:
    towers = (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2))
    model, x = conjoin.nn.Parallel(*towers), torch.randn(4, 8)
    fused = conjoin.optimize(exported(model.eval(), x))
    path = torch._inductor.aoti_compile_and_package(fused, package_path=f"{tmp_path}/fused.pt2")
    compiled = torch._inductor.aoti_load_package(path)
    for batch in BATCHES:
        x = torch.randn(batch, 8)
        torch.testing.assert_close(compiled(x), model(x))


def test_functions_that_are_left_apart_stay_the_very_nodes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.softmax(self.c(torch.cat([x, x]) * 2), -1)
            return self.a(y).relu() + self.b(y).relu()

    program = exported(Net(), torch.randn(3, 4))
    fused = conjoin.optimize(program)
    there = {node.name: node for node in fused.graph.nodes}
    for node in program.graph.nodes:
        if node.name in ("cat", "mul", "linear", "softmax", "add"):
            assert there[node.name].target == node.target
            assert str(there[node.name].args) == str(node.args)
            assert str(there[node.name].meta) == str(node.meta)


class Tied(nn.Module):
    """Two heads, of which one has another name too, under which it is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.same = (nn.Linear(8, 4) for _ in range(3))
        self.same.weight, self.same.bias = self.a.weight, self.a.bias

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


@pytest.mark.parametrize("training", [True, False])
def test_outputs_lie_in_memory_as_they_did_and_tied_names_stay(training: bool) -> None:
    model, x = Tied().double().train(training), torch.randn(3, 8, dtype=torch.float64)
    program = torch.export.export(model, (x,))
    fused = conjoin.optimize(program)
    assert len({*fused.parameters()}) < len({*program.parameters()})
    assert [part.stride() for part in fused.module()(x)] == [(4, 1), (4, 1)]
    assert conjoin.verify(program, fused, (x,))
    assert_same(program, conjoin.unfuse(fused))


class WiderHeads(nn.Module):
    """Siblings of two widths, with what is done to them for any batch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c = (nn.Linear(8, n) for n in (8, 4, 4, 6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.stem(x).relu()
        return self.a(h).relu(), self.b(h).sigmoid() + self.c(h)[:, :4]


@pytest.mark.parametrize("least", [0, 1, 2])
def test_a_program_from_a_file_is_merged_like_the_one_in_memory(least: int) -> None:
    model, x = WiderHeads().double().eval(), torch.randn(3, 8, dtype=torch.float64)
    program = export(model, (x,), dynamic_shapes=({0: Dim("batch", min=least)},))
    loaded = file_of(program)
    fused = conjoin.optimize(loaded)
    assert list(fused.state_dict) == list(conjoin.optimize(program).state_dict)
    assert len(fused.state_dict) < len(program.state_dict)
    again = file_of(fused)
    assert str(fused.range_constraints) == str(again.range_constraints)
    assert str(fused.range_constraints) == str(loaded.range_constraints)
    for batch in (1, 2, 5):
        if batch >= least:
            input = torch.randn(batch, 8, dtype=torch.float64)
            assert_close(list(again.module()(input)), list(model(input)))
    assert conjoin.verify(program, again, (x,))
    assert_same(file_of(program), conjoin.unfuse(again))


def test_a_report_of_a_program_looks_for_the_kinds_that_it_is_given() -> None:
    program = export(WiderHeads(), (torch.randn(3, 8),))
    convolutions = tuple(kind for kind in conjoin.KINDS if "Conv" in kind.name)
    assert conjoin.report(program).groups
    assert not conjoin.report(program, kinds=convolutions).groups


class Normed(nn.Module):
    """Branches with norms, which `strict=True` exports without counters in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Sequential(nn.Conv2d(3, n, 1), nn.BatchNorm2d(n), nn.ReLU()) for n in (4, 5)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.a(x), self.b(x)], 1) * 2


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_strict_programs(training: bool) -> None:
    model = Normed().double().train(training)
    inputs = [(torch.randn(n, 3, 4, 4, dtype=torch.float64),) for n in BATCHES]
    program = exported(model, *inputs[0], strict=True)
    fused = conjoin.optimize(program)
    targets = [str(node.target) for node in fused.graph.nodes]
    assert [t for t in targets if "conv" in t or "norm" in t] == [
        "aten.conv2d.default",
        "aten.batch_norm.default",
    ]
    assert_to_and_fro(program, fused, inputs)
    plain = file_of(conjoin.unfuse(file_of(fused)))
    known = [node.meta.get("source_fn_stack") for node in file_of(program).graph.nodes]
    assert any(known)
    assert [node.meta.get("source_fn_stack") for node in plain.graph.nodes] == known


def test_parameters_that_are_tied_in_a_file_stay_tied() -> None:
    model = Heads().double().eval()
    program = file_of(exported(model, torch.randn(4, 8, dtype=torch.float64)))
    fused = conjoin.optimize(program)
    for each in (fused, file_of(fused), conjoin.unfuse(fused), conjoin.unfuse(file_of(fused))):
        stem, tied = (each.state_dict[f"{name}.weight"] for name in ("stem", "tied"))
        assert stem.data_ptr() == tied.data_ptr()
        assert stem.data_ptr() != program.state_dict["stem.weight"].data_ptr()


class AnyHeads(nn.Module):
    """Attention whose heads are put in front in some way."""

    def __init__(self, heads: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (self.heads(layer(x)) for layer in (self.q, self.k, self.v))
        return (q @ k.transpose(-1, -2)).softmax(-1) @ v


HEADS = {
    "reshape": lambda y: y.reshape(*y.shape[:-1], 2, 4).permute(0, 2, 1, 3),
    "view": lambda y: y.view(*y.shape[:-1], 2, 4).transpose(1, 2),
    "contiguous": lambda y: y.view(*y.shape[:-1], 2, -1).permute(0, 2, 1, 3).contiguous(),
    "batched": lambda y: y.view(*y.shape[:-1], 2, 4).transpose(1, 2).reshape(-1, y.shape[1], 4),
    "repeated": lambda y: (
        y.view(*y.shape[:-1], 2, 4)
        .transpose(1, 2)[:, :, None]
        .expand(-1, -1, 3, -1, -1)
        .flatten(1, 2)
    ),
}


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_no_copies_of_what_may_lie_as_it_does(heads: Callable) -> None:
    model, inputs = AnyHeads(heads).double(), [(torch.randn(n, 5, 8).double(),) for n in BATCHES]
    program = exported(model, *inputs[0])
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) == 2
    before, after = (count(Unmoded(each), inputs[0]) for each in (program, fused))
    assert before.copies == after.copies
    assert_to_and_fro(program, fused, inputs)


class Handed(nn.Module):
    """Siblings whose views are outputs, beside ones whose are not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c = (layer(x).view(-1, 5, 2, 4).transpose(1, 2) for layer in (self.a, self.b, self.c))
        return a, b.contiguous().sin(), c.reshape(-1, 40), (c * 2).transpose(1, 2)


def test_outputs_that_are_views_of_siblings_lie_as_they_did() -> None:
    model, inputs = Handed().double(), [(torch.randn(n, 5, 8).double(),) for n in BATCHES]
    program = exported(model, *inputs[0])
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) == 2
    assert_to_and_fro(program, fused, inputs)


class Constants(nn.Module):
    """Makes tensors, and changes them in place, between siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, n) for n in (3, 4, 5))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = x.sin()
        a = self.a(h) / torch.sqrt(torch.tensor(3.0, dtype=x.dtype))
        mask = torch.zeros(4, dtype=x.dtype).fill_(2.0)
        copied = h.clone().mul_(2)
        return a.relu(), self.b(h).cos() * mask, self.c(h).exp(), copied


def test_new_tensors_that_are_changed_in_place_keep_nobody_apart() -> None:
    model, inputs = Constants().double(), [(torch.randn(n, 8).double(),) for n in BATCHES]
    program = exported(model, *inputs[0])
    assert any(str(node.target) == "aten.detach_.default" for node in program.graph.nodes)
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) == 2
    assert_to_and_fro(program, fused, inputs)


class Choosing(nn.Module):
    """Takes another way where its input is large, which a program does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x * 2 if x.numel() < 80 else x
        return self.a(x).sin(), self.b(x).cos()


def test_what_inputs_must_be_is_asked_as_before() -> None:
    program = file_of(export(Choosing(), (torch.randn(4, 4),), dynamic_shapes=({0: Dim.AUTO},)))
    assert program._guards_code
    fused = conjoin.optimize(program)
    assert len(fused.state_dict) == 2
    for each in (program, fused, file_of(fused), conjoin.unfuse(file_of(fused))):
        assert each._guards_code == program._guards_code
        with pytest.raises(AssertionError, match="Guard failed"):
            each.module()(torch.randn(25, 4))


class Narrow(nn.Module):
    """Convolutions with one channel, whose slices some views of are copies."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 1, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x).view(-1, 3), self.b(x).view(-1, 3)
        return torch.stack([a, b]).sin()


@pytest.mark.parametrize("dynamic", [False, True])
def test_views_that_fake_tensors_take_for_possible(dynamic: bool) -> None:
    x = torch.randn(3, 4, 2, 3)
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    model = Narrow().eval()
    program = export(model, (x,), dynamic_shapes=shapes)
    fused = conjoin.optimize(program, policy="always").module()
    torch.testing.assert_close(fused(x), model(x))


class Passing(nn.Module):
    """Outputs that dropout passes on in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        a, b = F.dropout(self.a(x), 0.5, self.training), F.dropout(self.b(x), 0.5, self.training)
        return a, b.sin()


def test_outputs_of_dropout_lie_as_they_did() -> None:
    x = torch.randn(2, 5, 4)
    model = Passing().eval()
    fused = conjoin.optimize(export(model, (x,)), policy="always").module()
    made, expected = fused(x), model(x)
    torch.testing.assert_close(made, expected)
    assert [each.stride() for each in made] == [each.stride() for each in expected]
