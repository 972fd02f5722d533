"""Puts back the values of tensors that code changes in place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from conjoin.tracing.repeating import device_of

UNTOLD = frozenset({"running_mean", "running_var"})
"""Arguments that operations change in place, whatever their schemas say."""


class KeepingTensors(TorchDispatchMode):
    """Puts back the values of tensors beside a model that its code changes in place.

    Also within a mode for fake tensors, where an operation on real ones alone runs for real. What
    is made here stays as it is: a cache may hold it until the look is over.
    """

    # One that runs code, such as `torch.cond`, runs as it is, and has no schema.
    supports_higher_order_operators = True

    def __init__(self, own: WeakIdKeyDictionary | None = None) -> None:
        """Knows the tensors of the model itself, which may change."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = WeakIdKeyDictionary() if own is None else own
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}
        self._made: WeakIdKeyDictionary = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Notes the values of what the operation is about to change."""
        if (device := device_of(func, args)) is not None:
            return device
        kwargs = kwargs or {}
        written = [each for each in _written(func, args, kwargs) if _is_plain(each)]
        for value in written:
            if value in self._own or id(value) in self._kept or value in self._made:
                continue
            with torch._C._DisableTorchDispatch():
                version = 0 if value.is_inference() else value._version
                self._kept[id(value)] = value, value.detach().clone(), version
        result = func(*args, **kwargs)
        if _is_uncounted(func):
            increment_version([each for each in written if not each.is_inference()])
        if type(result) in (torch.Tensor, tuple, list) and self._is_new(func, args):
            for made in result if isinstance(result, (tuple, list)) else (result,):
                if type(made) is torch.Tensor:
                    self._made[made] = None
        return result

    def _is_new(self, func: Any, args: tuple[Any, ...]) -> bool:
        """Whether what an operation gives is made here, or a view of what is."""
        viewed = args[0] if args and _gives_views(func) else None
        return not isinstance(viewed, torch.Tensor) or viewed in self._made

    def __exit__(self, *error: Any) -> None:
        """Puts them back."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        with torch._C._DisableTorchDispatch():
            # A view was noted after others.
            for value, before, version in reversed(self._kept.values()):
                if value.shape != before.shape:  # `out=` resizes what is too small.
                    value.resize_(before.shape)
                value.detach().copy_(before)
                if not value.is_inference():  # A graph that has saved it goes backward as ever.
                    torch._C._autograd._unsafe_set_version_counter((value,), (version,))


def own_tensors(model: nn.Module) -> WeakIdKeyDictionary:
    """The parameters and buffers of a model, as long as each is in use."""
    return WeakIdKeyDictionary(dict.fromkeys((*model.parameters(), *model.buffers())))


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor that is what it seems."""
    own = getattr(type(value), "__torch_dispatch__", None)
    return isinstance(value, torch.Tensor) and own is torch.Tensor.__torch_dispatch__


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments that an operation changes in place."""
    for position, name in _writes(func):
        for value in (kwargs[name],) if name in kwargs else args[position : position + 1]:
            yield from value if isinstance(value, (tuple, list)) else (value,)


@functools.cache
def _is_uncounted(func: Any) -> bool:
    """Whether version counters do not see what an operation changes while there is a mode."""
    return isinstance(func, OpOverload) and func.overloadpacket.__name__.startswith("_foreach_")


@functools.cache
def _gives_views(func: Any) -> bool:
    """Whether what an operation gives shares memory with its first argument, or is that."""
    if not isinstance(func, OpOverload):
        return False
    return any(each.alias_info is not None for each in func._schema.returns)


@functools.cache
def _writes(func: Any) -> tuple[tuple[int, str], ...]:
    """The positions and names of the arguments that an operation changes in place."""
    if not isinstance(func, OpOverload):
        return ()
    return tuple(
        (position, argument.name)
        for position, argument in enumerate(func._schema.arguments)
        if (argument.alias_info is not None and argument.alias_info.is_write)
        or argument.name in UNTOLD
    )
