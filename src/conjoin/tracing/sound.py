"""Symbolic traces that are the original forward, on every call.

`fx.symbolic_trace` runs a forward once and takes for granted that whatever Python did then, it
will always do. That is wrong without an error where the forward branches on a flag, counts its
calls, draws a random number or enters `torch.no_grad()`. So a trace is used only where there was
nothing for Python to decide:

- all code that may run, PyTorch's own aside, is a straight line, but for loops over modules;
- every name in it is known: a child, a parameter, a buffer, a constant that is watched, a method
  that is checked in turn, or an operation on tensors;
- no operation ran for real during the trace, so none is missing from the graph.

Everything else is left to the original forward, in which the views run in lockstep.
"""

from __future__ import annotations

import dis
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.container import ModuleDict, ModuleList, Sequential
from torch.overrides import TorchFunctionMode, get_overridable_functions
from torch.utils import _pytree as pytree

from conjoin.graph.hazards import CALL_HOOKS
from conjoin.layers.wide import View
from conjoin.reachable import TRUSTED
from conjoin.tracing.proxies import Proxy, UnsoundError, arguments
from conjoin.tracing.undisturbed import letting_go, undisturbed

FORBIDDEN_OPERATIONS = frozenset(
    "STORE_ATTR DELETE_ATTR STORE_GLOBAL DELETE_GLOBAL DELETE_SUBSCR STORE_DEREF DELETE_DEREF "
    "IMPORT_NAME IMPORT_FROM RAISE_VARARGS SETUP_WITH SETUP_FINALLY BEFORE_WITH LOAD_SPECIAL "
    "PUSH_EXC_INFO CHECK_EXC_MATCH IS_OP CONTAINS_OP LOAD_BUILD_CLASS LOAD_ASSERTION_ERROR "
    "GET_AWAITABLE SEND YIELD_FROM FORMAT_VALUE FORMAT_SIMPLE FORMAT_WITH_SPEC BUILD_STRING "
    "BUILD_SET SET_ADD SET_UPDATE LOAD_SUPER_ATTR".split()
)
"""Bytecode that has a side effect, enters a context, or tells a proxy from a tensor."""

BUILTINS = frozenset("range len zip enumerate list tuple dict reversed sum slice".split())
"""Built-in functions that give the same on every call and have no effect."""

CONTAINER_METHODS = frozenset("append extend items keys values".split())
"""Methods of lists, dictionaries and their modules that depend on nothing but the contents."""

NOT_OPERATIONS = frozenset(
    "backward data grad numpy tolist item register_hook retain_grad requires_grad_ share_memory_ "
    "set_ apply_ map_ map2_ storage untyped_storage data_ptr pin_memory resize_ resize_as_ "
    "is_leaf grad_fn requires_grad _version".split()
)
"""What a tensor has beside operations: it leads out of the graph, or differs for a slice."""

MODULE_NAMES = frozenset("torch nn functional F math pi inf special fft linalg".split())
"""Names of PyTorch's own modules, and constants, on the way to an operation."""

SPECIAL_METHODS = frozenset(
    "__call__ _call_impl __getattr__ __getattribute__ __setattr__ __iter__ __len__ __getitem__ "
    "__contains__ __bool__ __eq__ __hash__".split()
)
"""Methods that Python runs without their name standing in the code."""

CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""Types of attribute that a trace may take as they are, as long as they are watched."""

MISSING = object()
"""The value of an attribute that an instance does not have."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A rewritten forward, and what it takes for granted.

    Attributes:
        function: the new forward, called with the region and `arity` arguments.
        arity: the number of arguments.
        modules: places of the modules that the traced forward calls or looks into: the path of
            the parent, the name, and the class of the module that stands there.
        containers: paths of modules that may have been iterated over, and their children's names.
        constants: paths of modules, the names of attributes that were read, and their values.
        globals: namespaces, the names of functions that were called, and these functions.
        forwards: classes of modules, and their forwards.
    """

    function: Callable[..., Any]
    arity: int
    modules: tuple[tuple[str, str, type], ...]
    containers: tuple[tuple[str, tuple[str, ...]], ...]
    constants: tuple[tuple[str, str, Any], ...]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]
    forwards: tuple[tuple[type[nn.Module], Callable[..., Any]], ...]


class _Tracer(fx.Tracer):
    """Traces one region; the only modules that it looks into are those that hold its views."""

    proxy_buffer_attributes = True

    def __init__(self, inlined: set[nn.Module]) -> None:
        super().__init__()
        self.inlined = inlined

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self.inlined

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Proxies for the arguments without a default; Python itself fills in the others."""
        return root_fn, arguments(self)


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
            raise UnsoundError(f"{getattr(func, '__name__', func)} runs without the input")
        return func(*args, **kwargs)


def trace(
    region: nn.Module, rewrite: Callable[[fx.GraphModule], bool], meta: Mapping[str, Any]
) -> Traced | None:
    """Traces a region and rewrites its graph.

    Args:
        region: a module that encloses views.
        rewrite: changes the graph, and tells whether it found anything to do.

    Returns:
        The new forward and what it takes for granted; None where the trace would not be sound or
        there was nothing to do.
    """
    inlined = _inlined(region)
    try:
        names, functions = _check(region, inlined)
        constants = tuple(_constants(region, inlined, names))
        with undisturbed(region), _NothingReal(), letting_go():
            graph = _Tracer(inlined).trace(region)
        _only_registered(graph, region)
    except Exception:  # noqa: BLE001 - The region's own code, which may raise anything on a proxy.
        return None
    modules = dict(region.named_modules())
    # All of them: a call may have moved past any other, which must stay free of side effects.
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    graph_module = fx.GraphModule(region, graph)
    graph_module.meta.update(meta)
    if not rewrite(graph_module):
        return None
    graph = graph_module.graph
    watched = [modules[target] for target in called]
    containers = _containers(region)
    places = tuple(_places(region, {*watched, *inlined, *containers} - {region}))
    return Traced(
        _compile(graph),
        sum(node.op == "placeholder" for node in graph.nodes),
        places,
        tuple(
            (path, tuple(module._modules))
            for path, module in region.named_modules()
            if module in inlined or module in containers
        ),
        (*constants, *_switches(modules, places)),
        functions,
        tuple((cls, cls.forward) for cls in {plain_class(m) for m in {*watched, *inlined}}),
    )


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, for a view or a region that of the user's."""
    return getattr(type(module), "conjoin_base", type(module))


def _inlined(region: nn.Module) -> set[nn.Module]:
    """The region, and the modules in it on the way to a view."""
    return {
        module
        for module in region.modules()
        if not isinstance(module, View)
        and any(isinstance(inner, View) for inner in module.modules())
    }


def _check(
    region: nn.Module, inlined: set[nn.Module]
) -> tuple[set[str], tuple[tuple[dict[str, Any], str, Any], ...]]:
    """Checks all functions but PyTorch's own that a forward of `inlined` may run.

    Returns:
        The names that they use; and the functions that are globals, with namespace and name.

    Raises:
        UnsoundError: in one of them Python may decide something, or remember it.
    """
    for module in inlined:
        if module is not region and any(getattr(module, hooks) for hooks in CALL_HOOKS):
            raise UnsoundError("a module that would be bypassed has hooks")
    members = {
        name
        for module in region.modules()
        for held in (module._modules, module._parameters, module._buffers)
        for name, member in held.items()
        if member is not None
    }
    attributes = {name for m in inlined for name in vars(m)}
    inner = {type(module) for module in inlined}
    outer = {type(module) for module in region.modules()} - inner
    for cls in inner | outer:
        if special := SPECIAL_METHODS & _own(cls).keys():
            raise UnsoundError(f"{cls.__name__} defines {', '.join(special)}")
    foreign = {name for cls in outer for name in _own(cls)}
    owned = [_own(cls) for cls in inner]
    pending = [f for own in owned for f in own.get("forward", ())]
    if any(not isinstance(inspect.getattr_static(cls, "forward"), FunctionType) for cls in inner):
        raise UnsoundError("a forward is no plain function")
    seen: set[FunctionType] = set()
    used: set[str] = set()
    functions: list[tuple[dict[str, Any], str, Any]] = []
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        _check_closure(function)
        for code in _nested(function.__code__):
            for kind, name in _names(code):
                if kind == "global":
                    pending += _global(name, function.__globals__)
                    value = function.__globals__.get(name)
                    if callable(value):
                        functions.append((function.__globals__, name, value))
                    continue
                used.add(name)
                methods = [f for own in owned for f in own.get(name, ())]
                pending += methods
                known = methods or name in members or name in attributes or name in _operations()
                constant = any(name in own and not own[name] for own in owned)
                if not known or constant or name in foreign:
                    raise UnsoundError(f"it uses .{name}")
    return used, tuple(functions)


def _own(cls: type) -> dict[str, list[FunctionType]]:
    """The functions behind each attribute that a class or its bases define.

    PyTorch's and conjoin's own classes are left out. An attribute that is no function, method or
    property has none.
    """
    found: dict[str, list[FunctionType]] = {}
    for base in cls.__mro__:
        if base.__module__.split(".")[0] in ("torch", "conjoin", "builtins"):
            continue
        for name, value in vars(base).items():
            functions = found.setdefault(name, [])
            if isinstance(value, property):
                value = value.fget
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, FunctionType):
                functions.append(value)
    return found


def _check_closure(function: FunctionType) -> None:
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if set(function.__code__.co_freevars) - {"__class__"}:
        raise UnsoundError("a closure")
    if not all(_constant(value) for value in defaults):
        raise UnsoundError("the default of an argument can change")


def _nested(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the comprehensions and functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _names(code: CodeType) -> Iterator[tuple[str, str]]:
    """The names that code reads, as globals or as attributes.

    Raises:
        UnsoundError: it is not a straight line.
    """
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation == "STORE_DEREF" and name in code.co_cellvars:
            continue
        if operation in FORBIDDEN_OPERATIONS or ("JUMP" in operation and "_IF" in operation):
            raise UnsoundError(operation)
        if operation.startswith("YIELD") and code.co_name != "<genexpr>":
            raise UnsoundError(operation)
        augmented = operation == "BINARY_OP" and instruction.argrepr.endswith("=")
        if augmented or operation.startswith("INPLACE_"):
            raise UnsoundError("an augmented assignment, which a proxy does not do in place")
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield "global", name
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):
            yield "attribute", name


def _global(name: str, namespace: dict[str, Any]) -> list[FunctionType]:
    """The functions to check behind a global name.

    Raises:
        UnsoundError: it need not stand for the same on every call.
    """
    if name not in namespace:
        if name not in BUILTINS:
            raise UnsoundError(f"it calls {name}")
        return []
    value = namespace[name]
    if isinstance(value, ModuleType) and value in (torch, nn, F, math):
        return []
    if isinstance(value, FunctionType) and value.__module__.split(".")[0] not in TRUSTED:
        return [value]
    if value in _functions():
        return []
    raise UnsoundError(f"it reads {name}")


@functools.cache
def _functions() -> frozenset[Any]:
    """PyTorch's functions that are recorded in a graph when called with a proxy."""
    found = get_overridable_functions()
    listed = (f for namespace in (torch, F) for f in found.get(namespace, ()))
    return frozenset(f for f in listed if f.__name__ not in NOT_OPERATIONS)


@functools.cache
def _operations() -> frozenset[str]:
    """Names of operations, of the way to them and of what containers have."""
    found = get_overridable_functions()
    names = {f.__name__ for namespace in (torch, F, Tensor) for f in found.get(namespace, ())}
    names |= {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    names |= {name for name, value in vars(math).items() if callable(value)}
    names |= {"shape", "dtype", "device", "ndim", "T", "mT", "H", "mH", "real", "imag"}
    names |= {name for name in dir(torch) if name.endswith("_like")}
    return frozenset((names | MODULE_NAMES | CONTAINER_METHODS) - NOT_OPERATIONS)


def _constants(
    region: nn.Module, inlined: set[nn.Module], names: set[str]
) -> Iterator[tuple[str, str, Any]]:
    """The plain attributes of modules that may have been read, and those that must stay missing.

    Raises:
        UnsoundError: one of them can change without being replaced, or is not watched.
    """
    for path, module in region.named_modules():
        attributes = vars(module)
        for name in names & attributes.keys():
            if module not in inlined or not _constant(attributes[name]) or name == "training":
                raise UnsoundError(f"it reads the attribute {name}")
            yield path, name, attributes[name]
        if module in inlined:
            for name in {"forward", *(names & _own(type(module)).keys())}:
                if name in attributes:
                    raise UnsoundError(f"{name} was replaced on the instance")
                yield path, name, MISSING


def _constant(value: object) -> bool:
    if type(value) is tuple:
        return all(_constant(item) for item in value)
    return type(value) in CONSTANTS


def _only_registered(graph: fx.Graph, region: nn.Module) -> None:
    """Refuses tensors that are neither parameters nor buffers: a trace keeps them for ever."""
    registered = {*dict(region.named_parameters()), *dict(region.named_buffers())}
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in registered:
            raise UnsoundError(f"it keeps {node.target}")


def _places(region: nn.Module, wanted: set[nn.Module]) -> Iterator[tuple[str, str, type]]:
    """Where modules stand."""
    for path, owner in region.named_modules():
        for name, child in owner._modules.items():
            if child in wanted and child is not None:
                yield path, name, type(child)


def _switches(
    modules: dict[str, nn.Module], places: Iterable[tuple[str, str, type]]
) -> Iterator[tuple[str, str, Any]]:
    """What makes a module work in place, or replaces its forward, without replacing the module."""
    for parent, name, _ in places:
        path = f"{parent}.{name}".lstrip(".")
        if path in modules:  # A module at two places is listed at the first.
            for key in ("inplace", "forward"):
                yield path, key, vars(modules[path]).get(key, MISSING)


def _containers(region: nn.Module) -> set[nn.Module]:
    """What the traced code may have iterated over."""
    return {m for m in region.modules() if isinstance(m, (ModuleList, ModuleDict, Sequential))}


def _compile(graph: fx.Graph) -> Callable[..., Any]:
    """The graph as a function of the region and its arguments."""
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, "<conjoin>", "exec"), namespace)
    function: Callable[..., Any] = namespace["forward"]
    function.__conjoin_source__ = code.src  # type: ignore[attr-defined]
    return function
