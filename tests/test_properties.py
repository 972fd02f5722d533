"""What holds for every model with branches, on random ones (see `branching`).

The profile `ci` runs the same hundreds of programs each time; HYPOTHESIS_PROFILE=nightly, or
--hypothesis-profile=nightly, runs thousands of new ones. A failure prints the program as source.
"""

import collections
import copy
import functools
import io
import pickle

import pytest
import torch
from branching import WAYS, Program, forget_modules, programs
from equivalence import (
    Outcome,
    assert_close,
    assert_same_state,
    assert_same_step,
    assert_same_structure,
    bytes_of,
    differentiable,
    random_states,
    set_seed,
    step,
    tensors,
)
from hypothesis import Phase, assume, event, given, settings
from torch import Tensor, nn

import conjoin
from conjoin.layers import KINDS, lockstep
from conjoin.layers.view import views
from conjoin.layers.wide import Wide
from conjoin.tracing.regions import Region

pytestmark = pytest.mark.filterwarnings("ignore")

ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)
"""What a model may raise; NotImplementedError is a RuntimeError."""

OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    # Behind BatchNorm gradients are zero but for rounding, which Adam would scale up to its step.
    "adam": functools.partial(torch.optim.Adam, lr=0.01, eps=1e-3),
}

in_both_ways = pytest.mark.parametrize("way", WAYS)


@pytest.fixture(autouse=True, scope="module")
def _modules_are_let_go():
    yield
    forget_modules()


def with_inputs(program: Program, model: nn.Module, **kwargs) -> nn.Module:
    return conjoin.optimize(model, program.arguments()[0], **kwargs)


def without_inputs(program: Program, model: nn.Module) -> nn.Module:
    return conjoin.optimize(model)


def with_all_inputs(program: Program, model: nn.Module) -> nn.Module:
    return conjoin.optimize(model, [program.arguments(call)[0] for call in program.calls])


VARIANTS = {
    "with inputs": with_inputs,
    "without inputs": without_inputs,
    "in place": functools.partial(with_inputs, inplace=True),
    "with all inputs": with_all_inputs,
}


def runs(program: Program, way: str) -> bool:
    """Whether a plain model runs on its first inputs in some mode."""
    for training in (True, False):
        try:
            called(program.model(way), program, training=training)
            return True
        except ERRORS:
            continue
    return False


def called(model: nn.Module, program: Program, call: int = 0, *, training: bool = True):
    """One call, as `step` makes it."""
    _, (args, kwargs) = differentiable(program.arguments(call))
    model.train(training)
    set_seed()
    return model(*args, **kwargs)


def stepped(model: nn.Module, program: Program, call: int, training: bool) -> Outcome | Exception:
    """What a step leaves behind, or the error that it raises."""
    try:
        outcome = step(model, *program.arguments(call), training=training)
    except ERRORS as error:
        return error
    outcome.gradients = {name: dense(grad) for name, grad in outcome.gradients.items()}
    return outcome


def dense(gradient: Tensor | None) -> Tensor | None:
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient


def shown(value):
    """Everything about an output but its tensors' values."""
    if isinstance(value, Tensor):
        return type(value), value.dtype, value.shape, value.requires_grad, value.is_leaf
    if isinstance(value, dict):
        return type(value), [(key, shown(item)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value), [shown(item) for item in value]
    return type(value), value


def complains_of_a_change(outcome) -> bool:
    """Whether autograd misses a value that was changed in place.

    A part that is no longer contiguous may have been copied for what saved it, which is fine.
    """
    return isinstance(outcome, RuntimeError) and "modified by an inplace operation" in str(outcome)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_call(actual: nn.Module, expected: nn.Module, program, call, training) -> None:
    """A step does the same, or raises the same class of error; the state is the same after it."""
    ours, theirs = (stepped(model, program, call, training) for model in (actual, expected))
    errors = [outcome for outcome in (ours, theirs) if isinstance(outcome, Exception)]
    if errors:
        same = type(ours) is type(theirs) or complains_of_a_change(theirs)
        assert same, f"one side only: {errors[0]!r}"
    else:
        assert_same_step(ours, theirs)
    assert_close(state(actual), state(expected), "state after the call:")


@in_both_ways
@pytest.mark.parametrize("variant", VARIANTS)
@given(program=programs())
def test_every_call_is_the_originals(way, variant, program):
    assume(runs(program, way))
    original = program.model(way)
    optimized = VARIANTS[variant](program, program.model(way))
    for training in (True, False, True):
        for call in program.calls:
            assert_same_call(optimized, original, program, call, training)


@in_both_ways
@given(program=programs())
def test_outputs_are_of_the_same_types_in_every_mode(way, program):
    assume(runs(program, way))
    original, optimized = program.model(way), with_inputs(program, program.model(way))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        ours, theirs = (output_in(mode, model, program) for model in (optimized, original))
        assert shown(ours) == shown(theirs), mode.__name__
        assert_close(dict(tensors(ours)), dict(tensors(theirs)), f"{mode.__name__}: output")


def output_in(mode, model: nn.Module, program: Program):
    with mode():
        try:
            return called(model, program)
        except ERRORS as error:
            return type(error)


@in_both_ways
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@given(program=programs())
def test_training_goes_as_the_originals(way, optimizer, program):
    assume(runs(program, way))
    original, optimized = program.model(way), with_inputs(program, program.model(way))
    assume(optimizer != "adam" or not any(is_sparse(module) for module in original.modules()))
    ours, theirs = (trained(m, OPTIMIZERS[optimizer], program) for m in (optimized, original))
    assume(not any(map(complains_of_a_change, theirs)))
    assert list(map(type, ours)) == list(map(type, theirs))
    plain = conjoin.unfuse(optimized)
    assert_close(state(plain), state(original), "trained")
    assert_same_structure(plain, original)


def is_sparse(module: nn.Module) -> bool:
    """Whether its gradients are, which Adam does not take."""
    return isinstance(module, nn.Embedding) and module.sparse


def trained(model: nn.Module, optimizer_class, program: Program) -> list:
    """Trains the model; gives what its steps left behind, or raised."""
    optimizer = optimizer_class(model.parameters())
    outcomes = []
    for number in range(3):
        outcome = stepped(model, program, number % len(program.batches), training=True)
        outcomes.append(outcome)
        if isinstance(outcome, Outcome):  # After an error some gradients are there, others not.
            optimizer.step()
    return outcomes


@in_both_ways
@given(program=programs())
def test_unfuse_gives_the_original_back(way, program):
    assume(runs(program, way))
    original = program.model(way)
    args, _ = program.arguments()
    before = everything(original)
    optimized = conjoin.optimize(original, args)
    assert_unchanged(everything(original), before)
    assert_same_state(optimized, original)
    assert names_of(optimized) == names_of(original)
    plain = conjoin.unfuse(optimized)
    assert_same_state(plain, original)
    assert_same_structure(plain, original)
    assert not list(views(plain))
    assert_same_state(conjoin.unfuse(optimized, inplace=True), original)


def names_of(model: nn.Module) -> list[tuple[str, str]]:
    """The names and classes of the modules, wide layers left out."""
    named = model.named_modules(remove_duplicate=False)
    return [(name, type(m).__name__) for name, m in named if not isinstance(m, Wide)]


def everything(model: nn.Module) -> dict[str, object]:
    """All that a model is, and the random streams, in a form to be compared."""
    streams = [s.tolist() if isinstance(s, Tensor) else s for s in random_states()]
    found: dict[str, object] = {"random streams": streams}
    for name, module in model.named_modules(remove_duplicate=False):
        found[name] = id(module), type(module)
        found |= {f"{name}.{key}": frozen(value) for key, value in vars(module).items()}
    return found


def assert_unchanged(after: dict[str, object], before: dict[str, object]) -> None:
    assert after.keys() == before.keys()
    changed = [name for name in before if after[name] != before[name]]
    assert not changed, f"{changed} changed"


def frozen(value):
    """A value that later changes of what it was made from do not reach."""
    if isinstance(value, Tensor):
        held = bytes(bytes_of(value).tolist()) if value.dtype is not torch.bool else value.tolist()
        return id(value), value.requires_grad, value._version, frozen(value.grad), held
    if isinstance(value, dict):
        return type(value), [(key, frozen(item)) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return type(value), [frozen(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else id(value)


@in_both_ways
@given(program=programs())
def test_optimizing_twice_changes_nothing(way, program):
    assume(runs(program, way))
    args, _ = program.arguments()
    optimized = with_inputs(program, program.model(way))
    groups = conjoin.report(optimized, args).groups
    before = everything(optimized)
    assert conjoin.optimize(optimized, args, inplace=True) is optimized
    assert_unchanged(everything(optimized), before)
    again = conjoin.optimize(optimized, args)
    assert fused_groups(again) == fused_groups(optimized)
    assert conjoin.report(again, args).groups == groups
    assert regions_of(again) == regions_of(optimized)


def fused_groups(model: nn.Module) -> list[tuple[str, ...]]:
    """The names of the layers of each wide layer."""
    found = collections.defaultdict(list)
    for name, view in views(model):
        found[view.wide_layer].append((view.conjoin_index, name))
    return sorted(tuple(name for _, name in sorted(members)) for members in found.values())


def regions_of(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Region)]


@in_both_ways
@given(program=programs())
def test_report_changes_nothing_and_tells_the_same_of_both(way, program):
    assume(runs(program, way))
    args, _ = program.arguments()
    model = program.model(way)
    optimized = with_inputs(program, model)
    reports = []
    for reported in (model, optimized):
        for inputs in (None, args):
            before = everything(reported)
            reports.append(conjoin.report(reported, inputs))
            assert_unchanged(everything(reported), before)
    assert reports[1].groups == reports[3].groups
    fused = [group.layers for group in reports[3].groups if group.fused]
    assert sorted(map(sorted, fused_groups(optimized))) == sorted(map(sorted, fused))


@in_both_ways
@given(program=programs())
def test_every_candidate_is_accounted_for_once(way, program):
    assume(runs(program, way))
    model = program.model(way)
    seen = observed(program, way)
    groups = conjoin.report(model, program.arguments()[0]).groups
    told = sorted(name for group in groups for name in group.layers)
    assert told == sorted(name for names in connected(model, seen) for name in names)
    assert all(len(group.layers) > 1 for group in groups if group.fused)
    assert all((group.reason is None) == group.fused for group in groups)
    together = {name: group for group in groups if group.fused for name in group.layers}
    for names in could_be_one(model, seen):
        assert {id(together.get(name)) for name in names} == {id(together.get(names[0]))}
        assert names[0] in together, f"{names} are not fused: {groups}"


def observed(program: Program, way: str) -> dict[str, list[tuple]]:
    """For each layer the tensors that it reads in a run, with what their state was."""
    model = program.model(way)
    found: dict[str, list[tuple]] = {}
    kept = []

    def note(name, module, args, kwargs):
        read = (*args, *kwargs.values())[0]
        kept.append(read)  # So that its id stays its own.
        modes = torch.is_grad_enabled(), module.training
        weights = tuple(parameter._version for parameter in model.parameters())
        found.setdefault(name, []).append((id(read), read._version, *modes, weights))

    for name, module in model.named_modules():
        if isinstance(module, LAYERS):
            module.register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
    for training in (True, False):
        try:
            kept.append(called(model, program, training=training))
        except ERRORS:
            found = {name: [c for c in calls if c[3] != training] for name, calls in found.items()}
    return found


LAYERS = tuple(kind.layer for kind in KINDS)


def connected(model: nn.Module, seen: dict[str, list[tuple]]) -> list[list[str]]:
    """Two or more layers of one kind, each of which reads a tensor that another one reads."""
    groups: list[tuple[type, set, list[str]]] = []
    for name, calls in seen.items():
        kind = next(cls for cls in LAYERS if isinstance(model.get_submodule(name), cls))
        tensors_read = {call[0] for call in calls}
        touching = [g for g in groups if g[0] is kind and g[1] & tensors_read]
        groups = [g for g in groups if not any(g is t for t in touching)]
        read = tensors_read.union(*(g[1] for g in touching))
        groups.append((kind, read, [name, *(n for g in touching for n in g[2])]))
    return [names for _, _, names in groups if len(names) > 1]


def could_be_one(model: nn.Module, seen: dict[str, list[tuple]]) -> list[list[str]]:
    """Ordinary layers of equal settings that make the same calls: nothing is in their way."""
    held = collections.Counter(
        parameter.data_ptr()
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
    )
    alike = collections.defaultdict(list)
    for name, calls in seen.items():
        layer = model.get_submodule(name)
        if calls and ordinary(layer) and all(held[p.data_ptr()] == 1 for p in layer.parameters()):
            alike[type(layer), tuple(calls), settings_of(layer)].append(name)
    return [names for names in alike.values() if len(names) > 1]


def ordinary(layer: nn.Module) -> bool:
    odd = ("max_norm", "sparse", "scale_grad_by_freq")
    return (
        type(layer) in LAYERS
        and not (layer._forward_hooks or "forward" in vars(layer) or layer.weight is None)
        and getattr(layer, "groups", 1) == 1
        and not any(getattr(layer, option, None) for option in odd)
        and not any(vars(parameter) for parameter in layer.parameters())
    )


def settings_of(layer: nn.Module) -> tuple:
    """What two layers must have in common to be one."""
    ignored = ("out_features", "out_channels", "embedding_dim", "training")
    plain = {k: str(v) for k, v in vars(layer).items() if k[0] != "_" and k not in ignored}
    parameters = [
        (name, p.dtype, p.requires_grad, p.is_contiguous()) for name, p in layer.named_parameters()
    ]
    return tuple(plain.items()), tuple(parameters)


@in_both_ways
@given(program=programs())
def test_checkpoints_go_both_ways(way, program):
    assume(runs(program, way))
    original, optimized = program.model(way), with_inputs(program, program.model(way))
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.mul_(0.75)
    optimized.load_state_dict(original.state_dict())
    assert_same_state(optimized, original)
    assert_same_call(optimized, original, program, 0, True)
    assert_same_call(optimized, original, program, 0, False)
    fresh = program.model(way)
    fresh.load_state_dict(optimized.state_dict())
    assert_same_state(fresh, optimized)
    assert_same_state(reread(optimized), optimized)


def reread(model: nn.Module) -> nn.Module:
    """A model with zeros for weights, after loading a file of this one's."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(torch.load(file))
    return other


@in_both_ways
@given(program=programs())
def test_copies_do_the_same(way, program):
    assume(runs(program, way))
    optimized = with_inputs(program, program.model(way))
    copies = [copy.deepcopy(optimized)]
    if pickles(program.model(way)):
        copies.append(pickle.loads(pickle.dumps(optimized)))
    for copied in copies:
        assert_same_state(copied, optimized)
        assert fused_groups(copied) == fused_groups(optimized)
        model = program.model(way)
        for call in program.calls:
            assert_same_call(copied, model, program, call, True)


def pickles(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except RuntimeError:  # A parametrized module.
        return False
    return True


WRONG = {
    "a feature more": lambda x: torch.cat([x, x[..., :1]], -1),
    "a channel more": lambda x: torch.cat([x, x[:, :1]], 1),
    "no batch": lambda x: x[0],
    "a dimension more": lambda x: x.unsqueeze(0),
    "single precision": lambda x: x.float(),
    "integers": lambda x: x.long() + 9,
    "empty": lambda x: x[:0],
    "a list": lambda x: x.tolist(),
    "nothing": lambda x: None,
}


@in_both_ways
@pytest.mark.parametrize("wrong", WRONG)
@settings(max_examples=max(settings().max_examples // len(WRONG), 5))
@given(program=programs(steps=3))
def test_errors_are_the_originals(way, wrong, program):
    assume(runs(program, way))
    original, optimized = program.model(way), with_inputs(program, program.model(way))
    ours, theirs = (outcome_of(model, program, WRONG[wrong]) for model in (optimized, original))
    event("raises" if isinstance(theirs, tuple) else "does not raise")
    if isinstance(ours, tuple) or isinstance(theirs, tuple):
        assert ours == theirs
    else:
        assert_close(ours, theirs, "output")
    assert_close(state(optimized), state(original), "state after the error:")


def outcome_of(model: nn.Module, program: Program, wrong):
    """The outputs of a call with a wrong argument, or the error."""
    (first, *others), kwargs = program.arguments()
    set_seed()
    try:
        return dict(tensors(model(wrong(first), *others, **kwargs)))
    except ERRORS as error:
        return type(error), str(error)


AT_LEAST = {
    ("straight", "fused"): 0.6,
    ("straight", "refused"): 0.3,
    ("straight", "rewritten"): 0.2,
    ("straight", "in lockstep"): 0.2,
    ("decided", "fused"): 0.6,
    ("decided", "in lockstep"): 0.5,
    ("decided", "runs without an error"): 0.6,
}


def test_the_programs_are_worth_running(monkeypatch):
    counted = collections.Counter()
    count = 40

    @settings(max_examples=count, derandomize=True, database=None, phases=[Phase.generate])
    @given(program=programs())
    def look(program):
        for way in WAYS:
            counted.update((way, fact) for fact in facts(program, way, monkeypatch))

    look()
    for key, share in AT_LEAST.items():
        assert counted[key] >= share * count, f"{key}: {counted[key]} of {count}: {counted}"


def facts(program: Program, way: str, monkeypatch) -> set[str]:
    """What a program reaches."""
    if not runs(program, way):
        return set()
    model = program.model(way)
    groups = conjoin.report(model, program.arguments()[0]).groups
    optimized = with_inputs(program, model)
    # A rewritten forward calls wide layers as modules only where somebody follows such calls.
    counting(monkeypatch, nn.Module, "__call__")
    wide, shared = counting(monkeypatch, Wide, "forward"), counting(monkeypatch, lockstep, "_start")
    outcome = stepped(optimized, program, 0, True)
    monkeypatch.undo()
    found = {
        "fused": any(group.fused for group in groups),
        "refused": any(not group.fused for group in groups),
        "rewritten": bool(wide),
        "in lockstep": bool(shared),
        "runs without an error": isinstance(outcome, Outcome),
    }
    return {fact for fact, holds in found.items() if holds}


def counting(monkeypatch, owner, name: str) -> list:
    """A list that grows with each call."""
    calls, function = [], getattr(owner, name)

    def called_through(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, called_through)
    return calls
