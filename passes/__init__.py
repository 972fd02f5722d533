"""The rewrites, one file a pass, and the order in which they run."""

from conjoin.passes.widen import widen

PIPELINE = (widen,)
"""The passes in their order. Each takes a graph and its modules and tells how much it changed."""

__all__ = ["PIPELINE", "widen"]
