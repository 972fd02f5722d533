"""Each peer is the model, and what cannot be measured says why."""

import copy

import pytest
import torch
from benchmarks.cases import CASES, loss_of
from benchmarks.measure import counted_step, measure, training_step
from benchmarks.peers import PEERS, Peer, UnavailableError
from equivalence import assert_close
from torch import nn

from conjoin.launches import LaunchCounter, count_step

EAGER = [peer for peer in PEERS.values() if not peer.compiles and peer.device is None]


def numbered(outputs):
    return {str(number): output.detach() for number, output in enumerate(outputs)}


@pytest.mark.parametrize("peer", EAGER, ids=lambda peer: peer.name)
@pytest.mark.parametrize("name", ["twin_critics_1", "share_small", "towers_small"])
def test_a_peer_trains_as_the_model_does(peer, name):
    case = CASES[name]
    plain = case.model().double()
    inputs = tuple(x.double() for x in case.inputs())
    other = peer.build(case, copy.deepcopy(plain), inputs)
    for model in (plain, other):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss_of(model(*inputs)).backward()
        optimizer.step()
    assert_close(numbered(other(*inputs)), numbered(plain(*inputs)))


def test_vmap_is_for_equal_branches_only():
    with pytest.raises(UnavailableError, match="more than equal branches"):
        PEERS["vmap"].build(CASES["vae"], CASES["vae"].model(), CASES["vae"].inputs())


def measured(peer, mode="inference"):
    return measure(CASES["widen_8"], mode, [PEERS["plain"], peer], "cpu", 1e-3)["peers"]


@pytest.mark.parametrize(
    ("change", "mode", "message"),
    [
        (lambda ys: [-y for y in ys], "inference", "its outputs are wrong by 2.0e+00"),
        (lambda ys: [y * float("nan") for y in ys], "inference", "its outputs are wrong by nan"),
        (lambda ys: [ys[0], *(y / 0 for y in ys[1:])], "inference", "its outputs are wrong by inf"),
        (lambda ys: ys[1:], "inference", "its outputs are [(32, 16), (32, 16)"),
        (lambda ys: [y[None] for y in ys], "inference", "its outputs are [(1, 32, 16)"),
        (lambda ys: [ys[0], *(y.detach() for y in ys[1:])], "training", "its gradients are wrong"),
    ],
    ids=["negative", "nan", "infinite", "too few", "another shape", "detached"],
)
def test_a_peer_that_does_something_else_is_not_timed(change, mode, message):
    found = measured(Peer("other", "", lambda case, model, inputs: Changed(model, change)), mode)
    assert found["other"].keys() == {"unavailable"}
    assert found["other"]["unavailable"].startswith(message)
    assert found["plain"]["ratio"]["median"] == 1


class Changed(nn.Module):
    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("no compiler\nand much more"), "RuntimeError: no compiler"),
        (AssertionError(), "AssertionError: it does not say why"),
    ],
)
def test_a_peer_that_fails_says_how(error, told):
    def broken(case, model, inputs):
        raise error

    found = measured(Peer("broken", "", broken))
    assert found["broken"] == {"unavailable": told}


def test_a_peer_for_another_mode_or_device_is_not_made():
    def never(case, model, inputs):
        raise AssertionError

    found = measured(Peer("frozen", "", never, modes=("inference",)), "training")
    assert found["frozen"] == {"unavailable": "it is for inference only"}
    found = measured(Peer("graphs", "", never, device="cuda"))
    assert found["graphs"] == {"unavailable": "it needs the device cuda"}


def test_the_launches_are_counted():
    found = measured(PEERS["conjoin"], "training")
    assert found["plain"]["launches"] == {"forward": 8, "backward": 16}
    assert found["conjoin"]["launches"] == {"forward": 1, "backward": 3}


def test_what_a_gpu_is_asked_for_is_what_is_counted():
    case = CASES["widen_8"]
    model, inputs = case.model(), case.inputs()
    training_step(model, inputs)()  # Leaves gradients, to which none is to be added.
    step = counted_step(model, inputs)
    with LaunchCounter() as counter:
        step()
    expected = count_step(model, inputs)
    assert counter.count == expected.forward + expected.backward


def test_what_replays_a_graph_has_no_launches_to_count():
    def same(case, model, inputs):
        return model

    found = measured(Peer("replaying", "", same, replays=True))
    assert "launches" in found["plain"]
    assert "launches" not in found["replaying"]
    assert {peer.name for peer in PEERS.values() if peer.replays} == {"graphs", "graphs_conjoin"}


def test_a_training_step_trains():
    case = CASES["widen_8"]
    model, inputs = case.model(), case.inputs()
    before = copy.deepcopy(model.state_dict())
    training_step(model, inputs)()
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())
