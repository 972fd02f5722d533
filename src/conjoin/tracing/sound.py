"""Symbolic traces that are the original forward, on every call.

`fx.symbolic_trace` runs a forward once and takes for granted that whatever Python did then, it
will always do. That is wrong without an error where the forward branches on a flag, counts its
calls, draws a random number or enters `torch.no_grad()`. So a trace is used only where whatever
Python decided depends on what is watched on every call:

- all code that runs, PyTorch's own aside, is free of side effects, contexts and caught errors
  (`sandbox/bytecode.py`), and what it reads is noted (`sandbox/`): children, constants, flags,
  functions;
- the value of a tensor decides nothing (`proxies.py`), nor does its being no real tensor;
- no operation ran for real during the trace, so none is missing from the graph.

Everything else is left to the original forward, in which the views run in lockstep.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import _format_target
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin import merging
from conjoin.graph import channelwise, edit, elementwise, hazards, products
from conjoin.graph.bundles import CARRIED
from conjoin.graph.congruence import INPUTS, Inputs
from conjoin.layers.view import View
from conjoin.merging import REGION
from conjoin.nn import Parallel, Split, Unite
from conjoin.reachable import reachable_from, words
from conjoin.tracing.known import is_not_none
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.quick import CALL, Names, Written, restoring_mode, storing
from conjoin.tracing.ranks import RESHAPING, Ranked, Ranks
from conjoin.tracing.sandbox.allowed import CONTAINERS, operations
from conjoin.tracing.sandbox.classes import plain_class
from conjoin.tracing.sandbox.constants import is_constant, snapshots
from conjoin.tracing.sandbox.objects import MISSING, Place, held_at
from conjoin.tracing.sandbox.sandbox import Sandbox
from conjoin.tracing.structures import Observed, Structure, names_of, rebuilt, required
from conjoin.tracing.undisturbed import letting_go, undisturbed

SUNK = elementwise.ACTIVATIONS | elementwise.DROPOUTS | channelwise.MODULES
"""Modules that may be called once in the place of several, so that their settings are watched."""

OF_CONJOIN = (Parallel, Split, Unite)
"""Modules of conjoin's that a trace looks into."""


OF_DISTRIBUTIONS = frozenset({"sample", "rsample", "log_prob", "entropy"})
"""Methods of distributions that change nothing, and give tensors with memory of their own."""


CALLED = re.compile(r'(?<= = )(?:getattr\()*self(?:\.\w+|, "[^"]*"\))+(?=\()')
"""How torch.fx writes what it calls of the region, `getattr(self.layers, "0")` for one."""


NOTHING_SEEN = Observed()
"""What is known of calls that nobody has observed."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A rewritten forward, and what it takes for granted.

    Attributes:
        function: the new forward, called with the region and the tensors of a call.
        written: its source.
        structure: the structure of the calls that it was traced for.
        modes: paths of modules, and their `training`.
        places: where modules stand that were reached: the path of the parent, and the name.
        children: paths of modules that may have been iterated over, and their children's names.
        attributes: paths of modules, the attribute that holds a value, its name, and the value.
        present: paths of modules, the attribute that holds a tensor, and its name.
        contents: where containers are held, and what is in them.
        objects: where objects are held, and their classes.
        settings: where attributes of objects are, and the constants that they are.
        classes: classes and functions, the names of attributes, and their values.
        globals: namespaces, names, and their values.
        cells: variables of enclosing functions, and their values.
        shared: containers that all copies of the region share, and what is in them.
        ranks: numbers of tensors of a call, and how many dimensions they must have.
        observed: what was seen of the calls.
        most: how many elements they may have all together; None where that does not matter, nor
            which are alike.
        cuts: the paths of wide layers that it calls, and how many operations run on what each
            gives before it is cut; None where it is not.
    """

    function: Callable[..., Any]
    written: Written
    structure: Structure
    modes: tuple[tuple[str, bool], ...]
    places: tuple[tuple[str, str], ...]
    children: tuple[tuple[str, tuple[str, ...]], ...]
    attributes: tuple[tuple[str, str, str, Any], ...]
    present: tuple[tuple[str, str, str], ...]
    contents: tuple[tuple[Place, Any], ...]
    objects: tuple[tuple[Place, type], ...]
    settings: tuple[tuple[Place, Any], ...]
    classes: tuple[tuple[type | FunctionType, str, Any], ...]
    globals: tuple[tuple[dict[str, Any], str, Any], ...]
    cells: tuple[tuple[CellType, Any], ...]
    shared: tuple[tuple[Any, tuple[Any, ...]], ...]
    ranks: tuple[tuple[int, int], ...]
    observed: Observed
    most: int | None
    cuts: tuple[tuple[str, int | None], ...]


class _Tracer(fx.Tracer):
    """Traces one region, in a sandbox."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        region: nn.Module,
        structure: Structure,
        opaque: set[nn.Module],
        observed: Observed,
    ) -> None:
        super().__init__()
        self.structure, self.opaque, self.observed = structure, opaque, observed
        self.ranks = Ranks(region.get_submodule)
        self.reshapes = False
        self.untraced: list[nn.Module] = []
        self.sandbox = sandbox = Sandbox(region, self._record, self._parameter)
        self.lent: dict[str, Any] = {}
        self.tensors: dict[int, list[str]] = {}
        for module, path in sandbox.paths.items():
            for name, tensor in itertools.chain(
                module._parameters.items(), module._buffers.items()
            ):
                if tensor is not None:
                    self.tensors.setdefault(id(tensor), []).append(f"{path}.{name}".lstrip("."))

    def _record(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        return self.create_proxy("call_function", function, args, kwargs)

    def _parameter(self, path: str) -> Any:
        if path not in self.lent:
            self.lent[path] = self.create_proxy("get_attr", path, (), {})
        return self.lent[path]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Ranked(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self.opaque

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if m in self.opaque:
            if type(m).__module__.split(".")[0] not in ("torch", "conjoin"):
                self._refuse_held((args, kwargs))
                self.untraced.append(m)
            return super().call_module(m, forward, args, kwargs)
        self.sandbox.stack.append(m)
        result = super().call_module(m, forward, args, kwargs)
        self.sandbox.stack.pop()
        return result

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: dict[str, Any], *rest: Any, **named: Any
    ) -> Any:
        if any(_is_distribution(each) for each in pytree.tree_leaves((args, kwargs))):
            # What else an object of these may give shares memory with the tensors that it holds.
            if kind != "call_method" or target not in OF_DISTRIBUTIONS:
                raise UnsoundError("it does more with a distribution than draw from it")
        elif kind == "call_method" and target not in operations():
            raise UnsoundError(f"it calls .{target}")
        if target is getattr and args[1] not in operations():
            raise UnsoundError(f"it reads .{args[1]}")
        if target in ("dim", "ndimension") and kind == "call_method":
            rank = self.ranks.rank(args[0].node)
            if rank is not None:
                return rank
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        self.reshapes |= "out" in kwargs or name in RESHAPING
        return super().create_proxy(kind, target, args, kwargs, *rest, **named)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A proxy for a parameter or buffer; everything else is what it is."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        found = self.tensors.get(id(attr_val), [])
        if len(found) != 1:
            raise UnsoundError("a tensor that is not registered, or more than once")
        if found[0] not in parameter_proxy_cache:
            proxy = self.create_proxy("get_attr", found[0], (), {})
            parameter_proxy_cache[found[0]] = proxy
        return parameter_proxy_cache[found[0]]

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Proxies for the tensors of a call of this structure."""
        forward = plain_class(self.root).forward
        proxies = [
            self.create_proxy("placeholder", name, (), {})
            for name in names_of(self.structure, forward)
        ]
        nodes = [proxy.node for proxy in proxies]
        self.ranks.inputs = dict(zip(nodes, self.observed.ranks, strict=False))

        def run(root: nn.Module, *tensors: Any) -> Any:
            args, kwargs = rebuilt(self.structure, iter(tensors))
            for value in (*args, *kwargs.values()):
                if not isinstance(value, fx.Proxy):
                    self.sandbox.hold(value)
            with self.sandbox.entered(), _NothingReal():
                output = self.sandbox.forward_of(root)(root, *args, **kwargs)
            stored = tuple(self.sandbox.stored.values())
            self._refuse_held((output, stored))
            return (output, stored) if stored else output

        run.__annotations__ = {}  # It would be that of the new forward.
        return run, [self.root, *proxies]

    def asked_ranks(self) -> Iterator[tuple[int, int]]:
        """The inputs whose number of dimensions was asked for, by their numbers."""
        for number, (node, rank) in enumerate(self.ranks.inputs.items()):
            if node in self.ranks.asked:
                yield number, rank

    def _refuse_held(self, value: Any) -> None:
        """Refuses to hand out a container of which the graph would make a new one each time."""
        seen: set[int] = set()
        for container, _ in snapshots(value):
            if self.sandbox.is_held(container) or id(container) in seen:
                raise UnsoundError("a container that is not made anew leaves the forward")
            seen.add(id(container))


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
    region: nn.Module,
    rewrite: Callable[[fx.GraphModule], bool],
    structure: Structure | None = None,
    meta: dict[str, Any] | None = None,
    asked: set[str] | None = None,
    observed: Observed = NOTHING_SEEN,
) -> Traced | None:
    """Traces a region and rewrites its graph.

    Args:
        region: a module that encloses views.
        rewrite: changes the graph, and tells whether it found anything to do.
        structure: that of the calls to trace; the required arguments alone where None.
        meta: what is put in the graph module's `meta` before `rewrite` is called.
        asked: takes the paths of the modules whose mode the code asked for.
        observed: what was seen of calls of this structure.

    Returns:
        The new forward and what it takes for granted; None where the trace would not be sound or
        there was nothing to do.
    """
    forward = plain_class(region).forward
    structure = required(forward) if structure is None else structure
    if structure is None:
        return None
    with undisturbed(region, reached=False):
        found = _soundly(region, structure, observed, set() if asked is None else asked)
    if found is None:
        return None
    graph, tracer = found
    sandbox, ranks = tracer.sandbox, tuple(tracer.asked_ranks())
    modules = {path: module for module, path in sandbox.paths.items()}
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    _take_out_idle(graph, modules)
    graph_module = fx.GraphModule(region, graph)
    graph_module.meta.update({**(meta or {}), REGION: region})
    inputs: Inputs | None = graph_module.meta.setdefault(INPUTS, None)
    rewritten = rewrite(graph_module)
    for path in called:
        _watch_leaf(sandbox, path, modules[path])
    if not rewritten:
        if asked is not None:
            asked.update(sandbox.modes)
        return None
    merging.tell(graph_module)
    return Traced(
        *_compile(graph_module.graph, tuple(sandbox.stored)),
        structure,
        tuple(sandbox.modes.items()),
        tuple(sandbox.places),
        tuple(sandbox.children.items()),
        tuple((*key, value) for key, value in sandbox.attributes.items()),
        tuple(sandbox.present),
        tuple(sandbox.contents.items()),
        tuple(sandbox.objects.items()),
        tuple(sandbox.settings.items()),
        tuple((*key, value) for key, value in sandbox.classes.items()),
        tuple(sandbox.globals.values()),
        tuple(sandbox.cells.values()),
        tuple(pair for value, _ in sandbox.shared.values() for pair in snapshots(value)),
        ranks,
        observed,
        inputs.most if inputs is not None else None,
        graph_module.meta.get(CARRIED, ()),
    )


def _take_out_idle(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Takes out the Dropouts of a trace in evaluation mode, which give back what they got."""
    for node in list(graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        input = edit.only_input(node)
        if module is None or input is None or type(module) not in elementwise.DROPOUTS:
            continue
        if not module.training:
            node.replace_all_uses_with(input)
            graph.erase_node(node)


def _soundly(
    region: nn.Module, structure: Structure, observed: Observed, asked: set[str]
) -> tuple[fx.Graph, _Tracer] | None:
    """A sound trace of a region, as deep as it can be; None where there is none."""
    opaque = {module for module in region.modules() if _is_leaf(module, region)}
    left = {module for module in region.modules() if module is not region} - opaque
    while True:
        try:
            tracer = _Tracer(region, structure, opaque, observed)
        except UnsoundError:
            return None
        sandbox = tracer.sandbox
        try:
            return _traced(region, tracer), tracer
        except (Exception, UnsoundError):  # noqa: BLE001 - The region's code may raise anything.
            if not left:
                return None
        finally:
            asked.update(sandbox.modes)
        # Without the module that broke off, and where the fault shows only later, without any.
        last = sandbox.stack[-1]
        alike = {last} if isinstance(last, CONTAINERS) else {*_of_class(left, plain_class(last))}
        gone = (alike & left) or {*left}
        opaque |= gone
        left -= gone


def _may_be_stored(value: Any) -> bool:
    """Whether a value becomes a plain attribute of a module, and no Parameter or child of it."""
    if isinstance(value, fx.Proxy):
        return value.node.op != "get_attr" and not _is_distribution(value)
    if type(value) in (list, tuple, dict):
        return all(map(_may_be_stored, value.values() if type(value) is dict else value))
    return is_constant(value)


def _is_distribution(value: Any) -> bool:
    return isinstance(value, fx.Proxy) and value.node.target in hazards.DISTRIBUTIONS


def _of_class(modules: set[nn.Module], cls: type) -> Iterator[nn.Module]:
    return (module for module in modules if plain_class(module) is cls)


def _traced(region: nn.Module, tracer: _Tracer) -> fx.Graph:
    with letting_go():
        graph = tracer.trace(region)
    sandbox = tracer.sandbox
    if tracer.ranks.asked and (tracer.reshapes or tracer.untraced):
        raise UnsoundError("it may change how many dimensions a tensor has")
    if sandbox.stored and tracer.untraced:
        raise UnsoundError("a module that is not traced may see what it sets")
    if not all(map(_may_be_stored, sandbox.stored.values())):
        raise UnsoundError("it sets an attribute to something else than a value")
    objects = {id(held_at(dict(region.named_modules()), place)) for place in sandbox.objects}
    for module in tracer.untraced if objects else ():
        if any(id(value) in objects for value in reachable_from(module)):
            raise UnsoundError("a module that is not traced may change an object")
    registered = {f"{path}.{name}".lstrip(".") for path, _, name in sandbox.present}
    for node in graph.nodes:
        if node.op != "output" and sandbox.asks_none and not is_not_none(node, sandbox.paths):
            raise UnsoundError(f"{node} may be None")
    modules = {path: module for module, path in sandbox.paths.items()}
    products.call(graph, sandbox.lent, modules)
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in registered:
            raise UnsoundError(f"it keeps {node.target}")
    return graph


def _is_leaf(module: nn.Module, region: nn.Module) -> bool:
    """Whether a module is one that the trace does not look into."""
    if module is region:
        return False
    if any(getattr(module, hooks) for hooks in hazards.CALL_HOOKS):
        return True
    if isinstance(module, (View, fx.GraphModule)):  # The graph of the second is rewritten itself.
        return True
    cls = plain_class(module)
    if cls in (*CONTAINERS, *OF_CONJOIN):
        return False
    forward = inspect.getattr_static(cls, "forward", None)
    return (
        type(forward) is not FunctionType
        or forward.__module__.split(".")[0] in ("torch", "conjoin")
        or "forward" in vars(module)
    ) and cls.forward not in (nn.Sequential.forward, Parallel.forward)


def _watch_leaf(sandbox: Sandbox, path: str, module: nn.Module) -> None:
    """What makes a module that is called another function, without replacing the module."""
    own = vars(module)
    sandbox.attributes[path, "__dict__", "forward"] = own.get("forward", MISSING)
    sandbox.classes[plain_class(module), "forward"] = plain_class(module).forward
    if "inplace" in own:
        sandbox.attributes[path, "__dict__", "inplace"] = own["inplace"]
    if type(module) in SUNK:
        for name, _ in elementwise.settings(module):
            sandbox.attributes[path, "__dict__", name] = own[name]
    if isinstance(module, View) and module.wide_layer.running:
        sandbox.modes[path] = module.training
    for inner in () if isinstance(module, View) else module.modules():
        if _reads_mode(plain_class(inner)):  # type: ignore[arg-type]  # A class has a hash.
            sandbox.modes[sandbox.paths[inner]] = inner.training


@functools.cache
def _reads_mode(cls: Any) -> bool:
    """Whether the code of a class asks for `training`."""
    return any(
        "training" in words(value.__code__)
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
        for value in vars(base).values()
        if type(value) is FunctionType
    )


def _compile(
    graph: fx.Graph, stored: tuple[tuple[str, str], ...]
) -> tuple[Callable[..., Any], Written]:
    """The graph as a function of the region and its arguments, and as source to be bound.

    Args:
        graph: the graph.
        stored: paths of modules, and names of attributes, whose values it gives beside the output.
    """
    code = graph.python_code("self")
    targets = dict.fromkeys(str(node.target) for node in graph.nodes if node.op == "call_module")
    called = tuple((f"{CALL}{number}", target) for number, target in enumerate(targets))
    restores = any(node.target is torch._C._set_grad_enabled for node in graph.nodes)
    namespace: dict[str, Any] = dict(code.globals)
    written = Written(
        _calling(code.src, {at: name for name, at in called}), namespace, called, restores, stored
    )
    source = _calling(code.src, {target: _child(target) for target in targets})
    function = Names(namespace).define(source, "forward")
    if restores:
        function = restoring_mode(function)
    if stored:
        function = storing(function, stored)
    function.__conjoin_source__ = source  # type: ignore[attr-defined]
    return function, written


def _calling(source: str, expressions: Mapping[str, str]) -> str:
    """Source with expressions of its own for what it calls of the region."""
    written = {_format_target("self", target): each for target, each in expressions.items()}
    return CALLED.sub(lambda found: written.get(found[0], found[0]), source)


def _child(target: str) -> str:
    """What reads a module from the region, past `nn.Module.__getattr__`, which is slow Python."""
    return "self" + "".join(f"._modules[{name!r}]" for name in target.split("."))
