"""Folded names are brief, and tell every name."""

import ast
import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conjoin.reports.folding import fold


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], ""),
        (["mu"], "mu"),
        (["mu", "logvar"], "{mu,logvar}"),
        (["mu", "mu"], "mu"),
        (["actor.0", "critic.0"], "{actor,critic}.0"),
        ([f"b.{i}.{n}" for i in range(12) for n in "qkv"], "b.{0..11}.{q,k,v}"),
        (["a.0", "a.2", "a.5"], "a.{0,2,5}"),
        (["a.0", "a.1"], "a.{0,1}"),
        (["a.3", "a.1", "a.2", "a.7"], "a.{1..3,7}"),
        (["a.2", "a.10", "a.head"], "a.{2,10,head}"),
        (["a.01", "a.02", "a.03"], "a.{01,02,03}"),
        (["a.0.x", "a.1.y"], "a.0.x, a.1.y"),
        (["a.0.x", "a.1.x", "a.1.y"], "a.0.x, a.1.{x,y}"),
        (["proj", "a.0", "a.1"], "proj, a.{0,1}"),
        (["a, b", "c"], "'a, b', c"),
        ([""], "''"),
    ],
)
def test_fold(names, expected):
    assert fold(names) == expected


def expand(text):
    """Every name of a folded text, by the rules its docstring gives."""
    names = []
    while text:
        quoted = re.match(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", text)
        plain = quoted or re.match(r"(?:\{[^}]*\}|[^{,])+", text)
        token, text = plain[0], text[plain.end() :].removeprefix(", ")
        if quoted:
            names.append(ast.literal_eval(token))
            continue
        parts = re.split(r"\{([^}]*)\}", token)
        choices = [[part] if i % 2 == 0 else alternatives(part) for i, part in enumerate(parts)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def alternatives(inside):
    found = []
    for part in inside.split(","):
        first, dots, last = part.partition("..")
        found += [str(i) for i in range(int(first), int(last) + 1)] if dots else [part]
    return found


components = st.sampled_from(["q", "k", "conv1", "00", "-1", "0x", "", "a b"]) | st.integers(
    0, 13
).map(str)
module_names = st.lists(components, min_size=1, max_size=4).map(".".join)


@given(st.lists(module_names | st.text(max_size=5), max_size=40))
def test_expanding_a_folded_text_gives_each_name_once(names):
    assert sorted(expand(fold(names))) == sorted(set(names))


@given(
    st.lists(
        st.lists(components.filter(str.isalnum), min_size=1, unique=True), min_size=1, max_size=3
    )
)
def test_a_product_of_components_folds_into_one_term(axes):
    names = [".".join(path) for path in itertools.product(*axes)]
    assert ", " not in fold(names)
    assert sorted(expand(fold(names))) == sorted(names)
