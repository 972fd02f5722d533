"""The wide layer, and the views that stand at the siblings' old names.

Fusing changes no module of the user's: each sibling stays the same object under the same name
with the same hooks and attributes, and only its class becomes a subclass that reads its slice of
the wide layer. The wide layer is a child of every one of its views, so that

- no container of the user's has a child more than before,
- `parameters()` of any module that holds a sibling yields the weights that the sibling trains,
- replacing, deleting or copying one sibling leaves the others whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from conjoin.layers import lockstep
from conjoin.layers.kind import TENSORS, Kind

WIDE = "wide"
"""The name of the wide layer among its view's children."""


class Wide(nn.Module):
    """Sibling layers as one.

    Attributes:
        kind: the kind of the siblings.
        settings: the settings that they have in common, by name.
        shapes: the shapes of their weights.
        widths: the numbers of their output channels.
        contiguous: which parts are handed out contiguous, since what reads them depends on it.
        weight: the siblings' weights as contiguous blocks, one after another.
        bias: the siblings' biases likewise, or None.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, kind: Kind, layers: Sequence[nn.Module], contiguous: frozenset[int]) -> None:
        """Merges `layers`, which must have been checked to go together."""
        super().__init__()
        self.kind = kind
        self.settings = kind.key(layers[0])
        self.shapes = kind.shapes(layers)
        self.widths = [shape[kind.weight_dim] for shape in self.shapes]
        self.contiguous = contiguous
        self.wasted = 0
        self._collected: dict[str, dict[int, Tensor]] = {}
        self.register_parameter("weight", self._merge("weight", layers))
        self.register_parameter("bias", self._merge("bias", layers))

    def _merge(self, name: str, layers: Sequence[nn.Module]) -> nn.Parameter | None:
        parameters = [layer._parameters.get(name) for layer in layers]
        held = [parameter for parameter in parameters if parameter is not None]
        if not held:
            return None
        merged = _like(self.kind.merge(name, [parameter.detach() for parameter in held]), held[0])
        if any(parameter.grad is not None for parameter in held):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
            merged.grad = self.kind.merge(name, grads)
        return merged

    def forward(self, input: Tensor) -> Tensor:
        """All parts of the output, side by side."""
        return self.kind.run(self, input)

    def part(self, name: str, tensor: Tensor, index: int) -> Tensor:
        """The `index`-th sibling's part of the wide `weight` or `bias`, or gradient: a view."""
        return self.kind.part(self, name, tensor, index)

    def split(self, output: Tensor) -> tuple[Tensor, ...]:
        """The parts of the output, each as the sibling's own output would be."""
        parts = self.kind.split(self, output)
        if not self.contiguous:
            return parts
        return tuple(p.contiguous() if i in self.contiguous else p for i, p in enumerate(parts))

    def collect(self, index: int, tensors: dict[str, nn.Parameter]) -> None:
        """Keeps tensors for the `index`-th part of a wide layer on the meta device.

        Once there is one for every part, they are merged and the wide layer is real.
        """
        for name, tensor in tensors.items():
            blocks = self._collected.setdefault(name, {})
            blocks[index] = tensor.detach()
            if len(blocks) == len(self.widths):
                merged = self.kind.merge(name, [blocks[i] for i in range(len(blocks))])
                setattr(self, name, _like(merged, getattr(self, name)))
                del self._collected[name]

    def extra_repr(self) -> str:
        """The kind and the widths."""
        return f"{self.kind.name}, {'+'.join(map(str, self.widths))}"

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the views emit the slices under the siblings' names."""

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the views write through."""


class View(nn.Module):
    """A sibling after fusing; always together with the sibling's own class, see `view_class`."""

    conjoin_base: type[nn.Module]
    conjoin_index: int

    @property
    def wide_layer(self) -> Wide:
        """The wide layer that holds this sibling's weight."""
        return cast(Wide, self._modules[WIDE])

    @property
    def weight(self) -> Tensor | None:
        """This sibling's slice of the wide weight."""
        return self._slice("weight")

    @property
    def bias(self) -> Tensor | None:
        """This sibling's slice of the wide bias, or None."""
        return self._slice("bias")

    def _slice(self, name: str) -> Tensor | None:
        wide = self.wide_layer
        tensor: Tensor | None = getattr(wide, name)
        return None if tensor is None else wide.part(name, tensor, self.conjoin_index)

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the sibling's own forward gives.

        Siblings that are called with the same tensor share one call of the wide layer.
        """
        if args or kwargs:
            return cast(Tensor, self.conjoin_base.forward(self, input, *args, **kwargs))
        shared = lockstep.take(self.wide_layer, self.conjoin_index, input)
        return cast(Tensor, self.conjoin_base.forward(self, input)) if shared is None else shared

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigning a weight or bias makes this sibling a plain layer again, then assigns."""
        if name not in TENSORS:
            super().__setattr__(name, value)
        elif self._parameters.get(name) is not None:  # Only while a checkpoint is being loaded.
            self._parameters[name] = value
        else:
            setattr(release(self), name, value)

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freezes or thaws this sibling alone, which makes it a plain layer again."""
        return release(self).requires_grad_(requires_grad)

    def __repr__(self) -> str:
        wide = self.wide_layer
        part = f"part {self.conjoin_index} of {len(wide.widths)}"
        return f"{self.conjoin_base.__name__}({self.extra_repr()}, {part})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_view, (self.conjoin_base,), self.__dict__.copy()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in TENSORS:
            tensor = self._slice(name)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """PyTorch's own loading, on Parameters that are slices of the wide layer's."""
        wide = self.wide_layer
        slices = {
            name: _like(tensor.detach(), getattr(wide, name))
            for name in TENSORS
            if (tensor := self._slice(name)) is not None
        }
        self._parameters.update(slices)
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            loaded = {name: self._parameters.pop(name) for name in slices}
        replaced = {n: t for n, t in loaded.items() if t is not None and not _within(t, wide, n)}
        if replaced:
            _adopt(self, replaced)


_view_classes: dict[type, type[View]] = {}


def view_class(base: type[nn.Module]) -> type[View]:
    """The class of views of `base` layers: a subclass of `base` that goes by its name."""
    if base not in _view_classes:
        names = {
            "conjoin_base": base,
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        _view_classes[base] = cast("type[View]", type(base.__name__, (View, base), names))
    return _view_classes[base]


def _new_view(base: type[nn.Module]) -> View:
    cls = view_class(base)
    return cls.__new__(cls)


def fuse(kind: Kind, layers: Sequence[nn.Module], contiguous: frozenset[int] = frozenset()) -> Wide:
    """Merges layers that were checked to go together; their old storage is given up at once.

    Args:
        kind: the kind that the layers are of.
        layers: two or more; each becomes a view in place.
        contiguous: the positions of the layers whose output is handed out contiguous.

    Returns:
        The wide layer.
    """
    wide = Wide(kind, layers, contiguous).train(layers[0].training)
    for index, layer in enumerate(layers):
        for name, _ in wide.named_parameters(recurse=False):
            del layer._parameters[name]
        layer.__class__ = view_class(type(layer))
        layer._modules[WIDE] = wide
        layer.__dict__["conjoin_index"] = index
    return wide


def release(view: View) -> nn.Module:
    """Makes one view a plain layer again, with its own copy of its slice; the others stay.

    Returns:
        The same object, now of its own class.
    """
    wide = view.wide_layer
    restored: dict[str, nn.Parameter | None] = {}
    for name, source in wide.named_parameters(recurse=False):
        restored[name] = own = _like(
            wide.part(name, source, view.conjoin_index).detach().clone(), source
        )
        if source.grad is not None:
            own.grad = wide.part(name, source.grad, view.conjoin_index).clone()
    del view._modules[WIDE], view.__dict__["conjoin_index"]
    layer: nn.Module = view
    layer.__class__ = view.conjoin_base
    layer.__dict__["_parameters"] = {**restored, **layer._parameters}
    return layer


def _like(tensor: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    """`tensor` as a Parameter that trains, and carries the attributes, as `parameter` does."""
    made = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def _within(tensor: Tensor, wide: Wide, name: str) -> bool:
    whole: Tensor = getattr(wide, name)
    return bool(tensor.untyped_storage()._cdata == whole.untyped_storage()._cdata)


def _adopt(view: View, replaced: dict[str, nn.Parameter]) -> None:
    """Takes over tensors that `load_state_dict(assign=True)` put in place of the slices.

    They are copied into the wide layer where they fit it. Where the wide layer is on the meta
    device they are collected until all parts are there. A tensor of another dtype or device is
    for this sibling alone, which becomes a plain layer.
    """
    wide = view.wide_layer
    if all(_fits(tensor, getattr(wide, name)) for name, tensor in replaced.items()):
        with torch.no_grad():
            for name, tensor in replaced.items():
                wide.part(name, getattr(wide, name), view.conjoin_index).copy_(tensor)
    elif wide.weight.is_meta:
        wide.collect(view.conjoin_index, replaced)
    else:
        layer = release(view)
        for name, tensor in replaced.items():
            setattr(layer, name, tensor)


def _fits(tensor: Tensor, whole: Tensor) -> bool:
    return tensor.dtype == whole.dtype and tensor.device == whole.device


def views(model: nn.Module) -> Iterator[tuple[str, View]]:
    """The views in `model` with their names; one that stands at several names comes once."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, View))


def wides(model: nn.Module) -> dict[Wide, list[tuple[str, View]]]:
    """The wide layers in `model`, each with its views by name, in the order of the parts."""
    found: dict[Wide, list[tuple[str, View]]] = {}
    for name, view in views(model):
        found.setdefault(view.wide_layer, []).append((name, view))
    return {
        wide: sorted(members, key=lambda m: m[1].conjoin_index) for wide, members in found.items()
    }
