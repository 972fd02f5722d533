"""Siblings written by hand: `Parallel`, `Split` and `Unite`.

Two layers f and g on one input, and the wide layer h whose weights are theirs side by side:

    Parallel(f, g)(x) = (f(x), g(x)) = Split(h, sizes=[Cf, Cg])(x)      Unite()((a, b)) = cat(a, b)

with x of shape (N, Cin, ...), f(x) of shape (N, Cf, ...), h(x) of shape (N, Cf + Cg, ...).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import nn
from torch.fx import Proxy

from conjoin.concatenation import (
    check_container,
    check_joinable,
    cut,
    is_channel_dim,
    join,
    known_width,
    leaves_its_output_alone,
)
from conjoin.layers.lockstep import in_functorch

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
        if isinstance(index, slice):
            raise TypeError("Parallel sets one branch at a time. Write branches[i] = module.")
        setattr(self, self._items()[index][0], _branch(module))

    def __delitem__(self, index: int | slice) -> None:
        items = self._items()
        del items[index]
        self._replace(_renumbered(items))

    def append(self, module: nn.Module) -> Parallel:
        """Adds a branch at the end and returns this module."""
        return self.insert(len(self), module)

    def extend(self, modules: Iterable[nn.Module]) -> Parallel:
        """Adds branches at the end, in order, and returns this module; all of them, or none."""
        # A list first: `heads.extend(heads)` reads what it writes.
        for module in [_branch(module) for module in modules]:
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
        check_container(where, self, Parallel)
        kind = check_joinable(where, self._items())
        layers = list(self)
        widths = [getattr(layer, kind.width) for layer in layers]
        wide = join(layers, kind)
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
        TypeError: `module` is not a module, or its output is not one tensor; `sizes` is no list, or
            `dim` no whole number.
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
        if sizes is not None and not isinstance(sizes, Sequence):
            raise TypeError(
                f"Split takes a list of sizes, but was given {_what(sizes)}. Write "
                "Split(module, sizes=[3, 5])."
            )
        for count in [parts] if sizes is None else sizes:
            _check_positive(count)
        if sizes is not None and len(sizes) == 0:
            raise ValueError("Split was given sizes=[]. Give the size of at least one part.")
        self.module = module
        self.parts = parts
        self.sizes = None if sizes is None else tuple(sizes)
        self.dim = _checked_dim("Split", dim)
        width = known_width(module, dim)
        if width is not None:
            self._sizes_for(width, f"{type(module).__name__} has {width} output channels")

    def forward(self, input: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        """Returns the output of `module`, cut along `dim`."""
        whole = self.module(input, *args, **kwargs)
        sizes = self._sizes_of(whole)
        if leaves_its_output_alone(self.module) and not in_functorch():
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
        check_container(where, self, Split)
        kind = check_joinable(where, [("module", self.module)])
        if not is_channel_dim(kind, self.dim, ndim):
            raise ValueError(
                f"{where} needs the cut along the output channels, which for "
                f"{type(self.module).__name__} is dim={kind.dim}, but dim={self.dim}. Set "
                f"dim={kind.dim}, or say with to_parallel(ndim=...) how many dimensions the "
                "output has, if that is the same dimension."
            )
        width = getattr(self.module, kind.width)
        sizes = self._sizes_for(width, f"{type(self.module).__name__} has {width} output channels")
        layers = cut(self.module, kind, sizes)
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
        TypeError: The input is not a tuple or list of tensors, or `dim` is no whole number.
        ValueError: The tuple is empty.
        RuntimeError: The tensors differ in a dimension other than `dim`, as in `torch.cat`.

    Example:
        >>> whole = torch.randn(2, 6)
        >>> torch.equal(Unite()(whole.split([2, 4], 1)), whole)
        True
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = _checked_dim("Unite", dim)

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


def _checked_dim(where: str, dim: object) -> int:
    if isinstance(dim, int) and not isinstance(dim, bool):
        return dim
    raise TypeError(f"{where} takes a whole number for dim, such as 1 or -1, not {dim!r}.")


def _check_positive(count: object) -> None:
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"Split takes positive whole numbers for its parts, not {count!r}.")
