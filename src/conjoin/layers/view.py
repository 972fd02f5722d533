"""`View`: what a sibling becomes, under its old name.

Fusing changes no module of the user's: each sibling stays the same object under the same name
with the same hooks and attributes, and only its class becomes a subclass that reads its slice of
the wide layer. The wide layer is a child of every one of its views, so that

- no container of the user's has a child more than before,
- replacing, deleting or copying one sibling leaves the others whole.

`parameters()` of a module that holds all the siblings yields the wide layer's, and of one that
holds only some of them, each one's own part, which acts as the Parameter that it was.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from conjoin.layers import lockstep, slices
from conjoin.layers.checks import TENSORS
from conjoin.layers.conversion import CONVERSION
from conjoin.layers.enclosing import listing
from conjoin.layers.lockstep import in_transform
from conjoin.layers.part import lend, unshared
from conjoin.layers.releasing import Parametrizations, take_out
from conjoin.layers.subclass import made_of, subclass
from conjoin.layers.walking import walk
from conjoin.layers.wide import WIDE, Sibling, Wide, fits, like

DATA_PARALLEL = "torch.nn.parallel.distributed"
"""The module of `DistributedDataParallel`, which must find each parameter at one module only."""


class _Whole:
    """`view.wide`, by which the graph of a GraphModule calls the wide layer for all its siblings.

    It has no `__set__`, so that an attribute of that name in a layer of the user's comes first.
    """

    def __get__(self, view: View | None, owner: type[View]) -> Any:
        if view is None:
            return self
        wide = view.wide_layer
        if torch.compiler.is_compiling() or wide.is_whole():
            return wide
        # PyTorch goes to parameters by their names, as for `functional_call`.
        if not str(sys._getframe(1).f_globals.get("__name__")).startswith("torch.nn."):
            raise RuntimeError(
                f"a graph runs {view!r} and its siblings at once, and one of them was replaced or "
                "taken out. Change layers before conjoin.optimize, or conjoin.unfuse the "
                "GraphModule first."
            )
        return wide


class View(Sibling):
    """A sibling after fusing; always together with the sibling's own class, see `view_class`."""

    wide = _Whole()
    parametrizations = Parametrizations()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the user's: a view is no new class of theirs."""

    @property
    def weight(self) -> Tensor | None:
        """This sibling's slice of the wide weight; it acts as the Parameter that it was."""
        return self._part("weight")

    @property
    def bias(self) -> Tensor | None:
        """This sibling's slice of the wide bias, or None."""
        return self._part("bias")

    def _part(self, name: str) -> Tensor | None:
        if torch.compiler.is_compiling():
            return self.slice_of(name)
        running, slice = slices.read(self, name)
        if running:
            return slice
        wide = self.wide_layer
        whole = getattr(wide, name)
        if whole is None or not wide.holds(name, self.conjoin_index):
            return None
        if type(whole) is not nn.Parameter or in_transform():
            return self.slice_of(name)
        return lend(self, name)

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A layer of the sibling's own class, where somebody makes another one like it."""
        return cls.conjoin_base(*args, **kwargs) if args or kwargs else super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Changing a parameter, a setting or a method makes this sibling a plain layer again."""
        if name in TENSORS and self._parameters.get(name) is not None:
            self._parameters[name] = value  # Slices are there while a checkpoint is loaded.
        elif self._is_own(name, value):
            if name in TENSORS and not (value is None or isinstance(value, nn.Parameter)):
                raise TypeError(
                    f"cannot assign '{torch.typename(value)}' as parameter '{name}' "
                    "(torch.nn.Parameter or None expected)"
                )
            setattr(take_out(self), name, unshared(value))
        else:
            changes = name in vars(self)
            super().__setattr__(name, value)
            if name == "training":  # `train` comes by the wide layer only through its views.
                self.wide_layer.training = value
            elif changes and name in self.wide_layer.kind.followed:
                self.wide_layer.follow()

    def __delattr__(self, name: str) -> None:
        """Deleting a parameter makes this sibling a plain layer again."""
        if name in TENSORS and self.slice_of(name) is not None:
            delattr(take_out(self), name)
        else:
            super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A parameter of the sibling's own, which for its weight or bias makes it a plain layer."""
        if name in TENSORS:
            self = cast(View, take_out(self))
        nn.Module.register_parameter(self, name, param)

    def _is_own(self, name: str, value: Any) -> bool:
        if name.startswith("__") or name == "training":
            return False
        if not name.startswith("_") and name in vars(self):
            held = vars(self)[name]
            same = held is value or (isinstance(held, (int, float, str)) and held == value)
            followed = name in self.wide_layer.kind.followed and type(value) in (int, float)
            return not (same or followed)
        return name in TENSORS or callable(getattr(type(self), name, None))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """This sibling's own; the wide layer's are yielded by a module that holds siblings.

        With duplicates, PyTorch gets these here too, as `torch.export` wants: a slice is no leaf.
        """
        if not (remove_duplicate or _are_apart()):
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        dot = f"{prefix}." if prefix else ""
        # All at once: what is done to the first may make this a plain layer.
        own = [(dot + name, part) for name in TENSORS if (part := self._part(name)) is not None]
        if listing()[1] == DATA_PARALLEL:
            own = []  # It goes through all modules, and meets the wide layer's by itself.
        others = super().named_parameters(prefix, recurse, remove_duplicate)
        own += [(name, p) for name, p in others if not name.startswith(f"{dot}{WIDE}.")]
        yield from cast("list[tuple[str, nn.Parameter]]", own)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wide layer among them; where not all siblings are listed, the view's own part.

        With duplicates, the wide layer is listed below its first view only: `functional_call`
        restores a parameter that it meets at two names to what it put there. `torch.export` knows
        it by that name, also where not all siblings are listed.
        """
        memo = set() if memo is None else memo
        apart = not torch.compiler.is_compiling() if remove_duplicate else _are_apart()
        if apart:
            passed = memo if remove_duplicate else listing()[0]
            apart = not self.wide_layer.is_enclosed(passed)
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not isinstance(module, Wide):
                yield name, module
            elif apart:
                memo.discard(module)  # The next of its views has its own part.
                yield name, Own(self)
            else:
                memo.add(module)
                yield name, module

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The sibling's own children, so that `apply` comes by the wide weight once a sibling."""
        return ((name, child) for name, child in super().named_children() if name != WIDE)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """With its siblings where all are converted; otherwise it becomes a plain layer."""
        if not CONVERSION.concerns_all(self.wide_layer, fn):
            return take_out(self)._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.wide_layer.convert(fn, self.conjoin_index)
        running = self.wide_layer.converted_running(self, self.conjoin_index)
        for name in running:
            del self._buffers[name]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers.update(running)
        return self

    def __repr__(self) -> str:
        wide = self.wide_layer
        part = f"part {self.conjoin_index} of {len(wide.widths)}"
        return f"{self.conjoin_base.__name__}({self.extra_repr()}, {part})"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.wide_layer.meet(self, self.conjoin_index)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _new_view, (self.conjoin_base,), self.__dict__.copy()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for name in TENSORS:
            tensor = self._part(name) if keep_vars else self.slice_of(name)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """PyTorch's own loading, on Parameters that are slices of the wide layer's."""
        slices = self.slices()
        self._parameters.update(slices)
        try:
            super()._load_from_state_dict(*args, **kwargs)
        finally:
            loaded = {name: self._parameters.pop(name) for name in slices}
        self.settle(loaded)

    def slices(self) -> dict[str, nn.Parameter]:
        """Parameters that are slices of the wide layer's, to load into."""
        return {
            name: like(tensor.detach(), getattr(self.wide_layer, name))
            for name in TENSORS
            if (tensor := self.slice_of(name)) is not None
        }

    def settle(self, loaded: Mapping[str, nn.Parameter | None]) -> None:
        """Takes over what loading has put in the place of slices."""
        wide = self.wide_layer
        replaced = {n: t for n, t in loaded.items() if t is not None and not _within(t, wide, n)}
        if replaced:
            _adopt(self, replaced)


def _are_apart() -> bool:
    """Whether parts are what is asked for in a listing with duplicates: not by PyTorch's own code.

    An optimizer of some siblings is not to change the others.
    """
    return not torch.compiler.is_compiling() and not listing()[1].startswith(("torch.", "conjoin."))


class Own(nn.Module):
    """A view's own parameters, where a module is listed that holds not all of its siblings."""

    def __init__(self, view: View) -> None:
        """Holds the parts of `view`."""
        super().__init__()
        self._parameters.update(cast(Any, {name: view._part(name) for name in TENSORS}))


def view_class(base: type[nn.Module]) -> type[View]:
    """The class of views of `base` layers: a subclass of `base` that goes by its name."""
    view = getattr(base, "conjoin_view", View)
    return cast("type[View]", made_of(base, View, lambda: subclass(view, base, _forward(base))))


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    """A forward that gives what the forward of `base` gives.

    Siblings that are called with the same tensor share one call of the wide layer.
    """
    known = base.forward

    @functools.wraps(known)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():  # Nothing is shared there, and whatever is asked is guarded.
            return base.forward(self, *args, **kwargs)
        input = args[0] if args else kwargs.get("input")
        plain = len(args) + len(kwargs) == 1 and base.forward is known
        # It is no view for a bound method that was kept.
        if not plain or not isinstance(self, View):
            return base.forward(self, *args, **kwargs)
        wide = self.wide_layer
        shared = lockstep.take(wide, self.conjoin_index, input) if wide.together else None
        if shared is not None:
            return shared
        if known is wide.kind.layer.forward and slices.may_run():
            return slices.run(self, known, *args, **kwargs)
        return base.forward(self, *args, **kwargs)

    return forward


def _new_view(base: type[nn.Module]) -> View:
    cls = view_class(base)
    return cast(View, cls.__new__(cls))


def _alone(name: str) -> Callable[..., Any]:
    """A method of a module, for one sibling alone: it becomes a plain layer first."""

    def method(self: View, *args: Any, **kwargs: Any) -> Any:
        changes = _changes(self, name, args, kwargs)
        return getattr(take_out(self), name)(*args, **kwargs) if changes else self

    method.__name__ = name
    return method


def _changes(view: View, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a method of a module changes a view's parameters, tried on empty ones."""
    if name == "to_empty" or kwargs.get("memory_format") is not None:
        return True
    held = [p for key in TENSORS if (p := getattr(view.wide_layer, key)) is not None]
    empty = [nn.Parameter(p.new_empty(0), p.requires_grad) for p in held]
    getattr(nn.ParameterList(empty), name)(*args, **kwargs)
    facts = operator.attrgetter("dtype", "device", "requires_grad")
    return [*map(facts, held)] != [*map(facts, empty)]


for _name in (
    *("to", "cpu", "cuda", "to_empty", "type", "half", "float", "double", "bfloat16"),
    "requires_grad_",
):
    setattr(View, _name, _alone(_name))


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
    if all(fits(tensor, getattr(wide, name)) for name, tensor in replaced.items()):
        with torch.no_grad():
            for name, tensor in replaced.items():
                wide.part(name, getattr(wide, name), view.conjoin_index).copy_(tensor)
    elif wide.weight.is_meta:
        wide.collect(view.conjoin_index, replaced)
    else:
        layer = take_out(view)
        for name, tensor in replaced.items():
            setattr(layer, name, tensor)


def views(model: nn.Module) -> Iterator[tuple[str, View]]:
    """The views in `model` with their names; one that stands at several names comes once."""
    return ((name, module) for name, module in walk(model) if isinstance(module, View))


def wides(model: nn.Module) -> dict[Wide, list[tuple[str, View]]]:
    """The wide layers in `model`, each with its views by name, in the order of the parts."""
    found: dict[Wide, list[tuple[str, View]]] = {}
    for name, view in views(model):
        found.setdefault(view.wide_layer, []).append((name, view))
    return {
        wide: sorted(members, key=lambda m: m[1].conjoin_index) for wide, members in found.items()
    }


def are_merged(layers: Sequence[nn.Module]) -> bool:
    """Whether these layers are all the views of one wide layer, in any order."""
    found = [layer for layer in layers if isinstance(layer, View)]
    wides = {view.wide_layer for view in found}
    return len(wides) == 1 and len(found) == len(layers) == len(found[0].wide_layer.widths)


def wide_of(layers: Sequence[nn.Module]) -> Wide | None:
    """The wide layer of which these layers are all the views, in order."""
    first = layers[0]
    if not isinstance(first, View) or len(first.wide_layer.widths) != len(layers):
        return None
    wide = first.wide_layer
    whole = all(
        isinstance(layer, View) and layer.wide_layer is wide and layer.conjoin_index == index
        for index, layer in enumerate(layers)
    )
    return wide if whole else None
