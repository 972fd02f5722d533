"""What is measured is kept, and what is kept is believed only where it can be true."""

import dataclasses
import importlib
import json
import math
import os
import platform
import subprocess
import sys
import types

import pytest
import torch
from machines import STEADY
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_parameter_registration_hook

from conjoin.policy import convolving, machine, sharing, timing
from conjoin.policy.cost import Machine

CPU = torch.device("cpu")
KEY = ("a device", "cpu", "torch.float32")


def table(sizes, *more):
    """Something that may have been measured with these, and within with more."""
    return tuple((float(n), table(*more) if more else 1e-9 * n) for n in sizes)


FOUND = Machine(
    *(1e-6, 1e-6, 2e-5, 1e11, 1e11, 1e10, 3e-6, 5e-6, 1e-5),
    *(table(*sizes) for sizes in machine.TABLES.values()),
)


@pytest.fixture(autouse=True)
def _once(monkeypatch):
    """How exact it is does not matter here."""
    monkeypatch.setattr(timing, "ROUNDS", 2)
    for module in (machine, convolving, sharing):
        monkeypatch.setattr(module, "TURNS", 1)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "conjoin" / "kept.json"


@pytest.fixture
def constants():
    """The function itself, which the tests' machine stands for."""
    spec = importlib.util.find_spec("conjoin.policy.machine")
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    return fresh


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_was_measured_is_possible(mode):
    with mode():
        found = machine.measure(CPU, torch.float32)
    assert machine._is_possible(found)
    taken = [seconds for _, seconds in found.written]
    assert taken == sorted(taken)
    assert found.new(2**26) > found.new(2**20) > 0
    assert found.batched <= found.rate
    assert found.shared > 0
    assert found.graph >= 0
    assert found.alias >= 0


def test_measuring_does_not_depend_on_the_default_device():
    with torch.device("meta"):
        assert machine._is_possible(machine.measure(CPU, torch.float32))


def test_hooks_of_all_modules_keep_nothing_of_what_is_measured():
    seen = []
    hook = register_module_parameter_registration_hook(lambda *given: seen.append(given))
    try:
        machine.measure(CPU, torch.float32)
    finally:
        hook.remove()
    assert not seen


def test_measuring_draws_no_random_numbers():
    before = torch.get_rng_state()
    machine.measure(CPU, torch.float32)
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_kept(path):
    machine.write(path, KEY, FOUND)
    assert machine.read(path, KEY) == FOUND
    assert os.listdir(path.parent) == [path.name]


def changed(**fields):
    return {**dataclasses.asdict(FOUND), **fields}


@pytest.mark.parametrize(
    "held",
    [
        "",
        "{",
        "[]",
        "null",
        json.dumps({"format": machine.FORMAT, "key": KEY}),
        json.dumps({"format": 0, "key": KEY, "constants": changed()}),
        json.dumps({"format": machine.FORMAT, "key": ["another"], "constants": changed()}),
        *(
            json.dumps({"format": machine.FORMAT, "key": KEY, "constants": changed(**fields)})
            for fields in (
                {"call": -1.0},
                {"rate": 0},
                {"batched": 0},
                {"bandwidth": math.inf},
                {"cut": math.nan},
                {"step": -1e-6},
                {"call": None},
                {"call": "quick"},
                {"more": 1.0},
                {"written": []},
                {"written": [[1, 2, 3]]},
                {"written": [[size, -1.0] for size in machine.SIZES]},
                {"joined": [[size, 1e-6] for size in machine.SIZES]},
                {"few_rows": [[rows, 0.0] for rows in machine.ROWS]},
                {"few_rows": [[rows, [[1, [[1, 0.0]]]]] for rows in machine.ROWS]},
            )
        ),
    ],
)
def test_a_broken_or_foreign_file_is_not_believed(path, held):
    path.parent.mkdir()
    path.write_text(held)
    assert machine.read(path, KEY) is None
    machine.write(path, KEY, FOUND)
    assert machine.read(path, KEY) == FOUND


def test_bytes_that_are_no_text_are_not_believed(path):
    path.parent.mkdir()
    path.write_bytes(b"\xff\xfe\x00")
    assert machine.read(path, KEY) is None


def test_a_folder_where_nothing_can_be_written_is_no_error(path):
    path.parent.parent.joinpath("conjoin").write_text("a file where the folder would be")
    machine.write(path, KEY, FOUND)
    assert machine.read(path, KEY) is None


def test_a_folder_in_place_of_the_file_is_no_error(path):
    path.mkdir(parents=True)
    machine.write(path, KEY, FOUND)
    assert machine.read(path, KEY) is None
    assert os.listdir(path.parent) == [path.name]


def test_what_is_measured_of_a_gpu_holds_for_one_precision_of_its_products(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    keys = []
    for precision in ("none", "tf32", "none"):
        matmul = types.SimpleNamespace(fp32_precision=precision)
        monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
        keys.append(machine._key(torch.device("cuda"), torch.float32))
    assert keys[0] == keys[2] != keys[1]


def test_each_device_is_measured_once(constants, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(constants, "measure", lambda *of: measured.append(of) or FOUND)
    for _ in range(2):
        assert constants.constants(CPU, torch.float32) == FOUND
    assert measured == [(CPU, torch.float32)]
    constants._constants.cache_clear()  # As in another process.
    assert constants.constants(CPU, torch.float32) == FOUND
    assert len(measured) == 1
    constants.constants(CPU, torch.float64)
    assert len(measured) == 2
    (tmp_path / "conjoin" / sorted(os.listdir(tmp_path / "conjoin"))[0]).write_text("{}")
    constants._constants.cache_clear()
    constants.constants(CPU, torch.float32)
    constants.constants(CPU, torch.float64)
    assert len(measured) == 3


STEPS = """
import resource, sys
import torch
from conjoin.policy import convolving, machine, sharing, timing

def step():
    for tensor in [torch.ones(2**20) for _ in range(3)]:  # As gradients: made and given back.
        tensor.add_(1)

if sys.argv[1] == "settled":
    machine.settle_allocator()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc that adapts so")
def test_the_allocator_keeps_what_a_step_gives_back():
    # By chance something may lie at the end of the heap, and then a fresh process keeps it too.
    fresh = max(_faults("fresh") for _ in range(3))
    assert _faults("settled") < fresh / 10


def _faults(way):
    """The pages that steps of training have to get from the system."""
    return int(subprocess.check_output([sys.executable, "-c", STEPS, way]))


def test_a_type_is_measured_as_it_is_also_within_autocast(constants, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    casts = []

    def measure(*of):
        casts.append(torch.is_autocast_enabled("cpu"))
        return FOUND

    monkeypatch.setattr(constants, "measure", measure)
    with torch.autocast("cpu"):
        assert constants.constants(CPU, torch.float32) == FOUND
        assert torch.is_autocast_enabled("cpu")
    assert casts == [False]


def test_what_cannot_be_measured(constants, monkeypatch):
    monkeypatch.setattr(constants, "measure", lambda *of: pytest.fail("measured"))
    assert constants.constants(torch.device("meta"), torch.float32) is None
    with FakeTensorMode():
        assert constants.constants(CPU, torch.float32) is None


def test_a_dtype_without_products(constants, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert constants.constants(CPU, torch.float8_e4m3fn) is None
    assert not list(tmp_path.iterdir())


def test_all_tests_have_one_machine():
    assert machine.constants(CPU, torch.float32) is STEADY
