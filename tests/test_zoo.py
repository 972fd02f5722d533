"""Public models: all siblings are accounted for, the function and the checkpoints stay the same."""

import collections
import copy
import io

import pytest
import torch
from equivalence import (
    assert_equivalent,
    assert_same_state,
    assert_same_step,
    assert_same_structure,
    random_states,
    same_bits,
    set_seed,
    step,
)
from torch import Tensor, nn
from zoo import PACKAGE, ZOO

import conjoin
from conjoin.layers.wide import views

pytestmark = pytest.mark.zoo

KINDS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Embedding,
)

every_model = pytest.mark.parametrize("name", ZOO)


@pytest.fixture
def model(name):
    pytest.importorskip(PACKAGE[name])
    return ZOO[name].model()


@pytest.fixture
def args(name):
    return ZOO[name].call()[0]


@pytest.fixture
def kwargs(name):
    return ZOO[name].call()[1]


@pytest.fixture
def fused(model, args, kwargs):
    return conjoin.optimize(model, args, example_kwargs=kwargs)


def observed_readers(model, args, kwargs):
    """For each tensor that several like layers receive, and the kind, the names of the layers."""
    model = copy.deepcopy(model)
    readers = collections.defaultdict(dict)
    alive = []

    def note(name, kind):
        def hook(module, args, kwargs):
            tensor = args[0] if args else next(iter(kwargs.values()))
            alive.append(tensor)
            readers[kind, id(tensor)][name] = True

        return hook

    for name, module in model.named_modules():
        for kind in KINDS:
            if isinstance(module, kind):
                module.register_forward_pre_hook(note(name, kind), with_kwargs=True)
    for training in (True, False):
        model.train(training)
        set_seed()
        args, kwargs = copy.deepcopy((args, kwargs))
        alive.append((model(*args, **kwargs), args, kwargs))
    return [set(names) for names in readers.values() if len(names) > 1]


@every_model
def test_every_group_that_a_run_shows_is_fused_or_refused(name, model, args, kwargs):
    report = conjoin.report(model, args, example_kwargs=kwargs)
    listed = collections.Counter(layer for group in report.groups for layer in group.layers)
    seen = observed_readers(model, args, kwargs)
    assert set(listed) == set().union(*seen)
    assert all(count == 1 for count in listed.values()), listed
    for group in report.groups:
        assert group.fused or group.reason is not None
        assert not group.fused or len(group.layers) > 1
        assert not group.fused or any(set(group.layers) <= names for names in seen)
    assert any(group.fused for group in report.groups) == ZOO[name].fuses


@every_model
def test_optimized_with_inputs_is_the_same_function(model, args, kwargs, fused):
    assert_equivalent(fused, model, args, kwargs)


@every_model
def test_optimized_without_inputs_is_the_same_function(model, args, kwargs):
    assert_equivalent(conjoin.optimize(model), model, args, kwargs)


@every_model
def test_report_and_optimize_leave_the_model_alone(model, args, kwargs):
    before = snapshot(model)
    conjoin.report(model)
    conjoin.optimize(model)
    conjoin.report(model, args, example_kwargs=kwargs)
    conjoin.optimize(model, args, example_kwargs=kwargs)
    after = snapshot(model)
    assert before == after


def snapshot(model):
    """All that a user could tell a change by, as something that compares by value."""
    modules = [
        (name, type(module), module.training, {key: id(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]
    state = {key: bytes_or_value(value) for key, value in model.state_dict().items()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    versions = [(name, id(t), t._version, t.requires_grad, t.grad is None) for name, t in tensors]
    states = [s.tolist() if isinstance(s, Tensor) else s for s in random_states()]
    return modules, state, versions, states


def bytes_or_value(value):
    return value.numpy().tobytes() if isinstance(value, Tensor) else value


@every_model
def test_checkpoints_load_both_ways(name, model, fused):
    other = ZOO[name].model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    fused.load_state_dict(other.state_dict(), strict=True)
    assert_same_state(fused, other)
    model.load_state_dict(fused.state_dict(), strict=True)
    assert_same_state(model, other)


@every_model
def test_unfuse_gives_back_the_very_same_model(model, fused):
    assert type(fused) is type(conjoin.optimize(fused))
    assert_same_state(fused, model)
    plain = conjoin.unfuse(fused)
    assert_same_state(plain, model)
    assert_same_structure(plain, model)
    assert {name for name, _ in fused.named_modules()} >= {name for name, _ in model.named_modules()}


@every_model
def test_optimizing_again_changes_nothing(model, args, kwargs, fused):
    again = conjoin.optimize(fused, args, example_kwargs=kwargs)
    assert_same_structure(again, fused)
    assert_same_state(again, fused)
    first = conjoin.report(model, args, example_kwargs=kwargs)
    assert conjoin.report(fused, args, example_kwargs=kwargs) == first


@every_model
def test_copies_and_pickles_do_the_same(args, kwargs, fused):
    buffer = io.BytesIO()
    torch.save(fused, buffer)
    buffer.seek(0)
    expected = step(copy.deepcopy(fused), args, kwargs)
    assert_same_step(step(torch.load(buffer, weights_only=False), args, kwargs), expected)
    assert len(dict(views(copy.deepcopy(fused)))) == len(dict(views(fused)))


@every_model
def test_trained_weights_come_back(model, args, kwargs, fused):
    for trained in (model, fused):
        optimizer = torch.optim.SGD(trained.parameters(), lr=1e-3)
        step(trained, args, kwargs)
        optimizer.step()
    plain = conjoin.unfuse(fused)
    assert_same_structure(plain, model)
    assert_same_step(step(plain, args, kwargs), step(model, args, kwargs))


@every_model
def test_state_goes_through_safetensors(model, fused):
    safetensors = pytest.importorskip("safetensors.torch")
    try:
        safetensors.save(model.state_dict())
    except RuntimeError:
        pytest.skip("the original's does not either")
    loaded = safetensors.load(safetensors.save(fused.state_dict()))
    assert all(same_bits(loaded[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", [n for n in ZOO if PACKAGE[n] in ("transformers", "diffusers")])
def test_save_pretrained_gives_a_checkpoint_of_the_plain_class(model, args, kwargs, fused, tmp_path):
    fused.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert_same_structure(loaded, model)
    assert_same_state(loaded, model)
