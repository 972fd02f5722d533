"""Siblings of convolutions and transposed convolutions: values, gradients, second derivatives."""

import pytest
import torch
from derivatives import assert_same_second_derivatives
from equivalence import assert_equivalent
from families import EVERY_KIND, WIDTHS, Family, assert_runs_once, case, fused
from torch import nn

from conjoin.launches import count_step

CONVOLUTIONS = {
    "stride": case(nn.Conv1d, 2, (2, 2, 9), kernel_size=3, stride=2, padding=1),
    "dilation": case(nn.Conv1d, 2, (2, 2, 9), kernel_size=2, dilation=3),
    "same": case(nn.Conv1d, 2, (2, 2, 8), kernel_size=4, padding="same"),
    "valid": case(nn.Conv1d, 2, (2, 2, 8), kernel_size=4, padding="valid"),
    "reflect": case(nn.Conv1d, 2, (2, 2, 8), kernel_size=3, padding=2, padding_mode="reflect"),
    "1d unbatched": case(nn.Conv1d, 2, (2, 8), kernel_size=3),
    "1d empty": case(nn.Conv1d, 2, (0, 2, 8), kernel_size=3),
    "1x1": case(nn.Conv2d, 3, (2, 3, 4, 5), kernel_size=1),
    "oblong": case(nn.Conv2d, 2, (2, 2, 6, 7), kernel_size=(3, 2), stride=(2, 1), padding=(1, 0)),
    "2d dilation": case(nn.Conv2d, 2, (2, 2, 6, 7), kernel_size=2, dilation=(1, 2)),
    "2d same": case(nn.Conv2d, 2, (2, 2, 5, 6), kernel_size=(2, 3), padding="same", dilation=2),
    "circular": case(
        nn.Conv2d, 2, (2, 2, 5, 6), kernel_size=3, padding=(1, 2), padding_mode="circular"
    ),
    "same reflect": case(
        nn.Conv2d, 2, (2, 2, 5, 6), kernel_size=4, padding="same", padding_mode="reflect"
    ),
    "replicate": case(
        nn.Conv2d, 2, (2, 2, 5, 6), kernel_size=3, padding=1, padding_mode="replicate", stride=2
    ),
    "2d unbatched": case(nn.Conv2d, 2, (2, 5, 6), kernel_size=3),
    "2d empty": case(nn.Conv2d, 2, (0, 2, 5, 6), kernel_size=3),
    "3d": case(nn.Conv3d, 2, (2, 2, 4, 3, 5), kernel_size=(2, 1, 3), padding=1, stride=2),
    "3d circular": case(
        nn.Conv3d, 1, (2, 1, 4, 3, 5), kernel_size=3, padding=1, padding_mode="circular"
    ),
    "3d unbatched": case(nn.Conv3d, 1, (1, 4, 3, 5), kernel_size=2),
}
TRANSPOSED = {
    "transposed stride": case(
        nn.ConvTranspose1d, 2, (2, 2, 5), kernel_size=3, stride=2, padding=1, output_padding=1
    ),
    "transposed 1d unbatched": case(nn.ConvTranspose1d, 2, (2, 5), kernel_size=3),
    "transposed dilation": case(
        nn.ConvTranspose2d, 2, (2, 2, 3, 4), kernel_size=(2, 3), dilation=2, stride=(1, 2)
    ),
    "transposed output padding": case(
        nn.ConvTranspose2d, 2, (2, 2, 3, 4), kernel_size=3, stride=2, output_padding=(0, 1)
    ),
    "transposed empty": case(nn.ConvTranspose2d, 2, (0, 2, 3, 4), kernel_size=3),
    "transposed 3d": case(
        nn.ConvTranspose3d, 2, (2, 2, 2, 3, 2), kernel_size=2, stride=2, padding=(1, 0, 1)
    ),
}
CASES = CONVOLUTIONS | TRANSPOSED
KINDS = {name: case for name, case in EVERY_KIND.items() if "Conv" in name}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_same_function_with_all_settings(name, bias):
    plain = CASES[name].family((2, 3, 1), bias=bias)
    x = CASES[name].input()
    assert_equivalent(fused(plain), plain, (x,))
    assert_runs_once(fused(plain), x)


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", KINDS)
def test_same_function_of_all_widths(name, widths):
    plain = KINDS[name].family(widths)
    assert_equivalent(fused(plain), plain, (KINDS[name].input(),))


@pytest.mark.parametrize("name", [*KINDS, "circular", "transposed output padding"])
def test_same_second_derivatives(name):
    plain = (KINDS | CASES)[name].family((2, 3))
    assert_same_second_derivatives(fused(plain), plain, (KINDS | CASES)[name].input())


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("name", ["Conv2d", "ConvTranspose2d", "Conv3d", "circular"])
def test_channels_last(name, weights):
    chosen = (KINDS | CASES)[name]
    x = chosen.input()
    last = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    plain = chosen.family((2, 3))
    plain = plain.to(memory_format=last) if weights else plain
    model = fused(plain)
    assert_equivalent(model, plain, (x.to(memory_format=last),))
    for ours, theirs in zip(model(x), plain(x), strict=True):
        assert ours.is_contiguous(memory_format=last) <= theirs.is_contiguous(memory_format=last)


@pytest.mark.parametrize("name", [name for name in KINDS if "Transpose" in name])
def test_output_size_given_at_the_call(name):
    chosen = KINDS[name]
    plain = chosen.family((2, 3), stride=2)
    x = chosen.input()
    natural = plain(x)[0].shape[2:]
    size = [natural[0] + 1, *natural[1:]]
    assert_equivalent(fused(plain), plain, (x, size))
    assert fused(plain)(x, size)[0].shape[2:] == torch.Size(size)


@pytest.mark.parametrize("number", [2, 3, 8])
@pytest.mark.parametrize("width", [4, 8])
def test_grouped_convolutions_do_not_pay(number, width):
    """What one wide grouped convolution would cost, so that they are refused."""
    layers = nn.ModuleList([nn.Conv2d(4, width, 3, groups=4, bias=False) for _ in range(number)])

    def wide(x):
        blocks = [layer.weight.unflatten(0, (4, -1)) for layer in layers]
        y = nn.functional.conv2d(x, torch.cat(blocks, 1).flatten(0, 1), groups=4)
        parts = y.unflatten(1, (4, number, -1)).unbind(2)
        return [part.flatten(1, 2).contiguous() for part in parts]

    x = torch.randn(2, 4, 5, 5)
    for ours, theirs in zip(wide(x), (layer(x) for layer in layers), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert count_step(wide, (x,)).forward > count_step(Family(layers), (x,)).forward


@pytest.mark.parametrize("name", ["circular", "same reflect", "2d same"])
def test_padding_follows_the_layers_settings(name):
    """The view's own computation and the wide layer's pad alike."""
    plain = CASES[name].family((2, 3))
    model = fused(plain)
    x = CASES[name].input()
    alone = model.layers[0](x)  # Runs the wide layer.
    own = nn.Conv2d.forward(model.layers[0], x)
    torch.testing.assert_close(alone, own, rtol=0, atol=1e-9)
