"""Deep branches: fused from the first layer to the last, counted by hand, and still the same.

The models are in `tests/depth`, written as public code writes them; each says how many operations
it runs, and how many would do.
"""

import copy
import dataclasses

import pytest
import torch
from counting import Counts, count
from depth import MODELS, Deep
from equivalence import (
    assert_close,
    assert_same_state,
    assert_same_step,
    assert_same_structure,
    step,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO

import conjoin

EXAMPLE_BATCH = 4
OTHER_BATCHES = (3, 6, 5)
"""None of them the example's, one odd and one even in number, and one for each step."""

MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

OPTIMIZERS = pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9), id="sgd"),
        # A bias in front of a BatchNorm has a gradient of rounding errors alone, which Adam would
        # blow up with a small eps.
        pytest.param(lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3), id="adam"),
    ],
)

IMAGES = [
    name
    for name, deep in MODELS.items()
    if name != "dueling"  # The model's own .view wants contiguous memory.
    and any(tensor.dim() == 4 for tensor in pytree.tree_leaves(deep.call(2)))
]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and what conjoin makes of it. The tests of one model share it, and change nothing."""

    deep: Deep
    plain: nn.Module
    optimized: nn.Module

    def both(self) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.optimized), copy.deepcopy(self.plain)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads than one are slower on models of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    return make(MODELS[request.param])


def make(deep: Deep) -> Case:
    plain = deep.model()
    return Case(deep, plain, conjoin.optimize(plain, deep.call(EXAMPLE_BATCH)))


def disagreements(counts: Counts, expected: dict[str, int | range]) -> dict[str, str]:
    """Groups of operations whose number is another one than expected."""
    return {
        group: f"{getattr(counts, group)} instead of {number}"
        for group, number in expected.items()
        if getattr(counts, group) not in (number if isinstance(number, range) else (number,))
    }


@MODES
def test_operations_of_the_plain_model(case, training):
    expected = {k: before for k, (before, _) in case.deep.operations(training=training).items()}
    counts = count(case.plain, case.deep.call(EXAMPLE_BATCH), training=training)
    assert disagreements(counts, expected) == {}, counts


@MODES
def test_operations_of_the_optimized_model(case, training):
    expected = {k: after for k, (_, after) in case.deep.operations(training=training).items()}
    counts = count(case.optimized, case.deep.call(EXAMPLE_BATCH), training=training)
    assert disagreements(counts, expected) == {}, counts


@MODES
def test_as_many_operations_with_another_batch(case, training):
    first, *others = (
        count(case.optimized, case.deep.call(batch), training=training)
        for batch in (EXAMPLE_BATCH, *OTHER_BATCHES[:2])
    )
    assert others == [first, first]


@OPTIMIZERS
def test_three_steps(case, optimizer):
    models = case.both()
    optimizers = [optimizer(model.parameters()) for model in models]
    for number, batch in enumerate(OTHER_BATCHES):
        args = case.deep.call(batch, seed=10 + number)
        assert_same_step(*(step(model, args, seed=number) for model in models))
        for each in optimizers:
            each.step()
    args = case.deep.call(EXAMPLE_BATCH, seed=20)
    assert_same_step(*(step(model, args, training=False) for model in models))
    assert_close(conjoin.unfuse(models[0]).state_dict(), models[1].state_dict())


@pytest.mark.parametrize("batch", [1, 3])
def test_evaluation(case, batch):
    args = case.deep.call(batch)
    assert_same_step(*(step(model, args, training=False) for model in case.both()))


@pytest.mark.parametrize("name", IMAGES)
@MODES
def test_channels_last(name, training):
    deep = MODELS[name]
    plain = deep.model().to(memory_format=torch.channels_last)
    optimized = conjoin.optimize(plain, channels_last(deep.call(EXAMPLE_BATCH)))
    args = channels_last(deep.call(3))
    assert_same_step(*(step(model, args, training=training) for model in (optimized, plain)))
    # Whoever optimized the model before that must be as right.
    optimized = conjoin.optimize(deep.model(), deep.call(EXAMPLE_BATCH))
    optimized.to(memory_format=torch.channels_last)
    assert_same_step(*(step(model, args, training=training) for model in (optimized, deep.model())))


def channels_last(args):
    def converted(tensor: Tensor) -> Tensor:
        if tensor.dim() != 4:
            return tensor
        return tensor.contiguous(memory_format=torch.channels_last)

    return pytree.tree_map_only(Tensor, converted, args)


def test_unfuse_to_the_bit(case):
    optimized, plain = case.both()
    unfused = conjoin.unfuse(optimized)
    assert_same_state(unfused, plain)
    assert_same_structure(unfused, plain)


def test_unfuse_to_the_bit_after_training(case):
    """What the optimized model says its state is, is what the plain model gets."""
    trained, plain = case.both()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    step(trained, case.deep.call(5))
    optimizer.step()
    plain.load_state_dict(trained.state_dict())
    unfused = conjoin.unfuse(trained)
    assert_same_state(unfused, plain)
    args = case.deep.call(EXAMPLE_BATCH)
    for training in (True, False):
        assert_same_step(
            *(step(copy.deepcopy(model), args, training=training) for model in (unfused, trained))
        )


def test_checkpoints_of_the_plain_model_load(case):
    optimized, plain = case.both()
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for tensor in other.state_dict().values():
            if tensor.is_floating_point():
                tensor.mul_(1.5)
    optimized.load_state_dict(other.state_dict())
    assert_same_state(optimized, other)
    args = case.deep.call(EXAMPLE_BATCH)
    assert_same_step(*(step(model, args, training=False) for model in (optimized, other)))


def twins() -> Case:
    return make(MODELS["twins_td3"])


def test_one_of_two_critics_runs_alone():
    case = twins()
    args = case.deep.call(EXAMPLE_BATCH)
    assert count(case.optimized, args, method="Q1").products == 3
    ours, theirs = (model.Q1(*args) for model in case.both())
    assert_close({"Q1": ours}, {"Q1": theirs})


def test_an_actors_loss_through_one_of_two_critics():
    """TD3 trains the actor through Q1 alone, in between two steps of both critics."""
    case = twins()
    gradients = []
    for model in case.both():
        state, action = case.deep.call(EXAMPLE_BATCH)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-3)
        q1, q2 = model(state, action)
        (q1.square().mean() + q2.square().mean()).backward()
        optimizer.step()
        action.requires_grad_()
        model.Q1(state, action).mean().neg().backward()
        gradients.append({"action": action.grad})
    assert_close(*gradients)


def test_one_of_two_towers_runs_alone():
    """PPO asks for the value of the last observation without the action."""
    case = make(MODELS["agent_cleanrl"])
    observation, _ = case.deep.call(EXAMPLE_BATCH)
    (ours,), (theirs,) = ([model.get_value(observation)] for model in case.both())
    assert_close({"value": ours}, {"value": theirs})


def test_an_optional_argument_left_out():
    case = make(MODELS["agent_cleanrl"])
    observation, _ = case.deep.call(EXAMPLE_BATCH)
    assert_same_step(*(step(model, (observation,)) for model in case.both()))


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("inception_v3", "transform_input", True),
        ("deepfm", "use_fm", False),
        ("mmoe_deepctr_norm", "expert_dnn.3.use_bn", False),
        ("mmoe_deepctr", "out.0.task", "regression"),
        ("concurrent", "branches.branch2.conv2.activate", False),
        ("unet_conditional", "mid_resnets.0.skip_time_act", True),
        ("ensemble", "num_Q", 3),
        ("cross_stage", "m.0.add", False),
    ],
)
def test_an_attribute_changed_later(name, attribute, value):
    """What a forward branches on may change after optimizing."""
    case = make(MODELS[name])
    path, _, key = attribute.rpartition(".")
    models = case.both()
    for model in models:
        setattr(model.get_submodule(path), key, value)
    for training in (True, False):
        args = case.deep.call(3)
        assert_same_step(*(step(model, args, training=training) for model in models))


def test_layers_of_one_branch_in_evaluation_mode():
    """Frozen running statistics in one of two branches, as in fine-tuning."""
    case = make(MODELS["two_branches"])
    args = case.deep.call(EXAMPLE_BATCH)
    outcomes = []
    for model in case.both():
        model.train()
        model.shape_branch.eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(*args).square().sum().backward()
            optimizer.step()
        outcomes.append({**conjoin.unfuse(model).state_dict(), "output": model(*args)})
    assert_close(*outcomes)


def test_one_branch_is_frozen_after_optimizing():
    case = make(MODELS["two_branches"])
    args = case.deep.call(EXAMPLE_BATCH)
    outcomes = []
    for model in case.both():
        model.texture_branch.requires_grad_(False)
        optimizer = torch.optim.SGD(
            [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
        )
        for _ in range(3):
            optimizer.zero_grad()
            model(*args).square().sum().backward()
            optimizer.step()
        outcomes.append(conjoin.unfuse(model).state_dict())
    assert_close(*outcomes)


# Models of packages, by what they run less than before, in evaluation mode.
PUBLIC = {
    # Three critics. Their forward asks an object of another package, a space of observations, so
    # that it is not traced: only the first layers are one.
    "critics": {"products": 6, "activations": 4},
    "critics_of_quantiles": {"products": 6, "activations": 4},
    # The two hidden layers of policy and value, and the first activation: what the second gives
    # leaves the module that holds the towers. The heads have different widths.
    "policy_actor_critic": {"products": 2, "activations": 1},
    "policy_masked": {"products": 2, "activations": 1},
    # Three experts and two gates on one tensor. The forward goes through a list of objects that
    # describe features, so that it is not traced: only the first layers are one.
    "rec_mmoe": {"products": 6, "norms": 5},
    # The first layers of two towers, for the same reason.
    "rec_shared_bottom": {"products": 2, "norms": 1},
    # Two less in each of three A units, four B units and two C units, of three 1x1 on one tensor;
    # one less in the second reduction, of two.
    "inception_v3": {"convolutions": 2 * 9 + 1, "norms": 2 * 9 + 1, "activations": 2 * 9 + 1},
    # Two less in each of eight units, one less in each of two reductions; and in three of the
    # units, 3b, 4b and 4c, the 3x3 behind two of the 1x1 have equal widths.
    "bn_inception": {"convolutions": 2 * 8 + 2 + 3, "norms": 2 * 8 + 2 + 3},
}


@pytest.mark.zoo
@pytest.mark.parametrize("name", PUBLIC)
def test_operations_of_a_public_model(name):
    specimen = ZOO[name]
    pytest.importorskip(specimen.package)
    plain = specimen.model()
    args, kwargs = specimen.call()
    optimized = conjoin.optimize(plain, args, example_kwargs=kwargs)
    before, after = (count(model, args, kwargs) for model in (plain, optimized))
    fewer = {group: getattr(before, group) - getattr(after, group) for group in PUBLIC[name]}
    assert fewer == PUBLIC[name]


# In the two networks, BatchNorm over a batch of two makes 1e-15 in a weight a difference of 1e-4
# after two steps, also without conjoin. What they do in one step is compared in test_zoo.py.
TRAINED = [name for name in PUBLIC if "inception" not in name]


@pytest.mark.zoo
@OPTIMIZERS
@pytest.mark.parametrize("name", TRAINED)
def test_three_steps_of_a_public_model(name, optimizer):
    specimen = ZOO[name]
    pytest.importorskip(specimen.package)
    plain = specimen.model()
    args, kwargs = specimen.call()
    models = conjoin.optimize(plain, args, example_kwargs=kwargs), plain
    optimizers = [optimizer(model.parameters()) for model in models]
    for number in range(3):
        assert_same_step(*(step(model, args, kwargs, seed=number) for model in models))
        for each in optimizers:
            each.step()
    assert_same_step(*(step(model, args, kwargs, training=False) for model in models))
    # Some hold what cannot be copied by now.
    unfused = conjoin.unfuse(models[0], inplace=True)
    assert_close(unfused.state_dict(), plain.state_dict())
