"""Is one model the same function as another? Values, gradients, buffers, state, random stream."""

import copy
import dataclasses
import random
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from conjoin.layers.product import Product
from conjoin.layers.view import Own, views

TOLERANCE = {
    torch.float64: 1e-9,
    torch.complex128: 1e-9,
    torch.float32: 1e-4,
    torch.complex64: 1e-4,
    torch.bfloat16: 5e-2,
    torch.float16: 5e-3,
}
"""The largest difference allowed, relative to the largest value of the tensor or to 1."""

SEED = 20


@dataclasses.dataclass
class Outcome:
    """All that a call of a model and a backward pass through its output leave behind."""

    outputs: dict[str, Tensor]
    input_gradients: dict[str, Tensor | None]
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    random_states: tuple[object, ...]


def step(model: nn.Module, args=(), kwargs=None, *, training=True, seed=SEED) -> Outcome:
    """One forward and backward pass on a copy of the inputs; the model keeps its new buffers."""
    leaves, (args, kwargs) = differentiable((args, dict(kwargs or {})))
    model.train(training)
    model.zero_grad(set_to_none=True)
    set_seed(seed)
    outputs = dict(tensors(model(*args, **kwargs)))
    loss = weighted_sum(outputs.values())
    states = random_states()  # Checkpointed models draw again in their backward pass.
    if loss is not None:
        loss.backward()
    return Outcome(
        {name: output.detach().clone() for name, output in outputs.items()},
        {str(number): leaf.grad for number, leaf in enumerate(leaves)},
        gradients(model),
        {name: buffer.detach().clone() for name, buffer in model.named_buffers()},
        states,
    )


def differentiable(inputs):
    """A copy of the inputs, and the leaves that collect the gradients of its float tensors.

    The copies are no leaves themselves, so that a model may change its input in place.
    """
    leaves: list[Tensor] = []

    def copied(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.clone()
        leaves.append(tensor.detach().clone().requires_grad_())
        return leaves[-1].clone()

    return leaves, pytree.tree_map_only(Tensor, copied, inputs)


def tensors(value, name="", seen=None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested tuples, dicts and objects of any class, with a name for each."""
    seen = {} if seen is None else seen
    if isinstance(value, Tensor):
        yield name, value
        return
    if id(value) in seen or isinstance(value, (str, type, nn.Module)):
        return
    seen[id(value)] = value
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (tuple, list)):
        items = [(str(number), item) for number, item in enumerate(value)]
    else:
        items = list(getattr(value, "__dict__", {}).items())
    for key, item in items:
        yield from tensors(item, f"{name}.{key}".lstrip("."), seen)


def weighted_sum(outputs) -> Tensor | None:
    """A scalar that depends on every finite value of the outputs; None where none is trained."""
    generator = torch.Generator().manual_seed(SEED)
    total = None
    for output in outputs:
        if not output.requires_grad:
            continue
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        finite = output.detach().isfinite()
        term = (output[finite] * weight.to(output)[finite]).sum()
        term = term.abs() if term.is_complex() else term
        total = term if total is None else total + term
    return total


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients by the names in the state_dict; siblings get their part of the wide layer's."""
    wide = {view.wide_layer: view for _, view in views(model)}
    found = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in wide or isinstance(module, (Own, Product)):  # Its owner lists what it holds.
            continue
        for key, parameter in module.named_parameters(name, recurse=False):
            found[key] = parameter.grad
    for name, view in views(model):
        if isinstance(view, Product):
            continue
        layer = view.wide_layer
        for key, parameter in layer.named_parameters(recurse=False):
            if not layer.holds(key, view.conjoin_index):
                continue
            grad = parameter.grad
            part = None if grad is None else layer.part(key, grad, view.conjoin_index)
            found[f"{name}.{key}"] = part
    return found


def assert_same_step(actual: Outcome, expected: Outcome) -> None:
    """Everything agrees; a gradient may be zero where the original had none."""
    assert_close(actual.outputs, expected.outputs, "output")
    assert_close(actual.input_gradients, expected.input_gradients, "gradient of input")
    missing = {name for name, grad in expected.gradients.items() if grad is None}
    for name in missing & actual.gradients.keys():
        grad = actual.gradients[name]
        assert grad is None or not grad.any(), f"{name} has a gradient, and had none"
    assert actual.gradients.keys() == expected.gradients.keys()
    trained = expected.gradients.keys() - missing
    assert_close(
        {name: actual.gradients[name] for name in trained},
        {name: expected.gradients[name] for name in trained},
        "gradient of",
    )
    assert_close(actual.buffers, expected.buffers, "buffer")
    same_stream = all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for a, b in zip(actual.random_states, expected.random_states, strict=True)
    )
    assert same_stream, "random numbers were drawn differently"


def assert_close(
    actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], what="tensor"
) -> None:
    """Tensors of the same names agree within the tolerance of their dtype."""
    assert list(actual.keys()) == list(expected.keys()) or actual.keys() == expected.keys(), (
        f"{what}: {sorted(actual.keys() ^ expected.keys())} on one side only"
    )
    for name, right in expected.items():
        left = actual[name]
        if right is None or left is None:
            assert left is right, f"{what} {name}: {left} instead of {right}"
            continue
        assert left.dtype == right.dtype, f"{what} {name}: {left.dtype}, not {right.dtype}"
        assert left.shape == right.shape, f"{what} {name}: {left.shape}, not {right.shape}"
        error, allowed = difference(left, right)
        assert error <= allowed, f"{what} {name}: differs by {error:.2e}, allowed {allowed:.2e}"


def difference(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """The largest difference of two tensors and the largest that is allowed."""
    if expected.is_meta:
        return 0.0, 0.0
    if expected.dtype not in TOLERANCE:
        return float(not torch.equal(actual, expected)), 0.0
    finite = expected.isfinite()
    if not torch.equal(actual[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return float("inf"), 0.0
    if not finite.any():
        return 0.0, 0.0
    error = (actual[finite] - expected[finite]).abs().max().item()
    scale = max(expected[finite].abs().max().item(), 1.0)
    return error, TOLERANCE[expected.dtype] * scale


def assert_equivalent(actual: nn.Module, expected: nn.Module, args=(), kwargs=None) -> None:
    """Two models do the same in training and in evaluation mode; both are left untouched."""
    for training in (True, False):
        outcomes = [
            step(copy.deepcopy(model), args, kwargs, training=training)
            for model in (actual, expected)
        ]
        assert_same_step(*outcomes)


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    """The state_dicts have the same keys in the same order and bit-identical values."""
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert same_bits(ours[name], value), f"{name} has other values"


def same_bits(actual, expected) -> bool:
    """Whether two entries of a state_dict are the same; NaN is like NaN of the same bits."""
    if isinstance(expected, tuple):
        return all(map(same_bits, actual, expected))
    if not isinstance(expected, Tensor):
        return actual == expected
    if is_lazy(expected):
        return is_lazy(actual)
    if expected.is_quantized:
        return actual.qscheme() == expected.qscheme() and actual.equal(expected)
    alike = actual.dtype == expected.dtype and actual.shape == expected.shape
    if not alike or expected.is_meta:
        return alike
    return bytes_of(actual).equal(bytes_of(expected))


def bytes_of(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def assert_same_structure(actual: nn.Module, expected: nn.Module) -> None:
    """The same modules of the same classes at the same names, in the same order."""
    ours, theirs = (
        [(name, class_of(module)) for name, module in model.named_modules(remove_duplicate=False)]
        for model in (actual, expected)
    )
    assert ours == theirs
    ours = [name for name, _ in actual.named_parameters()]
    assert ours == [name for name, _ in expected.named_parameters()]


def class_of(module: nn.Module) -> type:
    """The module's class; parametrized modules have one of their own each, which says nothing."""
    return parametrize.type_before_parametrizations(module)


def set_seed(seed: int = SEED) -> None:
    """Starts the random streams of Python, NumPy and PyTorch anew."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def random_states() -> tuple[object, ...]:
    """The states of the random streams of Python, NumPy and PyTorch, comparable by ==."""
    import numpy

    return (
        random.getstate(),
        tuple(numpy.random.get_state()[1].tolist()),
        numpy.random.get_state()[2],
        torch.get_rng_state(),
    )
