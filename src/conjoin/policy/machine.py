"""The constants of the cost model: measured once for each device, and kept in a cache folder.

A file there is believed only where it names this device, number of threads, dtype and version of
PyTorch, and holds numbers that can be; otherwise all is measured anew. Where the folder cannot be
written to, each process measures for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conjoin.policy import convolving, sharing
from conjoin.policy.cost import Grid, Machine, Table
from conjoin.policy.timing import ascending, in_turn, least

FORMAT = 7
"""The version of what is measured, and of the files that hold it."""

DEVICES = ("cpu", "cuda")
"""The types of devices that are measured; on others all is fused."""

LARGEST = 31 * 2**20
"""Bytes of the largest tensor that glibc's `malloc` may take from its heap: from 32 MiB on it asks
the system for each (`DEFAULT_MMAP_THRESHOLD_MAX`)."""

SIZES = (*(2**power for power in range(8, 25)), LARGEST, 2**25, 2**26)
"""Bytes of the new tensors that are filled: from next to none to beyond what caches hold."""

JOINED = (*(2**power for power in range(12, 25, 2)), LARGEST, 2**25, 2**26)
"""Bytes of the tensors that are made of two."""

IN_USE = 4
"""How many times the bytes of a tensor a step goes through before it comes back to it."""

NOTHING = ((1.0, 0.0), (2.0, 0.0))
"""A table of what is not measured yet."""

ROWS = (2, 4, 16)
"""How many rows weights are multiplied with. Beside more, arithmetic hides more of the rest."""

WEIGHTS = (2**20, 2**22, 2**24, 2**25)
"""Bytes of all weights that are read in turn. As many are read in between, as in a model that has
other layers."""

PIECES = (1, 2, 4, 8, 16)
"""Into how many weights they are cut."""

FEATURES = 1024
"""How long the rows are."""

SIDE = 512
"""Rows and columns of the matrices whose product tells the rate."""

READ = 2**27
"""Bytes that are read to tell the bandwidth of the memory: beyond what most caches hold."""

MORE = 4
"""By how many parameters the steps of Adam differ that tell what one of them adds."""

TABLES: dict[str, tuple[tuple[int, ...], ...]] = {
    "written": (SIZES,),
    "joined": (JOINED,),
    "few_rows": (ROWS, WEIGHTS, PIECES),
    "convolved": (convolving.IMAGES,),
    "convolved_back": (convolving.IMAGES,),
}
"""What is measured by numbers of something, and by which."""

TURNS = 3
"""How often a product by itself and a batched one are timed in turn."""


def constants(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """What was measured of a device, now or earlier; None where it cannot be measured.

    Args:
        device: the device.
        dtype: the type of the numbers that it is to calculate with.
    """
    # Within a mode of somebody's, a tensor may be no tensor, and an operation more than one.
    if device.type not in DEVICES or torch._C._len_torch_dispatch_stack():
        return None
    return _constants(device, dtype, _key(device, dtype))


def _key(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What the constants depend on."""
    name = _gpu(device) if device.type == "cuda" else _processor()
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    return name, device.type, threads, str(dtype), torch.__version__


def _gpu(device: torch.device) -> str:
    """The model of a GPU, and whether it may round for products, on which their rate depends."""
    name = torch.cuda.get_device_name(device)
    return f"{name}, TF32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else name


@functools.cache
def _processor() -> str:
    """The model of the CPU; Python's own answer is the architecture, or nothing, on Linux."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _constants(device: torch.device, dtype: torch.dtype, key: tuple[str, ...]) -> Machine | None:
    path = _folder() / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"
    found = read(path, key)
    if found is not None:
        settle_allocator()
        return found
    try:
        # Or else products would be of another type.
        with torch.autocast(device.type, enabled=False):
            found = measure(device, dtype)
    except RuntimeError:  # No memory, or no product of this dtype.
        return None
    write(path, key, found)
    return found


def settle_allocator() -> None:
    """Lets the allocator adapt to large tensors, as it does while a device is measured.

    glibc's `malloc` asks the system for a block that is larger than all that were given back
    before, and gives free memory at the end of its heap to the system where it is more than twice
    that (mallopt(3), `M_MMAP_THRESHOLD`). In a process that has given back no large block, each
    step of training may have to get the pages of its gradients anew, the sooner the wider the
    layers are. So a large block is given back here, of which no page is touched.
    """
    with contextlib.suppress(RuntimeError):  # There is no such block.
        torch.empty(LARGEST, dtype=torch.uint8, device="cpu")


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path(os.path.expanduser("~"), ".cache")) / "conjoin"


def read(path: Path, key: tuple[str, ...]) -> Machine | None:
    """What a file holds; None where there is none, or not such a one, or of another machine."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT or held["key"] != list(key):
            return None
        fields = held["constants"]
        known: dict[str, Any] = {
            name: _read_table(fields.pop(name), len(sizes)) for name, sizes in TABLES.items()
        }
        found = Machine(**known | {name: float(value) for name, value in fields.items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return found if _is_possible(found) else None


def _read_table(held: Any, depth: int) -> tuple[tuple[float, Any], ...]:
    more = functools.partial(_read_table, depth=depth - 1) if depth > 1 else float
    return tuple((float(size), more(taken)) for size, taken in held)


def _is_possible(found: Machine) -> bool:
    """Whether the numbers can have been measured."""
    positive = (found.call, found.cut, found.rate, found.batched, found.bandwidth)
    others = (found.step, found.shared, found.graph, found.alias)
    return (
        all(math.isfinite(number) and number > 0 for number in positive)
        and all(math.isfinite(number) and number >= 0 for number in others)
        and all(_is_table(getattr(found, name), *sizes) for name, sizes in TABLES.items())
    )


def _is_table(table: Any, sizes: tuple[int, ...], *more: tuple[int, ...]) -> bool:
    if tuple(size for size, _ in table) != sizes:
        return False
    if more:
        return all(_is_table(taken, *more) for _, taken in table)
    return all(math.isfinite(taken) and taken >= 0 for _, taken in table)


def write(path: Path, key: tuple[str, ...], found: Machine) -> None:
    """Keeps what was measured, whole or not at all; without a word where that is not allowed."""
    held = {"format": FORMAT, "key": key, "constants": dataclasses.asdict(found)}
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        file, name = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(file, "w", encoding="utf-8") as opened:
                json.dump(held, opened, indent=1)
            os.replace(name, path)
        except OSError:
            os.unlink(name)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures a device, which takes a few seconds.

    No random numbers are drawn, and the memory is given back.

    Raises:
        RuntimeError: it has too little memory, or does not calculate with this type of numbers.
    """
    full: Any = functools.partial(torch.full, fill_value=0.5, device=device, dtype=dtype)
    with torch.inference_mode():
        row, few = full((1, 8)), full((8, 8))
        call = least(lambda: F.linear(row, few), device)
        cut = least(lambda: torch.unsafe_split_with_sizes(row, (4, 4), -1), device)
        square = full((SIDE, SIDE))
        product, batched = _products(square, device)
        long = full((READ // dtype.itemsize,))
        reading = least(long.sum, device)
        rate = 2 * SIDE**3 / product
        few_rows = _few_rows(long.view(-1, FEATURES), call, rate, device)
        joined = [_joining(long, n // dtype.itemsize, device) for n in JOINED]
        del long
        filled = [least(functools.partial(full, (n // dtype.itemsize,)), device) for n in SIZES]
    few_parameters, more = (_step_of_adam(device, dtype, count) for count in (1, 1 + MORE))
    found = Machine(
        call=call,
        cut=cut,
        step=max(0.0, more - few_parameters) / MORE,
        rate=rate,
        batched=rate * min(1.0, product / batched),
        bandwidth=READ / reading,
        shared=0.0,
        graph=0.0,
        alias=0.0,
        written=_table(SIZES, filled),
        joined=_table(JOINED, joined),
        few_rows=few_rows,
        convolved=NOTHING,
        convolved_back=NOTHING,
    )
    return convolving.measured(sharing.measured(found, device, dtype), device, dtype)


def _products(square: Tensor, device: torch.device) -> tuple[float, float]:
    """The seconds of a product of two matrices, by itself and as one of two in a batched one."""
    stack = square.expand(2, SIDE, SIDE)
    alone = functools.partial(F.linear, square, square)
    batched = functools.partial(torch.baddbmm, square[0], stack, stack.mT)
    one, two = in_turn([alone, batched], TURNS, device)
    return one, two / 2


def _table(sizes: Sequence[int], taken: list[float]) -> Table:
    """What more bytes take beyond what the fewest do."""
    taken = ascending(taken)
    return tuple((size, seconds - taken[0]) for size, seconds in zip(sizes, taken, strict=True))


def _joining(source: Tensor, size: int, device: torch.device) -> float:
    """The seconds that it takes to make a tensor of so many numbers of two beside each other."""
    several = min(IN_USE, max(1, READ // 4 // source.itemsize // size))
    pieces = torch.split(source, size)[:several]
    halves = [piece.view(2, -1, min(SIDE, size) // 2).unbind() for piece in pieces]

    def join() -> None:  # None of them is kept, or the next would need memory of its own.
        for each in halves:
            torch.cat(each, 1)

    return least(join, device) / len(halves)


def _few_rows(weights: Tensor, call: float, rate: float, device: torch.device) -> Grid:
    """What products of some rows take beyond calls and arithmetic, for each byte of the weights.

    Args:
        weights: twice as many as in the largest of `WEIGHTS`, one below the other.
        call: what a call takes.
        rate: floating-point operations in a second.
        device: the device.
    """

    def beyond(rows: int, size: int, pieces: int) -> float:
        read = weights[: 2 * size // FEATURES // weights.itemsize]
        each = torch.split(read, len(read) // 2 // pieces)
        row = weights.new_full((rows, FEATURES), 0.5)
        taken = least(functools.partial(_multiply, row, each), device) - len(each) * call
        return max(0.0, taken - 2 * rows * read.numel() / rate) / read.nbytes

    def by_pieces(rows: int, size: int) -> Table:
        return tuple((pieces, beyond(rows, size, pieces)) for pieces in PIECES)

    return tuple((rows, tuple((size, by_pieces(rows, size)) for size in WEIGHTS)) for rows in ROWS)


def _multiply(rows: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        F.linear(rows, weight)


def _step_of_adam(device: torch.device, dtype: torch.dtype, count: int) -> float:
    """The seconds of a step of Adam with some small parameters."""
    parameters, gradients = (
        [torch.zeros(8, 8, device=device, dtype=dtype) for _ in range(count)] for _ in range(2)
    )
    step = sharing.step_of_adam(parameters)
    return least(functools.partial(step, gradients), device)
