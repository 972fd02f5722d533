"""Exported programs: raised to what the passes know, rewritten, and lowered again."""
