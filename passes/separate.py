"""Wide layers become their siblings again: the reverse of the other passes.

    y = wide(x);  z = f(y);  z_1, z_2 = split(z)
                                becomes        z_1 = f(a(x));  z_2 = f(b(x))

It is for export and for reading: the graph calls the layers at their own names, and these are
plain layers with the values of now. What was computed for all branches at once is computed for
each, and what was cut off a joint is joined again. It is in no pipeline, and undoes one.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from conjoin.graph.bundles import batched
from conjoin.graph.rewriting import Rewrite
from conjoin.graph.separation import Separation, all_modules, separable
from conjoin.layers import activation
from conjoin.layers.enclosing import unmark
from conjoin.layers.releasing import release
from conjoin.layers.view import View, wides
from conjoin.layers.wide import Wide


class Separate(Rewrite):
    """Gives the graph and its modules the separate layers back.

    A wide layer stays as it is where not all of its views stand in the graph's module, or where a
    call of it reads something that is not known to be the branches' values. Equal operations on
    one tensor that `Share` made one stay one.
    """

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Changes the graph in place, and makes views plain layers."""
        graph, modules = graph_module.graph, all_modules(graph_module)
        names = separable(graph_module, modules)
        if not names and not any(node.target is batched for node in graph.nodes):
            return PassResult(graph_module, False)
        Separation(graph, modules, names).run()
        for wide, found in names.items():
            _release(graph_module, wide, found)
        if not wides(graph_module):
            for module in graph_module.modules():
                activation.forget(module)
        return PassResult(graph_module, True)


def _release(graph_module: fx.GraphModule, wide: Wide, names: Iterable[str]) -> None:
    """Makes the views of a wide layer plain layers, and forgets where it was noted."""
    for name in names:
        view = graph_module.get_submodule(name)
        if isinstance(view, View):
            release(view)
    for module in graph_module.modules():
        unmark(module, wide.identity)
