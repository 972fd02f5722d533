"""Which groups are merged, and how wide: what pays, and what fits."""
