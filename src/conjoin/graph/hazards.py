"""What a node may change in place, also through an alias, and what else makes a rewrite wrong."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn import functional as F

from conjoin.layers.checks import FORWARDS, is_hooked
from conjoin.layers.subclass import plain_class
from conjoin.layers.view import View

VIEW_METHODS = frozenset(
    "view view_as expand expand_as permute transpose t swapaxes swapdims movedim moveaxis squeeze "
    "unsqueeze select narrow diagonal unfold unflatten unbind split chunk tensor_split hsplit "
    "vsplit dsplit detach alias as_strided real imag mT mH T H reshape reshape_as flatten ravel "
    "view_as_real view_as_complex broadcast_to broadcast_tensors atleast_1d atleast_2d atleast_3d "
    "positive cpu cuda contiguous to type float double half bfloat16 requires_grad_ "
    "type_as sum_to_size conj resolve_conj resolve_neg adjoint unsafe_split "
    "unsafe_split_with_sizes unsafe_chunk split_with_sizes unstack rejoined __getitem__ "
    "unpack slice _unsafe_view dropout feature_dropout alpha_dropout feature_alpha_dropout".split()
)
"""Methods, functions and ATen operations whose result may share memory with the input."""

VIEW_FUNCTIONS: frozenset[Any] = frozenset({operator.getitem, getattr, F.dropout, F.unfold})
"""Functions, beyond those named as a method above, whose result may share memory."""

DISTRIBUTIONS: frozenset[Any] = frozenset(
    {torch.distributions.Normal, torch.distributions.Categorical}
)
"""Classes whose objects hold the tensors that they were made of, and change none."""

WAYS_OUT = frozenset("numpy __array__ __dlpack__ data_ptr untyped_storage".split())
"""Methods that lead to the memory of a tensor, through which anything may change it."""

REBINDING = frozenset({"set_", "shallow_copy_data_"})
"""Methods that give a tensor the memory of another."""

MODES = (
    *("_set_", "_enter_", "_exit_", "_push_", "_pop_", "_saved_tensors_hooks"),
    *("_vmap_", "_grad_increment_", "_grad_decrement_", "_jvp_"),
)
"""What the names of functions begin with that set how what follows is computed."""

OF_PYTORCH = frozenset({"torch", "_operator", "builtins", "math", "conjoin", ""})
"""The packages of functions whose name tells what they do."""

INPLACE_OPERATORS: frozenset[Any] = frozenset(
    getattr(operator, name)
    for name in (
        "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift imatmul "
        "setitem delitem"
    ).split()
)
"""Python's operators that change their first argument."""

WRAPPERS = frozenset({"wrap_with_set_grad_enabled", "wrap_with_autocast"})
"""Operations of exported programs that run a graph of their own in another mode."""

DETACHING = frozenset({"detach", "detach_"})
"""Methods that no gradient goes past."""

DROPOUTS = frozenset("dropout feature_dropout alpha_dropout feature_alpha_dropout".split())
"""Functions of an input, a probability, and whether they do anything."""


def follow(
    graph: fx.Graph, modules: Mapping[str, nn.Module]
) -> tuple[dict[fx.Node, int], set[fx.Node]]:
    """Follows what a graph changes in place.

    A change through an alias counts, since an alias is a chain of operations that may share
    memory.

    Args:
        graph: the graph.
        modules: the modules that it calls, by target.

    Returns:
        For each node, how often its first input, or any weight, had been changed before; and the
        nodes whose values are changed.
    """
    root: dict[fx.Node, fx.Node] = {}
    changed: dict[fx.Node, int] = {}
    exposed: set[fx.Node] = set()
    weights = 0
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        first = first_input(node)
        root[node] = node
        found[node] = weights
        if first is not None:
            if root[first] in exposed:  # Nobody sees what has changed it since.
                changed[root[first]] = changed.get(root[first], 0) + 1
            found[node] += changed.get(root[first], 0)
            if shares_memory(node, modules):
                root[node] = root[first]
        for input in written(node, modules):
            changed[root[input]] = changed.get(root[input], 0) + 1
            constant = str(root[input].target).startswith("_tensor_constant")
            weights += root[input].op == "get_attr" and not constant
        if called(node) in WAYS_OUT | REBINDING:
            exposed.update(root[input] for input in node.all_input_nodes)
    return found, {*changed}


def first_input(node: fx.Node) -> fx.Node | None:
    """The node that a node works on: its first argument, if that is one, or whatever it reads."""
    if node.args and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return next(iter(node.all_input_nodes), None)


def shares_memory(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the result of a node may share memory with its first input."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return bool(getattr(module, "inplace", False)) or isinstance(
            module, (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
        )
    if node.op == "call_method":
        return node.target in VIEW_METHODS or is_inplace_name(str(node.target))
    if node.op == "call_function":
        name = called(node)
        return (
            node.target in VIEW_FUNCTIONS
            or node.target in DISTRIBUTIONS
            or name in VIEW_METHODS
            or isinstance(node.target, HigherOrderOperator)
            or writes(node, modules)
        )
    return False


def passes_on(node: fx.Node) -> bool:
    """Whether a node gives its input itself, as dropout does in evaluation mode.

    On fake tensors it gives a copy.
    """
    known = node.op == "call_function" and called(node) in DROPOUTS and of_torch(node.target)
    given = [*node.args[1:3], *(node.kwargs.get(name) for name in ("p", "training", "train"))]
    return known and bool(node.args) and any(each is False or each == 0 for each in given)


def written(node: fx.Node, modules: Mapping[str, nn.Module]) -> Iterator[fx.Node]:
    """The inputs that a node changes in place, or may change where nothing is known of it."""
    first = first_input(node)
    if node.op == "call_module":
        module = modules[str(node.target)]
        if is_opaque(module):
            yield from node.all_input_nodes
        elif first is not None and _works_in_place(module):
            yield first
        return
    if node.op == "call_function" and not of_torch(node.target):
        if not _runs_pure_graph(node):
            yield from node.all_input_nodes
        return
    if node.op not in ("call_method", "call_function"):
        return
    out = node.kwargs.get("out")
    yield from (
        n for n in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(n, fx.Node)
    )
    name = called(node)
    inplace = (
        node.target in INPLACE_OPERATORS
        or is_inplace_name(name)
        or bool(node.kwargs.get("inplace", False))
        or name in WAYS_OUT
    )
    if inplace and first is not None:
        yield first


def writes(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node changes an input in place, or may change one."""
    return any(True for _ in written(node, modules))


def _works_in_place(module: nn.Module) -> bool:
    if isinstance(module, View):
        return False
    inside = module.modules() if module._modules else (module,)
    return any(getattr(inner, "inplace", False) for inner in inside)


def is_pure(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node is known to change nothing: not its inputs, and nothing else.

    Drawing random numbers counts as pure, since no layer that is merged draws any.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return True
    if node.op == "call_module":
        return not is_opaque(modules[str(node.target)]) and not writes(node, modules)
    name = called(node)
    known = node.op == "call_method" or of_torch(node.target) or _runs_pure_graph(node)
    return (
        known
        and not writes(node, modules)
        and not name.startswith(("_foreach", "__i", *MODES))
        and name not in ("setattr", "apply", "backward")
    )


def _runs_pure_graph(node: fx.Node) -> bool:
    """Whether a node runs a graph that is known to change nothing, and does nothing else."""
    target, owner = node.target, node.graph.owning_module
    if not isinstance(target, HigherOrderOperator) or str(target) not in WRAPPERS:
        return False
    read = [each for each in node.all_input_nodes if each.op == "get_attr"]
    graphs = [getattr(owner, str(each.target), None) for each in read]
    inner = [graph for graph in graphs if isinstance(graph, fx.GraphModule)]
    nodes = [each for graph in inner for each in graph.graph.nodes]
    return bool(inner) and all(each.op != "call_module" and is_pure(each, {}) for each in nodes)


def is_opaque(module: nn.Module) -> bool:
    """Whether a module may do anything to its input: it is not known, or has hooks."""
    if isinstance(module, View):  # Its wide layer is conjoin's own.
        return not _is_known(module)
    inside = module.modules() if module._modules else (module,)
    return any(not _is_known(inner) for inner in inside)


def _is_known(module: nn.Module) -> bool:
    cls = plain_class(module)
    known = cls in FORWARDS or cls.__module__.startswith(("torch.nn.", "conjoin."))
    return known and not is_hooked(module)


def is_inplace_name(name: str) -> bool:
    """Whether a method of this name changes its tensor, as PyTorch's are named."""
    return name.endswith("_") and not name.endswith("__") and name != "requires_grad_"


def is_seen(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether somebody may change a value in place: a node that reads it, or who gets it."""
    for user in node.users:
        if user.op == "output" or not is_pure(user, modules):
            return True
        if shares_memory(user, modules) and is_seen(user, modules):
            return True
    return False


def trained(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> set[fx.Node]:
    """The nodes whose values a gradient may come back to.

    None does where gradients are off, nor from what is detached only.
    """
    without: set[fx.Node] = set()
    enabled = True
    for node in graph.nodes:
        if node.target is torch._C._set_grad_enabled:
            enabled = node.args[0] is not False
        if not enabled or called(node) in DETACHING:
            without.add(node)
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        ends = node.op == "output" or not is_pure(node, modules)
        if ends or (node in found and node not in without):
            found.update(node.all_input_nodes)
    return found - without


def called(node: fx.Node) -> str:
    """The name of the method or function that a node calls, without an overload's."""
    if isinstance(node.target, str):
        return node.target
    return str(getattr(node.target, "__name__", "")).split(".")[0]


def of_torch(target: Callable[..., Any] | str) -> bool:
    """Whether a function is PyTorch's or Python's own, so that its name tells what it does."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        return packet._qualified_op_name.split("::")[0] in ("aten", "prims")
    if isinstance(target, HigherOrderOperator):  # What it calls may be anybody's.
        return False
    module = getattr(target, "__module__", None) or ""
    return module.split(".")[0] in OF_PYTORCH
