"""Programs in which products read slices of one weight, as an optimized model's views run alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from families import EVERY_KIND, Case, case, merge
from programs_alike import assert_close, assert_to_and_fro, exported, file_of, run
from torch import nn
from torch.export import ExportedProgram

import conjoin

PRODUCTS = tuple(
    f"aten.{name}" for name in ("linear", "conv", "addmm", "mm", "embedding", "index_select")
)


def products(program: ExportedProgram) -> int:
    """How many products or look-ups in tables a program has."""
    return sum(str(node.target).startswith(PRODUCTS) for node in program.graph.nodes)


class Siblings(nn.Module):
    """Siblings, and something that is made of what each gives."""

    def __init__(self, kind: Case, made: Callable, widths=(2, 3, 1), **settings: object) -> None:
        super().__init__()
        self.layers, self.made = kind.family(widths, **settings).layers, made

    def forward(self, x):
        return self.made(x, *self.layers)


def strict(plain: Siblings, x: torch.Tensor) -> ExportedProgram:
    """What is exported of the optimized model, where Dynamo reads the views."""
    model = copy.deepcopy(plain)
    merge(model.layers, enclosing=model)
    return exported(model, x, strict=True)


def sines(x, *layers):
    return [layer(x).sin() for layer in layers]


CASES = [(name, True) for name in EVERY_KIND] + [("Linear", False), ("Conv2d", False)]


@pytest.mark.parametrize("decomposed", [False, True], ids=["exported", "decomposed"])
@pytest.mark.parametrize(("name", "bias"), CASES)
def test_one_product_again(name: str, bias: bool, decomposed: bool) -> None:
    kind = EVERY_KIND[name]
    # Tables of several widths stay apart, as in graphs of Dynamo.
    plain = Siblings(kind, sines, (2, 2, 2) if kind.rows else (2, 3, 1), bias=bias)
    x, more = kind.input(), torch.cat([kind.input(), kind.input(), kind.input()])
    program = strict(plain, x)
    if decomposed:
        program = program.run_decompositions()
    assert products(program) == 3
    wide = conjoin.optimize(program)
    assert products(wide) == 1
    assert_close(run(wide, more)[0], [*plain(more)])
    assert_to_and_fro(program, wide, [(x,), (more,)])


LINEAR = case(nn.Linear, 4, (2, 3, 4))


def handed_out(x, a, b, c):
    return a(x), b(x), c(x).view(-1)


def views(x, a, b, c):
    rows, length, _ = x.shape
    return [each(x).view(rows, length, -1, 1).transpose(1, 2).sin() for each in (a, b, c)]


def changed(x, a, b, c):
    x = x * 2
    first = a(x).sin()
    x.add_(1)
    return first, b(x).sin(), c(x).sin()


def changed_weight(x, a, b, c):
    first = a(x).sin()
    b.weight.detach().mul_(2)
    return first, b(x).sin(), c(x).sin()


def read_otherwise(x, a, b, c):
    return a(x).sin(), b(x * 2).sin(), c(x).cos()


def in_place(x, a, b, c):
    return a(x).relu_(), b(x).mul_(2), c(x).sin()


@pytest.mark.parametrize(
    ("made", "number"),
    [
        (handed_out, 1),
        (views, 1),
        (changed, 2),
        (changed_weight, 2),
        (read_otherwise, 3),
        (in_place, 1),
    ],
)
def test_the_same_function_whatever_becomes_of_parts(made: Callable, number: int) -> None:
    plain, x, more = Siblings(LINEAR, made), LINEAR.input(), torch.randn(5, 3, 4).double()
    program = strict(plain, x)
    wide = conjoin.optimize(program)
    assert products(wide) == number
    expected = copy.deepcopy(plain)(more)
    assert_close(run(wide, more)[0], [*expected])
    assert_to_and_fro(program, wide, [(x,), (more,)])


class Norms(nn.Module):
    """Branches with norms behind siblings, and a Python that no symbolic trace follows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 6) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(6, 2) for _ in range(3))

    def forward(self, x):
        if x.shape[-1] != 4:
            raise ValueError("another width")
        each = zip(self.layers, self.norms, self.heads, strict=True)
        return [head(norm(layer(x)).relu()) for layer, norm, head in each]


def test_what_is_behind_them_is_merged_too() -> None:
    model = Norms().double().eval()
    apart = copy.deepcopy(model)
    merge(model.layers, enclosing=model)
    x, more = torch.randn(3, 4).double(), torch.randn(5, 4).double()
    program = exported(model, x, strict=True)
    wide = conjoin.optimize(program)
    called = [str(node.target) for node in file_of(wide).graph.nodes]
    assert called.count("aten.batch_norm.default") == 1
    assert called.count("aten.linear.default") == 1
    assert_close(run(wide, more)[0], [*apart(more)])
    assert_to_and_fro(program, wide, [(x,), (more,)])


def test_what_is_computed_of_parameters_is_known_to_be_of_a_module() -> None:
    plain, x = Siblings(LINEAR, read_otherwise, (2, 3, 1, 2)), LINEAR.input()
    plain.made = lambda x, a, b, c, d: [a(x).sin(), b(x * 2), c(x).cos(), d(x).exp()]
    wide = conjoin.optimize(strict(plain, x))
    assert products(wide) == 3
    for node in wide.graph.nodes:
        assert node.op != "call_function" or node.meta.get("nn_module_stack"), node
    unflattened = torch.export.unflatten(wide)
    assert_close([*unflattened(x)], [*plain(x)])


class Gated(nn.Module):
    """Depthwise convolutions, which a rewritten forward that Dynamo reads runs one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = (nn.Conv1d(4, 4, 3, padding=1, groups=4) for _ in range(2))

    def forward(self, x):
        return self.value(x) * torch.sigmoid(self.gate(x))


def test_slices_that_a_split_makes() -> None:
    x, more = torch.randn(3, 4, 5).double(), torch.randn(5, 4, 5).double()
    program = exported(conjoin.optimize(Gated().double(), (x,), policy="always"), x, strict=True)
    wide = conjoin.optimize(program)
    assert [products(each) for each in (program, wide)] == [2, 1]
    assert_to_and_fro(program, wide, [(x,), (more,)])
