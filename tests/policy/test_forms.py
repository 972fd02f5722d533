"""In which forms the layers of a group may run."""

import itertools
import random

from choices import apart, names, whole

from conjoin.policy.forms import forms


def test_forms_go_from_one_layer_to_all_apart():
    found = list(forms([320] * 22, names(22)))
    assert found[0] == whole(22)
    assert found[-1] == apart(22)
    assert [len(form) for form in found] == [1, 2, 3, 4, 6, 8, 11, 22]
    for form in found:
        assert sorted(itertools.chain(*form)) == list(range(22))


def test_forms_of_few():
    assert list(forms([3, 5], names(2))) == [whole(2), apart(2)]
    assert list(forms([3, 5, 4], names(3))) == [whole(3), apart(3)]
    assert list(forms([1], names(1))) == [whole(1)]
    assert list(forms([0, 0], names(2))) == [whole(2), apart(2)]


def test_no_form_leaves_a_layer_alone_beside_wide_ones():
    draw = random.Random(0)
    for _ in range(50):
        count = draw.randint(2, 12)
        for form in forms([draw.randint(1, 9) for _ in range(count)], names(count)):
            alone = sum(len(run) == 1 for run in form)
            assert alone in (0, count)


def test_the_order_of_declarations_decides_nothing():
    draw = random.Random(0)
    layers = list(zip((32, 32, 64, 64, 8, 8, 16, 16), names(8), strict=True))
    expected = None
    for _ in range(20):
        draw.shuffle(layers)
        widths, called = zip(*layers, strict=True)
        found = [
            {frozenset(called[i] for i in run) for run in form} for form in forms(widths, called)
        ]
        expected = expected or found
        assert found == expected
