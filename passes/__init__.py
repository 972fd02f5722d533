"""The rewrites, one file a pass, and the order in which they run.

Each pass is a `PassBase` of torch.fx: it takes an `fx.GraphModule`, changes its graph in place and
gives a `PassResult`. So each works alone, and in a `PassManager` beside passes of other authors.
"""

from collections.abc import Sequence

from torch import fx
from torch.fx.passes.infra.pass_base import PassBase

from conjoin import merging
from conjoin.graph import bundles, rewriting
from conjoin.passes.batch import Batch
from conjoin.passes.cancel import Cancel
from conjoin.passes.join import Join
from conjoin.passes.lift import Lift
from conjoin.passes.rejoin import Rejoin
from conjoin.passes.separate import Separate
from conjoin.passes.share import Share
from conjoin.passes.sink import Sink
from conjoin.passes.stack import Stack
from conjoin.passes.towers import Towers
from conjoin.passes.widen import Widen

PIPELINE: tuple[PassBase, ...] = (Share(), Batch(), Widen(), Sink(), Towers(), Cancel())
"""The passes in their order."""

COMPILED: tuple[PassBase, ...] = (Share(), Rejoin(), Sink(), Cancel())
"""Those for graphs of `torch.compile`, in which layers are functions already."""

AT_EACH_CALL: tuple[PassBase, ...] = (Join(), Stack(), Sink(), Cancel())
"""Those that come after them, for what `optimize` has not merged."""


def rewrite(graph_module: fx.GraphModule) -> bool:
    """Runs the pipeline until no pass finds anything more to do; whether any did.

    What comes of it is right in training and in evaluation mode.

    Args:
        graph_module: the graph with the modules that it calls, changed in place.

    Raises:
        TypeError: it is no GraphModule.
        ValueError: the graph does not lint.

    Example:
        >>> import torch, conjoin
        >>> from conjoin.passes import rewrite
        >>> heads = conjoin.nn.Parallel(torch.nn.Linear(8, 2), torch.nn.Linear(8, 3))
        >>> traced = torch.fx.symbolic_trace(torch.nn.Sequential(heads))
        >>> rewrite(traced), [n.target for n in traced.graph.nodes if n.op == "call_module"]
        (True, ['0.0.wide'])
    """
    rewriting.check_type(graph_module)
    rewriting.check(graph_module)
    before = {*graph_module.graph.nodes}
    with merging.of_graph(graph_module), rewriting.in_training(graph_module):
        changed = rewrite_traced(graph_module)
        if changed:
            merging.tell(graph_module)
    if changed:
        rewriting.finish(graph_module, before)
    return changed


def rewrite_traced(graph_module: fx.GraphModule) -> bool:
    """The same for a graph that was traced just now, in the mode that it was traced in.

    Args:
        graph_module: the graph with the modules that it calls, changed in place; it is not checked.
    """
    changed = run_all(graph_module, PIPELINE)
    bundles.note_carried(graph_module)
    return changed


def run_all(graph_module: fx.GraphModule, passes: Sequence[PassBase]) -> bool:
    """Runs passes in turn until none finds anything more to do; whether any did.

    Args:
        graph_module: the graph with the modules that it calls, changed in place; it is not checked
            before, and linted and compiled after.
        passes: the passes, such as `PIPELINE` or `COMPILED`.
    """
    changed = False
    while _run_once(graph_module, passes):
        changed = True
    if changed:
        graph_module.graph.lint()
        graph_module.recompile()
    return changed


def _run_once(graph_module: fx.GraphModule, passes: Sequence[PassBase]) -> bool:
    # Not the pass itself, which would check and compile each time.
    results = [each.call(graph_module) for each in passes]
    return any(result is not None and result.modified for result in results)


__all__ = [
    "AT_EACH_CALL",
    "COMPILED",
    "PIPELINE",
    "Batch",
    "Cancel",
    "Join",
    "Lift",
    "Rejoin",
    "Separate",
    "Share",
    "Sink",
    "Stack",
    "Towers",
    "Widen",
    "rewrite",
    "rewrite_traced",
    "run_all",
]
