"""fx graphs: calls of layers, which of these are siblings, and what a rewrite may do."""
