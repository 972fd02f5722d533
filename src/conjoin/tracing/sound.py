"""Symbolic traces that are the original forward, on every call.

`fx.symbolic_trace` runs a forward once and takes for granted that whatever Python did then, it
will always do. That is wrong without an error where the forward branches on a flag, counts its
calls, draws a random number or enters `torch.no_grad()`. So a trace is used only where there was
nothing for Python to decide:

- all code that ran, PyTorch's own aside, is a straight line with loops over modules at most;
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
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
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
    {"range", "len", "zip", "enumerate", "list", "tuple", "dict", "reversed", "sum", "super", "slice"}
)
"""Built-in functions that give the same on every call and have no effect."""

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of attribute that a trace may take as they are, as long as they are watched."""

TRUSTED = frozenset({"torch", "conjoin", *sys.stdlib_module_names}) - {"__main__"}
"""Packages whose code is not looked into; what a forward may call of them is checked by name."""


class _Unsound(Exception):
    """The trace would not be the original forward on every call."""


class _Tracer(fx.Tracer):
    """Traces one region; the only modules that it looks into are those that hold its views."""

    proxy_buffer_attributes = True

    def __init__(self, inlined: set[nn.Module]) -> None:
        super().__init__(autowrap_modules=())
        self.inlined = inlined

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined


class _NothingReal(TorchFunctionMode):
    """Stops a trace when an operation runs that does not depend on the forward's arguments."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs))):
            raise _Unsound(f"{getattr(func, '__name__', func)} runs without the input")
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
        graph, executed = _run(region, inlined)
        constants = tuple(_constants(region, inlined, executed))
        _only_registered(graph, region)
    except Exception:  # The region's own code, which may raise anything on a proxy.
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


def _run(region: nn.Module, inlined: set[nn.Module]) -> tuple[fx.Graph, set[CodeType]]:
    """The graph of one symbolic run, and the code that ran."""
    for module in inlined - {region}:
        if any(getattr(module, hooks) for hooks in CALL_HOOKS) or "forward" in vars(module):
            raise _Unsound("a module that would be bypassed has hooks")
    defaults = _defaults(region)
    executed: dict[CodeType, FrameType] = {}

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code not in executed and _is_users(frame.f_globals.get("__name__", "")):
            _check_code(code, frame)
            executed[code] = frame

    profiler = sys.getprofile()
    sys.setprofile(note)
    try:
        with _NothingReal():
            graph = _Tracer(inlined).trace(region, concrete_args=defaults)
    finally:
        sys.setprofile(profiler)
    _drop_defaults(graph, region, defaults)
    return graph, set(executed)


def _defaults(region: nn.Module) -> dict[str, Any]:
    """The arguments that have a default, which the new forward takes for granted."""
    parameters = inspect.signature(type(region).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise _Unsound("the forward takes any number of arguments")
    if not all(value is None or type(value) in (bool, int, float) for value in defaults.values()):
        raise _Unsound("an argument has a default that is no number")
    return defaults


def _drop_defaults(graph: fx.Graph, region: nn.Module, defaults: dict[str, Any]) -> None:
    """Takes the arguments with a default out of the graph, with what fx checks of them."""
    names = [*inspect.signature(type(region).forward).parameters][1:]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for name, placeholder in zip(names, placeholders, strict=True):
        if name in defaults:
            for node in reversed([placeholder, *_reads(placeholder)]):
                graph.erase_node(node)


def _reads(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield user
        yield from _reads(user)


def _is_users(module: str) -> bool:
    """Whether code of that module is neither PyTorch's nor conjoin's nor Python's own."""
    return module.split(".")[0] not in TRUSTED and not module.startswith("namedtuple_")


def _check_code(code: CodeType, frame: FrameType) -> None:
    """Refuses code in which Python may decide something, or remember it.

    Raises:
        _Unsound: it may.
    """
    if set(code.co_freevars) - {"__class__"} and not _nested(code, frame.f_back):
        raise _Unsound("a closure")
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation == "STORE_DEREF" and name in code.co_cellvars:
            continue
        if operation in FORBIDDEN_OPERATIONS or ("JUMP" in operation and "_IF" in operation):
            raise _Unsound(operation)
        if operation.startswith("YIELD") and code.co_name != "<genexpr>":
            raise _Unsound(operation)
        if operation in ("LOAD_GLOBAL", "LOAD_NAME") and not _harmless(name, frame):
            raise _Unsound(f"it reads {name}")
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and name in FORBIDDEN_NAMES:
            raise _Unsound(f"it reads .{name}")


def _nested(code: CodeType, caller: FrameType | None) -> bool:
    """Whether code is a comprehension or the like, that reads its caller's own variables."""
    return caller is not None and code in caller.f_code.co_consts


def _harmless(name: str, frame: FrameType) -> bool:
    """Whether a global name stands for the same thing on every call."""
    if name not in frame.f_globals:
        return name in HARMLESS_BUILTINS and hasattr(builtins, name)
    value = frame.f_globals[name]
    if isinstance(value, ModuleType):
        return value is math or value.__name__.split(".")[0] == "torch"
    if isinstance(value, FunctionType):  # A function of the user's is checked when it runs.
        return _is_users(value.__module__) or value.__module__.split(".")[0] == "torch"
    if isinstance(value, BuiltinFunctionType):
        return value in torch.overrides.get_testing_overrides() or value.__module__ == "math"
    return isinstance(value, type) and issubclass(value, nn.Module)


def _constants(
    region: nn.Module, inlined: set[nn.Module], executed: set[CodeType]
) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """The plain attributes of modules that the code may have read.

    Raises:
        _Unsound: one of them can change without being replaced, or is not watched.
    """
    names = {name for code in executed for name in code.co_names}
    for module in region.modules():
        attributes = vars(module)
        for name in names & attributes.keys():
            value = attributes[name]
            if name == "_modules" and module in inlined:
                continue
            if module not in inlined or not _constant(value):
                raise _Unsound(f"it reads the attribute {name}")
            yield attributes, name, value
        if module in inlined:
            for name in names:
                _check_class_attribute(type(module), name)


def _constant(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_constant(item) for item in value)
    return isinstance(value, CONSTANTS)


def _check_class_attribute(cls: type, name: str) -> None:
    value = inspect.getattr_static(cls, name, None)
    plain = callable(value) or isinstance(value, (property, staticmethod, classmethod))
    if not plain and not _constant(value):
        raise _Unsound(f"it reads the class attribute {name}")


def _only_registered(graph: fx.Graph, region: nn.Module) -> None:
    """Refuses tensors that are neither parameters nor buffers: a trace keeps them for ever."""
    registered = {*dict(region.named_parameters()), *dict(region.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in registered:
            raise _Unsound(f"it keeps {node.target}")


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
