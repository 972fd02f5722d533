import copy
import doctest
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from test_concatenation import gradients, loss
from torch import nn

import conjoin.nn
from conjoin.nn import Parallel, Split, Unite

DTYPE = torch.float64


# --- Split ---


@pytest.mark.parametrize(
    "make",
    [
        lambda: Split(nn.Conv2d(4, 7, 1), 2),
        lambda: Split(nn.Conv2d(4, 7, 1), sizes=[3, 5]),
        lambda: Split(nn.Linear(4, 7), 2, dim=-1),
        lambda: Split(nn.ConvTranspose1d(4, 7, 1), 2, dim=-2),
        lambda: Split(nn.Embedding(4, 7), sizes=[7, 1], dim=-1),
    ],
)
def test_split_that_cannot_fit_is_refused_at_construction(make):
    with pytest.raises(ValueError, match=r"7 output channels.*(divide 7|sum to 7)"):
        make()


def test_split_that_does_not_fit_is_refused_when_called():
    with pytest.raises(ValueError, match=r"Flatten returned a tensor of shape \(2, 7\).*divide 7"):
        Split(nn.Flatten(), 2)(torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"sizes \[3, 5\], which sum to 8.*sum to 7"):
        Split(nn.Flatten(), sizes=[3, 5])(torch.randn(2, 7))
    with pytest.raises(ValueError, match="dim=4"):
        Split(nn.Flatten(), 2, dim=4)(torch.randn(2, 7))
    with pytest.raises(TypeError, match="Parallel returned a value of type tuple"):
        Split(Parallel(nn.Identity()), 2)(torch.randn(2, 6))


def test_split_refuses_wrong_arguments():
    with pytest.raises(ValueError, match="either parts or sizes"):
        Split(nn.Flatten())
    with pytest.raises(ValueError, match="either parts or sizes"):
        Split(nn.Flatten(), 2, sizes=[1, 2])
    for parts in (0, -1, 2.0, True, "2"):
        with pytest.raises(ValueError, match="positive whole numbers"):
            Split(nn.Flatten(), parts)
    with pytest.raises(ValueError, match="positive whole numbers"):
        Split(nn.Flatten(), sizes=[3, 0])
    with pytest.raises(ValueError, match="at least one part"):
        Split(nn.Flatten(), sizes=[])
    with pytest.raises(TypeError, match="a module first"):
        Split(torch.relu, 2)
    for sizes in (6, iter([3, 3])):
        with pytest.raises(TypeError, match="Split takes a list of sizes"):
            Split(nn.Flatten(), sizes=sizes)
    for dim in ("1", None, 1.0, True):
        with pytest.raises(TypeError, match="Split takes a whole number for dim"):
            Split(nn.Flatten(), 2, dim=dim)
        with pytest.raises(TypeError, match="Unite takes a whole number for dim"):
            Unite(dim)


def test_split_passes_arguments_on():
    split = Split(nn.Bilinear(3, 4, 6), 2, dim=-1)
    first, second = split(torch.randn(2, 3), input2=torch.randn(2, 4))
    assert first.shape == second.shape == (2, 3)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 6), (3, 4)),
        (nn.Conv2d(4, 6, 1), (3, 4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 2), (3, 4, 5)),
        (nn.BatchNorm2d(6), (3, 6, 5, 5)),
        (nn.BatchNorm1d(6).eval(), (3, 6)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_parts_can_be_changed_in_place_as_separate_outputs_can(module, shape):
    module = module.to(DTYPE)
    x = torch.randn(shape, dtype=DTYPE, requires_grad=True)
    first, second = module(x).clone().chunk(2, 1)
    want = gradients(module, x, (first.relu(), second.sin() * 3))

    first, second = Split(module, 2)(x)
    F.relu_(first)
    second.sin_().mul_(3)
    for ours, theirs in zip(gradients(module, x, (first, second)), want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_parts_of_an_embedding_can_be_changed_in_place():
    table = nn.Embedding(5, 6)
    first, _ = Split(table, 2, dim=-1)(torch.arange(5))
    first.relu_().sum().backward()
    assert torch.equal(table.weight.grad[:, :3], (table.weight[:, :3] > 0).float())


@pytest.mark.parametrize("module", [nn.ReLU(), nn.Identity(), nn.Flatten()])
def test_in_place_stays_an_error_where_autograd_could_not_see_it(module):
    first, _ = Split(module, 2)(torch.randn(3, 4, requires_grad=True).clone())
    with pytest.raises(RuntimeError, match=r"in-?place"):
        first.mul_(2)


def test_in_place_stays_an_error_behind_a_forward_hook():
    layer = nn.Linear(4, 6)
    layer.register_forward_hook(lambda module, args, output: output.sigmoid())
    first, _ = Split(layer, 2)(torch.randn(3, 4))
    with pytest.raises(RuntimeError, match=r"in-?place"):
        first.mul_(2)


# --- Parallel ---


def test_parallel_runs_each_branch_and_passes_arguments_on():
    x = torch.randn(3, 4)
    relu, linear = nn.ReLU(), nn.Linear(4, 2)
    outputs = Parallel(relu, linear)(x)
    assert type(outputs) is tuple
    assert torch.equal(outputs[0], relu(x))
    assert torch.equal(outputs[1], linear(x))

    query = torch.randn(2, 3, 8)
    attention = Parallel(*[nn.MultiheadAttention(8, 2) for _ in range(2)])
    (_, weights), _ = attention(query, query, query, need_weights=False)
    assert weights is None


def test_parallel_reads_like_a_list():
    layers = [nn.Linear(4, i + 1) for i in range(4)]
    heads = Parallel(*layers)
    assert len(heads) == 4
    assert list(heads) == layers
    assert list(reversed(heads)) == layers[::-1]
    assert heads[0] is layers[0]
    assert heads[-1] is layers[3]
    assert layers[2] in heads
    assert isinstance(heads[1:3], Parallel)
    assert list(heads[1:3]) == layers[1:3]
    assert list(heads[::-2]) == layers[::-2]
    with pytest.raises(IndexError):
        heads[4]


def test_parallel_edits_like_a_list():
    a, b, c, d = (nn.Linear(4, i + 1) for i in range(4))
    heads = Parallel(a).append(c).insert(1, b).extend([d])
    assert list(heads) == [a, b, c, d]
    assert heads.pop() is d
    assert heads.pop(0) is a
    assert list(heads.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    heads[1] = d
    del heads[0]
    assert list(heads) == [d]
    assert heads[0:1].append(a)[-1] is a
    assert len(heads.extend(heads)) == 2


def test_parallel_keeps_names():
    mean, scale, skip = nn.Linear(4, 2), nn.Linear(4, 2), nn.Linear(4, 2)
    heads = Parallel(OrderedDict(mean=mean, scale=scale))
    assert heads.scale is scale
    assert list(heads.state_dict()) == ["mean.weight", "mean.bias", "scale.weight", "scale.bias"]
    assert heads.append(skip)[:2].scale is scale
    assert list(dict(heads.named_children())) == ["mean", "scale", "2"]


def test_parallel_refuses_what_is_no_module():
    with pytest.raises(TypeError, match="Parallel\\(\\*modules\\) for a list"):
        Parallel([nn.ReLU()])
    with pytest.raises(TypeError, match="Parallel takes modules"):
        Parallel(nn.ReLU()).append(torch.relu)
    with pytest.raises(TypeError, match="Parallel takes modules"):
        Parallel(OrderedDict(a=None))
    heads = Parallel(nn.ReLU())
    with pytest.raises(TypeError, match="Parallel takes modules"):
        heads.extend([nn.Tanh(), torch.relu])
    assert len(heads) == 1
    with pytest.raises(TypeError, match="one branch at a time"):
        heads[0:1] = nn.Tanh()


# --- Unite ---


def test_unite_joins_tuples_and_lists():
    whole = torch.randn(2, 6, 3)
    assert torch.equal(Unite()(whole.split([1, 5], 1)), whole)
    assert torch.equal(Unite(dim=-1)(list(whole.split(1, -1))), whole)


def test_unite_refuses_anything_else():
    with pytest.raises(TypeError, match=r"a tensor of shape \(2, 6\)"):
        Unite()(torch.randn(2, 6))
    with pytest.raises(TypeError, match="type dict"):
        Unite()({"a": torch.randn(2, 6)})
    with pytest.raises(TypeError, match="part 1 is a value of type tuple"):
        Unite()((torch.randn(2, 6), (torch.randn(2, 6),)))
    with pytest.raises(ValueError, match="empty"):
        Unite()(())


# --- all three as modules ---


def make_encoder():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Split(nn.Conv2d(64, 128, 2), parts=2),
        Unite(),
        Split(nn.Flatten(), parts=2),
    )


def make_heads():
    return nn.Sequential(Parallel(nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 2)), Unite())


MODELS = {"encoder": (make_encoder, (3, 1, 28, 28)), "heads": (make_heads, (3, 6))}


@pytest.fixture(params=MODELS)
def model_and_input(request):
    make, shape = MODELS[request.param]
    return make().to(DTYPE), torch.randn(shape, dtype=DTYPE)


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_encoder_runs_whole_and_layer_by_layer():
    encoder, images = make_encoder(), torch.randn(3, 1, 28, 28)
    mean, scale = encoder(images)
    assert mean.shape == scale.shape == (3, 64 * 6 * 6)
    x = images
    for layer in encoder:
        x = layer(x)
    assert torch.equal(x[0], mean)
    assert torch.equal(x[1], scale)


def test_models_have_gradients(model_and_input):
    model, x = model_and_input
    out = model(x)
    loss(out if isinstance(out, tuple) else (out,)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_models_copy_pickle_and_save(model_and_input):
    model, x = model_and_input
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        assert repr(other) == repr(model)
        assert_same(other(x), model(x))


def test_state_dict_goes_both_ways(model_and_input):
    model, x = model_and_input
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(model.state_dict(), strict=True)
    assert_same(other(x), model(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_models_compile_in_one_graph(model_and_input, backend):
    model, x = model_and_input
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    assert_same(compiled(x), model(x))


def test_parts_changed_in_place_compile():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = Split(nn.Linear(4, 6), 2, dim=-1)

        def forward(self, x):
            first, second = self.heads(x)
            return F.relu_(first), second

    model, x = Heads().to(DTYPE), torch.randn(3, 4, dtype=DTYPE)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x), model(x))
    assert_same(
        torch.autograd.grad(loss(compiled(x)), model.heads.module.weight),
        torch.autograd.grad(loss(model(x)), model.heads.module.weight),
    )


def test_models_export(model_and_input):
    model, x = model_and_input
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn((5, *x.shape[1:]), dtype=DTYPE)
    assert_same(program.module()(other), model(other))


def test_models_trace_symbolically(model_and_input):
    model, x = model_and_input
    assert_same(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_traced_split_still_refuses_what_does_not_divide():
    traced = torch.fx.symbolic_trace(nn.Sequential(Split(nn.Flatten(), 2)))
    with pytest.raises(RuntimeError, match="split_with_sizes"):
        traced(torch.randn(2, 7))


def test_split_in_vmap():
    split, x = Split(nn.Linear(4, 5), sizes=[2, 3], dim=-1), torch.randn(3, 4)
    for ours, theirs in zip(torch.vmap(split)(x), split(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_split_is_iterable_and_indexable():
    layer = nn.Conv2d(4, 6, 1)
    split = Split(layer, 2)
    assert list(split) == [layer]
    assert len(split) == 1
    assert split[0] is split[-1] is layer
    with pytest.raises(IndexError):
        split[1]


def test_reprs_show_the_arguments():
    assert "parts=2, dim=1" in repr(Split(nn.Flatten(), 2))
    assert "sizes=[1, 2], dim=-1" in repr(Split(nn.Flatten(), sizes=(1, 2), dim=-1))
    assert repr(Unite(dim=2)) == "Unite(dim=2)"


def test_examples_in_the_docstrings_run():
    result = doctest.testmod(conjoin.nn, extraglobs={"torch": torch, "nn": nn})
    assert result.attempted > 0
    assert result.failed == 0
