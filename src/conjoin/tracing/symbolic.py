"""Siblings by symbolic tracing, for a model without example inputs.

The model is traced from the root down. Where a module does not trace (it branches on values,
iterates over a tensor, gives back an object of its own), each of its children is traced by
itself, so that siblings inside them are found all the same, and the report says what was left.

The graph serves to *find* siblings only: whatever it got wrong, a group of like layers is exact
whenever it runs, because it shares a call only where the inputs are the very same.
"""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from conjoin.graph import hazards
from conjoin.graph.site import Sightings, Site, Untraced
from conjoin.layers import Kind, kind_of
from conjoin.tracing import regions
from conjoin.tracing.proxies import Proxy, arguments
from conjoin.tracing.undisturbed import undisturbed

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

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Proxies for the arguments without a default; Python itself fills in the others."""
        return root_fn, arguments(self)

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


def trace(model: nn.Module, kinds: tuple[Kind, ...]) -> Sightings:
    """What symbolic traces of the model, or of its parts, show.

    Args:
        model: the model; it stays as it is.
        kinds: the kinds of layer to look for.

    Returns:
        The sites, the stride-sensitive layers, and the modules that could not be traced.
    """
    sites: list[Site] = []
    strided: dict[str, str] = {}
    untraced: list[Untraced] = []
    with undisturbed(model), regions.suspended(model), _NoSideEffects():
        pending = [("", model)]
        seen: set[nn.Module] = set()
        while pending:
            name, module = pending.pop(0)
            if module in seen or kind_of(module, kinds) is not None:
                continue
            seen.add(module)
            if not isinstance(module, CONTAINERS) and any(True for _ in module.children()):
                try:
                    graph = _Tracer(kinds).trace(module)
                except Exception as error:  # noqa: BLE001 - The model's own code, which may raise anything.
                    untraced.append(Untraced(name, _why(error)))
                else:
                    _note(graph, name, module, kinds, sites, strided)
                    continue
            prefix = f"{name}." if name else ""
            pending += [(prefix + child, m) for child, m in module.named_children()]
    return Sightings(tuple(sites), strided, tuple(untraced))


def _note(
    graph: fx.Graph,
    name: str,
    root: nn.Module,
    kinds: tuple[Kind, ...],
    sites: list[Site],
    strided: dict[str, str],
) -> None:
    """Adds what one graph shows."""
    prefix = f"{name}." if name else ""
    modules = dict(root.named_modules())
    versions = hazards.versions(graph, modules)
    for node in graph.nodes:
        if node.op != "call_module" or kind_of(modules[node.target], kinds) is None:
            continue
        layer = prefix + node.target
        input = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        if isinstance(input, fx.Node):
            sites.append(Site(layer, (name, input.name), versions[node]))
        if why := hazards.reads_strides(node, escapes=bool(name)):
            strided.setdefault(layer, why)


def _why(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
