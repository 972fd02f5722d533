"""Siblings behind equal activations of one tensor share a run exactly while nobody can tell."""

import contextlib
import copy
import functools
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from equivalence import assert_close, assert_equivalent, assert_same_state, gradients
from families import wide_runs
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import conjoin
from conjoin.layers import activation, lockstep, origin
from conjoin.layers.activation import PURE, Noting
from conjoin.legality import Reason


class Block(nn.Module):
    """A layer behind an activation of its own."""

    def __init__(self, act, width):
        super().__init__()
        self.act, self.proj = act, nn.Linear(4, width)

    def forward(self, t):
        return self.proj(self.act(t))


def in_order(t, *blocks):
    return [block(t) for block in blocks]


class Blocks(nn.Module):
    """Blocks that read one embedding as a script says; Python decides, so nothing is rewritten."""

    def __init__(self, make=nn.SiLU, script=in_order):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.blocks = nn.ModuleList(Block(make(), width) for width in (2, 5, 3))
        self.script = script
        self.double()

    def forward(self, x):
        if x.shape[0] == 0:
            return None
        return self.script(self.embed(x) * 1, *self.blocks)


def rows():
    return torch.randn(3, 3, dtype=torch.float64)


def fused(plain, script=None):
    """An optimized copy, which is then called in the way of `script`."""
    optimized = conjoin.optimize(plain, (rows(),))
    assert_grouped(plain)
    if script is not None:
        plain.script = optimized.script = script
    return optimized


def assert_grouped(model, layers=3):
    groups = conjoin.report(model, (rows(),)).groups
    assert [(group.fused, len(group.layers)) for group in groups] == [(True, layers)]


def runs_of(model, x):
    with wide_runs() as runs:
        model(x)
    return len(runs)


def result(model, x):
    """What a call and a backward pass give, or the type of the error."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    try:
        outputs = model(x)
        sum((y.sin() * (i + 1)).sum() for i, y in enumerate(outputs) if y.requires_grad).backward()
    except RuntimeError as error:
        return type(error)
    return {**dict(enumerate(outputs)), **gradients(model), "input": x.grad}


def assert_same(ours, theirs):
    """The same error, or the same tensors; a gradient may be zero where there was none."""
    if isinstance(theirs, type) or isinstance(ours, type):
        assert ours is theirs
        return
    none = {name for name, tensor in theirs.items() if tensor is None}
    assert not any(ours[name] is not None and ours[name].any() for name in none)
    assert_close(*({n: t for n, t in found.items() if n not in none} for found in (ours, theirs)))


MAKERS = {
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU("tanh"),
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.3),
    "ELU": lambda: nn.ELU(0.7),
    "CELU": lambda: nn.CELU(0.7),
    "SELU": nn.SELU,
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "LogSigmoid": nn.LogSigmoid,
    "Softplus": lambda: nn.Softplus(2, 1),
    "Softsign": nn.Softsign,
    "Mish": nn.Mish,
    "Hardswish": nn.Hardswish,
    "Hardsigmoid": nn.Hardsigmoid,
    "Hardtanh": lambda: nn.Hardtanh(-0.5, 0.7),
    "ReLU6": nn.ReLU6,
    "two": lambda: nn.Sequential(nn.Tanh(), nn.SiLU()),
    "three": lambda: nn.Sequential(nn.SiLU(), nn.Identity(), nn.SiLU(), nn.SiLU()),
    "SiLU in a Sequential": lambda: nn.Sequential(nn.SiLU()),
}


def test_every_activation_is_tried():
    assert {type(make()) for make in MAKERS.values()} >= PURE.keys()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_one_run_behind_every_activation(make):
    plain = Blocks(make)
    optimized = fused(plain)
    assert_equivalent(optimized, plain, (rows(),))
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert runs_of(optimized, rows()) == 1


@pytest.mark.parametrize("make", [m for m in MAKERS.values() if type(m()) in PURE])
def test_the_function_is_what_the_module_computes(make):
    module = make()
    function, settings = activation.step_of(module)
    x = 3 * torch.randn(50, dtype=torch.float64)
    assert torch.equal(function(x, **dict(settings)), module(x))


def test_several_steps_of_training():
    plain = Blocks()
    optimized = fused(plain)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (plain, optimized)]
    for _ in range(4):
        x = rows()
        assert runs_of(optimized, x) == 1
        assert_same(result(optimized, x), result(plain, x))
        for optimizer in optimizers:
            optimizer.step()
    assert_close(conjoin.unfuse(optimized).state_dict(), plain.state_dict())


def changing(change, *, after=False):
    """The second block changes what its layer reads, before or after the layer reads it."""

    def script(t, a, b, c):
        first, y = a(t), b.act(t)
        if not after:
            change(y)
        second = b.proj(y)
        if after:
            change(y)
        return first, second, c(t)

    return script


def first_changes(change):
    def script(t, a, b, c):
        y = a.act(t)
        first = a.proj(y)
        change(y)
        return first, b(t), c(t)

    return script


def between(change):
    def script(t, a, b, c):
        first = a(t)
        change(t)
        return first, b(t), c(t)

    return script


def under(*modes):
    def script(t, *blocks):
        outputs = []
        for mode, block in zip(modes, blocks, strict=True):
            with mode():
                outputs.append(block(t))
        return outputs

    return script


def activation_under(mode):
    def script(t, a, b, c):
        with mode():
            y = b.act(t)
        return a(t), b.proj(y), c(t)

    return script


def dying(t, *blocks):
    """Every tensor in between dies before the next block."""
    outputs = []
    for block in blocks:
        y = block.act(t)
        outputs.append(block.proj(y))
        del y
        gc.collect()
    return outputs


def changed_before_its_layer(t, a, b, c):
    y = a.act(t)
    t.mul_(2)
    return a.proj(y), b(t), c(t)


def two_tensors(t, a, b, c):
    u = t + 1
    return a(t), b(u), a(u), b(t), c(t), c(u)


def detached(t, a, b, c):
    return a(t), b.proj(b.act(t).detach()), c(t)


def detached_in_place(t, a, b, c):
    t = t + 0
    y = a.act(t)
    t.detach_()
    return a.proj(y), b(t), c(t)


def used_elsewhere(t, a, b, c):
    y = b.act(t)
    return a(t), b.proj(y) * y.sum(), c(t) * y.mean()


def one_object(t, a, b, c):
    y = a.act(t)
    return a.proj(y), b.proj(y), c.proj(y)


def frozen_clone(t, a, b, c):
    return a(t), b(t.clone()), c(t)


def on_itself(t, a, b, c):
    """The second activation is another one's."""
    return a(t), b.proj(b.act(b.act(t))), c(t)


SCRIPTS = {
    "in order": (in_order, 1),
    "backwards": (lambda t, a, b, c: (c(t), b(t), a(t)), 1),
    "all activations first": (
        lambda t, *blocks: [
            b.proj(y) for b, y in zip(blocks, [b.act(t) for b in blocks], strict=True)
        ],
        1,
    ),
    "each other's activation": (lambda t, a, b, c: (a.proj(c.act(t)), b(t), c.proj(a.act(t))), 1),
    "dying": (dying, 1),
    "t changed before its layer": (changed_before_its_layer, None),
    "two tensors": (two_tensors, 2),
    "detached": (detached, None),
    "detached in place": (detached_in_place, None),
    "used elsewhere": (used_elsewhere, 1),
    "one object": (one_object, 1),
    "a clone": (frozen_clone, None),
    "activated twice": (on_itself, None),
    "keyword": (lambda t, a, b, c: (a(t), b.proj(b.act(input=t)), c.proj(input=c.act(t))), None),
    "functional": (lambda t, a, b, c: (a(t), b.proj(F.silu(t)), c(t)), None),
    "in place": (lambda t, a, b, c: (a(t), b.proj(F.silu(t.clone(), inplace=True)), c(t)), None),
    "y changed": (changing(lambda y: y.mul_(2)), None),
    "y changed through a view": (changing(lambda y: y[0].add_(1)), None),
    "t changed": (between(lambda t: t.mul_(2)), None),
    "t changed through a view": (between(lambda t: t[0].add_(1)), None),
    "no_grad around one": (under(contextlib.nullcontext, torch.no_grad, torch.enable_grad), None),
    "no_grad around an activation": (activation_under(torch.no_grad), None),
    "inference mode around one": (
        under(torch.enable_grad, torch.inference_mode, contextlib.nullcontext),
        None,
    ),
    "checkpoint of all": (lambda *args: checkpoint(in_order, *args, use_reentrant=False), 0),
    "checkpoint of each": (
        lambda t, *blocks: [checkpoint(block, t, use_reentrant=False) for block in blocks],
        0,
    ),
    "reentrant checkpoint of each": (
        lambda t, *blocks: [checkpoint(block, t, use_reentrant=True) for block in blocks],
        1,
    ),
    "checkpoint of one": (
        lambda t, a, b, c: (a(t), checkpoint(b, t, use_reentrant=False), c(t)),
        1,
    ),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [nn.SiLU, nn.ReLU, MAKERS["two"]], ids=["SiLU", "ReLU", "two"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_way_to_call(name, make, frozen):
    script, runs = SCRIPTS[name]
    plain = Blocks(make)
    for block in plain.blocks:
        block.proj.requires_grad_(not frozen)
    optimized = fused(plain, script)
    for _ in range(2):
        x = rows()
        assert_same(result(optimized, x), result(plain, x))
        with torch.no_grad():
            assert_close(dict(enumerate(optimized(x))), dict(enumerate(plain(x))))
    if runs is not None:
        assert runs_of(optimized, rows()) == runs


AFTER = {"the first": first_changes, "another": functools.partial(changing, after=True)}


@pytest.mark.parametrize("script", AFTER.values(), ids=AFTER)
def test_y_changed_after_its_layer_without_gradients(script):
    plain = Blocks()
    optimized = fused(plain, script(lambda y: y.mul_(2)))
    x = rows()
    with torch.no_grad():
        assert_close(dict(enumerate(optimized(x))), dict(enumerate(plain(x))))
        assert runs_of(optimized, x) == 1


@pytest.mark.parametrize("script", AFTER.values(), ids=AFTER)
def test_y_changed_after_its_layer_no_longer_raises(script):
    """PyTorch refuses: the layer needs the old values. The wide layer has them still."""
    plain = Blocks()
    optimized = fused(plain, script(lambda y: y.mul_(2)))
    x = rows()
    assert result(plain, x) is RuntimeError
    plain.script = in_order
    assert_same(result(optimized, x), result(plain, x))


@pytest.mark.parametrize("around", [0, 1, 2])
def test_autocast_around_one(around):
    plain = Blocks().float()
    modes = [contextlib.nullcontext] * 3
    modes[around] = lambda: torch.autocast("cpu", torch.bfloat16)
    optimized = conjoin.optimize(plain, (rows().float(),))
    plain.script = optimized.script = under(*modes)
    x = rows().float()
    for ours, theirs in zip(optimized(x), plain(x), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("make", [nn.SiLU, nn.Softplus])
def test_autocast_around_all(make):
    plain = Blocks(make).float()
    x = rows().float()
    with torch.autocast("cpu", torch.bfloat16):
        optimized = conjoin.optimize(plain, (x,))
        assert runs_of(optimized, x) == 1
        for ours, theirs in zip(optimized(x), plain(x), strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs)


def replaced(block):
    block.act = nn.ReLU()


def hooked(block):
    block.act.register_forward_hook(lambda module, args, output: output * 2)


def pre_hooked(block):
    block.act.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def hooked_in_place(block):
    def hook(module, args, output):
        output.data.mul_(2)

    block.act.register_forward_hook(hook)


def own_forward(block):
    block.act.forward = torch.tanh


def in_place(block):
    block.act.inplace = True


CHANGES = {f.__name__: f for f in (replaced, hooked, pre_hooked, hooked_in_place, own_forward)}


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_one_activation_changed_afterwards(change, which):
    plain = Blocks()
    optimized = fused(plain)
    for model in (plain, optimized):
        change(model.blocks[which])
    for _ in range(12):  # Longer than patience.
        x = rows()
        assert_same(result(optimized, x), result(plain, x))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_activation_in_place_afterwards(which):
    plain = Blocks()
    optimized = fused(plain)
    for model in (plain, optimized):
        in_place(model.blocks[which])
        model.requires_grad_(False)
    x = rows()
    assert_close(dict(enumerate(optimized(x))), dict(enumerate(plain(x))))


def test_a_setting_changed_afterwards():
    plain = Blocks(nn.LeakyReLU)
    optimized = fused(plain)
    for model in (plain, optimized):
        model.blocks[1].act.negative_slope = 0.5
    x = rows()
    assert_same(result(optimized, x), result(plain, x))


def test_the_forward_of_the_class_changed_afterwards(monkeypatch):
    plain = Blocks()
    optimized = fused(plain)
    calls = []
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, t: calls.append(1) or t * len(calls))
    results = []
    for model in (optimized, plain):
        calls.clear()
        results.append(result(model, torch.ones(2, 3, dtype=torch.float64)))
    assert_same(*results)


def keep_gradient(seen, y):
    y.register_hook(lambda gradient: seen.append(gradient.clone()))


def keep_retained(seen, y):
    y.retain_grad()
    seen.append(y)


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("keep", [keep_gradient, keep_retained])
def test_a_hook_on_y_sees_what_it_did(keep, which):
    seen = []

    def script(t, *blocks):
        outputs = []
        for number, block in enumerate(blocks):
            y = block.act(t)
            if number == which:
                keep(seen, y)
            outputs.append(block.proj(y))
        return outputs

    plain = Blocks()
    optimized = fused(plain, script)
    x = rows()
    found = []
    for model in (optimized, plain):
        seen.clear()
        found.append(result(model, x))
        found[-1]["seen"] = seen[0].grad if keep is keep_retained else seen[0]
    assert_same(*found)


def test_backward_hooks_of_an_activation_run():
    plain = Blocks()
    optimized = fused(plain)
    seen = []
    for model in (plain, optimized):
        for block in model.blocks:
            block.act.register_full_backward_hook(lambda module, into, out: seen.append(out[0]))
    x = rows()
    assert_same(result(optimized, x), result(plain, x))
    assert len(seen) == 6
    assert_close(dict(enumerate(seen[:3])), dict(enumerate(seen[3:])))


@pytest.mark.parametrize("retain", [False, True])
def test_backward_between_the_blocks(retain):
    plain = Blocks()
    optimized = fused(plain)
    found = []
    for model in (optimized, plain):
        model.zero_grad()
        t = torch.ones(2, 4, dtype=torch.float64, requires_grad=True) * 2
        try:
            for block in model.blocks:
                block(t).square().sum().backward(retain_graph=retain)
        except RuntimeError as error:
            found.append(type(error))
        else:
            found.append(gradients(model))
    assert_same(*found)


def test_second_derivatives():
    plain = Blocks()
    optimized = fused(plain)
    found = []
    for model in (optimized, plain):
        x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
        loss = sum(y.sin().sum() for y in model(x))
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        first.square().sum().backward()
        found.append({"x": x.grad, **gradients(model)})
    assert_same(*found)


def test_an_error_between():
    def script(t, a, b, c):
        a(t)
        raise KeyError("between")

    plain = Blocks()
    optimized = fused(plain, script)
    with pytest.raises(KeyError, match="between"):
        optimized(rows())
    plain.script = optimized.script = in_order
    x = rows()
    assert runs_of(optimized, x) == 1
    assert_same(result(optimized, x), result(plain, x))


def test_an_error_of_a_layer():
    plain = Blocks()
    messages = []
    for model in (fused(plain), plain):
        with pytest.raises(RuntimeError) as error:
            model.script(torch.ones(2, 5, dtype=torch.float64), *model.blocks)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_threads_do_not_meet():
    plain = Blocks()
    optimized = fused(plain)
    x = rows()
    expected = dict(enumerate(plain(x)))
    failures = []
    start = threading.Barrier(4)

    def work():
        start.wait()
        try:
            for _ in range(50):
                with torch.no_grad():
                    assert_close(dict(enumerate(optimized(x))), expected)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_block_on_another_thread():
    def script(t, a, b, c):
        found = []
        first = a(t)
        thread = threading.Thread(target=lambda: found.append(b(t)))
        thread.start()
        thread.join()
        return first, found[0], c(t)

    plain = Blocks()
    optimized = fused(plain, script)
    x = rows()
    assert_same(result(optimized, x), result(plain, x))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled, saved, lambda m: m.float().double()])
def test_copies(again):
    plain = Blocks()
    optimized = again(fused(plain))
    for block in optimized.blocks:
        assert isinstance(block.act, Noting)
        assert isinstance(block.act, nn.SiLU)
        assert type(block.act).__name__ == "SiLU"
    x = rows()
    assert runs_of(optimized, x) == 1
    if again is copy.deepcopy:
        assert_same(result(optimized, x), result(plain, x))


def test_unfused_exactly():
    plain = Blocks(MAKERS["two"])
    unfused = conjoin.unfuse(fused(plain))
    assert [type(m) for m in unfused.modules()] == [type(m) for m in plain.modules()]
    assert_same_state(unfused, plain)
    assert repr(unfused) == repr(plain)
    with wide_runs() as runs:
        unfused(rows())
    assert not runs


def test_optimized_again():
    plain = Blocks()
    once = fused(plain)
    again = conjoin.optimize(once, (rows(),))
    assert_grouped(once)
    assert runs_of(again, rows()) == 1
    assert_equivalent(again, plain, (rows(),))


def test_activations_before_no_siblings_stay():
    model = Blocks()
    model.head = nn.SiLU()
    optimized = conjoin.optimize(model, (rows(),))
    assert type(optimized.head) is nn.SiLU


def test_one_activation_object_for_all_blocks():
    act = nn.SiLU()
    plain = Blocks(lambda: act)
    optimized = fused(plain)
    assert optimized.blocks[0].act is optimized.blocks[2].act
    assert runs_of(optimized, rows()) == 1
    assert_equivalent(optimized, plain, (rows(),))


def test_an_object_that_all_layers_read_needs_no_note():
    plain = Blocks(script=one_object)
    optimized = fused(plain)
    assert type(optimized.blocks[0].act) is nn.SiLU
    assert runs_of(optimized, rows()) == 1


def slopes():
    slope = iter((0.1, 0.2, 0.2))
    return lambda: nn.LeakyReLU(next(slope))


CHANGES_T = between(lambda t: t.mul_(2)), between(lambda t: t.data.mul_(2))
APART = {
    "inplace": (lambda: nn.SiLU(inplace=True), in_order, Reason.INPUT_MUTATED),
    "dropout": (lambda: nn.Dropout(0.5), in_order, Reason.CALLED_APART),
    "t changed": (nn.SiLU, CHANGES_T[0], Reason.INPUT_MUTATED),
    "t.data changed": (nn.SiLU, CHANGES_T[1], Reason.INPUT_MUTATED),
    "y changed": (nn.SiLU, changing(lambda y: y.mul_(2)), Reason.INPUT_MUTATED),
    "y.data changed": (nn.SiLU, changing(lambda y: y.data.mul_(2)), Reason.INPUT_MUTATED),
    "no_grad": (
        nn.SiLU,
        under(torch.enable_grad, torch.no_grad, torch.enable_grad),
        Reason.CALLED_APART,
    ),
    "a hook": (nn.SiLU, changing(lambda y: y.requires_grad and y.register_hook(print)), None),
    "a hook afterwards": (
        nn.SiLU,
        changing(lambda y: y.requires_grad and y.register_hook(print), after=True),
        None,
    ),
    "retain_grad": (nn.SiLU, changing(lambda y: y.retain_grad(), after=True), None),
    "given back": (nn.SiLU, lambda t, a, b, c: (y := b.act(t), a(t), b.proj(y), c(t)), None),
}


@pytest.mark.parametrize("name", APART)
def test_what_was_seen_to_differ_stays_apart(name):
    make, script, reason = APART[name]
    plain = Blocks(make, script)
    optimized = conjoin.optimize(plain, (rows(),))
    fused_layers = [g.layers for g in conjoin.report(plain, (rows(),)).groups if g.fused]
    apart = "blocks.0.proj" if script in CHANGES_T else "blocks.1.proj"
    assert all(apart not in layers for layers in fused_layers)
    if reason is not None:
        assert reason in {g.reason for g in conjoin.report(plain, (rows(),)).groups}
    if name not in ("inplace", "dropout", "t changed"):
        x = rows()
        assert_same(result(optimized, x), result(plain, x))


def test_different_settings_stay_apart():
    plain = Blocks(slopes())
    optimized = conjoin.optimize(plain, (rows(),))
    (group,) = conjoin.report(plain, (rows(),)).groups
    assert group.layers == ("blocks.1.proj", "blocks.2.proj")
    assert_equivalent(optimized, plain, (rows(),))


class Straight(Blocks):
    """Straight-line code, which is found by tracing."""

    def forward(self, x):
        t = self.embed(x)
        return [block(t) for block in self.blocks]


def test_found_by_tracing():
    plain = Straight()
    optimized = conjoin.optimize(plain)
    (group,) = conjoin.report(plain).groups
    assert group.fused
    assert len(group.layers) == 3
    assert runs_of(optimized, rows()) == 1
    assert_equivalent(optimized, plain, (rows(),))


class StraightChanged(Straight):
    def forward(self, x):
        t = self.embed(x)
        first = self.blocks[0](t)
        t = t.mul_(2)
        return first, self.blocks[1](t), self.blocks[2](t)


def test_a_change_found_by_tracing():
    plain = StraightChanged(nn.ReLU)
    optimized = conjoin.optimize(plain)
    assert all("blocks.0.proj" not in g.layers for g in conjoin.report(plain).groups if g.fused)
    assert_equivalent(optimized, plain, (rows(),))


TRANSFORMS = {
    "vmap": lambda model, x: torch.func.vmap(lambda x: tuple(model(x[None])))(x),
    "grad": lambda model, x: [torch.func.grad(lambda x: sum(y.sin().sum() for y in model(x)))(x)],
    "jvp": lambda model, x: torch.func.jvp(lambda x: tuple(model(x)), (x,), (x,))[1],
    "functional_call": lambda model, x: torch.func.functional_call(
        model, {name: value * 2 for name, value in model.named_parameters()}, (x,)
    ),
    "compile": lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform):
    plain = Straight()
    x = rows()
    ours, theirs = (transform(model, x) for model in (conjoin.optimize(plain), plain))
    assert_close(dict(enumerate(ours)), dict(enumerate(theirs)))


@pytest.fixture
def _fresh():
    lockstep._thread.runs.clear()
    origin._thread.origins.clear()


@pytest.mark.parametrize("make", [nn.SiLU, nn.ReLU, MAKERS["two"]], ids=["SiLU", "ReLU", "two"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("taken", [1, 2, 3])
@pytest.mark.usefixtures("_fresh")
def test_nothing_outlives_the_embedding(make, frozen, grad, taken):
    optimized = fused(Blocks(make)).requires_grad_(not frozen)
    gc.disable()
    try:
        x = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
        with torch.set_grad_enabled(grad):
            t = x * 1
            outputs = [block(t) for block in list(optimized.blocks)[:taken]]
        references = [weakref.ref(tensor) for tensor in (t, *outputs)]
        del t, outputs
        assert [reference() for reference in references] == [None] * (taken + 1)
        assert not lockstep._thread.runs
        origin._thread.clear()
        assert not origin._thread.origins
    finally:
        gc.enable()


@pytest.mark.usefixtures("_fresh")
def test_notes_on_tensors_that_are_no_more_do_not_pile_up():
    act = fused(Blocks()).blocks[0].act
    kept = [act(torch.ones(2)) for _ in range(3 * origin.LIMIT)]
    assert len(origin._thread.origins) == len(kept)
    del kept
    for _ in range(6 * origin.LIMIT):
        held = act(torch.ones(3))
    del held
    kept = [act(torch.ones(2)) for _ in range(4 * origin.LIMIT)]
    assert len(kept) <= len(origin._thread.origins)
    assert len(origin._thread.origins) < 6 * origin.LIMIT


@pytest.mark.usefixtures("_fresh")
def test_memory_stays_flat_over_many_iterations():
    optimized = fused(Blocks())
    while gc.collect():  # What other tests have left is freed step by step.
        pass
    counts = []
    for _ in range(6):
        for _ in range(5):
            outputs = optimized(rows())
            sum(output.sum() for output in outputs).backward()
        del outputs
        gc.collect()
        counts.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    assert len(set(counts[1:])) == 1


def test_a_leaf_is_shared_without_gradients_only():
    optimized = fused(Blocks())
    t = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    with wide_runs() as runs:
        [block(t) for block in optimized.blocks]
    assert not runs
    with wide_runs() as runs:
        [block(t.detach().clone()) for block in optimized.blocks[:1]]
    assert len(runs) == 1
