"""A look leaves the modes and the settings of the process as they were."""

import contextlib
import os

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


@pytest.fixture(autouse=True, scope="module")
def _looked_before():
    """PyTorch's compiler, which a look imports, sets an environment variable of its own once."""
    model = Setting(lambda: None)
    for look in LOOKS.values():
        look(model)


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


def _newer(*precisions):
    for each, precision in zip(modes.ROUNDING, precisions, strict=True):
        each.fp32_precision = precision


PRECISIONS = {
    "as it comes": lambda: None,
    "products may": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "nothing may": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "to bfloat16": lambda: torch.set_float32_matmul_precision("medium"),
    "by the newer names": lambda: _newer("tf32", "tf32", "tf32", "bf16"),
}


@pytest.fixture(params=PRECISIONS.values(), ids=PRECISIONS)
def rounding(request):
    """What may round numbers, as it can be set."""
    older, before = modes._by_older_names(), modes._precisions()
    request.param()
    yield told_of_rounding()
    modes._set_by_older_names(older)
    _newer(*before)


def told_of_rounding():
    """What is told by both sets of names."""
    return modes._precisions(), modes._by_older_names()


def rounds() -> bool:
    return any(precision not in ("ieee", "none") for precision in modes._precisions())


@pytest.mark.parametrize("saved", [True, False], ids=["program", "model"])
def test_nothing_is_rounded_where_models_are_compared(rounding, saved, monkeypatch):
    seen = []
    place, name = (programs, "left_behind") if saved else (running, "_play")
    play = getattr(place, name)

    def noted(*args):
        seen.append((rounds(), modes._by_older_names() is None))
        return play(*args)

    monkeypatch.setattr(place, name, noted)
    model = Setting(lambda: None)
    model = torch.export.export(model, (ONES,)) if saved else model
    assert conjoin.verify(model, model, *([] if saved else [(ONES,)]))
    assert set(seen) == {(False, rounding[1] is None)}
    assert told_of_rounding() == rounding


def test_what_the_code_sets_meanwhile_stays(rounding):
    with modes.unrounded():
        modes.ROUNDING[1].fp32_precision = "tf32"
    assert modes.ROUNDING[1].fp32_precision == "tf32"


def test_a_model_that_turns_cudnn_off_is_verified():
    def quietly():
        with torch.backends.cudnn.flags(enabled=False):
            pass

    model = Setting(quietly)
    assert conjoin.verify(model, model, (ONES,)).raised == 0


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
