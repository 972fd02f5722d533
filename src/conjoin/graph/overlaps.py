"""Which tensors of a model lie in memory that another one has, too."""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from conjoin.layers.wide import Wide
from conjoin.reachable import OF_MODULES, held_by


def overlaps(modules: dict[str, nn.Module]) -> dict[str, str]:
    """The tensors, by name, that overlap with another one of the model, and with which."""
    spaces: dict[Hashable, list[tuple[int, int, str]]] = {}
    for prefix, module in modules.items():
        for name, tensor in _held_tensors(module):
            if (span := _span(tensor)) is not None:
                space, start, stop = span
                spaces.setdefault(space, []).append((start, stop, f"{prefix}.{name}".lstrip(".")))
    shared: dict[str, str] = {}
    for spans in spaces.values():
        spans.sort(key=lambda span: span[:2])
        for i, (_, stop, name) in enumerate(spans):
            for following in range(i + 1, len(spans)):
                start, _, other = spans[following]
                if start >= stop:
                    break
                shared.setdefault(name, other)
                shared.setdefault(other, name)
    return shared


def _held_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a module holds, also in what is held by its plain attributes."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor
    if isinstance(module, Wide):  # What it holds beside its parameters its views hold too.
        return
    for name, value in vars(module).items():
        if name not in OF_MODULES and not isinstance(value, (bool, int, float, str)):
            yield from ((name, item) for item in held_by(value) if isinstance(item, Tensor))


def _span(tensor: Tensor) -> tuple[Hashable, int, int] | None:
    """The memory that a tensor lies in: which space, from which byte to which."""
    if nn.parameter.is_lazy(tensor) or tensor.layout is not torch.strided or tensor.numel() == 0:
        return None
    count = tensor.numel()
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        count = int(1 + sum((n - 1) * step for n, step in steps))
    size = count * tensor.element_size()
    if tensor.is_meta or isinstance(tensor, FakeTensor):
        start = int(tensor.storage_offset()) * tensor.element_size()
        return (tensor.device, tensor.untyped_storage()._cdata), start, start + size
    return tensor.device, tensor.data_ptr(), tensor.data_ptr() + size
