"""`Kind`: what a kind of layer must answer so that siblings of it can be merged.

The output of a layer has `width` channels. For siblings i = 1..n that read the same x

    y_i = op(x, W_i, b_i)        becomes        y = op(x, W, b),   y_i = the i-th part of y

where W and b hold the W_i and b_i as contiguous blocks, one after another. That the blocks are
contiguous is what lets `state_dict()` hand out views that safetensors accepts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from conjoin.layers.checks import (
    FORWARDS,
    Verdict,
    check_initialized,
    check_parameters,
    check_plain,
    check_unhooked,
    tensors,
)
from conjoin.legality import Reason

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide


OF_DIRECT = frozenset({"run", "apart", "joined", "biases"})
"""The methods of a kind that its `direct` and its `inlined` stand for."""


class Kind(ABC):
    """One kind of layer; stateless, so that one instance serves all layers of the kind.

    For layers of your own, write one and pass it along. Such a layer is called with one tensor,
    changes nothing, and gives a tensor that depends on that tensor, on Parameters named `weight`
    and, where it has one, `bias`, and on attributes that `settings` names. Give the kind

    - `layer`, `settings`, `weight_dim` and `output_dim`, as below,
    - `run`, which computes from the wide layer what the layer's `forward` computes from one: with
      `self.joined(wide)` for the weight (or `wide.weight`, where `weight_dim` is 0),
      `self.biases(wide)` for the bias, and `wide.settings[name]` for the settings,
    - if some layers cannot be merged, `check`, which may go on to `super().check(layer)`.

    The weight has as many dimensions as the output from `output_dim` on and one more, the output
    channels among them; two where `output_dim` is -1. Define the class at the top level of a
    module where the model is to be pickled. `conjoin.verify` tells whether `run` is right.

    Example:
        >>> import torch, conjoin
        >>> from torch.nn import functional as F
        >>> class Equalized(torch.nn.Linear):
        ...     def __init__(self, in_features, out_features):
        ...         super().__init__(in_features, out_features)
        ...         self.scale = in_features**-0.5
        ...     def forward(self, x):
        ...         return F.linear(x, self.weight * self.scale, self.bias)
        >>> class OfEqualized(conjoin.Kind):
        ...     layer = Equalized
        ...     settings = ("in_features", "scale")
        ...     def run(self, wide, input):
        ...         weight = self.joined(wide) * wide.settings["scale"]
        ...         return F.linear(input, weight, self.biases(wide))
        >>> model = conjoin.nn.Parallel(Equalized(8, 2), Equalized(8, 3))
        >>> x = torch.randn(4, 8)
        >>> fused = conjoin.optimize(model, (x,), kinds=(*conjoin.KINDS, OfEqualized()))
        >>> [tuple(p.shape) for p in fused.parameters()]
        [(5, 8), (5,)]
        >>> bool(conjoin.verify(model, fused, (x,)))
        True
    """

    layer: ClassVar[type[nn.Module]]
    """The class of the layers."""

    settings: ClassVar[tuple[str, ...]]
    """Attributes that the wide layer needs and that siblings must have in common."""

    weight_dim: ClassVar[int] = 0
    """The dimension of the weight that runs over the output channels."""

    output_dim: ClassVar[int] = -1
    """The dimension of the output, counted from the end, that runs over the output channels."""

    bias_on_some: ClassVar[bool] = False
    """Whether `run` takes the bias from `biases`, so that some of the siblings may have none."""

    stacked: ClassVar[bool | None] = None
    """Whether siblings on different inputs read and give a stack (n, ...), or tensors side by side
    along `output_dim`; None where they cannot run at once."""

    gathered: ClassVar[int] = 2
    """How many there must be, so that it pays to join tensors of their own for it; 0 for never."""

    prepares: ClassVar[int] = 0
    """How many launches it takes to compute from what was joined what the wide layer reads."""

    siblings: ClassVar[bool] = True
    """Whether layers that read one tensor are looked for and merged as of this kind."""

    running: ClassVar[tuple[str, ...]] = ()
    """Buffers of a layer that a call updates; the wide layer holds those of all siblings."""

    counters: ClassVar[frozenset[str]] = frozenset()
    """Those of them that are one number."""

    followed: ClassVar[frozenset[str]] = frozenset()
    """Settings that are numbers, which somebody may change between calls, as a schedule does."""

    def __init_subclass__(cls) -> None:
        """Keeps the forward of the layers, to notice when somebody replaces it."""
        layer = vars(cls).get("layer")
        if isinstance(layer, type) and issubclass(layer, nn.Module):
            FORWARDS.setdefault(layer, layer.forward)
        if "run" in vars(cls) and "apart" not in vars(cls):
            cls.stacked = None  # What a base class does with several inputs is something else.
        for name in ("direct", "inlined"):
            if not OF_DIRECT.isdisjoint(vars(cls)) and name not in vars(cls):
                setattr(cls, name, getattr(Kind, name))  # So is what it does directly.

    def __eq__(self, other: object) -> bool:
        """Whether it is of the same class with the same attributes, as a copy is."""
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"  # As it is in signatures, `kinds` among them.

    @property
    def name(self) -> str:
        """The name that reports show."""
        return self.layer.__name__

    def key(self, layer: nn.Module) -> dict[str, object]:
        """What must be equal for layers to be siblings, by the name that a user knows it by."""
        return {name: _hashable(getattr(layer, name)) for name in self.settings}

    def kept(self, layers: Sequence[nn.Module]) -> dict[str, object]:
        """The settings that a wide layer of these has; by default those that are common to them."""
        return self.key(layers[0])

    def outputs(self, wide: Wide) -> list[int]:
        """The numbers of channels of the siblings' outputs."""
        return wide.widths

    def constants(self, wide: Wide) -> tuple[Tensor, ...]:
        """Tensors that a wide layer keeps beside what trains, on the device of its weight."""
        return ()

    def check(self, layer: nn.Module) -> Verdict | None:
        """Why this layer, looked at by itself, cannot be merged; None where it can."""
        return (
            check_initialized(layer)
            or check_plain(layer, self.layer)
            or check_unhooked(layer)
            or check_parameters(layer)
            or self._check_shapes(layer)
            or self._check_settings(layer)
        )

    def check_together(
        self, layers: Sequence[nn.Module], copies: int, shape: Sequence[int] | None
    ) -> Verdict | None:
        """Why merging layers that read the same tensor gains nothing; None where it may.

        Args:
            layers: the siblings.
            copies: how many of their outputs have to be handed out contiguous.
            shape: that of the tensor, where it is known.
        """
        return None

    def pays(self, wide: Wide, input: Tensor | None = None) -> bool:
        """Whether one run takes less time than the siblings' own.

        Where that depends on the input, no rewritten forward runs them at once: each call asks.

        Args:
            wide: the wide layer.
            input: what the siblings read; None for whether it pays whatever that is. Where a
                program is exported for many sizes, they are symbols, and to compare one fixes it.
        """
        return True

    def _check_shapes(self, layer: nn.Module) -> Verdict | None:
        held = tensors(layer)
        weight, bias = held["weight"].shape, held["bias"].shape if "bias" in held else None
        if len(weight) != max(2, 1 - self.output_dim):
            return Reason.UNSUPPORTED_OPTION, f"weight has the shape {tuple(weight)}"
        if bias not in (None, (weight[self.weight_dim],)):
            return Reason.UNSUPPORTED_OPTION, f"bias has the shape {tuple(bias)}"
        return None

    def _check_settings(self, layer: nn.Module) -> Verdict | None:
        if missing := [name for name in self.settings if not hasattr(layer, name)]:
            return Reason.UNSUPPORTED_OPTION, f"it has no {', '.join(missing)}"
        for name, value in self.key(layer).items():
            if isinstance(value, Tensor) or not _is_hashable(value):
                kind = type(value).__name__
                return Reason.UNSUPPORTED_OPTION, f"{name} is a {kind}, not a value to compare"
        return None

    def shapes(self, layers: Sequence[nn.Module]) -> tuple[torch.Size, ...]:
        """The shapes of the siblings' weights."""
        return tuple(tensors(layer)["weight"].shape for layer in layers)

    def merge(self, wide: Wide, name: str, blocks: Sequence[Tensor]) -> Tensor:
        """The wide layer's `weight` or `bias`, or gradient thereof, from the siblings'."""
        if name != "weight" or self.weight_dim == 0:
            return torch.cat(list(blocks))
        if wide.channels_last:
            blocks = [block.movedim(1, -1) for block in blocks]
        # Two dimensions, since training scripts tell weights from biases by that.
        return torch.cat([block.reshape(-1, 1) for block in blocks])

    def part(self, wide: Wide, name: str, tensor: Tensor, index: int) -> Tensor:
        """The `index`-th sibling's part of the wide layer's `weight` or `bias`: a view.

        Args:
            wide: the wide layer.
            name: `"weight"` or `"bias"`.
            tensor: that tensor, or one of the same shape such as its gradient.
            index: which sibling; one that has such a tensor.
        """
        if name == "weight" and self.weight_dim != 0:
            shape = wide.shapes[index]
            return self._as_weight(
                wide, tensor.narrow(0, wide.starts["blocks"][index], shape.numel()), shape
            )
        return tensor.narrow(0, wide.starts[name][index], wide.widths[index])

    def joined(self, wide: Wide) -> Tensor:
        """The weight that computes all parts at once.

        It is the Parameter itself where `weight_dim` is 0; otherwise the blocks are joined at
        each call, which costs one copy of the weight.
        """
        if self.weight_dim == 0:
            return wide.weight
        return torch.cat(self._blocks(wide, wide.weight), dim=self.weight_dim)

    def joins(self, widths: Sequence[int]) -> bool:
        """Whether a wide layer of siblings of these widths copies its weight at each call."""
        return self.weight_dim != 0

    def extra(self, layers: Sequence[nn.Module]) -> int:
        """How many more operations one wide layer of these launches in a step of training."""
        return 0

    def convolves(self, layer: nn.Module) -> bool:
        """Whether a layer is a convolution of all its channels, for an estimate of its time."""
        return False

    def reads_one_by_one(self, widths: Sequence[int], *, training: bool) -> bool:
        """Whether a wide layer of these runs one by one, and what comes out is joined."""
        return False

    def biases(self, wide: Wide) -> Tensor | None:
        """The bias of all parts at once, or None.

        It is the Parameter itself where every part has a bias, or none has; otherwise zeros fill
        the gaps at each call, which costs one copy.
        """
        bias = wide.bias
        if bias is None or all(wide.biased):
            return bias
        held = iter(torch.split(bias, [size for held, size in wide.bias_runs if held]))
        zeros = wide.zeros_beside(bias)
        return torch.cat([next(held) if holds else zeros[:size] for holds, size in wide.bias_runs])

    def _blocks(self, wide: Wide, weight: Tensor) -> list[Tensor]:
        """The siblings' weights, from the tensor (numbers, 1) that holds them as blocks."""
        blocks = torch.split(weight, [shape.numel() for shape in wide.shapes])
        return [
            self._as_weight(wide, block, shape)
            for block, shape in zip(blocks, wide.shapes, strict=True)
        ]

    def _as_weight(self, wide: Wide, block: Tensor, shape: torch.Size) -> Tensor:
        """A block (numbers, 1) as the sibling's weight: a view."""
        if not wide.channels_last:
            return block.view(shape)
        return block.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1)

    def split(self, wide: Wide) -> tuple[Callable[..., Sequence[Tensor]], tuple[Any, ...]]:
        """How the wide layer's output is cut into its parts.

        `unsafe_split_with_sizes` lets the model change a part in place, as it could the sibling's
        own output; that is exact because these layers do not save their output for backward.

        Returns:
            A function of the output and further arguments, and these arguments.
        """
        return torch.unsafe_split_with_sizes, (wide.widths, self.output_dim)

    @abstractmethod
    def run(self, wide: Wide, input: Tensor) -> Tensor:
        """The wide layer's output for `input`: all parts side by side along `output_dim`."""

    def along(
        self, wide: Wide, input: Tensor, dim: int, sizes: Sequence[int] | None = None
    ) -> Tensor:
        """The wide layer's output where each sibling reads its own part of the input.

        Args:
            wide: a wide layer of a kind that keeps the number of channels.
            input: what the siblings read, side by side along `dim`.
            dim: the dimension, counted from the end.
            sizes: the sizes of the parts along it, where they are not the siblings' widths.
        """
        raise NotImplementedError(f"{self.name} does not follow along a dimension")

    def apart(self, wide: Wide, input: Tensor) -> Tensor:
        """The outputs of siblings of one shape, each on its own part of the input.

        Args:
            wide: a wide layer of siblings of one shape.
            input: what the siblings read: stacked where the kind is `stacked`, otherwise side by
                side along `output_dim`. So is the output.
        """
        raise NotImplementedError(f"{self.name} does not run on different inputs")

    def inlined(
        self, wide: Wide, held: str, input: str, name: Callable[[object], str], *, apart: bool
    ) -> str | None:
        """`run` for one wide layer, or `apart`, as an expression that Dynamo guards little of.

        Args:
            wide: the wide layer.
            held: an expression for its `_parameters`.
            input: one for the input.
            name: gives a name for what else the expression refers to.
            apart: whether each sibling reads its own input.

        Returns:
            The expression; None where there is none, and the method is called.
        """
        return None

    def direct(self, wide: Wide, *, apart: bool = False) -> Callable[[Tensor], Tensor] | None:
        """`run` for one wide layer, or `apart`: with what never changes looked up beforehand.

        Quick models spend most of a call in look-ups.

        Returns:
            A function that does not hold the wide layer, which may keep it; None where nothing can
            be looked up, and the method is called.
        """
        return None


def _hashable(value: Any) -> Any:
    """A setting as siblings' are compared: a list, which somebody may have assigned, as a tuple."""
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def memory_format(weight: Tensor) -> str:
    """How a weight lies in memory: `contiguous`, `channels_last` or `strided` in another way."""
    if weight.is_contiguous():
        return "contiguous"
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = formats.get(weight.dim())
    return "channels_last" if last and weight.is_contiguous(memory_format=last) else "strided"


def elements(tensor: Tensor) -> int:
    """How many elements a tensor has; where sizes are symbols, as many as the example has."""
    return hint(tensor.numel())


def hint(size: Any) -> int:
    """A size, or that of the example where it is a symbol; 0 where it depends on values."""
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else size
