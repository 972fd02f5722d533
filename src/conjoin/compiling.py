"""`torch.compile(model, backend="conjoin")`, and the same as a pass for stock Inductor."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.utils.weak import WeakIdKeyDictionary

import conjoin
from conjoin import passes
from conjoin.graph import hazards
from conjoin.passes import AT_EACH_CALL, COMPILED, join, run_all

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

    Raises:
        TypeError: `options` is no dict, or the backend among them is no name and no function;
            `torch.compile` wraps it.

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
    if not isinstance(options, (dict, type(None))):
        raise TypeError(
            "options is a dict of the inner backend's options, such as {'backend': 'aot_eager'}, "
            f"not {options!r}."
        )
    inner = dict(options or {})
    compiler = inner.pop(BACKEND, "inductor")
    if not isinstance(compiler, str) and not callable(compiler):
        raise TypeError(
            f"options['backend'] is the name of a backend of torch.compile, or a function, not "
            f"{compiler!r}. Leave it out to have Inductor."
        )
    for each in _bodies(graph_module):
        run_all(each, COMPILED)
    found = join.groups(graph_module)
    run_all(graph_module, AT_EACH_CALL)
    _tell(graph_module, found, example_inputs)
    wrapper: Any = torch._TorchCompileInductorWrapper
    if compiler != "inductor":
        wrapper = functools.partial(torch._TorchCompileWrapper, compiler)
    compiled: Callable[..., Any] = wrapper(mode, inner, None)(graph_module, example_inputs)
    return compiled


CHECKPOINT = "tag_activation_checkpoint"
"""The operation that `torch.utils.checkpoint` is in a graph; the first thing it is given is one."""


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
        module = fx.GraphModule(nn.Module(), graph) if owner is None else owner
        for each in _bodies(module):
            run_all(each, COMPILED)
        run_all(module, AT_EACH_CALL)

    def uuid(self) -> str:
        """What Inductor's cache knows this version of the pass by."""
        return str(get_hash_for_files(sources()))


def _bodies(graph_module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph, after those of the checkpoints in it, which compute what they say in any case."""
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and hazards.called(node) == CHECKPOINT:
            body: Any = graph_module.get_submodule(str(node.all_input_nodes[0].target))
            yield from _bodies(body)
    yield graph_module


@functools.cache
def sources() -> tuple[str, ...]:
    """The files that decide what becomes of a graph: all of this library's, to miss none."""
    folders = {Path(str(package.__file__)).resolve().parent for package in (conjoin, passes)}
    files = {file.resolve() for folder in folders for file in folder.rglob("*.py")}
    return tuple(sorted(map(str, files)))


_told: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The weights of which it has been said that their layers might have been merged."""


def _tell(
    graph_module: fx.GraphModule, found: Sequence[join.Joinable], example_inputs: Sequence[Any]
) -> None:
    """Says what `optimize` would have gained, once for each weight."""
    missed = [group for group in found if group.figures is None or group.figures.misses]
    inputs = (node for node in graph_module.graph.nodes if node.op == "placeholder")
    held = dict(zip(inputs, example_inputs, strict=True))
    weights = [held[product.weight] for group in missed for product in group.products]
    if all(weight in _told for weight in weights):
        return
    _told.update(dict.fromkeys(weights))
    known = [group.figures for group in missed if group.figures is not None]
    now, then = sum(each.now for each in known), sum(each.whole for each in known)
    share = f", for {then / now:.0%} of the time by an estimate" if known else ""
    joined = sum(len(group.products) for group in missed if group.figures and group.figures.pays)
    warnings.warn(
        f"{len(weights)} layers of the compiled model read what another like layer reads too, and "
        f"{joined} of them run as wide layers, whose weights are joined in each call. "
        f"conjoin.optimize(model) before torch.compile may merge such layers once{share}; "
        "conjoin.report(model) tells which.",
        stacklevel=3,
    )
