"""The wide layer, and the views that stand at the siblings' old names.

Fusing changes no module of the user's: each sibling stays the same object under the same name
with the same hooks and attributes, and only its class becomes a subclass that reads its slice of
the wide layer. The wide layer is a child of every one of its views, so that

- no container of the user's has a child more than before,
- replacing, deleting or copying one sibling leaves the others whole.

`parameters()` of a module that holds all the siblings yields the wide layer's, and of one that
holds only some of them, each one's own part, which acts as the Parameter that it was.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import operator
import threading
import uuid
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from conjoin.layers import lockstep
from conjoin.layers.kind import TENSORS, Kind, memory_format, tensors
from conjoin.layers.lockstep import in_transform

DATA_PARALLEL = "torch.nn.parallel.distributed"
"""The module of `DistributedDataParallel`, which must find each parameter at one module only."""

WIDE = "wide"
"""The name of the wide layer among its view's children."""

ENCLOSES = "_conjoin_encloses"
"""The attribute of a module in which it is noted which wide layers' siblings it encloses."""


class Wide(nn.Module):
    """Sibling layers as one.

    Attributes:
        kind: the kind of the siblings.
        settings: their settings, by name.
        constants: what the kind keeps beside the parameters.
        shapes: the shapes of their weights.
        widths: the numbers of their output channels.
        channels_last: whether the weights are in that memory format.
        contiguous: which parts are handed out contiguous, since what reads them depends on it.
        together: whether the siblings are called on one tensor, and so can share a run.
        running: the buffers that a call updates, the siblings' one after another, by name.
        hidden: whether the siblings read equal tensors, each an object of its own.
        varies: whether it depends on the input if one run pays.
        paid: whether it did for the example inputs, where it depends on the input.
        weight: the siblings' weights as contiguous blocks, one after another.
        bias: the biases of those that have one likewise, or None.
        biased: which of them have a bias.
        starts: where each part begins, in the weight, in the bias and among blocks of numbers.
        bias_runs: those with and without one in turn, each run of them with its number of channels.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        kind: Kind,
        layers: Sequence[nn.Module],
        contiguous: frozenset[int],
        together: bool = True,
    ) -> None:
        """Merges `layers`, which must have been checked to go together."""
        super().__init__()
        self.kind = kind
        self.settings = kind.kept(layers)
        self.shapes = kind.shapes(layers)
        self.widths = [shape[kind.weight_dim] for shape in self.shapes]
        self.biased = tuple("bias" in tensors(layer) for layer in layers)
        runs = itertools.groupby(zip(self.biased, self.widths, strict=True), lambda each: each[0])
        self.bias_runs = [(held, sum(width for _, width in run)) for held, run in runs]
        self.starts = {
            "weight": _starts(self.widths),
            "bias": _starts([w * has for w, has in zip(self.widths, self.biased, strict=True)]),
            "blocks": _starts([shape.numel() for shape in self.shapes]),
        }
        self.contiguous = contiguous
        self.together = together
        self.channels_last = memory_format(tensors(layers[0])["weight"]) == "channels_last"
        self.hidden = False
        self.varies = not kind.pays(self)
        self.paid = False
        self.wasted = 0
        self.identity = uuid.uuid4().hex
        self._collected: dict[str, dict[int, Tensor]] = {}
        self._forget()
        self.register_parameter("weight", self._merge("weight", layers))
        self.register_parameter("bias", self._merge("bias", layers))
        self._zeros: Tensor | None = self._new_zeros()
        self.constants = kind.constants(self)
        self.running = {
            name: _row([layer._buffers[name] for layer in layers])
            for name in kind.running
            if layers[0]._buffers.get(name) is not None
        }
        self._lent = self._lendable()

    def _forget(self) -> None:
        self._converted: tuple[Any, set[int]] = None, set()
        self._enclosing: weakref.ref[nn.Module] | None = None
        self._parts: weakref.WeakValueDictionary[tuple[int, str], Part]
        self._parts = weakref.WeakValueDictionary()
        self._lent_before: list[dict[str, Tensor]] = []
        self._views: dict[int, weakref.ref[nn.Module]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """All but what concerns this one's own surroundings, or what is going on."""
        passing = ("_enclosing", "_parts", "_converted", "_lent_before", "_views")
        state = {name: value for name, value in vars(self).items() if name not in passing}
        state["_parted"] = {index for index in range(len(self.widths)) if not self._is_lent(index)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parted = state.pop("_parted")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        # Plain pickle gives every tensor memory of its own; the views hold the same objects.
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
        known = self._views.get(index)
        if known is None or known() is None:
            self._views[index] = weakref.ref(view)

    def is_whole(self) -> bool:
        """Whether all siblings are views of it still, as far as is known."""
        found = [reference() for reference in self._views.values()]
        return len(found) == len(self.widths) and None not in found

    def out_of_step(self) -> dict[int, nn.Module]:
        """The siblings by position, where the buffers or the mode of one are its own affair."""
        if not self.running:
            return {}
        # A loop without functions in it: this runs on every call, and for every view.
        compiling = torch.compiler.is_compiling()
        places = {} if compiling else {name: _place(whole) for name, whole in self.running.items()}
        known: dict[int, nn.Module] = {}
        in_step = True
        for index, reference in self._views.items():
            view = reference()
            if view is None:
                continue
            known[index] = view
            in_step &= view.training is self.training
            buffers = view._buffers
            for name, held in self._lent[index].items():
                in_step &= buffers.get(name) is held
                # Where a buffer lies Dynamo does not know; see `borrowed`.
                in_step &= compiling or held.untyped_storage()._cdata == places[name]
        return {} if in_step else known

    def borrowed(self) -> dict[str, Tensor]:
        """The running buffers for one call of all siblings, which `hand_back` ends.

        In a compiled graph they are joined of the siblings' own: Dynamo guards which tensor a
        sibling holds, but not whether somebody has given it other memory by `.data =`.
        """
        if not torch.compiler.is_compiling():
            return self.running
        return {name: _row([held[name] for held in self._lent]) for name in self.running}

    def hand_back(self, running: dict[str, Tensor]) -> None:
        """Gives the siblings what a call has made of the running buffers that it borrowed."""
        if self.training and running is not self.running:
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

    def held_by(self, index: int) -> dict[str, Tensor | None]:
        """The `index`-th sibling's weight, bias and running buffers: views."""
        held: dict[str, Tensor | None] = dict(self._lent[index])
        for name in TENSORS:
            whole: Tensor | None = getattr(self, name)
            held[name] = None if whole is None else self.part(name, whole, index)
        return held

    def is_enclosed(self, modules: set[nn.Module]) -> bool:
        """Whether one of `modules` encloses all siblings."""
        known = self._enclosing and self._enclosing()
        if known in modules:
            return True
        for module in modules:
            if _encloses(module, self):
                self._enclosing = weakref.ref(module)
                return True
        return False

    def _merge(self, name: str, layers: Sequence[nn.Module]) -> nn.Parameter | None:
        parameters = [layer._parameters.get(name) for layer in layers]
        held = [parameter for parameter in parameters if parameter is not None]
        if not held:
            return None
        values = [parameter.detach() for parameter in held]
        merged = _like(self.kind.merge(self, name, values), held[0])
        if any(parameter.grad is not None for parameter in held):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in held]
            merged.grad = self.kind.merge(self, name, grads)
        return merged

    def forward(
        self,
        input: Tensor,
        *,
        apart: bool = False,
        dim: int | None = None,
        sizes: Sequence[int] | None = None,
    ) -> Tensor:
        """All parts of the output, side by side.

        Args:
            input: what all siblings read; or what each reads, one beside the other.
            apart: each sibling reads its own part of the input.
            dim: the same, for a kind whose siblings keep the number of channels along it.
            sizes: the sizes of the parts along it, where they are not the siblings' widths.
        """
        if isinstance(input, fx.Proxy):  # A trace of a rewritten graph does not look into it.
            options = {"apart": apart, "dim": dim, "sizes": sizes}
            given = {name: value for name, value in options.items() if value}
            path = input.tracer.path_of_module(self)
            return input.tracer.create_proxy("call_module", path, (input,), given)
        if apart:
            return self.kind.apart(self, input)
        if dim is not None:
            return self.kind.along(self, input, dim, sizes)
        try:
            return self.kind.run(self, input)
        except (RuntimeError, TypeError, ValueError, IndexError):
            self.kind.run(self.alone(0), input)  # Raises what the first sibling would have.
            raise

    def alone(self, index: int) -> Wide:
        """A wide layer of the `index`-th sibling only, on the same memory."""
        one = copy.copy(self)
        one.shapes, one.widths = self.shapes[index : index + 1], self.widths[index : index + 1]
        one.biased = self.biased[index : index + 1]
        one._parameters = {}
        for name in TENSORS:
            whole: Tensor | None = getattr(self, name)
            held = whole is not None and self.holds(name, index)
            part = self.part(name, whole, index) if whole is not None and held else None
            if name == "weight" and self.kind.weight_dim != 0 and part is not None:
                part = part.reshape(-1, 1)
            # Parameters, since errors may tell the types of what they are about.
            one.__dict__[name] = part if part is None else nn.Parameter(part.detach(), False)
        return one

    def part(self, name: str, tensor: Tensor, index: int) -> Tensor:
        """The `index`-th sibling's part of the wide `weight` or `bias`, or gradient: a view."""
        return self.kind.part(self, name, tensor, index)

    def split(self, output: Tensor) -> tuple[Tensor, ...]:
        """The parts of the output, each as the sibling's own output would be."""
        function, arguments = self.kind.split(self)
        parts = function(output, *arguments)
        return tuple(
            part.clone(memory_format=torch.contiguous_format) if i in self.contiguous else part
            for i, part in enumerate(parts)
        )

    def holds(self, name: str, index: int) -> bool:
        """Whether the `index`-th sibling has a tensor of this name."""
        return self.biased[index] if name == "bias" else getattr(self, name) is not None

    def zeros_beside(self, bias: Tensor) -> Tensor:
        """As many zeros as the longest gap between biases, as a tensor that goes with `bias`."""
        zeros = self._zeros
        if zeros is not None and _fits(zeros, bias):
            return zeros
        return bias.new_zeros(max(size for held, size in self.bias_runs if not held))

    def _new_zeros(self) -> Tensor | None:
        """Zeros that are kept, so that no call has to make them."""
        self._zeros = None
        if self.bias is None or all(self.biased):
            return None
        with torch.inference_mode(False):
            return self.zeros_beside(self.bias.detach())

    def collect(self, index: int, values: dict[str, nn.Parameter]) -> None:
        """Keeps tensors for the `index`-th part of a wide layer on the meta device.

        Once there is one for every part, they are merged and the wide layer is real.
        """
        for name, tensor in values.items():
            blocks = self._collected.setdefault(name, {})
            blocks[index] = tensor.detach()
            if len(blocks) == sum(self.holds(name, i) for i in range(len(self.widths))):
                merged = self.kind.merge(self, name, [blocks[i] for i in sorted(blocks)])
                setattr(self, name, _like(merged, getattr(self, name)))
                self._zeros = self._new_zeros()
                self.constants = self.kind.constants(self)
                del self._collected[name]

    def lend(self, view: View, name: str) -> Part:
        """A view's own part of the `weight` or `bias`: one object as long as somebody has it."""
        key = view.conjoin_index, name
        part = self._parts.get(key)
        if part is None or part.conjoin_view is not view or part.conjoin_whole is not part.whole():
            part = self._parts[key] = Part.of(view, name)
        return part.bound()

    def convert(self, fn: Any, index: int) -> None:
        """Applies `fn` once, though every view is asked to."""
        known, done = self._converted
        if known is not fn or index in done:
            self._apply(fn)
            done = set()
        done.add(index)
        self._converted = (None, set()) if len(done) == len(self.widths) else (fn, done)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._zeros = self._new_zeros()  # Not converted: `to_empty` makes them anything.
        self.constants = self.kind.constants(self)
        for part in list(self._parts.values()):
            part.bound()
        self.running = {name: fn(whole) for name, whole in self.running.items()}
        self._lent_before, self._lent = self._lent, self._lendable()
        return self

    def extra_repr(self) -> str:
        """The kind and the widths."""
        return f"{self.kind.name}, {'+'.join(map(str, self.widths))}"

    def state_dict(self, *args: Any, destination: Any = None, **kwargs: Any) -> Any:
        """Nothing: the views emit the slices under the siblings' names."""
        frame = inspect.currentframe()
        if _is_orphan(frame and frame.f_back, nn.Module.state_dict.__code__.co_name, "self"):
            with self._with_running():
                return super().state_dict(*args, destination=destination, **kwargs)
        return {} if destination is None else destination

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the views write through."""
        frame = inspect.currentframe()
        loading = frame and frame.f_back
        if _is_orphan(loading and loading.f_back, "load", "module"):
            with self._with_running():
                super()._load_from_state_dict(*args, **kwargs)

    @contextlib.contextmanager
    def _with_running(self) -> Iterator[None]:
        """Has the running buffers among its buffers for a while."""
        self._buffers.update(self.running)
        try:
            yield
        finally:
            for name in self.running:
                del self._buffers[name]


def _is_orphan(frame: FrameType | None, function: str, name: str) -> bool:
    """Whether a module that is no view goes through a wide layer as its child.

    The graph of a GraphModule that is made of a rewritten one, as `fx.Transformer` does, has the
    wide layers without the views.

    Args:
        frame: where PyTorch goes through the children of a module.
        function: the function that does so.
        name: the variable that holds the module there.
    """
    if frame is None or frame.f_code.co_name != function:
        return False
    parent = frame.f_locals.get(name)
    of_torch = frame.f_globals.get("__name__") == nn.Module.__module__
    return of_torch and isinstance(parent, nn.Module) and not isinstance(parent, View)


class _Whole:
    """`view.wide`, by which the graph of a GraphModule calls the wide layer for all its siblings.

    It has no `__set__`, so that an attribute of that name in a layer of the user's comes first.
    """

    def __get__(self, view: View | None, owner: type[View]) -> Any:
        if view is None:
            return self
        wide = view.wide_layer
        if not torch.compiler.is_compiling() and not wide.is_whole():
            raise RuntimeError(
                f"a graph runs {view!r} and its siblings at once, and one of them was replaced or "
                "taken out. Change layers before conjoin.optimize, or conjoin.unfuse the "
                "GraphModule first."
            )
        return wide


class View(nn.Module):
    """A sibling after fusing; always together with the sibling's own class, see `view_class`."""

    conjoin_base: type[nn.Module]
    conjoin_index: int
    conjoin_leads: bool
    wide = _Whole()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the user's: a view is no new class of theirs."""

    @property
    def wide_layer(self) -> Wide:
        """The wide layer that holds this sibling's weight."""
        return cast(Wide, self._modules[WIDE])

    @property
    def weight(self) -> Tensor | None:
        """This sibling's slice of the wide weight; it acts as the Parameter that it was."""
        return self._part("weight")

    @property
    def bias(self) -> Tensor | None:
        """This sibling's slice of the wide bias, or None."""
        return self._part("bias")

    def _part(self, name: str) -> Tensor | None:
        wide = self.wide_layer
        whole = getattr(wide, name)
        if whole is None or not wide.holds(name, self.conjoin_index):
            return None
        if type(whole) is not nn.Parameter or torch.compiler.is_compiling() or in_transform():
            return self._slice(name)
        return wide.lend(self, name)

    def _slice(self, name: str) -> Tensor | None:
        wide = self.wide_layer
        tensor: Tensor | None = getattr(wide, name)
        held = tensor is not None and wide.holds(name, self.conjoin_index)
        return wide.part(name, tensor, self.conjoin_index) if tensor is not None and held else None

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
            super().__setattr__(name, value)
            if name == "training":  # `train` comes by the wide layer only through its views.
                self.wide_layer.training = value

    def __delattr__(self, name: str) -> None:
        """Deleting a parameter makes this sibling a plain layer again."""
        if name in TENSORS and self._slice(name) is not None:
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
            return not same
        return name in TENSORS or callable(getattr(type(self), name, None))

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """This sibling's own; the wide layer's are yielded by a module that holds siblings."""
        dot = f"{prefix}." if prefix else ""
        # All at once: what is done to the first may make this a plain layer.
        own = [(dot + name, part) for name in TENSORS if (part := self._part(name)) is not None]
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        if caller is not None and caller.f_globals.get("__name__") == DATA_PARALLEL:
            own = []  # It goes through all modules, and meets the wide layer's by itself.
        others = super().named_parameters(prefix, recurse, remove_duplicate)
        own += [(name, p) for name, p in others if not name.startswith(f"{dot}{WIDE}.")]
        yield from cast("list[tuple[str, nn.Parameter]]", own)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """The wide layer among them; where not all siblings are listed, the view's own part.

        With duplicates, the wide layer is listed below its first view only: `functional_call`
        restores a parameter that it meets at two names to what it put there.
        """
        memo = set() if memo is None else memo
        apart = remove_duplicate and not self.wide_layer.is_enclosed(memo)
        for name, module in super().named_modules(memo, prefix, remove_duplicate):
            if not isinstance(module, Wide):
                yield name, module
            elif apart:
                memo.discard(module)  # The next of its views has its own part.
                yield name, Own(self)
            elif remove_duplicate or self.conjoin_leads:
                yield name, module

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """The sibling's own children, so that `apply` comes by the wide weight once a sibling."""
        return ((name, child) for name, child in super().named_children() if name != WIDE)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """With its siblings where all are converted; otherwise it becomes a plain layer."""
        if not _conversion.concerns_all(self.wide_layer, fn):
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
            tensor = self._part(name) if keep_vars else self._slice(name)
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
            name: _like(tensor.detach(), getattr(self.wide_layer, name))
            for name in TENSORS
            if (tensor := self._slice(name)) is not None
        }

    def settle(self, loaded: Mapping[str, nn.Parameter | None]) -> None:
        """Takes over what loading has put in the place of slices."""
        wide = self.wide_layer
        replaced = {n: t for n, t in loaded.items() if t is not None and not _within(t, wide, n)}
        if replaced:
            _adopt(self, replaced)


class _Conversion(threading.local):
    """The conversion of a module, such as `half()`, that is going on."""

    fn: object = None
    modules: frozenset[int] = frozenset()

    def concerns_all(self, wide: Wide, fn: object) -> bool:
        """Whether `fn` is being applied to a module that encloses all siblings."""
        if self.fn is not fn:
            self.fn = fn
            self.modules = frozenset(map(id, _converted_module().modules()))
        # Going through the modules has shown each wide layer the one that encloses its siblings.
        enclosing = wide._enclosing and wide._enclosing()
        return enclosing is not None and id(enclosing) in self.modules


_conversion = _Conversion()


def _converted_module() -> nn.Module:
    """The module on which the innermost chain of `_apply` began, which the call stack tells."""
    found: nn.Module | None = None
    frame = inspect.currentframe()
    while frame is not None and (found is None or frame.f_code.co_name == "_apply"):
        if frame.f_code.co_name == "_apply":
            found = frame.f_locals["self"]
        frame = frame.f_back
    assert found is not None  # It is called by the `_apply` of a view.
    return found


class Own(nn.Module):
    """A view's own parameters, where a module is listed that holds not all of its siblings."""

    def __init__(self, view: View) -> None:
        """Holds the parts of `view`."""
        super().__init__()
        self._parameters.update(cast(Any, {name: view._part(name) for name in TENSORS}))


_view_classes: dict[type, type[View]] = {}


def view_class(base: type[nn.Module]) -> type[View]:
    """The class of views of `base` layers: a subclass of `base` that goes by its name."""
    if base not in _view_classes:
        names = {
            "conjoin_base": base,
            "forward": _forward(base),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        view = getattr(base, "conjoin_view", View)
        _view_classes[base] = cast("type[View]", type(base.__name__, (view, base), names))
    return _view_classes[base]


def _forward(base: type[nn.Module]) -> Callable[..., Any]:
    """A forward that gives what the forward of `base` gives.

    Siblings that are called with the same tensor share one call of the wide layer.
    """
    known = base.forward

    @functools.wraps(known)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        input = args[0] if args else kwargs.get("input")
        plain = len(args) + len(kwargs) == 1 and base.forward is known
        # It is no view for a bound method that was kept.
        if plain and isinstance(self, View) and self.wide_layer.together:
            shared = lockstep.take(self.wide_layer, self.conjoin_index, input)
            if shared is not None:
                return shared
        return base.forward(self, *args, **kwargs)

    return forward


def _new_view(base: type[nn.Module]) -> View:
    cls = view_class(base)
    return cast(View, cls.__new__(cls))


def fuse(
    kind: Kind,
    layers: Sequence[nn.Module],
    enclosing: nn.Module,
    contiguous: frozenset[int] = frozenset(),
    leader: int = 0,
    *,
    together: bool = True,
) -> Wide:
    """Merges layers that were checked to go together; their old storage is given up at once.

    Args:
        kind: the kind that the layers are of.
        layers: two or more; each becomes a view in place.
        enclosing: the smallest module that holds them all.
        contiguous: the positions of the layers whose output is handed out contiguous.
        leader: the position of the layer that comes first among the model's modules.
        together: whether they are called on one tensor, and so can share a run.

    Returns:
        The wide layer.
    """
    wide = Wide(kind, layers, contiguous, together).train(layers[0].training)
    for index, layer in enumerate(layers):
        for name in tensors(layer):
            del layer._parameters[name]
        layer.__class__ = view_class(type(layer))
        layer._modules[WIDE] = wide
        layer.__dict__["conjoin_index"] = index
        layer.__dict__["conjoin_leads"] = index == leader
        wide.lend_running(layer, index)
    for held in _holders(enclosing):
        held[ENCLOSES] = held.get(ENCLOSES, set()) | {wide.identity}
    wide._enclosing = weakref.ref(enclosing)
    return wide


def _holders(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Where it is noted which wide layers' siblings a module encloses.

    A copy of a GraphModule keeps its `meta` and not its attributes, and one that comes out of a
    pickle the reverse.
    """
    yield vars(module)
    if isinstance(module, fx.GraphModule):
        yield module.meta


def _encloses(module: nn.Module, wide: Wide) -> bool:
    """Whether it is noted that a module encloses the siblings of a wide layer."""
    if not isinstance(module, fx.GraphModule):
        return wide.identity in vars(module).get(ENCLOSES, ())
    holders = list(_holders(module))
    found = set().union(*(held.get(ENCLOSES, ()) for held in holders))
    for held in holders if found else ():
        held[ENCLOSES] = found
    return wide.identity in found


def unmark(module: nn.Module, wide: Wide | None = None) -> None:
    """Forgets that a module encloses the siblings of a wide layer, or of any."""
    for held in _holders(module):
        left = held.get(ENCLOSES, set()) - {wide.identity} if wide is not None else set()
        held[ENCLOSES] = left
        if not left:
            del held[ENCLOSES]


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


class Part(Tensor):
    """A view's `weight` or `bias`: acts as the Parameter that it was, and stays a slice.

    What goes for the values and the gradient goes through to the wide layer. What one wide
    parameter cannot have for one part only, such as a hook or `requires_grad`, makes the sibling
    a plain layer; from then on this is another name for the plain layer's parameter.
    """

    conjoin_view: nn.Module
    conjoin_name: str
    conjoin_whole: nn.Parameter
    conjoin_address: int
    _is_param = True  # What isinstance(..., nn.Parameter) looks at.

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A plain tensor's function; gradients with respect to a part are parts of the whole's."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            with torch._C.DisableTorchFunctionSubclass():
                return _gradients(*args, **kwargs)
        if any(each not in (cls, Tensor, nn.Parameter) for each in types):
            # Another class of tensor has the say, and has never heard of this one.
            plain = functools.partial(Tensor.as_subclass, cls=Tensor)
            args, kwargs = pytree.tree_map_only(cls, plain, (args, kwargs))
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def of(cls, view: View, name: str) -> Part:
        """The part of a view, on the graph of the wide layer's parameter in any mode."""
        with torch.inference_mode(False), torch.enable_grad():
            part = cast(Tensor, view._slice(name)).as_subclass(cls)
        part.conjoin_view, part.conjoin_name = view, name
        part.conjoin_whole = part.whole()
        vars(part).update(vars(part.conjoin_whole))
        part.conjoin_address = part.conjoin_whole.data_ptr()
        return part

    def whole(self) -> nn.Parameter:
        """The Parameter that holds it."""
        layer = self.conjoin_view
        holder = layer.wide_layer if isinstance(layer, View) else layer
        return cast(nn.Parameter, holder._parameters[self.conjoin_name])

    def bound(self) -> Part:
        """Itself, on the memory where the values are now."""
        whole = self.whole()
        if whole.data_ptr() != self.conjoin_address:
            Tensor.data.__set__(self, self.data)  # type: ignore[attr-defined]
            self.conjoin_address = whole.data_ptr()
        return self

    def _of(self, tensor: Tensor) -> Tensor:
        view = self.conjoin_view
        if not isinstance(view, View):
            return tensor
        return view.wide_layer.part(self.conjoin_name, tensor, view.conjoin_index)

    def _alone(self) -> nn.Parameter:
        if isinstance(self.conjoin_view, View):
            take_out(self.conjoin_view)
        return self.whole()

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        """True, as of the Parameter that it was."""
        return True

    @property
    def grad_fn(self) -> None:  # type: ignore[override]
        """None, as of the Parameter that it was."""
        return None

    @property
    def data(self) -> Tensor:
        """The values; writing to them, or assigning others, changes the wide layer."""
        return self._of(self.whole().data)

    @data.setter
    def data(self, values: Tensor) -> None:
        own = self.data
        if (values.shape, values.dtype, values.device) == (own.shape, own.dtype, own.device):
            own.copy_(values)
        else:
            self._alone().data = values
            self.bound()

    @property
    def grad(self) -> Tensor | None:
        """The slice of the wide gradient."""
        gradient = self.whole().grad
        return None if gradient is None else self._of(gradient)

    @grad.setter
    def grad(self, gradient: Tensor | None) -> None:
        whole = self.whole()
        if not isinstance(self.conjoin_view, View):
            whole.grad = gradient
            return
        self.data.grad = gradient  # Raises what PyTorch says of a gradient that does not fit.
        if whole.grad is None:
            whole.grad = torch.zeros_like(whole)
        with torch.no_grad():
            part = self._of(whole.grad)
            part.zero_() if gradient is None else part.copy_(gradient)

    @property
    def requires_grad(self) -> bool:
        """Whether it trains; assigning makes the sibling a plain layer."""
        return self.whole().requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value != self.requires_grad:
            self._alone().requires_grad = value

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Freezes or thaws this parameter alone."""
        self.requires_grad = requires_grad
        return getattr(self.conjoin_view, self.conjoin_name)

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the sibling a plain layer, and gives its parameter other memory."""
        self._alone().set_(*args, **kwargs)
        return self.bound()

    def register_hook(self, hook: Any) -> Any:
        """Makes the sibling a plain layer, and registers the hook on its parameter."""
        return self._alone().register_hook(hook)  # type: ignore[no-untyped-call]

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        """Makes the sibling a plain layer, and registers the hook on its parameter."""
        return self._alone().register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.data.clone(), requires_grad=self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        own = nn.Parameter(self.data.clone(), self.requires_grad)
        return own.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Parameter containing:\n{self.data!r}"


def _gradients(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """`torch.autograd.grad` with respect to `inputs`, some of which are parts."""
    inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    wholes = [each.whole() if isinstance(each, Part) else each for each in inputs]
    distinct = list({id(whole): whole for whole in wholes}.values())
    found = torch.autograd.grad(outputs, distinct, *args, **kwargs)
    gradients = {id(whole): grad for whole, grad in zip(distinct, found, strict=True)}
    pairs = [(each, gradients[id(whole)]) for each, whole in zip(inputs, wholes, strict=True)]
    return tuple(
        each._of(grad) if isinstance(each, Part) and grad is not None else grad
        for each, grad in pairs
    )


def take_out(view: View) -> nn.Module:
    """Releases a view because of something that somebody does to it alone."""
    warnings.warn(
        f"{view!r} is taken out of its wide layer by a change that concerns it alone. Its "
        "parameters are new objects: build the optimizer after this, or change it before "
        "conjoin.optimize.",
        stacklevel=3,
    )
    return release(view)


def unshared(value: Any) -> Any:
    """A value that is to be kept in a module: of a part, the Parameter of a plain layer."""
    return value._alone() if isinstance(value, Part) else value


def _registered(module: nn.Module, name: str, value: Any) -> Any:
    return unshared(value)


nn.modules.module.register_module_parameter_registration_hook(_registered)


def release(view: View) -> nn.Module:
    """Makes one view a plain layer again, with its own copy of its slice; the others stay.

    Returns:
        The same object, now of its own class.
    """
    wide = view.wide_layer
    wide._views.pop(view.conjoin_index, None)
    lent = [part for part in wide._parts.values() if part.conjoin_view is view]
    restored: dict[str, nn.Parameter | None] = {}
    for name, source in wide.named_parameters(recurse=False):
        if not wide.holds(name, view.conjoin_index):
            continue
        restored[name] = own = _like(
            wide.part(name, source, view.conjoin_index).detach().clone(), source
        )
        if source.grad is not None:
            own.grad = wide.part(name, source.grad, view.conjoin_index).clone()
    del view.__dict__["conjoin_index"], view.__dict__["conjoin_leads"]
    # A dictionary of its own: somebody may be going through the view's modules right now.
    view.__dict__["_modules"] = {k: child for k, child in view._modules.items() if k != WIDE}
    layer: nn.Module = view
    layer.__class__ = view.conjoin_base
    layer.__dict__["_parameters"] = {**restored, **layer._parameters}
    for name in wide.running:
        held = layer._buffers.get(name)
        layer._buffers[name] = None if held is None else held.clone()
    for part in lent:
        part.bound()
    return layer


def _place(tensor: Tensor) -> int:
    """The storage that a tensor lies in."""
    return int(tensor.untyped_storage()._cdata)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def _holds(view: nn.Module, buffers: dict[str, Tensor]) -> bool:
    return all(view._buffers.get(name) is held for name, held in buffers.items())


def _row(tensors: Sequence[Tensor | None]) -> Tensor:
    """Tensors of one dimension, or numbers, one after another."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors if tensor is not None])


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
        layer = take_out(view)
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
