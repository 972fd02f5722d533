"""Public models under `torch.compile`: the same function, and products as few as in eager mode."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from equivalence import assert_same_step, step
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import ZOO

import conjoin

pytestmark = pytest.mark.zoo

MODELS = (
    "inception_v3",
    "bert",
    "llama",
    "unet",
    "stable_diffusion3",
    "flux",
    "rec_mmoe",
    "rec_ple",
    "policy_actor_critic",
    "critics",
    "agents_mixed",
)
"""Models of the families that the issue names; each goes through Dynamo in one graph."""

HEAVY = frozenset({"inception_v3"})
"""Those that are looked at in evaluation mode only."""

PRODUCTS = frozenset("mm addmm bmm baddbmm convolution".split())


class Dispatched(TorchDispatchMode):
    """Counts the products that run."""

    def __init__(self):
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.products += function.overloadpacket.__name__ in PRODUCTS
        return function(*args, **(kwargs or {}))


class Compiler:
    """An inner backend that counts the products of the forward graphs."""

    def __init__(self):
        self.graphs: list[int] = []

    def __call__(self, graph_module: Any, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=self._forward, bw_compiler=lambda gm, _: gm.forward)(
            graph_module, inputs
        )

    def _forward(self, graph_module: Any, inputs: Any) -> Any:
        names = Counter(getattr(n.target, "__name__", "") for n in graph_module.graph.nodes)
        self.graphs.append(sum(names[name] for name in names if name.split(".")[0] in PRODUCTS))
        return graph_module.forward


def compiled(model: nn.Module, *, backend: Any, **options: Any) -> Any:
    """The model with its forward compiled, still a module that `step` can train."""
    model.forward = torch.compile(model.forward, backend=backend, **options)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_compiled(name):
    torch.compiler.reset()
    specimen = ZOO[name]
    pytest.importorskip(specimen.package)
    model, (args, kwargs) = specimen.model(), specimen.call()
    fused = conjoin.optimize(copy.deepcopy(model), args, example_kwargs=kwargs)
    ours, theirs = copy.deepcopy(fused), copy.deepcopy(model)
    inner, other = Compiler(), Compiler()
    compiled(ours, backend="conjoin", options={"backend": inner})
    compiled(theirs, backend=other)
    for training in (True, False)[name in HEAVY :]:
        expected = step(theirs, args, kwargs, training=training)
        assert_same_step(step(ours, args, kwargs, training=training), expected)
    assert len(inner.graphs) == len(other.graphs), "no more graphs than of the plain model"
    with torch.no_grad(), Dispatched() as eager:
        fused.eval()(*args, **kwargs)
    assert inner.graphs[-1] <= eager.products < other.graphs[-1]
