"""Public names are documented: what they take, and an example that runs."""

import dataclasses
import doctest
import inspect
import sys

import pytest
import torch

import conjoin
from conjoin import checkpoints, compiling, nn, passes

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module, names in (
        (conjoin, conjoin.__all__),
        (nn, nn.__all__),
        (checkpoints, ("separate", "merge")),
        (compiling, ("backend", "PreGradPass")),
        (passes, passes.__all__),
    )
    for name in names
    if inspect.isclass(getattr(module, name)) or inspect.isfunction(getattr(module, name))
}
SHOWN = {
    name: subject
    for name, subject in PUBLIC.items()
    if subject is passes.rewrite or not name.startswith(passes.__name__)
}
"""All but the passes and the parts of `rewrite`, which shows them."""


def taken(subject: object) -> list[str]:
    """The names of what a function takes, or of what an object holds."""
    if dataclasses.is_dataclass(subject):
        return [field.name for field in dataclasses.fields(subject)]
    function = vars(subject).get("__init__") if inspect.isclass(subject) else subject
    names = [] if function is None else [*inspect.signature(function).parameters]
    return [name for name in names if name != "self"]


@pytest.mark.parametrize("name", PUBLIC)
def test_all_that_is_taken_is_told(name):
    text = inspect.getdoc(PUBLIC[name])
    assert text
    assert [each for each in taken(PUBLIC[name]) if f"{each}: " not in text] == []


@pytest.mark.parametrize("name", SHOWN)
def test_its_example_runs(name):
    subject = SHOWN[name]
    module = sys.modules[subject.__module__]
    finder = doctest.DocTestFinder(recurse=False)
    globs = {**vars(module), "torch": torch, "nn": torch.nn}
    tests = [test for test in finder.find(subject, name, globs=globs) if test.examples]
    assert tests
    for test in tests:
        assert doctest.DocTestRunner().run(test).failed == 0
