"""Facts about dictionaries are looked at again where one of those has changed, and only there."""

import pytest

from conjoin.tracing import facts
from conjoin.tracing.facts import RESTLESS, Fact, Unchanged, function_of
from conjoin.tracing.source import Names


def has(dictionary, name, value, names):
    return Fact(f"{names.name(dictionary)}[{name!r}] is {names.name(value)}", dictionary)


def lacks(dictionary, name, names):
    return Fact(f"{name!r} not in {names.name(dictionary)}", dictionary)


@pytest.fixture(params=["numbered", "spelled out"], autouse=True)
def numbers(request, monkeypatch):
    """Whether changes of dictionaries are numbered."""
    if request.param == "spelled out" or facts.dict_version is None:
        monkeypatch.setattr(facts, "dict_version", None)
    return facts.dict_version is not None


class Thing:
    """What has attributes."""

    def __init__(self):
        self.value, self.count = "a", 0


def set_in_a_loop(thing):
    """Often enough for the interpreter to have a quick way to it."""
    for number in range(2000):
        thing.value = "b" if number else "c"


def emptied_and_filled(thing):
    before = dict(vars(thing))
    vars(thing).clear()
    vars(thing).update(before, value="b")


CHANGES = [
    lambda thing: setattr(thing, "value", "b"),
    lambda thing: delattr(thing, "value"),
    lambda thing: setattr(thing, "more", 1),
    lambda thing: vars(thing).update(more=1),
    lambda thing: vars(thing).setdefault("more", 1),
    lambda thing: vars(thing).pop("value"),
    lambda thing: vars(thing).clear(),
    lambda thing: object.__setattr__(thing, "value", "b"),
    set_in_a_loop,
    emptied_and_filled,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("calls", [0, 1, 2, 3])
def test_every_change_is_noticed(change, calls):
    thing, names = Thing(), Names()
    held = vars(thing)
    holds = function_of([has(held, "value", "a", names), lacks(held, "more", names)], names)
    assert all(holds() for _ in range(calls))
    change(thing)
    assert not holds()
    assert not holds()
    held.clear()
    held.update(value="a")
    assert all(holds() for _ in range(4))
    change(thing)
    assert not holds()


def test_what_lacks_a_name_may_be_empty():
    dictionary, names = {}, Names()
    holds = function_of([lacks(dictionary, "more", names)], names)
    assert all(holds() for _ in range(4))
    dictionary.update(more=1)
    assert not holds()
    dictionary.clear()
    assert all(holds() for _ in range(4))
    dictionary.update({"more": 1})
    assert not holds()
    dictionary.pop("more")
    dictionary["other"] = 1
    assert all(holds() for _ in range(4))
    dictionary.clear()
    assert all(holds() for _ in range(4))
    dictionary.update({"more": 1})
    assert not holds()


@pytest.fixture
def looks(monkeypatch, numbers):
    """A list that is one longer for each time that dictionaries are looked at."""
    if not numbers:
        pytest.skip("they are looked at in each call")
    look, found = Unchanged._look, []

    def noted(self):
        found.append(self)
        return look(self)

    monkeypatch.setattr(Unchanged, "_look", noted)
    return found


def test_what_does_not_change_is_not_looked_at_again(looks):
    thing, names = Thing(), Names()
    holds = function_of([has(vars(thing), "value", "a", names)], names)
    assert all(holds() for _ in range(10))
    assert len(looks) == 2
    thing.count = 1
    assert all(holds() for _ in range(10))
    assert len(looks) == 4


def test_what_changes_at_each_call_is_spelled_out(looks):
    thing, calm, names = Thing(), Thing(), Names()
    about = [has(vars(each), "value", "a", names) for each in (thing, calm)]
    holds = function_of(about, names)
    for number in range(50):
        thing.count = number
        assert holds()
    assert len(looks) < RESTLESS + 5
    for each in (thing, calm, thing):
        each.value = "b"
        assert not holds()
        each.value = "a"
        assert holds()


def test_what_changes_now_and_then_is_not(looks):
    thing, names = Thing(), Names()
    holds = function_of([has(vars(thing), "value", "a", names)], names)
    for number in range(3 * RESTLESS):
        thing.count = number
        assert all(holds() for _ in range(3))
    looks.clear()
    thing.count = -1
    assert all(holds() for _ in range(10))
    assert len(looks) == 2


def test_facts_about_something_else_are_always_looked_at():
    thing, other, names = Thing(), [], Names()
    listed = Fact(f"not {names.name(other)}", reads=(other,))
    holds = function_of([listed, has(vars(thing), "value", "a", names)], names)
    assert all(holds() for _ in range(4))
    other.append(1)
    assert not holds()
    other.clear()
    assert holds()
