import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import conjoin
from conjoin.nn import Parallel, Split

DTYPE = torch.float64

# Layers of one kind, two different output widths, and an input with batch above 1.
CASES = {
    "linear": (lambda width: nn.Linear(5, width), (3, 5)),
    "linear_tokens": (lambda width: nn.Linear(5, width), (3, 4, 5)),
    "linear_no_bias": (lambda width: nn.Linear(5, width, bias=False), (3, 5)),
    "conv1d": (lambda width: nn.Conv1d(4, width, 3, stride=2, padding=1), (3, 4, 9)),
    "conv2d": (lambda width: nn.Conv2d(4, width, 3, padding="same"), (3, 4, 7, 6)),
    "conv2d_reflect": (
        lambda width: nn.Conv2d(4, width, 3, padding=1, padding_mode="reflect"),
        (3, 4, 7, 6),
    ),
    "conv2d_unbatched": (lambda width: nn.Conv2d(4, width, 3), (4, 7, 6)),
    "conv3d": (lambda width: nn.Conv3d(2, width, 2, dilation=2), (2, 2, 5, 5, 5)),
    "conv_transpose1d": (lambda width: nn.ConvTranspose1d(4, width, 3), (3, 4, 9)),
    "conv_transpose2d": (
        lambda width: nn.ConvTranspose2d(4, width, 3, stride=2, output_padding=1),
        (3, 4, 5, 6),
    ),
    "conv_transpose3d": (lambda width: nn.ConvTranspose3d(2, width, 2), (2, 2, 3, 3, 3)),
    "embedding": (lambda width: nn.Embedding(11, width, padding_idx=2), (3, 4)),
}


def make_case(name):
    make, shape = CASES[name]
    layers = [make(width).to(DTYPE) for width in (2, 6, 3)]
    if isinstance(layers[0], nn.Embedding):
        return layers, torch.randint(0, 11, shape)
    return layers, torch.randn(shape, dtype=DTYPE, requires_grad=True)


def loss(outputs):
    return sum(((i + 1) * out.sin()).sum() for i, out in enumerate(outputs))


def gradients(module, x, outputs):
    inputs = [p for p in (*module.parameters(), x) if p.requires_grad]
    return torch.autograd.grad(loss(outputs), inputs)


@pytest.mark.parametrize("name", CASES)
def test_to_split_computes_the_same_values_and_gradients(name):
    layers, x = make_case(name)
    apart = Parallel(*layers)
    wide = apart.to_split()

    for ours, theirs in zip(wide(x), apart(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    loss(apart(x)).backward()
    want_x, x.grad = x.grad, None
    loss(wide(x)).backward()
    if want_x is not None:
        torch.testing.assert_close(x.grad, want_x, rtol=1e-12, atol=1e-12)
    weight_dim = 1 if isinstance(layers[0], nn.Embedding) or "transpose" in name else 0
    torch.testing.assert_close(
        wide.module.weight.grad,
        torch.cat([layer.weight.grad for layer in layers], weight_dim),
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("name", CASES)
def test_conversion_and_back_keeps_every_bit_and_the_random_stream(name):
    layers, _ = make_case(name)
    layers[0].train(False)
    for layer in layers:
        layer.weight.requires_grad_(False)
    before = torch.get_rng_state()
    back = Parallel(*layers).to_split().to_parallel()

    assert torch.equal(torch.get_rng_state(), before)
    for old, new in zip(layers, back, strict=True):
        assert repr(old) == repr(new)
        assert not new.weight.requires_grad
        assert old.state_dict().keys() == new.state_dict().keys()
        for key, value in old.state_dict().items():
            assert torch.equal(new.state_dict()[key], value)
            assert new.state_dict()[key].data_ptr() != value.data_ptr()


@pytest.mark.parametrize("name", CASES)
def test_to_parallel_copies_the_values(name):
    layers, _ = make_case(name)
    wide = Parallel(*layers).to_split()
    apart = wide.to_parallel()
    kept = copy.deepcopy(wide.state_dict())
    with torch.no_grad():
        for parameter in apart.parameters():
            parameter.fill_(7)
    for key, value in wide.state_dict().items():
        assert torch.equal(value, kept[key])


def test_equal_widths_become_parts_and_modes_are_kept():
    split = Parallel(nn.Linear(3, 4), nn.Linear(3, 4)).eval().to_split()
    assert (split.parts, split.sizes, split.dim) == (2, None, -1)
    assert not split.training
    assert not split.to_parallel().training


def test_conversion_keeps_channels_last():
    heads = Parallel(nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)).to(memory_format=torch.channels_last)
    assert heads.to_split().module.weight.is_contiguous(memory_format=torch.channels_last)


def test_conversion_works_on_the_meta_device():
    heads = Parallel(nn.Linear(3, 4, device="meta"), nn.Linear(3, 4, device="meta"))
    assert heads.to_split().module.weight.shape == (8, 3)


class OwnForward(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


def _hooked():
    layer = nn.Linear(3, 4)
    layer.register_forward_hook(lambda *_: None)
    return layer


def _parameter_hooked():
    layer = nn.Linear(3, 4)
    layer.weight.register_hook(lambda grad: grad)
    return layer


def _replaced_forward():
    layer = nn.Linear(3, 4)
    layer.forward = lambda x: x
    return layer


def _frozen():
    layer = nn.Linear(3, 4)
    layer.bias.requires_grad_(False)
    return layer


def _with_buffer():
    layer = nn.Linear(3, 4)
    layer.register_buffer("scale", torch.ones(1))
    return layer


def _with_parameter():
    layer = nn.Linear(3, 4)
    layer.scale = nn.Parameter(torch.ones(1))
    return layer


REFUSED = {
    "in_features is 3 in the first and 5 in the second": lambda: nn.Linear(5, 4),
    "bias": lambda: nn.Linear(3, 4, bias=False),
    "dtype of weight is torch.float32": lambda: nn.Linear(3, 4).double(),
    "device of weight is cpu": lambda: nn.Linear(3, 4, device="meta"),
    "requires_grad of bias": _frozen,
    "a Linear and a Conv1d": lambda: nn.Conv1d(3, 4, 1),
    "only layers of exactly these classes": lambda: OwnForward(3, 4),
    "'1' \\(ReLU\\)": nn.ReLU,
    "its forward was replaced": _replaced_forward,
    "it has hooks": _hooked,
    "its weight has hooks": _parameter_hooked,
    "parametrized": lambda: parametrizations.weight_norm(nn.Linear(3, 4)),
    "hooks, which would be lost": lambda: prune.random_unstructured(
        nn.Linear(3, 4), "weight", amount=1
    ),
    "has buffers": _with_buffer,
    "parameters of its own": _with_parameter,
}


@pytest.mark.parametrize("message", REFUSED)
def test_to_split_names_what_differs(message):
    with pytest.raises(ValueError, match=message):
        Parallel(nn.Linear(3, 4), REFUSED[message]()).to_split()


def test_to_split_refuses_shared_parameters():
    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)
    with pytest.raises(ValueError, match="share"):
        Parallel(layer, layer).to_split()
    other.weight = layer.weight
    with pytest.raises(ValueError, match="share"):
        Parallel(layer, other).to_split()


@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "kernel_size", "padding_mode"])
def test_to_split_names_the_setting_of_a_convolution(name):
    other = {"padding_mode": "circular"}.get(name, 2)
    first = nn.Conv2d(4, 8, kernel_size=3)
    second = nn.Conv2d(4, 8, **{"kernel_size": 3, name: other})
    with pytest.raises(ValueError, match=f"{name} is "):
        Parallel(first, second).to_split()


def test_conversion_refuses_groups_max_norm_and_no_branches():
    with pytest.raises(ValueError, match="groups=2"):
        Parallel(nn.Conv2d(4, 8, 1, groups=2)).to_split()
    with pytest.raises(ValueError, match="groups=2"):
        Split(nn.Conv2d(4, 8, 1, groups=2), 2).to_parallel()
    with pytest.raises(ValueError, match="max_norm"):
        Parallel(nn.Embedding(4, 8, max_norm=1.0)).to_split()
    with pytest.raises(ValueError, match="at least one"):
        Parallel().to_split()


def test_conversion_refuses_hooks_and_own_forward_of_the_container():
    class Doubled(Parallel):
        def forward(self, x):
            return super().forward(2 * x)

    with pytest.raises(ValueError, match="its forward is its own"):
        Doubled(nn.Linear(3, 4)).to_split()
    optimized = conjoin.optimize(Parallel(nn.Linear(3, 4), nn.Linear(3, 4)), (torch.ones(2, 3),))
    with pytest.raises(ValueError, match=r"conjoin\.unfuse makes of an optimized one"):
        optimized.to_split()
    assert isinstance(conjoin.unfuse(optimized).to_split(), Split)
    split = Split(nn.Linear(3, 4), 2, dim=-1)
    split.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        split.to_parallel()


def test_to_parallel_needs_the_dimension_of_the_channels():
    split = Split(nn.Linear(4, 6), 2)
    with pytest.raises(ValueError, match="dim=-1, but dim=1"):
        split.to_parallel()
    with pytest.raises(ValueError, match="dim=-1, but dim=1"):
        split.to_parallel(ndim=3)
    x = torch.randn(3, 4)
    for ours, theirs in zip(split.to_parallel(ndim=2)(x), split(x), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="dim=-3, but dim=2"):
        Split(nn.Conv2d(4, 6, 1), 2, dim=2).to_parallel()
    assert len(Split(nn.Conv2d(4, 6, 1), 2).to_parallel()) == 2
    assert len(Split(nn.Conv2d(4, 6, 1), 2, dim=-3).to_parallel()) == 2
