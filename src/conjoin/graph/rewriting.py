"""What every pass does before and after it changes a graph: lint it, and complete its metadata.

A new node has what its neighbours know of where it comes from (`stack_trace`, `nn_module_stack`,
keys of the user's own), and of the shapes of values only what is true: where a graph has fake
values, they are computed anew, and otherwise a new node has none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from conjoin.graph.meta import EXAMPLE, VALUE, is_of_dynamo
from conjoin.layers.view import views
from conjoin.tracing.keeping import KeepingTensors

VALUES = frozenset(
    "val tensor_meta example_value type tensor_dict unbacked_bindings original_aten from_node "
    "eager_input_vals arg_kwarg_vals source_fn_stack torch_fn partitioner_tag".split()
)
"""Entries of a node's `meta` that tell of its value, or of its operation, and not of its place."""


class Rewrite(PassBase):
    """A pass that can be called by itself: it checks the graph, and leaves it compiled."""

    def __call__(self, graph_module: fx.GraphModule) -> PassResult | None:
        """Changes the graph in place.

        Raises:
            TypeError: it is no GraphModule.
            ValueError: the graph does not lint.
        """
        check_type(graph_module)
        before = {*graph_module.graph.nodes}
        with in_training(graph_module):
            result = super().__call__(graph_module)
        if result is not None and result.modified:
            finish(graph_module, before)
        return result

    def requires(self, graph_module: fx.GraphModule) -> None:
        """Refuses a graph that does not lint."""
        check(graph_module)


def check_type(graph_module: object) -> None:
    """Raises TypeError where what is to be rewritten is no GraphModule."""
    if not isinstance(graph_module, fx.GraphModule):
        raise TypeError(
            f"expected a torch.fx.GraphModule, not {type(graph_module).__name__}. Trace the model "
            "first, as with torch.fx.symbolic_trace(model), or use conjoin.optimize."
        )


def check(graph_module: fx.GraphModule, name: str = "") -> None:
    """Refuses a graph that does not lint.

    Args:
        graph_module: the module of the graph.
        name: its qualified name in the model; empty for the model itself.

    Raises:
        ValueError: it does not lint.
    """
    try:
        graph_module.graph.lint()
    except (RuntimeError, AttributeError, TypeError, ValueError, KeyError) as error:
        of = f" of {name}" if name else ""
        why = " ".join(str(error).split())
        raise ValueError(
            f"the graph{of} is not sound, so it is left as it is: {why}. Mend it, so that "
            "graph.lint() passes, and try again."
        ) from error


class Draft(fx.GraphModule):
    """A module of a graph that is only rewritten: code of each would be kept for tracebacks."""

    def recompile(self) -> Any:
        """Makes no code of the graph."""


@contextlib.contextmanager
def in_training(graph_module: fx.GraphModule) -> Iterator[None]:
    """Puts the modules in training mode for a while.

    What may be done to a graph then may be done in evaluation mode too: a Dropout, which gives what
    it got there, draws numbers in training mode, in the order in which the graph has them.
    """
    flags = [(vars(module), module.training) for module in graph_module.modules()]
    for own, _ in flags:
        own["training"] = True
    try:
        yield
    finally:
        for own, flag in flags:
            own["training"] = flag
        for _, view in views(graph_module):  # What was merged meanwhile has the mode of this.
            view.wide_layer.training = view.training


def finish(graph_module: fx.GraphModule, before: Collection[fx.Node]) -> None:
    """Lints and compiles a changed graph, and completes the metadata of the new nodes.

    Args:
        graph_module: the module of the graph.
        before: the nodes that it had before it was changed.
    """
    graph = graph_module.graph
    new = [node for node in graph.nodes if node not in before]
    # Passes that know Dynamo's graphs leave no value but that of a node that another stands for.
    untrue = VALUES - {EXAMPLE} if is_of_dynamo(graph) else VALUES
    for node in new:
        node.meta = {key: value for key, value in node.meta.items() if key not in untrue}
    for node in reversed(new):
        reader = next((user for user in node.users if user.op != "output"), node)
        told = {key: value for key, value in reader.meta.items() if key not in VALUES}
        node.meta = {**told, **node.meta}
    graph.lint()
    graph_module.recompile()
    _recompute(graph_module)


def _recompute(graph_module: fx.GraphModule) -> None:
    """Computes the fake values of all nodes, if the inputs have any."""
    inputs = [n.meta.get(VALUE) for n in graph_module.graph.nodes if n.op == "placeholder"]
    mode = next((each.fake_mode for each in inputs if isinstance(each, FakeTensor)), None)
    if mode is None or any(each is None for each in inputs):
        return
    try:
        # Buffers are real: what changes one, and reads nothing else, would change it for real.
        # Without Python's dispatcher, products fix sizes that are open in PyTorch 2.11.
        with torch.no_grad(), KeepingTensors(), enable_python_dispatcher():
            FakeTensorProp(graph_module, mode).propagate_dont_convert_inputs(*inputs)
    except Exception:  # noqa: BLE001 - Whatever fake tensors do not carry: the new nodes have none.
        return
