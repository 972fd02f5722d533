"""A bias on some of the siblings: what is missing stays missing, and never trains."""

import copy
import io
import pickle

import pytest
import torch
from derivatives import assert_same_second_derivatives
from equivalence import assert_equivalent, assert_same_state, assert_same_structure
from families import EVERY_KIND, Family, assert_runs_once, fused
from torch import nn

import conjoin
from conjoin import checkpoints
from conjoin.launches import count_step
from conjoin.layers.releasing import release
from conjoin.layers.view import View, views
from conjoin.legality import Reason

CASES = {name: case for name, case in EVERY_KIND.items() if name != "Embedding"}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
BIASED = {
    "first": (True, False, False),
    "middle": (False, True, False, False),
    "ends": (True, True, False, True),
    "between": (False, True, True, False, True, False),
}
every_pattern = pytest.mark.parametrize("biased", BIASED.values(), ids=BIASED)
PATTERN = BIASED["ends"]


def family(case, biased=PATTERN):
    layers = [case.layer(2 + i % 3, bias=bias) for i, bias in enumerate(biased)]
    return Family(layers).double()


LINEAR = EVERY_KIND["Linear"]


@pytest.fixture
def plain():
    return family(LINEAR)


@pytest.fixture
def x():
    return LINEAR.input()


@every_pattern
@every_case
def test_same_function(case, biased):
    plain, x = family(case, biased), case.input()
    assert_equivalent(fused(plain), plain, (x,))
    assert_runs_once(fused(plain), x)


@every_case
def test_same_second_derivatives(case):
    plain = family(case)
    assert_same_second_derivatives(fused(plain), plain, case.input())


@every_pattern
def test_one_launch_more(biased):
    plain, x = family(LINEAR, biased), LINEAR.input()
    assert count_step(plain, (x,)).forward == len(biased)
    assert count_step(fused(plain), (x,)).forward == 2


@every_pattern
def test_what_is_missing_stays_missing(biased):
    plain = family(LINEAR, biased)
    model = fused(plain)
    assert [layer.bias is not None for layer in model.layers] == [*biased]
    assert_same_state(model, plain)
    widths = [2 + i % 3 for i, bias in enumerate(biased) if bias]
    assert [tuple(p.shape) for p in model.parameters()][1:] == [(sum(widths),)]
    assert [dict(layer.named_parameters()).keys() for layer in model.layers] == [
        dict(layer.named_parameters()).keys() for layer in plain.layers
    ]
    assert not list(model.buffers())


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


def released(model):
    for _, view in list(views(model)):
        release(view)
    return model


def loaded(assign):
    def load(model):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        for value in model.state_dict().values():
            value.zero_()
        model.load_state_dict(state, assign=assign)
        return model

    return load


def through_meta(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="meta")
    model.load_state_dict(state, assign=True)
    return model


def from_empty(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    return model


LIVES = {
    "deepcopy": copy.deepcopy,
    "pickle": through_pickle,
    "file": through_file,
    "released": released,
    "loaded": loaded(False),
    "assigned": loaded(True),
    "from meta": through_meta,
    "from empty": from_empty,
    "converted": lambda model: model.float().double(),
    "double": lambda model: model.to(torch.complex128).to(torch.float64),
}


@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("live", LIVES.values(), ids=LIVES)
@every_case
def test_life_goes_on(case, live):
    plain = family(case).float().double()
    model = live(fused(plain))
    assert_same_state(model, plain)
    assert_equivalent(model, plain, (case.input(),))
    if live is not released:
        assert_runs_once(model, case.input())
    assert_same_structure(released(model), plain)


def test_gradients_come_back(plain, x):
    model = fused(plain)
    for each in (model, plain):
        sum(y.square().sum() for y in each(x)).backward()
    for ours, theirs in zip(released(model).parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9)


@pytest.mark.parametrize("index", range(len(PATTERN)))
def test_one_is_taken_out(plain, x, index):
    model = fused(plain)
    with pytest.warns(UserWarning, match="taken out"):
        model.layers[index].requires_grad_(False)
    assert not isinstance(model.layers[index], View)
    plain.layers[index].requires_grad_(False)
    assert_equivalent(model, plain, (x,))
    assert_same_state(model, plain)


def train(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        sum(y.square().sum() for y in model(x)).backward()
        optimizer.step()


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.3)


def test_training_and_the_optimizers_state(plain, x):
    model = fused(plain)
    ours, theirs = adam(model), adam(plain)
    train(plain, theirs, x)
    train(model, ours, x)
    assert_equivalent(model, plain, (x,))
    separated = checkpoints.separate(ours, model)
    expected = theirs.state_dict()
    assert separated["state"].keys() == expected["state"].keys()
    for number, state in expected["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(separated["state"][number][key], value)
    again = fused(plain)
    resumed = adam(again)
    resumed.load_state_dict(checkpoints.merge(separated, resumed, again))
    train(again, resumed, x)
    train(plain, theirs, x)
    assert_equivalent(again, plain, (x,))


def test_compiled_and_exported(plain, x):
    model = conjoin.optimize(plain, (x,))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    program = torch.export.export(model, (x,))
    for each in (compiled, program.module()):
        for ours, theirs in zip(each(x), plain(x), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_optimized_in_inference_mode(plain, x):
    with torch.inference_mode():
        model = conjoin.optimize(plain, (x,))
        model(x)
    assert_equivalent(model, plain, (x,))


def test_autocast(plain, x):
    model = fused(plain.float())
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(model(x.float()), plain(x.float()), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-2)


@every_pattern
def test_optimize_and_report(biased, x):
    plain = family(LINEAR, biased)
    model = conjoin.optimize(conjoin.optimize(plain, (x,)), (x,))
    assert_equivalent(model, plain, (x,))
    for each in (plain, model):
        (group,) = conjoin.report(each, (x,)).groups
        assert group.launches == (len(biased), 2)
        assert group.fused


def test_two_layers_gain_nothing(x):
    plain = family(LINEAR, (True, False))
    step = count_step(plain, (x,))
    wide = count_step(fused(plain), (x,))
    assert wide.forward == step.forward
    assert wide.backward >= step.backward
    (group,) = conjoin.report(plain, (x,)).groups
    assert group.reason is Reason.BIAS_ON_SOME


@pytest.mark.parametrize("number", [3, 4])
def test_weights_that_are_joined_cost_a_launch_more(number):
    case = EVERY_KIND["ConvTranspose1d"]
    plain = family(case, (True, False, True, False)[:number])
    x = case.input()
    wide = count_step(fused(plain), (x,))
    assert wide.forward == 3
    groups = conjoin.report(plain, (x,)).groups
    assert [group.layers for group in groups if group.fused] == [
        tuple(f"layers.{i}" for i in ((0, 2) if number == 3 else range(4)))
    ]


def test_another_difference_is_what_is_told(x):
    plain = family(LINEAR, (True, True, True, False))
    plain.layers[3].requires_grad_(False)
    refused = conjoin.report(plain, (x,)).groups[-1]
    assert refused.layers == ("layers.3",)
    assert refused.reason is Reason.DIFFERENT_REQUIRES_GRAD


def test_marks_on_all_parameters(x):
    plain = family(LINEAR, (True, True, True, False))
    mark = {"scale": 2}
    for parameter in plain.parameters():
        parameter.mark = mark
    (group,) = conjoin.report(plain, (x,)).groups
    assert group.fused
    assert_equivalent(conjoin.optimize(plain, (x,)), plain, (x,))
    plain.layers[1].bias.mark = {}
    reasons = {group.layers: group.reason for group in conjoin.report(plain, (x,)).groups}
    assert reasons == {
        ("layers.0", "layers.2"): None,
        ("layers.1",): Reason.CUSTOM_PARAMETER,
        ("layers.3",): Reason.BIAS_ON_SOME,
    }
    pair = family(LINEAR, (True, False))
    for parameter in pair.parameters():
        parameter.mark = mark
    (group,) = conjoin.report(pair, (x,)).groups
    assert group.reason is Reason.BIAS_ON_SOME


def test_a_kind_that_does_not_lay_out_the_bias(x):
    class Old(type(conjoin.KINDS[0])):
        bias_on_some = False

    plain = family(LINEAR, (True, True, False, False, False))
    groups = conjoin.report(plain, (x,), kinds=(Old(),)).groups
    assert [group.layers for group in groups] == [
        ("layers.0", "layers.1"),
        ("layers.2", "layers.3", "layers.4"),
    ]


def test_a_branch_by_itself(plain):
    shapes = [
        [parameter.shape for parameter in nn.ModuleList([model.layers[2]]).parameters()]
        for model in (fused(plain), plain)
    ]
    assert shapes == [[(4, 4)], [(4, 4)]]
