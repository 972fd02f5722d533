"""`torch.compile(backend="conjoin")`: the wide layers are back in the graph that is compiled."""

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from equivalence import assert_close, gradients, tensors
from families import merge
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.compile_fx import partition_fn
from torch._inductor.decomposition import select_decomp_table
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import conjoin
from conjoin.compiling import PreGradPass, sources
from conjoin.graph import functional, hazards
from conjoin.layers.fusing import fuse


class Attention(nn.Module):
    """Grouped-query attention, with code that symbolic tracing does not follow."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8)
        self.out = nn.Linear(16, 8)

    def forward(self, x):
        batch, length, _ = x.shape
        if length > 512:
            raise ValueError("too long")
        q = self.q(x).view(batch, length, 4, 4).transpose(1, 2)
        k = self.k(x).view(batch, length, 2, 4).transpose(1, 2)
        v = self.v(x).view(batch, length, 2, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, 16))


class Inception(nn.Module):
    """Four branches, of which three begin with a 1x1 convolution."""

    def __init__(self):
        super().__init__()
        widths = (4, 3, 2)
        self.reduce = nn.ModuleList(nn.Conv2d(3, width, 1) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.after = nn.ModuleList(nn.Conv2d(width, 4, 3, padding=1) for width in widths)
        self.pool = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        if x.shape[-1] < 2:
            return x
        made = []
        for reduce, norm, after in zip(self.reduce, self.norms, self.after, strict=True):
            made.append(after(F.relu(norm(reduce(x)), inplace=True)))
        return torch.cat([*made, self.pool(F.max_pool2d(x, 3, 1, 1))], 1)


class TimeEmbedding(nn.Module):
    """Projections of one embedding, each behind an activation of its own."""

    def __init__(self):
        super().__init__()
        self.activations = nn.ModuleList(nn.SiLU() for _ in range(3))
        self.projections = nn.ModuleList(nn.Linear(8, width) for width in (4, 6, 4))

    def forward(self, x, t):
        if t.shape[0] != x.shape[0]:
            raise ValueError("one time for each")
        for activation, project in zip(self.activations, self.projections, strict=True):
            x = x + project(activation(t)).sum(-1, keepdim=True)
        return x


class ActorCritic(nn.Module):
    """The critic's output is changed in place; the actor's leaves the graph. Not rewritten."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = nn.Linear(6, 3), nn.Linear(6, 1)

    def forward(self, x):
        if x.shape[-1] != 6:
            raise ValueError("six numbers an observation")
        value = self.critic(x)
        value += 1
        return self.actor(x), value.squeeze(-1)


MODELS = {
    "attention": (Attention, lambda n: (torch.randn(n, 5, 8),), 2),
    "inception": (Inception, lambda n: (torch.randn(n, 3, 6, 6),), 5),
    "inception_channels_last": (
        Inception,
        lambda n: (torch.randn(n, 3, 6, 6).contiguous(memory_format=torch.channels_last),),
        5,
    ),
    "time_embedding": (TimeEmbedding, lambda n: (torch.randn(n, 7), torch.randn(n, 8)), 1),
    "actor_critic": (ActorCritic, lambda n: (torch.randn(n, 6),), 1),
}
"""Models, their inputs for a batch, and the products that are left."""


class Inner:
    """An inner backend that keeps the graphs that it is given."""

    def __init__(self, name="aot_eager"):
        self.name = name
        self.graphs = []

    def __call__(self, graph_module, inputs):
        self.graphs.append(copy.deepcopy(graph_module.graph))
        return lookup_backend(self.name)(graph_module, inputs)

    @property
    def products(self):
        """How many products each graph has."""
        return [
            sum(node.target in functional.PRODUCTS for node in graph.nodes) for graph in self.graphs
        ]


@pytest.fixture(autouse=True)
def _compile_anew():
    torch.compiler.reset()
    torch.manual_seed(0)


def optimized(model, args):
    fused = conjoin.optimize(model, args)
    assert any(group.fused for group in conjoin.report(fused, args).groups)
    return fused


def compiled_by(model, inner, **options):
    return torch.compile(model, backend="conjoin", options={"backend": inner}, **options)


def assert_same_steps(model, fused, compiled, args):
    """Equal outputs, strides, gradients and buffers."""
    for each in (model, fused):
        each.zero_grad()
    ours, theirs = dict(tensors(compiled(*args))), dict(tensors(model(*args)))
    assert_close(ours, theirs)
    assert [t.stride() for t in ours.values()] == [t.stride() for t in theirs.values()]
    for outputs in (ours, theirs):
        sum((output * output).sum() for output in outputs.values()).backward()
    assert_close(gradients(fused), gradients(model))
    assert_close(fused.state_dict(), model.state_dict())


def assert_same_outputs(ours, theirs):
    assert_close(dict(tensors(ours)), dict(tensors(theirs)))


@pytest.mark.parametrize(
    ("name", "training"), [*((name, True) for name in MODELS), ("inception", False)]
)
def test_compiled_models_are_the_same_function(name, training):
    make, inputs, expected = MODELS[name]
    model = make().double().train(training)
    calls = [tuple(t.double() for t in inputs(n)) for n in (3, 5, 7)]
    fused = optimized(model, calls[0])
    inner = Inner()
    compiled = compiled_by(fused, inner, fullgraph=True)
    for args in calls:
        assert_same_steps(model, fused, compiled, args)
    assert set(inner.products) == {expected}
    assert len(inner.graphs) == 2, "once for the first batch, once for any"


def test_inductor_is_the_inner_backend():
    model = ActorCritic().double()
    args = (torch.randn(3, 6).double(),)
    fused = optimized(model, args)
    compiled = torch.compile(fused, backend="conjoin", options={"max_autotune": False})
    assert_same_steps(model, fused, compiled, args)


def test_it_is_registered():
    assert "conjoin" in torch._dynamo.list_backends()


def test_the_inner_backend_gets_its_mode_and_options():
    given = []

    def inner(graph_module, inputs, **kwargs):
        given.append(kwargs)
        return graph_module.forward

    options = {"backend": inner, "level": 3}
    compiled = torch.compile(nn.Linear(2, 2), backend="conjoin", options=options)
    compiled(torch.randn(2, 2))
    assert given == [{"options": {"level": 3}}]
    with pytest.raises(RuntimeError, match="Unexpected optimization option levels"):
        torch.compile(nn.Linear(2, 2), backend="conjoin", options={"levels": 3})(torch.randn(2, 2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (3, "options is a dict"),
        ("eager", "options is a dict"),
        ({"backend": 3}, r"options\['backend'\] is the name of a backend .* not 3"),
        ({"backend": None}, "Leave it out to have Inductor"),
    ],
)
def test_wrong_options_of_the_backend(options, words):
    torch.compiler.reset()
    compiled = torch.compile(nn.Linear(2, 2), backend="conjoin", options=options)
    with pytest.raises(RuntimeError, match=words):
        compiled(torch.randn(2, 2))


class Changed(nn.Module):
    """What the siblings read is changed between their calls."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, between):
        if x.dim() > 9:
            raise ValueError
        y = self.a(x)
        between(x)
        return y, self.b(x)


@pytest.mark.parametrize(
    "between",
    [lambda x: x.mul_(2), lambda x: x.to(x.dtype).mul_(2), lambda x: None],
    ids=["mul", "converted", "nothing"],
)
def test_nothing_moves_past_a_change(between):
    model = Changed().double()
    x = torch.randn(3, 4).double()
    fused = optimized(model, (x.clone(), lambda x: None))
    inner = Inner()
    compiled = compiled_by(fused, inner)
    with torch.no_grad():
        assert_same_outputs(compiled(x.clone(), between), model(x.clone(), between))
    y = torch.ones(1, dtype=torch.float64)
    changes = between(y) is not None
    assert sum(inner.products) == 1 + changes


class ChangedCopy(nn.Module):
    """Siblings on a tensor that the graph makes and changes; others on what it does not change."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, f = self.layers
        y = x.clone()
        passed = F.dropout(y, training=False)
        before = a(y), c(x), e(passed)
        y[:, 1:].mul_(2)
        return *before, b(y), d(x), f(passed)


def test_nothing_moves_past_a_change_of_what_it_reads():
    model = ChangedCopy().double()
    x = torch.randn(3, 4).double()
    fused = copy.deepcopy(model)
    for start in (0, 2, 4):
        merge(fused.layers[start : start + 2], enclosing=fused)
    inner = Inner("eager")  # AOTAutograd itself takes what dropout passes on for a copy.
    with torch.no_grad():
        assert_same_outputs(compiled_by(fused, inner)(x), model(x))
    assert inner.products == [5]


class Recounted(nn.Module):
    """Looks rows up, of whose numbers some change in between."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9, 4) for _ in range(3))

    def forward(self, rows):
        rows, (a, b, c) = rows.clone(), self.tables
        first = a(rows).sin()
        rows.add_(1)
        return first, b(rows).cos(), c(rows).exp()


def test_rows_are_looked_up_before_their_numbers_change():
    plain, rows = Recounted().double(), torch.randint(8, (5,))
    model = copy.deepcopy(plain)
    merge(model.tables, enclosing=model)
    assert_same_outputs(compiled_by(model, "eager")(rows), plain(rows))


class Scaled(nn.Module):
    """What one sibling gives is changed in place, as a view, before another is called."""

    def __init__(self, view, shared):
        super().__init__()
        self.a, self.b, self.view, self.shared = nn.Linear(4, 6), nn.Linear(4, 6), view, shared

    def forward(self, x):
        y = self.a(x)
        z = self.view(y)
        z *= 2
        z = (z, y) if self.shared else z
        return z, self.b(x)


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "seen"])
@pytest.mark.parametrize(
    "view",
    [lambda y: y.view(3, 2, 3).transpose(1, 2), lambda y: torch.unsqueeze(y, 0)[0]],
    ids=["method", "function"],
)
def test_what_a_product_gives_is_changed_as_a_view(view, shared):
    """Products move past it, which do not read that, also where somebody else does."""
    model = Scaled(view, shared).double()
    x = torch.randn(3, 4).double()
    fused = optimized(model, (x,))
    inner = Inner()
    ours, theirs = (dict(tensors(run(x))) for run in (compiled_by(fused, inner), model))
    assert_close(ours, theirs)
    for outputs in (ours, theirs):
        sum((output * output).sum() for output in outputs.values()).backward()
    assert_close(gradients(fused), gradients(model))
    assert inner.products == [1]


class Modes(nn.Module):
    """One sibling under another mode."""

    def __init__(self, mode):
        super().__init__()
        self.a, self.b, self.mode = nn.Linear(4, 3), nn.Linear(4, 3), mode

    def forward(self, x):
        if x.dim() > 9:
            raise ValueError
        y = self.a(x)
        with self.mode():
            return y, self.b(x)


@pytest.mark.parametrize(
    "mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)], ids=["grad", "autocast"]
)
def test_nothing_moves_into_another_mode(mode):
    plain = Modes(mode)
    x = torch.randn(3, 4)
    fused = copy.deepcopy(plain)
    conjoin.layers.fusing.fuse(conjoin.layers.kind_of(fused.a), [fused.a, fused.b], fused)
    inner = Inner("eager")
    compiled = compiled_by(fused, inner)
    for ours, theirs in zip(compiled(x), plain(x), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.requires_grad == theirs.requires_grad
        assert torch.allclose(ours, theirs)
    assert sum(inner.products) == 2


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.a(x).tanh(), self.b(x).view(-1, 5)


class Transformed(nn.Module):
    """Siblings in a functorch transform, which reads what others give too."""

    def __init__(self, transform):
        super().__init__()
        self.outside, self.inside, self.transform = Heads(), Heads(), transform

    def forward(self, x):
        parts = self.outside(x)
        return [part.sin() for part in parts], self.transform(self.inside, *parts, x)


TRANSFORMS = {
    "vmap": lambda heads, a, b, x: (torch.vmap(heads)(x[:, None]), torch.vmap(torch.mul)(b, b)),
    "gradient": lambda heads, a, b, x: torch.func.grad(
        lambda y: (heads(y)[0] * a).sum() + (heads(y)[1].sin() * b).sum()
    )(x),
    "jvp": lambda heads, a, b, x: torch.func.jvp(heads, (x,), (x.cos(),)),
    "jacobian": lambda heads, a, b, x: torch.func.jacrev(
        # One output: PyTorch 2.11 does not compile the jacobian of several.
        lambda y: torch.cat((heads(y)[0], heads(y)[1].sin()[0]))
    )(x[0]),
}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_siblings_in_a_transform_run_apart_and_those_outside_as_one(transform, inner):
    model = Transformed(transform).double()
    x = torch.randn(3, 4).double()
    fused = optimized(model, (x,))
    graphs = Inner(inner)
    assert_same_steps(model, fused, compiled_by(fused, graphs, fullgraph=True), (x,))
    torch.compiler.reset()
    alone = Inner(inner)
    assert_same_steps(model, model, compiled_by(model, alone, fullgraph=True), (x,))
    assert sum(alone.products) - sum(graphs.products) == 1


def test_siblings_with_a_bias_on_some():
    model = nn.Sequential(
        conjoin.nn.Parallel(*(nn.Linear(4, 3, bias=i % 2 == 0) for i in range(4)))
    )
    model.double()
    x = torch.randn(3, 4).double()
    fused = optimized(model, (x,))
    inner = Inner()
    compiled = compiled_by(fused, inner)
    assert_same_outputs(compiled(x), model(x))


def test_a_model_that_was_not_optimized_is_left_alone_and_that_is_said():
    model = Attention().double()
    x = torch.randn(2, 5, 8).double()
    inner = Inner()
    compiled = compiled_by(model, inner)
    told = r"3 layers .* 0 of them .* conjoin.optimize\(model\) .* [3-9][0-9]% of the time"
    with pytest.warns(UserWarning, match=told):
        assert_same_outputs(compiled(x), model(x))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        compiled(torch.randn(3, 5, 8).double())
    assert inner.products == [4, 4]
    assert not any("conjoin.optimize" in str(each.message) for each in told), "it is said once"


def test_what_is_joined_at_each_call_is_said_too():
    layers = nn.ModuleList(nn.Linear(4, 3) for _ in range(16))

    def model(x):
        return sum(layer(x).sin() for layer in layers)

    inner = Inner("eager")
    told = r"16 layers .* 16 of them .* joined in each call"
    with torch.no_grad(), pytest.warns(UserWarning, match=told):
        compiled_by(model, inner)(torch.randn(2, 4))
    assert inner.products == [1]


def test_nothing_is_said_where_optimize_would_gain_nothing():
    model = nn.Sequential(conjoin.nn.Parallel(nn.Linear(2048, 2048), nn.Linear(2048, 2048)))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled_by(model, Inner("eager"))(torch.randn(64, 2048))


class Normalized(nn.Module):
    """Convolutions with GroupNorms, of which no mode is asked; some behind code of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = self.heads(3), self.heads(8)

    def heads(self, inputs):
        return nn.ModuleList(
            nn.Sequential(nn.Conv2d(inputs, 4, 1), nn.GroupNorm(2, 4)) for _ in range(2)
        )

    def forward(self, x):
        y = torch.cat([head(x).sin() for head in self.first], 1)
        return torch.cat([head(y).cos() for head in self.second], 1)


class Asking(nn.Module):
    """Heads, and a block whose code tells shapes apart."""

    def __init__(self):
        super().__init__()
        self.block = ActorCritic()
        self.mean, self.spread = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.block(x * 2), self.mean(x).sin(), self.spread(x).cos()


def graphs_made(model, x, backend, dynamic):
    """How many graphs are compiled for other batches, in both modes, with gradients and without."""
    torch.compiler.reset()
    inner = Inner("eager")
    if backend == "conjoin":
        compiled = compiled_by(model, inner, dynamic=dynamic)
    else:
        compiled = torch.compile(model, backend=inner, dynamic=dynamic)
    for mode in (True, False, True):
        compiled(x)
        with torch.no_grad():
            compiled(x)
        model.train(mode)
    for batch in (3, 4):
        compiled(x.repeat(batch, *(1 for _ in x.shape[1:])))
    for trains in (False, True):
        for parameter in model.parameters():
            parameter.requires_grad_(trains)
        compiled(x)
    return len(inner.graphs)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("attention", None),
        ("attention", True),
        ("pyramid", None),
        ("pyramid", False),
        ("experts", None),
        ("experts", True),
        ("normalized", None),
        ("asking", None),
    ],
)
def test_no_recompilation_that_the_plain_model_would_not_have(name, dynamic):
    shapes = {"attention": (Attention, (2, 5, 8)), "pyramid": (Pyramid, (2, 8))}
    shapes |= {"normalized": (Normalized, (2, 3, 5, 4)), "asking": (Asking, (2, 6))}
    make, shape = {**shapes, "experts": (Experts, (2, 6))}[name]
    model = make().double()
    x = torch.randn(shape).double()
    fused = optimized(model, (x,))
    expected = graphs_made(model, x, "plain", dynamic)
    assert graphs_made(fused, x, "conjoin", dynamic) == expected
    assert graphs_made(fused, x, "plain", dynamic) == expected


def test_stock_inductor_runs_the_pass_and_its_cache_knows_it():
    model = Attention().double()
    x = torch.randn(2, 5, 8).double()
    fused = optimized(model, (x,))
    pre_grad = PreGradPass()
    graphs = []

    class Watched(PreGradPass):
        def __call__(self, graph):
            super().__call__(graph)
            graphs.append(sum(node.target in functional.PRODUCTS for node in graph.nodes))

    # Of PyTorch 2.11, Inductor's flash attention on CPUs goes back in no float64.
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch._inductor.config.patch(pre_grad_custom_pass=Watched(), fx_graph_cache=False),
    ):
        assert_same_steps(model, fused, torch.compile(fused), (x,))
    assert graphs == [2]
    assert pre_grad.uuid() == PreGradPass().uuid() != ""


def test_the_cache_knows_every_file_of_the_library():
    known = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] == "conjoin"
    }
    files = {str(Path(module.__file__).resolve()) for module in known.values()}
    assert "conjoin.passes.cancel" in known
    assert files <= {*sources()}


class ChangesAnInput(nn.Module):
    """One input is changed between the products of the other."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, other):
        if x.shape[0] > 100:
            raise ValueError("too many")
        q = self.q(x)
        other.mul_(2)
        return q, self.k(x)


def test_inputs_that_lie_in_one_memory_on_a_later_call_only():
    model = ChangesAnInput().double()
    x, other = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    compiled = compiled_by(optimized(model, (x.clone(), other.clone())), Inner("eager"))
    with torch.no_grad():
        compiled(x.clone(), other)
        ours, theirs = x.clone(), x.clone()
        assert_same_outputs(compiled(ours, ours.view(3, 4)), model(theirs, theirs.view(3, 4)))


class Converted(nn.Module):
    """A sibling reads the same tensor as the other, by way of a conversion."""

    def __init__(self, convert):
        super().__init__()
        self.a, self.b, self.convert = nn.Linear(4, 3), nn.Linear(4, 5), convert

    def forward(self, x):
        if x.dim() > 9:
            raise ValueError
        h = x.sin()
        return self.a(h), self.b(self.convert(h))


@pytest.mark.parametrize(
    ("convert", "left"),
    [
        (lambda h: h.to(torch.float64), 1),
        (lambda h: h.to(h.device, h.dtype), 1),
        (lambda h: h.type_as(h.cos()), 1),
        (lambda h: h.double(), 1),
        (lambda h: h.to(torch.float64, copy=True), 2),
        (lambda h: h.to(torch.float32).to(torch.float64), 2),
    ],
    ids="dtype device type_as double copy rounded".split(),
)
def test_a_conversion_that_changes_nothing_hides_no_sibling(convert, left):
    model = Converted(convert).double()
    fused = copy.deepcopy(model)
    fuse(conjoin.layers.kind_of(fused.a), [fused.a, fused.b], fused)
    inner = Inner()
    compiled = compiled_by(fused, inner)
    for batch in (3, 5):
        assert_same_steps(model, fused, compiled, (torch.randn(batch, 4).double(),))
    assert {*inner.products} == {left}


class Pyramid(nn.Module):
    """Two branches whose second layers are a stack, and two whose second layers are unlike."""

    def __init__(self):
        super().__init__()
        widths = (6, 6, 5, 4)
        self.first = nn.ModuleList(nn.Linear(8, width) for width in widths)
        self.second = nn.ModuleList(nn.Linear(width, width) for width in widths)

    def forward(self, x):
        return [
            second(F.relu(first(x))) for first, second in zip(self.first, self.second, strict=True)
        ]


class Experts(nn.Module):
    """Many small experts behind a graph break, so that nothing traces; their outputs are joined."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU()) for _ in range(16)
        )

    def forward(self, x):
        if x.sum() > 1e9:
            raise ValueError("too large")
        return torch.stack([expert(x) for expert in self.experts], 1).softmax(1).sum(1)


def kept_for_backward(model, x):
    """The types and sizes that a step of training keeps, as Inductor divides it."""
    kept = []

    def forward(graph_module, inputs):
        (output,) = graph_module.graph.find_nodes(op="output")
        made = [each for each in output.args[0] if each.op.startswith("call")]
        kept.extend(each.meta["val"] for each in made)
        return make_boxed_func(graph_module.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph_module, inputs: make_boxed_func(graph_module.forward),
        partition_fn=partition_fn,
        decompositions=select_decomp_table(),
    )
    torch.compile(model, backend=backend)(x)
    return kept


def test_a_step_of_training_keeps_nothing_twice():
    model = Pyramid()
    x = torch.randn(3, 8)
    plain, ours = (kept_for_backward(each, x) for each in (model, optimized(model, (x,))))
    assert {each.dtype for each in ours} == {torch.float32}, "no masks"
    assert sum(t.numel() for t in ours) <= sum(t.numel() for t in plain)


class Called(nn.Module):
    """What it is called with is more than tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, inputs, mode="sum", times=1):
        x = inputs["x"] * times
        return self.a(x) + self.b(x) if mode == "sum" else self.a(x) * self.b(x)


@pytest.mark.parametrize("mode", ["sum", "product"])
def test_a_rewritten_forward_is_found_for_arguments_of_other_types(mode):
    model = Called().double()
    call = {"x": torch.randn(3, 4).double()}, mode
    inner = Inner()
    compiled = torch.compile(optimized(model, call), backend=inner, fullgraph=True)
    assert_same_outputs(compiled(*call), model(*call))
    assert inner.products == [1]


@pytest.mark.parametrize("numbers", [(1, 2, 3, 4), (0.5, 1.5, 2.5)], ids=["whole", "with a point"])
def test_no_compilation_for_each_number(numbers):
    model = Called().double()
    inputs = {"x": torch.randn(3, 4).double()}
    fused = optimized(model, [(inputs, "sum", number) for number in numbers])
    seen = []
    for each in (model, fused):
        torch.compiler.reset()
        inner = Inner()
        compiled = torch.compile(each, backend=inner)
        for number in numbers:
            call = inputs, "sum", number
            assert_same_outputs(compiled(*call), model(*call))
        seen.append(len(inner.graphs))
    assert seen[0] == seen[1]


class Space:
    """What an agent observes."""

    def __init__(self):
        self._shape = (6,)

    @property
    def shape(self):
        return self._shape


class Agent(nn.Module):
    """Branches of two layers, behind a question to an object that holds a tuple."""

    def __init__(self):
        super().__init__()
        self.space = Space()
        self.first = nn.ModuleList(nn.Linear(6, 8) for _ in range(2))
        self.second = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x):
        x = x.flatten(1) if len(self.space.shape) == 1 else x
        branches = zip(self.first, self.second, strict=True)
        return tuple(second(first(x).tanh()) for first, second in branches)


def test_a_rewritten_forward_is_found_where_an_object_holds_a_tuple():
    x = torch.randn(4, 6, dtype=torch.float64)
    model = Agent().double()
    inner = Inner()
    fused = conjoin.optimize(model, (x,), policy="always")
    with torch.no_grad():
        assert_same_outputs(compiled_by(fused, inner)(x), model(x))
    assert inner.products == [1]  # Behind it there is one batched product.
    fused.space._shape = (6, 1)
    with torch.no_grad():
        assert_same_outputs(compiled_by(fused, Inner())(x), model(x))


class Read(nn.Module):
    """Siblings whose outputs are read by something that depends on how they lie in memory."""

    def __init__(self, read):
        super().__init__()
        self.a, self.b, self.read = nn.Linear(4, 6), nn.Linear(4, 6), read

    def forward(self, x):
        if x.dim() > 9:
            raise ValueError
        return self.read(self.a(x)), self.read(self.b(x))


READ = {
    "heads": (lambda y: y.view(-1, 2, 3).transpose(0, 1).sin(), 0),
    "heads of one size": (lambda y: y.unflatten(-1, (2, 3)).matmul(y.view(-1, 3, 2)), 0),
    "flat": (lambda y: y.view(-1).sin(), 2),
    "flat, copied where it must be": (lambda y: y.reshape(-1).sin(), 2),
    "contiguous": (lambda y: y.contiguous().view(-1).sin(), 2),
    "leaves": (lambda y: y.view(-1, 2, 3), 2),
    "asked": (lambda y: y.view(-1, 2, 3).exp() * y.stride(0), 0),
    "strides that are given": (lambda y: y.as_strided((2, 3), (6, 1)).sin(), 2),
    "an offset that is given": (lambda y: y.as_strided((2, 3), (3, 1), 1).sin(), 2),
    "strides that go on": (lambda y: y.view(-1, 2, 3).transpose(0, 1) + 1, 0),
}
"""What reads a part, and how many copies are needed."""


@pytest.mark.parametrize(("read", "copies"), READ.values(), ids=READ)
def test_parts_are_copied_only_where_somebody_could_tell(read, copies):
    model = Read(read).double()
    calls = [(torch.randn(n, 4).double(),) for n in (3, 5, 7)]
    fused = copy.deepcopy(model)
    conjoin.layers.fusing.fuse(conjoin.layers.kind_of(fused.a), [fused.a, fused.b], fused)
    inner = Inner()
    compiled = compiled_by(fused, inner, fullgraph=True)
    for args in calls:
        assert_same_outputs(compiled(*args), model(*args))
        ours, theirs = dict(tensors(compiled(*args))), dict(tensors(model(*args)))
        assert [t.stride() for t in ours.values()] == [t.stride() for t in theirs.values()]
    assert set(inner.products) == {1}
    assert {sum(n.target == "clone" for n in graph.nodes) for graph in inner.graphs} == {copies}


class Branches(nn.Module):
    """Layers of one kind on one tensor."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        if x.dim() > 9:
            raise ValueError
        return [layer(x).sin() for layer in self.layers]


def _numbers(n):
    return (torch.randint(10, (n, 3)),)


def _image(n):
    return (torch.randn(n, 4, 5, 5).double(),)


KINDS = {
    "transposed": ([nn.ConvTranspose2d(4, w, 2, bias=w > 1) for w in (2, 3, 2)], _image, 1),
    "transposed of some settings": (
        [nn.ConvTranspose2d(4, w, 3, 2, 1, 1, dilation=2) for w in (2, 5)],
        _image,
        1,
    ),
    "tables": ([nn.Embedding(10, 4) for _ in range(3)], _numbers, 1),
    "tables with padding": ([nn.Embedding(10, 4, padding_idx=2) for _ in range(3)], _numbers, 1),
    "tables of several widths": ([nn.Embedding(10, 4 + i) for i in range(2)], _numbers, 2),
    "groups": ([nn.Conv2d(4, 6, 3, groups=2) for _ in range(3)], _image, 1),
    "depthwise": ([nn.Conv2d(4, 4, 3, groups=4, bias=False) for _ in range(2)], _image, 1),
    "groups on a large image": (
        [nn.Conv2d(4, 4, 3, groups=2) for _ in range(2)],
        lambda n: (torch.randn(n, 4, 99, 99).double(),),
        2,
    ),
}
"""Layers, what they read for a batch, and how many calls are left."""

CALLS = ("conv2d", "conv_transpose2d", "embedding", "read_stack")
"""The names of the functions that do the work of such layers."""


@pytest.mark.parametrize("training", [True, False], ids=["training", "forward"])
@pytest.mark.parametrize("name", KINDS)
def test_views_of_every_kind_are_one_call_again(name, training):
    layers, inputs, expected = KINDS[name]
    model = Branches(*copy.deepcopy(layers)).double()
    calls = [inputs(n) for n in (3, 2, 5)]
    fused = copy.deepcopy(model)
    fuse(conjoin.layers.kind_of(fused.layers[0]), [*fused.layers], fused)
    inner = Inner()
    compiled = compiled_by(fused, inner, fullgraph=True)
    for args in calls:
        if training:
            assert_same_steps(model, fused, compiled, args)
        else:
            with torch.no_grad():
                assert_same_outputs(compiled(*args), model(*args))
    counts = {sum(hazards.called(n) in CALLS for n in g.nodes) for g in inner.graphs}
    assert counts == {expected}


class Gated(nn.Module):
    """Depthwise convolutions, of which a rewritten forward makes one where that pays."""

    def __init__(self):
        super().__init__()
        self.value, self.gate = (nn.Conv2d(4, 4, 3, padding=1, groups=4) for _ in range(2))

    def forward(self, x):
        return self.value(x) * torch.sigmoid(self.gate(x))


class Checkpointed(nn.Module):
    """Attention whose activations are computed anew for the backward pass."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return x + checkpoint(self.attention, x.sin(), use_reentrant=False)


class Accumulating(nn.Module):
    """Layers whose outputs are changed in place between the calls of others, on what they gave."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 4) for _ in range(3))
        self.d, self.e = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if x.dim() > 9:
            raise ValueError
        found = self.b(x)
        found += self.a(x).relu_()
        found.mul_(0.5)
        outputs = found.new_zeros(3, *found.shape)
        outputs[0] = self.d(found)
        outputs[1] = self.e(found)
        return outputs, self.c(x).clamp_(-1, 1)


REWRITTEN = {
    "gated": (Gated, lambda n: (torch.randn(n, 4, 5, 5).double(),), 1),
    "checkpointed": (Checkpointed, lambda n: (torch.randn(n, 5, 8).double(),), 2),
    "accumulating": (Accumulating, lambda n: (torch.randn(n, 8).double(),), 2),
}
"""Models, what they read for a batch, and the products that are left."""


@pytest.mark.parametrize("name", REWRITTEN)
def test_products_that_a_graph_holds_in_another_way(name):
    make, inputs, products = REWRITTEN[name]
    model = make().double()
    fused = conjoin.optimize(model, inputs(3), policy="always")
    names = []

    def inner(graph_module, example_inputs):
        graphs = [each for each in graph_module.modules() if isinstance(each, fx.GraphModule)]
        names.append([hazards.called(n) for graph in graphs for n in graph.graph.nodes])
        return lookup_backend("aot_eager")(graph_module, example_inputs)

    compiled = compiled_by(fused, inner, fullgraph=True)
    for batch in (3, 2):
        assert_same_steps(model, fused, compiled, inputs(batch))
    for found in names:
        assert sum(each in ("linear", "conv2d") for each in found) == products
        assert "cat" not in found
