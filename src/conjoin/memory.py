"""Predicts how much memory a step of a model needs at most.

The step runs on fake tensors, which have sizes and lifetimes and no memory. What is counted is the
memory of every tensor that is alive at one time: parameters, buffers and inputs, which are alive
throughout, and whatever the step makes: activations, those that are kept for backward, outputs and
gradients. What is not: the optimizer's state, the working space that an operation takes and gives
back, and what an allocator rounds up or keeps.

The working space of a convolution on a CPU is as large as its tensors: oneDNN lays out input,
weight and output anew for it, unless they are in channels_last, and PyTorch does without oneDNN for
some, such as those of 1x1 on one thread. What is laid out anew depends on the processor, and no
function tells it beforehand, so it stays out of the prediction.
"""

from __future__ import annotations

import numbers
import os
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryBudgetWarning(UserWarning):
    """The optimized model is predicted to need more memory than `memory_budget` allows.

    Example:
        >>> import torch, conjoin, warnings
        >>> model = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always", conjoin.MemoryBudgetWarning)
        ...     _ = conjoin.optimize(model, (torch.randn(4, 8),), memory_budget=10)
        >>> [warning.category.__name__ for warning in caught]
        ['MemoryBudgetWarning']
    """


@dataclass(frozen=True, slots=True)
class Memory:
    """The predicted peak of the memory of one step, in bytes, before and after the rewrite.

    Attributes:
        before: of the model as its author wrote it; None where it was not predicted.
        after: of the optimized model; likewise.
        limit: what it was to be at most; None where no budget was given.
    """

    before: int | None
    after: int | None
    limit: int | None = None

    @property
    def warning(self) -> str:
        """The sentence that says that the limit is not met; empty where it is met."""
        if self.after is None or self.limit is None or self.after <= self.limit:
            return ""
        return (
            f"The memory_budget of {in_words(self.limit)} is not met: a step is predicted to need "
            f"{in_words(self.after)} at its peak, and narrower groups would not make it less. "
            "Allow more memory, or call the model on smaller batches."
        )


UNPREDICTED = Memory(None, None)


class MemoryTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the memory of the tensors that are alive while something runs inside it.

    Attributes:
        now: bytes that are alive.
        peak: the most that were.
    """

    supports_higher_order_operators = True

    def __init__(self, held: Iterable[Tensor] = ()) -> None:
        """Start with some tensors that exist already."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()
        for tensor in held:
            self._hold(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note what it made."""
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._hold(leaf)
        return out

    def _hold(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor until it is gone; once, however many tensors share it."""
        try:
            storage = tensor.untyped_storage()
        except (RuntimeError, ValueError):  # It is sparse, of a class of its own, or lazy.
            return
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size).atexit = False

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def in_bytes(budget: float, model: nn.Module) -> int:
    """A budget in bytes.

    Args:
        budget: an `int` of bytes, or a `float`, a fraction of the memory of the model's device.
        model: the model.

    Raises:
        TypeError: it is no number.
        ValueError: it is not above 0, or a fraction above 1, or nothing is known of the device.
    """
    if isinstance(budget, numbers.Integral) and not isinstance(budget, bool):
        budget = int(budget)  # NumPy's as well.
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(
            "memory_budget is a number of bytes as an int, or a fraction of the device's memory as "
            f"a float, not {type(budget).__name__}."
        )
    if isinstance(budget, int) and budget > 0:
        return budget
    if isinstance(budget, float) and 0 < budget <= 1:
        return int(budget * _total(model))
    raise ValueError(
        "memory_budget is a number of bytes above 0 as an int, or a fraction of the device's "
        f"memory, above 0 and up to 1, as a float, not {budget}."
    )


def _total(model: nn.Module) -> int:
    """The bytes of the memory of the device that a model is on."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        pages = size = -1
    if device.type != "cpu" or pages < 0 or size < 0:
        raise ValueError(
            f"how much memory there is on {device} is not known here, so memory_budget cannot be "
            "a fraction of it. Give it in bytes, as an int."
        )
    return pages * size


def in_words(size: int) -> str:
    """A number of bytes in words, with three digits: ``1.25 GiB``."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            number = size / 2**power
            return f"{number:.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
    return f"{size} bytes"
