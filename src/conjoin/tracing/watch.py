"""`Watch`: notes the calls of layers in a run, what they read, and who reads strides."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.graph import strides
from conjoin.graph.site import Shapes, Site
from conjoin.layers import Kind, activation, kind_of
from conjoin.layers.lockstep import in_transform
from conjoin.layers.origin import Step, is_watched
from conjoin.layers.owner import raw_parameters
from conjoin.layers.product import SUFFIX
from conjoin.tracing.listings import Listings
from conjoin.tracing.structures import Observed, Structure, structure_of

STRIDE_QUERIES = frozenset(
    {
        Tensor.stride,
        Tensor.is_contiguous,
        Tensor.data_ptr,
        Tensor.storage_offset,
        Tensor.as_strided,
        torch.as_strided,
        Tensor.untyped_storage,
        Tensor.storage,
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.view_as,
        torch.view_as_complex,
        Tensor.as_strided_,
        Tensor.resize_,
        Tensor.resize_as_,
        Tensor.set_,
        *(getattr(Tensor, name) for name in strides.RANDOM_FILLS),
    }
)
"""Functions whose result depends on the strides of the tensor that they are given."""

RESHAPES = frozenset(
    {
        Tensor.reshape,
        torch.reshape,
        Tensor.reshape_as,
        Tensor.flatten,
        torch.flatten,
        Tensor.ravel,
        torch.ravel,
        Tensor.contiguous,
        Tensor.view,
    }
)
"""Functions whose result shares memory with a contiguous tensor, but not always with a slice."""

WAYS_AROUND = frozenset(
    {
        Tensor.data.__get__,  # type: ignore[attr-defined]
        Tensor.data.__set__,  # type: ignore[attr-defined]
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.untyped_storage,
        Tensor.data_ptr,
    }
)
"""Functions that lead to changes of a tensor that its version counter does not see."""

ARRAYS = frozenset({Tensor.numpy, Tensor.__array__, Tensor.__dlpack__})
"""Those whose results others than PyTorch change, whenever they like."""


GRADIENT_QUERIES = frozenset({Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad})
"""Functions that tell of the gradient of a tensor that they are given."""

MOST_STRUCTURES = 4
"""How many structures of calls are noted for each module: each is traced, in both modes."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    """A tensor by what it was made of; by itself where no activation made it."""

    identity: Hashable
    version: Hashable
    modes: Hashable
    activations: tuple[str, ...]


class Watch(TorchFunctionMode):
    """Notes the calls of layers, and what reads the strides of their outputs."""

    def __init__(self, model: nn.Module, kinds: tuple[Kind, ...]) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self.strided: dict[str, str] = {}
        self._run: object = None
        self._inputs: list[Tensor] = []
        self._made: dict[int, _Made] = {}
        self._outputs: dict[int, tuple[str, Tensor, int]] = {}
        self._weights: set[int] = set()
        self._reached: dict[int, Tensor] = {}
        self._exposed: set[int] = set()
        self._unseen = 0
        self._in_layer = False
        self._layers: dict[nn.Module, str] = {}
        self.changed: set[str] = set()
        self.calls: dict[str, dict[Structure, Observed]] = {}
        self.shapes: dict[str, Shapes] = {}
        self._raw = {name + SUFFIX: parameter for name, parameter in raw_parameters(model)}
        owners = {model.get_submodule(name.rpartition(".")[0]) for name in self._raw}
        for name, module in model.named_modules():
            kind = kind_of(module, kinds)
            if kind is None and (module._modules or module in owners):
                noted = functools.partial(
                    self._noted, self.calls.setdefault(name, {}), module.forward
                )
                noted.__wrapped__ = module.forward  # type: ignore[attr-defined]  # For signatures.
                module.__dict__["forward"] = noted
            if kind is not None:
                self._layers[module] = name
                self._weights |= {p.untyped_storage()._cdata for p in module.parameters()}
                module.__dict__["forward"] = functools.partial(
                    self._called, name, kind, module.forward
                )
            elif activation.step_of(module) is not None and "forward" not in vars(module):
                module.__dict__["forward"] = functools.partial(
                    self._activated, name, module, module.forward
                )
        self.listings = Listings(model, self._layers, self._raw)

    @contextlib.contextmanager
    def running(self, run: object) -> Iterator[None]:
        """Notes what happens as part of `run`."""
        self._run, self._inputs, self._outputs, self._made = run, [], {}, {}
        self._reached, self._exposed = {}, set()
        before = self._versions()
        self.listings.on = True
        try:
            yield
        finally:
            self.listings.on = False
            self._inputs, self._outputs, self._made = [], {}, {}
            self._reached, self._exposed = {}, set()
            after = self._versions()
            self.changed |= {name for name in before if before[name] != after[name]}

    def _versions(self) -> dict[str, list[int]]:
        layers = {
            name: [_version(p) for p in layer._parameters.values() if p is not None]
            for layer, name in self._layers.items()
        }
        return layers | {name: [_version(parameter)] for name, parameter in self._raw.items()}

    def discard(self, run: tuple[bool, int]) -> None:
        """Forgets what was noted as part of `run`."""
        self.sites = [site for site in self.sites if site.input[:2] != run]  # type: ignore[index]

    def _noted(
        self,
        seen: dict[Structure, Observed],
        forward: Callable[..., Any],
        /,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Notes the structure of a call, and what its tensors have in common with other calls'.

        Of `MOST_STRUCTURES` at most: a counter among the arguments makes each call another one.
        """
        with torch._C.DisableTorchFunction():
            found = structure_of(args, kwargs)
            if found is not None and (found[0] in seen or len(seen) < MOST_STRUCTURES):
                seen[found[0]] = seen.get(found[0], Observed()).with_call(found[1])
        return forward(*args, **kwargs)

    def _called(
        self, name: str, kind: Kind, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        if in_transform():
            return forward(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            input = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(input, Tensor):
                self._inputs.append(input)  # Alive, so that its id stays its own.
                self.sites.append(self._site(name, input))
        self._in_layer = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self._in_layer = False
        if isinstance(output, Tensor):
            with torch._C.DisableTorchFunction():
                channel = output.dim() + kind.output_dim
                if isinstance(input, Tensor):
                    self.shapes.setdefault(name, _shapes(input, output))
                self._outputs[output.untyped_storage()._cdata] = (name, output, channel)
        return output

    def _site(self, name: str, input: Tensor) -> Site:
        run: Any = self._run
        made = self._made_of(input)
        if self._exposed and _memory(input) in self._exposed:
            self._unseen += 1
        return Site(
            name,
            (*run, made.identity),
            (made.version, self._unseen),
            (made.modes, _modes(input)),
            (*run, id(input)),
            made.activations,
        )

    def _activated(
        self, name: str, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        output = forward(*args, **kwargs)
        if in_transform() or len(args) != 1 or kwargs:
            return output
        with torch._C.DisableTorchFunction():
            step = activation.step_of(module)
            if step is not None and isinstance(args[0], Tensor) and output is not args[0]:
                self._note(name, step, args[0], output)
        return output

    def _note(self, name: str, step: Step, input: Tensor, output: Tensor) -> None:
        """Notes that `output` is what a step, that of the activation `name`, makes of `input`."""
        self._inputs += [input, output]
        made = self._made_of(input)
        self._made[id(output)] = _Made(
            (made.identity, step),
            (made.version, self._unseen),
            (made.modes, _modes(input)),
            (*made.activations, name),
        )

    def claim(self, values: Any) -> None:
        """Notes that somebody may want the gradient of tensors, so that they equal no others."""
        run: Any = self._run
        claimed = {id(leaf) for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)}
        for key in claimed & self._made.keys():
            del self._made[key]
            own = (*run, key)
            self.sites = [
                dataclasses.replace(site, input=own, activations=()) if site.object == own else site
                for site in self.sites
            ]

    def _made_of(self, tensor: Tensor) -> _Made:
        made = self._made.get(id(tensor))
        if made is None or is_watched(tensor):
            return _Made(id(tensor), _version(tensor), None, ())
        return dataclasses.replace(made, version=(made.version, _version(tensor)))

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        before = self._versions_of_reached(args, kwargs)
        result = func(*args, **kwargs)
        if any(_version(t) != was and self._concerns_a_layer(t) for t, was in before):
            self._unseen += 1
        if self._in_layer or in_transform():
            return result
        if func in GRADIENT_QUERIES:
            with torch._C.DisableTorchFunction():
                self.claim((args, kwargs))
        operator = isinstance(func, (OpOverload, OpOverloadPacket))
        for tensor in _read(args, kwargs, every=operator):
            if func in WAYS_AROUND:
                self._reach(tensor, exposed=func in ARRAYS)
            self._look(func, tensor, result)
        return result

    def _reach(self, tensor: Tensor, *, exposed: bool) -> None:
        """Notes that memory may now change without the version counter of `tensor`."""
        self._unseen += self._concerns_a_layer(tensor)
        self._reached[_memory(tensor)] = tensor  # Alive, so that the memory stays its own.
        if exposed:
            self._exposed.add(_memory(tensor))

    def _versions_of_reached(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[tuple[Tensor, int]]:
        """What is given that others, with counters of their own, may look at; and its versions."""
        if not self._reached or in_transform():
            return []
        given = _read((*args, *kwargs.values()), {}, every=True)
        return [(each, _version(each)) for each in given if _memory(each) in self._reached]

    def _concerns_a_layer(self, tensor: Tensor) -> bool:
        memory = _memory(tensor)
        return memory in self._weights or memory in map(_memory, self._inputs)

    def _look(self, func: Any, tensor: Tensor, result: Any) -> None:
        found = self._outputs.get(tensor.untyped_storage()._cdata)
        if found is None or found[0] in self.strided:
            return
        name, output, channel = found
        shared = isinstance(result, Tensor) and _same_memory(result, output)
        fits = tensor is output and shared and _fits(output, channel, result)
        fits &= func is not Tensor.contiguous
        reads = func in STRIDE_QUERIES or _is_strided_operator(func)
        if reads or (func in RESHAPES and shared and not fits and channel > 0):
            self.strided[name] = getattr(func, "__name__", str(func))


def _read(args: tuple[Any, ...], kwargs: dict[str, Any], *, every: bool) -> Iterator[Tensor]:
    """The tensor that a function is called on, or every one that it is given."""
    values = (*args, *kwargs.values())
    for value in values if every else values[:1]:
        held = pytree.tree_leaves(value) if every and not isinstance(value, Tensor) else (value,)
        for each in held:
            if isinstance(each, Tensor) and each.layout is torch.strided:
                yield each


def _is_strided_operator(func: object) -> bool:
    """Whether an operator that is called by itself may read the strides of what it is given."""
    if not isinstance(func, (OpOverload, OpOverloadPacket)):
        return False
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    namespace, name = packet._qualified_op_name.split("::")
    return namespace != "aten" or name in strides.STRIDE_METHODS


def _memory(tensor: Tensor) -> int:
    """What tells the memory of a tensor from other memory while both are alive."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _same_memory(first: Tensor, second: Tensor) -> bool:
    return (
        first.layout is torch.strided
        and first.untyped_storage()._cdata == second.untyped_storage()._cdata
    )


def _fits(tensor: Tensor, channel: int, result: Tensor) -> bool:
    """Whether a slice along `channel` can be viewed in the result's shape, at any batch size.

    A slice of a contiguous tensor along dimension c is two blocks of dimensions that can be
    merged among themselves, those before c and the rest. The new shape must keep them apart.
    """
    before = math.prod(tensor.shape[:channel])
    leading = 1
    for size in result.shape:
        leading *= size
        if leading >= before:
            return leading == before and result.dtype is tensor.dtype
    return False


def _shapes(input: Tensor, output: Tensor) -> Shapes:
    return Shapes(tuple(input.shape), tuple(output.shape), input.dtype, input.requires_grad)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _modes(tensor: Tensor) -> tuple[object, ...]:
    device = tensor.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast and str(torch.get_autocast_dtype(device)),
    )
