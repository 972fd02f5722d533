"""What `conjoin.optimize` itself takes, beside tracing and copying the model with torch.fx.

Each measurement is a process of its own, so that its peak of memory is nobody else's:
`python -m benchmarks.scaling LAYERS WAY` prints one as JSON.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import conjoin

SIZES = (1_000, 10_000)
"""Layers of the model."""

WIDTH = 64

STATUS = Path("/proc/self/status")
"""Where Linux tells the memory of a process; `resource` tells that of its parent if it is more."""

FORGET_THE_MOST = Path("/proc/self/clear_refs")


class Block(nn.Module):
    """Four layers, of which three are siblings."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(self.q(x).sigmoid() * self.k(x) + self.v(x))


def _optimize(model: nn.Module, x: Tensor) -> None:
    conjoin.optimize(model, (x,))


def _trace_and_copy(model: nn.Module, x: Tensor) -> None:
    torch.fx.symbolic_trace(copy.deepcopy(model))


WAYS: dict[str, Callable[[nn.Module, Tensor], None]] = {
    "conjoin.optimize": _optimize,
    "deepcopy and symbolic_trace": _trace_and_copy,
}


def measure(layers: int, way: str) -> dict[str, object]:
    """Measures one way on one size, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scaling", str(layers), way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, object] = json.loads(done.stdout)
    return found


def _measure_here(layers: int, way: str) -> dict[str, object]:
    model, x = nn.Sequential(*(Block() for _ in range(layers // 4))), torch.randn(2, WIDTH)
    before = None
    if STATUS.exists():
        FORGET_THE_MOST.write_text("5")
        before = memory_of_process("VmRSS")
    start = time.perf_counter()
    WAYS[way](model, x)
    seconds = time.perf_counter() - start
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return {
        "layers": layers,
        "way": way,
        "seconds": seconds,
        "extra_mib": None if before is None else memory_of_process("VmHWM") - before,
        "model_mib": size / 2**20,
    }


def memory_of_process(name: str) -> float:
    """`VmRSS`, what this process has in memory, or `VmHWM`, the most that it had, in MiB."""
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields[name].split()[0]) / 1024


if __name__ == "__main__":
    print(json.dumps(_measure_here(int(sys.argv[1]), sys.argv[2])))
