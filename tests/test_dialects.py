"""Every cell of the table of dialects: what a pass does there, and that it is the same function."""

import inspect

import pytest
import torch
from dialects import CASES, CELLS, DIALECTS, Graph, Layers, Outcome, Repeated, Towers, model_of, x
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import conjoin
from conjoin import passes


def values(graph: Graph) -> list[torch.Tensor]:
    """The outputs, and the gradients of the inputs."""
    module, inputs = graph
    leaves = [each.detach().clone().requires_grad_() for each in inputs]
    outputs = pytree.tree_leaves(module(*leaves))
    loss = sum((output * (number + 1)).sum() for number, output in enumerate(outputs))
    return [*outputs, *torch.autograd.grad(loss, leaves, materialize_grads=True)]


@pytest.mark.parametrize("lift", [False, True])
@pytest.mark.parametrize(
    ("name", "dialect"), [(name, dialect) for name in CELLS for dialect in DIALECTS]
)
def test_a_cell(name: str, dialect: str, lift: bool) -> None:
    case = CASES[name]
    cell = CELLS[name][[*DIALECTS].index(dialect)]
    graph = DIALECTS[dialect](case.model)
    module = graph[0]
    expected = values(graph)
    for run in (*[passes.Lift()] * (lift and name != "Lift"), *case.before):
        run(module)
    changed = case.run(module).modified
    works = {Outcome.WORKS, Outcome.PARTLY, *([Outcome.LIFTED] * lift)}
    assert changed == (cell.outcome in works)
    assert bool(cell.why) == (cell.outcome in (Outcome.NOT, Outcome.PARTLY))
    for found, wanted in zip(values(graph), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert module.code == module.graph.python_code("self").src


@pytest.mark.parametrize(("model", "products"), [(Repeated, 1), (Towers, 2)])
def test_what_is_optimized_before_make_fx(model: type[Layers], products: int) -> None:
    plain = model_of(model)
    graph = make_fx(conjoin.optimize(plain, (x(),), policy="always"))(x())
    made = [node for node in graph.graph.nodes if "mm" in str(node.target)]
    assert len(made) == products
    found, wanted = map(pytree.tree_leaves, (graph(x()), plain(x())))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_the_table_is_whole() -> None:
    known = {
        name
        for name, value in vars(passes).items()
        if inspect.isclass(value) and issubclass(value, passes.PassBase) and "Pass" not in name
    }
    assert {*CELLS} == {*CASES} == known
    assert all(len(row) == len(DIALECTS) for row in CELLS.values())
