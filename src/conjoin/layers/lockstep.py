"""Lockstep: one run of the wide layer for all siblings that are called with the same tensor.

A sibling that is called with x asks for its part of the wide layer's output. The first to ask
runs the wide layer; the others take their part of that run, if nothing has changed in between.
Whoever asks in vain computes its own slice, which is always right. So a run is shared only while
it could not be told from the separate calls, and it is kept only as long as

- x is alive (the run refers to x weakly, and the graph of the run holds an alias of x, not x; a
  leaf that requires a gradient is held by its graph in any case, so there nothing is shared),
- the graph of the run has not been freed by a backward pass,
- some part has not been taken.

Runs are kept per thread. None is shared by two streams of a device, since the second would not wait
for the first; nor in a CUDA graph, since a part may be asked for in another one (`streams.py`).
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, fx
from torch._C._functorch import CInterpreter, maybe_current_level, peek_interpreter_stack
from torch._export.wrappers import _export_tracepoint
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import _AttrProxy, get_proxy_mode

from conjoin.layers import origin
from conjoin.layers.origin import Step
from conjoin.layers.streams import is_captured, stream_of

if TYPE_CHECKING:
    from conjoin.layers.wide import Wide

PLAIN_TENSORS = (Tensor, torch.nn.Parameter, FakeTensor)
"""The types of tensor of which a part behaves like a tensor of its own."""

REAL_TENSORS = (Tensor, torch.nn.Parameter)
"""The types of tensor whose address tells whether `.data` was replaced."""

PATIENCE = 8
"""Runs in a row that may end with parts left over before a wide layer is no longer shared."""


@dataclasses.dataclass(slots=True)
class _Run:
    """One run of a wide layer: the parts that nobody has taken yet."""

    wide: Callable[[], Wide | None]
    input: Callable[[], Tensor | None]
    graph: Callable[[], object] | None
    state: tuple[object, ...]
    parts: dict[int, Tensor]
    borders: int

    def is_for(self, wide: Wide, input: Tensor, state: tuple[object, ...]) -> bool:
        """Whether this run computed what a call with `input` would compute now."""
        return (
            self.wide() is wide
            and self.input() is input
            and (self.graph is None or self.graph() is not None)
            and self.state == state
        )


_Runs = dict[tuple[int, int], _Run]
"""Runs by wide layer and input."""


class _Thread(threading.local):
    def __init__(self) -> None:
        self.runs: _Runs = {}
        self.exported: weakref.WeakKeyDictionary[object, _Runs] = weakref.WeakKeyDictionary()


_thread = _Thread()


class _Alias(torch.autograd.Function):
    """The same values and version counter as the input in a tensor object of its own."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def take(wide: Wide, index: int, input: Any) -> Tensor | None:
    """The `index`-th part of the wide layer's output for `input`.

    Args:
        wide: the wide layer.
        index: which sibling asks.
        input: what it was called with.

    Returns:
        The part, which nobody else has been given; None where the sibling must compute it, or
        where that takes less time.
    """
    if not _shareable(input):
        return None
    runs, exported = _thread.runs, torch.compiler.is_compiling()
    if exported:  # What is shared within an export ends with it, as its graphs do.
        runs = _thread.exported.setdefault(exporting(), {})
        if isinstance(wide, _AttrProxy):  # Stands for it where a module has two names.
            wide = cast(Any, wide).get_base()
    if wide.varies and not wide.kind.pays(wide, input):
        return None
    source: Tensor = input
    steps: tuple[Step, ...] = ()
    checkpointed = torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    if wide.hidden:
        # Each block of a model may be checkpointed by itself, and must not wait for the others.
        found = None if checkpointed else origin.resolve(input)
        if found is None:
            return None
        source, steps = found
    key = id(wide), id(source)
    state = _state(wide, source, steps, input)
    run = runs.get(key)
    if run is not None and run.is_for(wide, source, state):
        if exported and run.borders != _borders():
            return None
        part = run.parts.pop(index, None)
        if not run.parts:
            wide.wasted = 0
            del runs[key]
        return part
    if run is not None:
        _drop(runs, key)
    # A checkpoint computes again what it did, so patience must not end between the two.
    if wide.wasted >= PATIENCE and not checkpointed:
        return None
    return _start((runs, key), wide, index, (input, source, steps), state, exported)


def _start(
    place: tuple[_Runs, tuple[int, int]],
    wide: Wide,
    index: int,
    read: tuple[Tensor, Tensor, tuple[Step, ...]],
    state: tuple[object, ...],
    exported: bool,
) -> Tensor | None:
    runs, key = place
    if exported and not _exports_all(wide):
        return None
    try:
        # In an exported graph every operation counts, and a run may hold its input.
        alias = read[0] if exported else _alias(*read)
        if alias.dtype is not read[0].dtype:
            return None  # Autocast is on, and was not when the input was computed.
        # No call of a module that hooks of all modules would see.
        output = wide.forward(alias) if exported else wide.run(alias)
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None  # The sibling's own computation raises the error in the sibling's own words.
    graph: Callable[[], object] | None = None
    if output.requires_grad and not exported:
        graph = weakref.ref(alias)
        del alias
        if graph() is None:  # The graph did not need the input, so it tells us when it is used up.
            graph = _until_backward(output)
    parts = dict(enumerate(wide.split(output)))
    part = parts.pop(index)
    watched, borders = _watch(read[1], *place), _borders() if exported else 0
    runs[key] = _Run(weakref.ref(wide), watched, graph, state, parts, borders)
    return part


def _alias(input: Tensor, source: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """The input in a tensor object of its own, with a graph that does not hold the source.

    The graph of an input that was computed from the source may hold it, so the steps run anew.
    """
    if not torch.is_grad_enabled():
        return input
    if not input.requires_grad:
        return input.detach()
    alias: Tensor = _Alias.apply(source)  # type: ignore[no-untyped-call]
    for function, settings in steps:
        alias = function(alias, **dict(settings))
    return alias


class _Token:
    """Alive until a backward pass reaches the output."""


def _until_backward(output: Tensor) -> Callable[[], object]:
    held = [_Token()]
    output.register_hook(lambda grad: held.clear())  # type: ignore[no-untyped-call]
    return weakref.ref(held[0])


def _watch(input: Tensor, runs: _Runs, key: tuple[int, int]) -> weakref.ref[Tensor]:
    # The input may die on another thread, whose runs are others.
    def forget(reference: weakref.ref[Tensor]) -> None:
        run = runs.get(key)
        if run is not None and run.input is reference:
            _drop(runs, key)

    return weakref.ref(input, forget)


def _drop(runs: _Runs, key: tuple[int, int]) -> None:
    run = runs.pop(key, None)
    wide = run.wide() if run is not None else None
    if wide is not None:
        wide.wasted += 1


def exporting() -> Any:
    """What traces a forward on fake tensors for `torch.export`; None where nothing does so.

    The forward's Python runs as in eager mode then, and not where Dynamo reads it, as with
    `strict=True`.
    """
    if torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting():
        return None
    mode = get_proxy_mode()
    return None if mode is None else mode.tracer


def _exports_all(wide: Wide) -> bool:
    """Whether what is exported holds all siblings: the others' parts would be computed in vain."""
    root = getattr(exporting(), "scope_root", None)
    return root is None or wide.is_enclosed({*root.modules()})


def _borders() -> int:
    """How many borders of modules whose calls are to stay calls there are in an exported graph.

    Such a module (`preserve_module_call_signature`) can take no part of a run outside of it.
    """
    graph: fx.Graph = exporting().graph
    return len(graph.find_nodes(op="call_function", target=_export_tracepoint, sort=False))


def runs_python() -> bool:
    """Whether the forward's Python runs at each call, or else once for all of them."""
    return not torch.compiler.is_compiling() or exporting() is not None


def in_transform() -> bool:
    """Whether a functorch transform or forward-mode differentiation is going on."""
    return in_functorch() or forward_ad._current_level >= 0


def in_functorch() -> bool:
    """Whether a functorch transform is going on; Dynamo can tell too, where it is asked like this.

    It takes None from there for an object.
    """
    return isinstance(peek_interpreter_stack(), CInterpreter)


def is_traced() -> bool:
    """Whether a transform, or `torch.jit.trace`, follows what is computed.

    Each sibling asks at each call, so it is asked in the shortest way, which Dynamo cannot read.
    """
    return (
        maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _shareable(input: object) -> bool:
    return (
        type(input) in PLAIN_TENSORS
        and runs_python()
        and not is_traced()
        and not (input.is_leaf and input.requires_grad)  # type: ignore[attr-defined]
        and not input.is_inference()  # type: ignore[attr-defined]
        and input.layout is torch.strided  # type: ignore[attr-defined]
        and not input.is_nested  # type: ignore[attr-defined]
        and not is_captured(cast(Tensor, input))
    )


def _state(
    wide: Wide, source: Tensor, steps: tuple[Step, ...], input: Tensor
) -> tuple[object, ...]:
    """All that a call's result depends on besides the values of tensors that nobody changed."""
    return (
        source._version,
        steps,
        input.requires_grad,
        torch._C._is_any_autocast_enabled() and _autocast_to(input.device.type),
        *state_of(wide),
    )


def _autocast_to(device: str) -> torch.dtype | bool:
    """The dtype that operations on a device are cast to; False where they are not."""
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    return autocast and torch.get_autocast_dtype(device)


def state_of(wide: Wide) -> tuple[object, ...]:
    """All that a graph on the weight and the bias depends on, likewise."""
    held: dict[str, Any] = wide._parameters  # Much quicker than as attributes.
    # The replicas of data parallelism hold no Parameters.
    weight, bias = (held["weight"], held["bias"]) if held else (wide.weight, wide.bias)
    real = type(weight) in REAL_TENSORS
    return (
        id(weight),
        -1 if weight.is_inference() else weight._version,
        weight.data_ptr() if real else None,
        stream_of(weight) if real else None,
        id(bias),
        None if bias is None or bias.is_inference() else bias._version,
        weight.requires_grad,
        None if bias is None else bias.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
    )
