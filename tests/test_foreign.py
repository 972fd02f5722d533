"""What other people's code raises becomes one line."""

import logging

import pytest
import torch
from torch import nn

import conjoin
from conjoin.foreign import quote


def test_colours_are_no_part_of_a_quote():
    assert quote(RuntimeError("\x1b[96mThis\x1b[0m fails\nand why")) == "RuntimeError: This fails"


def test_of_an_error_of_onnx_the_cause_is_quoted():
    error = torch.onnx.errors.OnnxExporterError("step 3 of 3 failed")
    error.__cause__ = TypeError("no such operator")
    assert quote(error) == "TypeError: no such operator"


def test_of_a_long_line_the_first_sentence_is_quoted():
    text = f"The file is damaged. {'It may be that it was not written to the end. ' * 9}"
    assert quote(RuntimeError(text)) == "RuntimeError: The file is damaged."
    assert quote(RuntimeError("Bad. Very bad.")) == "RuntimeError: Bad. Very bad."


def test_of_a_line_that_announces_others_these_are_quoted_too():
    text = "Expected:\n  [*]\nbut got:\n  [*, *].\nPlease check the number of inputs."
    assert quote(ValueError(text)) == f"ValueError: {' '.join(text.split())}"
    long = f"{text} {'See the documentation. ' * 20}"
    assert quote(ValueError(long)) == "ValueError: Expected: [*] but got: [*, *]."


def test_nothing_is_logged_of_inputs_that_do_not_fit(caplog):
    with caplog.at_level(logging.DEBUG), pytest.raises(ValueError, match="does not run"):
        conjoin.optimize(nn.Sequential(nn.Linear(4, 4)), (torch.randn(3, 3),))
    assert not caplog.records
