"""Counts the kernels that a GPU really ran, to compare with what conjoin's report counts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

NOT_KERNELS = ("Memcpy", "Memset")
"""How the names of what the device does besides begin; a report counts operations."""


def profiled(run: Callable[[], object]) -> int:
    """The kernels of one run, of the second one: the first may set libraries up."""
    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(
        event.device_type == DeviceType.CUDA and not event.name.startswith(NOT_KERNELS)
        for event in profiler.events()
    )
