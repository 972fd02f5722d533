"""A look at a model puts back all that its code can reach, and what it is called with."""

import collections
import contextlib
import contextvars
import functools
import gc
import itertools
import linecache
import queue
import threading
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.fx import graph_module
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.weak import WeakTensorKeyDictionary

import conjoin

ONES = torch.ones(2, 4)

LOOKS = {
    "report": lambda model, call: conjoin.report(model, call),
    "optimize": lambda model, call: conjoin.optimize(model, call),
    "within memory": lambda model, call: conjoin.optimize(model, call, memory_budget=2**30),
    "measured": lambda model, call: conjoin.optimize(model, call, policy="measure"),
    "traced": lambda model, call: conjoin.optimize(model),
    "verify": lambda model, call: conjoin.verify(model, model, call),
}

QUICK = {name: look for name, look in LOOKS.items() if name != "measured"}

every_look = pytest.mark.parametrize("look", QUICK.values(), ids=QUICK)


class Heads(nn.Module):
    def __init__(self, before=lambda model, x: x):
        super().__init__()
        self.a, self.b, self.before = nn.Linear(4, 3), nn.Linear(4, 3), before

    def forward(self, x):
        x = self.before(self, x)
        return self.a(x), self.b(x)


def known(tensor):
    """All that there is to know of a tensor, as something to compare."""
    gradient = None if tensor.grad is None else (id(tensor.grad), tensor.grad.tolist())
    own = {name: id(value) for name, value in vars(tensor).items()}
    values = tensor.detach().as_subclass(torch.Tensor).tolist()
    return values, tensor._version, tensor.requires_grad, gradient, own, tensor.data_ptr()


def adds(tensor):
    return lambda model, x: x + tensor.add_(1)


def adds_to_part(tensor):
    def before(model, x):
        tensor.view(2, 2)[0] += 1
        torch._foreach_add_([tensor], 1)
        return x

    return before


def multiplies(tensor):
    return lambda model, x: x * tensor


def sets_data(tensor):
    def before(model, x):
        tensor.data = torch.full((4,), 2.0)
        return x + tensor

    return before


def marks(tensor):
    def before(model, x):
        tensor.mark = x
        tensor.requires_grad = True
        return x

    return before


class Tagged(torch.Tensor):
    """A tensor of the user's own"""


TENSORS = {
    "plain": lambda: torch.zeros(4),
    "Parameter": lambda: nn.Parameter(torch.ones(4), requires_grad=False),
    "subclass": lambda: torch.zeros(4).as_subclass(Tagged),
}


@every_look
@pytest.mark.parametrize("make", TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("does", [adds, adds_to_part, sets_data, marks])
def test_tensors_beside_the_model(look, make, does):
    tensor = make()
    before = known(tensor)
    look(Heads(does(tensor)), (ONES,))
    assert known(tensor) == before


@every_look
@pytest.mark.parametrize("gradient", [None, torch.ones(4)])
def test_gradients_beside_the_model(look, gradient):
    weight = nn.Parameter(torch.ones(4))
    weight.grad = None if gradient is None else gradient.clone()
    before = known(weight)
    look(Heads(multiplies(weight)), (ONES,))
    assert known(weight) == before


@every_look
def test_what_was_saved_for_a_backward_pass_goes_backward(look):
    table, weight = torch.ones(4), nn.Parameter(torch.ones(4))
    loss = (weight * table).sum()
    look(Heads(adds(table)), (ONES,))
    loss.backward()
    assert torch.equal(weight.grad, torch.ones(4))


def described(module):
    attributes = [
        (name, id(value)) for inner in module.modules() for name, value in vars(inner).items()
    ]
    tensors = [known(tensor) for tensor in (*module.parameters(), *module.buffers())]
    return attributes, tensors, len(module.seen)


class Notes(nn.BatchNorm1d):
    """Keeps what it gets."""

    def __init__(self):
        super().__init__(4)
        self.seen, self.last = [], None

    def forward(self, x):
        self.seen.append(x)
        self.last = x
        return super().forward(x)


NOTES = Notes()


class OfGlobal(Heads):
    def forward(self, x):
        return super().forward(NOTES(x))


def in_closure():
    notes = Notes()
    return Heads(lambda model, x: notes(x)), notes


def in_list():
    model = Heads(lambda model, x: model.others[0](x))
    model.others = [Notes()]
    return model, model.others[0]


def by_itself():
    """A copy of a function is the very function, which refers to the model that was copied."""
    model = Heads()
    model.notes = Notes()
    model.before = lambda _, x: model.notes(x)
    return model, model.notes


OTHERS = {
    "global": lambda: (OfGlobal(), NOTES),
    "closure": in_closure,
    "list": in_list,
    "itself": by_itself,
}


@every_look
@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_modules(look, make):
    model, module = make()
    before = described(module)
    look(model, (ONES,))
    assert described(module) == before


HELD = []


class OfHeld(Heads):
    def forward(self, x):
        return super().forward(x * len(HELD))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_hooks_of_all_modules(look):
    seen = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(output))
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(handle.remove)
        look(Heads(), (ONES,))
    assert seen == []


def test_a_model_that_its_own_code_can_reach():
    HELD.clear()
    model = OfHeld()
    HELD.append(model)
    expected = model(ONES)
    conjoin.optimize(model, (ONES,), inplace=True)
    assert [group.fused for group in conjoin.report(model, (ONES,)).groups] == [True]
    torch.testing.assert_close(model(ONES), expected)


@every_look
def test_hooks_of_the_model(look):
    model, seen = Heads(), []
    model.register_forward_hook(lambda module, args, output: seen.append(output))
    model.a.register_full_backward_hook(lambda module, given, got: seen.append(got))
    model.a.weight.register_hook(seen.append)
    model.b.weight.register_post_accumulate_grad_hook(seen.append)
    model.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(prefix))
    look(model, (ONES,))
    assert seen == []


class Cache:
    def __init__(self):
        self.held, self.total = [torch.zeros(2, 4)], torch.zeros(())

    def update(self, x):
        self.total += 1
        self.held.append(self.held[-1] + x)
        return self.held[-1]


class Cached(Heads):
    def forward(self, x, cache):
        x = cache.update(x)
        return self.a(x), self.b(x)


@pytest.mark.parametrize("look", [LOOKS[n] for n in ("report", "optimize", "verify")])
def test_objects_that_the_model_is_called_with(look):
    cache = Cache()
    look(Cached(), (ONES, cache))
    assert [type(tensor) for tensor in cache.held] == [torch.Tensor]
    assert (cache.total.item(), cache.total._version) == (0, 0)


@pytest.mark.parametrize("look", [LOOKS[n] for n in ("report", "optimize", "verify")])
def test_containers_that_the_model_is_called_with(look):
    class Adding(Heads):
        def forward(self, x, held, queue):
            held.add(x.shape)
            queue.append(x)
            return self.a(x), self.b(x)

    held, waiting = set(), collections.deque()
    look(Adding(), (ONES, held, waiting))
    assert (len(held), len(waiting)) == (0, 0)


@functools.lru_cache(maxsize=8)
def table(count):
    return torch.arange(float(count))


class Tables(Heads):
    @functools.lru_cache  # noqa: B019 - That a model is kept is what is tested.
    def own(self, count):
        return torch.ones(count)

    @staticmethod
    @functools.cache
    def shared(count):
        return torch.ones(count)

    def forward(self, x):
        return super().forward(x + table(4) + self.own(4) + self.shared(4))


@every_look
def test_caches_of_functions(look):
    model = Tables()
    reads = [lambda: table(4), lambda: table(3), lambda: model.own(4), lambda: Tables.shared(4)]
    kept = [read() for read in reads]
    cached = table, vars(Tables)["own"], vars(Tables)["shared"]
    look(model, (ONES,))
    assert all(read() is before for read, before in zip(reads, kept, strict=True))
    assert (table, vars(Tables)["own"], vars(Tables)["shared"]) == cached


COUNT, ROWS = itertools.count(), iter([1.0] * 99)


class Counting(Heads):
    def __init__(self):
        super().__init__()
        self.steps, self.held = itertools.count(5, 2), [itertools.count(1)]
        self.rows = iter(range(9))

    def forward(self, x):
        drawn = next(COUNT) + next(ROWS) + next(self.steps) + next(self.held[0]) + next(self.rows)
        return super().forward(x + drawn)


@every_look
def test_counters(look):
    model = Counting()
    counters = COUNT, ROWS, model.steps, model.held[0], model.rows
    before = [repr(each.__reduce__()) for each in counters]
    look(model, (ONES,))
    assert [repr(each.__reduce__()) for each in counters] == before
    assert (COUNT, ROWS, model.steps, model.held[0], model.rows) == counters


VARIABLE = contextvars.ContextVar("variable", default=None)
LOCAL, WAITING = threading.local(), queue.Queue()
BY_MODULE, BY_NAME = weakref.WeakKeyDictionary(), weakref.WeakValueDictionary()
BY_TENSOR, MODULES = WeakTensorKeyDictionary(), weakref.WeakSet()


def keeps_everywhere(model, x):
    VARIABLE.set(x)
    LOCAL.x = x
    WAITING.put(x)
    BY_MODULE[model] = BY_TENSOR[model.a.weight] = x
    BY_NAME["model"] = model
    MODULES.add(model)
    return x


@every_look
def test_containers_of_the_standard_library(look):
    model = Heads(keeps_everywhere)
    look(model, (ONES,))
    assert VARIABLE.get() is None
    assert vars(LOCAL) == {}
    assert WAITING.qsize() == 0
    assert not any(map(len, (BY_MODULE, BY_NAME, BY_TENSOR, MODULES)))


@every_look
@pytest.mark.parametrize("level", [1, 2])
def test_a_warning_is_shown_to_who_runs_the_model(look, level):
    def before(model, x):
        warnings.warn("look out", stacklevel=level)
        return x

    model = Heads(before)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("default")
        look(model, (ONES,))
        shown.clear()
        model(ONES)
        model(ONES)
    assert [str(each.message) for each in shown] == ["look out"]


@every_look
def test_an_interrupted_look(look):
    seen, table = [], torch.zeros(4)

    def before(model, x):
        model.count = len(seen)
        seen.append(x)
        table.add_(1)
        raise KeyboardInterrupt

    model = Heads(before)
    held, before = dict(vars(model)), known(table)
    with contextlib.suppress(KeyboardInterrupt):
        look(model, (ONES,))
    assert (vars(model), seen) == (held, [])
    assert known(table) == before


class Anew(Heads):
    """Is copied by its constructor, which draws random numbers."""

    def __deepcopy__(self, memo):
        copied = type(self)()
        copied.load_state_dict(self.state_dict())
        return copied


@every_look
def test_copies_that_draw_random_numbers(look):
    model = Anew()
    before = torch.get_rng_state()
    look(model, (ONES,))
    assert torch.equal(torch.get_rng_state(), before)


def sizes():
    gc.collect()
    return len(gc.get_objects()), len(linecache.cache), len(graph_module._loader.eval_cache)


@every_look
def test_nothing_grows(look):
    def once():
        class Own(Heads):
            """A class of each time's own"""

        look(Own(), (ONES,))

    for _ in range(3):
        once()
    before = sizes()
    for _ in range(5):
        once()
    grown = [now - then for now, then in zip(sizes(), before, strict=True)]
    assert grown[0] < 5
    assert grown[1:] == [0, 0]


def test_what_is_optimized_goes_with_its_class():
    class Own(Heads):
        """A class of this test's own"""

    fused = conjoin.optimize(Own(), (ONES,))
    fused(ONES)
    left = [weakref.ref(each) for each in (Own, type(fused), fused, fused.a)]
    del Own, fused
    gc.collect()
    assert [each() for each in left] == [None] * 4


class Sealed(type):
    def __setattr__(cls, name, value):
        raise TypeError("nothing may be set on this class")


class Scales(metaclass=Sealed):
    """A cache on a class that lets nobody set an attribute."""

    @staticmethod
    @functools.lru_cache
    def scale(number):
        return number / 2


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) * Scales.scale(3), self.b(x)


@pytest.mark.parametrize("look", [conjoin.report, conjoin.optimize])
def test_caches_of_classes_that_are_sealed_stay(look):
    Scales.scale(1)
    before, held = Scales.scale.cache_info(), vars(Scales)["scale"]
    look(Scaled(), (torch.randn(2, 4),))
    assert Scales.scale.cache_info() == before
    assert vars(Scales)["scale"] is held
