"""Models under `torch.compile(backend="conjoin")`, compared with themselves, graph by graph."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from equivalence import assert_close, gradients, tensors
from torch import fx, nn
from torch._dynamo.backends.registry import lookup_backend

from conjoin.graph import hazards


class Inner:
    """An inner backend that keeps what the graphs call that it is given."""

    def __init__(self, name: str = "eager") -> None:
        self.name = name
        self.called: list[Counter[str]] = []

    def __call__(self, graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        nodes = graph_module.graph.nodes
        self.called.append(Counter(hazards.called(node) for node in nodes))
        compiled: Callable[..., Any] = lookup_backend(self.name)(graph_module, inputs)
        return compiled

    def count(self, *names: str) -> set[int]:
        """How many calls of some names the graphs have that call any function at all."""
        return {sum(each[name] for name in names) for each in self.called}


def assert_same_compiled(
    model: nn.Module,
    calls: Sequence[tuple[torch.Tensor, ...]],
    *,
    plain: nn.Module | None = None,
    grad: bool = False,
    inner: Inner | None = None,
    mode: Callable[[], Any] | None = None,
    **options: Any,
) -> Inner:
    """The compiled model gives the outputs, strides, buffers and gradients of the plain one."""
    torch.compiler.reset()
    inner = inner or Inner()
    plain = plain or copy.deepcopy(model)
    compiled = torch.compile(model, backend="conjoin", options={"backend": inner}, **options)
    with warnings.catch_warnings(), mode() if mode else torch.set_grad_enabled(grad):
        warnings.filterwarnings("ignore", "[0-9]+ layers of the compiled model")
        for args in calls:
            found = [_step(run, of, args) for run, of in ((plain, plain), (compiled, model))]
            for ours, theirs in zip(found[1][:-1], found[0][:-1], strict=True):
                assert_close(ours, theirs)
            assert found[0][-1] == found[1][-1]
    return inner


def _step(
    run: Callable[..., Any], model: nn.Module, args: Sequence[torch.Tensor]
) -> tuple[dict[str, torch.Tensor], ...] | Any:
    model.zero_grad()
    leaves = [each.detach().clone().requires_grad_(each.requires_grad) for each in args]
    outputs = dict(tensors(run(*leaves)))
    if any(each.requires_grad for each in outputs.values()):
        sum((each * each).sum() for each in outputs.values()).backward()
    inputs = {str(i): leaf.grad for i, leaf in enumerate(leaves) if leaf.grad is not None}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    strides = [each.stride() for each in outputs.values()]
    return outputs, gradients(model), inputs, state, strides
