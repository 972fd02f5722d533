"""What the benchmark asks of a GPU, without one."""

import types

import pytest
import torch
from benchmarks import kernels, machine
from torch.autograd import DeviceType


@pytest.mark.parametrize(("device", "chosen"), [("cuda:1", [1]), ("cuda", []), ("cpu", [])])
def test_a_gpu_with_a_number_is_the_current_one(device, chosen, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device.index))
    machine.choose(device)
    assert seen == chosen


def test_kernels_of_the_second_run_are_counted(monkeypatch):
    events, runs = [], []

    class Profile:
        def __init__(self, activities):
            events.clear()

        def __enter__(self):
            return self

        def __exit__(self, *raised):
            pass

        def events(self):
            return events

    def run():
        runs.append(None)
        for name in ("gemm", "Memcpy DtoD", "Memset", "add"):
            events.append(types.SimpleNamespace(device_type=DeviceType.CUDA, name=name))
        events.append(types.SimpleNamespace(device_type=DeviceType.CPU, name="aten::add"))

    monkeypatch.setattr(kernels, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernels.profiled(run) == 2
    assert len(runs) == 2
