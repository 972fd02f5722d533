"""The optimizer's state survives the way there and back."""

import copy

import pytest
import torch
from torch import nn

import conjoin
from conjoin import checkpoints


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.a = nn.Linear(8, 3)
        self.up = nn.ModuleList([nn.ConvTranspose1d(4, 2, 3), nn.ConvTranspose1d(4, 5, 3)])
        self.b = nn.Linear(8, 5)

    def forward(self, x):
        h = self.stem(x).relu()
        y = h.view(-1, 4, 2)
        return self.b(h), self.a(h), self.up[0](y), self.up[1](y)  # b is the first part


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    "adam": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, amsgrad=True),
}


def step(model, optimizer, x):
    optimizer.zero_grad()
    sum(out.square().sum() for out in model(x)).backward()
    optimizer.step()


def grouped(model):
    """Biases without weight decay, as many training scripts have it."""
    named = list(model.named_parameters())
    return [
        {"params": [p for name, p in named if not name.endswith("bias")]},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]


@pytest.mark.parametrize("groups", [lambda model: model.parameters(), grouped], ids=["one", "two"])
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("start_fused", [True, False])
def test_training_goes_on_as_if_nothing_had_happened(name, groups, start_fused):
    torch.manual_seed(0)
    plain = Heads().double()
    fused = conjoin.optimize(plain)
    assert len(list(fused.parameters())) < len(list(plain.parameters()))
    data = torch.randn(6, 5, 6, dtype=torch.float64)
    reference = copy.deepcopy(plain)
    expected = OPTIMIZERS[name](groups(reference))
    model = fused if start_fused else plain
    optimizer = OPTIMIZERS[name](groups(model))
    for x in data[:3]:
        step(reference, expected, x)
        step(model, optimizer, x)

    if start_fused:
        other = conjoin.unfuse(model)
        successor = OPTIMIZERS[name](groups(other))
        successor.load_state_dict(checkpoints.separate(optimizer, model))
    else:
        other = conjoin.optimize(model)
        successor = OPTIMIZERS[name](groups(other))
        successor.load_state_dict(checkpoints.merge(optimizer.state_dict(), successor, other))
    for x in data[3:]:
        step(reference, expected, x)
        step(other, successor, x)

    for key, value in reference.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value, rtol=0, atol=1e-9)


def test_there_and_back_is_exact():
    model = conjoin.optimize(Heads())
    optimizer = OPTIMIZERS["adam"](model.parameters())
    step(model, optimizer, torch.randn(4, 6))
    back = checkpoints.merge(checkpoints.separate(optimizer, model), optimizer, model)
    before = optimizer.state_dict()
    assert back["state"].keys() == before["state"].keys()
    for number, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(back["state"][number][key], value)
    assert back["param_groups"] == before["param_groups"]


def test_state_of_another_shape_is_refused():
    model = conjoin.optimize(Heads())
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, torch.randn(4, 6))
    with pytest.raises(ValueError, match="cannot be divided among siblings"):
        checkpoints.separate(optimizer, model)


def test_steps_that_differ_are_refused():
    plain = Heads()
    optimizer = OPTIMIZERS["adam"](plain.parameters())
    step(plain, optimizer, torch.randn(4, 6))
    state = optimizer.state_dict()
    state["state"][2]["step"] += 1
    fused = conjoin.optimize(plain)
    with pytest.raises(ValueError, match="step differs"):
        checkpoints.merge(state, OPTIMIZERS["adam"](fused.parameters()), fused)


def test_groups_that_do_not_correspond_are_refused():
    plain = Heads()
    fused = conjoin.optimize(plain)
    state = OPTIMIZERS["sgd"](plain.parameters()).state_dict()
    with pytest.raises(ValueError, match="1 param groups and the optimizer has 2"):
        checkpoints.merge(state, OPTIMIZERS["sgd"](grouped(fused)), fused)
    with pytest.raises(ValueError, match="param group of the state has 10 parameters"):
        checkpoints.merge(state, OPTIMIZERS["sgd"]([fused.stem.weight]), fused)


class Branches(nn.Module):
    """Siblings in modules of their own, for which there may be an optimizer each."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
        self.critic = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x):
        return self.actor(x), self.critic(x)


@pytest.mark.parametrize("start_fused", [True, False])
def test_an_optimizer_of_one_branch(start_fused):
    torch.manual_seed(0)
    plain = Branches().double()
    fused = conjoin.optimize(plain)
    data = torch.randn(6, 5, 6, dtype=torch.float64)
    reference = copy.deepcopy(plain)
    expected = torch.optim.Adam(reference.actor.parameters(), 0.01)
    model = fused if start_fused else plain
    optimizer = torch.optim.Adam(model.actor.parameters(), 0.01)
    for x in data[:3]:
        step(model, optimizer, x)
        step(reference, expected, x)
    if start_fused:
        other = conjoin.unfuse(model)
        state = checkpoints.separate(optimizer, model)
    else:
        other = conjoin.optimize(model)
        fresh = torch.optim.Adam(other.actor.parameters(), 0.01)
        state = checkpoints.merge(optimizer.state_dict(), fresh, other)
    carried = torch.optim.Adam(other.actor.parameters(), 0.01)
    carried.load_state_dict(state)
    for x in data[3:]:
        step(other, carried, x)
        step(reference, expected, x)
    assert list(other.state_dict()) == list(reference.state_dict())
    for ours, theirs in zip(
        other.state_dict().values(), reference.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_an_optimizer_of_another_model_is_refused():
    plain = Heads()
    fused = conjoin.optimize(plain)
    state = OPTIMIZERS["sgd"](plain.parameters()).state_dict()
    other = OPTIMIZERS["sgd"]([*fused.parameters(), nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="1 of the optimizer's 7 parameters are none of the model"):
        checkpoints.separate(other, fused)
    for optimizer, model in (
        (OPTIMIZERS["sgd"](fused.parameters()), plain),
        (OPTIMIZERS["sgd"](plain.parameters()), fused),
    ):
        with pytest.raises(ValueError, match=r"none of the model's\. Pass the model"):
            checkpoints.separate(optimizer, model)
        with pytest.raises(ValueError, match=r"none of the model's\. Pass the model"):
            checkpoints.merge(state, optimizer, model)


class Likes(nn.Module):
    """Layers of one shape, so that nothing but their order tells whose state is whose."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.second(self.first(x).relu()).relu()
        return self.a(h), self.b(h)


def chosen(model, names):
    return [p for name in names for p in model.get_submodule(name).parameters()]


NAMES = ["second first", "second first a b", "a b first second", "b a", "b first", "a"]


@pytest.mark.parametrize("names", NAMES)
def test_state_goes_to_the_parameter_that_it_is_of_in_any_order(names):
    torch.manual_seed(0)
    model = conjoin.optimize(Likes().double())
    optimizer = OPTIMIZERS["adam"](chosen(model, names.split()))
    step(model, optimizer, torch.randn(4, 6, dtype=torch.float64))
    plain = conjoin.unfuse(model)
    held = OPTIMIZERS["adam"](chosen(plain, names.split()))
    held.load_state_dict(checkpoints.separate(optimizer, model))
    for name in names.split():
        for kind, parameter in plain.get_submodule(name).named_parameters():
            gradient = getattr(model.get_submodule(name), kind).grad
            torch.testing.assert_close(held.state[parameter]["exp_avg"], 0.1 * gradient)
    back = checkpoints.merge(held.state_dict(), optimizer, model)
    for number, state in optimizer.state_dict()["state"].items():
        torch.testing.assert_close(back["state"][number]["exp_avg"], state["exp_avg"])


def test_wide_parameters_in_another_order_are_refused():
    model = conjoin.optimize(Likes())
    state = OPTIMIZERS["adam"](Likes().parameters()).state_dict()
    named = sorted(model.named_parameters())  # The parts of `a.wide` might be anywhere.
    for parameters in ([p for _, p in named], [*model.parameters()][::-1]):
        optimizer = OPTIMIZERS["adam"](parameters)
        with pytest.raises(ValueError, match="in another order than"):
            checkpoints.separate(optimizer, model)
        with pytest.raises(ValueError, match="in another order than"):
            checkpoints.merge(state, optimizer, model)


def test_arguments_of_other_types_are_refused():
    plain = Heads()
    fused = conjoin.optimize(plain)
    optimizer = OPTIMIZERS["sgd"](fused.parameters())
    state = OPTIMIZERS["sgd"](plain.parameters()).state_dict()
    for wrong in (None, state, torch.optim.SGD):
        with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer as optimizer"):
            checkpoints.separate(wrong, fused)
        with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer as optimizer"):
            checkpoints.merge(state, wrong, fused)
    for wrong in (None, optimizer, Heads, fused.state_dict()):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as model"):
            checkpoints.separate(optimizer, wrong)
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as model"):
            checkpoints.merge(state, optimizer, wrong)
    for wrong in (None, optimizer, {}, {"state": {}}, [state]):
        with pytest.raises(TypeError, match=r"expected as state what state_dict\(\)"):
            checkpoints.merge(wrong, optimizer, fused)


def test_state_of_all_parameters_together_is_refused():
    def trained(model):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
        x = torch.randn(4, 6)

        def closure():
            optimizer.zero_grad()
            loss = sum(out.square().sum() for out in model(x))
            loss.backward()
            return loss

        optimizer.step(closure)
        return optimizer

    plain = Heads()
    fused = conjoin.optimize(plain)
    state = trained(plain).state_dict()
    with pytest.raises(ValueError, match="LBFGS keeps one state for all"):
        checkpoints.separate(trained(fused), fused)
    with pytest.raises(ValueError, match="LBFGS keeps one state for all"):
        checkpoints.merge(state, trained(fused), fused)
    assert checkpoints.separate(trained(plain), plain)["state"].keys() == state["state"].keys()


def test_tensors_within_containers_are_refused():
    plain = Heads()
    fused = conjoin.optimize(plain)
    optimizers = [OPTIMIZERS["adam"](model.parameters()) for model in (plain, fused)]
    for model, optimizer in zip((plain, fused), optimizers, strict=True):
        step(model, optimizer, torch.randn(4, 6))
        for state in optimizer.state.values():
            state["history"] = [state["exp_avg"]]
    with pytest.raises(ValueError, match="history holds tensors in a list"):
        checkpoints.separate(optimizers[1], fused)
    with pytest.raises(ValueError, match="history holds tensors in a list"):
        checkpoints.merge(optimizers[0].state_dict(), optimizers[1], fused)


def test_factored_state_of_siblings_is_refused():
    plain = Heads()
    fused = conjoin.optimize(plain)
    optimizers = [torch.optim.Adafactor(model.parameters()) for model in (plain, fused)]
    for model, optimizer in zip((plain, fused), optimizers, strict=True):
        step(model, optimizer, torch.randn(4, 6))
    with pytest.raises(ValueError, match="cannot be divided among siblings"):
        checkpoints.separate(optimizers[1], fused)
    with pytest.raises(ValueError, match="cannot be divided among siblings"):
        checkpoints.merge(optimizers[0].state_dict(), optimizers[1], fused)


def test_optimizers_keep_their_own_names_of_parameters():
    plain = Heads()
    fused = conjoin.optimize(plain)
    optimizers = [torch.optim.Adam(model.named_parameters()) for model in (plain, fused)]
    for model, optimizer in zip((plain, fused), optimizers, strict=True):
        step(model, optimizer, torch.randn(4, 6))
    names = [optimizer.param_groups[0]["param_names"] for optimizer in optimizers]
    states = [optimizer.state_dict() for optimizer in optimizers]
    optimizers[0].load_state_dict(checkpoints.separate(optimizers[1], fused))
    optimizers[1].load_state_dict(checkpoints.merge(states[0], optimizers[1], fused))
    assert [each.param_groups[0]["param_names"] for each in optimizers] == names
    assert [each.state_dict()["param_groups"] for each in optimizers] == [
        state["param_groups"] for state in states
    ]
