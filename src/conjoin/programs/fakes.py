"""Computes the values of a program's nodes, on fake tensors whose sizes may be symbols.

What an operation gives is found by running it on them. That must tell nothing new of the sizes: a
test such as `batch == 1` is one that the program does not make, and what follows from it would not
hold for all the sizes that the program is for.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._sympy.value_ranges import ValueRanges

from conjoin.foreign import quieter
from conjoin.graph import hazards
from conjoin.graph.meta import VALUE

aten = torch.ops.aten

OPEN = "it depends on a size that the program leaves open"
"""What is wrong where something would have to be found out about sizes."""


class UnknownSizeError(ValueError):
    """What is computed depends on a size that the program leaves open."""


def mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The mode that the values of a graph belong to; None where there are no tensors."""
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get(VALUE)):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return None


def faked(mode: FakeTensorMode, tensor: Tensor) -> Any:
    """A fake tensor for a parameter or buffer."""
    fake = mode.from_tensor(tensor.detach(), static_shapes=True)
    return fake.requires_grad_(tensor.requires_grad)


@contextlib.contextmanager
def nothing_new(mode: FakeTensorMode) -> Iterator[None]:
    """While nothing may be found out about sizes.

    Raises:
        UnknownSizeError: something would have been.
    """
    env = mode.shape_env
    if env is None:
        yield
        return
    known = len(env.guards), env.num_deferred_runtime_asserts
    # It warns of what is told by the error.
    unlogged = quieter("torch.fx.experimental.symbolic_shapes", logging.ERROR)
    with _refusing(env), _as_when_exported(env), unlogged:
        yield
    if known != (len(env.guards), env.num_deferred_runtime_asserts):  # By another way.
        raise UnknownSizeError(OPEN)


@contextlib.contextmanager
def _refusing(env: ShapeEnv) -> Iterator[None]:
    """Raises an error before anything is noted, which would count as known from then on.

    What is replaced is asked each time; `ShapeEnv.error_on_new_guards` is not in PyTorch 2.11.
    """

    def refuse(*_: Any) -> None:
        raise UnknownSizeError(OPEN)

    vars(env)["_check_frozen"] = refuse
    try:
        yield
    finally:
        del vars(env)["_check_frozen"]


@contextlib.contextmanager
def _as_when_exported(env: ShapeEnv) -> Iterator[None]:
    """Takes open sizes for 2 or more where the example's are, as `torch.export` does.

    A program from a file only says which sizes it may be called with, 0 and 1 among them.
    """
    before = dict(env.var_to_range)
    # Their name in older versions of PyTorch warns in newer ones.
    name = "backed_var_to_val" if hasattr(env, "backed_var_to_val") else "var_to_val"
    hints = getattr(env, name)
    for symbol, known in before.items():
        if known.lower < 2 and symbol in hints and hints[symbol] >= 2:
            env.var_to_range[symbol] = ValueRanges(2, known.upper)
    env._update_version_counter()
    try:
        yield
    finally:
        env.var_to_range.update(before)
        env._update_version_counter()


def is_decomposed(graph: fx.Graph) -> bool:
    """Whether a graph has none of the operations that `run_decompositions` writes as others."""
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    return targets.isdisjoint(_decompositions())


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """What `run_decompositions` writes in other operations, and how."""
    table: Any = torch.export.default_decompositions()
    known = {
        operation: function
        for operation, function in table.items()
        if not operation.name().startswith("aten::sym_")  # Sizes, which stay.
    }
    return {**known, aten.native_batch_norm.default: _batch_norm}


def _batch_norm(input: Tensor, *given: Any) -> Any:
    """What a BatchNorm in evaluation mode is there; `make_fx` leaves it as it is."""
    *tensors, training, momentum, eps = given
    if training:
        return NotImplemented
    return aten._native_batch_norm_legit_no_training.default(input, *tensors, momentum, eps)


def operations(
    mode: FakeTensorMode, function: Callable[..., Any], values: list[Any], *, decomposed: bool
) -> fx.GraphModule:
    """What a function does to values, as ATen operations with a value each.

    Args:
        mode: the mode of the values.
        function: the function.
        values: the values.
        decomposed: whether they are to be such as `run_decompositions` leaves.

    Raises:
        UnknownSizeError: it depends on sizes that are not known.
    """
    # What an operation is decomposed to may make tensors of its own.
    inside = mode if decomposed else contextlib.nullcontext()
    with nothing_new(mode), _as_exported(), inside:
        trace = make_fx(
            function,
            decomposition_table=_decompositions() if decomposed else None,
            tracing_mode="real",
            pre_dispatch=not decomposed,
        )
        traced: fx.GraphModule = trace(*values)
    for node in reversed(traced.graph.nodes):
        if node.op == "call_function" and not node.users and not _changes(node):
            traced.graph.erase_node(node)
    return traced


def _changes(node: fx.Node) -> bool:
    """Whether an operation changes what it reads."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


@contextlib.contextmanager
def _as_exported() -> Iterator[None]:
    """Without the libraries that `torch.export` turns off, whose choice depends on sizes."""
    # Not their `flags`, which set, and warn of, more than this.
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    (nnpack,) = torch.backends.nnpack.set_flags(False)  # type: ignore[no-untyped-call]
    torch._C._set_mkldnn_enabled(False)
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch.backends.nnpack.set_flags(nnpack)  # type: ignore[no-untyped-call]
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)


def computed(mode: FakeTensorMode, node: fx.Node) -> Any:
    """What an operation gives for the values that its inputs have now."""
    args, kwargs = map_arg((node.args, node.kwargs), _value)
    if hazards.passes_on(node):
        return args[0]
    # What C++ makes of products asks for numbers as sizes in PyTorch 2.11; Python's does not.
    with mode, torch.no_grad(), _as_exported(), enable_python_dispatcher():
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _value(node: fx.Node) -> Any:
    """The value of a node; without the gradient that a view of a fake parameter would have."""
    value = node.meta[VALUE]
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def layout(value: Any) -> Hashable:
    """The shapes, strides and types in a value; equal where nothing could tell values apart."""
    return tuple(
        (tuple(map(_number, (*leaf.shape, *leaf.stride()))), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else str(leaf)
        for leaf in pytree.tree_leaves(value)
    )


def _number(size: Any) -> Hashable:
    return str(size) if isinstance(size, torch.SymInt) else size
