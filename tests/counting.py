"""Counts the operations of a call of a model, by what they are for.

`conjoin.launches` counts how many kernels a step starts; this tells which, so that a test can say
what must have become of a model: two convolutions less, one norm instead of three, no cat.
"""

import collections
import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

GROUPS = {
    "matmuls": "addmm mm bmm baddbmm addbmm mv addmv dot linear _grouped_mm _addmm_activation",
    "convolutions": "convolution _convolution mkldnn_convolution convolution_overrideable "
    "cudnn_convolution _slow_conv2d_forward slow_conv3d_forward",
    "attentions": "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention",
    "norms": "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_functional "
    "_batch_norm_with_update _batch_norm_no_update cudnn_batch_norm native_group_norm "
    "native_layer_norm _fused_rms_norm",
    "activations": "relu relu_ gelu gelu_ silu silu_ sigmoid sigmoid_ tanh tanh_ elu elu_ mish "
    "leaky_relu leaky_relu_ softplus hardtanh hardtanh_ hardswish hardswish_ threshold",
    "softmaxes": "_softmax _log_softmax",
    "pools": "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d max_pool3d_with_indices "
    "avg_pool3d _adaptive_avg_pool3d adaptive_max_pool2d",
    "embeddings": "embedding _embedding_bag _embedding_bag_forward_only",
    "dropouts": "native_dropout bernoulli bernoulli_",
    "joins": "cat stack _foreach_copy_",
    "splits": "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk "
    "unbind split_copy split_with_sizes_copy",
    "copies": "clone copy_ copy _to_copy contiguous",
}
"""The operations of a group, by the names that they are dispatched with."""

GROUP_OF = {name: group for group, names in GROUPS.items() for name in names.split()}


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many operations of each group a forward pass ran; `others` has the rest by name."""

    matmuls: int = 0
    convolutions: int = 0
    attentions: int = 0
    norms: int = 0
    activations: int = 0
    softmaxes: int = 0
    pools: int = 0
    embeddings: int = 0
    dropouts: int = 0
    joins: int = 0
    splits: int = 0
    copies: int = 0
    others: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def products(self) -> int:
        """Matmuls and convolutions: whether a pass made one or the other is its own affair."""
        return self.matmuls + self.convolutions


class OperationCounter(TorchDispatchMode):
    """Notes the name of each operation that is dispatched."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.names: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet = func.overloadpacket if isinstance(func, OpOverload) else func
        self.names[packet.__name__] += 1
        return func(*args, **(kwargs or {}))

    def counts(self) -> Counts:
        grouped: collections.Counter[str] = collections.Counter()
        others = {}
        for name, number in self.names.items():
            if name in GROUP_OF:
                grouped[GROUP_OF[name]] += number
            else:
                others[name] = number
        return Counts(**grouped, others=others)


def count(
    model: nn.Module, args=(), kwargs=None, *, training: bool = False, method: str | None = None
) -> Counts:
    """The operations of one forward pass of a copy of the model, with gradients.

    Args:
        model: what to call.
        args: the positional arguments, which are copied.
        kwargs: the keyword arguments.
        training: the mode.
        method: what to call instead of the model itself.
    """
    model, args, kwargs = copy.deepcopy((model, args, dict(kwargs or {})))
    model.train(training)
    call = getattr(model, method) if method else model
    with torch.random.fork_rng(), OperationCounter() as counter:
        call(*args, **kwargs)
    return counter.counts()
