"""Siblings of convolutions and transposed convolutions: values, gradients, second derivatives."""

import copy
import pickle

import pytest
import torch
from derivatives import assert_same_second_derivatives
from equivalence import assert_close, assert_equivalent, assert_same_state
from families import EVERY_KIND, WIDTHS, Family, assert_runs_once, case, fused, wide_runs
from torch import nn

import conjoin
from conjoin.layers.view import wides
from conjoin.legality import Reason

LAST = torch.channels_last

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


GROUPED = {
    "depthwise": case(nn.Conv2d, 4, (2, 4, 5, 6), kernel_size=3, padding=1, groups=4),
    "multiplied": case(nn.Conv2d, 2, (2, 2, 5, 6), kernel_size=3, stride=2, groups=2),
    "two groups": case(nn.Conv2d, 6, (2, 6, 5, 6), kernel_size=(1, 3), dilation=2, groups=2),
    "1d": case(nn.Conv1d, 4, (3, 4, 9), kernel_size=3, groups=4, padding="same"),
    "1d unbatched": case(nn.Conv1d, 4, (4, 9), kernel_size=3, groups=2),
    "1d empty": case(nn.Conv1d, 4, (0, 4, 9), kernel_size=3, groups=2),
    "3d": case(nn.Conv3d, 4, (2, 4, 4, 3, 5), kernel_size=2, groups=4),
    "circular": case(
        nn.Conv2d, 4, (2, 4, 5, 6), kernel_size=3, padding=1, padding_mode="circular", groups=4
    ),
}


@pytest.mark.parametrize("number", [2, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", GROUPED)
def test_grouped(name, bias, number):
    plain = GROUPED[name].family([4] * number, bias=bias)
    x = GROUPED[name].input()
    assert_equivalent(fused(plain), plain, (x,))
    assert_runs_once(fused(plain), x)


def test_grouped_have_the_same_second_derivatives():
    chosen = GROUPED["two groups"]
    plain = chosen.family((4, 4, 4))
    assert_same_second_derivatives(fused(plain), plain, chosen.input())


def test_grouped_with_a_bias_on_some():
    layers = [nn.Conv2d(4, 4, 3, groups=4, bias=i != 1) for i in range(4)]
    plain = Family(layers).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    model = conjoin.optimize(plain, (x,))
    assert_equivalent(model, plain, (x,))
    assert_runs_once(model, x)


@pytest.mark.parametrize("layout", ["large", "channels_last", "channels_last weights"])
def test_grouped_run_apart_where_that_is_faster(layout):
    plain = Family([nn.Conv2d(4, 4, 3, groups=2) for _ in range(2)]).double()
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    if layout == "large":
        x = torch.randn(1, 4, 130, 130, dtype=torch.float64)
    elif layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    else:
        plain = plain.to(memory_format=torch.channels_last)
    model = fused(plain)
    with wide_runs() as runs:
        model(x)
    assert not runs
    assert_equivalent(model, plain, (x,))


@pytest.mark.parametrize("wrong", [(2, 8, 5, 5), (2, 2, 5, 5), (5, 5), (5,), ()], ids=str)
def test_grouped_raise_as_before(wrong):
    plain = Family([nn.Conv2d(4, 4, 3, groups=2) for _ in range(2)])
    messages = []
    for each in (plain, fused(plain)):
        with pytest.raises(RuntimeError) as error:
            each(torch.randn(wrong))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


class Mobile(nn.Module):
    """Depthwise branches that are summed, as MobileOne's are in training."""

    def __init__(self, number=4):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False) for _ in range(number)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(number))

    def forward(self, x):
        x = x.relu()
        branches = zip(self.convs, self.norms, strict=True)
        return sum(norm(conv(x)) for conv, norm in branches)


def test_grouped_that_read_what_is_permuted():
    """As q, k and v of SqueezeBERT do."""
    plain = Family([nn.Conv1d(4, 4, 1, groups=2) for _ in range(3)]).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64).permute(0, 2, 1)
    assert_equivalent(fused(plain), plain, (x,))
    assert_runs_once(fused(plain), x)


def test_grouped_in_a_rewritten_forward():
    plain = Mobile().double()
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    model = conjoin.optimize(plain, (x,))
    assert_equivalent(model, plain, (x,))
    large = torch.randn(1, 6, 90, 90, dtype=torch.float64)
    assert_equivalent(model, plain, (large,))
    with wide_runs() as runs:
        model.eval()(x)
    assert len(runs) == 2
    (group,) = conjoin.report(plain.eval(), (x,)).groups
    assert (group.fused, group.launches) == (True, (8, 3))
    assert_same_state(conjoin.unfuse(model), plain)


class Deep(nn.Module):
    """Branches of two grouped layers."""

    def __init__(self, number=3, groups=2, bias=False):
        super().__init__()

        def layer():
            conv = nn.Conv2d(4, 4, 3, padding=1, groups=groups, bias=bias)
            return nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU())

        self.branches = nn.ModuleList(nn.Sequential(layer(), layer()) for _ in range(number))

    def forward(self, x):
        return [branch(x).sum((-1, -2)).sin() for branch in self.branches]


def grouped_input(batch=2, size=6):
    return torch.randn(batch, 4, size, size, dtype=torch.float64)


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_behind_grouped_siblings_runs_at_once(groups, bias):
    plain, x = Deep(groups=groups, bias=bias).double(), grouped_input()
    model = conjoin.optimize(plain, (x,))
    with wide_runs() as runs:
        copy.deepcopy(model)(x)
    assert len(runs) == 4
    (group,) = conjoin.report(plain, (x,)).groups
    operations = ["Conv2d", "BatchNorm2d", "ReLU"] * 2
    assert [*group.depth[0].operations[:6]] == operations
    for each in (x, grouped_input(3, 5), grouped_input(1, 200), x.to(memory_format=LAST)):
        assert_equivalent(model, plain, (each,))
    assert_same_state(conjoin.unfuse(model), plain)


def test_trains_alike_behind_grouped_siblings():
    plain, x = Deep().double(), grouped_input()
    model = conjoin.optimize(plain, (x,))
    for each in (plain, model):
        optimizer = torch.optim.Adam(each.parameters(), lr=0.1, weight_decay=0.01)
        for batch in (x, grouped_input(1, 200) * 0 + 1, x.flip(0)):
            optimizer.zero_grad()
            sum(y.sum() for y in each(batch)).backward()
            optimizer.step()
    assert_close(model.state_dict(), plain.state_dict())


def test_a_copy_runs_at_once_what_is_behind_grouped_siblings():
    plain, x = Deep().double(), grouped_input()
    model = conjoin.optimize(plain, (x,))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_equivalent(again, plain, (x,))
        with wide_runs() as runs:
            again(x)
        assert len(runs) == 4


def test_grouped_siblings_of_unknown_inputs_are_asked():
    """What is behind them stays apart then."""
    plain, x = Deep().double(), grouped_input()
    for model in (conjoin.optimize(plain), conjoin.optimize(plain.to(memory_format=LAST), (x,))):
        assert {wide.kind.name for wide in wides(model)} == {"Conv2d"}
        assert_equivalent(model, plain, (x,))


def test_grouped_siblings_compiled():
    """No size guards a graph: they run one by one, and what is behind them at once."""
    plain, x = Deep().double(), grouped_input()
    model = conjoin.optimize(plain, (x,))
    graphs = []

    def keep(graph_module, inputs):
        graphs.append(graph_module)
        return graph_module

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=keep, dynamic=True)
    for each in (x, grouped_input(3, 90)):
        torch.testing.assert_close(compiled(each), plain(each))
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_grouped_that_read_a_large_tensor_stay_apart():
    plain = Mobile()
    assert [g.fused for g in conjoin.report(plain, (torch.randn(1, 6, 73, 74),)).groups] == [True]
    (group,) = conjoin.report(plain, (torch.randn(1, 6, 74, 74),)).groups
    assert group.reason is Reason.GROUPED
    assert group.detail.endswith("groups=6, and 4 copies of the input are too large")
    assert conjoin.report(plain).groups[0].fused  # Each call is looked at.
    (group,) = conjoin.report(conjoin.optimize(plain), (torch.randn(1, 6, 74, 74),)).groups
    assert (group.fused, group.launches) == (True, (4, 4))


def test_grouped_behind_equal_operations():
    """Which are seen to read one tensor in the graph only."""

    class Hidden(Mobile):
        def forward(self, x):
            return [conv(torch.sin(x)) + 1 for conv in self.convs]

    plain = Hidden().double()
    x = torch.randn(2, 6, 5, 6, dtype=torch.float64)
    model = conjoin.optimize(plain, (x,))
    assert_equivalent(model, plain, (x,))
    assert_runs_once(model, x)
    large = torch.randn(1, 6, 90, 90, dtype=torch.float64)
    assert not [*wides(conjoin.optimize(plain, (large,)))]


def test_grouped_of_other_widths_stay_apart():
    layers = [nn.Conv2d(4, width, 3, groups=2) for width in (4, 8)]
    (group,) = conjoin.report(Family(layers), (torch.randn(2, 4, 5, 5),)).groups
    assert group.reason is Reason.DIFFERENT_SETTINGS
    assert group.detail == "layers.1: out_channels=8 where layers.0 has 4"


def test_grouped_beside_others():
    layers = [nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3)]
    groups = conjoin.report(Family(layers), (torch.randn(2, 4, 5, 5),)).groups
    assert [group.fused for group in groups] == [True, False]
    assert groups[1].detail == "layers.1: groups=2 where layers.0 has 1"


@pytest.mark.parametrize(("number", "refused"), [(2, True), (3, True), (4, False)])
def test_grouped_whose_outputs_must_be_contiguous(number, refused):
    """Each of them would be copied."""

    class Viewed(Family):
        def forward(self, x):
            parts = super().forward(x)
            return [part.view(-1) for part in parts[:2]] + parts[2:]

    plain = Viewed([nn.Conv2d(4, 4, 3, groups=2) for _ in range(number)]).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    (group,) = conjoin.report(plain, (x,)).groups
    assert (group.reason is Reason.GROUPED) == refused
    if refused:
        assert group.detail == "groups=2, with 2 outputs to copy"
    assert_equivalent(conjoin.optimize(plain, (x,)), plain, (x,))


@pytest.mark.parametrize("name", ["circular", "same reflect", "2d same"])
def test_padding_follows_the_layers_settings(name):
    """The view's own computation and the wide layer's pad alike."""
    plain = CASES[name].family((2, 3))
    model = fused(plain)
    x = CASES[name].input()
    alone = model.layers[0](x)  # Runs the wide layer.
    own = nn.Conv2d.forward(model.layers[0], x)
    torch.testing.assert_close(alone, own, rtol=0, atol=1e-9)
