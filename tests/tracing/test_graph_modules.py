"""GraphModules: graphs that users traced or transformed themselves, which conjoin rewrites."""

import copy
import dataclasses
import io
import pickle
import warnings

import pytest
import torch
from equivalence import assert_equivalent, assert_same_state
from torch import fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_manager import PassManager
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

import conjoin
from conjoin import passes
from conjoin.layers.view import View


class Towers(nn.Module):
    def __init__(self, *, drop: float = 0.0) -> None:
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(drop), nn.Linear(8, 3)
            )
            for _ in range(2)
        )

    def forward(self, x):
        first, second = (tower(x) for tower in self.towers)
        return {"sum": first + second, "first": first}


class Outer(nn.Module):
    """A GraphModule within a model of the user's, beside a layer that may read what it reads."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset
        self.inner = traced()
        self.own = nn.Linear(6, 3).double()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.inner(x)["sum"] + self.own(x + self.offset)


def traced(**options: float) -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Towers(**options).double())


def x() -> torch.Tensor:
    return torch.randn(5, 6, dtype=torch.float64)


def called(module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in module.graph.nodes if node.op == "call_module"]


WIDE = ["towers.0.0.wide", "towers.0.1.wide", "towers.0.2", "towers.0.4.wide"]


@pytest.mark.parametrize("observed", [True, False])
def test_the_graph_tells_what_runs(observed: bool) -> None:
    module = traced()
    plain = copy.deepcopy(module)
    fused = conjoin.optimize(module, (x(),) if observed else None)
    assert isinstance(fused, fx.GraphModule)
    assert [name for name in called(fused) if "wide" in name] == [n for n in WIDE if "wide" in n]
    assert fused.code.count(".wide(") == 3
    assert called(module) == called(plain)  # Not inplace.
    assert_equivalent(fused, plain, (x(),))
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert conjoin.verify(plain, fused, (x(),))


def test_in_place() -> None:
    module = traced()
    plain = copy.deepcopy(module)
    assert conjoin.optimize(module, (x(),), inplace=True) is module
    assert "towers.0.0.wide" in called(module)
    assert_equivalent(module, plain, (x(),))


def test_unfuse_gives_the_graph_back() -> None:
    plain = traced()
    fused = conjoin.optimize(plain, (x(),))
    back = conjoin.unfuse(fused)
    assert sorted(called(back)) == sorted(called(plain))
    assert not any(isinstance(module, View) for module in back.modules())
    assert_same_state(back, plain)
    input = x()
    torch.testing.assert_close(back.eval()(input), plain.eval()(input), rtol=0, atol=0)
    assert "towers.0.0.wide" in called(fused)  # Not inplace.


def test_optimize_again_and_report() -> None:
    plain = traced()
    expected = conjoin.report(plain, (x(),))
    assert [group.layers for group in expected.groups] == [("towers.0.0", "towers.1.0")]
    assert expected.launches.after.forward < expected.launches.before.forward
    assert expected.groups[0].depth
    fused = conjoin.optimize(plain, (x(),))
    found = conjoin.report(fused, (x(),))
    assert found.memory.after == expected.memory.after
    # The layers stand next to each other in the graph now, also by themselves.
    assert dataclasses.replace(found, memory=expected.memory) == expected
    assert conjoin.report(fused).groups[0].fused
    again = conjoin.optimize(fused, (x(),))
    assert called(again) == called(fused)
    assert_equivalent(again, plain, (x(),))


def test_a_graph_module_in_a_model() -> None:
    model = Outer(1)
    fused = conjoin.optimize(model, (x(),))
    assert "towers.0.0.wide" in called(fused.inner)
    assert_equivalent(fused, model, (x(),))
    assert conjoin.verify(model, fused, (x(),))
    assert sorted(called(conjoin.unfuse(fused).inner)) == sorted(called(model.inner))


class Same(Outer):
    def forward(self, x):
        return self.inner(x)["sum"] + self.own(x)


def test_siblings_within_a_graph_and_beside_it() -> None:
    model = Same(0)
    fused = conjoin.optimize(model, (x(),))
    assert "towers.0.0" in called(fused.inner)  # One group of three: the views run in lockstep.
    assert fused.own.wide_layer.widths == [8, 8, 3]
    assert_equivalent(fused, model, (x(),))
    assert_equivalent(conjoin.unfuse(fused), model, (x(),))


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def copied_twice(module: nn.Module) -> nn.Module:
    found = pickled(module)
    assert len([*found.parameters()]) == len([*module.parameters()])
    return copy.deepcopy(found)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved, copied_twice])
@pytest.mark.parametrize("fuse", [conjoin.optimize, lambda m: (passes.rewrite(m), m)[1]])
def test_copies(copied, fuse) -> None:
    plain = traced()
    fused = fuse(copy.deepcopy(plain))
    found = copied(fused)
    assert called(found) == called(fused)
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in fused.named_parameters()]
    assert list(found.state_dict()) == list(plain.state_dict())
    assert_equivalent(found, plain, (x(),))
    assert sorted(called(conjoin.unfuse(found))) == sorted(called(plain))


def test_dropouts_draw_what_they_drew() -> None:
    """A graph that is rewritten in evaluation mode is right in training mode."""
    plain = traced(drop=0.5).eval()
    fused = conjoin.optimize(plain, (x(),))
    assert not any(module.training for module in fused.modules())
    input = x()
    for mode in (True, False):
        torch.manual_seed(3)
        expected = plain.train(mode)(input)
        torch.manual_seed(3)
        torch.testing.assert_close(fused.train(mode)(input), expected)


@pytest.mark.parametrize("name", ["towers.1.0", "towers.0.4"])
@pytest.mark.parametrize("change", ["frozen", "replaced", "converted"])
def test_a_layer_that_is_taken_out_is_no_silent_error(name: str, change: str) -> None:
    fused = conjoin.optimize(traced(), (x(),)).eval()
    layer = fused.get_submodule(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if change == "frozen":
            layer.requires_grad_(False)
        elif change == "converted":
            layer.float()
        else:
            parent, _, child = name.rpartition(".")
            setattr(fused.get_submodule(parent), child, nn.Linear(6, 3))
            del layer
    with pytest.raises((RuntimeError, AttributeError), match=r"wide|replaced or taken out"):
        fused(x())


def test_after_unfuse_layers_may_be_changed() -> None:
    plain = traced().eval()
    back = conjoin.unfuse(conjoin.optimize(plain, (x(),)))
    layer = back.get_submodule("towers.1.0")
    layer.requires_grad_(False)
    layer.weight.zero_()
    plain.get_submodule("towers.1.0").weight.data.zero_()
    input = x()
    torch.testing.assert_close(back(input), plain(input), rtol=0, atol=0)


def test_a_graph_made_of_a_rewritten_one_keeps_its_weights() -> None:
    """It has the wide layers and no siblings: they save and load what they hold."""
    fused = conjoin.optimize(traced(), (x(),))
    fused(x())
    fused.eval()
    other = fx.Transformer(fused).transform().eval()
    input = x()
    expected = fused(input)["sum"].detach()
    torch.testing.assert_close(other(input)["sum"], expected, rtol=0, atol=0)
    saved = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    assert {*saved} > {name for name, _ in other.named_parameters()}
    with torch.no_grad():
        for tensor in (
            *other.parameters(),
            *other.get_submodule("towers.0.1.wide").running.values(),
        ):
            tensor.zero_()
    assert not torch.equal(other(input)["sum"], expected)
    other.load_state_dict(saved)
    torch.testing.assert_close(other(input)["sum"], expected, rtol=0, atol=0)
    assert list(fused.state_dict()) == list(traced().state_dict())


def test_a_graph_that_was_changed_since() -> None:
    fused = conjoin.optimize(traced(), (x(),))
    next(node for node in fused.graph.nodes if node.op == "call_module").kwargs = {"dim": -2}
    with pytest.raises(ValueError, match=r"Call conjoin\.unfuse before changing a graph"):
        conjoin.unfuse(fused)


@pytest.mark.parametrize("backend", ["aot_eager", "conjoin"])
def test_compiled_and_exported(backend: str) -> None:
    fused = conjoin.optimize(traced().eval(), (x(),))
    input = x()
    expected = fused(input)["sum"]
    options = {"options": {"backend": "eager"}} if backend == "conjoin" else {}
    torch._dynamo.reset()
    torch.testing.assert_close(
        torch.compile(fused, backend=backend, **options)(input)["sum"], expected
    )
    program = torch.export.export(fused, (input,))
    torch.testing.assert_close(program.module()(input)["sum"], expected)


# Other dialects


class Functions(nn.Module):
    """Layers through functions of their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.convs = nn.ModuleList(nn.Conv2d(1, n, 3, bias=n == 2) for n in (2, 3, 2))
        self.ups = nn.ModuleList(nn.ConvTranspose2d(3, n, 2) for n in (2, 2))
        self.heads = nn.ModuleList(nn.Linear(6, n) for n in (2, 4))

    def forward(self, x):
        x = F.layer_norm(x, (6,), self.norm.weight, self.norm.bias)
        first, second, third = self.convs
        image = x.reshape(-1, 1, 5, 6)
        y = F.conv2d(image, second.weight, None, 1, padding="same")
        pair = (
            F.conv2d(image, first.weight, first.bias, 2),
            F.conv2d(image, third.weight, bias=third.bias, stride=(2, 2)),
        )
        ups = [F.conv_transpose2d(y, up.weight, up.bias, 2).sin() for up in self.ups]
        return pair, ups, [F.linear(x, head.weight, head.bias) for head in self.heads]


class Products(nn.Module):
    """Raw Parameters, in a module and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ParameterDict({n: nn.Parameter(torch.randn(6, 6)) for n in "qkv"})
        self.rows = nn.ParameterList(nn.Parameter(torch.randn(n, 6)) for n in (2, 3))

    def forward(self, x):
        q, k, v = x @ self.inner["q"], torch.matmul(x, self.inner["k"]), x @ self.inner["v"]
        return (q * k).sin() + v, [F.linear(x, row) * 2 for row in self.rows]


class Root(nn.Module):
    """Raw Parameters of the GraphModule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))

    def forward(self, x):
        return x @ self.q + x @ self.k


class Alone(Root):
    """Products that read different tensors."""

    def forward(self, x):
        return (x @ self.q) @ self.k


def wides(module: fx.GraphModule) -> int:
    return sum(name.endswith(".wide") for name in called(module))


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(Functions, 3), (Products, 2), (Root, 1), (Alone, 0)],
    ids=lambda each: str(each),
)
@pytest.mark.parametrize("observed", [True, False])
def test_functions_of_parameters(cls, expected: int, observed: bool) -> None:
    torch.manual_seed(0)
    plain = fx.symbolic_trace(cls().double())
    code = plain.code
    fused = conjoin.optimize(plain, (x(),) if observed else None)
    assert wides(fused) == expected
    assert plain.code == code
    assert (fused.code == code) == (not expected)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert conjoin.verify(plain, fused, (x(),))
    report = conjoin.report(plain, (x(),))
    assert sum(group.fused for group in report.groups) == expected
    assert conjoin.report(fused, (x(),)) == report
    assert plain.code == code
    back = conjoin.unfuse(fused)
    assert_same_state(back, plain)
    assert not wides(back)
    assert conjoin.verify(plain, back, (x(),))
    for copied in (copy.deepcopy(fused), pickled(fused)):
        assert [n for n, _ in copied.named_parameters()] == [n for n, _ in fused.named_parameters()]
        assert conjoin.verify(plain, copied, (x(),))
    again = conjoin.optimize(fused, (x(),))
    assert wides(again) == expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("guards", [True, False])
def test_exported_graphs(training: bool, guards: bool) -> None:
    model = Towers().double().train(training)
    plain = torch.export.export(model, (x(),)).module(check_guards=guards)
    fused = conjoin.optimize(plain)
    assert wides(fused) == (not training)  # What is behind a normalization of a fixed mode stays.
    assert list(fused.state_dict()) == list(plain.state_dict())
    input = x()
    if not guards:
        other = [copy.deepcopy(each) for each in (plain, fused)]
        for each in other:
            each.training = not training
            for inner in each.modules():
                inner.training = not training  # Which the operations of the graph do not ask.
        assert conjoin.verify(*other, (input,))
    expected, found = (m(input.requires_grad_()) for m in (copy.deepcopy(plain), fused))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
        wanted, given = (
            torch.autograd.grad(v.sum(), input, retain_graph=True) for v in (value, found[name])
        )
        torch.testing.assert_close(given, wanted)
    back = conjoin.unfuse(fused)
    assert not wides(back)
    if not training:
        assert_same_state(back, plain)
        for name, value in back(input).items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0)


class Rows(nn.Module):
    """Siblings on many rows, some of which give as many."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4)
        self.out = nn.Linear(8, 6)

    def forward(self, x):
        rows = torch.stack([x, x + 1], 1)
        q, k, v = (f(rows).unflatten(-1, (-1, 2)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).flatten(2)), self.q(rows) * 2


@pytest.mark.parametrize(
    ("cls", "expected"),
    [(Functions, 3), (Products, 2), (Root, 1), (Rows, 1), (Alone, 0)],
    ids=lambda each: str(each),
)
@pytest.mark.parametrize("core", [True, False])
def test_decomposed_graphs(cls, expected: int, core: bool) -> None:
    torch.manual_seed(0)
    model = cls().double()
    if core:
        plain = torch.export.export(model, (x(),)).run_decompositions().module(check_guards=False)
    else:
        plain = make_fx(model)(x())
    code = plain.code
    fused = conjoin.optimize(plain)
    assert wides(fused) == expected
    assert plain.code == code
    assert (fused.code == code) == (not expected)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert conjoin.verify(plain, fused, (x(),))
    assert conjoin.verify(plain, copy.deepcopy(fused), (x(),))
    back = conjoin.unfuse(fused)
    assert_same_state(back, plain)
    assert not wides(back)
    assert conjoin.verify(plain, back, (x(),))


def test_normalizations_of_a_decomposed_graph_follow_no_mode() -> None:
    program = torch.export.export(Towers().double().eval(), (x(),)).run_decompositions()
    plain = program.module(check_guards=False)
    fused = conjoin.optimize(plain)
    assert wides(fused) == 1
    input = x()
    for module in (plain, fused):
        for inner in module.modules():
            inner.training = True
    for name, value in plain(input).items():
        torch.testing.assert_close(fused(input)[name], value)


# Graphs that do not lint


def broken() -> fx.GraphModule:
    module = traced()
    nodes = [node for node in module.graph.nodes if node.op == "call_module"]
    nodes[1].prepend(nodes[0])
    nodes[0].args, nodes[1].args = (nodes[1],), (nodes[0],)
    return module


@pytest.mark.parametrize(
    "use",
    [
        conjoin.optimize,
        conjoin.report,
        lambda module: conjoin.optimize(module, (x(),)),
        lambda module: conjoin.optimize(nn.Sequential(module)),
        passes.rewrite,
        *passes.PIPELINE,
        passes.Separate(),
        passes.Rejoin(),
    ],
)
def test_a_graph_that_does_not_lint_is_refused(use) -> None:
    with pytest.raises(ValueError, match=r"the graph( of 0)? is not sound.*before"):
        use(broken())


def test_a_graph_that_calls_what_is_not_there_is_refused() -> None:
    module = traced()
    next(node for node in module.graph.nodes if node.op == "call_module").target = "missing"
    with pytest.raises(ValueError, match="missing"):
        conjoin.optimize(module)


# Metadata


def tagged() -> fx.GraphModule:
    module = traced().eval()
    for node in module.graph.nodes:
        node.meta |= {"tag": node.name, "stack_trace": f'File "model.py", in {node.name}'}
    return module


@pytest.mark.parametrize("fuse", [passes.rewrite, passes.Widen()])
def test_metadata_goes_on(fuse) -> None:
    module = tagged()
    before = {node.name: node for node in module.graph.nodes}
    ShapeProp(module).propagate(x())
    fuse(module)
    shapes = {
        node.name: node.meta["tensor_meta"].shape
        for node in module.graph.nodes
        if "tensor_meta" in node.meta and isinstance(node.meta["tensor_meta"], tuple)
    }
    for node in module.graph.nodes:
        if node.op != "output":
            assert node.meta["tag"] in before
            assert node.meta["stack_trace"].endswith(f"in {node.meta['tag']}")
    wide = next(node for node in module.graph.nodes if node.target == "towers.0.0.wide")
    assert wide.meta["tag"] == "towers_0_0"
    ShapeProp(module).propagate(x())
    for node in module.graph.nodes:
        if node.name in shapes:
            assert node.meta["tensor_meta"].shape == shapes[node.name]


def test_fake_values_are_those_of_the_new_graph() -> None:
    module = traced()
    FakeTensorProp(module, FakeTensorMode(allow_non_fake_inputs=True)).propagate(x())
    passes.rewrite(module)
    real = ShapeProp(copy.deepcopy(module))
    real.propagate(x())
    expected = {node.name: node.meta.get("tensor_meta") for node in real.module.graph.nodes}
    checked = 0
    for node in module.graph.nodes:
        if isinstance(value := node.meta.get("val"), torch.Tensor):
            assert (value.shape, value.stride()) == (expected[node.name][0], expected[node.name][3])
            checked += 1
    assert checked > len(called(module))


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.q(x) @ self.k(x).transpose(1, 2)


def test_sizes_that_are_open_stay_open() -> None:
    module, rows = fx.symbolic_trace(Scores()), torch.randn(5, 3, 6)
    program = torch.export.export(module, (rows,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    value = program.graph.find_nodes(op="placeholder")[-1].meta["val"]
    with enable_python_dispatcher():
        FakeTensorProp(module, value.fake_mode).propagate_dont_convert_inputs(value)
    passes.rewrite(module)
    (wide,) = module.graph.find_nodes(op="call_module")
    assert wide.meta["val"].shape[1:] == (3, 8)
    assert value.fake_mode.shape_env.guards == []


# Other people's passes


def test_in_a_pass_manager() -> None:
    def rename(module: fx.GraphModule):
        for node in module.graph.nodes:
            node.meta["seen"] = True
        return passes.separate.PassResult(module, False)

    module = traced()
    plain = copy.deepcopy(module)
    manager = PassManager(passes=[rename, *passes.PIPELINE], steps=3, run_checks_after_each_pass=1)
    result = manager(module)
    assert result.modified
    assert [n for n in called(result.graph_module) if n.endswith("wide")] == [
        n for n in WIDE if n.endswith("wide")
    ]
    assert "conjoin_merger" not in module.meta
    assert_equivalent(result.graph_module, plain, (x(),))
    assert passes.Separate()(result.graph_module).modified
    assert_equivalent(result.graph_module, plain, (x(),))


class Biased(nn.Module):
    """Siblings of which some have a bias, and normalizations behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=i > 0) for i in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(3))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [norm(layer(x)) for layer, norm in zip(self.layers, self.norms, strict=True)]


def test_a_rewritten_graph_is_traced_again() -> None:
    model = Biased().double()
    fused = conjoin.optimize(fx.symbolic_trace(model), (x(),), policy="always")
    again = fx.symbolic_trace(fused)
    assert [n.target for n in again.graph.nodes] == [n.target for n in fused.graph.nodes]
    input = x()
    for training in (True, False):
        outputs = [each.train(training)(input) for each in (again, fused)]
        torch.testing.assert_close(*outputs, rtol=0, atol=0)
