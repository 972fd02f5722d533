"""`Reason` and `Refusal`: why siblings may not be merged.

There is no second way to say no. A reason reads as advice: one sentence says what is in the way,
the next what the user can do about it. A refusal adds the layers and the values.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Reason(enum.Enum):
    """What keeps siblings apart, and the remedy.

    Example:
        >>> import conjoin
        >>> conjoin.Reason.HOOKS.value.split(". ")[0]
        'A hook is registered on the layer or on its parameters, and would see other tensors'
    """

    DIFFERENT_SETTINGS = (
        "The layers differ in a setting that one wide layer can hold only once. "
        "Give them equal settings where the model allows it."
    )
    DIFFERENT_DTYPE = (
        "The layers' parameters have different dtypes. "
        "Convert them to one dtype before optimizing, with layer.to(dtype)."
    )
    DIFFERENT_DEVICE = (
        "The layers' parameters lie on different devices. "
        "Move them to one device before optimizing, with layer.to(device)."
    )
    DIFFERENT_REQUIRES_GRAD = (
        "Some of the parameters train and others are frozen, and one wide parameter does either. "
        "Freeze or unfreeze all of them before optimizing, with layer.requires_grad_(flag)."
    )
    BIAS_ON_SOME = (
        "Some of these few layers have a bias and others have none, and laying out the bias with "
        "zeros at each call costs the launch that merging saves. "
        "Give every one of them a bias, or none of them."
    )
    SHARED_PARAMETER = (
        "A parameter of these layers is tied, or shares its memory, with one held elsewhere. "
        "Untie it with a copy of its own if the sharing is not wanted; otherwise leave it as it is."
    )
    CALLED_APART = (
        "The layer's calls do not go together with its siblings' calls. "
        "Call the layers on the same tensor, equally often, or leave them as they are."
    )
    OWN_FORWARD = (
        "The layer has a forward of its own, from a subclass or a patched instance. "
        "Pass a conjoin.Kind for its class, or use the plain torch.nn class and do the extra work "
        "in a module before or after it."
    )
    HOOKS = (
        "A hook is registered on the layer or on its parameters, and would see other tensors. "
        "Remove it before optimizing, or register it on the module that holds the layers."
    )
    PARAMETRIZED = (
        "The layer's parameters are computed by a parametrization, weight_norm, spectral_norm or "
        "pruning. "
        "Make the result permanent before optimizing, with remove_parametrizations or its like."
    )
    CUSTOM_PARAMETER = (
        "A parameter is of a tensor class of its own, such as a quantized or distributed tensor. "
        "Optimize the model before quantizing or distributing it."
    )
    UNINITIALIZED = (
        "The layer is lazy and its parameters have no shape yet. "
        "Run the model once on an example input before optimizing."
    )
    INPUT_MUTATED = (
        "The input is changed in place between the layers, so they do not read the same values. "
        "Use the out-of-place operation, such as ReLU(inplace=False), if they should."
    )
    PARAMETERS_CHANGED = (
        "A parameter of the layer is changed while the model runs, which the backward pass would "
        "take for a change of its siblings' parameters too. "
        "Change it outside of forward if it can be done there."
    )
    PARAMETERS_LISTED = (
        "The model goes through its parameters or modules while it runs, and would find the wide "
        "layer there. "
        "Name those that it needs instead, such as self.layer.weight."
    )
    PARAMETERS_READ = (
        "The forward reads a parameter of this product in some other way too, such as its norm. "
        "Leave it as it is, or let a layer such as torch.nn.Linear hold the parameter."
    )
    GROUPED = (
        "The layers are grouped convolutions (groups > 1), for which a wide layer repeats the "
        "input; that saves nothing where it is large or the outputs must be contiguous, and "
        "transposed ones cannot be merged. "
        "Leave them as they are; the layers around them are not affected."
    )
    IN_PROGRAM = (
        "In this exported program the layers cannot run as one: something that may change what "
        "they read stands between them, a wide layer would be right for some of the sizes only "
        "that the program is for, or it would need a tensor that the program does not hold. "
        "Optimize the model before exporting it."
    )
    UNSUPPORTED_OPTION = (
        "The layer uses an option that conjoin cannot reproduce in a wide layer. "
        "Switch the option off if the model does not need it."
    )
    DOES_NOT_PAY = (
        "The layers take less time by themselves than as one wide layer, at the shapes of the "
        "example inputs. "
        "Leave them as they are, or pass policy='always' to merge them all the same."
    )
    EXCEEDS_MEMORY = (
        "One wide layer's output and gradients live longer than the layers' own, and a call would "
        "need more memory than memory_budget allows. "
        "Raise memory_budget, make the batch smaller, or leave the layers as they are."
    )


@dataclass(frozen=True, slots=True)
class Refusal:
    """A group that is left as it is.

    Attributes:
        layers: The qualified names of the layers, in the model's order.
        reason: What is in the way, and the remedy.
        detail: The values that differ or the place where it happens, such as
            ``"stride: (1, 1) and (2, 2)"``; empty where the reason says everything.

    Example:
        >>> import conjoin
        >>> str(conjoin.Refusal(("a", "b"), conjoin.Reason.HOOKS, ""))[:34]
        'a, b: A hook is registered on the '
    """

    layers: tuple[str, ...]
    reason: Reason
    detail: str

    def __str__(self) -> str:
        """The layers, the sentence and the values, on one line."""
        text = f"{', '.join(self.layers)}: {self.reason.value}"
        return f"{text} ({self.detail})" if self.detail else text
