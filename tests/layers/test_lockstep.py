"""Siblings share a run of the wide layer exactly while nobody can tell."""

import contextlib
import gc
import threading
import weakref

import pytest
import torch
from calling import INPUT_CHANGES, SAME_INPUT, SCRIPTS, Calls, autocast, between, under
from equivalence import assert_close, assert_equivalent, gradients
from families import EVERY_KIND, assert_runs_once, case, fused, wide_runs
from torch import nn

from conjoin.layers import lockstep
from conjoin.layers.lockstep import PATIENCE

every_kind = pytest.mark.parametrize("kind", EVERY_KIND.values(), ids=EVERY_KIND)
every_float_kind = pytest.mark.parametrize(
    "kind", [kind for kind in EVERY_KIND.values() if not kind.rows]
)


@pytest.fixture
def linear():
    return case(nn.Linear, 4, (3, 4)).family((4, 4, 4))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_way_to_call(linear, name):
    plain = Calls(linear, SCRIPTS[name])
    x = torch.randn(3, 4, dtype=torch.float64)
    assert_equivalent(Calls(fused(linear), SCRIPTS[name]), plain, (x,))


@pytest.mark.parametrize("change", INPUT_CHANGES.values(), ids=INPUT_CHANGES)
def test_input_changed_between_the_siblings(linear, change):
    x = torch.randn(3, 4, dtype=torch.float64)
    plain = Calls(linear, between(change)).requires_grad_(False)
    model = Calls(fused(linear), plain.script)
    with torch.no_grad():
        ours, theirs = model(x), plain(x)
    assert_close(dict(enumerate(ours)), dict(enumerate(theirs)))
    if change is not INPUT_CHANGES["out"]:  # It refuses tensors that need a gradient.
        assert_equivalent(model.requires_grad_(False), plain, (x,))


@pytest.mark.parametrize("name", SAME_INPUT)
def test_one_run_for_all(linear, name):
    assert_runs_once(Calls(fused(linear).float(), SCRIPTS[name]), torch.randn(3, 4))


AUTOCASTS = [(True, True, True), (False, True, False), (True, False, True)]


@pytest.mark.parametrize("flags", AUTOCASTS, ids=str)
def test_autocast_on_some(linear, flags):
    modes = [autocast if flag else contextlib.nullcontext for flag in flags]
    plain = Calls(linear.float(), under(*modes))
    x = torch.randn(3, 4)
    for ours, theirs in zip(Calls(fused(linear), plain.script)(x), plain(x), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@every_kind
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode, autocast])
def test_one_run_for_every_kind_in_every_mode(kind, mode):
    plain = kind.family((2, 3)).float()
    model = fused(plain)
    x = kind.input()
    x = x if kind.rows else x.float()
    with mode():
        assert_runs_once(model, x)
        for ours, theirs in zip(model(x), plain(x), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


def same_after(change, plain, *args):
    """Two models are the same before and after a change, with the same input object."""
    model = fused(plain)
    results = []
    for each in (plain, model):
        x = torch.ones(3, 4, dtype=torch.float64)
        first = each.layers[0](x).detach().clone()
        change(each, *args)
        results.append([first, *(layer(x) for layer in each.layers)])
    assert_close(*(dict(enumerate(result)) for result in reversed(results)))


def optimizer_step(model):
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(model.parameters(), lr=0.5).step()


WEIGHT_CHANGES = {
    "optimizer": optimizer_step,
    "load_state_dict": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items()}
    ),
    "assign": lambda model: model.load_state_dict(
        {name: value + 1 for name, value in model.state_dict().items()}, assign=True
    ),
    "in place": lambda model: nn.init.ones_(model.layers[1].weight),
    "a view of the state_dict": lambda model: model.state_dict()["layers.1.weight"].fill_(3),
    "assignment": lambda model: setattr(
        model.layers[1], "weight", nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    ),
    "there and back": lambda model: model.float().double(),
}


@pytest.mark.parametrize("change", WEIGHT_CHANGES.values(), ids=WEIGHT_CHANGES)
def test_weights_changed_between_the_siblings(linear, change):
    same_after(change, linear)


LEAVES = {
    "leaf": lambda x: x,
    "inner": lambda x: x * 2,
    "no gradient": lambda x: x.detach(),
}


@every_float_kind
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", LEAVES.values(), ids=LEAVES)
def test_backward_between_the_siblings(kind, make, frozen):
    """Each backward pass uses up its own graph, so that the next sibling must run anew."""
    plain = kind.family((2, 3, 1)).requires_grad_(not frozen)
    leaf = kind.input()
    found = []
    for model in (plain, fused(plain)):
        x = leaf.clone().requires_grad_()
        y = make(x)
        model.zero_grad()
        for layer in model.layers:
            loss = layer(y).square().sum()
            if loss.requires_grad:
                loss.backward(retain_graph=make is LEAVES["inner"])
        found.append({**gradients(model), "input": x.grad})
    assert_close(found[1], found[0], "gradient of")


@pytest.mark.parametrize("kind", [k for n, k in EVERY_KIND.items() if n == "Embedding"])
@pytest.mark.parametrize("widths", [(3, 3), (2, 4)], ids=str)
def test_backward_between_tables(kind, widths):
    plain = kind.family(widths)
    x = kind.input()
    found = []
    for model in (plain, fused(plain)):
        for layer in model.layers:
            layer(x).square().sum().backward()
        found.append(gradients(model))
    assert_close(found[1], found[0], "gradient of")


def test_gradients_by_the_input(linear):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    model = fused(linear)
    for index in range(3):
        ours, theirs = (torch.autograd.grad(m(x)[index].sin().sum(), x)[0] for m in (model, linear))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(3, 5), (), (3, 4, 0)], ids=str)
@every_float_kind
def test_same_error_for_a_wrong_shape(kind, shape):
    plain = kind.family((2, 3))
    messages = []
    for model in (plain, fused(plain)):
        with pytest.raises((RuntimeError, ValueError)) as error:
            model(torch.zeros(shape, dtype=torch.float64))
        messages.append((error.type, str(error.value)))
    assert messages[0] == messages[1]


@every_kind
@pytest.mark.parametrize("wrong", ["text", None, 3, [1.0]], ids=str)
def test_same_error_for_no_tensor(kind, wrong):
    plain = kind.family((2, 3))
    errors = []
    for model in (plain, fused(plain)):
        with pytest.raises((TypeError, AttributeError)) as error:
            model(wrong)
        errors.append((error.type, str(error.value).split(" - got ")[0]))  # Tensor or Parameter.
    assert errors[0] == errors[1]


def test_works_after_an_error(linear):
    model = fused(linear)
    with pytest.raises(RuntimeError):
        model(torch.zeros(3, 5, dtype=torch.float64))
    assert_runs_once(model, torch.zeros(3, 4, dtype=torch.float64))


def test_threads_do_not_meet(linear):
    model = fused(linear)
    failures = []
    x = torch.randn(3, 4, dtype=torch.float64)
    expected = linear(x)
    start = threading.Barrier(4)

    def work():
        start.wait()
        for _ in range(50):
            with torch.no_grad():
                outputs = model(x)
            failures.extend(o for o, e in zip(outputs, expected, strict=True) if not o.allclose(e))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def by_functional_parameters(model, x):
    parameters = {name: value * 2 for name, value in model.named_parameters()}
    outputs = torch.func.functional_call(model, parameters, (x,))
    assert all(parameter.is_leaf for parameter in model.parameters())
    return outputs


def by_grad(model, x):
    return [torch.func.grad(lambda x: sum(y.sin().sum() for y in model(x)))(x)]


def by_jvp(model, x):
    outputs, tangents = torch.func.jvp(lambda x: tuple(model(x)), (x,), (torch.ones_like(x),))
    return [*outputs, *tangents]


def by_forward_mode(model, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        return [torch.autograd.forward_ad.unpack_dual(y).tangent for y in model(dual)]


def by_saved_tensors_hooks(model, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t / 2):
        first = model.layers[0](x)
    return [first, *(layer(x) for layer in model.layers[1:])]


def by_cpu_saving(model, x):
    with torch.autograd.graph.save_on_cpu():
        return model(x)


TRANSFORMS = {
    "functional_call": by_functional_parameters,
    "vmap": lambda model, x: torch.func.vmap(lambda x: tuple(model(x)))(x),
    "grad": by_grad,
    "jacrev": lambda model, x: torch.func.jacrev(lambda x: tuple(model(x)))(x),
    "jvp": by_jvp,
    "forward mode": by_forward_mode,
    "jit trace": lambda model, x: torch.jit.trace(model, (x,), strict=False)(x + 1),
    "saved tensors hooks": by_saved_tensors_hooks,
    "saved on the cpu": by_cpu_saving,
    "gradient of a vmap": lambda model, x: [
        torch.func.vmap(torch.func.grad(lambda x: sum(y.sin().sum() for y in model(x))))(x)
    ],
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(linear, transform):
    x = torch.randn(3, 4, dtype=torch.float64)
    found = []
    for model in (fused(linear), linear):
        outputs = dict(enumerate(transform(model, x)))
        model.zero_grad()
        loss = sum(output.square().sum() for output in outputs.values())
        if loss.requires_grad:
            loss.backward()
        found.append({**outputs, **gradients(model)})
    assert_close(*found)


@pytest.fixture
def _fresh():
    """Starts with no runs, whatever the tests before have left."""
    lockstep._thread.runs.clear()


@every_kind
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("taken", [1, 2, 3])
@pytest.mark.usefixtures("_fresh")
def test_nothing_outlives_the_input(kind, grad, taken):
    model = fused(kind.family((2, 3, 1)))
    x = kind.input()
    x = x.requires_grad_(grad and not kind.rows)
    with torch.set_grad_enabled(grad):
        outputs = [layer(x) for layer in model.layers[:taken]]
    references = [weakref.ref(tensor) for tensor in (x, *outputs)]
    del x, outputs
    gc.collect()
    assert [reference() for reference in references] == [None] * (taken + 1)
    assert not lockstep._thread.runs


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.usefixtures("_fresh")
def test_the_input_dies_with_its_last_user(grad):
    """No cycle keeps it until the garbage collector comes."""
    model = fused(EVERY_KIND["Linear"].family((2, 3)))
    gc.disable()
    try:
        x = torch.randn(2, 4, dtype=torch.float64) * 1
        with torch.set_grad_enabled(grad):
            output = model.layers[0](x)
        reference, made = weakref.ref(x), weakref.ref(output)
        del x
        assert reference() is None
        assert not lockstep._thread.runs
        del output
        assert made() is None
    finally:
        gc.enable()


def test_memory_stays_flat_over_many_iterations():
    model = fused(EVERY_KIND["Conv2d"].family((2, 3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    counts = []
    for _ in range(6):
        for _ in range(5):
            optimizer.zero_grad()
            outputs = model(EVERY_KIND["Conv2d"].input())
            sum(output.sum() for output in outputs).backward()
            optimizer.step()
        del outputs
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert len(set(counts[1:])) == 1


@pytest.mark.usefixtures("_fresh")
def test_an_input_kept_for_ever_is_left_with_nothing_when_all_parts_are_taken(linear):
    model = fused(linear)
    x = torch.randn(3, 4, dtype=torch.float64)
    model(x)
    assert not lockstep._thread.runs


def test_patience_ends(linear):
    """A sibling that is always called alone does not pay for the others for ever."""
    model = fused(linear)
    with wide_runs() as runs:
        for _ in range(3 * PATIENCE):
            model.layers[0](torch.randn(3, 4, dtype=torch.float64))
    assert len(runs) == PATIENCE
    assert_equivalent(model, linear, (torch.randn(3, 4, dtype=torch.float64),))


def test_patience_starts_anew_with_every_full_run(linear):
    model = fused(linear)
    with wide_runs() as runs:
        for _ in range(3):
            for _ in range(PATIENCE - 1):
                model.layers[0](torch.randn(3, 4, dtype=torch.float64))
            model(torch.randn(3, 4, dtype=torch.float64))
    assert len(runs) == 3 * PATIENCE


def test_a_subclass_of_tensor_is_left_alone(linear):
    class Logged(torch.Tensor):
        pass

    model = fused(linear)
    x = torch.randn(3, 4, dtype=torch.float64).as_subclass(Logged)
    with wide_runs() as runs:
        outputs = model(x)
    assert not runs
    assert {type(output) for output in outputs} == {Logged}
    assert_close(dict(enumerate(outputs)), dict(enumerate(linear(x))))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_inputs(linear, layout):
    x = torch.eye(4, dtype=torch.float64).to_sparse(layout=layout)
    for ours, theirs in zip(fused(linear)(x), linear(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@every_kind
def test_a_model_goes_with_its_last_reference(kind):
    model, x = fused(kind.family((3, 3))), kind.input()
    with torch.no_grad():
        for layer in model.layers:
            layer(x)
    wide = weakref.ref(model.layers[0].wide_layer)
    gc.collect()
    gc.disable()
    try:
        del layer, model
        assert wide() is None
    finally:
        gc.enable()
