"""What code in the sandbox may use: the functions, classes and constants that are known."""

from __future__ import annotations

import builtins
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import get_overridable_functions

BUILTINS: dict[str, Any] = {
    name: getattr(builtins, name)
    for name in (
        "range len zip enumerate list tuple dict set frozenset reversed sorted sum slice min max "
        "abs int float bool str complex any all map filter round divmod pow iter next"
    ).split()
}
"""Built-in functions that give the same on every call and have no effect."""

BUILTINS |= {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and issubclass(value, Exception)
}
"""And errors, since an error that is raised ends the trace."""

PACKAGES = (
    torch, nn, F, math, torch.special, torch.fft, torch.linalg, torch.jit, nn.modules,
    torch.distributions, torch.distributions.normal, torch.distributions.categorical,
)  # fmt: skip
"""Modules, beside the user's own, whose functions and constants code may use."""

FACTORIES = frozenset(
    getattr(torch, name)
    for name in (
        "zeros ones empty full arange linspace logspace eye rand randn randint randperm tensor "
        "scalar_tensor"
    ).split()
)
"""Functions that make a tensor of nothing, which a graph repeats."""

NOT_OPERATIONS = frozenset(
    "backward data grad numpy tolist item register_hook retain_grad requires_grad_ share_memory_ "
    "set_ apply_ map_ map2_ storage untyped_storage data_ptr pin_memory resize_ resize_as_ "
    "is_leaf grad_fn requires_grad _version".split()
)
"""What a tensor has beside operations: it leads out of the graph, or differs for a slice."""

LISTINGS = frozenset("children named_children keys items values".split())
"""Methods of PyTorch's modules that depend on nothing but the names of the children."""

PLAIN_FORWARDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm)
"""Classes of PyTorch whose forward may run as that of a base class."""

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
"""Classes of PyTorch that hold modules in order."""

MADE = (
    nn.Softmax, nn.LogSoftmax, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU,
    nn.ELU, nn.Softplus, nn.Flatten,
)  # fmt: skip
"""Classes of PyTorch whose modules hold settings only, so that code may make one and call it."""

SPECIAL_METHODS = frozenset(
    "__call__ _call_impl _wrapped_call_impl __getattr__ __getattribute__ __setattr__ __iter__ "
    "__len__ __getitem__ __contains__ __bool__ __eq__ __hash__".split()
)
"""Methods that Python runs without their name standing in the code."""


@functools.cache
def functions() -> frozenset[Any]:
    """PyTorch's functions that are recorded in a graph when called with a proxy."""
    found = get_overridable_functions()
    spaces = (torch, F, torch.special, torch.fft, torch.linalg)
    names = {*operations(), *(name for name in vars(torch) if name.endswith("_like"))}
    listed = [f for namespace in spaces for f in found.get(namespace, ())]
    listed += [vars(torch)[name] for name in names & vars(torch).keys()]
    return frozenset(f for f in listed if callable(f) and f.__name__ not in NOT_OPERATIONS)


@functools.cache
def operations() -> frozenset[str]:
    """Names of methods and attributes of tensors that are recorded in a graph."""
    found = get_overridable_functions()
    names = {f.__name__ for space in (torch, F, Tensor) for f in found.get(space, ())}
    names |= {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag"}
    names |= {"values", "indices", "is_floating_point", "is_complex"}
    return frozenset(names - NOT_OPERATIONS)
