"""Observing a run finds all siblings, and leaves no trace."""

import copy
import random
import subprocess
import sys
import textwrap

import numpy
import pytest
import torch
from equivalence import random_states
from torch import nn

import conjoin
from conjoin.layers import KINDS
from conjoin.legality import Reason
from conjoin.tracing.copies import Copy
from conjoin.tracing.observe import observe

X = torch.randn(3, 4, dtype=torch.float64)
IMAGE = torch.randn(1, 2, 4, 4, dtype=torch.float64)


class Model(nn.Module):
    """Two siblings, called as a function says."""

    def __init__(self, script, layer=lambda: nn.Linear(4, 4)):
        super().__init__()
        self.a, self.b = layer(), layer()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.calls, self.seen, self.last = 0, [], None
        self.register_buffer("count", torch.zeros(()))
        self.script = script

    def forward(self, x, **settings):
        return self.script(self, x, **settings)


def model_of(script, layer=lambda: nn.Linear(4, 4)):
    return Model(script, layer).double()


def sighted(model, *args, **kwargs):
    return observe(model, [(args, kwargs)], KINDS)


def layers(sightings):
    return [site.layer for site in sightings.sites]


def heads(m, x):
    return m.a(x), m.b(x)


def leaves_traces(m, x):
    m.calls += 1
    m.seen.append(x)
    m.count.add_(1)
    m.last = m.norm(m.a(x)) + random.random() + numpy.random.rand()
    return m.dropout(m.last), m.b(x)


def fakes_fail(m, x):
    leaves_traces(m, x)
    return heads(m, x) if x.sum() > 1e9 or x.sum() <= 1e9 else None


def described(model):
    return {
        name: {key: str(value) for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("script", [leaves_traces, fakes_fail])
def test_no_trace_is_left(script, training):
    model = model_of(script).train(training)
    model.norm.eval()
    model.a.weight.grad = torch.ones_like(model.a.weight)
    x = X.clone().requires_grad_()
    before = described(model), copy.deepcopy(model.state_dict()), random_states()
    for look in (sighted, lambda model, x: conjoin.report(model, (x,))):
        look(model, x)
        assert described(model) == before[0]
        assert all(torch.equal(v, before[1][k]) for k, v in model.state_dict().items())
        assert all(
            torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
            for a, b in zip(random_states(), before[2], strict=True)
        )
    assert x.grad is None
    assert torch.equal(x, X)
    assert model.a.weight.grad.eq(1).all()
    assert model.b.weight.grad is None


def test_the_input_stays_as_it_is():
    x = X.clone()
    sighted(model_of(lambda m, x: heads(m, x.mul_(2))), x)
    assert torch.equal(x, X)
    assert x._version == 0


def test_both_modes_are_looked_at():
    def script(m, x):
        return m.a(x), (m.b(x) if m.training else None)

    assert layers(sighted(model_of(script), X)) == ["a", "b", "a"]


def test_the_same_tensor_object():
    sites = sighted(model_of(lambda m, x: (m.a(x), m.b(x + 0), m.a(x))), X).sites
    first, second, third = (site.input for site in sites[:3])
    assert first == third != second


def test_versions():
    def script(m, x):
        y = x * 1
        m.a(y)
        y.add_(1)
        return m.b(y)

    first, second = sighted(model_of(script), X).sites[:2]
    assert first.input == second.input
    assert (first.version, second.version) == ((0, 0), (1, 0))


WAYS_AROUND = {
    "data": lambda m, y: y.data.add_(1),
    "data of an alias": lambda m, y: y.view(-1).data.add_(1),
    "set data": lambda m, y: setattr(y, "data", y.data + 1),
    "numpy": lambda m, y: numpy.add(y.detach().numpy(), 1, out=y.detach().numpy()),
    "weight": lambda m, y: m.b.weight.data.add_(1),
}


@pytest.mark.parametrize("change", WAYS_AROUND.values(), ids=WAYS_AROUND)
def test_what_the_version_counter_does_not_see(change):
    """Access to a tensor past its version counter may be a change, so the siblings stay apart."""

    def script(m, x):
        y = x * 1
        first = m.a(y)
        change(m, y)
        return first, m.b(y)

    model = model_of(script)
    first, second = sighted(model, X).sites[:2]
    assert first.version != second.version
    [group] = conjoin.report(model, (X,)).groups
    assert group.reason is Reason.INPUT_MUTATED
    optimized = conjoin.optimize(model, (X,))
    torch.testing.assert_close(optimized(X), copy.deepcopy(model)(X), rtol=0, atol=1e-9)


def test_a_way_around_that_fake_tensors_do_not_survive():
    """They have no memory to write to. In a process of its own, since it may end in a crash."""
    code = """
        import conjoin, torch
        from torch import nn

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                y = x * 1
                first = self.a(y)
                torch.from_dlpack(y.detach()).add_(1)
                return first, self.b(y)

        model, x = Model(), torch.randn(3, 4)
        [group] = conjoin.report(model, (x,)).groups
        assert group.reason.name == "INPUT_MUTATED"
        torch.testing.assert_close(conjoin.optimize(model, (x,))(x), model(x))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-1000:]}"


def test_data_of_something_else_is_no_change():
    model = model_of(lambda m, x: (m.a(x), m.count.data.add_(1), m.b(x)))
    assert {site.version for site in sighted(model, X).sites} == {(0, 0)}


def test_data_that_nobody_changes_is_one_input():
    model = model_of(lambda m, x: heads(m, x.data))
    assert [group.layers for group in conjoin.report(model, (X,)).groups] == [("a", "b")]


@pytest.mark.parametrize("script", [fakes_fail, lambda m, x: heads(m, x) if x[0, 0].item() else 1])
def test_values_decide_so_a_real_copy_runs(script):
    model = model_of(script)
    with pytest.raises(Exception, match=r".+"):
        Copy(model, fake=True).run(((X,), {}))
    assert {"a", "b"} == set(layers(sighted(model, X)))
    groups = conjoin.report(model, (X,)).groups
    assert [group.layers for group in groups] == [("a", "b")]


@pytest.mark.parametrize("only", ["training", "evaluation"])
def test_a_model_that_runs_in_one_mode_only(only):
    def script(m, x):
        if m.training != (only == "training"):
            raise NotImplementedError("not in this mode")
        return heads(m, x)

    sightings = sighted(model_of(script), X)
    assert layers(sightings) == ["a", "b"]
    other = "evaluation" if only == "training" else "training"
    assert [u.why for u in sightings.untraced] == [
        f"does not run in {other} mode: NotImplementedError: not in this mode"
    ]


def test_training_that_needs_more_than_one_example():
    """BatchNorm refuses a batch of one in training mode; what ran before the error is no sight."""
    model = model_of(lambda m, x: (m.norm(m.a(x)), m.b(x)))
    sightings = sighted(model, X[:1])
    assert layers(sightings) == ["a", "b"]
    assert "training" in sightings.untraced[0].why
    assert conjoin.optimize(model, (X[:1],)).a.wide_layer


@pytest.mark.parametrize("args", [(), (X, X), (torch.zeros(3, 5, dtype=torch.float64),), ("text",)])
def test_inputs_that_do_not_fit(args):
    model = nn.Sequential(model_of(heads))
    with pytest.raises(ValueError, match=r"does not run on the example inputs: .*Pass a tuple"):
        conjoin.optimize(model, args)
    with pytest.raises(ValueError, match="does not run on the example inputs"):
        conjoin.report(model, args)


def test_what_the_model_says_of_inputs_ends_with_one_stop():
    def script(m, x):
        raise ValueError("Nothing fits.")

    with pytest.raises(ValueError, match=r"Nothing fits\. Pass a tuple"):
        conjoin.optimize(nn.Sequential(model_of(script)), (X,))


def test_keyword_arguments():
    def script(m, x, *, other):
        return m.a(other), m.b(other)

    sightings = sighted(model_of(script), X, other=X + 1)
    assert layers(sightings) == ["a", "b"] * 2
    model = model_of(script)
    optimized = conjoin.optimize(model, (X,), example_kwargs={"other": X})
    assert optimized.a.wide_layer is optimized.b.wide_layer


def test_a_layer_called_by_keyword():
    sites = sighted(model_of(lambda m, x: (m.a(input=x), m.b(x))), X).sites
    assert sites[0].input == sites[1].input


def test_several_calls():
    def script(m, x, *, both):
        return (m.a(x), m.b(x)) if both else (m.a(x),)

    calls = [((X,), {"both": True}), ((X,), {"both": False})]
    assert layers(observe(model_of(script), calls, KINDS)) == ["a", "b", "a"] * 2
    calls = [(X,), (X[:1],), (X.unsqueeze(0),)]
    optimized = conjoin.optimize(model_of(heads), calls)
    assert optimized.a.wide_layer is optimized.b.wide_layer


def conv():
    return nn.Conv2d(2, 3, 1)


READS = {
    "view": lambda y: y.view(-1),
    "view of a size": lambda y: y.view(y.shape[0] * y.shape[1], -1),
    "stride": lambda y: y * y.stride(0),
    "is_contiguous": lambda y: y.flatten() if y.is_contiguous() else y.sum(),
    "as_strided": lambda y: y.as_strided((2, 2), (4, 1)),
    "torch.as_strided": lambda y: torch.as_strided(y, (2, 2), (4, 1)),
    "storage_offset": lambda y: y + y.storage_offset(),
    "view of a view": lambda y: y.transpose(2, 3).transpose(2, 3).view(-1),
    "change of a reshape": lambda y: y.reshape(-1).mul_(2),
    "change of a flatten": lambda y: (y.flatten().zero_(), y)[1],
    "view of the type": lambda y: y.view(torch.int64),
    "storage": lambda y: torch.tensor(y.untyped_storage().nbytes()),
    # They share memory with a contiguous output, and would copy a slice of several rows.
    "reshape": lambda y: y.reshape(-1),
    "torch.reshape": lambda y: torch.reshape(y, (-1,)),
    "flatten of everything": lambda y: y.flatten(),
    "torch.flatten": lambda y: torch.flatten(y),
    "ravel": lambda y: y.ravel(),
    "reshape_as": lambda y: y.reshape_as(y.new_empty(y.numel())),
    "contiguous": lambda y: y.contiguous(),
    "change of a contiguous": lambda y: (y.contiguous().zero_(), y)[1],
    "reshape of a view": lambda y: y.transpose(2, 3).transpose(2, 3).reshape(-1),
}
READS_NOT = {
    "flatten": lambda y: y.flatten(1),
    "reshape of the channels": lambda y: y.reshape(y.shape[0], -1),
    "reshape that copies": lambda y: y.transpose(1, 2).reshape(-1),
    "arithmetic": lambda y: y * 2,
    "view of the channels": lambda y: y.view(y.shape[0], -1),
    "view of the space": lambda y: y.view(*y.shape[:2], -1),
    "split channels": lambda y: y.view(y.shape[0], 3, 1, 4, 4),
    "view of a copy": lambda y: (y * 2).view(-1),
    "change": lambda y: y.mul_(2),
}


def reading(read):
    return model_of(lambda m, x: (read(m.a(x)), read(m.b(x))), conv)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_strides_are_read(read):
    """With an example of one row, whose slices are contiguous by chance; and then run on three."""
    model = reading(read)
    assert set(sighted(model, IMAGE).strided) == {"a", "b"}
    same_on_three(model)


@pytest.mark.parametrize("read", READS_NOT.values(), ids=READS_NOT)
def test_strides_are_not_read(read):
    model = reading(read)
    assert not sighted(model, IMAGE).strided
    same_on_three(model)


def same_on_three(model):
    optimized = conjoin.optimize(model, (IMAGE,))
    assert optimized.a.wide_layer is optimized.b.wide_layer
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    for ours, theirs in zip(optimized(x), model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_only_the_layer_whose_strides_are_read_is_copied():
    model = model_of(lambda m, x: (m.a(x).view(-1), m.b(x)), conv)
    optimized = conjoin.optimize(model, (IMAGE,))
    assert optimized.a.wide_layer.contiguous == {0}


STEPS = torch.zeros(())
AVERAGES = {"x": torch.zeros(4)}


class Counting(nn.Module):
    """A forward that changes tensors beside the model in place."""

    seen = torch.zeros(2)

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        STEPS.add_(1)
        torch.add(self.seen, 1, out=self.seen)
        AVERAGES["x"].mul_(0.5).add_(x.detach().mean(0))
        return self.a(x) + self.b(x)


@pytest.mark.parametrize("look", [conjoin.optimize, conjoin.report])
def test_tensors_beside_the_model_stay(look):
    look(Counting(), (torch.ones(2, 4),))
    assert [float(each.sum()) for each in (STEPS, Counting.seen, AVERAGES["x"])] == [0, 0, 0]


def test_operators_of_higher_order():
    def forward(m, x):
        y = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return heads(m, y)

    assert layers(sighted(model_of(forward), X)) == ["a", "b"] * 2
