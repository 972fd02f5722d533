"""A look leaves the modes and the settings of the process as they were."""

import contextlib
import os
import types

import pytest
import torch
from torch import nn
from torch._utils import _LazySeedTracker
from torch.autograd import forward_ad, graph
from torch.backends import cuda, cudnn
from torch.utils._python_dispatch import TorchDispatchMode

import conjoin
from conjoin.tracing import modes
from conjoin.verifying import programs, running

ONES = torch.ones(2, 4)

LOOKS = {
    "report": lambda model: conjoin.report(model, (ONES,)),
    "optimize": lambda model: conjoin.optimize(model, (ONES,)),
    "traced": conjoin.optimize,
    "verify": lambda model: conjoin.verify(model, model, (ONES,)),
}


class Nothing(TorchDispatchMode):
    """Runs what there is to run."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


SETS = {
    "threads": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "default dtype": lambda: torch.set_default_dtype(torch.float16),
    "default device": lambda: torch.set_default_device("meta"),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
    "warn only": lambda: torch.use_deterministic_algorithms(False, warn_only=True),
    "warnings": lambda: torch.set_warn_always(True),
    "cuDNN": lambda: setattr(cudnn, "benchmark", True),
    "attention": lambda: cuda.enable_flash_sdp(False),
    "environment": lambda: os.environ.update(CONJOIN_TEST="1"),
    "environment without": lambda: os.environ.pop("PATH", None),
}

ENTERED = {
    "autocast": lambda: torch.autocast("cpu"),
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "device": lambda: torch.device("meta"),
    "dispatch": Nothing,
    "saved tensors": lambda: graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "dual level": forward_ad.dual_level,
}


class Setting(nn.Module):
    """Sets something, and leaves it so."""

    def __init__(self, does):
        super().__init__()
        self.a, self.b, self.does = nn.Linear(4, 3), nn.Linear(4, 3), does

    def forward(self, x):
        y = self.a(x), self.b(x)
        self.does()
        return y


def told():
    return [tell() for tell, _ in modes.SETTINGS], (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
        forward_ad._current_level,
        modes._autocast_nesting(),
        torch.empty(0).device,
    )


@pytest.fixture(autouse=True)
def _left_alone():
    """A test that fails must not have all later ones fail."""
    with modes.unchanged_modes():
        yield


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize(
    "does",
    [*SETS.values(), *(lambda enter=enter: enter().__enter__() for enter in ENTERED.values())],
    ids=[*SETS, *ENTERED],
)
def test_what_is_set_is_put_back(look, does):
    before = told()
    with contextlib.suppress(RuntimeError):  # There is one dual level, so it runs once.
        look(Setting(does))
    assert told() == before


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_default_device_stays(look):
    before, model = told(), Setting(lambda: torch.set_default_device("cpu"))
    torch.set_default_device("meta")
    try:
        look(model)
        assert torch.empty(0).device.type == "meta"
    finally:
        torch.set_default_device(None)
    assert told() == before


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_modes_around_it_stay(look):
    with Nothing(), torch.device("cpu"), torch.autocast("cpu"):
        before = told()
        look(Setting(lambda: torch.autocast("cpu", enabled=False).__enter__()))
        assert told() == before


@pytest.fixture
def rounding(monkeypatch):
    """What may round, as if somebody allowed some of it to."""
    held = tuple(types.SimpleNamespace(fp32_precision=p) for p in ("tf32", "none", "tf32"))
    monkeypatch.setattr(modes, "ROUNDING", held)
    return held


def precisions(rounding):
    return [each.fp32_precision for each in rounding]


@pytest.mark.parametrize("saved", [True, False], ids=["program", "model"])
def test_nothing_is_rounded_where_models_are_compared(rounding, saved, monkeypatch):
    seen, before = [], precisions(rounding)
    place, name = (programs, "left_behind") if saved else (running, "_play")
    play = getattr(place, name)

    def noted(*args):
        seen.append(precisions(rounding))
        return play(*args)

    monkeypatch.setattr(place, name, noted)
    model = Setting(lambda: None)
    model = torch.export.export(model, (ONES,)) if saved else model
    assert conjoin.verify(model, model, *([] if saved else [(ONES,)]))
    assert seen
    assert all(held == ["ieee"] * 3 for held in seen)
    assert precisions(rounding) == before


def test_what_the_code_sets_meanwhile_stays(rounding):
    with modes.unrounded():
        rounding[0].fp32_precision = "bf16"
    assert precisions(rounding) == ["bf16", "none", "tf32"]


@pytest.mark.parametrize("holder", modes.ROUNDING, ids=["products", "convolutions", "recurrent"])
def test_what_rounds_tells_and_takes_a_precision(holder):
    before = holder.fp32_precision
    with modes.unrounded():
        assert holder.fp32_precision == "ieee"
    assert holder.fp32_precision == before


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("device", [torch.cuda, torch.xpu], ids=["cuda", "xpu"])
def test_a_gpu_that_is_used_later_starts_from_the_users_seed(look, device, monkeypatch):
    monkeypatch.setattr(device, "_lazy_seed_tracker", _LazySeedTracker())
    for seed in (device.manual_seed, device.manual_seed_all):
        seed(7)
    before = list(device._lazy_seed_tracker.get_calls())
    look(Seeding())
    assert device._lazy_seed_tracker.get_calls() == before


class Seeding(nn.Module):
    """Its forward starts the random streams"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        torch.manual_seed(0)
        return self.a(x), self.b(x)
