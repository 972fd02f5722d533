"""The split moves below what all branches do alike, and below nothing else."""

import copy
import io
import pickle

import pytest
import torch
from counting import OperationCounter, count
from equivalence import assert_same_state
from scripted import (
    Scripted,
    assert_released_to_the_bit,
    assert_same,
    assert_trains_alike,
    both,
    branches,
    called,
    last,
    layers,
    linears,
    randn,
    targets,
)
from torch import nn
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn import functional as F

import conjoin
from conjoin.passes import PIPELINE, Sink, Widen

PASSES = (Widen(), Sink())

ROWS = randn(6, 4), randn(2, 4, 4), randn(2, 3, 4, 4), randn(4, 4), randn(4)
"""Ranks from 1 to 4; what acts along a dimension acts along another for each."""

IMAGES = (
    randn(2, 3, 8, 8),
    randn(3, 3, 7, 9),
    randn(3, 8, 8),
    randn(2, 3, 8, 8).to(memory_format=torch.channels_last),
)


def step(function):
    return lambda m, h, name: function(h)


EVERYWHERE = {
    "relu": lambda h: F.relu(h),
    "relu in place": lambda h: F.relu(h, inplace=True),
    "relu_": lambda h: h.relu_(),
    "add_": lambda h: h.add_(1),
    "number on the left": lambda h: 1 - h,
    "read twice by one": lambda h: h + h,
    "clamp": lambda h: h.clamp(min=0),
    "power": lambda h: h**2,
    "power of a number": lambda h: 2**h,
    "idle dropout": lambda h: F.dropout(h, 0.5, training=False),
    "softmax": lambda h: torch.softmax(h, 0),
    "softmax along the channels": lambda h: F.softmax(h, dim=1),
    "log_softmax": lambda h: torch.log_softmax(h, -1),
    "softmax out of range": lambda h: h.softmax(-3),
}
"""Sinks in rows and images."""

IN_SPACE = {
    "max_pool": lambda h: F.max_pool2d(h, 2),
    "avg_pool": lambda h: F.avg_pool2d(h, 2, ceil_mode=True),
    "adaptive": lambda h: F.adaptive_avg_pool2d(h, 1),
    "pad": lambda h: F.pad(h, (1, 1, 2, 0)),
    "pad by less than nothing": lambda h: F.pad(h, (-1, 0)),
    "reflect": lambda h: F.pad(h, (1, 1, 1, 1), mode="reflect"),
    "nearest": lambda h: F.interpolate(h, scale_factor=2),
    "bilinear": lambda h: F.interpolate(h, scale_factor=2.0, mode="bilinear"),
    "instance_norm": lambda h: F.instance_norm(h, eps=0.1),
}
"""Sinks in images only."""

NOWHERE = {
    "softmax without dim": lambda h: F.softmax(h),
    "dropout": lambda h: F.dropout(h, 0.5),
    "dropout2d": lambda h: F.dropout2d(h),
    "layer_norm": lambda h: F.layer_norm(h, h.shape[-1:]),
    "instance_norm with statistics": lambda h: F.instance_norm(h, use_input_stats=False),
    "sum": lambda h: h.sum(),
    "clone": lambda h: h.clone(),
    "indices": lambda h: F.adaptive_max_pool2d(h, 2, True)[0],
    "pad channels": lambda h: F.pad(h, (0, 0, 0, 0, 1, 1)),
    "pad of another rank": lambda h: F.avg_pool3d(h, 2),
    "pool of another rank": lambda h: F.avg_pool1d(h, 2),
    "read by two": lambda h: h.relu() + h,
    "by itself": lambda h: h * h.mean(),
    "view": lambda h: h.relu().view(-1),
    "flatten": lambda h: h.relu().flatten(),
    "is_contiguous": lambda h: h.relu() * h.relu().is_contiguous(),
    "as_strided": lambda h: h.relu().as_strided((2, 2), (1, 2)),
}


def of_rows(function):
    return Scripted(branches(step(function), last), **linears())


def of_images(function):
    convs = layers(lambda: nn.Conv2d(3, 4, 3, padding=1))
    return Scripted(branches(step(function), last), **convs)


@pytest.mark.parametrize("function", EVERYWHERE.values(), ids=EVERYWHERE)
def test_in_rows(function):
    traced, plain = both(of_rows(function), PASSES)
    assert targets(traced).count("sin") == 1
    assert_same(traced, plain, *ROWS)


@pytest.mark.parametrize(
    "function", [*EVERYWHERE.values(), *IN_SPACE.values()], ids=[*EVERYWHERE, *IN_SPACE]
)
def test_in_images(function):
    traced, plain = both(of_images(function), PASSES)
    assert targets(traced).count("sin") == 1
    assert_same(traced, plain, *IMAGES)


@pytest.mark.parametrize("function", [*IN_SPACE.values(), *NOWHERE.values()])
def test_not_in_rows(function):
    traced, plain = both(of_rows(function), PASSES)
    assert targets(traced).count("sin") == 3
    assert_same(traced, plain, *ROWS)


@pytest.mark.parametrize("name", NOWHERE)
def test_not_in_images(name):
    traced, plain = both(of_images(NOWHERE[name]), PASSES)
    assert targets(traced).count("sin") == 3
    last_format = name not in ("view", "is_contiguous", "as_strided")  # See conjoin.passes.widen.
    assert_same(traced, plain, *IMAGES[: 4 if last_format else 3])


def test_pooling_along_what_only_looks_like_space():
    """(batch, length, channels): MaxPool1d goes along the channels of a Linear."""
    traced, plain = both(of_rows(lambda h: F.avg_pool1d(h, 2)), PASSES)
    assert_same(traced, plain, randn(3, 6, 4), randn(6, 4))


KEEPS = {
    "tanh": (lambda h: h.tanh(), True),
    "relu": (lambda h: h.relu(), True),
    "relu in place": (lambda h: F.relu(h, inplace=True), True),
    "leaky_relu": (lambda h: F.leaky_relu(h), False),
    "leaky_relu in place": (lambda h: F.leaky_relu(h, inplace=True), True),
    "gelu": (lambda h: F.gelu(h), False),
    "softmax": (lambda h: h.softmax(-1), True),
}


@pytest.mark.parametrize(("function", "raises"), KEEPS.values(), ids=KEEPS)
def test_what_is_changed_after_it_was_kept_for_backward(function, raises):
    """Autograd must go on noticing; so it must where the caller changes an output."""

    def script(m, x):
        h, g = function(m.a(x)), function(m.b(x))
        return h.mul_(2).sin(), g.sin(), m.c(x).sin()

    traced, plain = both(Scripted(script, **linears()))
    assert_same(traced, plain, randn(3, 4))
    stacked = Scripted(branches(step(torch.cos), called("2"), step(function)), **linears("", "2"))
    for model in both(stacked):
        outputs = model(randn(3, 4))
        outputs[0].mul_(2)
        if raises:
            with pytest.raises(RuntimeError, match="modified by an inplace"):
                sum(output.sum() for output in outputs).backward()
        else:
            sum(output.sum() for output in outputs).backward()


def norms(norm, *steps, **more):
    model = {**linears(), **layers(norm, "n"), **more}
    return Scripted(branches(called("n"), *steps, last), **model)


NORMS = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "without bias": lambda: nn.BatchNorm1d(4, eps=0.1, momentum=0.3),
    "GroupNorm": lambda: nn.GroupNorm(2, 4),
    "PReLU": lambda: nn.PReLU(4),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "PReLU of one number": nn.PReLU,
    "LayerNorm without weight": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "RMSNorm without weight": lambda: nn.RMSNorm(4, elementwise_affine=False),
}


def bias_frozen(module):
    module.bias.requires_grad_(False)
    return module


OTHER_NORMS = {
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "no weight": lambda: nn.BatchNorm1d(4, affine=False),
    "no statistics": lambda: nn.BatchNorm1d(4, track_running_stats=False),
    "groups without weight": lambda: nn.GroupNorm(2, 4, affine=False),
    "in images only": lambda: nn.BatchNorm2d(4),
    "bias frozen": lambda: bias_frozen(nn.BatchNorm1d(4)),
    "LayerNorm of two dimensions": lambda: nn.LayerNorm((4, 4)),
    "LayerNorm of another size": lambda: nn.LayerNorm(3),
    "InstanceNorm along the rows": lambda: nn.InstanceNorm1d(4),
    "InstanceNorm with a weight along the rows": lambda: nn.InstanceNorm1d(4, affine=True),
    "InstanceNorm of images": lambda: nn.InstanceNorm2d(4, affine=True),
    "PReLU of another size": lambda: nn.PReLU(3),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_normalizations(norm):
    traced, plain = both(norms(norm), PASSES)
    assert targets(traced).count("sin") == 1
    # One row cannot be normalized in training; in (batch, length, 4) the channels are the length.
    inputs = randn(3, 4), randn(3, 4, 4), randn(5, 4, 4), randn(1, 4), randn(1, 4, 4), randn(4)
    assert_same(traced, plain, *inputs, randn(2, 3, 4))
    assert_trains_alike(traced, plain.train(), randn(5, 4), randn(3, 4), randn(2, 4))


@pytest.mark.parametrize("norm", OTHER_NORMS.values(), ids=OTHER_NORMS)
def test_normalizations_left_alone(norm):
    traced, plain = both(norms(norm), PASSES)
    assert_same(traced, plain, randn(3, 4), randn(2, 4, 4))


IMAGE_NORMS = {
    "InstanceNorm": lambda width: nn.InstanceNorm2d(width),
    "with weight": lambda width: nn.InstanceNorm2d(width, eps=0.1, affine=True),
    "tracked": lambda width: nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
    "without momentum": lambda width: nn.InstanceNorm2d(
        width, momentum=None, affine=True, track_running_stats=True
    ),
    "PReLU": lambda width: nn.PReLU(width),
    "PReLU of one number": lambda width: nn.PReLU(),
}

LEFT_IN_IMAGES = {
    "statistics without weight": lambda width: nn.InstanceNorm2d(width, track_running_stats=True),
    "of another rank": lambda width: nn.InstanceNorm1d(width, affine=True),
    "LayerNorm": lambda width: nn.LayerNorm(6),
    "a warning": lambda width: nn.InstanceNorm2d(9),
}


def of_widths(make, *steps):
    """Convolutions of different widths."""
    modules = {}
    for name, width in zip("abc", (4, 2, 4), strict=True):
        modules[name] = nn.Conv2d(3, width, 3)
        modules[name + "n"] = make(width)
    return both(Scripted(branches(called("n"), *steps, last), **modules), PASSES)


@pytest.mark.parametrize("make", IMAGE_NORMS.values(), ids=IMAGE_NORMS)
def test_normalizations_of_images(make):
    traced, plain = of_widths(make, step(lambda h: h.relu_()))
    assert targets(traced).count("sin") == 1
    assert_same(traced, plain, *IMAGES, randn(1, 3, 5, 5), randn(2, 3, 3, 3))
    assert_trains_alike(traced, plain.train(), *IMAGES[:2])
    assert_released_to_the_bit(*of_widths(make))


@pytest.mark.parametrize("make", LEFT_IN_IMAGES.values(), ids=LEFT_IN_IMAGES)
@pytest.mark.filterwarnings("ignore:input's size at dim")
def test_normalizations_left_alone_in_images(make):
    traced, plain = of_widths(make)
    assert targets(traced).count("sin") == 3
    assert_same(traced, plain, randn(2, 3, 8, 8), randn(3, 8, 8))


def test_neighbours_are_those_of_one_width():
    traced, plain = of_widths(lambda width: nn.GroupNorm(1, width))
    assert targets(traced).count("an.wide") == 1
    assert targets(traced).count("sin") == 2
    assert_same(traced, plain, randn(2, 3, 8, 8), randn(3, 8, 8))


ROW_NORMS = {
    "LayerNorm": lambda: nn.LayerNorm(4),
    "LayerNorm without weight": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "PReLU": lambda: nn.PReLU(4),
    "PReLU of one number": lambda: nn.PReLU(),
}


@pytest.mark.parametrize("norm", ROW_NORMS.values(), ids=ROW_NORMS)
def test_normalizations_of_a_stack(norm):
    steps = (step(F.relu), called("2"), called("n"), called("3"), last)
    modules = {**linears("", "2", "3"), **layers(norm, "n")}
    traced, plain = both(Scripted(branches(*steps), **modules))
    assert targets(traced).count("sin") == 1
    assert_same(traced, plain, randn(3, 4), randn(2, 4, 4), randn(4))
    assert_trains_alike(traced, plain.train(), randn(5, 4), randn(3, 4))


def test_two_branches_are_too_few_for_rms_norm():
    """The product with the weight would be a launch of its own."""
    norms = {name + "n": nn.RMSNorm(4) for name in "ab"}
    script = branches(called("n"), last, names="ab")
    traced, plain = both(Scripted(script, a=nn.Linear(4, 4), b=nn.Linear(4, 4), **norms))
    assert targets(traced).count("sin") == 2
    assert_same(traced, plain, randn(3, 4))


LAST = {
    "layer_norm": (lambda h: F.layer_norm(h, (4,), eps=0.1), 1),
    "rms_norm": (lambda h: F.rms_norm(h, [4]), 1),
    "of another size": (lambda h: F.layer_norm(h, (3,)), 1),
    "of two dimensions": (lambda h: F.layer_norm(h, (4, 4)), 3),
    "with a weight": (lambda h: F.layer_norm(h, (4,), h.mean((0, 1))), 3),
}


@pytest.mark.parametrize(("function", "sines"), LAST.values(), ids=LAST)
def test_functions_of_the_last_dimension(function, sines):
    traced, plain = both(of_rows(function), PASSES)
    assert targets(traced).count("sin") == sines
    assert_same(traced, plain, randn(3, 4), randn(2, 4, 4), randn(4))


ODD = {
    "without weight": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "without bias": lambda: nn.LayerNorm(4, bias=False),
    "eps": lambda: nn.LayerNorm(4, eps=0.1),
    "another class": lambda: nn.RMSNorm(4),
}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_one_layer_norm_unlike_the_others(odd):
    traced, plain = both(norms(lambda: nn.LayerNorm(4), bn=odd()))
    assert targets(traced).count("sin") == 2
    assert_same(traced, plain, randn(3, 4), randn(2, 3, 4))


UNLIKE = {
    "eps": nn.BatchNorm1d(4, eps=0.1),
    "evaluated": nn.BatchNorm1d(4).eval(),
}


@pytest.mark.parametrize("odd", UNLIKE.values(), ids=UNLIKE)
def test_one_normalization_unlike_the_others(odd):
    """The other two are merged."""
    traced, plain = both(norms(lambda: nn.BatchNorm1d(4), cn=copy.deepcopy(odd)), PASSES)
    assert "an.wide" in targets(traced)
    x = randn(5, 4)
    torch.testing.assert_close(traced(x), plain(x), rtol=0, atol=1e-9)
    assert_same(traced, plain, randn(3, 4))


def normalized_elsewhere(m, x):
    a, b = m.a(x), m.b(x)
    before = m.an(x * 3)
    return m.an(a).sin(), m.bn(b).sin(), before, m.c(x).sin()


def normalized_twice(m, x):
    return [m.an(m.an(m.a(x))).sin(), m.bn(m.bn(m.b(x))).sin(), m.c(x).sin()]


def one_for_all(m, x):
    return [m.an(m.a(x)).sin(), m.an(m.b(x)).sin(), m.an(m.c(x)).sin()]


@pytest.mark.parametrize("script", [normalized_elsewhere, normalized_twice, one_for_all])
def test_a_normalization_called_twice(script):
    """Its statistics depend on the order of its calls."""
    model = Scripted(script, **linears(), **layers(lambda: nn.BatchNorm1d(4), "n"))
    traced, plain = both(model)
    assert_same(traced, plain, randn(3, 4), randn(5, 4))


def level_by_level(m, x):
    return [m.an(m.a(y)).sin() + m.bn(m.b(y)).sin() + m.cn(m.c(y)).sin() for y in (x, x * 3)]


def branch_by_branch(m, x):
    """As in detectors, whose heads look at all levels one after another."""
    levels = x, x * 3
    return [[m.get_submodule(f"{n}n")(m.get_submodule(n)(y)).sin() for y in levels] for n in "abc"]


def levels_turned(m, x):
    """The first level's normalizations cannot move up past the second's."""
    read = [[(n, m.get_submodule(n)(y)) for n in "abc"] for y in (x, x * 3)]
    return [[m.get_submodule(f"{n}n")(h).sin() for n, h in level] for level in read[::-1]]


@pytest.mark.parametrize("script", [level_by_level, branch_by_branch, levels_turned])
def test_normalizations_of_several_levels(script):
    model = Scripted(script, **linears(), **layers(lambda: nn.BatchNorm1d(4), "n"))
    traced, plain = both(model)
    runs = targets(traced).count("an.wide")
    assert runs == (1 if script is levels_turned else 2)
    assert_same(traced, plain, randn(3, 4), randn(5, 4))
    assert_trains_alike(traced, plain, randn(5, 4))


@pytest.mark.parametrize("after", [lambda h: h.view(-1), lambda h: h], ids=["view", "returned"])
def test_a_stack_is_not_laid_side_by_side_where_it_matters(after):
    steps = (step(F.relu), called("2"), called("n"), step(after))
    modules = {**linears("", "2"), **layers(lambda: nn.BatchNorm1d(4), "n")}
    traced, plain = both(Scripted(branches(*steps), **modules))
    assert_same(traced, plain, randn(3, 4), randn(3, 4, 4))
    assert all(output.is_contiguous() for output in traced(randn(3, 4)))


def test_a_stack_whose_channels_are_not_what_is_normalized():
    steps = (step(F.relu), called("2"), called("n"), last)
    modules = {**linears("", "2"), **layers(lambda: nn.BatchNorm1d(5), "n")}
    traced, plain = both(Scripted(branches(*steps), **modules))
    assert_same(traced, plain, randn(3, 5, 4), randn(2, 5, 4), randn(3, 4))


def carved(m, x):
    return m.a(x).relu().sin(), m.b(x).relu().cos(), m.c(x).relu().cos(), m.d(x).tanh()


@pytest.mark.parametrize("second", [False, True], ids=["beside", "stacked"])
@pytest.mark.parametrize("odd", range(4))
def test_some_go_on_alike(odd, second):
    def script(m, x):
        outputs = []
        for i, name in enumerate("abcd"):
            h = getattr(m, name)(x).relu()
            h = getattr(m, name + "2")(h) if second else h
            outputs.append(h.cos().sin() if i == odd else h.tanh().sin())
        return outputs

    names = [name + suffix for name in "abcd" for suffix in ("", "2")]
    traced, plain = both(Scripted(script, **{name: nn.Linear(4, 4) for name in names}))
    assert_same(traced, plain, randn(3, 4), randn(2, 3, 4))


def test_widths_that_differ_and_a_part_that_nobody_reads():
    def script(m, x):
        m.b(x)
        return m.a(x).relu().sin(), m.c(x).relu().sin()

    modules = {name: nn.Linear(4, width) for name, width in zip("abc", (2, 3, 5), strict=True)}
    assert_same(*both(Scripted(script, **modules)), randn(3, 4), randn(2, 3, 4))


DROPOUTS = {"rows": nn.Dropout, "channels": nn.Dropout2d, "nothing": lambda: nn.Dropout(0.0)}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dropout", DROPOUTS.values(), ids=DROPOUTS)
def test_random_stream(dropout, training):
    """Also where the graph was rewritten in evaluation mode, and is trained later."""
    steps = (called("d"), step(F.relu), called("d"), called("2"), last)
    modules = {**linears("", "2"), **layers(dropout, "d")}
    traced, plain = both(Scripted(branches(*steps), **modules).train(training))
    assert_same(traced, plain, randn(3, 4))


def one_evaluated(model):
    model.bn.eval()
    return model


def statistics_replaced(model):
    model.bn.running_mean = torch.arange(4.0, dtype=torch.float64)
    return model


def statistics_changed(model):
    model.bn.running_mean.fill_(2)
    return model


def statistics_reset(model):
    model.bn.reset_running_stats()
    return model


def loaded(assign):
    def load(model):
        values = {name: torch.full_like(v, 2) for name, v in model.state_dict().items()}
        model.load_state_dict(values, assign=assign)
        return model

    return load


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


EVENTS = {
    "one evaluated": one_evaluated,
    "statistics replaced": statistics_replaced,
    "statistics changed": statistics_changed,
    "statistics reset": statistics_reset,
    "loaded": loaded(assign=False),
    "assigned": loaded(assign=True),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "saved": saved,
    "converted": lambda model: model.float().double(),
}


class Normed(nn.Module):
    """Images and rows, in branches that are normalized in all ways."""

    def __init__(self):
        super().__init__()
        self.images = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(3, width, 3),
                nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
                nn.PReLU(),
                nn.InstanceNorm2d(width, affine=True),
                nn.PReLU(width),
            )
            for width in (4, 2)
        )
        self.rows = nn.ModuleList(
            nn.Sequential(
                nn.Linear(6, 4), nn.LayerNorm(4), nn.PReLU(), nn.Linear(4, 4), nn.RMSNorm(4)
            )
            for _ in range(3)
        )

    def forward(self, x):
        x = torch.cat([branch(x).sin().mean((-1, -2)) for branch in self.images], 1)
        return [branch(x).sin().sum(-1) for branch in self.rows]


NORMED_EVENTS = {
    "nothing": lambda model: model,
    "loaded": loaded(assign=False),
    "assigned": loaded(assign=True),
    "copied": copy.deepcopy,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "converted": lambda model: model.float().double(),
    "one evaluated": lambda model: (model.images[1].eval(), model)[1],
    "one frozen": lambda model: (model.rows[1].requires_grad_(False), model)[1],
    "eps": lambda model: (setattr(model.rows[1][1], "eps", 0.3), model)[1],
    "unfused": lambda model: conjoin.unfuse(model),
}


@pytest.mark.parametrize("event", NORMED_EVENTS.values(), ids=NORMED_EVENTS)
@pytest.mark.filterwarnings("ignore:.* is taken out of its wide layer")
def test_an_optimized_model(event):
    plain = Normed().double()
    x = randn(3, 3, 6, 6)
    optimized = conjoin.optimize(plain, (x,))
    assert_same_state(optimized, plain)
    assert_same_state(conjoin.unfuse(optimized), plain)
    counts = count(optimized, (x,), training=True)
    assert (counts.products, counts.others["_prelu_kernel"]) == (3, 3)
    assert counts.norms in (3, 4)  # An RMSNorm is one operation, or several others.
    ours, theirs = event(optimized), plain if event is conjoin.unfuse else event(plain)
    assert_same(ours, theirs, x)
    assert_trains_alike(ours, theirs, x, randn(2, 3, 5, 5))


def towers():
    modules = {**linears("", "2"), **layers(lambda: nn.BatchNorm1d(4), "n")}
    steps = (called("n"), step(lambda h: h.relu_()), called("2"), last)
    return both(Scripted(branches(*steps), **modules))


@pytest.mark.parametrize("event", EVENTS.values(), ids=EVENTS)
def test_what_happens_after_the_rewrite(event):
    models = [event(model) for model in towers()]
    for _ in range(2):
        for x in (randn(5, 4), randn(3, 4)):
            ours, theirs = (model(x) for model in models)
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    ours, theirs = (dict(model.named_buffers()) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    ours, theirs = models
    assert_same(ours, theirs, randn(4, 4))


def test_statistics_of_a_call():
    traced, plain = towers()
    x = randn(5, 4)
    given = {
        name: torch.rand_like(value.double()).to(value) for name, value in plain.named_buffers()
    }
    for training in (True, False):
        found = []
        for model in (traced.train(training), plain.train(training)):
            buffers = {name: value.clone() for name, value in given.items()}
            found.append((torch.func.functional_call(model, buffers, x), buffers))
        torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(dtype):
    models = [model.to(dtype).eval() for model in towers()]
    x = randn(3, 4).to(dtype)
    torch.testing.assert_close(*[model(x) for model in models], rtol=2e-2, atol=2e-2)
    models = [model.float() for model in models]
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(*[model(x.float()) for model in models], rtol=5e-2, atol=5e-2)


def last_norms(norm):
    modules = {**linears("", "2"), **layers(norm, "n")}
    return both(Scripted(branches(called("n"), called("2"), last), **modules))


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4), nn.PReLU])
def test_last_dimension_under_autocast(norm):
    models = [model.float() for model in last_norms(norm)]
    x = torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (model(x) for model in models)
    torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)
    with torch.autocast("cpu", torch.bfloat16), OperationCounter() as counter:
        models[0](x)
    assert counter.counts().norms == (norm().__class__ is nn.LayerNorm)


TRANSFORMS = {
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "vmap": lambda model, x: torch.vmap(model)(torch.stack([x, 2 * x])),
    "jacrev": lambda model, x: torch.func.jacrev(model)(x),
    "no_grad": lambda model, x: torch.no_grad()(model)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform):
    x = randn(3, 4)
    ours, theirs = (transform(model.eval(), x) for model in towers())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(4), lambda: nn.RMSNorm(4), nn.PReLU])
def test_transforms_of_the_last_dimension(transform, norm):
    x = randn(3, 4)
    ours, theirs = (transform(model.eval(), x) for model in last_norms(norm))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms_of_images(transform):
    x = randn(2, 3, 6, 6)
    plain = Normed().double().eval()
    ours, theirs = (transform(m, x) for m in (conjoin.optimize(plain, (x,)), plain))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_released_to_the_bit():
    assert_released_to_the_bit(*towers())


def test_in_a_pass_manager_beside_others():
    """Such as one that takes out parts that nobody reads."""

    def clean(graph_module):
        return PassResult(graph_module, graph_module.graph.eliminate_dead_code())

    def script(m, x):
        a, b, _ = branches(step(F.relu), called("2"), last)(m, x)
        return torch.stack([a, b]).sin()

    traced, plain = both(Scripted(script, **linears("", "2")), [])
    run = [each for rewrite in PIPELINE for each in (rewrite, clean)]
    PassManager(passes=run, steps=2)(traced)
    traced.recompile()
    assert_same(traced, plain, randn(3, 4), randn(2, 3, 4))


def test_a_second_time_changes_nothing():
    traced, _ = towers()
    assert not any(each(traced).modified for each in PIPELINE)
