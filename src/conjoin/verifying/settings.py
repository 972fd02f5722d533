"""The settings in which models are compared: modes, and which gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Setting:
    """How the models are run.

    Attributes:
        where: what it is called.
        training: the mode; None leaves every module in the mode that it is in.
        differentiable: whether the floating inputs require a gradient, whatever they were given as.
        gradients: whether there is a backward pass; if not, they run without gradients.
    """

    where: str
    training: bool | None
    differentiable: bool = False
    gradients: bool = True


SETTINGS = (
    Setting("training mode", training=True),
    Setting("training mode with inputs that require gradients", True, differentiable=True),
    Setting("evaluation mode with inputs that require gradients", False, differentiable=True),
    Setting("evaluation mode without gradients", False, gradients=False),
)
"""Training as it is done, evaluation as it is done, and both with the gradients of the inputs."""

EXPORTED = Setting("the mode that it was exported in", None)

MIXED = Setting("the mode that each module is in", None)


def settings_for(model: nn.Module) -> tuple[Setting, ...]:
    """Those in which a model is run: also as it is, where its modules are in different modes."""
    mixed = len({module.training for module in model.modules()}) > 1
    return (*SETTINGS, MIXED) if mixed else SETTINGS
