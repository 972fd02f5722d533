"""`torch.compile(model, backend="conjoin")`, and the same as a pass for stock Inductor."""

from __future__ import annotations

import collections
import functools
import operator
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.weak import WeakIdKeyDictionary

from conjoin.graph import bundles, edit, elementwise, hazards, strides
from conjoin.passes import COMPILED, rejoin, run_all, share

BACKEND = "backend"
"""The option that names what compiles the rewritten graph."""


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compiles a graph in which the siblings of an optimized model are wide layers again.

    It is registered with `torch.compile` under the name `"conjoin"`.

    Args:
        graph_module: what Dynamo captured; it is changed in place.
        example_inputs: the inputs that it was captured with.
        mode: as for `torch.compile`.
        options: as for `torch.compile`, those of the inner backend; `"backend"` among them is that
            backend, a name or a function, and Inductor where it is not given.

    Returns:
        The compiled graph.

    Example:
        >>> import torch, conjoin
        >>> model = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> x = torch.randn(4, 8)
        >>> fused = conjoin.optimize(model, (x,))
        >>> options = {"backend": "eager"}
        >>> compiled = torch.compile(fused, backend="conjoin", options=options)
        >>> [tuple(part.shape) for part in compiled(x)]
        [(4, 2), (4, 3)]
    """
    inner = dict(options or {})
    compiler = inner.pop(BACKEND, "inductor")
    run_all(graph_module, COMPILED)
    missed = _unmerged(graph_module, example_inputs)
    if any(weight not in _told for weight in missed):
        _told.update(dict.fromkeys(missed))
        warnings.warn(
            f"{len(missed)} layers of the compiled model read what another like layer reads too. "
            "conjoin.optimize(model) before torch.compile may merge such layers once, where their "
            "weights would have to be joined in each call here; conjoin.report(model) tells which.",
            stacklevel=2,
        )
    wrapper: Any = torch._TorchCompileInductorWrapper
    if compiler != "inductor":
        wrapper = functools.partial(torch._TorchCompileWrapper, compiler)
    compiled: Callable[..., Any] = wrapper(mode, inner, None)(graph_module, example_inputs)
    return compiled


class PreGradPass(CustomGraphPass):
    """What the backend does, for `torch._inductor.config.pre_grad_custom_pass`.

    Example:
        >>> import torch
        >>> from conjoin.compiling import PreGradPass
        >>> with torch._inductor.config.patch(pre_grad_custom_pass=PreGradPass()):
        ...     compiled = torch.compile(torch.nn.Linear(8, 2))
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Changes a graph in place."""
        owner = graph.owning_module
        run_all(fx.GraphModule(nn.Module(), graph) if owner is None else owner, COMPILED)

    def uuid(self) -> str:
        """What Inductor's cache knows this version of the pass by."""
        return str(get_hash_for_files(tuple(module.__file__ for module in SOURCES)))


SOURCES = (bundles, edit, elementwise, hazards, strides, rejoin, share)
"""The modules that decide what becomes of a graph."""


_told: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The weights of which it has been said that their layers might have been merged."""


def _unmerged(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Tensor]:
    """The weights of the products that read what another like it reads, with its own weight."""
    graph = graph_module.graph
    inputs = (node for node in graph.nodes if node.op == "placeholder")
    held = dict(zip(inputs, example_inputs, strict=True))
    siblings: dict[Hashable, set[fx.Node]] = collections.defaultdict(set)
    for node in graph.nodes:
        if not rejoin.is_product(node):
            continue
        weight = edit.arguments(node, rejoin.PARAMETERS)["weight"]
        if weight.op == "get_attr":
            held[weight] = operator.attrgetter(weight.target)(graph_module)
        if weight in held:
            siblings[rejoin.settings(node)].add(weight)
    return [held[weight] for group in siblings.values() if len(group) > 1 for weight in group]
