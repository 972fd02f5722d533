"""Measures cases and prints, or writes, what came out.

python -m benchmarks.run                           every case, and what optimize itself takes
python -m benchmarks.run vae widen_8 --threads 2   some cases
python -m benchmarks.run --list                    what there is
python -m benchmarks.run --json PATH               write it down, for benchmarks.tables
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache

from benchmarks import machine, scaling
from benchmarks.cases import CASES, Case
from benchmarks.measure import first_line, measure
from benchmarks.peers import MODES, PEERS, Peer
from benchmarks.tables import of_case, of_scaling

SECONDS = 2.0
"""How long a case is timed in a mode, so that a run of all takes less than twelve minutes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; argparse ends it with status 2 where the arguments are wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        _list()
        return 0
    cases = [CASES[name] for name in _known(parser, "case", options.cases, CASES)] or CASES.values()
    peers = [PEERS[name] for name in _known(parser, "peer", options.peers or [], PEERS)]
    modes = _known(parser, "mode", options.mode or MODES, MODES)
    _check(parser, options)
    torch.set_num_threads(options.threads)
    machine.choose(options.device)
    result: dict[str, Any] = {"machine": machine.described(options.device), "cases": []}
    with fresh_cache():
        for case in cases:
            for mode in modes:
                among = _among(case, mode, peers, options)
                found = measure(case, mode, among, options.device, options.seconds)
                result["cases"].append(found)
                print(of_case(found), flush=True)
                _write(result, options.json)
    if not options.cases:
        result["scaling"] = _scaling()
        _write(result, options.json)
    return 0


def _write(result: dict[str, Any], path: Path | None) -> None:
    """Writes what there is by now, so that a run that is broken off leaves something."""
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        "python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("cases", metavar="CASE", nargs="*", help="a case; without any, all")
    parser.add_argument("--list", action="store_true", help="list the cases and the peers")
    parser.add_argument("--device", default="cpu", help="the device to run on (default: cpu)")
    parser.add_argument(
        "--threads", type=int, default=1, help="the threads of each operation (default: 1)"
    )
    parser.add_argument(
        "--mode",
        action="append",
        metavar="MODE",
        help=f"{' or '.join(MODES)}; may be given more than once (default: both)",
    )
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        metavar="PEER,...",
        help="the peers (default: all; those that compile only on the cases marked so)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=SECONDS,
        help="how long to time each case in each mode (default: %(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the result")
    return parser


def _known(
    parser: argparse.ArgumentParser, what: str, given: Sequence[str], known: Collection[str]
) -> list[str]:
    """The names that were given, each once."""
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}."
            parser.error(f"there is no {what} {name!r}; {hint}")
    return list(dict.fromkeys(given))


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if options.threads < 1:
        parser.error(f"--threads is a number from 1 on, not {options.threads}.")
    if not options.seconds > 0:
        parser.error(f"--seconds is a number above 0, not {options.seconds}.")
    try:
        torch.ones(1, device=options.device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        parser.error(f"--device {options.device} cannot be used: {first_line(error)}")
    if options.json is not None:
        if not options.json.absolute().parent.is_dir():
            parser.error(f"--json: there is no folder {options.json.parent}.")
        try:
            options.json.open("a").close()
        except OSError as error:
            parser.error(f"--json {options.json} cannot be written: {error.strerror}.")


def _among(case: Case, mode: str, peers: Sequence[Peer], options: argparse.Namespace) -> list[Peer]:
    """The peers for a case, the plain model first, which the others are compared with."""
    device = torch.device(options.device).type
    chosen = peers or [
        peer
        for peer in PEERS.values()
        if (case.compiled or not peer.compiles)
        and mode in peer.modes
        and peer.device in (None, device)
    ]
    return list(dict.fromkeys([PEERS["plain"], *chosen]))


def _list() -> None:
    for title, known in (("cases", CASES), ("peers", PEERS)):
        print(title)
        for name, each in known.items():
            print(f"  {name:20} {each.about}")


def _scaling() -> list[dict[str, object]]:
    found = []
    for layers in scaling.SIZES:
        for way in scaling.WAYS:
            found.append(scaling.measure(layers, way))
            print(of_scaling(found[-1:]), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
