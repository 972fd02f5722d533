"""Passes say what they take."""

import pytest
import torch
from torch import fx, nn

from conjoin import passes

PASSES = [each for each in map(vars(passes).get, passes.__all__) if isinstance(each, type)]


@pytest.mark.parametrize("function", [*(each() for each in PASSES), passes.rewrite])
def test_what_is_no_graph_module_is_refused(function):
    graph = fx.symbolic_trace(nn.ReLU()).graph
    program = torch.export.export(nn.ReLU(), (torch.ones(2),))
    for given, name in ((nn.ReLU(), "ReLU"), (graph, "Graph"), (None, "None"), (program, "Export")):
        with pytest.raises(TypeError, match=rf"a torch\.fx\.GraphModule, not {name}.* Trace the"):
            function(given)
