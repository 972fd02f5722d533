"""Are the second derivatives of two models the same?"""

import torch
from equivalence import assert_close, differentiable, gradients
from torch import Tensor, nn


def assert_same_second_derivatives(actual: nn.Module, expected: nn.Module, *args: Tensor) -> None:
    """The gradients of the norm of the gradients by input and weights, as in a gradient penalty."""
    found = [_penalty_gradients(model, args) for model in (actual, expected)]
    assert_close(*found, "second derivative by")


def _penalty_gradients(model: nn.Module, args: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
    model.zero_grad()
    leaves, args = differentiable(args)
    loss = sum(output.tanh().square().sum() for output in model(*args))
    first = torch.autograd.grad(loss, [*leaves, *model.parameters()], create_graph=True)
    sum(grad.square().sum() for grad in first).backward()
    found = {f"input {number}": leaf.grad for number, leaf in enumerate(leaves)}
    return found | gradients(model)
