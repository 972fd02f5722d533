"""Who is compared: each makes of a case's model something that is called like it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

import conjoin
from benchmarks.cases import Case

MODES = ("inference", "training")
"""Inference is in evaluation mode without gradients; training is a whole step."""

PAIRS_TOO = {"min_fuse_set_size": 2}
"""Inductor's passes begin at five layers, and most siblings are fewer."""

HORIZONTAL = {"pre_grad_fusion_options": {"batch_linear_lhs": PAIRS_TOO, "batch_linear": PAIRS_TOO}}
"""Inductor's own fusion of siblings, which is off by default."""


class UnavailableError(Exception):
    """A peer cannot be measured on a case; the message says why."""


@dataclass(frozen=True)
class Peer:
    """A way to run a model.

    Attributes:
        name: what it is called by.
        about: what it is, in a few words.
        build: makes what is called, from a case, a copy of its model, and inputs.
        modes: what it can be measured in.
        compiles: whether it takes long to make, so that few cases are measured unless asked for.
        device: the only device it is for, or None.
        replays: whether a call launches what was captured before, as one, so that no operations
            are dispatched which could be counted.
    """

    name: str
    about: str
    build: Callable[[Case, nn.Module, tuple[Tensor, ...]], nn.Module]
    modes: tuple[str, ...] = MODES
    compiles: bool = False
    device: str | None = None
    replays: bool = False


class Ensemble(nn.Module):
    """Equal modules that read one tensor, by `torch.func.stack_module_state` and `vmap`."""

    def __init__(self, branches: nn.ModuleList) -> None:
        super().__init__()
        parameters, buffers = stack_module_state(list(branches))
        self.names = list(parameters)
        self.stacked = nn.ParameterList(parameters.values())
        self.buffers_by_name = buffers
        # On the meta device, so that its weights are nowhere among the parameters.
        self.__dict__["base"] = copy.deepcopy(branches[0]).to("meta")

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        def branch(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return functional_call(self.base, (parameters, buffers), (x,))

        parameters = dict(zip(self.names, self.stacked, strict=True))
        return torch.vmap(branch)(parameters, self.buffers_by_name).unbind()

    def train(self, mode: bool = True) -> Ensemble:
        self.base.train(mode)
        return super().train(mode)


def _plain(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    return model


def _by_hand(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    return case.by_hand(model).train(model.training).to(inputs[0].device)


def _conjoin(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    return conjoin.optimize(model, inputs, inplace=True)


def _vmap(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
    if case.branches is None:
        raise UnavailableError("the model is more than equal branches on one tensor")
    return Ensemble(getattr(model, case.branches)).train(model.training)


def _compiled(
    options: dict[str, Any] | None = None,
    first: Callable[[Case, nn.Module, tuple[Tensor, ...]], nn.Module] = _plain,
    backend: str = "inductor",
) -> Callable[[Case, nn.Module, tuple[Tensor, ...]], nn.Module]:
    def build(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
        made = first(case, model, inputs)
        return torch.compile(made, backend=backend, options=options)  # type: ignore[return-value]

    return build


def _graphed(
    first: Callable[[Case, nn.Module, tuple[Tensor, ...]], nn.Module],
) -> Callable[[Case, nn.Module, tuple[Tensor, ...]], nn.Module]:
    def build(case: Case, model: nn.Module, inputs: tuple[Tensor, ...]) -> nn.Module:
        return torch.cuda.make_graphed_callables(first(case, model, inputs), inputs)  # type: ignore[return-value]

    return build


PEERS = {
    peer.name: peer
    for peer in (
        Peer("plain", "the model as it was", _plain),
        Peer("by_hand", "wide, by hand", _by_hand),
        Peer("conjoin", "`conjoin`", _conjoin),
        Peer("vmap", "`stack_module_state` and `vmap`", _vmap),
        Peer("compile", "`torch.compile`", _compiled(), compiles=True),
        Peer(
            "compile_horizontal",
            "`torch.compile` with `batch_linear_lhs` and `batch_linear`",
            _compiled(HORIZONTAL),
            compiles=True,
        ),
        Peer(
            "compile_freezing",
            "`torch.compile` with `freezing`",
            _compiled({"freezing": True}),
            modes=("inference",),
            compiles=True,
        ),
        Peer(
            "compile_conjoin",
            "`torch.compile` of `conjoin`",
            _compiled(first=_conjoin),
            compiles=True,
        ),
        Peer(
            "compile_backend",
            '`torch.compile` of `conjoin`, `backend="conjoin"`',
            _compiled(first=_conjoin, backend="conjoin"),
            compiles=True,
        ),
        Peer("graphs", "CUDA graphs", _graphed(_plain), device="cuda", replays=True),
        Peer(
            "graphs_conjoin",
            "CUDA graphs of `conjoin`",
            _graphed(_conjoin),
            device="cuda",
            replays=True,
        ),
    )
}
"""All of them, by name; the others are compared with the first."""
