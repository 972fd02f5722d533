"""The entries of a node's `meta` that hold the node's value, as a fake tensor."""

from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

VALUE = "val"
"""In graphs of `torch.export` and `make_fx`."""

EXAMPLE = "example_value"
"""In those of Dynamo."""


def is_wrapped(value: object) -> bool:
    """Whether a value is a functorch transform's, such as a batch that `vmap` goes through."""
    return isinstance(value, Tensor) and is_functorch_wrapped_tensor(value)


def storage_of(tensor: Tensor) -> int | None:
    """What a tensor lies in, as a number; None where a transform does not tell."""
    return None if is_wrapped(tensor) else tensor.untyped_storage()._cdata
