"""Makes the README's tables and the plot from a result that `benchmarks.run` wrote.

python -m benchmarks.tables            print the tables
python -m benchmarks.tables --write    write them into the README, and the plot beside the result
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.peers import MODES, PEERS

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULT = ROOT / "benchmarks" / "results" / "cpu.json"
SECTION = re.compile(r"(<!-- (gain|speed) -->).*?(<!-- /\2 -->)", re.DOTALL)

SHOWN = ("widen_32", "mmoe_8", "dlrm", "detector", "googlenet", "qkv_train")
"""The cases on the README's first screen: some that gain much, some little, and one nothing."""

EAGER = {"by_hand": "by hand", "conjoin": "conjoin"}
"""The peers that every case has, and what the table calls them."""

Result = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("result", type=Path, nargs="?", default=RESULT, help="the result's JSON")
    parser.add_argument("--write", action="store_true", help="write into the README, and the plot")
    options = parser.parse_args(arguments)
    if not options.result.is_file():
        parser.error(
            f"there is no result {options.result}; python -m benchmarks.run --json writes one."
        )
    try:
        result = load(options.result)
        made = {"gain": gain(result), "speed": markdown(result)}
    except (ValueError, KeyError, TypeError) as error:
        parser.error(
            f"{options.result} is no result of all modes with {' and '.join(EAGER)}, as "
            f"python -m benchmarks.run --json writes it ({type(error).__name__}: {error})."
        )
    if not options.write:
        print(made["speed"])
        return 0
    readme, found = SECTION.subn(lambda m: f"{m[1]}\n\n{made[m[2]]}\n\n{m[3]}", README.read_text())
    if found != len(made):
        names = " and ".join(made)
        parser.error(
            f"{README} has {found} sections between comments that say {names}, not one of each."
        )
    plot(result, options.result.with_suffix(".svg"))
    README.write_text(readme)
    return 0


def load(path: Path = RESULT) -> Result:
    """A result."""
    found: Result = json.loads(path.read_text())
    return found


def markdown(result: Result) -> str:
    """What stands in the README between the comments that say `speed`."""
    tables = _of_models(result), _of_peers(result), _of_optimize(result)
    return "\n\n".join([_taken_on(result["machine"]), *filter(None, tables)])


def _taken_on(machine: Mapping[str, Any]) -> str:
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] != 1)}"
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return (
        f"Taken on {machine['date'][:10]} at commit {machine['commit']}"
        f"{' with changes' * machine['changed']}, with {threads} of "
        f"{machine['cores']} cores, {machine['cpu']}{device}, Python {machine['python']} and "
        f"PyTorch {machine['torch']}; the load average was {machine['load'][0]:.1f} before."
    )


def gain(result: Result) -> str:
    """What stands in the README between the comments that say `gain`: some cases in brief."""
    modes, abouts = _peers_of(result), _abouts_of(result)
    rows = [
        [
            abouts[case],
            _launches(modes[case, "training"]),
            *(f"{modes[case, mode]['conjoin']['ratio']['median']:.2f}" for mode in MODES),
        ]
        for case in SHOWN
        if case in abouts
    ]
    return _table(["model", "launches", *MODES], rows)


def _peers_of(result: Result) -> dict[tuple[str, str], Any]:
    """What was measured of each case in each mode, by peer."""
    return {(each["case"], each["mode"]): each["peers"] for each in result["cases"]}


def _abouts_of(result: Result) -> dict[str, str]:
    """What each case is, in words."""
    return {each["case"]: each["about"] for each in result["cases"]}


def _of_models(result: Result) -> str:
    """Each case: its launches, and how long a step takes beside the plain model."""
    modes = _peers_of(result)
    rows = [
        [
            f"`{case}`: {about}",
            _launches(modes[case, "training"]),
            *(_ratio(modes[case, mode][peer]) for mode in MODES for peer in EAGER),
        ]
        for case, about in _abouts_of(result).items()
    ]
    heads = [f"{mode}, {title}" for mode in MODES for title in EAGER.values()]
    return _table(["model", "launches", *heads], rows)


def _launches(peers: Mapping[str, Any]) -> str:
    """Those of a forward and a backward pass."""
    before, after = (
        sum(peers[name]["launches"][p] for p in ("forward", "backward"))
        for name in ("plain", "conjoin")
    )
    return f"{before} → {after}"


def _of_peers(result: Result) -> str:
    """The cases on which compilers were measured too: every peer."""
    rows = [
        [f"`{each['case']}`", each["mode"], PEERS[name].about, _ratio(peer), _setup(peer)]
        for each in result["cases"]
        if any(PEERS[name].compiles for name in each["peers"])
        for name, peer in each["peers"].items()
        if name != "plain"
    ]
    return _table(["model", "mode", "run by", "time", "made and run once in"], rows)


def _of_optimize(result: Result) -> str:
    rows = [
        [
            f"{each['layers']:,}",
            f"`{each['way']}`",
            f"{each['seconds']:.1f} s",
            "not known" if each["extra_mib"] is None else f"{each['extra_mib']:.0f} MiB",
            f"{each['model_mib']:.0f} MiB",
        ]
        for each in result.get("scaling", ())
    ]
    return _table(["layers", "what", "time", "memory beside the model", "model"], rows)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as a table; nothing where there are none, since that was not measured."""
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |".replace("|  |", "| |") for cells in lines)


def _ratio(peer: Mapping[str, Any]) -> str:
    """The time beside the plain model's: the median, and the quartiles."""
    if "unavailable" in peer:
        return f"none: {peer['unavailable']}"
    ratio = peer["ratio"]
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _setup(peer: Mapping[str, Any]) -> str:
    return "" if "unavailable" in peer else f"{peer['setup_seconds']:.2f} s"


def of_case(found: Mapping[str, Any]) -> str:
    """What was measured of a case in a mode, for the terminal."""
    rows = [
        [name, None if "unavailable" in peer else _microseconds(peer), _ratio(peer), _setup(peer)]
        for name, peer in found["peers"].items()
    ]
    title = f"{found['case']}, {found['mode']}: {found['rounds']} rounds of {found['steps']}"
    heads = ["peer", "µs a step", "beside plain", "made and run once in"]
    return f"{title}\n{tabulate(rows, heads, floatfmt='.1f')}\n"


def _microseconds(peer: Mapping[str, Any]) -> float:
    return float(peer["seconds"]["median"]) * 1e6


def of_scaling(found: Sequence[Mapping[str, Any]]) -> str:
    """What optimize itself took, for the terminal."""
    return tabulate(list(map(dict, found)), "keys", floatfmt=".2f") + "\n"


def plot(result: Result, path: Path) -> None:
    """A dot for each case and peer, at the ratio, with a line between the quartiles."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "conjoin"  # The same names in the file each time.
    names = list(dict.fromkeys(each["case"] for each in result["cases"]))
    peers = [name for name in PEERS if name != "plain"]
    size = 11, 0.27 * len(names) + 1.6
    figure, axes = pyplot.subplots(1, len(MODES), sharey=True, figsize=size, layout="constrained")
    for axis, mode in zip(axes, MODES, strict=True):
        for peer in peers:
            _dots(axis, result, names, mode, peer)
        axis.axvline(1, color="0.6", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks([0.25, 0.5, 1, 2, 4], ["¼", "½", "1", "2", "4"])
        axis.minorticks_off()
        axis.set_title(mode)
        axis.set_xlabel("time of a step, plain = 1")
        axis.grid(axis="y", color="0.92")
        axis.set_axisbelow(True)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    handles = {h.get_label(): h for axis in axes for h in axis.get_legend_handles_labels()[0]}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _dots(axis: Any, result: Result, names: Sequence[str], mode: str, peer: str) -> None:
    ratios = {
        each["case"]: each["peers"][peer]["ratio"]
        for each in result["cases"]
        if each["mode"] == mode and "ratio" in each["peers"].get(peer, {})
    }
    if not ratios:
        return
    number = list(PEERS).index(peer)
    heights = [names.index(name) + 0.07 * (number - 4) for name in ratios]
    middle = [ratio["median"] for ratio in ratios.values()]
    left = [ratio["median"] - ratio["low"] for ratio in ratios.values()]
    right = [ratio["high"] - ratio["median"] for ratio in ratios.values()]
    axis.errorbar(
        middle, heights, xerr=(left, right), fmt="o", markersize=3, linewidth=0.8,
        color=f"C{number - 1}", label=PEERS[peer].about.replace("`", ""),
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
