"""Copies models and arguments, in float64 where that is asked for."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from conjoin.tracing.copies import Call
from conjoin.verifying import outcome
from conjoin.verifying.outcome import tensors_in
from conjoin.verifying.settings import Setting
from conjoin.verifying.unlike import is_inexact


def prepared(model: nn.Module, setting: Setting, convert: bool) -> nn.Module:
    """A copy of a model, in its mode."""
    held = [[m._parameters, m._buffers, outcome.attributes(m)] for m in model.modules()]
    prepared = _copied(model, _converted(tensors_in(held), convert), "the model")
    return prepared if setting.training is None else prepared.train(setting.training)


def arguments(call: Call, setting: Setting, convert: bool) -> tuple[Call, dict[str, Tensor]]:
    """A copy of the arguments, and the tensors that collect the gradients of the inputs by name.

    Where the setting makes an input differentiable, the model gets no leaf, so that it may change
    its input in place.
    """
    named = {
        id(value): (name, value)
        for arguments in call
        for name, value in outcome.walk("input", arguments)
        if isinstance(value, Tensor)
    }
    memo = _converted([value for _, value in named.values()], convert)
    leaves = {}
    for key, (name, _) in named.items():
        leaf = memo.get(key)
        if leaf is None:
            continue
        if setting.differentiable:
            memo[key] = leaf.requires_grad_().clone()
        if leaf.requires_grad:
            leaves[name] = leaf
    return _copied(call, memo, "an example input"), leaves


_Copied = TypeVar("_Copied")


def _copied(value: _Copied, memo: dict[int, Any], what: str) -> _Copied:
    try:
        return copy.deepcopy(value, memo)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{what} cannot be copied ({error}), and verify runs copies to leave the models as "
            "they are."
        ) from error


def _converted(tensors: Iterable[Tensor], convert: bool) -> dict[int, Tensor]:
    """For `copy.deepcopy`: what stands for each of the floating tensors, by its id.

    Tensors that share memory, which `deepcopy` would part if they are parameters, share it still.
    """
    memory: dict[tuple[int, torch.dtype], Tensor] = {}
    memo: dict[int, Tensor] = {}
    for tensor in tensors:
        if not _convertible(tensor):
            continue
        dtype = exact(tensor.dtype) if convert else tensor.dtype
        storage = tensor.untyped_storage()
        key = storage._cdata, tensor.dtype
        if key not in memory:
            size = storage.nbytes() // tensor.element_size()
            memory[key] = tensor.detach().as_strided((size,), (1,), 0).to(dtype, copy=True)
        strides = tensor.stride(), tensor.storage_offset()
        made = memory[key].as_strided(tensor.shape, *strides).data
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = (
            nn.Parameter(made, tensor.requires_grad)
            if parameter
            else made.requires_grad_(tensor.requires_grad)
        )
    return memo


def _convertible(tensor: Tensor) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and type(tensor.data) is Tensor
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and is_inexact(tensor.dtype)
        and not tensor.is_conj()
    )


def exact(dtype: torch.dtype) -> torch.dtype:
    """Complex or real, with as many digits as there are."""
    return torch.complex128 if dtype.is_complex else torch.float64
