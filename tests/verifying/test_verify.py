"""verify: equal models are found equal, every kind of difference is named, nothing is disturbed."""

import copy
import dataclasses
import doctest
import random
import sys

import numpy
import pytest
import torch
from awkward import HAZARDS, TwoHeads, Undecided
from equivalence import random_states, same_bits, set_seed
from families import wide_runs
from test_hazards import arguments, made
from torch import nn

import conjoin

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def x():
    return torch.randn(4, 6)


@pytest.mark.parametrize("hazard", HAZARDS, ids=[hazard.name for hazard in HAZARDS])
def test_awkward_models_are_equal(hazard):
    args, kwargs = arguments(hazard, 0)
    model = made(hazard.subject)
    optimized = conjoin.optimize(model, args, example_kwargs=kwargs)
    result = conjoin.verify(model, optimized, [args, args], example_kwargs=kwargs)
    assert result, str(result)
    assert str(result).startswith("equal: 2 calls in training and evaluation mode")
    assert result.calls == 2
    assert len(result.modes) >= 4


@pytest.mark.parametrize("model_class", [TwoHeads, Undecided])
def test_what_runs_is_the_optimized_model(model_class, x):
    model = model_class()
    with wide_runs() as runs:
        result = conjoin.verify(model, conjoin.optimize(model, (x,)), (x,))
    assert result
    assert len(runs) == len(result.modes)


@pytest.mark.parametrize("model_class", [TwoHeads, Undecided])
def test_the_way_back_is_equal(model_class, x):
    optimized = conjoin.optimize(model_class(), (x,))
    assert conjoin.verify(optimized, conjoin.unfuse(optimized), (x,))


# A model with all that can differ, and what breaks it


class Net(nn.Module):
    """Stateful, random, with several outputs"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("total", torch.zeros(3), persistent=False)
        self.calls = 0
        self.last = [torch.zeros(3)]

    def forward(self, x, *, scale=1.0):
        self.calls += 1
        result = {"a": torch.dropout(self.a(x), 0.5, self.training), "b": self.norm(self.b(x))}
        with torch.no_grad():
            self.total += result["b"].abs().sum(0)
            self.last[0] = result["b"][0].clone()
        result["scale"], result["sum"] = scale, result["a"].sum().item()
        return self.changed(x, result)

    def changed(self, x, result):
        return result


class Other(dict):
    pass


class Broken:
    """Each changes what `Net` does; its docstring is the beginning of what is found."""

    def value(self, x, result):
        """in training mode, call 1, output['a']: differs by"""
        return {**result, "a": result["a"] + 1e-6}

    def infinity(self, x, result):
        """in training mode, call 1, output['a']: differs by inf"""
        return {**result, "a": result["a"] + torch.inf}

    def one_nan(self, x, result):
        """in training mode, call 1, output['b']: differs by inf"""
        return {**result, "b": result["b"].masked_fill(torch.eye(4, 3).bool(), torch.nan)}

    def type_of_output(self, x, result):
        """in training mode, call 1, output: is of type"""
        return Other(result)

    def missing(self, x, result):
        """in training mode, call 1, output['b']: is missing"""
        return {key: value for key, value in result.items() if key != "b"}

    def more(self, x, result):
        """in training mode, call 1, output['c']: is there, and not in the original"""
        return {**result, "c": 1}

    def order(self, x, result):
        """in training mode, call 1, output['sum']: stands in the place of output['a']"""
        return dict(reversed(result.items()))

    def shape(self, x, result):
        """in training mode, call 1, output['a']: has shape (3, 4) instead of (4, 3)"""
        return {**result, "a": result["a"].mT}

    def dtype(self, x, result):
        """in training mode, call 1, output['a']: is of dtype torch.float32 instead of"""
        return {**result, "a": result["a"].float()}

    def number(self, x, result):
        """in training mode, call 1, output['scale']: differs by 1.0e+00"""
        return {**result, "scale": result["scale"] + 1}

    def type_of_number(self, x, result):
        """in training mode, call 1, output['scale']: is of type int instead of float"""
        return {**result, "scale": 1}

    def detached(self, x, result):
        """in training mode, call 1, output['a']: has requires_grad False instead of True"""
        return {**result, "a": result["a"].detach()}

    def gradient_detached(self, x, result):
        """in training mode, call 1, gradient of b.weight: is of type NoneType instead of"""
        return {**result, "b": result["b"].detach().requires_grad_(result["b"].requires_grad)}

    def gradient(self, x, result):
        """in training mode, call 1, gradient of a.weight: differs by"""
        return {**result, "a": 2 * result["a"] - result["a"].detach()}

    def input_gradient(self, x, result):
        """in training mode with inputs that require gradients, call 1, gradient of input[0]: dif"""
        return {**result, "a": result["a"] + (x - x.detach())[:, :3]}

    def buffer(self, x, result):
        """in training mode, call 1, buffer total: differs by"""
        self.total.zero_()
        return result

    def parameter(self, x, result):
        """in training mode, call 1, parameter b.bias: differs by"""
        self.b.bias.data.add_(1)
        return result

    def attribute(self, x, result):
        """in training mode, call 1, attribute calls: is 2 instead of 1"""
        self.calls += 1
        return result

    def listed(self, x, result):
        """in training mode, call 1, attribute last[0]: differs by"""
        self.last[0] = self.last[0] + 1
        return result

    def mode(self, x, result):
        """in training mode, call 1, attribute norm.training: is False instead of True"""
        self.norm.eval()
        return result

    def torch_stream(self, x, result):
        """in training mode, call 1, the random stream of PyTorch afterwards: is in state"""
        torch.rand(1)
        return result

    def python_stream(self, x, result):
        """in training mode, call 1, the random stream of Python afterwards: is in state"""
        random.random()
        return result

    def numpy_stream(self, x, result):
        """in training mode, call 1, the random stream of NumPy afterwards: is in state"""
        numpy.random.rand()
        return result

    def input_changed(self, x, result):
        """in training mode, call 1, input[0]: differs by 1.0e+00"""
        with torch.no_grad():
            x.data.add_(1)
        return result

    def raising(self, x, result):
        """in training mode, call 1, the forward pass: raises ValueError: no instead of nothing"""
        raise ValueError("no")

    def only_in_training(self, x, result):
        """in training mode, call 1, output['b']: differs by"""
        return {**result, "b": result["b"] * 2} if self.training else result

    def only_in_evaluation(self, x, result):
        """in evaluation mode with inputs that require gradients, call 1, output['b']: differs by"""
        return result if self.training else {**result, "b": result["b"] * 2}

    def only_without_gradients(self, x, result):
        """in evaluation mode without gradients, call 1, output['b']: differs by"""
        return result if torch.is_grad_enabled() else {**result, "b": result["b"] * 2}

    def only_on_the_second_call(self, x, result):
        """in training mode, call 2, output['b']: differs by"""
        return result if self.calls < 2 else {**result, "b": result["b"] * 2}

    def leaking_mode(self, x, result):
        """in training mode, call 1, the grad mode afterwards: is False instead of True"""
        torch.set_grad_enabled(False)
        return result


BROKEN = {name: broken for name, broken in vars(Broken).items() if not name.startswith("_")}


def pair(change=Net.changed):
    """A model, and one of the same weights that does something else."""
    set_seed()
    model = Net()
    other = copy.deepcopy(model)
    other.__class__ = type("Net", (Net,), {"changed": change})
    return model, other


def test_a_stateful_model_is_equal_to_its_copy_and_when_optimized(x):
    model, other = pair()
    for optimized in (other, conjoin.optimize(model, (x,))):
        result = conjoin.verify(model, optimized, [(x,), (2 * x,)])
        assert result, str(result)
        assert (result.calls, result.raised) == (2, 0)
        # a, b, scale and sum; two parameters of three modules and the input; BatchNorm's and total.
        assert (result.outputs, result.gradients, result.buffers) == (4, 7, 4)
        assert result.largest < 1e-12


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_what_differs_is_named(change, x):
    model, other = pair(change)
    result = conjoin.verify(model, other, [(x,), (x,)])
    assert not result
    assert str(result).startswith("different: " + change.__doc__)
    assert str(result.difference) in str(result)


def test_a_difference_is_told_with_what_is_allowed(x):
    result = conjoin.verify(*pair(Broken.value), (x,))
    assert result.difference == conjoin.Difference(
        "training mode", 1, "output['a']", result.difference.how
    )
    assert result.difference.how.startswith("differs by 1.0e-06 where ")
    assert str(result).endswith("e-09 is allowed, in float64")


# Weights


def test_other_weights_are_told_before_anything_runs(x):
    model, other = pair(Broken.raising)
    with torch.no_grad():
        other.b.weight[0, 0] += 1
    result = conjoin.verify(model, other, (x,))
    words = "different: the two models hold different weights: b.weight differs by 1.0e+00"
    assert str(result) == words
    assert result.modes == ()


def negative_zero(model):
    model.b.weight = nn.Parameter(-model.b.weight.detach())


OTHER_WEIGHTS = {
    "a.bias is missing": lambda model: model.a.register_parameter("bias", None),
    "c.weight is there, and not in the original": lambda model: model.register_module(
        "c", nn.Linear(2, 2)
    ),
    "a.weight is of dtype torch.float16 instead of torch.float32": lambda model: model.a.half(),
    "a.weight has shape (2, 6) instead of (3, 6)": lambda model: setattr(
        model, "a", nn.Linear(6, 2)
    ),
    "b.weight has other bits": negative_zero,
}


@pytest.mark.parametrize(("words", "change"), OTHER_WEIGHTS.items(), ids=OTHER_WEIGHTS)
def test_other_checkpoints(words, change, x):
    model, other = pair()
    for each in (model, other):
        each.b.weight.detach().zero_()
    change(other)
    assert str(conjoin.verify(model, other, (x,))).endswith(f"different weights: {words}")


# Gradients that are not there


class HalfUsed(TwoHeads):
    """`b` gets no gradient"""

    def forward(self, x):
        return self.a(x), self.b(x).detach()


class AllZero(HalfUsed):
    """`b` gets a gradient of zeros"""

    def forward(self, x):
        return self.a(x) + 0 * self.b(x).sum(), self.b(x).detach()


def test_zeros_instead_of_no_gradient_are_for_parts_of_wide_layers_only(x):
    model, zero = HalfUsed(), AllZero()
    zero.load_state_dict(model.state_dict())
    optimized = conjoin.optimize(model, (x,))
    assert optimized.b.wide_layer is optimized.a.wide_layer
    assert conjoin.verify(model, optimized, (x,))
    result = conjoin.verify(model, zero, (x,))
    assert result.difference.what == "gradient of b.weight"
    assert "is of type torch.Tensor instead of NoneType" in result.difference.how
    result = conjoin.verify(zero, model, (x,))
    assert "is of type NoneType instead of torch.Tensor" in result.difference.how


# Precision


class Single(TwoHeads):
    """Does not run in float64"""

    def __init__(self, error=0.0):
        super().__init__()
        self.float()
        self.error = (error,)

    def forward(self, x):
        y = x.to(torch.float32)
        return self.a(y) + self.error[0], self.b(y)


class SingleInside(TwoHeads):
    def forward(self, x):
        return self.a(x).float().softmax(-1).to(x.dtype), self.b(x)


def test_a_model_that_does_not_run_in_float64_runs_as_it_is(x):
    model = Single()
    result = conjoin.verify(model, conjoin.optimize(model, (x,)), (x,))
    assert result
    assert (result.converted, result.dtype, result.raised) == (False, torch.float32, 0)
    assert "in float32, for the model does not run in float64" in str(result)


@pytest.mark.parametrize(("error", "equal"), [(1e-6, True), (1e-2, False)])
def test_the_tolerance_is_that_of_the_dtype(error, equal, x):
    model, other = Single(), Single()
    other.load_state_dict(model.state_dict())
    other.forward = Shifted(other, error)
    result = conjoin.verify(model, other, (x,))
    assert bool(result) == equal
    assert result.dtype is torch.float32
    assert equal or "in float32, for the model does not run in float64" in str(result)


class Shifted:
    """A forward with an error."""

    def __init__(self, model, error):
        self.model, self.error = model, error

    def __call__(self, x):
        y, z = type(self.model).forward(self.model, x)
        return y + self.error, z


@pytest.mark.parametrize("error", [0.0, 1e-7, 1e-5])
def test_the_least_precise_dtype_inside_decides(error, x):
    model, other = SingleInside(), SingleInside()
    other.load_state_dict(model.state_dict())
    other.forward = Shifted(other, error)
    result = conjoin.verify(model, other, (x.double(),))
    assert bool(result) == (error < 1e-6)
    assert (result.converted, result.dtype) == (True, torch.float32)
    assert "in float64, with float32 inside" in str(result)


def test_half_precision_is_converted(x):
    for dtype in (torch.float16, torch.bfloat16):
        model = Undecided().to(dtype)
        result = conjoin.verify(model, conjoin.optimize(model, (x.to(dtype),)), (x.to(dtype),))
        assert result
        assert result.dtype is torch.float64


def test_complex_models_are_converted(x):
    model = TwoHeads().to(torch.complex64)
    x = x.to(torch.complex64)
    result = conjoin.verify(model, conjoin.optimize(model, (x,)), (x,))
    assert result
    assert 0 < result.largest < 1e-12 or result.largest == 0
    assert result.gradients == 5


class ManyTiny(nn.Module):
    """A loss so small that its gradients are"""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x).square().mean() * 1e-6


class ManyTinyWrong(ManyTiny):
    def forward(self, x):
        y = super().forward(x)
        return y + (y - y.detach()) * 1e-4


def test_small_gradients_are_measured_by_themselves(x):
    model, other = ManyTiny(), ManyTinyWrong()
    other.load_state_dict(model.state_dict())
    result = conjoin.verify(model, other, (x,))
    assert result.difference.what.startswith("gradient of a.weight")


# Errors


class Moody(TwoHeads):
    """Raises in one mode"""

    def forward(self, x):
        if self.training:
            raise RuntimeError(f"not in training, says {object()}")
        return super().forward(x)


class Moodier(Moody):
    def forward(self, x):
        if self.training:
            raise RuntimeError("not now")
        return TwoHeads.forward(self, x)


def test_the_same_error_is_equal(x):
    model = Moody()
    result = conjoin.verify(model, conjoin.optimize(model, (x.double(),)), (x,))
    assert result
    assert result.raised == 2
    assert str(result).endswith("2 calls raised the same error")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Moodier, "raises RuntimeError: not now instead of RuntimeError: not in training, says"),
        (TwoHeads, "raises nothing instead of RuntimeError: not in training"),
    ],
)
def test_another_error_is_not(other, words, x):
    model, other = Moody(), other()
    other.load_state_dict(model.state_dict())
    result = conjoin.verify(model, other, (x,))
    assert result.difference.what == "the forward pass"
    assert words in result.difference.how


class NoWayBack(TwoHeads):
    """Its backward pass raises"""

    def forward(self, x):
        y = self.a(x).exp()
        return y + y.detach() * y.data.zero_().sum() if y.sum() is None else y.add_(1), self.b(x)


def test_a_backward_pass_that_raises(x):
    model, other = NoWayBack(), TwoHeads()
    other.load_state_dict(model.state_dict())
    result = conjoin.verify(model, conjoin.optimize(model, (x.double(),)), (x,))
    assert result
    assert result.raised == 3
    other.forward = Exponential(other)
    result = conjoin.verify(model, other, (x,))
    assert result.difference.what == "the backward pass"
    assert result.difference.how == "raises nothing instead of RuntimeError"


class Exponential(Shifted):
    def __init__(self, model):
        super().__init__(model, 1)

    def __call__(self, x):
        return self.model.a(x).exp() + 1, self.model.b(x)


def test_models_that_run_in_no_mode(x):
    model = Net()
    told = r"does not run on the example inputs: RuntimeError: (addmm: )?mat1"
    with pytest.raises(ValueError, match=told):
        conjoin.verify(model, copy.deepcopy(model), (x[:, :2],))


# Wrong arguments


@pytest.mark.parametrize("given", [(Net(), None), (None, Net()), (Net, Net())])
def test_no_model(given, x):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module as model, not"):
        conjoin.verify(*given, (x,))


def test_wrong_example_inputs(x):
    with pytest.raises(TypeError, match=r"such as \(x,\), or a list of such tuples, not Tensor"):
        conjoin.verify(*pair(), x)
    for nothing in (None, []):
        with pytest.raises(ValueError, match="nothing to run"):
            conjoin.verify(*pair(), nothing)


def test_the_meta_device(x):
    with pytest.raises(ValueError, match="meta device"):
        conjoin.verify(Net().to("meta"), Net().to("meta"), (x,))


def test_what_cannot_be_copied(x):
    model, other = pair()
    with pytest.raises(ValueError, match="an example input cannot be copied"):
        conjoin.verify(model, other, (x, sys))
    model.kept = (part for part in ())
    with pytest.raises(ValueError, match="the model cannot be copied"):
        conjoin.verify(model, other, (x,))


def test_a_model_that_keeps_its_output_is_copied(x):
    model, other = pair()
    for each in (model, other):
        each.kept = each.a(x)
    assert conjoin.verify(model, other, (x,))


# Inputs


@dataclasses.dataclass
class Request:
    x: torch.Tensor
    note: str = ""


class Served(TwoHeads):
    def forward(self, request, *, scale=None, **others):
        x = request.x.mul_(1.5)
        return self.a(x), self.b(x if scale is None else x * scale)


def test_inputs_in_objects_and_by_name(x):
    model = Served()
    request = Request(x.clone())
    kwargs = {"scale": torch.tensor(2.0)}
    optimized = conjoin.optimize(model, [(Request(x.double()),)], example_kwargs=kwargs)
    result = conjoin.verify(model, optimized, (request,), example_kwargs=kwargs)
    assert result, str(result)
    assert result.converted
    assert result.gradients == 6
    assert torch.equal(request.x, x)
    assert not request.x.requires_grad


def test_one_tensor_given_twice_is_one(x):
    class Same(TwoHeads):
        def forward(self, x, y):
            assert x is y
            return self.a(x), self.b(y)

    model = Same()
    result = conjoin.verify(model, copy.deepcopy(model), (x, x))
    assert (bool(result), result.raised, result.gradients) == (True, 0, 5)


class TiedByMemory(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)
        self.register_buffer("seen", self.a.weight.data[0])

    def forward(self, x):
        self.seen.mul_(0.5)
        return self.a(x)


def test_memory_that_is_shared_stays_shared(x):
    model = TiedByMemory()
    other = TiedByMemory()
    other.load_state_dict(model.state_dict())
    assert conjoin.verify(model, other, (x,))
    other.seen = other.seen.clone()
    assert conjoin.verify(model, other, (x,)).difference.what == "output"


def test_modules_in_different_modes_are_run_as_they_are(x):
    model, other = pair()
    for each in (model, other):
        each.norm.eval()
    assert len(conjoin.verify(model, other, (x,)).modes) == 5
    other.norm.train()
    difference = conjoin.verify(model, other, (x,)).difference
    assert difference.where == "the mode that each module is in"


# Nothing is disturbed


@pytest.mark.parametrize("change", [Net.changed, Broken.only_in_evaluation, Broken.raising])
def test_nothing_is_disturbed(change, x):
    model, other = pair(change)
    other = conjoin.optimize(other, inplace=True)
    x.requires_grad_()
    for each in (model, other):
        each.a.register_forward_hook(lambda *_: None)
        each.norm.eval()
        for parameter in each.parameters():
            parameter.grad = torch.ones_like(parameter)
    before = [seen(model), seen(other), random_states(), torch.get_default_dtype(), x.clone()]
    conjoin.verify(model, other, [(x,), (x,)])
    after = [seen(model), seen(other), random_states(), torch.get_default_dtype(), x.clone()]
    assert all(same(ours, theirs) for ours, theirs in zip(after, before, strict=True))
    assert x.grad is None
    assert torch.is_grad_enabled()


def seen(model):
    """All that there is to see of a model, with the identity of what it holds."""
    found = []
    for module in model.modules():
        held = {**module._parameters, **module._buffers}
        found += [module.training, sorted(vars(module)), len(module._forward_hooks)]
        for tensor in held.values():
            if tensor is not None:
                grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.clone())
                found += [id(tensor), tensor._version, tensor.dtype, tensor.clone(), grad]
        found += [
            copy.copy(value) for key, value in vars(module).items() if key in ("calls", "last")
        ]
    return found


def same(ours, theirs):
    if isinstance(theirs, torch.Tensor):
        return same_bits(ours, theirs)
    if isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


class CountsOnClass(TwoHeads):
    """Keeps its number of calls on the class and in a global"""

    calls = 0

    def forward(self, x):
        CountsOnClass.calls += 1
        KEPT.append(x)
        return self.a(x), self.b(x), CountsOnClass.calls, len(KEPT)


KEPT = []


def test_what_is_kept_outside_of_the_model(x):
    model = CountsOnClass()
    optimized = conjoin.optimize(model, (x.double(),))
    assert conjoin.verify(model, optimized, [(x,), (x,)])
    assert (CountsOnClass.calls, KEPT) == (0, [])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_within_other_grad_modes(mode, x):
    model = TwoHeads()
    optimized = conjoin.optimize(model, (x.double(),))
    with mode():
        result = conjoin.verify(model, optimized, (x,))
        assert not torch.is_grad_enabled()
    assert result
    assert result.gradients == 5


def test_the_example_in_the_docstring_runs():
    module = sys.modules[conjoin.verify.__module__]
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
