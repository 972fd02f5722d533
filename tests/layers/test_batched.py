"""Batched products: the function is PyTorch's own, and gradients come as the weights are kept."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conjoin.layers import batched


@pytest.fixture(autouse=True)
def _of_any_size(monkeypatch):
    monkeypatch.setattr(batched, "LARGE", 0)
    monkeypatch.setattr(batched, "VERY_LARGE", 0)


def _of(*shape, dtype=torch.float64, grad=True):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(grad)


def _operands(dtype=torch.float64, biased=True, number=3, out=4):
    bias = _of(2, 1, out, dtype=dtype) if biased else None
    return _of(2, number, 5, dtype=dtype), _of(2, out, 5, dtype=dtype), bias


def _plain(rows, weight, bias):
    product = rows @ weight.mT
    return product if bias is None else product + bias


@pytest.mark.parametrize(("number", "out"), [(1, 4), (3, 4), (3, 1), (1, 1)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_values_and_gradients(dtype, biased, number, out):
    operands = _operands(dtype, biased, number, out)
    held = [each for each in operands if each is not None]
    ours, theirs = batched.product(*operands), _plain(*operands)
    torch.testing.assert_close(ours, theirs)
    seed = _of(2, number, out, dtype=dtype, grad=False)
    pairs = (torch.autograd.grad(out, held, seed) for out in (ours, theirs))
    for mine, its in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize(("number", "out"), [(1, 4), (3, 4), (3, 1)])
def test_second_derivatives(number, out):
    assert torch.autograd.gradcheck(batched.product, _operands(number=number, out=out))
    assert torch.autograd.gradgradcheck(batched.product, _operands(number=number, out=out))


def test_several_gradients_at_once():
    rows, weight, bias = _operands()
    seeds = _of(6, 2, 3, 4, grad=False)
    product = batched.product(rows, weight, bias)
    found = torch.autograd.grad(product, weight, seeds, is_grads_batched=True, retain_graph=True)
    for mine, seed in zip(found[0], seeds, strict=True):
        torch.testing.assert_close(mine, torch.autograd.grad(product, weight, seed, None, True)[0])


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket)
        return func(*args, **(kwargs or {}))


def _backward(number, out=4):
    """The operations of a backward pass, and the gradient of the weight."""
    rows, weight, bias = _operands(number=number, out=out)
    product = batched.product(rows, weight, bias)
    with _Operations() as operations:
        product.backward(_of(2, number, out, grad=False))
    return operations.seen, weight.grad


@pytest.mark.parametrize("number", [1, 3])
def test_the_gradient_of_the_weight_is_taken_as_it_comes(number):
    seen, gradient = _backward(number)
    assert gradient.is_contiguous()
    assert not {torch.ops.aten.clone, torch.ops.aten.copy_} & {*seen}


@pytest.mark.parametrize(
    ("number", "out", "products"), [(1, 4, 1), (3, 4, 2), (3, 1, 1), (1, 1, 0)]
)
def test_no_product_adds_up_one_number(number, out, products):
    """The gradient of the weight with one row, and that of the rows with one output."""
    seen, _ = _backward(number, out)
    assert seen.count(torch.ops.aten.bmm) == products


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_only_what_requires_a_gradient_gets_one(frozen):
    operands = _operands()
    operands[frozen].requires_grad_(False)
    batched.product(*operands).sum().backward()
    assert [each.grad is not None for each in operands] == [at != frozen for at in range(3)]


@pytest.mark.parametrize("number", [1, 3])
def test_transforms_and_autocast_have_products_of_their_own(number):
    operands = _operands(torch.float32, number=number)
    gradients = torch.func.grad(lambda *each: batched.product(*each).sum(), argnums=(0, 1, 2))
    expected = torch.autograd.grad(_plain(*operands).sum(), operands)
    for mine, its in zip(gradients(*operands), expected, strict=True):
        torch.testing.assert_close(mine, its)
    with torch.autocast("cpu", torch.bfloat16):
        product = batched.product(*operands)
    assert product.dtype is torch.bfloat16
    product.float().sum().backward()
    assert all(each.grad.dtype is torch.float32 for each in operands)


@pytest.mark.parametrize(
    ("rows", "out", "width", "own"),
    [
        (1, 128, 128, True),
        (2, 128, 128, True),
        (2, 64, 64, False),
        (512, 1, 128, True),
        (512, 16, 16, False),
    ],
)
def test_a_gradient_of_its_own_has_to_pay(monkeypatch, rows, out, width, own):
    monkeypatch.undo()
    product = batched.product(_of(2, rows, width), _of(2, out, width), None)
    assert (type(product.grad_fn).__name__ == "_ProductBackward") is own


def test_compiled_for_any_number_of_rows(monkeypatch):
    monkeypatch.setattr(batched, "LARGE", 40)
    counter = CompileCounter()
    compiled = torch.compile(batched.product, backend=counter, dynamic=True, fullgraph=True)
    for number in (3, 7, 9, 11):
        operands = _operands(number=number)
        torch.testing.assert_close(compiled(*operands), _plain(*operands))
    assert counter.frame_count == 1


@pytest.mark.parametrize("product", [batched.product, _plain])
@pytest.mark.parametrize("number", [1, 3])
def test_a_weight_may_change_where_its_product_needs_no_gradient_of_rows(product, number):
    rows, weight, bias = _operands(number=number)
    rows = rows.detach()
    out = product(rows, weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    out.sum().backward()
    torch.testing.assert_close(weight.grad, rows.sum(1, keepdim=True).expand_as(weight))


def _of_one(number=(6,), out=12, width=5, biased=True, **changes):
    bias = _of(out, **changes) if biased else None
    return _of(*number, width, **changes), _of(out, width, **changes), bias


@pytest.mark.parametrize("number", [(6,), (2, 3), (1,), (), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("width", [1, 5, 9])
def test_one_weight_is_a_linear_layer(number, biased, width):
    operands = _of_one(number, width=width, biased=biased)
    ours, theirs = batched.linear(*operands), F.linear(*operands)
    torch.testing.assert_close(ours, theirs)
    held = [each for each in operands if each is not None]
    seed = _of(*theirs.shape, grad=False)
    pairs = (torch.autograd.grad(out, held, seed) for out in (ours, theirs))
    for mine, its in zip(*pairs, strict=True):
        torch.testing.assert_close(mine, its)
        assert mine.is_contiguous()


@pytest.mark.parametrize(
    ("number", "width", "own"), [((1024,), 8, True), ((512,), 8, False), ((1024,), 9, False)]
)
def test_few_inputs_have_a_gradient_of_their_own_where_it_pays(monkeypatch, number, width, own):
    monkeypatch.undo()
    made = batched.linear(*_of_one(number, out=128, width=width))
    names = {
        type(made.grad_fn).__name__,
        *(type(n[0]).__name__ for n in made.grad_fn.next_functions),
    }
    assert ("_ProductBackward" in names) is own


def test_what_one_weight_gives_may_change_in_place():
    operands = _of_one((2, 6))
    gradients = []
    for linear in (batched.linear, F.linear):
        made = linear(*operands)
        made[0].mul_(2)
        made.relu_()
        gradients.append(torch.autograd.grad(made.square().sum(), operands))
    for mine, its in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, its)


def test_what_a_linear_layer_refuses_is_refused():
    input, weight, bias = _of_one((2, 8), width=4)
    for given in (input.view(2, 2, 16), input.view(64)[:3], input.half(), input.to("meta")):
        with pytest.raises(RuntimeError) as expected:
            F.linear(given, weight, bias)
        with pytest.raises(RuntimeError) as refused:
            batched.linear(given, weight, bias)
        assert str(refused.value) == str(expected.value)


def test_one_weight_in_transforms_and_of_second_order():
    input, weight, bias = _of_one()
    assert torch.autograd.gradcheck(batched.linear, (input, weight, bias))
    assert torch.autograd.gradgradcheck(batched.linear, (input, weight, bias))
    mapped = torch.func.vmap(batched.linear, (0, None, None))(input, weight, bias)
    torch.testing.assert_close(mapped, F.linear(input, weight, bias))
    _, tangents = torch.func.jvp(lambda x: batched.linear(x, weight, bias), (input,), (input,))
    torch.testing.assert_close(tangents, F.linear(input, weight))
