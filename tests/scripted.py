"""Models whose forward is a function, their graphs after some passes, and the comparison."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from equivalence import assert_close, assert_same_state, assert_same_step, step
from torch import Tensor, fx, nn

from conjoin.layers.releasing import release
from conjoin.layers.view import views
from conjoin.passes import rewrite

NAMES = "abc"
"""The branches."""


class Scripted(nn.Module):
    """Modules, and a function of them and of the input."""

    def __init__(self, script: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.script = script
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.script(self, x)


def layers(make: Callable[[], nn.Module], *suffixes: str) -> dict[str, nn.Module]:
    """A module for each branch and suffix."""
    return {name + suffix: make() for suffix in suffixes or ("",) for name in NAMES}


def linears(*suffixes: str) -> dict[str, nn.Module]:
    """A Linear from 4 to 4 for each branch and suffix."""
    return layers(lambda: nn.Linear(4, 4), *suffixes)


def branches(*steps: Callable[..., Any], names: str = NAMES) -> Callable[..., list[Any]]:
    """A script that does the same steps `step(model, h, name)` in each branch."""

    def script(model: nn.Module, x: Tensor) -> list[Any]:
        outputs = []
        for name in names:
            h = getattr(model, name)(x)
            for each in steps:
                h = each(model, h, name)
            outputs.append(h)
        return outputs

    return script


def called(suffix: str) -> Callable[..., Any]:
    """A step that calls the branch's module of this suffix."""
    return lambda model, h, name: getattr(model, name + suffix)(h)


def last(model: nn.Module, h: Tensor, name: str) -> Tensor:
    """A step that is alike in all branches, and one after it that is no part of any rewrite."""
    return h.sin().sum(-1)


def both(model: nn.Module, passes: Iterable[Any] = (rewrite,)) -> tuple[fx.GraphModule, nn.Module]:
    """The graph of a model, in float64, after passes, and as it was."""
    traced = fx.symbolic_trace(model.double())
    plain = copy.deepcopy(traced)
    for each in passes:
        each(traced)
    traced.graph.lint()
    traced.recompile()
    return traced, plain


def targets(graph_module: fx.GraphModule) -> list[str]:
    """What a graph calls, by name, in order."""
    calls = [node for node in graph_module.graph.nodes if node.op.startswith("call")]
    return [n.target if isinstance(n.target, str) else n.target.__name__ for n in calls]


def outcome(model: nn.Module, x: Tensor, *, training: bool) -> Any:
    """What a step leaves behind, or the class of what it raises."""
    try:
        return step(copy.deepcopy(model), (x,), training=training)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return type(error)


def assert_same(actual: nn.Module, expected: nn.Module, *inputs: Tensor) -> None:
    """The same steps in both modes, or the same class of error, for each input."""
    for x in inputs:
        for training in (True, False):
            ours, theirs = (outcome(m, x, training=training) for m in (actual, expected))
            if isinstance(theirs, type) or isinstance(ours, type):
                assert ours == theirs, (tuple(x.shape), training, ours, theirs)
            else:
                assert_same_step(ours, theirs)


def assert_trains_alike(actual: nn.Module, expected: nn.Module, *inputs: Tensor) -> None:
    """The same parameters and buffers after a step of an optimizer for each input."""
    models = [copy.deepcopy(expected), actual]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for x in inputs:
            step(model, (x,))
            optimizer.step()
    theirs, ours = (model.state_dict() for model in models)
    assert_close(ours, theirs)


def assert_released_to_the_bit(actual: nn.Module, expected: nn.Module) -> None:
    """Its views become plain layers with the values that the others have."""
    for _, view in list(views(actual)):
        release(view)
    assert_same_state(actual, expected)


def randn(*shape: int) -> Tensor:
    """Random values in float64."""
    return torch.randn(shape, dtype=torch.float64)
