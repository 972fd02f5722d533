"""The running statistics of merged normalizations, which the wide layer holds and lends.

The buffers of a view are slices of the wide layer's, so that one run updates them all, and each has
its own. Somebody may replace one, or give it other memory; each sibling then runs by itself. So it
does while the momentum of some is another, as between two steps of a schedule.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conjoin.layers.kind import Kind
from conjoin.layers.lockstep import runs_python


class Lender(nn.Module):
    """What lends running buffers to views, and knows these: a wide layer.

    Attributes:
        kind: the kind of the siblings.
        widths: the numbers of their output channels.
        settings: what they have in common, by name.
        unequal: whether some of the settings that a kind follows are not common to them now.
        running: the buffers that a call updates, the siblings' one after another, by name.
        known: the views that hold its parts, by position.
    """

    kind: Kind
    widths: list[int]
    settings: dict[str, object]
    unequal: bool
    running: dict[str, Tensor]

    def part(self, name: str, tensor: Tensor, index: int) -> Tensor:
        """The `index`-th sibling's part of a tensor that has parts for all: a view."""
        raise NotImplementedError

    def take_running(self, layers: Sequence[nn.Module]) -> None:
        """Joins the running buffers of layers, to be lent to them."""
        self.running = {
            name: _row([layer._buffers[name] for layer in layers])
            for name in self.kind.running
            if layers[0]._buffers.get(name) is not None
        }
        self._lent = self._lendable()

    def forget_views(self) -> None:
        """Knows no view any more."""
        self._lent_before: list[dict[str, Tensor]] = []
        self.known: dict[int, weakref.ref[nn.Module]] = {}
        self._noted: tuple[tuple[Any, ...], list[Tensor], list[int]] | None = None

    def convert_running(self, fn: Any) -> None:
        """Applies `fn` to the running buffers, and has others to lend then."""
        self.running = {name: fn(whole) for name, whole in self.running.items()}
        self._lent_before, self._lent = self._lent, self._lendable()
        self._noted = None

    def join_running(self, parted: set[int]) -> None:
        """Has the lent buffers lie in the running ones, but those of the siblings in `parted`."""
        for index, (held, part) in enumerate(zip(self._lent, self._cut(self.running), strict=True)):
            for name, tensor in held.items() if index not in parted else ():
                tensor.data = part[name]

    def _cut(self, running: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
        """For each sibling its part of running buffers: views."""
        cut: list[dict[str, Tensor]] = [{} for _ in self.widths]
        for name, whole in running.items():
            single = name in self.kind.counters
            for index, held in enumerate(cut):
                held[name] = whole[index] if single else self.part("weight", whole, index)
        return cut

    def _lendable(self) -> list[dict[str, Tensor]]:
        """The siblings' parts of the running buffers, to stand among theirs.

        Detached, they are in autograd's books no views: AOTAutograd looks for the memory of a view
        at its base, also where it was given other memory by `.data =`.
        """
        return [
            {name: part.detach() for name, part in held.items()} for held in self._cut(self.running)
        ]

    def lend_running(self, view: nn.Module, index: int) -> None:
        """Makes the buffers of the `index`-th sibling its parts of the running ones."""
        view._buffers.update(self._lent[index])
        self.meet(view, index)

    def meet(self, view: nn.Module, index: int) -> None:
        """Makes a view known, which is asked before the running buffers are used."""
        known = self.known.get(index)
        if known is None or known() is None:
            self.known[index] = weakref.ref(view)
            self._noted = None

    def is_whole(self) -> bool:
        """Whether all siblings are views of it still, as far as is known."""
        found = [reference() for reference in self.known.values()]
        return len(found) == len(self.widths) and None not in found

    def follow(self) -> None:
        """Takes over the settings that its views have now, where these agree."""
        names = sorted(self.kind.followed)
        views = [view for known in self.known.values() if (view := known()) is not None]
        found = {tuple(getattr(view, name) for name in names) for view in views}
        self.unequal = len(found) > 1
        if not self.unequal:
            self.settings = {**self.settings, **dict(zip(names, *found, strict=True))}

    def out_of_step(self) -> dict[int, nn.Module]:
        """The siblings by position, where buffers, mode or settings of one are its own affair."""
        compiling = torch.compiler.is_compiling()
        as_it_was = not self.running or (not compiling and self._is_as_noted())
        if as_it_was and not self.unequal:
            return {}
        exporting = compiling and runs_python()
        places = {} if compiling else {name: _place(whole) for name, whole in self.running.items()}
        known: dict[int, nn.Module] = {}
        in_step = not self.unequal
        for index, reference in self.known.items():
            view = reference()
            if view is None:
                continue
            known[index] = view
            in_step &= view.training is self.training
            buffers = view._buffers
            for name, held in self._lent[index].items():
                if exporting:  # Which has others stand in for the buffers, to be joined anew.
                    in_step &= not self.training and _is_like(buffers.get(name), held)
                else:
                    in_step &= buffers.get(name) is held
                # Where a buffer lies Dynamo does not know; see `borrowed`.
                in_step &= compiling or held.untyped_storage()._cdata == places[name]
        if in_step and not compiling:
            self._note(known)
        return {} if in_step else known

    def _note(self, known: dict[int, nn.Module]) -> None:
        """Notes which buffers the siblings hold, and where these lie, while they are in step."""
        rows = [
            (view._buffers, *each) for i, view in known.items() for each in self._lent[i].items()
        ]
        tensors = [*(held for _, _, held in rows), *self.running.values()]
        if all(type(each) is Tensor and not each.is_meta for each in tensors):
            held = tuple(tuple(row[column] for row in rows) for column in range(3))
            self._noted = held, tensors, [tensor.data_ptr() for tensor in tensors]

    def _is_as_noted(self) -> bool:
        """Whether the siblings are in step as they were; a call of each norm asks this first."""
        if self._noted is None:
            return False
        (buffers, names, held), tensors, places = self._noted
        for reference in self.known.values():
            view = reference()
            if view is not None and view.training is not self.training:
                return False
        same = all(map(operator.is_, map(dict.get, buffers, names), held))
        return same and [*map(Tensor.data_ptr, tensors)] == places

    def borrowed(self) -> dict[str, Tensor]:
        """The running buffers for one call of all siblings, which `hand_back` ends.

        In a compiled graph they are joined of the siblings' own: Dynamo guards which tensor a
        sibling holds, but not whether somebody has given it other memory by `.data =`. So they are
        in an exported one, whose buffers are the siblings'.
        """
        if not torch.compiler.is_compiling():
            return self.running
        held = self._lent
        if runs_python():
            views = [self.known[index]() for index in range(len(self.widths))]
            held = [view._buffers for view in views if view is not None]  # type: ignore[misc]
        names = (n for n in self.running if self.training or n not in self.kind.counters)
        return {name: _row([each[name] for each in held]) for name in names}

    def hand_back(self, running: dict[str, Tensor]) -> None:
        """Gives the siblings what a call has made of the running buffers that it borrowed."""
        # Else these are the running ones. Without any nothing reads the mode, which Dynamo guards.
        if running and self.training and torch.compiler.is_compiling():
            pairs = zip(self._lent, self._cut(running), strict=True)
            moved = [(held[name], part) for held, cut in pairs for name, part in cut.items()]
            if moved:
                own, made = zip(*moved, strict=True)
                torch._foreach_copy_(own, made)

    def _is_lent(self, index: int) -> bool:
        """Whether the buffers of a sibling lie where the running ones are, also after `.data =`."""
        lent = self._lent[index].items()
        return all(_place(part) == _place(self.running[name]) for name, part in lent)

    def converted_running(self, view: nn.Module, index: int) -> dict[str, Tensor]:
        """The buffers for a sibling after a conversion; none where it had replaced one."""
        return self._lent[index] if _holds(view, self._lent_before[index]) else {}


def _is_like(tensor: Tensor | None, other: Tensor) -> bool:
    return tensor is not None and tensor.shape == other.shape and tensor.dtype == other.dtype


def _place(tensor: Tensor) -> int:
    """The storage that a tensor lies in."""
    return int(tensor.untyped_storage()._cdata)


def _holds(view: nn.Module, buffers: dict[str, Tensor]) -> bool:
    return all(view._buffers.get(name) is held for name, held in buffers.items())


def _row(tensors: Sequence[Tensor | None]) -> Tensor:
    """Tensors of one dimension, or numbers, one after another."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors if tensor is not None])
