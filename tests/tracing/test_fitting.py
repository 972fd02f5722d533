"""A structure as source is true of the calls of that structure, and of no others."""

import itertools

import pytest
import torch
from torch import nn

from conjoin.tracing.fitting import source_of
from conjoin.tracing.source import Names
from conjoin.tracing.structures import structure_of

T, U = torch.zeros(2), nn.Parameter(torch.zeros(3))


class Word(str):
    """A string of a class of somebody's own."""


class Own(torch.Tensor):
    """A tensor that may not know all operations."""


NESTED = torch.nested.nested_tensor([T, T])

CALLS = [
    ((), {}),
    ((T,), {}),
    ((T, U), {}),
    ((T,), {"x": U}),
    ((T,), {"y": U}),
    ((), {"x": T, "y": U}),
    ((), {"y": T, "x": U}),
    ((T, None), {}),
    ((T, True), {}),
    ((T, 1), {}),
    ((T, 1.0), {}),
    ((T, 0.0), {}),
    ((T, -0.0), {}),
    ((T, float("nan")), {}),
    ((T, float("inf")), {}),
    ((T, "1"), {}),
    ((T, "it's"), {}),
    ((T, Word("1")), {}),
    ((T, b"1"), {}),
    ((T, torch.float32), {}),
    ((T, torch.float64), {}),
    (([T, U],), {}),
    (((T, U),), {}),
    (([T, [U]],), {}),
    (([T, U, 0],), {}),
    (([],), {}),
    (((),), {}),
    (({},), {}),
    (({"a": T, "b": [U, False]},), {}),
    (({"b": [U, False], "a": T},), {}),
    (({"a": T},), {}),
    ((T,), {"mask": None, "flag": False}),
    ((T,), {"mask": U, "flag": False}),
    ((T.as_subclass(Own),), {}),
    ((NESTED,), {}),
    ((slice(1),), {}),
]


@pytest.mark.parametrize("call", [call for call in CALLS if structure_of(*call) is not None])
def test_calls_of_one_structure(call):
    structure, tensors = structure_of(*call)
    names = Names()
    source = source_of(structure, names)
    facts = " and ".join(source.facts)
    is_such = names.define(f"def is_such(args, kwargs):\n    return {facts}\n", "is_such")
    found = source.function(names)(*call)
    assert len(found) == len(tensors)
    assert all(a is b for a, b in zip(found, tensors, strict=True))
    for other in CALLS:
        same = structure_of(*other)
        assert is_such(*other) is (same is not None and same[0] == structure), other


def test_the_calls_are_of_many_structures():
    found = [structure_of(*call) for call in CALLS]
    known = {each[0] for each in found if each is not None}
    assert len(known) == len([each for each in found if each is not None])
    assert len([each for each in found if each is None]) == 4


@pytest.mark.parametrize("keys", [(1,), ("a", 1), (True,), (None,), ((1, 2),), (1.5,)])
def test_dictionaries_with_other_keys_than_words(keys):
    for held in (dict.fromkeys(keys, T), [dict.fromkeys(keys, 1)]):
        structure, _ = structure_of((held,), {})
        assert source_of(structure, Names()) is None


def test_numbers_that_are_equal_are_not_the_same():
    values = [1, True, 1.0, 0, False, 0.0, -0.0]
    for one, other in itertools.permutations(values, 2):
        names = Names()
        source = source_of(structure_of((one,), {})[0], names)
        facts = " and ".join(source.facts)
        is_such = names.define(f"def is_such(args, kwargs):\n    return {facts}\n", "is_such")
        assert is_such((one,), {})
        assert not is_such((other,), {})
