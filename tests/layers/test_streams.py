"""Siblings share no run that may not be there: on another stream, or in a CUDA graph.

No GPU is needed here; `tests/test_cuda.py` has the same on one.
"""

import pytest
import torch
from equivalence import assert_close
from families import assert_runs_once, case, fused, wide_runs
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from conjoin.layers import lockstep, slices, streams

X = torch.randn(3, 4, dtype=torch.float64)


@pytest.fixture
def plain():
    return case(nn.Linear, 4, (3, 4)).family((4, 2, 3))


@pytest.fixture
def capturing(monkeypatch):
    """As if a CUDA graph were captured, where the list holds True."""
    held = [True]
    for module in (lockstep, slices):
        monkeypatch.setattr(module, "is_captured", lambda tensor: held[0])
    return held


@pytest.fixture
def stream(monkeypatch):
    """As if what runs were on the stream of the number in the list."""
    held = [0]
    monkeypatch.setattr(lockstep, "stream_of", lambda tensor: held[0])
    return held


def is_part(output):
    """Whether it is a part of a wide output."""
    return output.untyped_storage().nbytes() > output.nbytes


def test_streams_share_no_run(plain, stream):
    model = fused(plain)
    assert_runs_once(model, X)
    with wide_runs() as runs, torch.no_grad():
        for stream[0], layer in enumerate(model.layers):
            layer(X)
    assert len(runs) == len(model.layers)


def test_each_stream_has_a_cut_of_its_own(plain, stream):
    model = fused(plain)
    model.layers[0].wide_layer.together = False
    cuts = []
    for stream[0], layer in zip((0, 0, 1), model.layers, strict=True):
        slice = layer(X).grad_fn.next_functions[-1][0]
        cuts.append(slice.next_functions[0][0])
    assert cuts[0] is cuts[1] is not cuts[2]


@pytest.mark.parametrize("before", [True, False])
def test_no_part_goes_into_a_graph_or_comes_out_of_it(plain, capturing, before):
    first, second, _ = fused(plain).layers
    with torch.no_grad():
        capturing[0] = before
        assert is_part(first(X)) is not before
        capturing[0] = not before
        assert is_part(second(X)) is before


def test_a_graph_holds_each_siblings_own_product(plain, capturing):
    model = fused(plain)
    with wide_runs() as runs:
        outputs = model(X)
    assert not runs
    assert_close(dict(enumerate(outputs)), dict(enumerate(plain(X))))


def test_the_gradients_of_slices_in_a_graph_are_joined_at_once(plain, capturing):
    model = fused(plain)
    names = set()

    def visit(node):
        if node is not None:
            names.add(type(node).__name__)
            for after, _ in node.next_functions:
                visit(after)

    for output in model(X):
        visit(output.grad_fn)
    assert "SplitWithSizesBackward0" in names
    assert "SliceBackward0" not in names


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_device_without_streams(device):
    tensor = torch.empty(2, device=device)
    assert streams.stream_of(tensor) is None
    assert not streams.is_captured(tensor)


def test_no_graph_holds_a_fake_tensor():
    with FakeTensorMode():
        assert not streams.is_captured(torch.empty(2, device="cuda"))


def test_asking_for_a_stream_starts_no_device():
    streams._has_streams.cache_clear()
    assert not streams._has_streams("no device")
    assert not torch.cuda.is_initialized()
