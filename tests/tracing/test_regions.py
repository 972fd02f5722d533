"""A rewritten forward is the original on every call; golden files show the new source.

`CONJOIN_REGENERATE=1 pytest tests/tracing/test_regions.py` writes the golden files anew.
"""

import copy
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from counting import count as counted
from equivalence import assert_close, assert_equivalent, assert_same_state, tensors
from families import wide_runs
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import conjoin
from conjoin.launches import count_step
from conjoin.layers.view import wides
from conjoin.nn import Parallel, Split, Unite
from conjoin.tracing.plans import PLAN
from conjoin.tracing.regions import Region, install, uninstall

GOLDEN = Path(__file__).parents[1] / "golden"


class Heads(nn.Module):
    """An encoder with two heads, and all that may change after it was optimized."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.mean, self.deviation = nn.Linear(6, 3), nn.Linear(6, 2)
        self.tail = nn.ModuleList([nn.Linear(3, 3), nn.Tanh()])
        self.scale = 2.0
        self.offset = None

    def forward(self, x, factor=1.0):
        h = self.stem(x).relu()
        mean, deviation = self.mean(h), self.deviation(h)
        for layer in self.tail:
            mean = layer(mean)
        return mean * self.scale * factor, deviation


class Towers(nn.Module):
    """Siblings inside containers that the new forward goes past."""

    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
        self.critics = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 1)) for _ in range(2)
        )

    def forward(self, x):
        return self.actor(x), [critic(x) for critic in self.critics]


class Attention(nn.Module):
    """Projections of different widths, and more of them on another tensor."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, width, bias=False) for width in (8, 4, 4))
        self.up, self.gate, self.down = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (2, 4))
        k, v = self.k(x).unsqueeze(-2), self.v(x).unsqueeze(-2)
        y = ((q * k).softmax(-1) * v).flatten(-2)
        return x + self.down(self.up(y) * self.gate(y).sigmoid())


class Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.ReLU(), Parallel(nn.Conv2d(4, 2, 2), nn.Conv2d(4, 2, 2))
        )

    def forward(self, x):
        mean, deviation = self.encoder(x)
        return mean.flatten(1), deviation.flatten(1)


def vector(model):
    return torch.randn(3, 4, dtype=next(model.parameters()).dtype)


def image(model):
    return torch.randn(3, 1, 6, 6, dtype=next(model.parameters()).dtype)


MODELS = {"heads": Heads, "towers": Towers, "attention": Attention, "digits": Digits}
every_model = pytest.mark.parametrize("name", MODELS)


def build(name):
    return MODELS[name]().double()


def input_of(model):
    return image(model) if isinstance(model, Digits) else vector(model)


def regions(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, Region)}


@every_model
def test_golden_source(name):
    model = conjoin.optimize(build(name), (input_of(build(name)),))
    text = "\n".join(
        f"# {region or 'the model'}: {type(module).__name__}\n"
        f"{next(iter(vars(module)[PLAN].variants.values()))[0].traced.function.__conjoin_source__.strip()}\n"
        for region, module in regions(model).items()
    )
    path = GOLDEN / f"forward_{name}.txt"
    if os.environ.get("CONJOIN_REGENERATE"):
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


@every_model
def test_same_function_in_fewer_runs(name):
    model = build(name)
    x = input_of(model)
    optimized = conjoin.optimize(model, (x,))
    assert regions(optimized)
    assert type(optimized).__name__ == type(model).__name__
    assert_equivalent(optimized, model, (x,))
    with wide_runs() as runs:
        optimized(x)
    assert len(runs) == len(set(runs)) > 0


@every_model
def test_copies(name):
    model = build(name)
    x = input_of(model)
    optimized = conjoin.optimize(model, (x,))
    stream = io.BytesIO()
    torch.save(optimized, stream)
    stream.seek(0)
    for each in (
        copy.deepcopy(optimized),
        pickle.loads(pickle.dumps(optimized)),
        torch.load(stream, weights_only=False),
    ):
        assert_equivalent(each, model, (x,))
        assert_same_state(each, model)
        each(x)
        assert all(vars(region).get(PLAN) for region in regions(each).values())
        plain = conjoin.unfuse(each)
        assert type(plain) is type(model)
        assert_same_state(plain, model)


@every_model
def test_conversion(name):
    model = build(name)
    optimized = conjoin.optimize(model, (input_of(model),))
    assert_equivalent(optimized.float(), model.float(), (input_of(model),))


@every_model
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(name, backend):
    model = build(name)
    x = input_of(model)
    optimized = conjoin.optimize(model, (x,))
    torch._dynamo.reset()
    compiled = torch.compile(optimized, backend=backend, fullgraph=True)
    same_outputs(compiled, model, x)
    sum(output.sum() for _, output in tensors(compiled(x))).backward()
    assert all(parameter.grad is not None for parameter in optimized.parameters())


@every_model
def test_export(name):
    model = build(name)
    x = input_of(model)
    optimized = conjoin.optimize(model, (x,))
    same_outputs(torch.export.export(optimized, (x,)).module(), model, x)


def same_outputs(actual, expected, *args, **kwargs):
    found = [dict(tensors(model(*args, **kwargs))) for model in (actual, expected)]
    assert_close(*found, "output")


TRANSFORMS = {
    "vmap": lambda model, x: torch.func.vmap(model)(x),
    "vmap over a batch": lambda model, x: torch.func.vmap(model)(torch.stack([x, x + 1])),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
    "jacfwd": lambda model, x: torch.func.jacfwd(model)(x),
    "hessian": lambda model, x: torch.func.hessian(lambda x: model(x)[0].square().sum())(x),
    "functional_call": lambda model, x: torch.func.functional_call(
        model, {name: value * 2 for name, value in model.named_parameters()}, (x,)
    ),
    "no_grad": lambda model, x: torch.no_grad()(model)(x),
    "inference_mode": lambda model, x: torch.inference_mode()(model)(x),
    "checkpoint": lambda model, x: torch.utils.checkpoint.checkpoint(
        model, x.requires_grad_(), use_reentrant=False
    ),
    "keyword": lambda model, x: model(x=x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform):
    model = build("heads")
    x = vector(model)
    found = [dict(tensors(transform(m, x))) for m in (conjoin.optimize(model, (x,)), model)]
    assert_close(*found)


def hook(module, args, output):
    return output * 2


def set_hook(name):
    return lambda model: model.get_submodule(name).register_forward_hook(hook)


def assign(name, value):
    def change(model):
        torch.manual_seed(0)
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, value())

    return change


def append(name, module):
    return lambda model: model.get_submodule(name).append(module())


def override_forward(model):
    model.mean.forward = lambda x: nn.functional.linear(x, model.mean.weight)


CHANGES = {
    "hook on a view": ("heads", set_hook("mean")),
    "hook on a layer": ("heads", set_hook("stem")),
    "hook on the region": ("heads", set_hook("")),
    "backward hook on a view": (
        "heads",
        lambda model: model.mean.register_full_backward_hook(lambda m, i, o: (i[0] * 2,)),
    ),
    "hook on a bypassed module": ("towers", set_hook("critics.1")),
    "sibling replaced": ("heads", assign("mean", lambda: nn.Linear(6, 3).double())),
    "sibling wrapped": ("heads", assign("mean", lambda: nn.Sequential(nn.Linear(6, 3).double()))),
    "sibling's forward replaced": ("heads", override_forward),
    "weight replaced": (
        "heads",
        assign("mean.weight", lambda: nn.Parameter(torch.ones(3, 6).double())),
    ),
    "bias removed": ("heads", assign("mean.bias", lambda: None)),
    "layer replaced": ("heads", assign("stem", lambda: nn.Linear(4, 6, bias=False).double())),
    "layer of a list replaced": ("heads", assign("tail.0", nn.Tanh)),
    "list grown": ("heads", append("tail", nn.Sigmoid)),
    "list shrunk": ("heads", lambda model: model.tail.pop(1)),
    "list reordered": ("heads", lambda model: model.tail.insert(0, model.tail.pop(1))),
    "list replaced": ("heads", assign("tail", lambda: nn.ModuleList([nn.Tanh()]))),
    "tower grown": ("towers", append("actor", nn.Sigmoid)),
    "tower replaced": ("towers", assign("actor.1", nn.ReLU)),
    "towers grown": ("towers", append("critics", lambda: nn.Tanh())),
    "constant": ("heads", assign("scale", lambda: 5.0)),
    "constant of equal value": ("heads", assign("scale", lambda: 2)),
    "evaluation mode": ("heads", lambda model: model.eval()),
    "frozen": ("heads", lambda model: model.requires_grad_(False)),
    "one sibling frozen": ("heads", lambda model: model.mean.requires_grad_(False)),
    "pruned": ("heads", lambda model: prune.l1_unstructured(model.stem, "weight", 0.5)),
    "parametrized": ("heads", lambda model: parametrizations.weight_norm(model.stem)),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("copied", [False, True], ids=["itself", "copy"])
def test_changed_afterwards(name, change, copied):
    model = build(name)
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    optimized(x)
    if copied:
        optimized = copy.deepcopy(optimized)
    for each in (model, optimized):
        change(each)
    same_outputs(optimized, model, x)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("late", [True, False], ids=["compiled before", "compiled after"])
def test_changed_under_compile(change, late):
    """Dynamo guards all that the new forward takes for granted, but for hooks, as always."""
    if late and "hook" in change:
        pytest.skip("Dynamo does not look for hooks again, in no model")
    name, changed = CHANGES[change]
    torch.compiler.reset()
    model = build(name)
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    compiled = torch.compile(optimized, backend="eager")
    if late:
        same_outputs(compiled, model, x)
    for each in (model, optimized):
        changed(each)
    same_outputs(compiled, model, x)


@pytest.mark.filterwarnings("ignore:.* is taken out of its wide layer")
def test_copied_after_a_part_was_taken_out():
    """The forward that knows all the parts is over, for the copy too."""
    towers = Towers().eval()
    optimized = conjoin.optimize(towers, (torch.randn(3, 4),))
    for each in (towers, optimized):
        each.critics[1][0].bias = nn.Parameter(torch.full((3,), 5.0))
    same_outputs(copy.deepcopy(optimized), towers, torch.randn(3, 4))


REFUSED_CHANGES = {
    "old weight_norm": lambda model: nn.utils.weight_norm(model.mean),
    "spectral_norm": lambda model: nn.utils.spectral_norm(model.mean),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("change", REFUSED_CHANGES.values(), ids=REFUSED_CHANGES)
def test_a_sibling_is_parametrized_in_the_old_way_afterwards(change):
    """It has no Parameter of its own, so PyTorch refuses; nothing has changed then."""
    model = build("heads")
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    with pytest.raises((ValueError, KeyError, TypeError)):
        change(optimized)
    same_outputs(optimized, model, x)
    change(conjoin.unfuse(optimized))


def test_a_sibling_is_parametrized_afterwards_and_taken_out():
    model = build("heads")
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    same_outputs(optimized, model, x)
    for each in (model, optimized):
        parametrizations.weight_norm(each.mean)
    same_outputs(optimized, model, x)
    same_outputs(conjoin.unfuse(optimized), model, x)


GLOBAL_HOOKS = {
    "forward": lambda: nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output * 2 if type(module).__name__ == "Linear" else None
    ),
    "forward pre": lambda: nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (args[0] * 2,) if type(module).__name__ == "Linear" else None
    ),
}


@pytest.mark.parametrize("register", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS)
def test_global_hooks(register):
    model = build("heads")
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    handle = register()
    try:
        same_outputs(optimized, model, x)
    finally:
        handle.remove()


def test_optional_arguments():
    model = build("heads")
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    same_outputs(optimized, model, x, 3.0)
    same_outputs(optimized, model, x, factor=3.0)
    same_outputs(optimized, model, x=x)


@pytest.mark.parametrize("args", [(), (1,), (torch.zeros(2, 9),)], ids=["none", "int", "shape"])
def test_wrong_calls_raise_the_same_error(args):
    model = build("heads").float()
    optimized = conjoin.optimize(model, (vector(model),))
    errors = []
    for each in (model, optimized):
        with pytest.raises((TypeError, RuntimeError)) as error:
            each(*args)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


class Between(nn.Module):
    """A sibling `p` of `q` between the siblings `a` and `b`, on an alias of what these read."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.p, self.q = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        y, other = x + 1, x * 2
        alias = y.view(3, 4)
        first = self.a(y), self.p(alias), self.b(y)
        return *first, other.add_(1), self.q(alias)


@pytest.mark.parametrize("traced", ["before", "after"])
def test_a_hook_on_a_view_between_siblings(traced):
    model = Between().double()
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    for each in (model, optimized):
        each.p.register_forward_hook(lambda module, args, output: zero(args[0]))
    if traced == "after":  # What comes out of a pickle is traced anew.
        install_anew(optimized)
    with torch.no_grad():
        same_outputs(optimized, model, x)


def zero(tensor):
    tensor.zero_()


def install_anew(model):
    uninstall(model)
    install(model)


class NoneLater(Heads):
    """A constant None that becomes a tensor, held as an attribute or as a parameter."""

    def __init__(self, registered):
        super().__init__()
        if registered:
            del self.offset
            self.register_parameter("offset", None)

    def forward(self, x):
        h = self.stem(x)
        return self.mean(h), nn.functional.linear(self.deviation(h), h[:2, :2], self.offset)


@pytest.mark.parametrize("registered", [False, True])
def test_none_becomes_a_parameter(registered):
    model = NoneLater(registered).double()
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    assert isinstance(optimized, Region)
    for each in (model, optimized):
        each.offset = nn.Parameter(torch.ones(2, dtype=torch.float64))
    same_outputs(optimized, model, x)


class Shared(Heads):
    scale_of_all = 2.0

    def forward(self, x):
        h = self.stem(x)
        return self.mean(h) * self.scale_of_all, self.deviation(h)


@pytest.mark.parametrize("on", ["the class", "the instance"])
def test_a_constant_of_the_class_is_changed(on):
    model = Shared().double()
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    for owner in [Shared] if on == "the class" else [model, optimized]:
        owner.scale_of_all = 5.0
    try:
        same_outputs(optimized, model, x)
    finally:
        Shared.scale_of_all = 2.0


def test_a_shallow_copy_has_its_own_constants():
    model = build("heads")
    x = vector(model)
    copies = [copy.copy(each) for each in (conjoin.optimize(model, (x,)), model)]
    for each in copies:
        each.scale = 5.0
    same_outputs(*copies, x)


class Named(Heads):
    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleDict({"one": nn.Tanh(), "two": nn.Linear(3, 3)})

    def forward(self, x):
        h = self.stem(x)
        mean, deviation = self.mean(h), self.deviation(h)
        for step in self.steps.values():
            mean = step(mean)
        return mean, deviation


def test_a_dict_of_modules_is_reordered():
    model = Named().double()
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    for each in (model, optimized):
        each.steps["one"] = each.steps.pop("one")
    same_outputs(optimized, model, x)


class ByHand(nn.Module):
    """Siblings written by hand, without a view."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            Split(nn.Conv2d(1, 4, 3), 2), Unite(), nn.ReLU(), nn.Sequential(nn.Dropout(0.5))
        )
        self.bodies = nn.ModuleList([nn.Sequential(Split(nn.Linear(4, 4), 2), Unite(dim=-1))])


def note(found, change=False):
    def run(graph_module):
        found.append(graph_module)
        return change

    return run


def test_regions_without_views(monkeypatch):
    found = []
    monkeypatch.setattr("conjoin.tracing.rounds.rewrite_traced", note(found, change=True))
    model = nn.Sequential(ByHand().body, nn.Flatten()).double()
    original = copy.deepcopy(model)
    install(model, meta={"sizes": 3})
    assert list(regions(model)) == ["0"]
    assert all(graph_module.meta["sizes"] == 3 for graph_module in found)
    names = [node.name for node in found[0].graph.nodes]
    assert {"cat", "getitem_1"} <= {*names}
    assert len(vars(model[0])[PLAN].variants[1]) == 2
    x = torch.randn(3, 1, 6, 6).double()
    assert_equivalent(model, original, (x,))
    for mode in (True, False):
        assert vars(model.train(mode)[0])[PLAN].find(model[0], (x,), {}) is not None
    model[0][0].sizes = (1, 3)
    assert vars(model.eval()[0])[PLAN].find(model[0], (x,), {}) is None


def test_without_a_rewrite_nothing_is_installed(monkeypatch):
    monkeypatch.setattr("conjoin.tracing.rounds.rewrite_traced", note([]))
    model = ByHand()
    install(model)
    assert not regions(model)


def test_a_pass_that_changes_classes_is_run_until_it_is_done(monkeypatch):
    """As a pass does that merges more layers: the variants are bound to the last classes."""
    model = Heads().double()
    tail = model.tail[0]
    kinds = [nn.Linear, *(type("Merged", (nn.Linear,), {}) for _ in range(2))]
    runs = []

    def merge(graph_module):
        runs.append(type(tail))
        tail.__class__ = kinds[min(kinds.index(type(tail)) + 1, 2)]
        return True

    original = copy.deepcopy(model)
    optimized = conjoin.optimize(model, (vector(model),), inplace=True)
    uninstall(optimized)
    monkeypatch.setattr("conjoin.tracing.rounds.rewrite_traced", merge)
    install(optimized)
    assert runs[-1] is kinds[2]
    assert vars(optimized)[PLAN].find(optimized, (vector(model),), {}) is not None
    assert_equivalent(optimized, original, (vector(model),))


class WithMethod(nn.Module):
    factor = 2.0

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.scaled(self.a(x)), self.b(x) * self.factor

    def scaled(self, x):
        return x * 2


@pytest.mark.parametrize(
    "content", [{"scaled": lambda self, x: x * 5}, {"factor": 5.0}], ids=["method", "constant"]
)
@pytest.mark.parametrize("how", ["itself", "copied", "compiled"])
@pytest.mark.parametrize("outer", [False, True])
def test_a_region_that_becomes_one_of_a_subclass(content, how, outer):
    """As tools do that put a class of their own between a module and its class."""
    x = torch.randn(3, 4, dtype=torch.float64)
    model = (nn.Sequential(WithMethod()) if outer else WithMethod()).double()
    optimized = conjoin.optimize(model, (x,), policy="always")
    for each in (model, optimized):
        region = each[0] if outer else each
        assert (PLAN in vars(region)) == (each is optimized)
        region.__class__ = type("Sub", (type(region),), content)
    if how == "copied":
        optimized = copy.deepcopy(optimized)
    torch.compiler.reset()
    called = torch.compile(optimized, backend="eager") if how == "compiled" else optimized
    assert_close(dict(tensors(called(x))), dict(tensors(model(x))))


class Inner(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.norm = scale, nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(x) * self.scale if self.scale > 1 else x


class Counts(Inner):
    def forward(self, x):
        self.scale += 1
        return x * self.scale


class Nested(Heads):
    """Modules of the user's: some are traced, and those that count are called."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.counts = Inner(2.0), Inner(0.5), Counts(1.0)

    def forward(self, x):
        h = self.counts(self.two(self.one(self.stem(x))))
        return self.mean(h), self.deviation(h)


def test_inner_modules_are_traced_where_that_is_sound():
    model = Nested().double()
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    assert_equivalent(optimized, model, (x,))
    [training, evaluation] = vars(optimized)[PLAN].variants[1]
    source = training.traced.function.__conjoin_source__
    assert "self._modules['one']._modules['norm'](" in source
    assert "two" not in source
    assert "self._modules['counts'](" in source
    modes = [dict(variant.traced.modes)["one.norm"] for variant in (training, evaluation)]
    assert modes == [True, False]
    for each in (model, optimized):
        each.two.scale = 3.0
    assert vars(optimized)[PLAN].find(optimized, (x,), {}) is None
    same_outputs(optimized, model, x)


class InPlaceInside(Heads):
    def __init__(self):
        super().__init__()
        self.between = nn.Sequential(nn.ReLU(inplace=True))

    def forward(self, x):
        h = self.stem(x)
        return self.mean(h), self.between(h), self.deviation(h)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_layer_that_works_in_place_inside_a_container(hooked):
    model = InPlaceInside().double()
    if hooked:
        model.between.register_forward_hook(lambda module, args, output: None)
    x = vector(model)
    optimized = conjoin.optimize(model, (x,))
    with torch.no_grad():
        same_outputs(optimized, model, x)


@pytest.mark.parametrize("protocol", [2, 5])
def test_structures_survive_a_pickle(protocol):
    model = build("heads")
    x = vector(model)
    optimized = conjoin.optimize(model, (x,), example_kwargs={"factor": 2.0})
    loaded = pickle.loads(pickle.dumps(optimized, protocol))
    assert vars(loaded)[PLAN].find(loaded, (x,), {"factor": 2.0}) is not None
    same_outputs(loaded, model, x, factor=2.0)


@pytest.mark.parametrize(("name", "count"), [("heads", 1), ("attention", 1)])
def test_one_variant_where_nothing_asks_for_the_mode(name, count):
    model = build(name)
    optimized = conjoin.optimize(model, (vector(model),))
    [variants] = vars(optimized)[PLAN].variants.values()
    assert len(variants) == count


@pytest.mark.parametrize("training", [True, False])
def test_a_norm_that_is_merged_in_a_trace_has_the_mode_of_the_model(training):
    layers = ((nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU()) for _ in range(2))
    model = Parallel(*(nn.Sequential(*each) for each in layers)).train(training)
    x = torch.randn(2, 3, 4, 4)
    fused = conjoin.optimize(model, (x,))
    held = {wide.kind.name: wide for wide in wides(fused)}
    assert all(wide.training is training for wide in held.values())
    assert not held["BatchNorm2d"].out_of_step()
    assert count_step(fused, (x,)).forward == count_step(fused.train(training), (x,)).forward


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x):
        return self.q(x) * self.scale, self.k(x)


def test_a_copy_made_past_the_regions_own_copying():
    """As `parametrize` makes it."""
    x = torch.randn(2, 6)
    optimized = conjoin.optimize(Scaled(), (x,))
    assert isinstance(optimized, Region)
    parametrize.register_parametrization(optimized, "scale", nn.Tanh())
    for ours, theirs in zip(copy.deepcopy(optimized)(x), optimized(x), strict=True):
        torch.testing.assert_close(ours, theirs)


class Level(nn.Module):
    """Experts that read tensors which one caller may give as one, as in a PLE."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)) for _ in range(4)
        )

    def forward(self, inputs):
        return [expert(inputs[position // 2]) for position, expert in enumerate(self.experts)]


class TwoLevels(nn.Module):
    def __init__(self):
        super().__init__()
        self.level, self.out = Level(), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(sum(self.level([x, x])))


@pytest.mark.parametrize("calls", [1, 0])
def test_a_tensor_handed_over_twice_is_one(calls):
    """Seen from within the level, its experts read two tensors, and run two and two."""
    model = TwoLevels().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    fused = conjoin.optimize(model, *[(x,)] * calls)
    assert counted(fused, (x,)).matmuls == 3
    assert_equivalent(fused, model, (x,))
    inputs = [x, x + 1]
    for ours, theirs in zip(fused.level(inputs), model.level(inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_stands_before_the_forward_calls_the_rewritten_one():
    """As in `model.forward = torch.compile(model.forward)`."""
    model = Heads().double()
    fused = conjoin.optimize(model, (vector(model),))
    assert isinstance(fused, Region)
    forward = fused.forward
    fused.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    x = vector(model)
    with wide_runs() as runs:
        torch.testing.assert_close(fused(x), model(x))
    assert len(runs) == 1
    for each in (fused, model):
        each.tail[0].forward = lambda x: x * 2
    torch.testing.assert_close(fused(x), model(x))
