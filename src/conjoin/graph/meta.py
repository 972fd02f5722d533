"""Where a node's `meta` holds its value, as a fake tensor."""

VALUE = "val"
"""In graphs of `torch.export` and `make_fx`."""

EXAMPLE = "example_value"
"""In those of Dynamo."""
