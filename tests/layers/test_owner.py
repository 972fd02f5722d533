"""Modules that lent their Parameters: state, attributes, conversion, copies, the way back."""

import copy
import io
import pickle
import warnings
from unittest import mock

import pytest
import safetensors.torch
import torch
from equivalence import (
    assert_close,
    assert_equivalent,
    assert_same_state,
    assert_same_structure,
    gradients,
    tensors,
)
from products import AutoInt, Heads, MMoE, optimized
from torch import nn
from torch.nn.parallel.replicate import replicate
from torch.nn.utils import parametrize, prune, weight_norm

import conjoin
from conjoin import checkpoints
from conjoin.layers.owner import Owner
from conjoin.layers.part import Part

EACH = ("AutoInt", "CrossAttention", "MMoE", "Heads", "Nested")
each_model = pytest.mark.parametrize("name", EACH)


def raw(model):
    """The names of the Parameters that a plain model's own modules hold."""
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in layers]


def at(model, name):
    """The owner of a Parameter, and the name that it has there."""
    owner, _, own = name.rpartition(".")
    return model.get_submodule(owner), own


@each_model
def test_state_dict_is_the_originals(name, tmp_path):
    model, _, fused = optimized(name)
    assert_same_state(fused, model)
    assert fused.state_dict()._metadata == model.state_dict()._metadata
    safetensors.torch.save_file(fused.state_dict(), tmp_path / "state")
    assert list(fused.state_dict(keep_vars=True)) == list(model.state_dict())
    for name in raw(model):
        assert isinstance(fused.state_dict(keep_vars=True)[name], nn.Parameter)


@each_model
@pytest.mark.parametrize("assign", [False, True])
def test_loads_a_plain_checkpoint(name, assign):
    model, inputs, fused = optimized(name)
    other = type(model)().double()
    keys = fused.load_state_dict(other.state_dict(), assign=assign)
    assert not keys.missing_keys
    assert_same_state(fused, other)
    assert_equivalent(fused, other, inputs)
    type(model)().double().load_state_dict(fused.state_dict())


def test_state_dict_hands_out_views():
    _, _, fused = optimized("AutoInt")
    for tensor in fused.state_dict().values():
        tensor.zero_()
    assert not any(parameter.any() for parameter in fused.parameters())


def test_errors_of_loading_name_the_original_keys():
    model, _, fused = optimized("AutoInt")
    state = model.state_dict()
    for wrong in (
        {key: value for key, value in state.items() if key != "W_key"},
        {**state, "more": state["W_key"]},
        {**state, "W_key": torch.ones(2, 2)},
    ):
        messages = []
        for each in (model, fused):
            with pytest.raises(RuntimeError) as raised:
                each.load_state_dict(wrong)
            messages.append(str(raised.value))
        assert messages[0] == messages[1]


@each_model
def test_the_wide_parameter_is_listed_once(name):
    model, _, fused = optimized(name)
    listed = list(fused.parameters())
    assert len({id(parameter) for parameter in listed}) == len(listed) < len([*model.parameters()])
    assert sum(p.numel() for p in listed) == sum(p.numel() for p in model.parameters())
    assert [n for n, _ in fused.named_children()] == [n for n, _ in model.named_children()]


@each_model
def test_each_module_lists_its_own_by_their_names(name):
    model, _, fused = optimized(name)
    for path, module in model.named_modules():
        ours = fused.get_submodule(path).named_parameters(recurse=False)
        assert [n for n, _ in ours] == [n for n, _ in module.named_parameters(recurse=False)]


def test_a_module_that_holds_some_of_the_siblings_lists_its_parts():
    model, inputs, fused = optimized("Heads")
    weight, _ = fused.value.parameters()
    assert isinstance(weight, Part)
    assert weight.shape == model.value.weight.shape
    optimizer = torch.optim.SGD(fused.value.parameters(), lr=0.1)
    before = copy.deepcopy(fused.state_dict())
    sum(part.sum() for part in fused(*inputs)).backward()
    optimizer.step()
    changed = {k for k, value in fused.state_dict().items() if not value.equal(before[k])}
    assert changed == {"value.weight", "value.bias"}


@each_model
def test_parameters_act_as_such(name):
    model, inputs, fused = optimized(name)
    for each in (model, fused):
        torch.manual_seed(0)
        for parameter in map(each.get_parameter, raw(model)):
            assert isinstance(parameter, nn.Parameter)
            assert parameter.is_leaf
            nn.init.normal_(parameter)
            parameter.data.mul_(0.5)
    assert_same_state(fused, model)
    assert_equivalent(fused, model, inputs)
    for each in (model, fused):
        outputs = each.eval()(*inputs)
        several = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        sum(output.square().sum() for output in several).backward()
    for parameter in raw(model):
        ours, theirs = fused.get_parameter(parameter), model.get_parameter(parameter)
        torch.testing.assert_close(ours.grad, theirs.grad)


def put(module, name):
    setattr(module, name, nn.Parameter(torch.full_like(getattr(module, name), 0.5)))


def put_none(module, name):
    setattr(module, name, None)


def delete(module, name):
    delattr(module, name)


def register(module, name):
    module.register_parameter(name, nn.Parameter(torch.ones_like(getattr(module, name))))


def freeze(module, name):
    getattr(module, name).requires_grad_(False)


def hook(module, name):
    getattr(module, name).register_hook(lambda gradient: 2 * gradient)


def replace_by_attribute(module, name):
    value = getattr(module, name).detach()
    delattr(module, name)
    setattr(module, name, value)


ALONE = [put, put_none, delete, register, freeze, hook, replace_by_attribute]


@pytest.mark.parametrize("change", ALONE)
@pytest.mark.parametrize("name", ["AutoInt", "CrossAttention", "MMoE"])
@pytest.mark.filterwarnings("ignore:.*is taken out of its wide layer")
def test_a_change_of_one_alone(name, change):
    model, inputs, fused = optimized(name)
    parameter = raw(model)[1]
    outcomes = []
    for each in (model, fused):
        change(*at(each, parameter))
        each.eval()
        try:
            outputs = each(*inputs)
        except Exception as error:  # noqa: BLE001 - Whatever the model raises now.
            outcomes.append((type(error), str(error)))
            continue
        several = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        sum(output.square().sum() for output in several).backward()
        grads = {n: getattr(at(each, n)[0], at(each, n)[1], None) for n in raw(model)}
        grads = {n: None if p is None else p.grad for n, p in grads.items()}
        outcomes.append([*several, *grads.values()])
    if isinstance(outcomes[0], tuple):
        assert outcomes[1] == outcomes[0]
    else:
        for ours, theirs in zip(outcomes[1], outcomes[0], strict=True):
            assert ours is theirs is None or ours is not None
            if theirs is not None:
                torch.testing.assert_close(ours, theirs)
    assert list(fused.state_dict()) == list(model.state_dict())
    plain = conjoin.unfuse(fused)
    assert_same_structure(plain, model)
    assert_same_state(plain, model)
    facts = [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert facts == [(n, p.requires_grad) for n, p in plain.named_parameters()]


def test_only_a_parameter_can_be_assigned():
    _, _, fused = optimized("AutoInt")
    with pytest.raises(TypeError, match="cannot assign"):
        fused.W_key = torch.ones(8, 8)
    assert isinstance(fused.W_key, Part)


def test_a_list_goes_on_as_one():
    model, inputs, fused = optimized("MMoE")
    for each in (model, fused):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            each.gates[0] = nn.Parameter(torch.ones(6, 3, dtype=torch.float64))
    torch.testing.assert_close(fused.eval()(*inputs), model.eval()(*inputs))
    for each in (model, fused):
        each.gates.append(nn.Parameter(torch.ones(2)))
    assert [p.shape for p in fused.gates] == [p.shape for p in model.gates]
    assert_same_state(fused, model)


@each_model
def test_conversions(name):
    model, inputs, fused = optimized(name)
    fused.float()
    assert {p.dtype for p in fused.state_dict().values()} == {torch.float32}
    assert_same_state(fused, copy.deepcopy(model).float())
    fused.double().to("meta")
    assert all(p.is_meta for p in fused.parameters())
    fused.to_empty(device="cpu")
    fused.load_state_dict(model.state_dict())
    assert_equivalent(fused, model, inputs)
    assert {m.training for m in fused.eval().modules()} == {False}


@each_model
@pytest.mark.parametrize("copied", ["deepcopy", "pickle", "save"])
def test_copies(name, copied):
    model, inputs, fused = optimized(name)
    if copied == "deepcopy":
        again = copy.deepcopy(fused)
    elif copied == "pickle":
        again = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    assert len([*again.parameters()]) == len([*fused.parameters()])
    for parameter in again.parameters():
        parameter.data.add_(1)
    assert_same_state(fused, model)
    again.load_state_dict(model.state_dict())
    assert_equivalent(again, model, inputs)
    assert_same_structure(conjoin.unfuse(again), model)


@each_model
def test_optimizer_state(name):
    model, inputs, fused = optimized(name)
    optimizers = [torch.optim.Adam(each.parameters()) for each in (model, fused)]
    for each, optimizer in zip((model, fused), optimizers, strict=True):
        outputs = each.eval()(*inputs)
        several = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        sum(output.square().sum() for output in several).backward()
        optimizer.step()
    expected = optimizers[0].state_dict()
    found = checkpoints.separate(optimizers[1], fused)
    assert found["param_groups"] == expected["param_groups"]
    torch.testing.assert_close(found["state"], expected["state"])
    merged = checkpoints.merge(expected, optimizers[1], fused)
    torch.testing.assert_close(merged["state"], optimizers[1].state_dict()["state"])


@pytest.mark.parametrize("name", ["AutoInt", "MMoE"])
def test_compiles_and_exports(name):
    model, inputs, fused = optimized(name)
    model.eval(), fused.eval()
    compiled = torch.compile(copy.deepcopy(fused), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    program = torch.export.export(fused, inputs)
    torch.testing.assert_close(program.module()(*inputs), model(*inputs))
    parameters = dict(fused.named_parameters())
    called = torch.func.functional_call(fused, parameters, inputs)
    torch.testing.assert_close(called, model(*inputs))


def test_functional_call_takes_either_name():
    model, inputs, fused = optimized("AutoInt")
    weight = torch.randn(8, 8, dtype=torch.float64)
    outputs = [torch.func.functional_call(m, {"W_key": weight}, inputs) for m in (fused, model)]
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(fused(*inputs), model(*inputs))


def by_weight_norm(module):
    weight_norm(module, "W_key")


def by_pruning(module):
    prune.l1_unstructured(module, "W_key", amount=0.5)


def by_parametrization(module):
    parametrize.register_parametrization(module, "W_key", nn.Tanh())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", [by_weight_norm, by_pruning, by_parametrization])
def test_a_parameter_that_becomes_computed(change):
    model, inputs, fused = optimized("AutoInt")
    for each in (model, fused):
        change(each)
    torch.testing.assert_close(fused(*inputs), model(*inputs))
    assert_same_state(fused, model)


def test_isinstance_and_class():
    for name, cls in (("AutoInt", AutoInt), ("MMoE", MMoE), ("Heads", Heads)):
        _, _, fused = optimized(name)
        assert isinstance(fused, cls)
        assert type(fused).__qualname__ == cls.__qualname__
    assert isinstance(optimized("MMoE")[2].gates, nn.ParameterList)


def test_an_attribute_that_is_set_on_the_class_counts():
    class Scaled(nn.Module):
        scale = 1.0

        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(2, 3)) for _ in range(2))

        def forward(self, x):
            return self.scale * (x @ self.a), x @ self.b

    x = torch.ones(1, 2)
    fused = conjoin.optimize(Scaled(), (x,))
    type(fused).scale = 3.0
    assert fused(x)[0].sum() == 18


def test_optimizing_again_changes_nothing():
    model, inputs, fused = optimized("Nested")
    again = conjoin.optimize(fused, inputs)
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in fused.named_parameters()]
    assert_equivalent(again, model, inputs)


def test_an_owner_has_no_names_that_the_users_class_may_have():
    added = {name for name in vars(Owner) if not hasattr(nn.Module, name)}
    assert all(name.startswith(("conjoin_", "__")) for name in added)


class Refusing(type):
    """Makes no subclasses that conjoin would."""

    def __new__(cls, name, bases, names):
        if "conjoin_base" in names:
            raise TypeError("no subclasses")
        return super().__new__(cls, name, bases, names)


class Unsubclassed(AutoInt, metaclass=Refusing):
    pass


def test_a_class_that_cannot_have_subclasses():
    _, inputs, _ = optimized("AutoInt")
    fused = conjoin.optimize(Unsubclassed().double(), inputs)
    assert type(fused) is Unsubclassed
    assert not isinstance(fused, Owner)


def test_a_new_object_of_an_owners_class():
    model, inputs, fused = optimized("AutoInt")
    target = type(fused)().double()
    target.load_state_dict(fused.state_dict())
    assert_equivalent(target, model, inputs)
    assert type(conjoin.unfuse(target)) is type(model)
    conjoin.report(target, inputs)


def test_a_shallow_copy_shares_what_is_assigned():
    model, _, fused = optimized("AutoInt")
    fused = copy.deepcopy(fused)
    [name, *_] = raw(model)
    other = copy.copy(fused)
    owner, own = at(other, name)
    new = nn.Parameter(torch.zeros_like(getattr(owner, own)))
    with pytest.warns(UserWarning, match="taken out"):
        setattr(owner, own, new)
    assert getattr(at(fused, name)[0], own) is new
    fused.train()
    assert_same_state(conjoin.unfuse(fused), conjoin.unfuse(other))


class Exponential(nn.Module):
    def forward(self, w):
        return w.exp()

    def right_inverse(self, w):
        return w.log()


@pytest.mark.parametrize("parametrized", [True, False])
def test_other_memory_for_a_parameter_alone(parametrized):
    """`parametrize` gives the original other values by `set_`."""
    model, inputs, fused = optimized("AutoInt")
    model, fused = copy.deepcopy(model), copy.deepcopy(fused)
    [name, *_] = raw(model)
    with torch.no_grad():
        for each in (model, fused):
            owner, own = at(each, name)
            weight = getattr(owner, own)
            weight.abs_().add_(0.1)
            if parametrized:
                parametrize.register_parametrization(owner, own, Exponential())
            else:
                weight.set_(weight.detach().clone() * 2)
    torch.testing.assert_close(getattr(at(fused, name)[0], own), getattr(at(model, name)[0], own))
    torch.testing.assert_close(fused(*inputs), model(*inputs))


def copied_to(tensors, devices, detach=False):
    return [[tensor.clone() for tensor in tensors] for _ in devices]


@each_model
def test_replicas_of_data_parallelism(name):
    model, inputs, fused = optimized(name)
    model.eval(), fused.eval()
    with mock.patch.dict(
        replicate.__globals__,
        _broadcast_coalesced_reshape=copied_to,
        _get_device_index=lambda device, optional: device,
    ):
        twins = replicate(fused, [0, 1])
    for twin in twins:
        outputs = dict(tensors(twin(*inputs)))
        assert_close(outputs, dict(tensors(model(*inputs))))
        sum(output.sum() for output in outputs.values()).backward()
    sum(output.sum() * 2 for output in dict(tensors(model(*inputs))).values()).backward()
    assert_close(gradients(fused), gradients(model))
