"""Streams and CUDA graphs: whether what one call computed is there for another one.

A device runs what it is given on one stream in that order, and what it is given on two streams in
any order, unless somebody has one wait for the other. While a CUDA graph is captured nothing runs:
what a call gives is computed whenever that graph is replayed, and only then.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def stream_of(tensor: Tensor) -> int | None:
    """The stream on which operations on a real tensor run now; None on a device without streams."""
    index = tensor.get_device()
    if index < 0 or not _has_streams(tensor.device.type):
        return None
    return torch._C._accelerator_getStream(index).stream_id


def is_captured(tensor: Tensor) -> bool:
    """Whether operations on a tensor go into a CUDA graph now, and do not run."""
    if not tensor.is_cuda or isinstance(tensor, FakeTensor):
        return False
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _has_streams(device: str) -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device
