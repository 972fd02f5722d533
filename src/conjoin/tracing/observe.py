"""Siblings by observation: which layers receive the very same tensor object?

The model's example inputs are run once in training and once in evaluation mode, on a copy whose
tensors are fake: no arithmetic, no memory, and no trace on the model, its buffers, modes and
random streams. Where fake tensors do not carry the model (it branches on values, say), a real
copy runs instead.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.graph.site import Sightings, Site, Untraced
from conjoin.launches import Counted, count_layers
from conjoin.layers import Kind, kind_of
from conjoin.tracing import regions

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
        Tensor.numpy,
        Tensor.__array__,
        Tensor.__dlpack__,
        Tensor.view_as,
    }
)
"""Functions whose result depends on the strides of the tensor that they are given."""


class Copy:
    """A copy of a model to run the example inputs on, with fake tensors where they carry it.

    Attributes:
        model: the copy.
        fake: whether its tensors are fake.
    """

    def __init__(self, model: nn.Module, *, fake: bool) -> None:
        """Copies `model`."""
        self.fake = fake
        self._mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else None
        self.model = self._copied(model)
        regions.uninstall(self.model)  # So that every view is called.

    def _copied(self, model: nn.Module) -> nn.Module:
        if self._mode is None:
            return copy.deepcopy(model)
        # What most models consist of is made anew, which is much faster than converting it.
        memo: dict[int, Any] = {}
        plain = list(_plain_tensors(model))
        with self._mode:
            for tensor in plain:
                empty = torch.empty_strided(
                    tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
                )
                memo[id(tensor)] = (
                    nn.Parameter(empty, requires_grad=tensor.requires_grad)
                    if isinstance(tensor, nn.Parameter)
                    else empty
                )
        with FakeCopyMode(self._mode):
            return copy.deepcopy(model, memo)

    def run(self, call: Call) -> Any:
        """Runs the copy on arguments like these, and gives its output."""
        args, kwargs = pytree.tree_map_only(Tensor, self._argument, call)
        with self._mode or contextlib.nullcontext():
            return self.model(*args, **kwargs)

    def count(self, call: Call, layers: Iterable[str]) -> Counted:
        """The launches of a step on arguments like these, in all and within each of `layers`."""
        args, kwargs = pytree.tree_map_only(Tensor, self._argument, call)
        with self._mode or contextlib.nullcontext():
            return count_layers(self.model, args, kwargs, layers)

    def _argument(self, tensor: Tensor) -> Tensor:
        if self._mode is not None:
            return self._mode.from_tensor(tensor, static_shapes=True)
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)


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
    with undisturbed():
        try:
            return _observe(Copy(model, fake=True), calls, kinds)
        except Exception:  # noqa: BLE001 - Whatever fake tensors do not carry, the real run decides.
            return _observe(Copy(model, fake=False), calls, kinds)


def _observe(copied: Copy, calls: Sequence[Call], kinds: tuple[Kind, ...]) -> Sightings:
    watch = _Watch(copied.model, kinds)
    failures: dict[str, Exception] = {}
    for mode in (True, False):
        copied.model.train(mode)
        for number, call in enumerate(calls):
            try:
                with watch.running((mode, number)), watch:
                    copied.run(call)
            except Exception as error:  # The model's own code, which may raise anything.
                if copied.fake:
                    raise
                failures["training" if mode else "evaluation"] = error
                watch.discard((mode, number))
    if len(failures) == 2:
        raise ValueError(_unfit(failures["evaluation"])) from failures["evaluation"]
    untraced = tuple(
        Untraced("", f"does not run in {mode} mode: {_line(error)}")
        for mode, error in failures.items()
    )
    return Sightings(tuple(watch.sites), watch.strided, untraced)


def _unfit(error: Exception) -> str:
    return (
        f"the model does not run on the example inputs: {type(error).__name__}: {_line(error)}. "
        "Pass a tuple of the arguments that the model is called with, as model(*example_inputs)."
    )


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Leaves the random streams of Python, NumPy and PyTorch as they were."""
    numpy = sys.modules.get("numpy")
    state = random.getstate()
    numpy_state = numpy.random.get_state() if numpy is not None else None
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if started else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class _Watch(TorchFunctionMode):
    """Notes the calls of layers, and what reads the strides of their outputs."""

    def __init__(self, model: nn.Module, kinds: tuple[Kind, ...]) -> None:
        super().__init__()
        self.sites: list[Site] = []
        self.strided: dict[str, str] = {}
        self._run: object = None
        self._inputs: list[Tensor] = []
        self._outputs: dict[int, tuple[str, Tensor, int]] = {}
        for name, module in model.named_modules():
            kind = kind_of(module, kinds)
            if kind is not None:
                module.__dict__["forward"] = functools.partial(
                    self._called, name, kind, module.forward
                )

    @contextlib.contextmanager
    def running(self, run: object) -> Iterator[None]:
        """Notes what happens as part of `run`."""
        self._run, self._inputs, self._outputs = run, [], {}
        try:
            yield
        finally:
            self._inputs, self._outputs = [], {}

    def discard(self, run: tuple[bool, int]) -> None:
        """Forgets what was noted as part of `run`."""
        self.sites = [site for site in self.sites if site.input[:2] != run]  # type: ignore[index]

    def _called(
        self, name: str, kind: Kind, forward: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        with torch._C.DisableTorchFunction():
            input = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(input, Tensor):
                self._inputs.append(input)  # Alive, so that its id stays its own.
                run = self._run
                self.sites.append(Site(name, (*run, id(input)), _version(input), _modes(input)))  # type: ignore[misc]
        output = forward(*args, **kwargs)
        if isinstance(output, Tensor):
            with torch._C.DisableTorchFunction():
                channel = output.dim() + kind.output_dim
                self._outputs[output.untyped_storage()._cdata] = (name, output, channel)
        return output

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], Tensor) and self._outputs:
            self._look(func, args)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: tuple[Any, ...]) -> None:
        tensor = args[0]
        if tensor.layout is not torch.strided:
            return
        name, output, channel = self._outputs.get(tensor.untyped_storage()._cdata, ("", tensor, 0))
        called = getattr(func, "__name__", str(func))
        if not name or name in self.strided:
            return
        if func in STRIDE_QUERIES or (
            func is Tensor.view and not (tensor is output and _fits(tensor, channel, args[1:]))
        ):
            self.strided[name] = called
        elif tensor is not output and called.endswith("_") and not called.endswith("__"):
            self.strided[name] = f"{called} on a view of the output"


def _fits(tensor: Tensor, channel: int, shape: Sequence[Any]) -> bool:
    """Whether `tensor.view(*shape)` works for a slice along `channel`, at any batch size.

    A slice of a contiguous tensor along dimension c is two blocks of dimensions that can be
    merged among themselves, those before c and the rest. The new shape must keep them apart.
    """
    if channel <= 0:
        return True
    if len(shape) == 1 and not isinstance(shape[0], int):
        if isinstance(shape[0], torch.dtype):
            return False
        shape = tuple(shape[0])
    known = 1
    for size in shape:
        known *= size if size != -1 else 1
    sizes = [size if size != -1 else tensor.numel() // max(known, 1) for size in shape]
    before = 1
    for size in tensor.shape[:channel]:
        before *= size
    leading = 1
    for size in sizes:
        leading *= size
        if leading >= before:
            return leading == before
    return False


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _modes(tensor: Tensor) -> tuple[object, ...]:
    device = tensor.device.type
    autocast = torch.is_autocast_enabled(device)
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast and str(torch.get_autocast_dtype(device)),
    )
