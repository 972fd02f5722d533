"""Finds siblings by symbolic tracing, for a model without example inputs.

The model is traced from the root down. Where a module does not trace (it branches on values,
iterates over a tensor, gives back an object of its own), each of its children is traced by
itself, so that siblings inside them are found all the same, and the report says what was left.

The graph serves to *find* siblings only: whatever it got wrong, a group of like layers is exact
whenever it runs, because it shares a call only where the inputs are the very same.
"""

from __future__ import annotations

import contextvars
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.foreign import quote
from conjoin.graph import hazards, strides
from conjoin.graph.site import Sightings, Site, Untraced
from conjoin.layers import Kind, activation, kind_of
from conjoin.layers.part import Part
from conjoin.reachable import functions_of, words
from conjoin.tracing import graph_modules, regions
from conjoin.tracing.listings import listed_by_code
from conjoin.tracing.proxies import Proxy, UnsoundError
from conjoin.tracing.structures import names_of, required
from conjoin.tracing.undisturbed import letting_go, undisturbed

CONTAINERS = (nn.ModuleList, nn.ModuleDict)
"""Modules without a forward of their own."""


class _Tracer(fx.Tracer):
    """Traces into everything but layers: those of a kind, and PyTorch's own."""

    proxy_buffer_attributes = True

    def __init__(self, kinds: tuple[Kind, ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        """A part of a wide weight by the place of its view; everything else as ever."""
        if not isinstance(a, Part):
            return super().create_arg(a)
        names = {module: name for name, module in self.root.named_modules()}
        return self.create_node("get_attr", f"{names[a.conjoin_view]}.{a.conjoin_name}", (), {})

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Proxies for the arguments without a default; Python itself fills in the others."""
        forward = type(self.root).forward
        structure = required(forward)
        if structure is None:
            raise UnsoundError("an argument must be given by name")
        names = names_of(structure, forward)
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]
        return root_fn, [self.root, *proxies]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return kind_of(m, self.kinds) is not None or super().is_leaf_module(
            m, module_qualified_name
        )


class _NoSideEffects(TorchFunctionMode):
    """Stops a trace before it would change a tensor of the model for real."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        writes = (
            "out" in kwargs or name == "__setitem__" or (name.endswith("_") and name[:2] != "__")
        )
        if writes and not any(isinstance(a, fx.Proxy) for a in pytree.tree_leaves((args, kwargs))):
            raise fx.proxy.TraceError(f"{name} changes a tensor of the model while it is traced")
        return func(*args, **kwargs)


@dataclass
class _Seen:
    """What the traces have shown so far."""

    sites: list[Site] = field(default_factory=list)
    strided: dict[str, str] = field(default_factory=dict)
    untraced: dict[Untraced, None] = field(default_factory=dict)
    changed: set[str] = field(default_factory=set)


def trace(model: nn.Module, kinds: tuple[Kind, ...]) -> Sightings:
    """What symbolic traces of the model, or of its parts, show.

    Args:
        model: the model; it stays as it is.
        kinds: the kinds of layer to look for.

    Returns:
        The sites, the stride-sensitive layers, and the modules that could not be traced.
    """
    seen = _Seen()
    listed = listed_by_code(model, kinds)
    plain = graph_modules.separated(model)
    with plain, undisturbed(model), regions.suspended(model), _NoSideEffects():
        if any("training" in words(function.__code__) for function in functions_of(model)):
            for mode in (True, False):
                for module in model.modules():
                    module.training = mode
                _trace(model, kinds, mode, seen)
        else:
            _trace(model, kinds, None, seen)
    return Sightings(
        tuple(seen.sites), seen.strided, tuple(seen.untraced), listed, frozenset(seen.changed)
    )


def _trace(model: nn.Module, kinds: tuple[Kind, ...], mode: bool | None, seen: _Seen) -> None:
    """Traces the model, and the children of each module that does not trace."""
    pending = [("", model)]
    names = {module: name for name, module in model.named_modules()}
    visited: set[nn.Module] = set()
    while pending:
        name, module = pending.pop(0)
        if module in visited or kind_of(module, kinds) is not None:
            continue
        visited.add(module)
        if not isinstance(module, CONTAINERS) and any(True for _ in module.children()):
            try:
                with letting_go():
                    graph = contextvars.copy_context().run(_Tracer(kinds).trace, module)
            except (Exception, UnsoundError) as error:  # noqa: BLE001 - The model's own code.
                seen.untraced[Untraced(name, quote(error))] = None
            else:
                _note(graph, (mode, name), module, names, kinds, seen)
                continue
        prefix = f"{name}." if name else ""
        pending += [(prefix + child, m) for child, m in module.named_children()]


def _note(
    graph: fx.Graph,
    run: tuple[bool | None, str],
    root: nn.Module,
    names: Mapping[nn.Module, str],
    kinds: tuple[Kind, ...],
    seen: _Seen,
) -> None:
    """Adds what one graph shows, by the names that the layers have in the whole model."""
    modules = dict(root.named_modules())
    versions, changed = hazards.follow(graph, modules)
    owners = (str(node.target).rpartition(".")[0] for node in changed if node.op == "get_attr")
    seen.changed |= {names[root.get_submodule(owner)] for owner in owners}
    for node in graph.nodes:
        if node.op != "call_module" or kind_of(modules[node.target], kinds) is None:
            continue
        layer = names[modules[node.target]]
        input = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if isinstance(input, fx.Node):
            identity, version, activations = _made(input, versions, modules)
            seen.sites.append(
                Site(
                    layer,
                    (*run, identity),
                    (version, versions[node]),
                    object=(*run, input.name),
                    activations=tuple(names[modules[name]] for name in activations),
                )
            )
        if why := strides.reads_strides(node, modules, escapes=bool(run[1])):
            seen.strided.setdefault(layer, why)


def _made(
    node: fx.Node, versions: Mapping[fx.Node, int], modules: Mapping[str, nn.Module]
) -> tuple[Hashable, Hashable, tuple[str, ...]]:
    """A tensor by what it was made of: its identity, its version and the activations."""
    input = node.args[0] if len(node.args) == 1 else None
    if node.op != "call_module" or node.kwargs or not isinstance(input, fx.Node):
        return node.name, 0, ()
    step = activation.step_of(modules[str(node.target)])
    if step is None:
        return node.name, 0, ()
    identity, version, activations = _made(input, versions, modules)
    return (identity, step), (version, versions[node]), (*activations, str(node.target))
