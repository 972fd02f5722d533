"""Exported programs: raised to graphs that the passes know, rewritten, and lowered again."""

from conjoin.programs.program import is_current, merged_layers, optimize, unfuse

__all__ = ["is_current", "merged_layers", "optimize", "unfuse"]
