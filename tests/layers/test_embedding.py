"""Siblings of Embedding: values, gradients, the padding row, numbers out of range."""

import pytest
import torch
from derivatives import assert_same_second_derivatives
from equivalence import assert_equivalent
from families import WIDTHS, assert_runs_once, fused, merge, table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conjoin.layers.embedding import unstack

SHAPES = [(), (5,), (2, 3), (2, 2, 3), (0,), (2, 0)]


@pytest.mark.parametrize("padding_idx", [None, 0, -2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("widths", [(3, 3), (3, 3, 3), (2, 4, 1)], ids=str)
def test_same_function(widths, shape, padding_idx):
    embedding = table(5, shape, padding_idx=padding_idx)
    plain = embedding.family(widths)
    x = embedding.input()
    assert_equivalent(fused(plain), plain, (x,))
    assert_runs_once(fused(plain), x)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_same_function_of_all_widths(widths):
    plain = table(5, ()).family(widths)
    assert_equivalent(fused(plain), plain, (torch.randint(5, (4, 3)),))


@pytest.mark.parametrize("widths", [(3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types(dtype, widths):
    plain = table(5, ()).family(widths)
    assert_equivalent(fused(plain), plain, (torch.randint(5, (4, 3), dtype=dtype),))


@pytest.mark.parametrize("widths", [(3, 3), (2, 4)], ids=str)
def test_same_second_derivatives(widths):
    embedding = table(5, (2, 3), padding_idx=1)
    plain = embedding.family(widths)
    assert_same_second_derivatives(fused(plain), plain, embedding.input())


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("widths", [(3, 3), (2, 4)], ids=str)
@pytest.mark.parametrize("row", [5, -1])
def test_row_out_of_range_raises_as_before(row, widths, grad):
    plain = table(5, ()).family(widths)
    model = fused(plain)
    messages = []
    for each in (plain, model):
        with torch.set_grad_enabled(grad), pytest.raises(IndexError) as error:
            each(torch.tensor([[1, row]]))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("widths", [(3, 3), (2, 4)], ids=str)
def test_wrong_type_of_input_raises_as_before(widths):
    plain = table(5, ()).family(widths)
    messages = []
    for each in (plain, fused(plain)):
        with pytest.raises(RuntimeError) as error:
            each(torch.randn(2, 3))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("widths", [(3, 3), (2, 4)], ids=str)
def test_padding_row_never_trains(widths):
    plain = table(5, (), padding_idx=2).family(widths)
    with torch.no_grad():
        for layer in plain.layers:
            layer.weight[2] = 7.0  # The padding row may hold any values.
    x = torch.tensor([[1, 2, 2], [4, 2, 0]])
    assert_equivalent(fused(plain), plain, (x,))


def test_parts_may_be_changed_in_place():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(5, 3) for _ in range(2))

        def forward(self, x):
            first, second = (table(x) for table in self.tables)
            return first.mul_(2), second.add_(first).tanh_()

    plain = Added().double()
    model = Added().double()
    model.load_state_dict(plain.state_dict())
    merge(model.tables)
    assert_equivalent(model, plain, (torch.randint(5, (2, 3)),))


class Names(TorchDispatchMode):
    """Notes the operations that run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 2), (3, 0, 2), (3, 0), (1, 4)], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_unstacked(shape, contiguous):
    leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    stack = leaf.mul(1)
    if not contiguous:
        stack = stack.transpose(0, -1).contiguous().transpose(0, -1)
    parts = unstack(stack, shape[0])
    assert len(parts) == shape[0]
    for part, expected in zip(parts, stack.unbind(), strict=True):
        assert not part._is_view()
        assert part.stride() == expected.stride()
        assert part.equal(expected)
    (gradient,) = torch.autograd.grad([i * part.sum() for i, part in enumerate(parts)], leaf)
    for i, part in enumerate(gradient):
        assert part.eq(i).all()


def test_a_contiguous_stack_is_taken_apart_at_once():
    stack = torch.randn(8, 4, 2)
    with Names() as names:
        unstack(stack, 8)
    assert names.seen == ["view", "unsafe_split"]
