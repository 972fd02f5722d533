"""Siblings of Linear: values, gradients and second derivatives."""

import pytest
import torch
from derivatives import assert_same_second_derivatives
from equivalence import assert_equivalent
from families import WIDTHS, assert_runs_once, case, fused
from torch import nn

SHAPES = [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4), (0, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_same_function(widths, bias, shape):
    linear = case(nn.Linear, 4, shape)
    plain = linear.family(widths, bias=bias)
    x = linear.input()
    assert_equivalent(fused(plain), plain, (x,))
    assert_runs_once(fused(plain), x)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_same_second_derivatives(widths):
    linear = case(nn.Linear, 4, (3, 4))
    plain = linear.family(widths)
    assert_same_second_derivatives(fused(plain), plain, linear.input())


def test_transposed_input_and_no_features():
    plain = case(nn.Linear, 4, ()).family()
    assert_equivalent(fused(plain), plain, (torch.randn(4, 3, dtype=torch.float64).t(),))
    empty = case(nn.Linear, 0, ()).family()
    assert_equivalent(fused(empty), empty, (torch.randn(3, 0, dtype=torch.float64),))


def test_complex_weights():
    plain = case(nn.Linear, 4, ()).family((2, 3)).to(torch.complex128)
    x = torch.randn(3, 4, dtype=torch.complex128)
    for ours, theirs in zip(fused(plain)(x), plain(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
