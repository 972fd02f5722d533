"""The rewrites, one file a pass, and the order in which they run."""

from conjoin.passes.widen import widen

PIPELINE = (widen,)
"""The passes in their order.

Each takes a graph and the modules that it calls. It gives None where it changed nothing, and else
the targets of modules that the result relies on to stay as they are.
"""

__all__ = ["PIPELINE", "widen"]
