"""Counts kernel launches: the operations of a step that are not views, allocations or queries.

A count is of operations as PyTorch dispatches them, so it needs no accelerator and is the same on
fake tensors, which carry no memory and do no arithmetic. It stands for the kernels that a device
starts, and is exact about what merging siblings changes. It is not a profile: a library may start
several kernels for one operation (a cuDNN LSTM, a split-K matmul). Such an operation counts as one
before and after, and so does any operator defined outside PyTorch. On CUDA what PyTorch itself
starts beside a product or a convolution for the bias counts too.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from conjoin.memory import MemoryTracker

aten = torch.ops.aten

# Operations that hand out memory and write nothing to it.
_ALLOCATIONS = frozenset(
    {
        aten.empty,
        aten.empty_like,
        aten.empty_permuted,
        aten.empty_strided,
        aten.new_empty,
        aten.new_empty_strided,
        aten._efficientzerotensor,
    }
)

# Views in all but their schema, which hides the aliasing from autograd: they share memory.
_UNSAFE_VIEWS = frozenset(
    {aten._unsafe_view, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk}
)

# These return no tensor and change none, like a query of metadata, and yet read values on the
# device: a copy to the host, a comparison, a check.
_READS = frozenset({aten._local_scalar_dense, aten.equal, aten._assert_async})


@dataclass(frozen=True, slots=True)
class Count:
    """The kernel launches of one step.

    Attributes:
        forward: Launches of one forward pass; None where it was not counted.
        backward: Launches of one backward pass; 0 where nothing requires a gradient, None where
            it was not counted.
    """

    forward: int | None
    backward: int | None


@dataclass(frozen=True, slots=True)
class Launches:
    """The kernel launches of one step before and after the rewrite.

    Attributes:
        before: The step of the model as its author wrote it.
        after: The step of the optimized model.
    """

    before: Count
    after: Count


class LaunchCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the kernel launches of everything that runs inside it.

    Works on real and on fake tensors; a `FakeTensorMode` may be entered before or after it, since
    PyTorch keeps that mode below all others. A backward pass is counted where it runs inside.

    Attributes:
        count: Launches so far.
        by_scope: Launches by the name given to `scope`.
    """

    # A higher-order operator (flex attention, a Triton kernel) runs whole and counts as one.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0
        self.by_scope: collections.Counter[str] = collections.Counter()
        self._scopes: list[str] = []

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Attribute the launches inside to `name` too; of nested scopes, to the innermost only."""
        self._scopes.append(name)
        try:
            yield
        finally:
            self._scopes.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operation and add its launches."""
        kwargs = kwargs or {}
        if isinstance(func, OpOverload) and _is_composite(func):
            # Inference mode hands these over whole (linear, dropout, lstm): look inside.
            with self:
                return func._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)
        out = func(*args, **kwargs)
        launches = launches_of(func, args, kwargs, out) if isinstance(func, OpOverload) else 1
        self.count += launches
        if self._scopes and launches:
            self.by_scope[self._scopes[-1]] += launches
        return out


def launches_of(
    func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any], out: object
) -> int:
    """Count the kernel launches of one dispatched operation.

    Zero for

    - views, by their schema: they only describe memory that exists (`view`, `t`, `detach`), also
      in place (`squeeze_`, `resize_`, `set_`);
    - views whose schema denies it: `unsafe_split` and its like, `_unsafe_view`;
    - allocations, which write nothing: `empty` and its like;
    - queries, which return no tensor and change none: `sym_size`, `is_same_size`, `device`.

    Otherwise one, with two exceptions worth a word: `convolution_backward` runs a kernel for each
    gradient it is asked for (input, weight, bias), so it counts those; `_foreach_add` and its like
    count one, because CUDA handles the whole list in about one launch, which is an estimate for
    lists too long for one launch and for devices that loop over the list. On CUDA the bias of a
    batched product and of a convolution is one more, see `_adds_apart`.

    Operations on `meta` tensors count as on any device, so that a model without memory has counts.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        out: What it returned.

    Returns:
        The number of launches.
    """
    packet = func.overloadpacket
    if func.is_view or torch.Tag.inplace_view in func.tags or packet in _UNSAFE_VIEWS:
        return 0
    if packet in _ALLOCATIONS or (_is_query(func) and packet not in _READS):
        return 0
    if func is aten.convolution_backward.default:
        mask = kwargs["output_mask"] if "output_mask" in kwargs else args[-1]
        return sum(mask)
    return 1 + (isinstance(out, Tensor) and out.is_cuda and _adds_apart(func, args, kwargs))


def _adds_apart(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a kernel of its own handles what is added to a product, on CUDA.

    `baddbmm` copies it into its output first. The bias of a convolution is added behind cuDNN's,
    unless each channel has a kernel of its own, for which PyTorch has a function that adds it.
    """
    if func not in (aten.baddbmm.default, aten.convolution.default):
        return False
    names = (argument.name for argument in func._schema.arguments)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if func is aten.baddbmm.default:
        return bool(given.get("beta", 1) != 0)
    groups = given["groups"]
    return given["bias"] is not None and (groups == 1 or groups != given["input"].shape[1])


def count_step(
    model: nn.Module | Callable[..., object],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    forward: LaunchCounter | None = None,
) -> Count:
    """Count the launches of one forward and one backward pass.

    The backward pass starts at every output that the model computed and that requires a gradient,
    as if from the sum of them all; computing that sum and its gradient is not counted. Outputs are
    looked for in containers, mappings, dataclasses and distributions.

    The gradients of the model's parameters and of the inputs are as before afterwards. The step
    itself runs for real: on real tensors it moves random streams and running statistics, so give
    fake tensors or a copy where that matters.

    Args:
        model: What to run.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        forward: Counts the forward pass; for a caller who has scopes to attribute it to.

    Returns:
        The launches of both passes, in the gradient mode in force.

    Raises:
        Exception: Whatever the model raises on these arguments.
    """
    kwargs = kwargs or {}
    leaves: list[Tensor] = [*model.parameters()] if isinstance(model, nn.Module) else []
    leaves += [tensor for tensor in _tensors((args, kwargs)) if tensor.is_leaf]
    with _fresh_gradients(leaves):
        with forward or LaunchCounter() as forward:
            outputs = model(*args, **kwargs)
        try:
            # A tensor given out twice would add its gradient to itself; a leaf computes nothing.
            roots = list({id(t): t for t in _tensors(outputs) if t.grad_fn is not None}.values())
            if not roots:
                return Count(forward.count, 0)
            seeds = [torch.ones_like(root) for root in roots]
            with LaunchCounter() as backward:
                torch.autograd.backward(roots, seeds)
        except RuntimeError:  # The model's forward runs, but not its backward.
            return Count(forward.count, None)
    return Count(forward.count, backward.count)


@dataclass(frozen=True, slots=True)
class StepCount:
    """The launches of one step, and what share of its forward pass falls within which layer.

    Attributes:
        count: The launches of the step.
        by_layer: Launches of the forward pass within a layer, by the name given to it; None where
            nothing was counted.
        peak: The most bytes that were alive during the step; None where nothing was counted.
    """

    count: Count
    by_layer: Mapping[str, int] | None
    peak: int | None = None


UNCOUNTED = StepCount(Count(None, None), None)


def count_layers(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    layers: Mapping[str, nn.Module],
    weights: Mapping[str, Tensor] = MappingProxyType({}),
) -> StepCount:
    """Count the launches of one step as `count_step` does, and those within some layers.

    Args:
        model: What to run; a copy, since its layers are instrumented.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        layers: The layers, by a name for each.
        weights: Tensors, by a name for each; a function that is given one counts as such a layer.

    Returns:
        The launches of the step, and those of the forward pass by layer; and its peak of memory.
    """
    counter = LaunchCounter()
    memory = MemoryTracker([*model.parameters(), *model.buffers(), *_tensors((args, kwargs))])
    for name, layer in layers.items():
        layer.__dict__["forward"] = functools.partial(_within, counter, name, layer.forward)
    with memory, _Given(counter, weights):
        count = count_step(model, args, kwargs, forward=counter)
    return StepCount(count, counter.by_scope, memory.peak)


class _Given(TorchFunctionMode):
    """Attributes the launches of functions to the tensors that they are given."""

    def __init__(self, counter: LaunchCounter, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._counter = counter
        self._names = {id(weight): name for name, weight in weights.items()}
        self._views: list[Tensor] = []  # Alive, so that no id is used twice.

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        weight = next((each for each in leaves if id(each) in self._names), None)
        name = self._names.get(id(weight))
        with self._counter.scope(name) if name else contextlib.nullcontext():
            result = func(*args, **(kwargs or {}))
        if (
            weight is not None
            and name
            and isinstance(result, Tensor)
            and _share_memory(result, weight)
        ):
            self._names[id(result)] = name  # The weight transposed, for one.
            self._views.append(result)
        return result


def _share_memory(tensor: Tensor, other: Tensor) -> bool:
    with torch._C.DisableTorchFunction():
        return bool(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _within(
    counter: LaunchCounter, name: str, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
) -> Any:
    with counter.scope(name):
        return forward(*args, **kwargs)


def _is_composite(func: OpOverload) -> bool:
    """Whether the operation is written in terms of others, and so has no kernel of its own."""
    # The prim operations (device, layout) are unknown to the dispatcher, which aborts on them.
    if func.namespace == "prim":
        return False
    name = func.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _is_query(func: OpOverload) -> bool:
    """Whether the operation returns no tensor and changes none."""
    schema = func._schema
    return not schema.is_mutable and not any("Tensor" in str(r.type) for r in schema.returns)


def _tensors(value: object) -> Iterator[Tensor]:
    """Every tensor in a nested value, also in objects that PyTorch's pytree takes for leaves."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, Mapping):
            yield from _tensors(list(leaf.values()))
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            yield from _tensors([getattr(leaf, f.name, None) for f in dataclasses.fields(leaf)])
        elif isinstance(leaf, torch.distributions.Distribution):
            yield from _tensors(list(vars(leaf).values()))


@contextlib.contextmanager
def _fresh_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Put the gradients aside, so that none is added to, and back."""
    kept = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
    finally:
        for tensor, grad in zip(tensors, kept, strict=True):
            tensor.grad = grad
