"""Symbolic traces that are the original forward, on every call.

`fx.symbolic_trace` runs a forward once and takes for granted that whatever Python did then, it
will always do. That is wrong without an error where the forward branches on a flag, counts its
calls, draws a random number or enters `torch.no_grad()`. So a trace is used only where there was
nothing for Python to decide:

- all code that may run, PyTorch's own aside, is a straight line, but for loops over modules;
- the names that it reads are modules, functions of PyTorch, or constants that are watched;
- no operation ran for real during the trace, so none is missing from the graph.

Everything else is left to the original forward, in which the views run in lockstep.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.container import ModuleDict, ModuleList, Sequential
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.graph.hazards import CALL_HOOKS
from conjoin.layers.wide import View

Pass = Callable[[fx.Graph, dict[str, nn.Module]], int]

FORBIDDEN_OPERATIONS = frozenset(
    "STORE_ATTR DELETE_ATTR STORE_GLOBAL DELETE_GLOBAL DELETE_SUBSCR STORE_DEREF DELETE_DEREF "
    "IMPORT_NAME IMPORT_FROM RAISE_VARARGS SETUP_WITH SETUP_FINALLY BEFORE_WITH LOAD_SPECIAL "
    "PUSH_EXC_INFO CHECK_EXC_MATCH IS_OP CONTAINS_OP LOAD_BUILD_CLASS LOAD_ASSERTION_ERROR "
    "GET_AWAITABLE SEND YIELD_FROM".split()
)
"""Bytecode that has a side effect, enters a context, or tells a proxy from a tensor."""

FORBIDDEN_NAMES = frozenset({"training", "grad", "__dict__", "__class__", "forward"})
"""Attributes whose value changes while the model lives, or that go around the module's call."""

HARMLESS_BUILTINS = frozenset(
    {
        "range",
        "len",
        "zip",
        "enumerate",
        "list",
        "tuple",
        "dict",
        "reversed",
        "sum",
        "super",
        "slice",
    }
)
"""Built-in functions that give the same on every call and have no effect."""

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of attribute that a trace may take as they are, as long as they are watched."""

FORBIDDEN_METHODS = frozenset(
    "train eval requires_grad_ zero_grad apply load_state_dict add_module set_submodule".split()
)
"""Methods of `nn.Module` that change the module; so does whatever is called `register_...`."""

TRUSTED = frozenset({"torch", "conjoin", *sys.stdlib_module_names}) - {"__main__"}
"""Packages whose code is not looked into; what a forward may call of them is checked by name."""


class _UnsoundError(Exception):
    """The trace would not be the original forward on every call."""


class _Tracer(fx.Tracer):
    """Traces one region; the only modules that it looks into are those that hold its views."""

    proxy_buffer_attributes = True

    def __init__(self, inlined: set[nn.Module]) -> None:
        super().__init__()
        self.inlined = inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Proxies for the arguments without a default; Python itself fills in the others."""
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in _required(self.root)]
        return root_fn, [self.root, *proxies]


class _NothingReal(TorchFunctionMode):
    """Stops a trace when an operation runs that does not depend on the forward's arguments."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise _UnsoundError(f"{getattr(func, '__name__', func)} runs without the input")
        return func(*args, **kwargs)


Traced = tuple[
    Callable[..., Any],
    int,
    tuple[tuple[dict[str, Any], str, nn.Module, type], ...],
    tuple[tuple[dict[str, Any], int], ...],
    tuple[tuple[dict[str, Any], str, Any], ...],
]
"""The fields of `regions.Plan`."""


def trace(region: nn.Module, pipeline: Sequence[Pass]) -> Traced | None:
    """Traces a region and runs the passes on its graph.

    Args:
        region: a module that encloses views.
        pipeline: the passes, in their order.

    Returns:
        The new forward and the conditions under which it is the original one; None where the
        trace would not be sound or the passes found nothing to do.
    """
    inlined = _inlined(region)
    try:
        constants = tuple(_constants(region, inlined, _functions(inlined)))
        graph = _run(region, inlined)
        _only_registered(graph, region)
    except Exception:  # noqa: BLE001 - The region's own code, which may raise anything on a proxy.
        return None
    modules = dict(region.named_modules())
    before = {node.target for node in graph.nodes if node.op == "call_module"}
    if not sum(rewrite(graph, modules) for rewrite in pipeline):
        return None
    graph.lint()
    after = {node.target for node in graph.nodes if node.op == "call_module"}
    bypassed = [modules[str(target)] for target in before - after] + [*(inlined - {region})]
    arity = sum(node.op == "placeholder" for node in graph.nodes)
    return (
        _compile(graph),
        arity,
        tuple(_places(region, bypassed)),
        tuple((m._modules, len(m._modules)) for m in (region, *_containers(region, inlined))),
        constants,
    )


def _inlined(region: nn.Module) -> set[nn.Module]:
    """The region, and the modules in it on the way to a view."""
    return {
        module
        for module in region.modules()
        if not isinstance(module, View)
        and any(isinstance(inner, View) for inner in module.modules())
    }


def _containers(region: nn.Module, inlined: set[nn.Module]) -> Iterator[nn.Module]:
    """What the traced code may have iterated over."""
    for module in inlined - {region}:
        yield module
    for module in inlined:
        for child in module.children():
            if child not in inlined and isinstance(child, (ModuleList, ModuleDict, Sequential)):
                yield child


def _run(region: nn.Module, inlined: set[nn.Module]) -> fx.Graph:
    """The graph of one symbolic run."""
    for module in inlined:
        if "forward" in vars(module):
            raise _UnsoundError("a forward was replaced on the instance")
        if module is not region and any(getattr(module, hooks) for hooks in CALL_HOOKS):
            raise _UnsoundError("a module that would be bypassed has hooks")
    with _NothingReal():
        return _Tracer(inlined).trace(region)


def _required(region: nn.Module) -> list[str]:
    """The arguments without a default; the new forward is for calls with just these."""
    parameters = [*inspect.signature(type(region).forward).parameters.values()][1:]
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [p for p in parameters if p.default is p.empty and p.kind not in optional]
    if any(p.kind is p.KEYWORD_ONLY for p in required):
        raise _UnsoundError("an argument must be given by name")
    return [p.name for p in required]


def _functions(inlined: set[nn.Module]) -> set[FunctionType]:
    """All functions but PyTorch's own that the forwards of `inlined` may run, each checked.

    Raises:
        _UnsoundError: in one of them Python may decide something, or remember it.
    """
    classes = {type(module) for module in inlined}
    pending = [function for cls in classes for function in _attribute(cls, "forward")]
    found: set[FunctionType] = set()
    while pending:
        function = pending.pop()
        if function in found or _trusted(function.__module__):
            continue
        found.add(function)
        if set(function.__code__.co_freevars) - {"__class__"}:
            raise _UnsoundError("a closure")
        for code in _nested(function.__code__):
            for name in _check_code(code, function.__globals__):
                value = function.__globals__[name]
                pending += [value] if isinstance(value, FunctionType) else []
            for name in code.co_names:
                pending += [f for cls in classes for f in _attribute(cls, name)]
    return found


def _trusted(module: str) -> bool:
    return module.split(".")[0] in TRUSTED


def _attribute(cls: type, name: str) -> list[FunctionType]:
    """The functions behind an attribute of a class.

    Raises:
        _UnsoundError: it is neither a function nor a constant.
    """
    value = inspect.getattr_static(cls, name, None)
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, FunctionType):
        return [value]
    if not callable(value) and not _constant(value):
        raise _UnsoundError(f"it reads the class attribute {name}")
    return []


def _nested(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the comprehensions and functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _check_code(code: CodeType, names: dict[str, Any]) -> Iterator[str]:
    """Refuses code in which Python may decide something, or remember it.

    Yields:
        The global names that it reads, other than built-in functions.

    Raises:
        _UnsoundError: it may.
    """
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation == "STORE_DEREF" and name in code.co_cellvars:
            continue
        if operation in FORBIDDEN_OPERATIONS or ("JUMP" in operation and "_IF" in operation):
            raise _UnsoundError(operation)
        if operation.startswith("YIELD") and code.co_name != "<genexpr>":
            raise _UnsoundError(operation)
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            if not _harmless(name, names):
                raise _UnsoundError(f"it reads {name}")
            if name in names:
                yield name
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and (
            name in FORBIDDEN_NAMES | FORBIDDEN_METHODS or name.startswith("register_")
        ):
            raise _UnsoundError(f"it reads .{name}")


def _harmless(name: str, names: dict[str, Any]) -> bool:
    """Whether a global name stands for the same thing on every call."""
    if name not in names:
        return name in HARMLESS_BUILTINS and hasattr(builtins, name)
    value = names[name]
    if isinstance(value, ModuleType):
        return value is math or value.__name__.split(".")[0] == "torch"
    if isinstance(value, FunctionType):  # Anyone else's function is checked like the forward.
        return value.__module__.split(".")[0] == "torch" or not _trusted(value.__module__)
    if isinstance(value, BuiltinFunctionType):
        return value in torch.overrides.get_testing_overrides() or value.__module__ == "math"
    return isinstance(value, type) and issubclass(value, nn.Module)


def _constants(
    region: nn.Module, inlined: set[nn.Module], functions: set[FunctionType]
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The plain attributes of modules that the functions may have read.

    Raises:
        _UnsoundError: one of them can change without being replaced, or is not watched.
    """
    names = {name for f in functions for code in _nested(f.__code__) for name in code.co_names}
    for module in region.modules():
        attributes = vars(module)
        for name in names & attributes.keys():
            value = attributes[name]
            if name == "_modules" and module in inlined:
                continue
            if module not in inlined or not _constant(value):
                raise _UnsoundError(f"it reads the attribute {name}")
            yield attributes, name, value


def _constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_constant(item) for item in value)
    return isinstance(value, CONSTANTS)


def _only_registered(graph: fx.Graph, region: nn.Module) -> None:
    """Refuses tensors that are neither parameters nor buffers: a trace keeps them for ever."""
    registered = {*dict(region.named_parameters()), *dict(region.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in registered:
            raise _UnsoundError(f"it keeps {node.target}")


def _places(
    region: nn.Module, bypassed: Sequence[nn.Module]
) -> Iterator[tuple[dict[str, Any], str, nn.Module, type]]:
    """Where the bypassed modules stand."""
    wanted = set(bypassed)
    for owner in region.modules():
        for name, child in owner._modules.items():
            if child in wanted and child is not None:
                yield owner._modules, name, child, type(child)


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the region and its arguments."""
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<conjoin>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    function.__conjoin_source__ = code.src  # type: ignore[attr-defined]
    return function
