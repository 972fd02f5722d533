"""Siblings by observation: which layers receive the very same tensor object?

The model's example inputs are run once in training and once in evaluation mode, on a copy whose
tensors are fake: no arithmetic, no memory, and no trace on the model, its buffers, modes and
random streams. Where fake tensors do not carry the model (it branches on values, say), a real
copy runs instead.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from types import FunctionType, MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.foreign import quieter
from conjoin.graph import hazards
from conjoin.graph.site import Shapes, Sightings, Site, Untraced
from conjoin.launches import Counted, count_layers
from conjoin.layers import Kind, activation, kind_of
from conjoin.layers.lockstep import in_transform
from conjoin.layers.origin import Step, is_watched
from conjoin.layers.owner import raw_parameters
from conjoin.layers.product import SUFFIX
from conjoin.reachable import functions_of, words
from conjoin.tracing import graph_modules, regions
from conjoin.tracing.listings import Listings
from conjoin.tracing.repeating import RepeatingFakeTensorMode
from conjoin.tracing.structures import Observed, Structure, structure_of
from conjoin.tracing.undisturbed import KeepingTensors, letting_go, start_streams, undisturbed

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call of the model."""

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
        *(getattr(Tensor, name) for name in hazards.RANDOM_FILLS),
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


GRADIENT_QUERIES = frozenset({Tensor.register_hook, Tensor.retain_grad, torch.autograd.grad})
"""Functions that tell of the gradient of a tensor that they are given."""

MOST_STRUCTURES = 4
"""How many structures of calls are noted for each module: each is traced, in both modes."""


class UncopyableError(ValueError):
    """The model cannot be copied, so there is nothing to run."""


SEED = 20
"""Where the random streams start for all that is observed, and for each run that is counted."""


class Copy:
    """A copy of a model to run the example inputs on, with fake tensors where they carry it.

    Attributes:
        model: the copy.
        fake: whether its tensors are fake.
    """

    def __init__(self, model: nn.Module, *, fake: bool) -> None:
        """Copies `model`.

        Raises:
            UncopyableError: it cannot be copied, even for real.
        """
        self.fake = fake
        self._mode = RepeatingFakeTensorMode() if fake else None
        self.model = self._copied(model)
        regions.uninstall(self.model)  # So that every view is called.
        own = (*self.model.parameters(), *self.model.buffers())
        self._own = frozenset(map(id, own))
        graph_modules.separate_all(self.model)

    def _copied(self, model: nn.Module) -> nn.Module:
        if self._mode is None:
            try:
                return copy.deepcopy(model)
            except Exception as error:  # Whatever the model holds may raise anything.
                raise UncopyableError(_line(error)) from error
        # What most models consist of is made anew, which is much faster than converting it.
        memo: dict[int, Any] = {id(t): _fake(t, self._mode) for t in _plain_tensors(model)}
        with FakeCopyMode(self._mode):
            return copy.deepcopy(model, memo)

    def run(self, call: Call) -> Any:
        """Runs the copy on arguments like these, and gives its output."""
        args, kwargs = pytree.tree_map_only(Tensor, self._argument, call)
        with self._entered(), letting_go():
            output = self.model(*args, **kwargs)
            return list(output) if inspect.isgenerator(output) else output

    def count(
        self,
        call: Call,
        layers: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> Counted:
        """The launches of a step on arguments like these, and within `layers`, by `weights`."""
        args, kwargs = pytree.tree_map_only(Tensor, self._argument, call)
        start_streams(SEED)  # A model that leaves out layers at random leaves out the same ones.
        with self._entered(), letting_go():
            return count_layers(self.model, args, kwargs, layers, weights)

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        if self._mode is None:
            with KeepingTensors(self._own):
                yield
            return
        # PyTorch logs the traceback of an operation that does not run, before it raises.
        unlogged = quieter("torch._subclasses.fake_tensor", logging.CRITICAL)
        with self._mode, _NoMemory(), KeepingTensors(self._own), unlogged:
            yield

    def _argument(self, tensor: Tensor) -> Tensor:
        if self._mode is not None:
            return self._mode.from_tensor(tensor, static_shapes=True)
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)


class _NoMemory(TorchFunctionMode):
    """Raises where a fake tensor would be read as if it had memory, which ends the process."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.__dlpack__:
            raise NotImplementedError("a fake tensor has no memory to hand out")
        return func(*args, **(kwargs or {}))


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor, or Parameter, in the place of a plain one."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    fake = FakeTensor(mode, empty, tensor.device)
    if isinstance(tensor, nn.Parameter):
        fake.requires_grad_(tensor.requires_grad)
        fake._is_param = True  # As `Parameter.__new__` does for a tensor of another class.
    return fake


def _plain_tensors(model: nn.Module) -> Iterator[Tensor]:
    for tensor in (*model.parameters(), *model.buffers()):
        plain = type(tensor) in (Tensor, nn.Parameter) and type(tensor.data) is Tensor
        if plain and tensor.layout is torch.strided and tensor.grad is None and tensor.is_leaf:
            yield tensor


def observe(model: nn.Module, calls: Sequence[Call], kinds: tuple[Kind, ...]) -> Sightings:
    """What a run of the model on each of `calls` shows.

    Args:
        model: the model; it stays as it is.
        calls: the arguments of each run.
        kinds: the kinds of layer to look for.

    Returns:
        The sites, the stride-sensitive layers, and the modes in which the model did not run.

    Raises:
        ValueError: the model does not run on the arguments in any mode.
    """
    with undisturbed(model):
        try:
            return _observe(Copy(model, fake=True), calls, kinds)
        except Exception:  # noqa: BLE001 - Whatever fake tensors do not carry, the real run decides.
            return _observe(Copy(model, fake=False), calls, kinds)


def _observe(copied: Copy, calls: Sequence[Call], kinds: tuple[Kind, ...]) -> Sightings:
    start_streams(SEED)  # So that what is found does not depend on what was drawn before.
    watch = _Watch(copied.model, kinds)
    failures: dict[str, Exception] = {}
    ran = False
    for mode in _modes_of(copied.model):
        copied.model.train(mode)
        for number, call in enumerate(calls):
            try:
                with watch.running((mode, number)), watch:
                    watch.claim(copied.run(call))
                ran = True
            except Exception as error:  # The model's own code, which may raise anything.
                if copied.fake:
                    raise
                failures["training" if mode else "evaluation"] = error
                watch.discard((mode, number))
    if not ran:
        failure = next(iter(failures.values()))
        raise ValueError(unfit(failure)) from failure
    untraced = tuple(
        Untraced("", f"does not run in {mode} mode: {_line(error)}")
        for mode, error in failures.items()
    )
    return Sightings(
        tuple(watch.sites),
        watch.strided,
        untraced,
        watch.listings.found,
        frozenset(watch.changed),
        watch.calls,
        shapes=watch.shapes,
    )


def _modes_of(model: nn.Module) -> tuple[bool, ...]:
    """Training and evaluation mode, or only the present one where no code asks for the mode."""
    functions = itertools.chain(_layers_functions(model), functions_of(model))
    asks = any("training" in words(function.__code__) for function in functions)
    return (True, False) if asks else (model.training,)


def _layers_functions(model: nn.Module) -> Iterator[FunctionType]:
    """The functions of the classes of the model's modules, PyTorch's own among them."""
    for cls in {type(module) for module in model.modules()}:
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
            yield from (value for value in vars(base).values() if type(value) is FunctionType)


def unfit(error: Exception) -> str:
    """What to say of example inputs on which the model raises `error`."""
    return (
        f"the model does not run on the example inputs: {type(error).__name__}: {_line(error)}. "
        "Pass a tuple of the arguments that the model is called with, as model(*example_inputs)."
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@dataclasses.dataclass(frozen=True, slots=True)
class _Made:
    """A tensor by what it was made of; by itself where no activation made it."""

    identity: Hashable
    version: Hashable
    modes: Hashable
    activations: tuple[str, ...]


class _Watch(TorchFunctionMode):
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
        before = self._versions()
        self.listings.on = True
        try:
            yield
        finally:
            self.listings.on = False
            self._inputs, self._outputs, self._made = [], {}, {}
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
        """Notes the structure of a call, without those that each call has anew, as a counter.

        Also what is common to its tensors.
        """
        with torch._C.DisableTorchFunction():
            found = structure_of(args, kwargs)
            if found is not None and (found[0] in seen or len(seen) < MOST_STRUCTURES):
                seen[found[0]] = seen.get(found[0], Observed()).and_of(found[1])
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
        """Takes tensors, of which somebody may want the gradient, for no others' equals."""
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
        result = func(*args, **kwargs)
        if self._in_layer or in_transform():
            return result
        if func in GRADIENT_QUERIES:
            with torch._C.DisableTorchFunction():
                self.claim((args, kwargs))
        operator = isinstance(func, (OpOverload, OpOverloadPacket))
        for tensor in _read(args, kwargs, every=operator):
            if func in WAYS_AROUND and self._concerns_a_layer(tensor):
                self._unseen += 1
            self._look(func, tensor, result)
        return result

    def _concerns_a_layer(self, tensor: Tensor) -> bool:
        storage = tensor.untyped_storage()._cdata
        inputs = (input.untyped_storage()._cdata for input in self._inputs)
        return storage in self._weights or storage in inputs

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
    for value in pytree.tree_leaves(values) if every else values[:1]:
        if isinstance(value, Tensor) and value.layout is torch.strided:
            yield value


def _is_strided_operator(func: object) -> bool:
    """Whether an operator that is called by itself may read the strides of what it is given."""
    if not isinstance(func, (OpOverload, OpOverloadPacket)):
        return False
    packet = func.overloadpacket if isinstance(func, OpOverload) else func
    namespace, name = packet._qualified_op_name.split("::")
    return namespace != "aten" or name in hazards.STRIDE_METHODS


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
