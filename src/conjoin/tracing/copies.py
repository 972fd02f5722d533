"""Copies of a model to run: on fake tensors where these carry the model, or on real ones."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.duplicates import deepcopy
from conjoin.foreign import quieter, quote
from conjoin.launches import StepCount, count_layers
from conjoin.tracing import graph_modules, regions
from conjoin.tracing.keeping import KeepingTensors, own_tensors
from conjoin.tracing.modes import start_streams
from conjoin.tracing.repeating import RepeatingFakeTensorMode
from conjoin.tracing.undisturbed import letting_go

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The positional and the keyword arguments of one call of the model."""


Result = TypeVar("Result")


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
        self._own = own_tensors(self.model)
        graph_modules.separate_all(self.model)

    def _copied(self, model: nn.Module) -> nn.Module:
        if self._mode is None:
            try:
                return deepcopy(model)
            except Exception as error:  # Whatever the model holds may raise anything.
                raise UncopyableError(quote(error)) from error
        # What most models consist of is made anew, which is much faster than converting it.
        memo: dict[int, Any] = {id(t): _fake(t, self._mode) for t in _plain_tensors(model)}
        with FakeCopyMode(self._mode):
            return deepcopy(model, memo)

    def run(self, call: Call) -> Any:
        """Runs the copy on arguments like these, and gives its output."""
        args, kwargs = pytree.tree_map_only(Tensor, self._argument, call)
        with self._entered(), letting_go():
            # What it sets of variables of a context is gone with that.
            output = contextvars.copy_context().run(self.model, *args, **kwargs)
            return list(output) if inspect.isgenerator(output) else output

    def count(
        self,
        call: Call,
        layers: Mapping[str, nn.Module],
        weights: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> StepCount:
        """The launches of a step on arguments like these, and within `layers`, by `weights`."""
        args, kwargs = pytree.tree_map_only(Tensor, self._argument, call)
        start_streams(SEED)  # A model that leaves out layers at random leaves out the same ones.
        with self._entered(), letting_go():
            count = contextvars.copy_context().run
            return count(count_layers, self.model, args, kwargs, layers, weights)

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


def on_copies(model: nn.Module, work: Callable[[Callable[[], Copy]], Result]) -> Result | None:
    """What comes of work on copies of a model, fake ones if they carry it; None without copies."""
    with contextlib.suppress(UncopyableError):
        try:
            return work(functools.partial(Copy, model, fake=True))
        except Exception:  # noqa: BLE001 - As in `observe`: whatever fake tensors do not carry, the real run decides.
            return work(functools.partial(Copy, model, fake=False))
    return None


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
