"""Every case is one function three times: as it was, written wide by hand, and optimized."""

import copy

import pytest
import torch
from benchmarks.cases import CASES, loss_of
from equivalence import assert_close

import conjoin
from conjoin.launches import count_step
from conjoin.layers.view import wides


def a_few(inputs):
    """A small batch in float64, since what is computed does not depend on how often."""
    return tuple(x[:2].double() if x.is_floating_point() else x[:2] for x in inputs)


def before_and_after_a_step(model, inputs):
    """The outputs, and those after a step of training, which depend on every gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for _ in range(2):
        outputs = model(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        found.append({str(number): output.detach() for number, output in enumerate(outputs)})
        loss_of(outputs).backward()
        optimizer.step()
    return found


def fewer_launches(model, than, inputs):
    """Whether a forward of one model launches fewer operations than that of another."""
    ours, theirs = (count_step(copy.deepcopy(each), inputs).forward for each in (model, than))
    return ours < theirs


@pytest.mark.parametrize("name", CASES)
def test_the_forms_agree(name):
    case = CASES[name]
    plain, inputs = case.model().double(), a_few(case.inputs())
    optimized = conjoin.optimize(plain, inputs, policy="always")
    assert wides(optimized) or fewer_launches(optimized, plain, inputs)
    for training in (True, False):
        by_hand = case.by_hand(copy.deepcopy(plain))
        before, after = before_and_after_a_step(copy.deepcopy(plain).train(training), inputs)
        assert not torch.equal(before["0"], after["0"])
        for model in (by_hand, copy.deepcopy(optimized)):
            found = before_and_after_a_step(model.train(training), inputs)
            assert_close(found[0], before, "output")
            assert_close(found[1], after, "output after a step")


def test_a_case_is_the_same_each_time():
    case = CASES["vae"]
    assert all(map(torch.equal, case.inputs(), case.inputs()))
    first, second = case.model().state_dict(), case.model().state_dict()
    assert_close(first, second)
