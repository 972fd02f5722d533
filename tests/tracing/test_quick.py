"""Rewritten forwards bound to their modules: quick, and no less careful."""

import collections
import weakref
from unittest import mock

import pytest
import torch
from equivalence import assert_equivalent
from families import wide_runs
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import conjoin
from conjoin.layers.view import wides
from conjoin.layers.wide import Wide
from conjoin.tracing import regions
from conjoin.tracing.conditions import Conditions
from conjoin.tracing.sandbox.objects import MISSING


class Towers(nn.Module):
    """Everything that is called in a way of its own: side by side, apart, along, and as it is."""

    def __init__(self, biased=(True, True)):
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(5, 4, bias=bias) for bias in biased)
        self.norms = nn.ModuleList(nn.BatchNorm1d(4) for _ in biased)
        self.second = nn.ModuleList(nn.Linear(4, 3) for _ in biased)
        self.act = nn.Tanh()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        pairs = zip(self.first, self.norms, self.second, strict=True)
        parts = [second(self.act(norm(first(x)))) for first, norm, second in pairs]
        return [self.last(part) for part in parts]


def made(**settings):
    """A plain model and the same one optimized, and an input."""
    torch.manual_seed(0)
    plain, x = Towers(**settings).double(), torch.randn(6, 5, dtype=torch.float64)
    return plain, conjoin.optimize(plain, (x,), policy="always"), x


def runs_of(model, x):
    """How often the forward of a wide layer runs as such in a call."""
    with mock.patch.object(Wide, "forward", autospec=True, side_effect=Wide.forward) as forward:
        model(x)
    return forward.call_count


@pytest.mark.parametrize("biased", [(True,) * 2, (False,) * 2, (True, False, True, True)])
@pytest.mark.parametrize("training", [True, False])
def test_wide_layers_are_not_called_as_modules(biased, training):
    plain, optimized, x = made(biased=biased)
    assert_equivalent(optimized, plain, (x,))
    optimized.train(training)
    assert runs_of(optimized, x) == 0
    with wide_runs() as runs:
        optimized(x)
    assert len(runs) == 3


def hooked(wide):
    calls = []
    wide.register_forward_hook(lambda *_: calls.append(wide))
    return calls


def forward_replaced(wide):
    calls, forward = [], wide.forward

    def replaced(*args, **kwargs):
        calls.append(wide)
        return forward(*args, **kwargs)

    wide.forward = replaced
    return calls


@pytest.mark.parametrize("change", [hooked, forward_replaced])
def test_what_somebody_puts_between_a_wide_layer_and_its_forward(change):
    plain, optimized, x = made()
    optimized(x), plain(x)
    calls = [change(wide) for wide in wides(optimized)]
    assert_close(optimized(x), plain(x))
    assert [len(each) for each in calls] == [1, 1, 1]


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


def parametrized(wide):
    parametrize.register_parametrization(wide, "weight", Doubled())


def doubled_in_place(wide):
    with torch.no_grad():
        wide.weight.mul_(2)


def doubled_data(wide):
    wide.weight.data = wide.weight.data * 2


def replaced(wide):
    wide.weight = nn.Parameter(wide.weight.detach() * 2)


def dictionary_replaced(wide):
    held = dict(wide._parameters)
    wide._parameters = held
    held["weight"] = nn.Parameter(wide.weight.detach() * 2)


def all_hooks_taken_away(module):
    module._forward_hooks = collections.OrderedDict()


def all_hooks_taken_away_by_hand(module):
    vars(module)["_forward_hooks"] = collections.OrderedDict()


@pytest.mark.parametrize("away", [all_hooks_taken_away, all_hooks_taken_away_by_hand])
@pytest.mark.parametrize("path", ["first.0", "norms.1", "act", "last"])
def test_hooks_in_a_dictionary_that_somebody_made(away, path):
    plain, optimized, x = made()
    plain.eval(), optimized.eval()
    assert all(runs_of(optimized, x) == 0 for _ in range(4))
    calls = []
    for model in (plain, optimized):
        module = model.get_submodule(path)
        away(module)
        model(x)
        module.register_forward_hook(lambda *_, model=model: calls.append(model))
    assert_close(optimized(x), plain(x))
    assert calls.count(optimized) == calls.count(plain) > 0


CHANGES = (parametrized, doubled_in_place, doubled_data, replaced, dictionary_replaced)


@pytest.mark.parametrize("change", CHANGES)
def test_a_wide_weight_that_is_changed_later(change):
    plain, optimized, x = made()
    plain.eval()(x), optimized.eval()(x)
    for wide in wides(optimized):
        if wide.kind.layer is nn.Linear:
            change(wide)
    for layer in (*plain.first, *plain.second):
        layer.weight.data *= 2
    assert_close(optimized(x), plain(x))


def test_functional_call():
    plain, optimized, x = made()
    plain.eval()(x), optimized.eval()(x)
    ours = {name: p * 2 for name, p in optimized.named_parameters()}
    theirs = {name: p * 2 for name, p in plain.named_parameters()}
    assert_close(
        torch.func.functional_call(optimized, ours, (x,)),
        torch.func.functional_call(plain, theirs, (x,)),
    )


def test_an_input_that_does_not_fit_raises_in_the_words_of_the_layer():
    plain, optimized, x = made()
    optimized(x)
    for wrong in (x[:, :3], x.float(), x.long()):
        with pytest.raises(RuntimeError) as theirs:
            plain(wrong)
        with pytest.raises(RuntimeError) as ours:
            optimized(wrong)
        assert str(ours.value) == str(theirs.value)


def test_a_record_of_torchscript():
    plain, optimized, x = made()
    traced = torch.jit.trace(optimized.eval(), (x,))
    assert_close(traced(x * 2), plain.eval()(x * 2))


class Counting(dict):
    """A mapping that has other code for its items."""

    def __getitem__(self, key):
        raise AssertionError(key)


def test_conditions():
    flags, module = {"training": True, "rate": 2}, nn.ReLU()
    present, children = {"bias": 1}, collections.OrderedDict(a=1, b=2)
    contents, namespace = [1, 2], Counting(word=3)
    owner = type("Class", (), {"there": flags})
    conditions = Conditions(
        values=((flags, "training", True), (flags, "rate", flags["rate"]), (namespace, "word", 3)),
        kinds=((module, nn.ReLU),),
        present=((present, "bias"),),
        children=((children, ("a", "b")),),
        classes=((owner, "there", flags),),
        contents=((contents, (1, 2)),),
    )
    changes = {
        "a flag": (lambda: flags.update(training=1), lambda: flags.update(training=True)),
        "an item gone": (lambda: flags.pop("rate"), lambda: flags.update(rate=2)),
        "an item of a mapping": (
            lambda: namespace.update(word=4),
            lambda: namespace.update(word=3),
        ),
        "a hook": (
            lambda: module._forward_hooks.update({1: 1}),
            lambda: module._forward_hooks.clear(),
        ),
        "a class": (
            lambda: setattr(module, "__class__", nn.Tanh),
            lambda: setattr(module, "__class__", nn.ReLU),
        ),
        "a tensor gone": (lambda: present.update(bias=None), lambda: present.update(bias=1)),
        "no tensor at all": (present.clear, lambda: present.update(bias=1)),
        "an order": (lambda: children.move_to_end("a"), lambda: children.move_to_end("b")),
        "a child more": (lambda: children.update(c=3), lambda: children.pop("c")),
        "an attribute": (
            lambda: setattr(owner, "there", 1),
            lambda: setattr(owner, "there", flags),
        ),
        "no attribute": (lambda: delattr(owner, "there"), lambda: setattr(owner, "there", flags)),
        "an entry more": (lambda: contents.append(3), lambda: contents.pop()),
    }
    holds = conditions.check()
    assert holds()
    for name, (change, back) in changes.items():
        change()
        assert not holds(), name
        back()
        assert holds(), name


def test_conditions_of_what_is_missing():
    own, owner = {}, type("Class", (), {})
    conditions = Conditions(
        ((own, "forward", MISSING),), (), (), (), ((owner, "more", MISSING),), ()
    )
    holds = conditions.check()
    assert holds()
    own["forward"] = None
    assert not holds()
    del own["forward"]
    owner.more = 1
    assert not holds()


def buffer_replaced(model):
    model.norms[0].running_mean = torch.ones(4, dtype=torch.float64)


def buffer_elsewhere(model):
    model.norms[1].running_var.data = torch.full((4,), 2.0, dtype=torch.float64)


def buffer_written(model):
    model.norms[1].running_var.fill_(3)


def mode_of_one(model):
    model.norms[0].train(not model.norms[0].training)


def norm_replaced(model):
    model.norms[0] = nn.BatchNorm1d(4).double().train(model.training)


def shared_memory(model):
    model.share_memory()


def other_type_and_back(model):
    model.float().double()


LATER = (
    buffer_replaced, buffer_elsewhere, buffer_written, mode_of_one, norm_replaced, shared_memory,
    other_type_and_back,
)  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", LATER)
def test_norms_that_are_changed_after_calls(change, training):
    plain, optimized, x = made()
    for model in (plain, optimized):
        model.train(training)
        model(x), model(x)
        change(model)
    for _ in range(2):
        assert_close(optimized(x), plain(x))
        assert_close(dict(optimized.state_dict()), dict(plain.state_dict()))


def test_a_model_is_freed_at_once():
    _, optimized, _ = made()
    wide = weakref.ref(next(wide for wide in wides(optimized) if wide.running))
    wide()(torch.randn(6, 8, dtype=torch.float64), dim=-1)
    regions.uninstall(optimized)
    del optimized
    assert wide() is None


class Unflattened(nn.Module):
    """Everything that somebody may call unflattening."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        named = a.unflatten(dim=1, sizes=[2, 2]) + torch.unflatten(b, -1, (2, -1))
        return named + nn.functional.relu(a).unflatten(-1, (2, -1)) * b.unflatten(-1, (-1, 2))


def test_unflattening_of_all_sorts():
    plain, x = Unflattened().double(), torch.randn(6, 5, dtype=torch.float64)
    assert_equivalent(conjoin.optimize(plain, (x,), policy="always"), plain, (x,))


def test_somebody_else_calls_the_modules(monkeypatch):
    plain, optimized, x = made()
    optimized(x), plain(x)
    called, call = [], nn.Module.__call__

    def noted(module, *args, **kwargs):
        called.append(module)
        return call(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", noted)
    assert_close(optimized(x), plain(x))
    assert {*wides(optimized)} < {*called}


@pytest.mark.parametrize(
    "change",
    [
        lambda first, second: first.update(c=None),
        lambda first, second: first.pop("a"),
        lambda first, second: first.update(a=first.pop("a")),
        lambda first, second: second.update(b=first.pop("b")),
        lambda first, second: first.update(c=second.pop("c")),
    ],
    ids=["grown", "shrunk", "reordered", "moved on", "moved back"],
)
def test_names_of_children(change):
    first, second = {"a": None, "b": None}, {"c": None}
    children = ((first, ("a", "b")), (second, ("c",)))
    holds = Conditions((), (), (), children, (), ()).check()
    assert holds()
    change(first, second)
    assert not holds()
