"""Every hazard of the table: the optimized model does what the original does, on every call."""

import copy
import dataclasses

import pytest
import torch
from awkward import BATCHES, EXACT, HAZARDS, LIFE
from equivalence import (
    assert_close,
    assert_same_state,
    differentiable,
    random_states,
    set_seed,
    tensors,
    weighted_sum,
)
from torch import Tensor, nn

import conjoin

pytestmark = pytest.mark.filterwarnings("ignore")

MODES = ("train", "eval", "mixed")
CALLS = len(BATCHES)

VARIANTS = {
    "with inputs": lambda model, args, **settings: conjoin.optimize(model, args, **settings),
    "without inputs": lambda model, args, kinds, **_: conjoin.optimize(model, kinds=kinds),
    "copied": lambda model, args, **settings: copy.deepcopy(
        conjoin.optimize(model, args, **settings)
    ),
    "in place": lambda model, args, **settings: conjoin.optimize(
        model, args, inplace=True, **settings
    ),
}


@dataclasses.dataclass
class Played:
    """What a call leaves behind: tensors, which must be close, and facts, which must be equal."""

    facts: list
    tensors: dict[str, Tensor]


def made(model_class) -> nn.Module:
    set_seed()
    return model_class()


def arguments(hazard, call):
    set_seed(call)
    return hazard.inputs(call)


def described(value):
    """Everything about an output but its tensors' values."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape, value.requires_grad, value.layout
    if isinstance(value, dict):
        return type(value), [(key, described(item)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value), [described(item) for item in value]
    if dataclasses.is_dataclass(value):
        return type(value), described(vars(value))
    if isinstance(value, (nn.Module, Exception)):
        return value.__class__.__name__
    return type(value), value


def values(name, value) -> dict[str, Tensor]:
    """The tensors in an output, without their graphs."""
    found = {f"{name} {path}": tensor.detach() for path, tensor in tensors(value)}
    found = {key: t.dequantize() if t.is_quantized else t for key, t in found.items()}
    return {key: t.to_dense() if t.layout is not torch.strided else t for key, t in found.items()}


def play(model, inputs, names, call) -> Played:
    """One call and one backward pass; `names` are those of the original's parameters."""
    leaves, (args, kwargs) = differentiable(inputs)
    model.zero_grad()
    set_seed(call)
    error = output = None
    try:
        output = model(*args, **kwargs)
        found = values("output", output)
        loss = weighted_sum(tensor for _, tensor in tensors(output))
        if loss is not None:
            loss.backward()
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as raised:
        error = type(raised)
        found = {} if output is None else found
    if error is None:
        found |= {
            f"gradient of input {number}": gradient(leaf) for number, leaf in enumerate(leaves)
        }
        found |= {f"gradient of {name}": gradient(model.get_parameter(name)) for name in names}
    found |= {name: value.clone() for name, value in values("state", model.state_dict()).items()}
    facts = [error, described(output), described(own_attributes(model)), modes()]
    return Played([*facts, *random_states()], found | values("attribute", own_attributes(model)))


def gradient(leaf) -> Tensor:
    """The gradient; none counts as zeros."""
    return torch.zeros_like(leaf.detach()) if leaf.grad is None else leaf.grad.clone()


def own_attributes(model) -> dict:
    """What the model's own code may have left on it."""
    return {
        name: copy.copy(value)
        for name, value in vars(model).items()
        if isinstance(value, (int, float, list, dict, Tensor))
        and not name.startswith(("_", "conjoin"))
    }


def modes():
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_inference_mode_enabled(),
    )


def set_mode(model, mode, names):
    model.train(mode != "eval")
    if mode == "mixed":
        for number, name in enumerate(names):
            model.get_submodule(name).training = bool(number % 2)


def assert_same_play(ours: Played, theirs: Played):
    for mine, original in zip(ours.facts, theirs.facts, strict=True):
        same = torch.equal(mine, original) if isinstance(original, Tensor) else mine == original
        assert same, f"{mine} instead of {original}"
    assert_close(ours.tensors, theirs.tensors)


def assert_same_plays(ours, theirs, hazard, names, submodules):
    for mode in MODES:
        set_mode(ours, mode, submodules)
        set_mode(theirs, mode, submodules)
        for call in range(CALLS):
            inputs = arguments(hazard, call)
            assert_same_play(play(ours, inputs, names, call), play(theirs, inputs, names, call))


def parameter_names(model):
    return [name for name, _ in model.named_parameters()]


def module_names(model):
    return [name for name, _ in model.named_modules() if name]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("hazard", HAZARDS, ids=[hazard.name for hazard in HAZARDS])
def test_every_call_is_the_originals(hazard, variant):
    original, model = made(hazard.subject), made(hazard.subject)
    names, submodules = parameter_names(original), module_names(original)
    args, kwargs = arguments(hazard, 0)
    optimized = VARIANTS[variant](model, args, example_kwargs=kwargs, kinds=hazard.kinds)
    assert_same_state(conjoin.unfuse(optimized), original)
    assert_same_plays(optimized, original, hazard, names, submodules)


@pytest.mark.parametrize("hazard", HAZARDS, ids=[hazard.name for hazard in HAZARDS])
def test_siblings_are_fused_or_refused_for_the_reason(hazard):
    args, kwargs = arguments(hazard, 0)
    model = made(hazard.subject)
    groups = conjoin.report(model, args, example_kwargs=kwargs, kinds=hazard.kinds).groups
    assert groups
    assert {group.reason for group in groups if group.reason} == {hazard.outcome} - {EXACT}
    assert any(group.fused for group in groups) == (hazard.outcome is EXACT)


LIVES = {
    f"{hazard.name}-{model_class.__name__}": (hazard, model_class)
    for hazard in LIFE
    for model_class in hazard.models
}


@pytest.mark.parametrize(("hazard", "model_class"), LIVES.values(), ids=LIVES)
def test_life_goes_on_as_the_originals(hazard, model_class):
    original, model = made(model_class), made(model_class)
    args, _ = arguments(hazard, 0)
    optimized = conjoin.optimize(model, args)
    plays = []
    for lived in (optimized, original):
        set_seed()
        result = hazard.subject(lived, *(arg.clone() for arg in args))
        found = values("result", result) | values("state", lived.state_dict())
        plays.append(Played([described(result)], found))
    assert_same_play(*plays)
    names, submodules = parameter_names(original), module_names(original)
    assert_same_plays(optimized, original, hazard, names, submodules)
