"""`Wide`: the wide layer, and what it knows of the siblings that are its parts.

It owns the siblings' weights as contiguous blocks, and `running_statistics.py` is how it lends them
running buffers. `view.py` is what becomes of a sibling, `part.py` what stands for its Parameters,
and `fusing.py` and `releasing.py` are the way there and back.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx, nn

from conjoin.layers.checks import TENSORS, tensors
from conjoin.layers.enclosing import encloses
from conjoin.layers.kind import Kind, memory_format
from conjoin.layers.running_statistics import Lender

if TYPE_CHECKING:
    from conjoin.layers.part import Part

WIDE = "wide"
"""The name of the wide layer among its view's children."""

ERRORS = (RuntimeError, TypeError, ValueError, IndexError)
"""What PyTorch raises where an input does not fit a layer."""


class Sibling(nn.Module):
    """What all views have in common, see `view.py`: a part of a wide layer."""

    conjoin_base: type[nn.Module]
    conjoin_index: int
    conjoin_leads: bool

    @property
    def wide_layer(self) -> Wide:
        """The wide layer that holds this sibling's weight."""
        return cast(Wide, self._modules[WIDE])

    def slice_of(self, name: str) -> Tensor | None:
        """A plain view of this sibling's part of the wide `weight` or `bias`, or None."""
        return self.wide_layer.slice_of(name, self.conjoin_index)


class Wide(Lender):
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
        self.unequal = False
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
        self.take_running(layers)

    def _forget(self) -> None:
        self.forget_views()
        self._converted: tuple[Any, set[int]] = None, set()
        self.enclosing: weakref.ref[nn.Module] | None = None
        self.handed_out: weakref.WeakValueDictionary[tuple[int, str], Part]
        self.handed_out = weakref.WeakValueDictionary()
        self.cut: tuple[object, dict[int, dict[str, Tensor | None]]] | None = None
        self._direct: tuple[object, Callable[[Tensor], Tensor] | None] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but what concerns this one's own surroundings, or what is going on."""
        passing = "enclosing handed_out _converted _lent_before known cut _direct _noted".split()
        state = {name: value for name, value in vars(self).items() if name not in passing}
        state["_parted"] = {index for index in range(len(self.widths)) if not self._is_lent(index)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parted = state.pop("_parted")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        # Plain pickle gives every tensor memory of its own; the views hold the same objects.
        self.join_running(parted)

    def held_by(self, index: int) -> dict[str, Tensor | None]:
        """The `index`-th sibling's weight, bias and running buffers: views."""
        return {**self._lent[index], **{name: self.slice_of(name, index) for name in TENSORS}}

    def is_enclosed(self, modules: set[nn.Module]) -> bool:
        """Whether one of `modules` encloses all siblings."""
        known = self.enclosing and self.enclosing()
        if known in modules:
            return True
        for module in modules:
            if encloses(module, self.identity):
                self.enclosing = weakref.ref(module)
                return True
        return False

    def _merge(self, name: str, layers: Sequence[nn.Module]) -> nn.Parameter | None:
        parameters = [layer._parameters.get(name) for layer in layers]
        held = [parameter for parameter in parameters if parameter is not None]
        if not held:
            return None
        values = [parameter.detach() for parameter in held]
        merged = like(self.kind.merge(self, name, values), held[0])
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
        except ERRORS:
            self.kind.run(self.alone(0), input)  # Raises what the first sibling would have.
            raise

    def direct(self, *, apart: bool = False, along: bool = False) -> Callable[..., Tensor]:
        """What `forward` does, for calls that all are of one way; see `Kind.direct`."""
        if along:
            return functools.partial(self.kind.along, self)
        method = self.kind.apart if apart else self.kind.run
        run = self.kind.direct(self, apart=apart) or functools.partial(method, self)
        if apart:
            return run

        def direct(input: Tensor) -> Tensor:
            try:
                return run(input)
            except ERRORS:
                return self.forward(input)  # Raises what the first sibling would have.

        return direct

    def run(self, input: Tensor) -> Tensor:
        """What `forward` gives for an input that all siblings read, looked up once."""
        held = self._parameters
        if not held:  # The replicas of data parallelism hold no Parameters.
            return self.forward(input)
        if self._direct is None or self._direct[0] is not held:
            self._direct = held, self.kind.direct(self)
        direct = self._direct[1]
        return self.kind.run(self, input) if direct is None else direct(input)

    def alone(self, index: int) -> Wide:
        """A wide layer of the `index`-th sibling only, on the same memory."""
        one = copy.copy(self)
        one.shapes, one.widths = self.shapes[index : index + 1], self.widths[index : index + 1]
        one.biased = self.biased[index : index + 1]
        one._parameters = {}
        for name in TENSORS:
            part = self.slice_of(name, index)
            if name == "weight" and self.kind.weight_dim != 0 and part is not None:
                part = part.reshape(-1, 1)
            # Parameters, since errors may tell the types of what they are about.
            one.__dict__[name] = part if part is None else nn.Parameter(part.detach(), False)
        return one

    def part(self, name: str, tensor: Tensor, index: int) -> Tensor:
        """The `index`-th sibling's part of the wide `weight` or `bias`, or gradient: a view."""
        return self.kind.part(self, name, tensor, index)

    def slice_of(self, name: str, index: int) -> Tensor | None:
        """The `index`-th sibling's part of the `weight` or `bias`: a view; None without one."""
        whole: Tensor | None = getattr(self, name)
        held = whole is not None and self.holds(name, index)
        return self.part(name, whole, index) if whole is not None and held else None

    def split(self, output: Tensor) -> tuple[Tensor, ...]:
        """The parts of the output, each as the sibling's own output would be."""
        function, arguments = self.kind.split(self)
        parts = function(output, *arguments)
        if not self.contiguous:
            return tuple(parts)
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
        if zeros is not None and fits(zeros, bias):
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
                setattr(self, name, like(merged, getattr(self, name)))
                self._zeros = self._new_zeros()
                self.constants = self.kind.constants(self)
                del self._collected[name]

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
        self.cut = None  # What is left of it holds the memory that was.
        self._zeros = self._new_zeros()  # Not converted: `to_empty` makes them anything.
        self.constants = self.kind.constants(self)
        for part in list(self.handed_out.values()):
            part.bound()
        self.convert_running(fn)
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
    return of_torch and isinstance(parent, nn.Module) and not isinstance(parent, Sibling)


def _starts(sizes: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(sizes)]


def like(tensor: Tensor, parameter: nn.Parameter) -> nn.Parameter:
    """`tensor` as a Parameter that trains, and carries the attributes, as `parameter` does."""
    made = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
    vars(made).update(vars(parameter))
    return made


def fits(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is of the dtype and on the device of another."""
    return tensor.dtype == whole.dtype and tensor.device == whole.device
