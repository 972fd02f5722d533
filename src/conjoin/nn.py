"""Siblings written by hand: `Parallel`, `Split` and `Unite`.

Two layers f and g on one input, and the wide layer h whose weights are theirs side by side:

    Parallel(f, g)(x) = (f(x), g(x)) = Split(h, sizes=[Cf, Cg])(x)      Unite()((a, b)) = cat(a, b)

with x of shape (N, Cin, ...), f(x) of shape (N, Cf, ...), h(x) of shape (N, Cf + Cg, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.utils import parametrize

__all__ = ["Parallel", "Split", "Unite"]


class Parallel(nn.Module):
    """Runs each module on the same input and returns their outputs as a tuple.

    Reads and edits like `nn.Sequential`: iterable, indexable, sliceable, with `append`, `extend`,
    `insert` and `pop`.

    Args:
        *modules: The branches, or one `OrderedDict` of names and branches.

    Shape:
        - Input: whatever every branch takes; further arguments go to every branch too.
        - Output: a tuple with the output of each branch, in order.

    Raises:
        TypeError: A branch is not a module.

    Example:
        >>> heads = Parallel(nn.Linear(8, 3), nn.Linear(8, 5))
        >>> mean, scale = heads(torch.randn(2, 8))
        >>> mean.shape, scale.shape
        (torch.Size([2, 3]), torch.Size([2, 5]))
    """

    def __init__(self, *modules: nn.Module | OrderedDict[str, nn.Module]) -> None:
        super().__init__()
        if len(modules) == 1 and isinstance(modules[0], OrderedDict):
            self._replace(list(modules[0].items()))
            return
        self._replace([(str(i), _branch(module)) for i, module in enumerate(modules)])

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Returns the output of every branch on the same arguments, in order."""
        return tuple([branch(input, *args, **kwargs) for branch in self])

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([branch for _, branch in self._items()])

    @overload
    def __getitem__(self, index: int) -> nn.Module: ...

    @overload
    def __getitem__(self, index: slice) -> Parallel: ...

    def __getitem__(self, index: int | slice) -> nn.Module | Parallel:
        if isinstance(index, slice):
            return type(self)(OrderedDict(_renumbered(self._items()[index])))
        return self._items()[index][1]

    def __setitem__(self, index: int, module: nn.Module) -> None:
        setattr(self, self._items()[index][0], _branch(module))

    def __delitem__(self, index: int | slice) -> None:
        items = self._items()
        del items[index]
        self._replace(_renumbered(items))

    def append(self, module: nn.Module) -> Parallel:
        """Adds a branch at the end and returns this module."""
        return self.insert(len(self), module)

    def extend(self, modules: Iterable[nn.Module]) -> Parallel:
        """Adds branches at the end, in order, and returns this module."""
        # A list first: `heads.extend(heads)` reads what it writes.
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: nn.Module) -> Parallel:
        """Adds a branch before position `index`, as `list.insert` does, and returns this module."""
        items = self._items()
        items.insert(index, ("0", _branch(module)))
        self._replace(_renumbered(items))
        return self

    def pop(self, index: int = -1) -> nn.Module:
        """Takes the branch at `index` out and returns it."""
        branch = self[index]
        del self[index]
        return branch

    def to_split(self) -> Split:
        """Returns the same function as one wide layer and a split.

        The parameters are copied side by side, to the bit; branches may differ in output width.
        The names of the branches, and so the `state_dict` keys, are not kept.

        Returns:
            A `Split` along the dimension of the output channels, counted from the end.

        Raises:
            ValueError: The branches cannot be one layer; the message names what differs.

        Example:
            >>> heads = Parallel(nn.Linear(8, 3), nn.Linear(8, 5))
            >>> heads.to_split()
            Split(
              sizes=[3, 5], dim=-1
              (module): Linear(in_features=8, out_features=8, bias=True)
            )
        """
        where = "Parallel.to_split()"
        _check_container(where, self, Parallel)
        kind = _check_joinable(where, self._items())
        layers = list(self)
        widths = [getattr(layer, kind.width) for layer in layers]
        wide = _join(layers, kind)
        if len(set(widths)) == 1:
            return Split(wide, len(widths), dim=kind.dim).train(self.training)
        return Split(wide, sizes=widths, dim=kind.dim).train(self.training)

    def _items(self) -> list[tuple[str, nn.Module]]:
        return [(name, branch) for name, branch in self._modules.items() if branch is not None]

    def _replace(self, items: list[tuple[str, nn.Module]]) -> None:
        self._modules.clear()
        for name, branch in items:
            self.add_module(name, _branch(branch))


class Split(nn.Module):
    """Runs one module and cuts its output into a tuple.

    The parts are slices of one tensor, so they are in general not contiguous: use `reshape`
    where you would use `view`. They may be changed in place like the outputs of separate layers
    where the module is a Linear, a convolution, an Embedding or a BatchNorm.

    Args:
        module: The module whose output is cut.
        parts: How many equal parts; or give `sizes`.
        sizes: The size of each part along `dim`; or give `parts`.
        dim: The dimension to cut along.

    Shape:
        - Input: whatever `module` takes; further arguments go to it too.
        - Output: a tuple of tensors, (N, C, ...) into (N, C1, ...), (N, C2, ...) and so on.

    Raises:
        TypeError: `module` is not a module, or its output is not one tensor.
        ValueError: The parts do not fit the size along `dim`. Raised at construction where the
            layer tells its output width (batched input for convolutions, `dim=-1` for Linear and
            Embedding), else when called.

    Example:
        >>> heads = Split(nn.Conv2d(64, 128, 2), parts=2)
        >>> mean, scale = heads(torch.randn(4, 64, 7, 7))
        >>> mean.shape
        torch.Size([4, 64, 6, 6])
    """

    def __init__(
        self,
        module: nn.Module,
        parts: int | None = None,
        *,
        sizes: Sequence[int] | None = None,
        dim: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"Split takes a module first, but was given {_what(module)}.")
        if (parts is None) == (sizes is None):
            raise ValueError(
                f"Split takes either parts or sizes, but was given parts={parts!r} and "
                f"sizes={sizes!r}. Write Split(module, 2) or Split(module, sizes=[3, 5])."
            )
        for count in [parts] if sizes is None else sizes:
            _check_positive(count)
        if sizes is not None and len(sizes) == 0:
            raise ValueError("Split was given sizes=[]. Give the size of at least one part.")
        self.module = module
        self.parts = parts
        self.sizes = None if sizes is None else tuple(sizes)
        self.dim = dim
        width = _known_width(module, dim)
        if width is not None:
            self._sizes_for(width, f"{type(module).__name__} has {width} output channels")

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Returns the output of `module`, cut along `dim`."""
        whole = self.module(input, *args, **kwargs)
        sizes = self._sizes_of(whole)
        if _leaves_its_output_alone(self.module):
            pieces = torch.unsafe_split_with_sizes(whole, sizes, self.dim)
        else:
            pieces = torch.split(whole, sizes, self.dim)
        # By index, because a symbolic trace cannot iterate over its Proxy.
        return tuple([pieces[i] for i in range(len(sizes))])

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[nn.Module]:
        return iter([self.module])

    def __getitem__(self, index: int) -> nn.Module:
        return [self.module][index]

    def extra_repr(self) -> str:
        """Describes the cut, for `repr`."""
        if self.sizes is None:
            return f"parts={self.parts}, dim={self.dim}"
        return f"sizes={list(self.sizes)}, dim={self.dim}"

    def to_parallel(self, *, ndim: int | None = None) -> Parallel:
        """Returns the same function as separate layers.

        Args:
            ndim: How many dimensions the output has. Needed for Linear and Embedding where
                `dim` is not negative, since only then is it known to be the last one.

        Returns:
            A `Parallel` with a layer for each part; parameters are copied, to the bit.

        Raises:
            ValueError: The module is not one layer that can be cut, or `dim` is not the dimension
                of its output channels.

        Example:
            >>> Split(nn.Linear(8, 6), 2, dim=-1).to_parallel()
            Parallel(
              (0): Linear(in_features=8, out_features=3, bias=True)
              (1): Linear(in_features=8, out_features=3, bias=True)
            )
        """
        where = "Split.to_parallel()"
        _check_container(where, self, Split)
        kind = _check_joinable(where, [("module", self.module)])
        if not _is_channel_dim(kind, self.dim, ndim):
            raise ValueError(
                f"{where} needs the cut along the output channels, which for "
                f"{type(self.module).__name__} is dim={kind.dim}, but dim={self.dim}. Set "
                f"dim={kind.dim}, or say with to_parallel(ndim=...) how many dimensions the "
                "output has, if that is the same dimension."
            )
        width = getattr(self.module, kind.width)
        sizes = self._sizes_for(width, f"{type(self.module).__name__} has {width} output channels")
        layers = _cut(self.module, kind, sizes)
        return Parallel(*layers).train(self.training)

    def _sizes_of(self, whole: Any) -> list[int]:
        if isinstance(whole, Proxy):
            # A symbolic trace knows no sizes; the traced split checks that they sum.
            shape_proxy: Any = whole.shape
            return self._unchecked_sizes(shape_proxy[self.dim])
        if not isinstance(whole, torch.Tensor):
            raise TypeError(
                f"Split cuts one tensor, but {type(self.module).__name__} returned "
                f"{_what(whole)}. Wrap a module that returns a tensor."
            )
        shape = tuple(whole.shape)
        if not -len(shape) <= self.dim < len(shape):
            raise ValueError(
                f"Split cuts along dim={self.dim}, but {type(self.module).__name__} returned a "
                f"tensor of shape {shape}. Choose a dim that it has."
            )
        return self._sizes_for(
            shape[self.dim], f"{type(self.module).__name__} returned a tensor of shape {shape}"
        )

    def _sizes_for(self, width: int, given: str) -> list[int]:
        sizes = self._unchecked_sizes(width)
        if sum(sizes) == width:
            return sizes
        if self.sizes is None:
            raise ValueError(
                f"Split cuts dim {self.dim} into {self.parts} equal parts, but {given}, and "
                f"{self.parts} does not divide {width}. Choose parts that divide {width}, or give "
                f"sizes=[...] that sum to {width}."
            )
        raise ValueError(
            f"Split cuts dim {self.dim} into sizes {sizes}, which sum to {sum(sizes)}, but "
            f"{given}. Give sizes that sum to {width}."
        )

    def _unchecked_sizes(self, width: int) -> list[int]:
        if self.sizes is not None:
            return list(self.sizes)
        assert self.parts is not None
        return [width // self.parts] * self.parts


class Unite(nn.Module):
    """Joins a tuple of tensors into one, end to end; undoes `Split`.

    Args:
        dim: The dimension to join along.

    Shape:
        - Input: a tuple or list of tensors (N, C1, ...), (N, C2, ...) and so on.
        - Output: (N, C1 + C2 + ..., ...).

    Raises:
        TypeError: The input is not a tuple or list of tensors.
        ValueError: The tuple is empty.

    Example:
        >>> whole = torch.randn(2, 6)
        >>> torch.equal(Unite()(whole.split([2, 4], 1)), whole)
        True
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the parts joined along `dim`."""
        _check_parts(parts)
        return torch.cat(tuple(parts), self.dim)

    def extra_repr(self) -> str:
        """Describes the joint, for `repr`."""
        return f"dim={self.dim}"


def _check_parts(parts: object) -> None:
    if not isinstance(parts, tuple | list):
        raise TypeError(
            f"Unite joins a tuple or list of tensors, but was given {_what(parts)}. "
            "Put it behind a Parallel or a Split."
        )
    if not parts:
        raise ValueError("Unite was given an empty tuple. Give it at least one tensor.")
    for i, part in enumerate(parts):
        if not isinstance(part, torch.Tensor | Proxy):
            raise TypeError(
                f"Unite joins tensors, but part {i} is {_what(part)}. "
                "Give it a flat tuple of tensors."
            )


def _branch(module: object) -> nn.Module:
    if isinstance(module, nn.Module):
        return module
    raise TypeError(
        f"Parallel takes modules, but was given {_what(module)}. Write Parallel(first, second), "
        "Parallel(*modules) for a list, or Parallel(OrderedDict(name=module)) for names."
    )


def _renumbered(items: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Gives every branch that was numbered, not named, the number of its new place."""
    return [(str(i) if name.isdigit() else name, branch) for i, (name, branch) in enumerate(items)]


def _what(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a value of type {type(value).__name__}"


def _check_positive(count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"Split takes positive whole numbers for its parts, not {count!r}.")


# --- one layer or several: what `to_split` and `to_parallel` need to know about a layer ---


@dataclass(frozen=True)
class _Kind:
    settings: tuple[str, ...]  # must be equal in layers that become one
    width: str  # the attribute with the number of output channels
    weight_dim: int  # where the output channels lie in the weight
    dim: int  # where they lie in the output, counted from the end


_CONV = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
_EMBEDDING = (
    "num_embeddings", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse",
)  # fmt: skip

_KINDS: dict[type[nn.Module], _Kind] = {
    nn.Linear: _Kind(("in_features",), "out_features", 0, -1),
    nn.Conv1d: _Kind(_CONV, "out_channels", 0, -2),
    nn.Conv2d: _Kind(_CONV, "out_channels", 0, -3),
    nn.Conv3d: _Kind(_CONV, "out_channels", 0, -4),
    nn.ConvTranspose1d: _Kind((*_CONV, "output_padding"), "out_channels", 1, -2),
    nn.ConvTranspose2d: _Kind((*_CONV, "output_padding"), "out_channels", 1, -3),
    nn.ConvTranspose3d: _Kind((*_CONV, "output_padding"), "out_channels", 1, -4),
    nn.Embedding: _Kind(_EMBEDDING, "embedding_dim", 1, -1),
}

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
    "_state_dict_hooks", "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip


def _runs_forward_of(module: nn.Module, classes: Iterable[type[nn.Module]]) -> bool:
    if "forward" in vars(module):
        return False
    return any(type(module).forward is kind.forward for kind in classes)


def _leaves_its_output_alone(module: nn.Module) -> bool:
    """Whether the module's backward does not read its output.

    Only then is `unsafe_split` exact: it lets a part be changed in place, unseen by autograd.
    """
    if getattr(module, "_forward_hooks", None):
        return False
    return _runs_forward_of(module, (*_KINDS, *_BATCH_NORMS))


def _known_width(module: nn.Module, dim: int) -> int | None:
    for layer, kind in _KINDS.items():
        if not _runs_forward_of(module, [layer]):
            continue
        is_batched_conv = kind.width == "out_channels" and dim == 1
        return getattr(module, kind.width) if dim == kind.dim or is_batched_conv else None
    return None


def _is_channel_dim(kind: _Kind, dim: int, ndim: int | None) -> bool:
    if dim < 0:
        return dim == kind.dim
    if ndim is not None:
        return dim == ndim + kind.dim
    return kind.width == "out_channels" and dim == 1


def _check_container(where: str, module: nn.Module, base: type[nn.Module]) -> None:
    if not _runs_forward_of(module, [base]):
        raise ValueError(f"{where} cannot convert {type(module).__name__}: its forward is its own.")
    if _has_hooks(module):
        raise ValueError(f"{where} would lose the hooks of this module. Remove them first.")


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in _HOOKS)


def _check_joinable(where: str, layers: list[tuple[str, nn.Module]]) -> _Kind:
    """Returns the kind that all layers are of; raises where they cannot be parts of one layer."""
    if not layers:
        raise ValueError(f"{where} needs at least one branch.")
    for name, layer in layers:
        obstacle = _obstacle(layer)
        if obstacle is not None:
            raise ValueError(f"{where} cannot use {name!r} ({type(layer).__name__}): {obstacle}.")
    first_name, first = layers[0]
    for name, layer in layers[1:]:
        difference = _difference(first, layer)
        if difference is not None:
            raise ValueError(
                f"{where} cannot make one layer of {first_name!r} and {name!r}: {difference}."
            )
    parameters = [id(p) for _, layer in layers for p in layer.parameters()]
    if len(set(parameters)) < len(parameters):
        raise ValueError(f"{where} cannot copy a parameter that several branches share.")
    return _KINDS[type(first)]


def _obstacle(layer: nn.Module) -> str | None:
    """What keeps this layer from being, or being a part of, a wide layer."""
    if parametrize.is_parametrized(layer):
        return "it is parametrized; remove the parametrization first"
    if type(layer) not in _KINDS:
        known = ", ".join(kind.__name__ for kind in _KINDS)
        return f"only layers of exactly these classes can be joined or cut: {known}"
    if "forward" in vars(layer):
        return "its forward was replaced; restore it first"
    if _has_hooks(layer):
        return "it has hooks, which would be lost; remove them first"
    if getattr(layer, "groups", 1) > 1:
        return f"groups={layer.groups}, and only groups=1 can be joined or cut"
    if getattr(layer, "max_norm", None) is not None:
        return f"max_norm={layer.max_norm}, a limit on whole rows, which another width changes"
    if any(name not in ("weight", "bias") for name, _ in layer.named_parameters()):
        return "it has parameters of its own besides weight and bias"
    if layer._buffers or layer._modules:
        return "it has buffers or modules of its own"
    for name, parameter in layer.named_parameters():
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}, not a plain Parameter"
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return f"its {name} has hooks, which would be lost; remove them first"
    return None


def _difference(first: nn.Module, other: nn.Module) -> str | None:
    """What keeps two layers, each fit by itself, from being one."""
    if type(first) is not type(other):
        return f"they are a {type(first).__name__} and a {type(other).__name__}"
    for name in _KINDS[type(first)].settings:
        one, two = getattr(first, name), getattr(other, name)
        if one != two:
            return f"{name} is {one!r} in the first and {two!r} in the second"
    ours, theirs = dict(first.named_parameters()), dict(other.named_parameters())
    if set(ours) != set(theirs):
        return "one has a bias and the other has none"
    for name, parameter in ours.items():
        for what in ("dtype", "device", "requires_grad"):
            one, two = getattr(parameter, what), getattr(theirs[name], what)
            if one != two:
                return f"{what} of {name} is {one} in the first and {two} in the second"
    return None


def _join(layers: list[nn.Module], kind: _Kind) -> nn.Module:
    width = sum(getattr(layer, kind.width) for layer in layers)
    weight = torch.cat(
        [layer.get_parameter("weight").detach() for layer in layers], kind.weight_dim
    )
    if getattr(layers[0], "bias", None) is None:
        return _like(layers[0], kind, width, weight, None)
    bias = torch.cat([layer.get_parameter("bias").detach() for layer in layers])
    return _like(layers[0], kind, width, weight, bias)


def _cut(layer: nn.Module, kind: _Kind, sizes: list[int]) -> list[nn.Module]:
    weights = torch.split(layer.get_parameter("weight").detach(), sizes, kind.weight_dim)
    if getattr(layer, "bias", None) is None:
        return [
            _like(layer, kind, size, weight.clone(), None)
            for size, weight in zip(sizes, weights, strict=True)
        ]
    biases = torch.split(layer.get_parameter("bias").detach(), sizes)
    return [
        _like(layer, kind, size, weight.clone(), bias.clone())
        for size, weight, bias in zip(sizes, weights, biases, strict=True)
    ]


def _like(
    layer: nn.Module, kind: _Kind, width: int, weight: torch.Tensor, bias: torch.Tensor | None
) -> nn.Module:
    """A layer with the settings of `layer`, `width` output channels and these very values."""
    settings = {name: getattr(layer, name) for name in kind.settings}
    settings[kind.width] = width
    if not isinstance(layer, nn.Embedding):
        settings["bias"] = bias is not None
    # On the meta device nothing is drawn from the random stream, which stays the user's.
    new = type(layer)(**settings, device="meta").train(layer.training)
    for name, value in [("weight", weight), ("bias", bias)]:
        if value is not None:
            learns = layer.get_parameter(name).requires_grad
            setattr(new, name, nn.Parameter(value, requires_grad=learns))
    return new
