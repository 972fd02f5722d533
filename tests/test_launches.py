import contextlib
import dataclasses
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from conjoin.launches import Count, LaunchCounter, count_layers, count_step, launches_of

aten = torch.ops.aten


class Heads(nn.Module):
    """Two linear heads on one input: a VAE's mean and log-variance."""

    def __init__(self) -> None:
        super().__init__()
        self.mu = nn.Linear(6, 4)
        self.logvar = nn.Linear(6, 4)

    def forward(self, x):
        return self.mu(x), self.logvar(x)


class WideHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(6, 8)

    def forward(self, x):
        return torch.unsafe_split(self.wide(x), 4, dim=1)


def linear():
    return nn.Linear(6, 4)


def mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))


def conv():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 2))


def norms():
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.LayerNorm(6))


def embedding():
    return nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 4, bias=False))


def rows():
    return torch.randn(5, 6)


def images():
    return torch.randn(2, 3, 8, 8)


def tokens():
    return torch.arange(6).reshape(2, 3)


# Counted by hand, from what each derivative computes. A Linear is an addmm; backward it is a
# matmul for the weight and a sum for the bias, and one more matmul where the input needs one.
BY_HAND = [
    pytest.param(linear, rows, Count(1, 2), id="linear"),
    # addmm, relu, addmm; sum and two matmuls, the threshold, sum and matmul
    pytest.param(mlp, rows, Count(3, 3 + 1 + 2), id="mlp"),
    # conv, relu, pool, conv; backward three kernels, pool, threshold, and two (no input gradient)
    pytest.param(conv, images, Count(4, 3 + 1 + 1 + 2), id="conv"),
    # conv, num_batches_tracked += 1, batch norm, layer norm; one each, conv's weight only
    pytest.param(norms, images, Count(4, 3), id="norms"),
    # embedding, matmul; two matmuls and embedding_dense_backward
    pytest.param(embedding, tokens, Count(2, 3), id="embedding"),
    pytest.param(Heads, rows, Count(2, 4), id="heads"),
    # one addmm; cat of the parts' gradients, a matmul and a sum
    pytest.param(WideHeads, rows, Count(1, 3), id="wide heads"),
]


@pytest.mark.parametrize(("build", "example", "expected"), BY_HAND)
def test_real_tensors_give_the_count_made_by_hand(build, example, expected):
    assert count_step(build(), (example(),)) == expected


@pytest.mark.parametrize(("build", "example", "expected"), BY_HAND)
def test_fake_tensors_give_the_count_made_by_hand(build, example, expected):
    with FakeTensorMode():
        assert count_step(build(), (example(),)) == expected


@pytest.mark.parametrize(("build", "example", "expected"), BY_HAND)
def test_meta_tensors_give_the_count_made_by_hand(build, example, expected):
    with torch.device("meta"):
        assert count_step(build(), (example(),)) == expected


@pytest.mark.parametrize(("build", "example", "expected"), BY_HAND)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_forward_is_the_same_and_backward_is_zero(build, example, expected, mode):
    with mode():
        assert count_step(build(), (example(),)) == Count(expected.forward, 0)


UNWRITTEN = [
    pytest.param(lambda: nn.GRU(6, 4), lambda: torch.randn(3, 2, 6), id="gru"),
    pytest.param(lambda: nn.Upsample(scale_factor=2, mode="nearest"), images, id="nearest"),
    pytest.param(lambda: nn.Upsample(scale_factor=2, mode="bilinear"), images, id="bilinear"),
    pytest.param(lambda: nn.ConvTranspose2d(3, 4, 3), images, id="transposed"),
    pytest.param(lambda: nn.Sequential(nn.Dropout(), nn.GroupNorm(1, 3)), images, id="norm"),
    pytest.param(lambda: nn.EmbeddingBag(9, 6), tokens, id="bag"),
]


@pytest.mark.parametrize(("build", "example"), UNWRITTEN)
def test_real_and_fake_tensors_agree(build, example):
    real = count_step(build(), (example(),))
    with FakeTensorMode():
        assert count_step(build(), (example(),)) == real


@pytest.mark.parametrize(("build", "example"), UNWRITTEN)
def test_inference_mode_and_no_grad_agree(build, example):
    model, x = build(), example()
    with torch.no_grad():
        plain = count_step(model, (x,))
    with torch.inference_mode():
        assert count_step(model, (x,)) == plain


def test_a_transformer_layer_is_the_same_on_fake_tensors():
    # Not compared in inference mode: under any dispatch mode PyTorch itself takes one bmm there
    # where it takes a copy and a matmul otherwise.
    real = count_step(nn.TransformerEncoderLayer(6, 2), (torch.randn(2, 3, 6),))
    with FakeTensorMode():
        fake = count_step(nn.TransformerEncoderLayer(6, 2), (torch.randn(2, 3, 6),))
    assert fake == real


def test_the_order_of_the_counter_and_the_fake_mode_does_not_matter():
    with FakeTensorMode() as fake:
        model, x = conv(), images()
    with fake, LaunchCounter() as inside:
        model(x)
    with LaunchCounter() as outside, fake:
        model(x)
    assert inside.count == outside.count == 4


def test_a_gradient_that_adds_up_is_a_launch_for_each_addition():
    x = rows().requires_grad_()
    assert count_step(Heads(), (x,)) == Count(2, 4 + 2 + 1)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        pytest.param(lambda x: x.view(-1).t().unsqueeze(0).detach().expand(3, -1), 0, id="views"),
        pytest.param(lambda x: x.detach().squeeze_().t_(), 0, id="views in place"),
        pytest.param(lambda x: x.split([1, 5], dim=1), 0, id="split"),
        pytest.param(lambda x: torch.unsafe_split(x, 3, dim=1), 0, id="unsafe_split"),
        pytest.param(lambda x: torch.unsafe_split_with_sizes(x, [2, 4], 1), 0, id="with_sizes"),
        pytest.param(lambda x: torch.unsafe_chunk(x, 2, dim=1), 0, id="unsafe_chunk"),
        pytest.param(lambda x: x.chunk(2, 1) + x.unbind(0), 0, id="chunk and unbind"),
        pytest.param(lambda x: torch.empty_like(x), 0, id="empty_like"),
        pytest.param(lambda x: x.new_empty(3), 0, id="new_empty"),
        pytest.param(lambda x: torch.empty(3).resize_(4), 0, id="resize"),
        pytest.param(lambda x: x.size(0) + x.stride(0) + x.numel(), 0, id="queries"),
        pytest.param(lambda x: x.to(x.dtype).contiguous(), 0, id="nothing to convert"),
        pytest.param(lambda x: x.to(torch.float64), 1, id="_to_copy"),
        pytest.param(lambda x: x.t().contiguous(), 1, id="contiguous"),
        pytest.param(lambda x: x.t().reshape(-1), 1, id="reshape that copies"),
        pytest.param(lambda x: torch.zeros(3), 1, id="zeros"),
        pytest.param(lambda x: torch.cat([x, x, x]), 1, id="cat"),
        pytest.param(lambda x: x.add_(1), 1, id="in place"),
        pytest.param(lambda x: torch._foreach_add([x, x, x], 1.0), 1, id="foreach"),
        pytest.param(lambda x: torch._foreach_add_([x, x + 1], 1.0), 2, id="foreach in place"),
        pytest.param(lambda x: torch.equal(x, x + 1), 2, id="equal"),
        pytest.param(lambda x: x.sum().item(), 2, id="item"),
        pytest.param(lambda x: F.dropout(x, 0.5, training=False), 0, id="dropout switched off"),
    ],
)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
def test_what_counts(run, expected, mode):
    with mode():
        x = rows()
        with LaunchCounter() as counter:
            run(x)
    assert counter.count == expected


def test_convolution_backward_counts_the_gradients_asked_for():
    layer, x = nn.Conv2d(3, 4, 3), images()
    assert count_step(layer, (x,)).backward == 2
    assert count_step(layer, (x.requires_grad_(),)).backward == 3
    assert count_step(layer.requires_grad_(False), (x,)).backward == 1


def test_scopes_take_the_launches_inside_the_innermost_only():
    counter = LaunchCounter()
    x = rows()
    with counter:
        x.neg()
        with counter.scope("outer"):
            x.exp()
            with counter.scope("inner"):
                x.view(-1).sin().cos()
            x.tanh()
    assert counter.count == 5
    assert counter.by_scope == {"outer": 2, "inner": 2}


def test_a_scope_ends_where_its_body_raises():
    counter = LaunchCounter()
    with counter:
        with contextlib.suppress(RuntimeError), counter.scope("broken"):
            torch.ones(2) @ torch.ones(3)
        torch.ones(2)
    assert counter.by_scope == {"broken": 2}
    assert counter.count == 3


Pair = namedtuple("Pair", ["first", "second"])


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    parts: tuple[torch.Tensor, ...]


class OutputDict(dict):
    """A mapping that pytree does not know, as transformers' ModelOutput is before registration."""


@pytest.mark.parametrize(
    "wrap",
    [
        lambda a, b: [a, {"b": b}],
        lambda a, b: Pair(a, b),
        lambda a, b: Output(None, (a, b)),
        lambda a, b: OutputDict(first=a, second=Output(b, ())),
        lambda a, b: torch.distributions.Normal(a, F.softplus(b), validate_args=False),
        lambda a, b: (a, b, a, "text", None, 3, a.detach()),
    ],
    ids=["list", "namedtuple", "dataclass", "mapping", "distribution", "twice"],
)
def test_outputs_are_found_in_any_container(wrap):
    heads = Heads()

    def run(x):
        return wrap(*heads(x))

    extra = 1 if isinstance(run(rows()), torch.distributions.Distribution) else 0
    assert count_step(run, (rows(),)) == Count(2 + extra, 4 + extra)


def test_an_input_given_back_is_no_output():
    assert count_step(nn.Identity(), (rows().requires_grad_(),)) == Count(0, 0)


def test_keyword_arguments_are_passed():
    assert count_step(nn.Linear(6, 4), (), {"input": rows()}) == Count(1, 2)


def test_gradients_are_left_as_they_were():
    model, x = mlp(), rows().requires_grad_()
    kept = [torch.randn_like(p) for p in model.parameters()]
    for parameter, grad in zip(model.parameters(), kept, strict=True):
        parameter.grad = grad
    # one more matmul than without a gradient for the input, and nothing added to those kept
    assert count_step(model, (x,)) == Count(3, 7)
    assert x.grad is None
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))


def test_what_the_model_raises_comes_through_and_gradients_come_back():
    model = mlp()
    grad = model[0].weight.grad = torch.zeros_like(model[0].weight)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        count_step(model, (torch.randn(5, 7),))
    assert model[0].weight.grad is grad


def test_layers_take_their_own_launches_of_the_forward_pass():
    model = mlp()
    counted = count_layers(model, (rows(),), {}, {"0": model[0], "2": model[2]})
    assert counted.count == Count(3, 6)
    assert counted.by_layer == {"0": 1, "2": 1}


FOUR, SQUARE = (2, 4, 6, 6), (2, 3, 3)
BESIDE = {
    "convolution": (aten.convolution.default, (FOUR, (4, 4, 3, 3), (4,)), 1, 2),
    "convolution without a bias": (aten.convolution.default, (FOUR, (4, 4, 3, 3), None), 1, 1),
    "convolution in groups": (aten.convolution.default, (FOUR, (4, 2, 3, 3), (4,)), 2, 2),
    "depthwise convolution": (aten.convolution.default, (FOUR, (4, 1, 3, 3), (4,)), 4, 1),
    "batched product": (aten.baddbmm.default, (SQUARE,) * 3, None, 2),
    "batched product without a bias": (aten.bmm.default, (SQUARE,) * 2, None, 1),
    "product": (aten.addmm.default, ((3,), (3, 3), (3, 3)), None, 1),
}


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("func", "shapes", "groups", "on_cuda"), BESIDE.values(), ids=BESIDE)
def test_a_bias_may_be_a_launch_of_its_own_on_cuda(func, shapes, groups, on_cuda, device):
    with FakeTensorMode():
        args = [shape and torch.empty(shape, device=device) for shape in shapes]
        settings = [] if groups is None else [[1, 1], [0, 0], [1, 1], False, [0, 0], groups]
        found = launches_of(func, [*args, *settings], {}, torch.empty(4, device=device))
    assert found == (on_cuda if device == "cuda" else 1)


@pytest.mark.parametrize(("beta", "expected"), [(0, 1), (2, 2)])
def test_only_what_a_batched_product_takes_is_copied_into_it(beta, expected):
    with FakeTensorMode():
        args = [torch.empty(SQUARE, device="cuda") for _ in range(3)]
        named = dict(zip(("self", "batch1", "batch2"), args, strict=True))
        for given in ((args, {"beta": beta}), ((), {**named, "beta": beta})):
            assert launches_of(aten.baddbmm.default, *given, args[0]) == expected
