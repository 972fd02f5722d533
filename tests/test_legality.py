"""Reasons are advice, and refusals name names."""

import dataclasses
import pickle
import re

import pytest
from awkward import EXACT, HAZARDS

from conjoin.legality import Reason, Refusal
from conjoin.policy.deciding import CHOICES

REFUSAL = Refusal(("a.q", "a.k"), Reason.DIFFERENT_SETTINGS, "stride=2 where a.q has 1")


@pytest.mark.parametrize("reason", Reason)
def test_a_reason_says_what_is_in_the_way_and_what_to_do(reason):
    sentences = re.findall(r"[A-Z][^.]*(?:\.\w[^.]*)*\.(?: |$)", reason.value)
    assert "".join(sentences) == reason.value
    assert len(sentences) == 2
    assert not reason.value.startswith(reason.name)


def test_every_reason_is_the_outcome_of_a_hazard_or_a_choice():
    outcomes = {hazard.outcome for hazard in HAZARDS}
    # What keeps layers apart in exported programs only is in tests/programs.
    assert outcomes | CHOICES | {Reason.IN_PROGRAM} == {EXACT, *Reason}
    assert not outcomes & CHOICES


def test_no_reason_is_given_twice():
    assert len({reason.value for reason in Reason}) == len(Reason.__members__)


def test_words_of_a_refusal():
    assert str(REFUSAL) == (
        f"a.q, a.k: {Reason.DIFFERENT_SETTINGS.value} (stride=2 where a.q has 1)"
    )
    assert str(dataclasses.replace(REFUSAL, detail="")).endswith("the model allows it.")


def test_a_refusal_is_a_value():
    assert pickle.loads(pickle.dumps(REFUSAL)) == REFUSAL
    assert len({REFUSAL, dataclasses.replace(REFUSAL)}) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFUSAL.detail = "other"
