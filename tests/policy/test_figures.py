"""Which form is taken by what each takes, and how that is told."""

import pytest
from choices import apart, names, whole

from conjoin.policy.figures import MARGIN, Figures, pick
from conjoin.policy.forms import forms


def test_near_the_edge_one_layer_is_taken():
    pairs = ((0, 1), (2, 3))
    taken = {whole(4): 1.0 + 0.9 * MARGIN, pairs: 1.01, apart(4): 1.0}
    form, figures = pick(taken, measured=True, training=True)
    assert form == whole(4)
    assert figures.measured
    taken[whole(4)] = 1.0 + 1.1 * MARGIN
    assert pick(taken, measured=True, training=True)[0] == pairs
    taken[pairs] = 1.0 + 1.1 * MARGIN
    assert pick(taken, measured=True, training=True)[0] == apart(4)


def test_a_division_must_save_more_by_an_estimate_than_measured():
    pairs = ((0, 1), (2, 3))
    taken = {whole(4): 2.0, pairs: 0.9, apart(4): 1.0}
    assert pick(taken, measured=False, training=True)[0] == apart(4)
    assert pick(taken, measured=True, training=True)[0] == pairs


def test_of_several_divisions_near_the_edge_the_narrowest_is_taken():
    found = list(forms([320] * 22, names(22)))
    taken = dict.fromkeys(found, 1.0) | {found[0]: 2.0, found[-2]: 1.1, found[-3]: 1.01}
    assert pick(taken, measured=True, training=True)[0] == found[-3]


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (
            Figures(4.1e-5, 6.3e-5, 4.1e-5, 2, False, False),
            "estimate: 41 us apart, 63 us as one layer, forward",
        ),
        (
            Figures(0.0418, 0.063, 0.0333, 3, True, True),
            "measured: 41.8 ms apart, 63 ms as one layer, 33.3 ms as 3, a training step",
        ),
        (
            Figures(2.0, 1.5, 1.5, 1, True, False),
            "measured: 2 s apart, 1.5 s as one layer, forward",
        ),
        (
            Figures(2e-6, 9e-6, 2e-6, 2, False, False, lockstep=True),
            "estimate: 2 us apart, 9 us as one layer in lockstep, forward",
        ),
    ],
)
def test_figures_in_words(figures, words):
    assert str(figures) == words
