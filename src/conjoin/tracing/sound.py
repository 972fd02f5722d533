"""Traces a forward soundly: the trace is the forward on every call, or there is none.

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

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import fx, nn

from conjoin import merging
from conjoin.graph import channelwise, edit, elementwise, products, rising
from conjoin.graph.bundles import CARRIED
from conjoin.graph.congruence import INPUTS, Inputs
from conjoin.graph.rewriting import Draft
from conjoin.layers.checks import is_hooked
from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View
from conjoin.layers.wide import Wide
from conjoin.merging import REGION
from conjoin.nn import Parallel, Split, Unite
from conjoin.reachable import reachable_from, words
from conjoin.tracing.compiled import compiled
from conjoin.tracing.known import is_not_none
from conjoin.tracing.proxies import UnsoundError
from conjoin.tracing.quick import Written
from conjoin.tracing.sandbox.allowed import CONTAINERS
from conjoin.tracing.sandbox.constants import is_constant, snapshots
from conjoin.tracing.sandbox.objects import MISSING, Place, held_at
from conjoin.tracing.sandbox.sandbox import Sandbox
from conjoin.tracing.structures import Observed, Structure, required
from conjoin.tracing.tracer import Tracer, is_distribution
from conjoin.tracing.undisturbed import letting_go, undisturbed

SUNK = elementwise.ACTIVATIONS | elementwise.DROPOUTS | channelwise.MODULES
"""Modules that may be called once in the place of several, so that their settings are watched."""

OF_CONJOIN = (Parallel, Split, Unite)
"""Modules of conjoin's that a trace looks into."""


NOTHING_SEEN = Observed()
"""What is known of calls that nobody has observed."""


@dataclass(frozen=True, slots=True)
class Traced:
    """A rewritten forward, and what it takes for granted.

    Attributes:
        function: the new forward, called with the region and the tensors of a call.
        risen: the same, for compilers of steps of training; see `rising.py`.
        written: its source.
        rising: the source of that for compilers.
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
    risen: Callable[..., Any]
    written: Written
    rising: Written
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
    graph_module = Draft(region, graph)
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
    function, written = compiled(graph_module.graph, tuple(sandbox.stored))
    risen = function, written
    if rising.rise(graph_module.graph, edit.called_modules(graph_module)):
        risen = compiled(graph_module.graph, tuple(sandbox.stored))
    return Traced(
        function=function,
        risen=risen[0],
        written=written,
        rising=risen[1],
        structure=structure,
        modes=tuple(sandbox.modes.items()),
        places=tuple(sandbox.places),
        children=tuple(sandbox.children.items()),
        attributes=tuple((*key, value) for key, value in sandbox.attributes.items()),
        present=tuple(sandbox.present),
        contents=tuple(sandbox.contents.items()),
        objects=tuple(sandbox.objects.items()),
        settings=tuple(sandbox.settings.items()),
        classes=tuple((*key, value) for key, value in sandbox.classes.items()),
        globals=tuple(sandbox.globals.values()),
        cells=tuple(sandbox.cells.values()),
        shared=tuple(pair for value, _ in sandbox.shared.values() for pair in snapshots(value)),
        ranks=ranks,
        observed=observed,
        most=inputs.most if inputs is not None else None,
        cuts=graph_module.meta.get(CARRIED, ()),
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
) -> tuple[fx.Graph, Tracer] | None:
    """A sound trace of a region, as deep as it can be; None where there is none."""
    opaque = {module for module in region.modules() if _is_leaf(module, region)}
    left = {module for module in region.modules() if module is not region} - opaque
    while True:
        try:
            tracer = Tracer(region, structure, opaque, observed)
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
        return value.node.op != "get_attr" and not is_distribution(value)
    if type(value) in (list, tuple, dict):
        return all(map(_may_be_stored, value.values() if type(value) is dict else value))
    return is_constant(value)


def _of_class(modules: set[nn.Module], cls: type) -> Iterator[nn.Module]:
    return (module for module in modules if plain_class(module) is cls)


def _traced(region: nn.Module, tracer: Tracer) -> fx.Graph:
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
    if is_hooked(module):
        return True
    # The graph of the second is rewritten itself, and what is scripted is no Python.
    if isinstance(module, (View, fx.GraphModule, torch.jit.ScriptModule)):
        return True
    cls = plain_class(module)
    if cls in (*CONTAINERS, *OF_CONJOIN):
        return False
    forward = inspect.getattr_static(cls, "forward", None)
    return (
        type(forward) is not FunctionType
        or forward.__module__.split(".")[0] in ("torch", "conjoin")
        or "forward" in vars(module)
    ) and forward not in (nn.Sequential.forward, Parallel.forward)


def _watch_leaf(sandbox: Sandbox, path: str, module: nn.Module) -> None:
    """What makes a module that is called another function, without replacing the module."""
    own = vars(module)
    sandbox.attributes[path, "__dict__", "forward"] = own.get("forward", MISSING)
    if not isinstance(module, torch.jit.ScriptModule):
        sandbox.classes[plain_class(module), "forward"] = plain_class(module).forward
    if "inplace" in own:
        sandbox.attributes[path, "__dict__", "inplace"] = own["inplace"]
    if type(module) in SUNK:
        for name, value in elementwise.plain_attributes(module).items():
            sandbox.attributes[path, "__dict__", name] = value
    if isinstance(module, View) and module.wide_layer.running:
        sandbox.modes[path] = module.training
    for inner in () if isinstance(module, View) else module.modules():
        # A wide layer has a mode for the sake of running statistics.
        asks = inner.running if isinstance(inner, Wide) else _reads_mode(plain_class(inner))
        if asks:
            sandbox.modes[sandbox.paths[inner]] = inner.training


_reading: WeakKeyDictionary[type, bool] = WeakKeyDictionary()
"""Whether the code of classes asks for `training`."""


def _reads_mode(cls: type) -> bool:
    """Whether the code of a class asks for `training`."""
    if cls not in _reading:
        _reading[cls] = any(
            "training" in words(value.__code__)
            for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
            for value in vars(base).values()
            if type(value) is FunctionType
        )
    return _reading[cls]
