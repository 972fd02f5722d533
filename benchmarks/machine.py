"""What a measurement is taken on, and with."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import conjoin

ROOT = Path(__file__).resolve().parent.parent
CPU_INFO = Path("/proc/cpuinfo")


def choose(device: str) -> None:
    """Makes a GPU that is given by its number the current one, whose events and peaks count."""
    chosen = torch.device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)


def described(device: str) -> dict[str, object]:
    """The hardware, the versions, the commit and the date."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--", "src", "passes", "benchmarks")),
        "conjoin": conjoin.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else device,
        "load": list(os.getloadavg()),
    }


def _cpu() -> str:
    """The model of the CPU; Python's own answer is the architecture on Linux."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in fields.items()}
    name = facts.get("model name", platform.processor())
    if "cpu family" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    features = [name for name in ("avx2", "avx512f", "amx_tile") if name in facts.get("flags", "")]
    return ", ".join([name, *features])


def _git(*arguments: str) -> str | None:
    """What git says; None where this is no checkout."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
