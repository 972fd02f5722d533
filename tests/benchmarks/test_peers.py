"""Each peer is the model, and what cannot be measured says why."""

import copy

import pytest
import torch
from benchmarks.cases import CASES, loss_of
from benchmarks.measure import measure, training_step
from benchmarks.peers import PEERS, Peer, UnavailableError
from equivalence import assert_close
from torch import nn

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


def test_a_peer_with_other_outputs_is_not_timed():
    def negative(case, model, inputs):
        return Negative(model)

    found = measured(Peer("negative", "", negative))
    assert found["negative"]["unavailable"].startswith("its outputs are wrong by 2.0e+00")
    assert found["plain"]["ratio"]["median"] == 1


class Negative(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return [-y for y in self.model(x)]


def test_a_peer_that_fails_says_how():
    def broken(case, model, inputs):
        raise RuntimeError("no compiler\nand much more")

    found = measured(Peer("broken", "", broken))
    assert found["broken"] == {"unavailable": "RuntimeError: no compiler"}


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


def test_a_training_step_trains():
    case = CASES["widen_8"]
    model, inputs = case.model(), case.inputs()
    before = copy.deepcopy(model.state_dict())
    training_step(model, inputs)()
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())
