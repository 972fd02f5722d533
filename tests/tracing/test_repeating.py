"""Fake tensors that come at once are those that PyTorch gives."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F

from conjoin.tracing.repeating import RepeatingFakeTensorMode, device_of

OPERATIONS = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "without bias": lambda x, w, b: F.linear(x, w),
    "transposed": lambda x, w, b: w.t(),
    "of a slice": lambda x, w, b: w[1:, 2:].t(),
    "flat": lambda x, w, b: x.flatten(0, 1),
    "another order": lambda x, w, b: x.permute(2, 0, 1) * 2,
    "activations": lambda x, w, b: F.gelu(torch.sigmoid(x) + F.silu(x)).tanh(),
    "softmax": lambda x, w, b: x.softmax(-1) @ w.mT,
    "numbers": lambda x, w, b: (x * 2 + 1.5) / 3 - True,
    "convolution": lambda x, w, b: F.conv1d(x, w[:, : x.shape[1], None], b, padding=1),
    "norm": lambda x, w, b: F.layer_norm(x, x.shape[-1:]),
    "another type": lambda x, w, b: (x > 0).to(torch.int64).sum(-1) + x.double().sum(-1).long(),
    "complex": lambda x, w, b: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)))),
    "joined": lambda x, w, b: torch.cat([x, x.detach()], 1),
    "detached": lambda x, w, b: x.detach() + x[1:, 2:].detach().sum(),
    "expanded": lambda x, w, b: b.expand(3, -1).clone(),
    "new": lambda x, w, b: x.new_zeros(3) + torch.ones(3),
    "in place": lambda x, w, b: (x * 1).add_(1).mul_(b[0]),
    "random": lambda x, w, b: F.dropout(x, 0.5) + torch.rand_like(x),
    "no view by its schema": lambda x, w, b: torch.ops.aten._unsafe_view(x, [8, -1]),
    "parts": lambda x, w, b: x.split([1, 3], 1)[1].contiguous(),
}


def arguments(mode, *, channels=6, dtype=torch.float32, requires_grad=True):
    x = torch.randn(2, 4, channels, dtype=dtype)
    w = nn.Parameter(torch.randn(4, channels, dtype=dtype), requires_grad)
    b = nn.Parameter(torch.randn(4, dtype=dtype), requires_grad)
    return [mode.from_tensor(tensor, static_shapes=True) for tensor in (x, w, b)]


def facts(tensor, given):
    """All that can be told of a fake tensor."""
    memory = tensor.untyped_storage()
    return (
        type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype,
        tensor.device, tensor.requires_grad, tensor.is_leaf, memory.nbytes(),
        tensor._is_view(), type(tensor.grad_fn), tensor.is_inference(),
        None if tensor.is_inference() else tensor._version,
        [memory._cdata == other.untyped_storage()._cdata for other in given],
    )  # fmt: skip


SETTINGS = {
    "usual": {},
    "frozen": {"requires_grad": False},
    "double": {"dtype": torch.float64},
    "wider": {"channels": 8},
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_as_pytorch_has_it(operation):
    ours, theirs = RepeatingFakeTensorMode(), FakeTensorMode(allow_non_fake_inputs=True)
    for _ in range(3):
        for settings in SETTINGS.values():
            found = []
            for mode in (ours, theirs):
                given = arguments(mode, **settings)
                with mode:
                    output = operation(*given)
                    found.append(facts(output, given))
                    if output.requires_grad:
                        output.sum().backward()
                    found[-1] += tuple(
                        None if each.grad is None else facts(each.grad, given) for each in given
                    )
            assert found[0] == found[1]


@pytest.mark.parametrize("entered", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes(entered):
    ours, theirs = RepeatingFakeTensorMode(), FakeTensorMode(allow_non_fake_inputs=True)
    operation = OPERATIONS["linear"]
    for way in (torch.enable_grad, entered):
        found = []
        for mode in (ours, theirs):
            given = arguments(mode)
            with mode, way():
                found.append(facts(operation(*given), given))
        assert found[0] == found[1]


def test_autocast():
    mode = RepeatingFakeTensorMode()
    x, w, b = arguments(mode)
    with mode:
        assert F.linear(x, w, b).dtype is torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert F.linear(x, w, b).dtype is torch.bfloat16


def test_errors_are_raised_each_time():
    mode = RepeatingFakeTensorMode()
    x, w, b = arguments(mode)
    for _ in range(3):
        with mode, pytest.raises(RuntimeError):
            F.linear(x, w[:, 1:], b)


def test_what_is_saved_for_the_backward_pass_is_not_changed_unseen():
    mode = RepeatingFakeTensorMode()
    for _ in range(3):
        x, _, _ = arguments(mode)
        with mode:
            saved = x.requires_grad_().sigmoid()
            saved.add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                saved.sum().backward()


def test_a_detached_tensor_has_the_version_of_the_other():
    mode = RepeatingFakeTensorMode()
    for weight in (arguments(mode)[1] for _ in range(3)):
        with mode, torch.no_grad():
            weight.detach().add_(1)
            assert weight._version == 1


def test_views_are_on_the_memory_of_what_they_view():
    mode = RepeatingFakeTensorMode()
    first, second = (arguments(mode)[1] for _ in range(2))
    with mode:
        for weight in (first, second):
            turned = weight.t()
            assert turned._base is weight
            with torch.no_grad():
                turned.add_(1)
            assert weight._version == turned._version == 1


def test_the_device_of_a_fake_tensor():
    asked = torch.ops.prim.device.default
    mode = RepeatingFakeTensorMode()
    fake = FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cpu"))
    assert device_of(asked, (fake,)) == torch.device("cpu")
    assert device_of(asked, (torch.ones(2),)) is None
    assert device_of(torch.ops.aten.add.Tensor, (fake, fake)) is None


def test_defaults_that_change_in_between():
    mode = RepeatingFakeTensorMode()
    before = torch.get_default_dtype()
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            with mode:
                assert torch.zeros(3).dtype is torch.full((3,), 0.5).dtype is dtype
                assert torch.scalar_tensor(0.5).dtype is dtype
    finally:
        torch.set_default_dtype(before)
