"""The cost model: does a wide layer pay, and how wide should it be?

k layers read x. They may run by themselves, as one wide layer, or in between as several, and what
one of these layers takes is taken to be

    launches * call  +  max(2 * multiply-adds / rate + few rows, bytes read / bandwidth)
                     +  new bytes  +  output read

summed over the forward pass and, in training, the backward pass and what a step of Adam takes for
each parameter. All constants are measured on the machine (see `machine.py`). What differs:

- launches: one forward and, in training, one for each gradient of a layer; one each to add the
  layers' gradients of x; for a wide layer also one where the weights are joined at each call;
- what it takes siblings to share a run, where they are called one by one (`sharing.py`);
- what it takes to cut a wide output where nothing carries the wide form on: the split itself, the
  cat that is its backward pass, and a copy for each part that must be contiguous;
- bytes: x is read once for each layer; sums are new bytes, and so are tensors of a weight's size
  that an optimizer makes and drops again; cats, copies and joined weights are read as well;
- what it takes to read the output behind the layer, where there is no backward pass: layers' own
  outputs come and go in turn, and a wide one, of which all is there before the first part is read,
  leaves a cache sooner (`twin_critics_4096` in the benchmark, by hand);
- a batched product has a rate of its own, which libraries differ in;
- convolutions: what each of them takes that reads the same (`convolving.py`);
- what a new byte takes: not the same in a tensor that lies in a cache, in one that does not, and in
  one that the allocator asks the system for at each call, whose pages are all faulted in anew;
- few rows: what a product of some rows takes beyond its arithmetic, by how many there are, by the
  bytes of all the layers' weights, and by how large each weight is among them. One large weight may
  take longer there than several, most of all where a cache does not hold it (`time_projections` in
  the benchmark, by hand, in inference). Why is not known; each machine is measured.

What is done to the parts, and how well a library does at one width or another, are not in it. So it
is an estimate, and labelled so; `policy="measure"` measures.

Nor is what a rewritten forward takes in inference to see that all is as it was traced: calling
modules, as it does not, takes more.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from conjoin.policy.figures import LEAST_GAIN, MARGIN, Figures, pick
from conjoin.policy.forms import Form, forms, in_order, ordered

MOST_BETWEEN = 3
"""How many forms between one wide layer and none are raced: each holds the weights once more."""

TEMPORARIES = 2
"""How many tensors of a weight's size Adam's step makes for it, on a CPU: the root of the second
moment, and that divided."""

IN_A_MODEL = 2
"""How many times as long Python takes in a step of a model, where its code and its data are in no
cache, as in a loop of its own."""

Table = tuple[tuple[float, float], ...]
"""Numbers of bytes, which ascend, and the seconds that were measured with them."""

Grid = tuple[tuple[float, tuple[tuple[float, Table], ...]], ...]
"""Numbers of rows; for each, bytes of all weights; for each, into how many they are cut, and the
seconds for each byte."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is measured of a device, in seconds and bytes.

    Attributes:
        call: what a layer takes that has next to nothing to do.
        cut: what it takes to cut a tensor in two.
        step: what one more small parameter adds to a step of Adam.
        rate: floating-point operations in a second.
        batched: likewise in a batched product; no more than `rate`.
        bandwidth: bytes read in a second, from memory.
        shared: what it takes a sibling in lockstep to share a run; see `sharing.py`.
        graph: what such a run takes more where there is a backward pass.
        alias: and what the alias takes that it reads where its input gets a gradient in it.
        written: what it takes to fill a tensor that is new, beyond `call`, by its number of bytes,
            which ascend.
        joined: likewise what it takes to join two tensors side by side, by the bytes of the result.
        few_rows: what each byte of a weight takes beside two rows or more, beyond `call` and the
            arithmetic; see `Grid`.
        convolved: what a convolution takes beyond all else, by the bytes that it reads; see
            `convolving.py`.
        convolved_back: likewise in a step of training.
    """

    call: float
    cut: float
    step: float
    rate: float
    batched: float
    bandwidth: float
    shared: float
    graph: float
    alias: float
    written: Table
    joined: Table
    few_rows: Grid
    convolved: Table
    convolved_back: Table

    def new(self, size: float) -> float:
        """Seconds to fill a new tensor of `size` bytes."""
        return _between(self.written, size)

    def copy(self, size: float) -> float:
        """Seconds to fill one of `size` bytes with what lies elsewhere in another order."""
        return _between(self.joined, size)

    def again(self, size: float) -> float:
        """Seconds to read `size` bytes that were new a while ago: what a copy takes beyond them."""
        return max(0.0, self.copy(size) - self.new(size))

    def together(self, count: int, setting: Setting) -> float:
        """Seconds that it takes within a model to see that so many siblings may run at once.

        In a rewritten forward that is asked once, and about what one sibling asks in lockstep. In
        inference it saves as much that the siblings are not called as modules.
        """
        if not setting.lockstep:
            return setting.training * IN_A_MODEL * self.shared
        aliases = setting.training and setting.passed_on
        run = setting.training * self.graph + aliases * self.alias
        return IN_A_MODEL * (count * self.shared + run)

    def convolution(self, image: int, training: bool) -> float:
        """Seconds that a convolution of so many bytes takes beyond all else."""
        return _between(self.convolved_back if training else self.convolved, image)

    def beside_rows(self, rows: int, weight: float, among: float) -> float:
        """Seconds that a weight takes beside rows, beyond the arithmetic.

        Args:
            rows: how many rows.
            weight: the bytes of the weight.
            among: the bytes of all weights that are read in turn.
        """
        if rows < 2 or not weight:
            return 0.0
        return weight * _within(self.few_rows, rows, among, among / weight)


def _between(table: Table, size: float) -> float:
    """The seconds for a size, between and beyond what was measured."""
    return max(0.0, _on_line(size, *_around(table, size)))


def _within(table: Sequence[tuple[float, Any]], at: float, *more: float) -> float:
    """What a table of tables holds at or between what was measured, and beyond that at its end."""
    at = min(max(at, table[0][0]), table[-1][0])
    ends = _around(table, at)
    if more:
        ends = [(place, _within(held, *more)) for place, held in ends]
    return _on_line(at, *ends)


def _around(table: Sequence[tuple[float, Any]], at: float) -> Sequence[tuple[float, Any]]:
    """The two entries of a table between which something is, or the nearest two."""
    places = [place for place, _ in table]
    right = max(min(bisect.bisect_left(places, at), len(places) - 1), 1)
    return table[right - 1 : right + 1]


def _on_line(at: float, start: tuple[float, float], end: tuple[float, float]) -> float:
    """The value at a place on the line through two points."""
    return start[1] + (end[1] - start[1]) * (at - start[0]) / (end[0] - start[0])


@dataclass(frozen=True, slots=True)
class Work:
    """One call of a layer.

    Attributes:
        input: the bytes that it reads beside the weight.
        output: the bytes that it gives.
        weight: the bytes of its weight.
        read: the bytes that it reads of that.
        operations: its multiplications and additions.
        biased: whether it has a bias.
        contiguous: whether its part of a wide output must be made contiguous.
        rows: how many rows its weight is multiplied with; 0 where it is no matrix.
        image: the bytes that it reads as a convolution; 0 where it is none.
    """

    input: int
    output: int
    weight: int
    read: int
    operations: int
    biased: bool = False
    contiguous: bool = False
    rows: int = 0
    image: int = 0


NUMBERS = ("input", "output", "weight", "read", "operations")
FLAGS = ("biased", "contiguous")

Layout = Literal["beside", "stack", "apart"]
"""How the tensors lie that layers read: side by side in one, in a stack, or each by itself."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What the calls of a group have in common.

    Attributes:
        training: whether there is a backward pass.
        passed_on: whether the input gets a gradient in it.
        joined: whether a wide layer joins its weights at each call.
        one_by_one: whether a wide layer runs its parts by themselves and joins what they give.
        cut: whether its output is cut right behind it; otherwise more may run on it first, or it
            may not be cut at all.
        stacked: whether layers that read tensors of their own are one batched product.
        lockstep: whether the siblings are called one by one, and share a run of the wide layer.
        extra: how many more operations a wide layer launches in a step of training.
    """

    training: bool
    passed_on: bool = True
    joined: bool = False
    one_by_one: bool = False
    cut: bool = True
    stacked: bool = False
    lockstep: bool = False
    extra: int = 0


def seconds(machine: Machine, forms: Sequence[Sequence[Work]], setting: Setting) -> float:
    """What it takes to run layers that read one tensor, each list of them as one layer."""
    among = _weight([layer for layers in forms for layer in layers])
    taken = sum(_layer(machine, layers, setting, among) for layers in forms)
    if setting.training and setting.passed_on:
        taken += (len(forms) - 1) * (machine.call + machine.new(forms[0][0].input))
    return taken


def _seconds_of(machine: Machine, form: Form, works: Sequence[Work], setting: Setting) -> float:
    return seconds(machine, [[works[i] for i in run] for run in form], setting)


def level(machine: Machine, works: Sequence[Work], setting: Setting, layout: Layout) -> Figures:
    """What layers take that read tensors of their own, by themselves and as one layer.

    A batched product must be the quicker by itself. Where tensors are joined for it, no bundle was
    there before, so that one operation behind is taken to run at once as well. In training much was
    computed since these tensors were, and compilers are slow at joining what they compute, so there
    it must save more. A convolution in groups reads what lies side by side as it is, so it is left
    apart only where it is slower.

    Args:
        machine: what is measured of the device.
        works: what each layer does.
        setting: what they have in common.
        layout: how the tensors lie.
    """
    works = [dataclasses.replace(work, image=0) for work in works]  # Each reads its own either way.
    among = _weight(works)
    apart = sum(_layer(machine, [work], setting, among) for work in works)
    rate = machine.batched if setting.stacked else machine.rate
    arithmetic = sum(_product(machine, [work], rate, among) for work in works)
    whole = _layer(machine, [_together(works)], setting, among, arithmetic)
    read, given = (sum(getattr(work, name) for work in works) for name in ("input", "output"))
    copied = machine.call + machine.copy(read)
    gain = 0.0 if setting.stacked else -MARGIN
    if layout == "apart":
        behind = (len(works) - 1) * machine.call * (1 + setting.training)
        whole += copied - behind
        if setting.training:
            whole += max(0.0, 2 * read / machine.bandwidth - machine.copy(read))
            gain = LEAST_GAIN
    else:
        apart += machine.cut
        if setting.training and setting.passed_on:
            apart += copied  # Cut here, the gradients are joined.
            whole += copied if layout == "beside" and setting.stacked else 0.0
    if setting.stacked:
        whole += machine.cut * (layout != "apart")
        whole += setting.training * (machine.call + machine.copy(given))
    chosen, layers = (whole, 1) if whole <= apart * (1 - gain) else (apart, len(works))
    return Figures(apart, whole, chosen, layers, measured=False, training=setting.training)


def _weight(works: Sequence[Work]) -> int:
    """The bytes of the weights of layers."""
    return sum(work.weight for work in works)


def _together(works: Sequence[Work]) -> Work:
    """What layers do together."""
    numbers = {name: sum(getattr(work, name) for work in works) for name in NUMBERS}
    flags = {name: any(getattr(work, name) for work in works) for name in FLAGS}
    return Work(**numbers, **flags)


def _layer(
    machine: Machine,
    layers: Sequence[Work],
    setting: Setting,
    among: int,
    arithmetic: float | None = None,
) -> float:
    """What it takes to run one layer that is as wide as all of these.

    Args:
        machine: what is measured of the device.
        layers: what they do.
        setting: what they have in common.
        among: the bytes of all weights that are read in turn.
        arithmetic: what a product takes, where it is not that of one wide layer.
    """
    if len(layers) > 1 and setting.one_by_one:
        joint = machine.call + machine.copy(sum(each.output for each in layers))
        return joint + sum(_layer(machine, [each], setting, among) for each in layers)
    joined = len(layers) > 1 and setting.joined
    cut = len(layers) > 1 and setting.cut
    output, weight = sum(each.output for each in layers), _weight(layers)
    copies = [each.output for each in layers if cut and each.contiguous]
    copies += [weight] if joined else []
    biased = {each.biased for each in layers}
    launches, products = 1 + (len(biased) > 1), 1  # Zeros fill the gaps of a bias.
    new = [output]
    if setting.training:
        back = [weight, *([layers[0].input] if setting.passed_on else [])]
        products += len(back)
        copies += [output] if cut else []  # The cat of the parts' gradients.
        copies += [weight] if joined else []
        launches += len(back) + any(biased) + (len(layers) > 1) * setting.extra
        new += [*back, *[weight] * TEMPORARIES]
    fixed = (launches + len(copies)) * machine.call + cut * machine.cut
    fixed += setting.training * (1 + any(biased)) * machine.step
    if len(layers) > 1:
        fixed += machine.together(len(layers), setting)
    moved = sum(map(machine.new, new)) + sum(map(machine.copy, copies))
    if not setting.training:
        moved += machine.again(output)
    if layers[0].image:
        moved += machine.convolution(layers[0].image, setting.training)
    product = _product(machine, layers, machine.rate, among) if arithmetic is None else arithmetic
    return fixed + products * product + moved


def _product(machine: Machine, layers: Sequence[Work], rate: float, among: int) -> float:
    """What the arithmetic of one layer takes that is as wide as these, at some rate."""
    operations = sum(each.operations for each in layers)
    read = sum(each.read for each in layers)
    beside = machine.beside_rows(layers[0].rows, _weight(layers), among)
    return max(operations / rate + beside, (layers[0].input + read) / machine.bandwidth)


def choose(
    machine: Machine, works: Sequence[Work], names: Sequence[str], setting: Setting
) -> tuple[Form, Figures]:
    """How to run a group, by an estimate.

    Args:
        machine: what is measured of the device.
        works: what each layer does.
        names: the layers' names.
        setting: what they have in common.

    Returns:
        The form, and what it, the layers by themselves and one wide layer take.
    """
    order = ordered([work.output for work in works], names)
    return _chosen(machine, tuple(works), order, setting)


@functools.lru_cache(maxsize=1024)  # A large model consists of a few groups, over and over again.
def _chosen(
    machine: Machine, works: tuple[Work, ...], order: tuple[int, ...], setting: Setting
) -> tuple[Form, Figures]:
    among = in_order([work.output for work in works], order)
    taken = {form: _seconds_of(machine, form, works, setting) for form in among}
    margin = 0.0 if setting.cut else MARGIN
    return pick(taken, measured=False, training=setting.training, margin=margin)


def likely(
    machine: Machine | None, works: Sequence[Work], names: Sequence[str], setting: Setting
) -> tuple[Form, ...]:
    """The forms that are worth a race: one wide layer, all apart, and a few in between.

    Args:
        machine: what is measured of the device; None where that is nothing.
        works: what each layer does.
        names: the layers' names.
        setting: what they have in common.
    """
    first, *between, last = forms([work.output for work in works], names)
    if machine is not None:
        taken = {form: _seconds_of(machine, form, works, setting) for form in between}
        chosen, _ = choose(machine, works, names, setting)
        between = sorted(between, key=lambda form: (form != chosen, taken[form], len(form)))
    return first, *sorted(between[:MOST_BETWEEN], key=len), last
