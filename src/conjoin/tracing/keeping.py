"""Puts back the values of tensors that code changes in place."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch._ops import OpOverload
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

    def __init__(self, own: frozenset[int]) -> None:
        """Knows the ids of the tensors of the model itself, which may change."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = own
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
        for value in _written(func, args, kwargs):
            known = id(value) in self._own or id(value) in self._kept or value in self._made
            if isinstance(value, torch.Tensor) and _is_plain(value) and not known:
                with torch._C._DisableTorchDispatch():
                    version = 0 if value.is_inference() else value._version
                    self._kept[id(value)] = value, value.detach().clone(), version
        result = func(*args, **kwargs)
        if type(result) is torch.Tensor and not any(isinstance(a, torch.Tensor) for a in args):
            self._made[result] = None
        return result

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


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is what it seems."""
    return type(tensor).__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[object]:
    """The arguments that an operation changes in place."""
    for position, name in _writes(func):
        value = kwargs[name] if name in kwargs else args[position : position + 1]
        yield from value if isinstance(value, (tuple, list)) else (value,)


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
