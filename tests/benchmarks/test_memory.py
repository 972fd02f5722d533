"""Predicted peaks beside measured ones."""

import json
from pathlib import Path

import pytest
from benchmarks import memory
from benchmarks.scaling import STATUS

RESULT = Path(memory.__file__).parent / "results" / "memory-cpu.json"


@pytest.mark.skipif(not STATUS.exists(), reason="a process's peak is read where Linux tells it")
def test_a_peak_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    found = memory.measure("qkv_train", "training", "optimized", "cpu")
    assert found["error"] == found["predicted_mib"] / found["measured_mib"] - 1
    assert abs(found["error"]) < 0.5
    assert memory.told(found).startswith("qkv_train          training   optimized  predicted ")


def test_too_little_is_not_compared():
    sizes = {"predicted_mib": 0.1, "measured_mib": 0.0, "error": None}
    told = memory.told({"case": "a", "mode": "inference", "form": "plain", **sizes})
    assert "too little to compare" in told


def test_the_result_that_is_kept():
    kept = json.loads(RESULT.read_text())
    told = [(each["case"], each["mode"], each["form"]) for each in kept["memory"]]
    assert told == [
        (case, mode, form)
        for case in memory.SHOWN
        for mode in memory.MODES
        for form in memory.FORMS
    ]
    assert all(line["error"] is None or abs(line["error"]) < 0.5 for line in kept["memory"])
