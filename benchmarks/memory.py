"""Predicted peaks of memory beside measured ones: how far conjoin's report is off.

python -m benchmarks.memory                            some cases, plain and optimized
python -m benchmarks.memory qkv_train --device cuda    on a GPU
python -m benchmarks.memory --json PATH                write it down

What is compared is what a step needs beyond what is there before it: a process has much in memory
that is no tensor. On a GPU the allocator tells its peak. On a CPU it is the peak of the process,
each measurement in one of its own, after first steps that load what libraries load once.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import conjoin
from benchmarks import machine
from benchmarks.cases import CASES, listed
from benchmarks.peers import MODES
from benchmarks.scaling import FORGET_THE_MOST, STATUS, memory_of_process

SHOWN = ("vae", "inception", "googlenet", "qkv_train", "gated_train", "time_projections")
"""The cases whose steps need megabytes."""

FORMS = ("plain", "optimized")

WARM_UP = 3
STEPS = 5
"""Steps before anything is measured, and steps that are; the median of these counts."""

LEAST = 1.0
"""MiB that a step needs at least to be compared: a process takes some pages at random."""

MIB = 2**20


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", metavar="CASE", nargs="*", default=SHOWN)
    parser.add_argument("--device", default="cpu", help="the device to run on (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the result")
    parser.add_argument("--one", metavar=("MODE", "FORM"), nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    machine.choose(options.device)
    if options.one is not None:
        print(json.dumps(measure_here(options.cases[0], *options.one, options.device)))
        return 0
    if torch.device(options.device).type == "cpu" and not STATUS.exists():
        parser.error(f"a process's peak is read in {STATUS}, which is Linux's.")
    result: dict[str, Any] = {"machine": machine.described(options.device), "memory": []}
    for case in options.cases:
        for mode in MODES:
            for form in FORMS:
                found = measure(case, mode, form, options.device)
                result["memory"].append(found)
                print(told(found), flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def told(found: dict[str, Any]) -> str:
    """One measurement, on one line."""
    error = "too little to compare" if found["error"] is None else f"{found['error']:+.1%}"
    return (
        f"{found['case']:18} {found['mode']:10} {found['form']:10} "
        f"predicted {found['predicted_mib']:8.1f} MiB, measured {found['measured_mib']:8.1f} MiB, "
        f"{error}"
    )


def measure(case: str, mode: str, form: str, device: str) -> dict[str, Any]:
    """Measures one form of a case in one mode, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", case, "--one", mode, form]
    done = subprocess.run(
        [*command, "--device", device], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_here(case: str, mode: str, form: str, device: str) -> dict[str, Any]:
    """Measures in this process, whose peak it is then."""
    training = mode == "training"
    inputs = tuple(x.to(device) for x in CASES[case].inputs())
    model = CASES[case].model().to(device).train(training)
    with torch.set_grad_enabled(training):
        peaks = conjoin.report(model, inputs).memory
        if form == "optimized":
            model = conjoin.optimize(model, inputs, inplace=True)
        for _ in range(WARM_UP):
            _step(model, inputs)
        measured = statistics.median(_peak(model, inputs) for _ in range(STEPS))
    whole = peaks.before if form == "plain" else peaks.after
    assert whole is not None
    predicted = whole - sum(map(_size, [*model.parameters(), *model.buffers(), *inputs]))
    return {
        "case": case,
        "mode": mode,
        "form": form,
        "predicted_mib": predicted / MIB,
        "measured_mib": measured / MIB,
        "error": None if predicted < LEAST * MIB else predicted / measured - 1,
    }


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _step(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """What the report counts: forward and, with gradients, backward from every output."""
    outputs = [each for each in listed(model(*inputs)) if each.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])


def _peak(model: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    """The bytes that a step needs at most beyond what is there before it."""
    model.zero_grad()
    gc.collect()
    if inputs[0].is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        _step(model, inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    FORGET_THE_MOST.write_text("5")
    before = memory_of_process("VmRSS")
    _step(model, inputs)
    return (memory_of_process("VmHWM") - before) * MIB


if __name__ == "__main__":
    sys.exit(main())
