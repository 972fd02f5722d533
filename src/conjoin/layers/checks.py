"""The checks that a layer of any kind must pass to be merged, such as that it has no hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from conjoin.legality import Reason

Verdict = tuple[Reason, str]
"""Why not: the reason and a detail that names the values."""

HARMLESS_OVERRIDES = frozenset({"__init__", "reset_parameters", "extra_repr", "_version"})
"""What a subclass may redefine without changing what a call of the layer computes."""

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes of `nn.Module` that hold the hooks that run when the module is called."""

HOOKS = (
    *CALL_HOOKS,
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
"""The attributes of `nn.Module` that hold all hooks of one module."""

PLAIN = (Tensor, FakeTensor)
"""The types of the values of parameters that can be merged."""

TENSORS = ("weight", "bias")
"""The parameters that are merged; all others of a layer stay where they are."""

FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {}
"""The forwards of the classes of layers, as they were when the kinds were defined."""


def tensors(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's `weight` and, where it has one, `bias`."""
    found = {name: layer._parameters.get(name) for name in TENSORS}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook runs when the module is called."""
    return any(getattr(module, hooks) for hooks in CALL_HOOKS)


def check_initialized(layer: nn.Module) -> Verdict | None:
    """Refuses a layer whose parameters have no shape yet."""
    lazy = [n for n, p in layer._parameters.items() if p is not None and is_lazy(p)]
    return (Reason.UNINITIALIZED, f"{', '.join(lazy)} has no shape yet") if lazy else None


def check_plain(layer: nn.Module, base: type[nn.Module]) -> Verdict | None:
    """Refuses a layer that does something else than `base`, or computes its parameters."""
    if parametrize.is_parametrized(layer):
        names = ", ".join(layer.parametrizations)  # type: ignore[arg-type]
        return Reason.PARAMETRIZED, f"{names} is computed by a parametrization"
    for name in TENSORS:
        if layer._parameters.get(name) is None and getattr(layer, name, None) is not None:
            return Reason.PARAMETRIZED, f"{name} is no Parameter of the layer itself"
    if layer._parameters.get("weight") is None:
        return Reason.PARAMETRIZED, "it has no weight of its own"
    if base.forward is not FORWARDS.get(base, base.forward):
        return Reason.OWN_FORWARD, f"{base.__name__}.forward was replaced"
    for name, value in vars(layer).items():
        if callable(value) and hasattr(base, name):
            return Reason.OWN_FORWARD, f"{name} was replaced on the instance"
    if overrides := _overrides(type(layer), base):
        return Reason.OWN_FORWARD, f"{type(layer).__name__} defines {', '.join(overrides)}"
    return None


def _overrides(cls: type, base: type[nn.Module]) -> list[str]:
    """What the classes that stand before `base` in the method resolution order redefine."""
    before = cls.__mro__[: cls.__mro__.index(base)]
    defined = {
        name
        for cls_before in before
        for name, value in vars(cls_before).items()
        if (callable(value) and hasattr(base, name)) or isinstance(value, property)
    }
    return sorted(defined - HARMLESS_OVERRIDES)


def check_unhooked(layer: nn.Module) -> Verdict | None:
    """Refuses a layer with hooks on it or on its parameters."""
    for attribute in HOOKS:
        if getattr(layer, attribute, None):
            return Reason.HOOKS, f"{attribute.strip('_').replace('_', ' ')} on the layer"
    for name, tensor in tensors(layer).items():
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            return Reason.HOOKS, f"a hook on {name}"
    return None


def check_parameters(layer: nn.Module) -> Verdict | None:
    """Refuses parameters that are no plain tensors of floating numbers."""
    for name, tensor in tensors(layer).items():
        # A fake tensor stands for a plain one, in a copy of the model that is run for its shapes.
        if type(tensor) not in (nn.Parameter, FakeTensor) or type(tensor.data) not in PLAIN:
            kind = type(tensor if type(tensor) is not nn.Parameter else tensor.data).__name__
            return Reason.CUSTOM_PARAMETER, f"{name} is a {kind}"
        if tensor.layout is not torch.strided or not (
            tensor.is_floating_point() or tensor.is_complex()
        ):
            return Reason.CUSTOM_PARAMETER, f"{name} is {tensor.layout}, {tensor.dtype}"
    return None
