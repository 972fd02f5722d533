"""What is known of a node's value: that it is a tensor, or that it is not None."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from conjoin.layers.subclass import plain_class
from conjoin.tracing.proxies import unpack

SEVERAL = frozenset(
    "MultiheadAttention LSTM GRU RNN RNNBase LSTMCell Transformer TransformerEncoder "
    "TransformerDecoder TransformerEncoderLayer TransformerDecoderLayer Parallel Split "
    "AdaptiveLogSoftmaxWithLoss".split()
)
"""Modules of PyTorch's or conjoin's that may give something else than one tensor."""

NOT_TENSORS = frozenset(
    "multi_head_attention_forward names size stride dim numel shape dtype device ndim nelement "
    "layout element_size ndimension tolist item is_contiguous split chunk unbind unsafe_split "
    "unsafe_split_with_sizes split_with_sizes tensor_split hsplit vsplit dsplit max min sort topk "
    "kthvalue mode median nanmedian cummax cummin aminmax unique unique_consecutive nonzero qr "
    "svd eigh eig slogdet frexp lstm gru rnn_tanh rnn_relu broadcast_tensors meshgrid where "
    "histogramdd std_mean var_mean type is_floating_point is_complex is_signed is_nonzero "
    "storage_offset get_device allclose equal is_same_size adaptive_max_pool2d max_pool2d "
    "max_pool1d max_pool3d adaptive_max_pool1d adaptive_max_pool3d fractional_max_pool2d "
    "fractional_max_pool3d histogram geqrf lu triangular_solve lstsq cov_names align_tensors "
    "promote_types result_type broadcast_shapes get_num_threads atleast_1d atleast_2d atleast_3d "
    "tensordot_names einsum_names native_layer_norm batch_norm_stats _unpack_dual gradient "
    "_assert".split()
)
"""Functions and methods that may give something else than one tensor."""

OPERATORS: frozenset[Any] = frozenset(
    getattr(operator, name)
    for name in (
        "add sub mul truediv floordiv mod pow matmul neg pos invert and_ or_ xor lshift rshift "
        "iadd isub imul itruediv ifloordiv imod ipow imatmul iand ior ixor ilshift irshift "
        "eq ne lt gt le ge"
    ).split()
)
"""Operators that give a tensor if one of their operands is one."""


def is_tensor(node: fx.Node, modules: Mapping[nn.Module, str]) -> bool:
    """Whether a node is known to stand for a tensor; arguments are looked at on each call."""
    if node.op in ("placeholder", "get_attr"):
        return True
    if node.op == "call_module":
        path = str(node.target)
        return any(_gives_tensor(module) for module, at in modules.items() if at == path)
    if node.target is operator.getitem:
        return _is_tensor_input(node, modules)
    if node.op == "call_function" and node.target in OPERATORS:
        return any(is_tensor(input, modules) for input in node.all_input_nodes)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if name in NOT_TENSORS or node.target in (getattr, unpack, operator.setitem):
        return False
    if node.op == "call_method":
        return _is_tensor_input(node, modules)
    return _of_torch(node.target)


def is_not_none(node: fx.Node, modules: Mapping[nn.Module, str]) -> bool:
    """Whether a node is known to stand for something else than None."""
    if node.op == "call_module":
        return is_tensor(node, modules)
    if node.target is operator.getitem:
        first = node.args[0]
        return isinstance(first, fx.Node) and is_not_none(first, modules)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name not in ("multi_head_attention_forward", "names", "_assert")


def _is_tensor_input(node: fx.Node, modules: Mapping[nn.Module, str]) -> bool:
    first = node.args[0] if node.args else None
    return isinstance(first, fx.Node) and is_tensor(first, modules)


def _gives_tensor(module: nn.Module) -> bool:
    cls = plain_class(module)
    named = cls.__module__.startswith(("torch.nn.modules.", "conjoin.nn"))
    several = getattr(module, "return_indices", False) or cls.__name__ in SEVERAL
    return named and not several and not isinstance(module, (nn.Sequential, nn.ModuleList))


def _of_torch(target: Any) -> bool:
    name = getattr(target, "__name__", "")
    return any(getattr(space, name, None) is target for space in (torch, F))
