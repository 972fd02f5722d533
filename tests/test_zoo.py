"""Public models: all siblings are accounted for, the function and the checkpoints stay the same."""

import collections
import copy
import dataclasses
import io
from typing import Any

import pytest
import torch
from equivalence import (
    Outcome,
    assert_close,
    assert_same_state,
    assert_same_step,
    assert_same_structure,
    random_states,
    same_bits,
    set_seed,
    step,
)
from torch import Tensor, nn
from zoo import FILES, ZOO, Specimen

import conjoin
from conjoin.layers.view import views

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

AGAIN = {*sorted(ZOO)[::4], "hrnet"}
"""Models that are optimized twice, which would take a fifth of the time for all of them."""

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@dataclasses.dataclass
class Case:
    """A model and what conjoin makes of it. The tests of one model share it, and change nothing.

    Attributes:
        name: its name in the zoo.
        specimen: how the model was built.
        args: the positional arguments of a call.
        kwargs: the keyword arguments.
        model: the model.
        snapshots: what could be told of the model before and after conjoin worked on it.
        report: the report with example inputs.
        fused: the model optimized with example inputs.
        blind: the model optimized without.
        steps: what a step of the model does, by mode.
    """

    name: str
    specimen: Specimen
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    model: nn.Module
    snapshots: tuple[object, object]
    report: conjoin.Report
    fused: nn.Module
    blind: nn.Module
    steps: dict[bool, Outcome]

    def step(self, model: nn.Module, *, training: bool = True) -> Outcome:
        """What a step of `model` does; `model` itself takes none."""
        return step(copy.deepcopy(model), self.args, self.kwargs, training=training)


# Scope and parameter make pytest run all tests of one model in a row: each is made only once.
@pytest.fixture(scope="module", params=ZOO)
def case(request):
    pytest.importorskip(ZOO[request.param].package)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    specimen = ZOO[request.param]
    model = specimen.model()
    args, kwargs = specimen.call()
    before = snapshot(model)
    report = conjoin.report(model, args, example_kwargs=kwargs)
    fused = conjoin.optimize(model, args, example_kwargs=kwargs)
    blind = conjoin.optimize(model)
    after = snapshot(model)
    made = Case(
        request.param, specimen, args, kwargs, model, (before, after), report, fused, blind, {}
    )
    made.steps = {training: made.step(model, training=training) for training in (True, False)}
    yield made
    torch.set_num_threads(threads)


def snapshot(model):
    """All that a user could tell a change of the model by, as something that compares by value."""
    modules = [
        (
            name,
            type(module),
            module.training,
            {key: id(value) for key, value in vars(module).items()},
        )
        for name, module in model.named_modules()
    ]
    state = {
        key: value.numpy().tobytes() if isinstance(value, Tensor) else value
        for key, value in model.state_dict().items()
    }
    tensors = [*model.named_parameters(), *model.named_buffers()]
    versions = [(name, id(t), t._version, t.requires_grad, t.grad is None) for name, t in tensors]
    streams = [s.tolist() if isinstance(s, Tensor) else s for s in random_states()]
    return modules, state, versions, streams


def readers(case):
    """The sets of like layers that receive the very same tensor in a run of the model."""
    model = copy.deepcopy(case.model)
    found = collections.defaultdict(set)
    alive = []

    def note(name, kind):
        def hook(module, args, kwargs):
            tensor = args[0] if args else next(iter(kwargs.values()))
            alive.append(tensor)
            found[kind, id(tensor)].add(name)

        return hook

    for name, module in model.named_modules():
        for kind in KINDS:
            if isinstance(module, kind):
                module.register_forward_pre_hook(note(name, kind), with_kwargs=True)
    for training in (True, False):
        set_seed()
        args, kwargs = copy.deepcopy((case.args, case.kwargs))
        alive.append((model.train(training)(*args, **kwargs), args, kwargs))
    return [names for names in found.values() if len(names) > 1]


def test_the_zoo_is_large_and_no_name_stands_for_two_models():
    assert len(ZOO) == sum(len(file.MODELS) for file in FILES)
    assert len(ZOO) >= 150
    assert len({model.package for model in ZOO.values()}) >= 20


def test_every_group_that_a_run_shows_is_fused_or_refused(case):
    seen = readers(case)
    groups = case.report.groups
    listed = collections.Counter(layer for group in groups for layer in group.layers)
    shown = set().union(*seen)
    assert set(listed) >= shown
    assert set(listed.values()) <= {1}, "a layer is listed twice"
    for group in groups:
        # Beside what reads one tensor there are towers, and what is hidden behind activations.
        beyond = not set(group.layers) <= shown
        if group.fused:
            assert len(group.layers) > 1
            assert beyond or any(set(group.layers) <= names for names in seen)
        else:
            assert group.reason is not None
    fused = [group for group in groups if group.fused and set(group.layers) <= shown]
    assert bool(fused) == case.specimen.fuses


def test_report_and_optimize_leave_the_model_alone(case):
    before, after = case.snapshots
    assert after == before


@MODES
def test_the_same_function_when_found_by_observation(case, training):
    assert_same_step(case.step(case.fused, training=training), case.steps[training])


@MODES
def test_the_same_function_when_found_by_tracing(case, training):
    assert_same_step(case.step(case.blind, training=training), case.steps[training])


def test_checkpoints_load_both_ways(case):
    model, fused, other = (copy.deepcopy(m) for m in (case.model, case.fused, case.model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    fused.load_state_dict(other.state_dict(), strict=True)
    assert_same_state(fused, other)
    model.load_state_dict(fused.state_dict(), strict=True)
    assert_same_state(model, other)


def test_unfuse_gives_back_the_very_same_model(case):
    assert isinstance(case.fused, type(case.model))
    assert_same_state(case.fused, case.model)
    for optimized in (case.fused, case.blind):
        plain = conjoin.unfuse(optimized)
        assert_same_state(plain, case.model)
        assert_same_structure(plain, case.model)


def test_trained_weights_come_back(case):
    trained = [copy.deepcopy(case.model), copy.deepcopy(case.fused)]
    for model in trained:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step(model, case.args, case.kwargs)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    plain = conjoin.unfuse(trained[1], inplace=True)  # Some hold what cannot be copied by now.
    assert_same_structure(plain, case.model)
    assert_close(plain.state_dict(), trained[0].state_dict())


def test_optimizing_again_changes_nothing(case):
    if case.name not in AGAIN:
        pytest.skip("every fourth model is optimized twice")
    again = conjoin.optimize(case.fused, case.args, example_kwargs=case.kwargs)
    assert_same_structure(again, case.fused)
    assert_same_state(again, case.fused)
    assert conjoin.report(case.fused, case.args, example_kwargs=case.kwargs) == case.report


def test_copies_and_pickles_do_the_same(case):
    assert len(dict(views(copy.deepcopy(case.fused)))) == len(dict(views(case.fused)))
    buffer = io.BytesIO()
    try:
        torch.save(case.model, buffer)
    except Exception as error:  # noqa: BLE001  Whatever a model of others raises.
        pytest.skip(f"the original cannot be pickled: {error}")
    buffer = io.BytesIO()
    torch.save(case.fused, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert_same_structure(loaded, case.fused)
    assert_same_step(case.step(loaded), case.step(case.fused))


def test_state_goes_through_safetensors(case):
    safetensors = pytest.importorskip("safetensors.torch")
    try:
        safetensors.save(case.model.state_dict())
    except (RuntimeError, ValueError):
        pytest.skip("the original's does not either")
    loaded = safetensors.load(safetensors.save(case.fused.state_dict()))
    assert all(same_bits(loaded[key], value) for key, value in case.model.state_dict().items())


def test_save_pretrained_gives_a_checkpoint_of_the_plain_class(case, tmp_path):
    if not hasattr(case.model, "save_pretrained"):
        pytest.skip("the model has no such method")
    plain, fused = (
        reloaded(model, type(case.model), tmp_path / name)
        for name, model in (("plain", case.model), ("fused", case.fused))
    )
    if list(plain.state_dict()) != list(case.model.state_dict()):
        pytest.skip("the original's does not come back either")
    assert_same_structure(fused, plain)
    assert_same_state(fused, plain)


def reloaded(model, model_class, folder):
    model.save_pretrained(folder)
    return model_class.from_pretrained(folder, torch_dtype=torch.float64)
