"""optimize, unfuse and report: what they promise of the model as a whole."""

import copy
import functools
import threading

import pytest
import torch
from equivalence import (
    assert_close,
    assert_equivalent,
    assert_same_state,
    assert_same_structure,
    same_bits,
)
from families import wide_runs
from torch import nn

import conjoin
from conjoin.layers.view import View, views


class VAE(nn.Module):
    """Two heads, a method besides forward, an optional argument, and a layer by itself."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3)
        self.mean, self.deviation = nn.Conv2d(4, 3, 2), nn.Conv2d(4, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.note = ["kept"]

    def encode(self, x):
        h = self.stem(x).relu()
        return self.norm(self.mean(h)), self.deviation(h)

    def forward(self, x, noise=False):
        mean, deviation = self.encode(x)
        return mean + deviation.exp() * torch.randn_like(mean) if noise else (mean, deviation)


class Straight(VAE):
    def forward(self, x):
        return self.encode(x)


@pytest.fixture(params=[VAE, Straight])
def model(request):
    return request.param().double()


@pytest.fixture
def x():
    return torch.randn(3, 1, 6, 6, dtype=torch.float64)


@pytest.fixture(params=["traced", "observed"])
def inputs(request, x):
    return (x,) if request.param == "observed" else None


@pytest.fixture
def optimized(model, x):
    return conjoin.optimize(model, (x,))


def test_same_function(model, inputs, x):
    optimized = conjoin.optimize(model, inputs)
    assert_equivalent(optimized, model, (x,))
    assert_same_state(optimized, model)
    assert isinstance(optimized, type(model))
    assert type(optimized).__name__ == type(model).__name__
    assert optimized.note == ["kept"]


@pytest.mark.parametrize("last", [False, True])
def test_channels_last(model, x, last):
    model = model.to(memory_format=torch.channels_last) if last else model
    x = x.to(memory_format=torch.channels_last)
    assert_equivalent(conjoin.optimize(model, (x,)), model, (x,))


def test_other_methods_gain_too(optimized, model, x):
    with wide_runs() as runs:
        outputs = optimized.encode(x)
    assert len(runs) == 1
    assert_close(dict(enumerate(outputs)), dict(enumerate(model.encode(x))))


def test_without_inplace_the_model_stays_as_it_is(model, x, inputs):
    before = copy.deepcopy(model)
    held = [id(p) for p in model.parameters()]
    optimized = conjoin.optimize(model, inputs)
    assert optimized is not model
    assert [id(p) for p in model.parameters()] == held
    assert_same_structure(model, before)
    assert_same_state(model, before)
    optimized.mean.weight.detach().zero_()
    assert_same_state(model, before)


def test_inplace_gives_the_same_object(model, x, inputs):
    children = dict(model.named_modules())
    before = copy.deepcopy(model)
    optimized = conjoin.optimize(model, inputs, inplace=True)
    assert optimized is model
    assert all(model.get_submodule(name) is child for name, child in children.items())
    assert_equivalent(model, before, (x,))
    assert conjoin.unfuse(model, inplace=True) is model
    assert_same_structure(model, before)
    assert_same_state(model, before)


def test_a_second_time_changes_nothing(optimized, x, inputs):
    wide = optimized.mean.wide_layer
    again = conjoin.optimize(optimized, inputs, inplace=True)
    assert again is optimized
    assert again.mean.wide_layer is again.deviation.wide_layer is wide
    copied = conjoin.optimize(optimized, inputs)
    assert type(copied) is type(optimized)
    assert_same_structure(copied, optimized)
    assert_equivalent(copied, optimized, (x,))


def test_a_second_time_takes_in_what_has_changed(optimized, model, x):
    for each in (optimized, model):
        torch.manual_seed(0)
        each.mean = nn.Conv2d(4, 5, 2).double()
        each.norm = nn.Identity()
    again = conjoin.optimize(optimized, (x,))
    assert again.mean.wide_layer is again.deviation.wide_layer
    assert_equivalent(again, model, (x,))
    assert_same_state(again, model)


def test_the_way_back(optimized, model):
    plain = conjoin.unfuse(optimized)
    assert type(plain) is type(model)
    assert list(plain.state_dict()) == list(model.state_dict())
    assert_same_structure(plain, model)
    assert_same_state(plain, model)
    assert isinstance(optimized.mean, View)
    assert not list(views(plain))


def test_the_way_back_has_the_trained_values(optimized, model, x):
    for each in (optimized, model):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            sum((output - 1).square().sum() for output in each(x)).backward()
            optimizer.step()
    plain = conjoin.unfuse(optimized)
    assert_close(plain.state_dict(), model.state_dict())
    for name, value in plain.state_dict().items():
        assert same_bits(value, optimized.state_dict()[name])


def test_a_plain_model_has_no_way_to_go(model):
    plain = conjoin.unfuse(model)
    assert plain is not model
    assert type(plain) is type(model)
    assert_same_state(plain, model)
    assert conjoin.unfuse(model, inplace=True) is model


def test_checkpoints_go_both_ways(optimized, model):
    other = type(model)().double()
    optimized.load_state_dict(other.state_dict())
    assert_same_state(optimized, other)
    model.load_state_dict(optimized.state_dict())
    assert_same_state(model, other)


@pytest.mark.parametrize("observed", [False, True])
def test_the_meta_device(x, observed):
    model = Straight().double()
    inputs = (x.to("meta"),) if observed else None
    optimized = conjoin.optimize(copy.deepcopy(model).to("meta"), inputs)
    assert all(p.is_meta for p in optimized.parameters())
    assert optimized.mean.wide_layer is optimized.deviation.wide_layer
    optimized.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert_equivalent(optimized, model, (x,))


def test_a_model_built_under_the_meta_device(x):
    with torch.device("meta"):
        optimized = conjoin.optimize(Straight())
    model = Straight()
    optimized.load_state_dict(model.state_dict(), assign=True)
    assert_equivalent(optimized.double(), model.double(), (x,))


@pytest.mark.parametrize("cls", [VAE, Straight])
def test_running_on_the_meta_device(cls, x):
    optimized = conjoin.optimize(cls().double(), (x,)).to("meta")
    assert all(output.is_meta for output in optimized(x.to("meta")))
    assert all(output.is_meta for output in optimized.encode(x.to("meta")))


def test_a_layer_is_no_model_with_siblings(x):
    layer = nn.Linear(4, 3)
    optimized = conjoin.optimize(layer)
    assert type(optimized) is nn.Linear
    assert conjoin.report(layer, (torch.zeros(2, 4),)).groups == ()


BAD_INPUTS = {
    "tensor": (torch.zeros(1), r"such as \(x,\), or a list of such tuples, not Tensor"),
    "dict": ({"x": 1}, "not dict"),
    "list of tensors": ([torch.zeros(1)], r"such as \(x,\).* not Tensor"),
    "number": (3, "not int"),
}


@pytest.mark.parametrize("function", [conjoin.optimize, conjoin.report])
@pytest.mark.parametrize(("given", "words"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_wrong_example_inputs(model, function, given, words):
    with pytest.raises(TypeError, match=words):
        function(model, given)


BAD_KWARGS = {"list": ([], "not list"), "text": ("x", "not str"), "keys": ({1: 2}, "other keys")}


@pytest.mark.parametrize(("given", "words"), BAD_KWARGS.values(), ids=BAD_KWARGS)
def test_wrong_example_kwargs(model, x, given, words):
    for function in (conjoin.optimize, conjoin.report, functools.partial(conjoin.verify, model)):
        for inputs in (None, (x,)):
            with pytest.raises(TypeError, match=f"example_kwargs is a dict .*{words}"):
                function(model, inputs, example_kwargs=given)


@pytest.mark.parametrize("function", [conjoin.optimize, conjoin.unfuse, conjoin.report])
@pytest.mark.parametrize(
    ("given", "words"),
    [(VAE, "the class VAE"), (None, "NoneType"), ({"state": 1}, "dict"), (len, "builtin_function")],
)
def test_no_model(function, given, words):
    with pytest.raises(TypeError, match=rf"expected a torch\.nn\.Module as model, not {words}"):
        function(given)


def test_a_model_that_cannot_be_copied(model, x):
    model.kept = x.clone().requires_grad_() * 2
    with pytest.raises(ValueError, match=r"cannot be copied .* Pass inplace=True"):
        conjoin.optimize(model)
    optimized = conjoin.optimize(model, inplace=True)
    with pytest.raises(ValueError, match="cannot be copied"):
        conjoin.unfuse(optimized)
    assert conjoin.unfuse(optimized, inplace=True) is model


class OwnCopy(nn.Linear):
    def __deepcopy__(self, memo):
        raise LookupError("not this one")


def test_a_model_whose_own_code_does_not_copy_it():
    model = nn.Sequential(OwnCopy(4, 3))
    for function in (conjoin.optimize, conjoin.unfuse):
        with pytest.raises(ValueError, match=r"copied \(LookupError: not this one\). Pass inplace"):
            function(model)


def test_a_graph_that_does_not_lint_is_not_unfused():
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(4, 3)))
    delattr(traced, "0")
    with pytest.raises(ValueError, match="the graph is not sound"):
        conjoin.unfuse(traced)


def test_a_model_that_cannot_be_copied_is_traced_and_not_run(model, x):
    model.lock = threading.Lock()
    report = conjoin.report(model, (x,))
    assert [group.layers for group in report.groups] == [("mean", "deviation")]
    assert report.launches.before.forward is None
    assert "cannot be copied" in report.untraced[0].why
    with pytest.raises(ValueError, match=r"cannot be copied .* Pass inplace=True"):
        conjoin.optimize(model, (x,))
    assert conjoin.optimize(model, (x,), inplace=True).mean.wide_layer


def test_an_optimizer_built_before_a_sibling_is_taken_out_is_warned_of(optimized):
    with pytest.warns(UserWarning, match="build the optimizer after this"):
        optimized.mean.requires_grad_(False)


def test_plain_and_optimized_report_agree(model, optimized, x):
    plain, fused = conjoin.report(model, (x,)), conjoin.report(optimized, (x,))
    assert plain == fused
    assert str(plain) == str(fused)
    assert plain.launches.before.forward > plain.launches.after.forward
    assert plain.launches.before.backward > plain.launches.after.backward
    (group,) = plain.groups
    assert (group.kind, group.layers, group.fused) == ("Conv2d", ("mean", "deviation"), True)
    assert (group.reason, group.detail, group.widths) == (None, "", (3, 3))


class Columns(nn.Module):
    """Tables that read a column each, and towers: what a rewritten forward merges."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(5, 4) for _ in range(8))
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 1)) for _ in range(2)
        )

    def forward(self, columns):
        x = torch.cat([table(columns[:, i]) for i, table in enumerate(self.tables)], 1)
        return [tower(x) for tower in self.towers]


def test_without_inputs_a_dry_run_tells_what_is_merged():
    model = Columns()
    told = conjoin.report(model).groups
    assert {*told} == {*conjoin.report(conjoin.optimize(model)).groups}
    assert [(group.kind, len(group.layers), group.fused) for group in told] == [
        ("Embedding", 8, True),
        ("Linear", 2, True),
        ("Linear", 2, True),
    ]


def test_without_inputs_nothing_is_counted(model, optimized):
    for each in (model, optimized):
        report = conjoin.report(each)
        counts = report.launches
        assert {counts.before.forward, counts.before.backward} == {None}
        assert {counts.after.forward, counts.after.backward} == {None}


@pytest.mark.parametrize("training", [True, False])
def test_a_report_changes_nothing(model, x, training):
    model.train(training)
    before = copy.deepcopy(model)
    conjoin.report(model, (x,))
    conjoin.report(model)
    assert_same_structure(model, before)
    assert_same_state(model, before)
    assert all(module.training is training for module in model.modules())


class ChangesItsInput(VAE):
    """Runs, but has no gradients: what `mean` read is changed."""

    def forward(self, x):
        h = self.stem(x)
        mean = self.mean(h)
        h.add_(1)
        return mean, self.deviation(h)


def test_a_model_without_a_backward_pass_is_reported(x):
    (group,) = conjoin.report(ChangesItsInput().double(), (x,)).groups
    assert group.reason is conjoin.Reason.INPUT_MUTATED


class PartlyScripted(nn.Module):
    """Of which a part is no Python"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.ReLU()))

    def forward(self, x):
        return self.scripted(self.a(x)), self.scripted(self.b(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("observed", [True, False])
def test_scripted_modules_stay(observed):
    model, x = PartlyScripted(), torch.randn(3, 4)
    fused = conjoin.optimize(model, (x,) if observed else None)
    assert [group.layers for group in conjoin.report(fused).groups if group.fused] == [("a", "b")]
    assert conjoin.verify(model, fused, (x,))
    # PyTorch 2.13 copies what is scripted with the history of its parameters.
    assert all(parameter.grad is None for parameter in model.parameters())


def test_public_names():
    assert all(hasattr(conjoin, name) for name in conjoin.__all__)


class DropsLayers(nn.Module):
    """Leaves out layers at random in training."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(conjoin.nn.Parallel(*_heads()) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            if not self.training or float(torch.rand(())) > 0.5:
                x = x + sum(layer(x))
        return x


def _heads():
    return [nn.Linear(4, 4) for _ in range(3)]


def test_layers_that_are_left_out_at_random_are_the_same_in_all_counts():
    model, x = DropsLayers(), torch.randn(2, 4)
    reports = set()
    for seed in range(6):
        torch.manual_seed(seed)
        reports.add(str(conjoin.report(model, (x,))))
        assert torch.equal(torch.rand(3), torch.rand(3, generator=_stream(seed)))
    assert len(reports) == 1


def _stream(seed):
    return torch.Generator().manual_seed(seed)
