"""Activations that note what they computed their output from, for the siblings behind them.

Such an activation stays the same object under the same name; only its class becomes a subclass
whose forward notes the origin of what it gives. An activation with a hook, with a forward of
another's, or in place notes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as nn_module

from conjoin.layers import origin
from conjoin.layers.checks import CALL_HOOKS
from conjoin.layers.lockstep import PLAIN_TENSORS, in_transform, runs_python
from conjoin.layers.origin import Step
from conjoin.layers.subclass import made_of, plain_class, subclass

PURE: dict[type[nn.Module], tuple[Callable[..., Tensor], tuple[str, ...]]] = {
    nn.CELU: (F.celu, ("alpha",)),
    nn.ELU: (F.elu, ("alpha",)),
    nn.GELU: (F.gelu, ("approximate",)),
    nn.Hardsigmoid: (F.hardsigmoid, ()),
    nn.Hardswish: (F.hardswish, ()),
    nn.Hardtanh: (F.hardtanh, ("min_val", "max_val")),
    nn.LeakyReLU: (F.leaky_relu, ("negative_slope",)),
    nn.LogSigmoid: (F.logsigmoid, ()),
    nn.Mish: (F.mish, ()),
    nn.ReLU: (F.relu, ()),
    nn.ReLU6: (F.relu6, ()),
    nn.SELU: (F.selu, ()),
    nn.Sigmoid: (torch.sigmoid, ()),
    nn.SiLU: (F.silu, ()),
    nn.Softplus: (F.softplus, ("beta", "threshold")),
    nn.Softsign: (F.softsign, ()),
    nn.Tanh: (torch.tanh, ()),
}
"""The activations that give the same for the same input: their functions and settings."""

FORWARDS = {cls: cls.forward for cls in PURE}
"""The forwards of these classes, as they were when conjoin was imported."""

GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
"""The hooks of all modules."""


class Noting(nn.Module):
    """An activation that notes; always together with its own class, see `noting_class`."""

    conjoin_base: type[nn.Module]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the user's: this is no new class of theirs."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_noting, (self.conjoin_base,), self.__dict__.copy()


def step_of(module: nn.Module) -> Step | None:
    """The function that an activation computes; None where it need not be one of its input."""
    base = plain_class(module)
    if base not in PURE or base.forward is not FORWARDS[base] or any(GLOBAL_HOOKS):
        return None
    own = vars(module)
    if own.get("inplace") or any(map(own.__getitem__, CALL_HOOKS)):
        return None
    function, names = PURE[base]
    if not names:
        return function, ()
    settings = tuple((name, getattr(module, name)) for name in names)
    return (function, settings) if all(map(_is_constant, settings)) else None


def _is_constant(setting: tuple[str, object]) -> bool:
    return type(setting[1]) in (bool, int, float, str)


def listen(module: nn.Module) -> None:
    """Makes an activation note the origins of its outputs."""
    if type(module) in PURE:
        module.__class__ = noting_class(type(module))


def forget(module: nn.Module) -> None:
    """Makes an activation that notes a plain one again."""
    if isinstance(module, Noting):
        cast(nn.Module, module).__class__ = module.conjoin_base


def noting_class(base: type[nn.Module]) -> type[Noting]:
    """The class of `base` activations that note: a subclass of `base` that goes by its name."""
    made = made_of(base, Noting, lambda: subclass(Noting, base, _forward(base)))
    return cast("type[Noting]", made)


def _new_noting(base: type[nn.Module]) -> Noting:
    cls = noting_class(base)
    return cls.__new__(cls)


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of `base`, which notes what it gives."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = base.forward(self, *args, **kwargs)
        if runs_python() and len(args) == 1 and not kwargs:
            _note(self, args[0], output)
        return output

    return forward


def _note(module: nn.Module, input: Any, output: Any) -> None:
    if type(input) not in PLAIN_TENSORS or type(output) not in PLAIN_TENSORS:
        return
    if output is input or output.dtype is not input.dtype or in_transform():
        return
    if input.is_inference() or output.is_inference():
        return
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return  # A note would keep the hooks alive, and all that they hold.
    step = step_of(module)
    if step is not None:
        origin.note(step, input, output)
