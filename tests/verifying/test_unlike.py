"""Values of any kind: equal ones are found equal, and what differs in others is named."""

import dataclasses

import numpy
import pytest
import torch
from torch import nn

from conjoin.verifying import outcome
from conjoin.verifying.unlike import first_unlike


@dataclasses.dataclass
class Record:
    x: int


class Plain:
    def __init__(self, value):
        self.value = value


VALUES = {
    "text": (lambda: "a", lambda: "b", "value: is 'b' instead of 'a'"),
    "nan": (lambda: float("nan"), lambda: 1.0, "value: differs by inf"),
    "complex": (lambda: 1j, lambda: 2j, "value: differs by 1.0e+00"),
    "list": (lambda: [1], lambda: [1, 2], "value[1]: is there, and not"),
    "set": (lambda: {1, 2}, lambda: {1, 3}, "value[1]: is 3 instead of 2"),
    "object": (lambda: Plain(1), lambda: Plain(2), "value.value: is 2 instead of 1"),
    "dataclass": (lambda: Record(1), lambda: Record(2), "value.x: is 2 instead of 1"),
    "array": (
        lambda: numpy.ones(2),
        lambda: numpy.ones(3),
        "value: has shape (3,) instead of (2,)",
    ),
    "numpy": (lambda: numpy.float32(1), lambda: numpy.float32(2), "value: differs by 1.0e+00"),
    "function": (lambda: print, lambda: 1, "value: is of type int instead of"),
    "dtype": (lambda: torch.int8, lambda: torch.int16, "value: is torch.int16 instead of"),
    "large integers": (
        lambda: torch.tensor(2**60),
        lambda: torch.tensor(2**60 + 1),
        "value: differs by 1.0e+00",
    ),
    "quantized": (
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        lambda: torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        "value: differs by 1.0e+00",
    ),
    "sparse": (
        lambda: torch.eye(2).to_sparse(),
        lambda: torch.zeros(2, 2).to_sparse(),
        "value: differs by 1.0e+00",
    ),
    "meta": (
        lambda: torch.ones(2, device="meta"),
        lambda: torch.ones(3, device="meta"),
        "value: has shape (3,) instead of (2,)",
    ),
    "lazy": (nn.UninitializedParameter, lambda: 1, "value: is of type int instead of"),
}


@pytest.mark.parametrize(("made", "other", "words"), VALUES.values(), ids=VALUES)
def test_values_of_any_kind(made, other, words):
    expected = outcome.described("output", "value", made())
    assert first_unlike(outcome.described("output", "value", made()), expected, 1e-9) == (
        None,
        0.0,
    )
    unlike, _ = first_unlike(outcome.described("output", "value", other()), expected, 1e-9)
    assert unlike is not None
    assert ": ".join(unlike).startswith(words)


def test_what_contains_itself():
    loop = [1]
    loop.append(loop)
    assert len(outcome.described("output", "value", loop)) == 3
