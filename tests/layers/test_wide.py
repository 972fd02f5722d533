"""The wide layer and its views: state, conversion, copies, and the way back."""

import copy
import io
import pickle

import pytest
import safetensors.torch
import torch
from equivalence import (
    assert_close,
    assert_equivalent,
    assert_same_state,
    assert_same_structure,
    gradients,
    same_bits,
)
from families import EVERY_KIND, Family, assert_runs_once, fused, merge
from torch import nn
from torch.nn.utils import parametrize

from conjoin.layers.releasing import release
from conjoin.layers.view import View, views, wides

CASES = {
    f"{name} {'+'.join(map(str, widths))}": (case, widths)
    for name, case in EVERY_KIND.items()
    for widths in ((3, 3), (2, 1, 4))
}
every_case = pytest.mark.parametrize(("case", "widths"), CASES.values(), ids=CASES)
every_kind = pytest.mark.parametrize("case", EVERY_KIND.values(), ids=EVERY_KIND)


@pytest.fixture
def plain(case, widths=(2, 3)):
    return case.family(widths)


@every_case
def test_state_dict_is_the_originals(case, widths):
    plain = case.family(widths)
    assert_same_state(fused(plain), plain)


def test_state_dict_tells_no_more_versions_than_the_original():
    plain = EVERY_KIND["Linear"].family()
    assert fused(plain).state_dict()._metadata == plain.state_dict()._metadata


@every_case
def test_state_dict_hands_out_views(case, widths):
    model = fused(case.family(widths))
    source = case.family(widths)
    for name, tensor in model.state_dict().items():
        tensor.copy_(source.state_dict()[name])
    assert_same_state(model, source)
    assert_equivalent(model, source, (case.input(),))


@every_case
def test_safetensors(case, widths, tmp_path):
    plain = case.family(widths)
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(fused(plain).state_dict(), file)
    assert file.read_bytes() == safetensors.torch.save(plain.state_dict())
    target = fused(case.family(widths))
    target.load_state_dict(safetensors.torch.load_file(file))
    assert_same_state(target, plain)


@every_case
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints_load_both_ways(case, widths, assign):
    one, other = case.family(widths), case.family(widths)
    model = fused(one)
    before = [id(p) for p in model.parameters()]
    assert str(model.load_state_dict(other.state_dict(), assign=assign)) == str(
        other.load_state_dict(other.state_dict())
    )
    assert_same_state(model, other)
    assert before == [id(p) for p in model.parameters()]
    assert_runs_once(model, case.input())
    one.load_state_dict(model.state_dict(), assign=assign)
    assert_same_state(one, other)


def words(model, state, **settings):
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(state, **settings)
    return str(error.value)


@every_kind
def test_wrong_checkpoints_in_pytorchs_own_words(case, plain):
    model = fused(plain)
    state = plain.state_dict()
    missing = {name: value for name, value in state.items() if name != "layers.1.weight"}
    wrong = {**state, "layers.1.weight": torch.zeros(1), "layers.7.bias": torch.zeros(2)}
    for each in (missing, wrong, {}):
        assert words(model, each) == words(plain, each)
    assert str(model.load_state_dict(missing, strict=False)) == str(
        plain.load_state_dict(missing, strict=False)
    )
    assert_same_state(model, plain)


@pytest.mark.parametrize("assign", [True, False])
def test_part_of_a_checkpoint(assign):
    case = EVERY_KIND["Linear"]
    plain, other = case.family((2, 3)), case.family((2, 3))
    model = fused(plain)
    part = {name: value for name, value in other.state_dict().items() if "1." in name}
    for each in (plain, model):
        each.load_state_dict(part, strict=False, assign=assign)
    assert_same_state(model, plain)
    assert_runs_once(model, case.input())


@every_case
def test_assign_of_another_dtype(case, widths):
    plain, other = case.family(widths), case.family(widths).to(torch.bfloat16)
    model = fused(plain)
    model.load_state_dict(other.state_dict(), assign=True)
    assert_same_state(model, other)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    x = case.input()
    x = x.to(torch.bfloat16) if x.is_floating_point() else x
    for ours, theirs in zip(model(x), other(x), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_case
def test_assign_to_the_meta_device(case, widths):
    plain = case.family(widths)
    model = fused(case.family(widths).to("meta"))
    state = plain.state_dict()
    model.load_state_dict(state, assign=True)
    assert_same_state(model, plain)
    assert_equivalent(model, plain, (case.input(),))
    assert_runs_once(model, case.input())


@every_kind
def test_swapped_parameters(case, plain):
    other = case.family((2, 3))
    model = fused(plain)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for each in (plain, model):
            each.load_state_dict(other.state_dict())
            each.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same_state(model, plain)
    assert all(p.dtype is torch.float32 for p in model.parameters())


CONVERSIONS = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "meta": lambda model: model.to("meta"),
    "there and back": lambda model: model.float().double(),
    "requires_grad_": lambda model: model.requires_grad_(True),
    "eval": lambda model: model.eval(),
}


@every_kind
@pytest.mark.parametrize("convert", CONVERSIONS.values(), ids=CONVERSIONS)
def test_conversion(case, plain, convert):
    model = convert(fused(plain))
    assert_same_state(model, convert(plain))
    assert len(list(model.parameters())) == len(plain.layers[0].state_dict())


@every_kind
def test_to_empty(case, plain):
    model = fused(plain).to("meta").to_empty(device="cpu")
    model.load_state_dict(plain.state_dict())
    assert_equivalent(model, plain, (case.input(),))
    assert_runs_once(model, case.input())


@every_case
def test_copies(case, widths):
    plain = case.family(widths)
    model = fused(plain)
    x = case.input()
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(stream, weights_only=False),
    ]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for each in copies:
        assert_same_state(each, plain)
        assert_equivalent(each, plain, (x,))
        assert_runs_once(each, x)


@every_kind
def test_copy_of_one_view(case, plain):
    model = fused(plain)
    alone = copy.deepcopy(model.layers[1])
    x = case.input()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_state(alone, plain.layers[1])
    torch.testing.assert_close(alone(x), plain.layers[1](x), rtol=0, atol=1e-9)
    assert_same_state(release(alone), plain.layers[1])


def train(model, x):
    model.zero_grad()
    sum(output.square().sum() for output in model(x)).backward()


@every_case
def test_the_way_back(case, widths):
    plain = case.family(widths)
    model = fused(plain)
    x = case.input()
    train(plain, x)
    train(model, x)
    expected = gradients(plain)
    for view in [view for _, view in views(model)]:
        layer = release(view)
        assert layer is view
        assert type(layer) is type(plain.layers[0])
    assert_same_structure(model, plain)
    assert_same_state(model, plain)
    assert_close(gradients(model), expected, "gradient of")
    for layer, original in zip(model.layers, plain.layers, strict=True):
        assert list(layer._parameters) == list(original._parameters)
        assert vars(layer).keys() == vars(original).keys()
        assert [p.stride() for p in layer.parameters()] == [
            p.stride() for p in original.parameters()
        ]


@every_kind
def test_release_of_one_leaves_the_others(case):
    plain = case.family((2, 3, 1))
    model = fused(plain)
    release(model.layers[1])
    with torch.no_grad():
        for parameter in model.layers[1].parameters():
            parameter.add_(1)
        for parameter in plain.layers[1].parameters():
            parameter.add_(1)
    assert_same_state(model, plain)
    assert_equivalent(model, plain, (case.input(),))


def test_gradients_go_along():
    plain = EVERY_KIND["Conv2d"].family((2, 3))
    train(plain, EVERY_KIND["Conv2d"].input())
    plain.layers[0].bias.grad = None
    expected = gradients(plain) | {"layers.0.bias": torch.zeros(2).double()}
    merge(plain.layers)
    assert_close(gradients(plain), expected, "gradient of")


@pytest.mark.parametrize("flag", [True, False])
def test_requires_grad_is_kept(flag):
    plain = EVERY_KIND["Linear"].family((2, 3)).requires_grad_(flag)
    model = fused(plain)
    assert {p.requires_grad for p in model.parameters()} == {flag}
    for layer in model.layers:
        assert {p.requires_grad for p in release(layer).parameters()} == {flag}


def test_freezing_one_sibling():
    plain = EVERY_KIND["Linear"].family((2, 3))
    model = fused(plain)
    for each in (plain, model):
        each.layers[0].requires_grad_(False)
    assert_equivalent(model, plain, (EVERY_KIND["Linear"].input(),))
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


ASSIGNMENTS = {
    "weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones_like(layer.weight))),
    "no bias": lambda layer: setattr(layer, "bias", None),
    "in place": lambda layer: layer.weight.data.fill_(2),
    "initialized": lambda layer: nn.init.constant_(layer.weight, 0.5),
    "slice": lambda layer: layer.weight.detach()[0].fill_(2),
}


@pytest.mark.parametrize("change", ASSIGNMENTS.values(), ids=ASSIGNMENTS)
@pytest.mark.parametrize("name", ["Linear", "ConvTranspose1d"])
def test_assignment(name, change):
    """Whatever a user does to a sibling's parameters happens to it, and to it alone."""
    case = EVERY_KIND[name]
    plain = case.family((2, 3))
    model = fused(plain)
    for each in (plain, model):
        change(each.layers[1])
    assert_same_state(model, plain)


def test_reset_parameters():
    plain = EVERY_KIND["Linear"].family((2, 3))
    model = fused(plain)
    for each in (plain, model):
        torch.manual_seed(3)
        each.layers[1].reset_parameters()
    assert_same_state(model, plain)


def test_replacement_and_deletion():
    plain = EVERY_KIND["Linear"].family((2, 3, 1))
    model = fused(plain)
    added = nn.Linear(4, 2).double()
    for each in (plain, model):
        each.layers[0] = added
        del each.layers[2]
    assert_same_state(model, plain)
    assert_equivalent(model, plain, (EVERY_KIND["Linear"].input(),))


@every_kind
def test_other_parameters_by_name_after_a_replacement(case, plain):
    """As for `functional_call` and `torch.export`."""
    model, x = fused(plain), case.input()
    for each in (plain, model):
        each.layers[1] = copy.deepcopy(plain.layers[1])
    ours, theirs = (
        torch.func.functional_call(
            each, {name: 2 * value for name, value in each.named_parameters()}, (x,)
        )
        for each in (model, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    assert model.get_parameter("layers.0.wide.weight") is model.layers[0].wide_layer.weight
    ours = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(ours, plain(x), rtol=0, atol=1e-9)


def test_attributes_of_parameters_are_kept():
    plain = EVERY_KIND["Linear"].family((2, 3))
    for parameter in plain.parameters():
        parameter.tag = "kept"
    merge(plain.layers, enclosing=plain)
    assert [p.tag for p in plain.parameters()] == ["kept"] * 2
    assert [p.tag for p in release(plain.layers[1]).parameters()] == ["kept"] * 2


@pytest.mark.parametrize("name", ["Conv2d", "Conv3d", "ConvTranspose2d"])
def test_channels_last_strides_are_kept(name):
    case = EVERY_KIND[name]
    last = torch.channels_last_3d if name == "Conv3d" else torch.channels_last
    plain = case.family((2, 3)).to(memory_format=last)
    model = fused(plain)
    assert [w.stride() for w in model.state_dict().values()] == [
        w.stride() for w in plain.state_dict().values()
    ]
    for view in [view for _, view in views(model)]:
        release(view)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.stride() == theirs.stride()


@every_kind
def test_names_and_parameters(case, plain):
    model = fused(plain)
    names = [name for name, _ in model.named_parameters()]
    assert len(names) == len(set(names)) == len(plain.layers[0].state_dict())
    for layer in model.layers:
        assert isinstance(layer, type(plain.layers[0]))
        own = dict(layer.named_parameters())
        assert own.keys() == layer.state_dict().keys()
        assert all(torch.equal(own[name], layer.state_dict()[name]) for name in own)
        assert all(isinstance(parameter, nn.Parameter) for parameter in own.values())
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


@every_kind
def test_names_of_modules(case, plain):
    """With duplicates, the wide layer is listed below its first view only."""
    layers = list(plain.layers)
    wide = merge(layers, enclosing=plain)
    every = [name for name, m in plain.named_modules(remove_duplicate=False) if m is wide]
    assert every == ["layers.0.wide"]
    names = [name for name, _ in plain.named_parameters(remove_duplicate=False)]
    assert names == [f"layers.0.wide.{name}" for name, _ in wide.named_parameters()]
    assert [m for m in plain.modules() if m is wide] == [wide]
    assert [list(layer.named_children()) for layer in layers] == [[], []]


@every_kind
def test_a_part_of_the_model_lists_its_own_parameters(case, plain):
    model = fused(plain)
    for of in (lambda m: m.layers[1], lambda m: nn.Sequential(m.layers[0])):
        once, every = (
            dict(of(model).named_parameters(remove_duplicate=each)) for each in (True, False)
        )
        assert [*every] == [*once]
        assert all(every[name] is once[name] for name in once)
        theirs = dict(of(plain).named_parameters())
        assert [p.shape for p in every.values()] == [p.shape for p in theirs.values()]


@every_kind
def test_gradients_of_a_part(case, plain):
    model, x = fused(plain), case.input()
    assert model.layers[0].weight.grad is None
    for each in (plain, model):
        train(each, x)
    same_gradients(model, plain)
    for each in (plain, model):
        each.layers[1].weight.grad = torch.ones_like(each.layers[1].weight)
        each.layers[0].weight.grad.mul_(2)
    same_gradients(model, plain)
    model.layers[1].weight.grad = None
    assert not model.layers[1].weight.grad.any()  # The other's lies in the same tensor.
    plain.layers[1].weight.grad.zero_()
    same_gradients(model, plain)
    assert all(isinstance(layer, View) for layer in model.layers)


def same_gradients(model, plain):
    for layer, original in zip(model.layers, plain.layers, strict=True):
        ours, theirs = (
            {name: p.grad for name, p in each.named_parameters()} for each in (layer, original)
        )
        assert_close(ours, theirs, "gradient of")


RELEASES = {
    "other dtype": lambda p: setattr(p, "data", p.data.float()),
    "other shape": lambda p: setattr(p, "data", p.data[..., :1].contiguous()),
    "frozen": lambda p: setattr(p, "requires_grad", False),
    "frozen by a method": lambda p: p.requires_grad_(False),
    "hook": lambda p: p.register_hook(lambda gradient: gradient * 3),
    "hook after": lambda p: p.register_post_accumulate_grad_hook(lambda p: p.grad.mul_(3)),
}
STAYS = {
    "other values": lambda p: setattr(p, "data", torch.full_like(p.data, 2)),
    "values in place": lambda p: p.data.mul_(2),
    "values without gradients": lambda p: torch.no_grad()(p.mul_)(2),
    "still trains": lambda p: setattr(p, "requires_grad", True),
    "still trains by a method": lambda p: p.requires_grad_(True),
}


@every_kind
@pytest.mark.parametrize("change", [*RELEASES, *STAYS])
def test_a_part_acts_as_the_parameter_that_it_was(case, plain, change):
    """What one wide parameter cannot have for one part only makes the sibling a plain layer."""
    model = fused(plain)
    for each in (plain, model):
        (RELEASES | STAYS)[change](next(each.layers[1].parameters()))
    assert [isinstance(layer, View) for layer in model.layers] == [True, change in STAYS]
    assert_same_state(model, plain)
    for layer, original in zip(model.layers, plain.layers, strict=True):
        ours, theirs = (
            [(p.requires_grad, p.dtype, p.shape) for p in each.parameters()]
            for each in (layer, original)
        )
        assert ours == theirs
    if not change.startswith("other"):  # A layer of mixed types or shapes does not run.
        assert_equivalent(model, plain, (case.input(),))


@every_kind
def test_to_the_meta_device_and_back_while_somebody_has_a_part(case, plain):
    model = fused(plain)
    state = {name: value.clone() for name, value in plain.state_dict().items()}
    held = [[layer.weight for layer in each.layers] for each in (model, plain)]
    for each in (model, plain):
        each.to("meta")
        assert {layer.weight.device.type for layer in each.layers} == {"meta"}
        each.to_empty(device="cpu").load_state_dict(state)
    assert_same_state(model, plain)
    assert_equivalent(model, plain, (case.input(),))
    for ours, theirs in zip(*held, strict=True):
        assert torch.equal(ours.detach(), theirs.detach())


class Squared(nn.Module):
    def forward(self, weight):
        return weight.square()


@every_kind
def test_parametrizing_one_sibling(case, plain):
    model = fused(plain)
    for each in (plain, model):
        parametrize.register_parametrization(each.layers[1], "weight", Squared())
    assert [isinstance(layer, View) for layer in model.layers] == [True, False]
    assert parametrize.is_parametrized(model.layers[1], "weight")
    assert not parametrize.is_parametrized(model.layers[0])
    assert_same_state(model, plain)
    assert_equivalent(model, plain, (case.input(),))
    parametrize.remove_parametrizations(model.layers[1], "weight")
    parametrize.remove_parametrizations(plain.layers[1], "weight")
    assert_same_state(model, plain)


@every_kind
def test_copies_of_a_part(case, plain):
    part = fused(plain).layers[1].weight
    for each in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        assert type(each) is nn.Parameter
        assert torch.equal(each, plain.layers[1].weight)
        assert each.untyped_storage().data_ptr() != part.untyped_storage().data_ptr()
    assert repr(part).startswith("Parameter containing:")


def test_words_of_a_view():
    model = fused(EVERY_KIND["Linear"].family((2, 3)))
    assert repr(model.layers[1]) == (
        "Linear(in_features=4, out_features=3, bias=True, part 1 of 2)"
    )
    assert repr(model.layers[1].wide_layer) == "Wide(Linear, 2+3)"
    assert type(model.layers[1]).__name__ == "Linear"
    assert isinstance(model.layers[1], View)


def test_views_and_wides():
    model = nn.ModuleList([fused(EVERY_KIND["Linear"].family((2, 3))) for _ in range(2)])
    assert [name for name, _ in views(model)] == [
        f"{i}.layers.{j}" for i in range(2) for j in range(2)
    ]
    assert [[name for name, _ in members] for members in wides(model).values()] == [
        ["0.layers.0", "0.layers.1"],
        ["1.layers.0", "1.layers.1"],
    ]


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=0.1),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, weight_decay=0.1),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
}


@every_kind
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training(case, plain, optimizer):
    model = fused(plain)
    inputs = [case.input() for _ in range(5)]
    for each in (plain, model):
        optimize = optimizer(each.parameters())
        for x in inputs:
            train(each, x)
            optimize.step()
    assert_close(model.state_dict(), plain.state_dict())


def test_parts_are_contiguous_where_asked():
    case = EVERY_KIND["Conv2d"]
    plain = case.family((2, 3))
    x = case.input()
    first, second = fused(plain, contiguous=frozenset({1}))(x)
    assert not first.is_contiguous()
    assert second.is_contiguous()
    assert_equivalent(fused(plain, contiguous=frozenset({0, 1})), plain, (x,))


def test_storage_is_given_up_group_by_group():
    family = Family([nn.Linear(4, 3), nn.Linear(4, 3)])
    storages = [p.untyped_storage()._weak_ref() for p in family.parameters()]
    merge(family.layers)
    assert all(torch.UntypedStorage._expired(storage) for storage in storages)
    for storage in storages:
        torch.UntypedStorage._free_weak_ref(storage)


def test_same_bits_of_special_values():
    plain = EVERY_KIND["Linear"].family((2, 3))
    with torch.no_grad():
        plain.layers[0].weight[0, 0], plain.layers[1].bias[0] = float("nan"), -0.0
    model = fused(plain)
    assert_same_state(model, plain)
    assert same_bits(release(model.layers[1]).bias, plain.layers[1].bias)
