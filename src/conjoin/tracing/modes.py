"""Leaves the random streams, the modes and the settings of the process as they were.

A model's code may set them, and may break off between entering a mode and leaving it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.backends import cuda, cudnn, mkldnn
from torch.utils import _device
from torch.utils._python_dispatch import _pop_mode

AUTOCAST = ("cpu", "cuda", "mps", "xpu")
"""Types of device with an autocast mode of their own."""


LATER: tuple[Any, ...] = (torch.cuda, torch.xpu)
"""Where a seed is noted until a device is first used, whose stream starts from it then."""


ROUNDING: tuple[Any, ...] = (cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul)  # type: ignore[attr-defined]
"""What may round numbers of float32 before it multiplies them, as to TF32."""


def _autocast(device: str) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def _set_autocast(device: str, held: tuple[bool, torch.dtype]) -> None:
    torch.set_autocast_enabled(device, held[0])
    torch.set_autocast_dtype(device, held[1])


def _put_back_environment(before: dict[str, str]) -> None:
    for name in [name for name in os.environ if name not in before]:
        del os.environ[name]
    os.environ.update(before)


_Setting = tuple[Callable[[], Any], Callable[[Any], object]]

SETTINGS: tuple[_Setting, ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_warn_always_enabled, torch.set_warn_always),
    (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    (cuda.math_sdp_enabled, cuda.enable_math_sdp),
    (
        lambda: (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled()),
        lambda held: torch.set_anomaly_enabled(*held),
    ),
    (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda held: torch.use_deterministic_algorithms(held[0], warn_only=held[1]),
    ),
    (
        lambda: (cudnn.enabled, cudnn.benchmark, cudnn.deterministic),
        lambda held: cudnn.set_flags(held[0], held[1], _deterministic=held[2]),  # type: ignore[no-untyped-call]
    ),
    (os.environ.copy, _put_back_environment),
    *(
        (functools.partial(_autocast, device), functools.partial(_set_autocast, device))
        for device in AUTOCAST
    ),
)
"""What tells each setting, and what sets it."""


@contextlib.contextmanager
def unmoved_streams() -> Iterator[None]:
    """Leaves the random streams of Python, NumPy and PyTorch as they were."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else []
    noted = [vars(module._lazy_seed_tracker) for module in LATER]
    seeds = [dict(each) for each in noted]
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        for each, before in zip(noted, seeds, strict=True):
            each.update(before)


@contextlib.contextmanager
def unrounded() -> Iterator[None]:
    """Has what multiplies numbers of float32 take them as they are.

    PyTorch has two sets of names for that, of which the older one cannot be read once something was
    set by the newer one. The code inside may read what the code outside may.
    """
    before, older = _precisions(), _by_older_names()
    if older is not None:
        _set_by_older_names((False, "highest"))
    else:
        for each in ROUNDING:
            each.fp32_precision = "ieee"
    inside = _precisions()
    try:
        yield
    finally:
        if _precisions() == inside:  # Or else the code inside has set it since.
            if older is not None:
                _set_by_older_names(older)
            for each, precision in zip(ROUNDING, before, strict=True):
                each.fp32_precision = precision


def _precisions() -> list[str]:
    return [each.fp32_precision for each in ROUNDING]


def _by_older_names() -> tuple[bool, str] | None:
    """What cuDNN may do, and products; None where that is not told."""
    try:
        return cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_by_older_names(held: tuple[bool, str]) -> None:
    cudnn.allow_tf32 = held[0]
    torch.set_float32_matmul_precision(held[1])


def start_streams(seed: int) -> None:
    """Starts the random streams of Python, NumPy and PyTorch anew."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


@contextlib.contextmanager
def unchanged_modes() -> Iterator[None]:
    """Leaves modes and settings as they were, also where the code inside broke off within one."""
    gradients, nesting = torch.is_grad_enabled(), _autocast_nesting()
    held = [tell() for tell, _ in SETTINGS]
    functions, default = _function_modes(), _default_device()
    dispatching, hooks = torch._C._len_torch_dispatch_stack(), _saved_tensor_hooks()
    level = forward_ad._current_level
    try:
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(gradients)
            yield
    finally:
        torch.set_grad_enabled(gradients)
        for (tell, put_back), before in zip(SETTINGS, held, strict=True):
            if tell() != before:
                put_back(before)
        while _autocast_nesting() > nesting:
            torch.autocast_decrement_nesting()
        while torch._C._len_torch_dispatch_stack() > dispatching:
            _pop_mode()
        while _saved_tensor_hooks() not in (hooks, None):
            torch._C._autograd._pop_saved_tensors_default_hooks()
        while forward_ad._current_level > level:
            forward_ad.exit_dual_level()  # type: ignore[no-untyped-call]
        _put_back_functions(functions, default)


def _autocast_nesting() -> int:
    """In how many autocast modes the process is, one by another."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def _saved_tensor_hooks() -> object:
    """The innermost hooks for tensors that are saved for the backward pass; None without any."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _function_modes() -> list[Any]:
    """The modes for functions, the innermost last; the default device is one."""
    return [*map(torch._C._get_function_stack_at, range(torch._C._len_torch_function_stack()))]


def _default_device() -> tuple[Any, Any]:
    """What PyTorch itself notes of the default device."""
    return vars(torch._GLOBAL_DEVICE_CONTEXT).get("device_context"), _device.CURRENT_DEVICE


def _put_back_functions(modes: list[Any], default: tuple[Any, Any]) -> None:
    if _function_modes() == modes and _default_device() == default:
        return
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    context, _device.CURRENT_DEVICE = default
    vars(torch._GLOBAL_DEVICE_CONTEXT)["device_context"] = context
