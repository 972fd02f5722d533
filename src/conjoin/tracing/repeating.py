"""A mode for fake tensors that remembers what operations give, for large models.

On a fake tensor PyTorch takes long for each operation, also where it has met the like before. A
large model consists of the same few operations on tensors of the same few shapes, so here what came
out is remembered by as little as decides it.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

PLAIN_VALUES = (int, float, bool, type(None), str)
"""Types of arguments that are a part of the key themselves, beside their type."""

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""Types of number that are never lazily conjugated, nor known as constants."""

DEVICE = torch.ops.prim.device.default
"""What PyTorch asks, several times for each operation, of tensors of classes like this."""

KEEPS_MORE = frozenset({"alias", "lift", "lift_fresh"})
"""Views that are more than other strides on the same memory."""

UNPREDICTABLE = frozenset(
    {
        torch.Tag.nondeterministic_seeded,
        torch.Tag.dynamic_output_shape,
        torch.Tag.data_dependent_output,
        torch.Tag.maybe_aliasing_or_mutating,
    }
)
"""Tags of operations whose output depends on more."""

_Key = tuple[Any, ...]


class RepeatingFakeTensorMode(FakeTensorMode):  # type: ignore[no-untyped-call]
    """Fake tensors; what functions make of tensors of which it has seen the like comes at once."""

    def __init__(self) -> None:
        """For models that also hold tensors that are not fake."""
        super().__init__(allow_non_fake_inputs=True)
        self._known: dict[_Key, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """The output of an operation."""
        key = self._key(func, args) if not kwargs and _is_function(func) else None
        if key is None:
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        known = self._known.get(key)
        if known is not None:
            return self._like(known, args[0] if func.is_view else None)
        output = super().__torch_dispatch__(func, types, args, {})
        if not isinstance(output, FakeTensor) or not _is_plain(output):
            return output
        if func.is_view or _is_new(output, args):
            self._known[key] = _described(output)
        return output

    def _key(self, func: OpOverload, args: Sequence[object]) -> _Key | None:
        """What decides what the output is like; None where more does."""
        key: list[Hashable] = [func]
        if not args or type(args[0]) is not FakeTensor:
            return None  # What is made of numbers alone depends on defaults.
        for value in args:
            if type(value) is FakeTensor and value.fake_mode is self and _is_plain(value):
                key.append(_described(value))
            elif type(value) in PLAIN_VALUES:
                key.append((type(value), value))
            elif isinstance(value, (list, tuple)) and all(type(each) is int for each in value):
                key.append(tuple(value))
            else:
                return None
        return None if torch.is_inference_mode_enabled() else tuple(key)

    def _like(self, known: tuple[Any, ...], viewed: Any) -> FakeTensor:
        """A tensor that is described so, on the memory of another or on its own."""
        shape, strides, offset, dtype, device = known
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        if viewed is not None:
            tensor.set_(viewed.untyped_storage(), offset, shape, strides)
        return FakeTensor(self, tensor, device)


def _described(tensor: FakeTensor) -> tuple[Any, ...]:
    place = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return *place, tensor.dtype, tensor.fake_device


def _is_plain(tensor: FakeTensor) -> bool:
    return tensor.dtype in FLOATS and tensor.layout is torch.strided and tensor.constant is None


def _is_new(tensor: Tensor, args: Sequence[object]) -> bool:
    """Whether a tensor is on memory of its own, and all of it, as a new one of its strides is.

    `_unsafe_view` is not, whatever its schema says.
    """
    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    own = tensor.untyped_storage()
    given = [each.untyped_storage()._cdata for each in args if isinstance(each, Tensor)]
    whole = tensor.storage_offset() == 0 and own.nbytes() == new.untyped_storage().nbytes()
    return whole and own._cdata not in given


@functools.cache
def _is_function(func: OpOverload) -> bool:
    """Whether an operation gives one tensor, new or a view, by its arguments alone."""
    schema = func._schema
    written = any(each.alias_info and each.alias_info.is_write for each in schema.arguments)
    aliased = [each.alias_info is not None for each in (*schema.arguments, *schema.returns)]
    place = [True, *[False] * (len(schema.arguments) - 1), True] if func.is_view else []
    name = func.overloadpacket.__name__
    return (
        func.namespace == "aten"
        and [str(each.type) for each in schema.returns] == ["Tensor"]
        and not written
        and (aliased == place or not any(aliased))
        and name not in KEEPS_MORE
        and not {*func.tags} & UNPREDICTABLE
    )


def device_of(func: object, args: Sequence[object]) -> torch.device | None:
    """The device of a fake tensor, where an operation asks for that; None where it does not."""
    if func is not DEVICE or type(args[0]) is not FakeTensor:
        return None
    return None if args[0].fake_mode.in_kernel_invocation else args[0].fake_device
