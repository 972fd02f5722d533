"""The entries of a node's `meta` that hold the node's value, as a fake tensor."""

VALUE = "val"
"""In graphs of `torch.export` and `make_fx`."""

EXAMPLE = "example_value"
"""In those of Dynamo."""
