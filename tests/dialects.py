"""The dialects in which a graph may be written, and what each pass does in each.

`CELLS` is the table of the README. `test_dialects.py` runs every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassBase
from torch.nn import functional as F

from conjoin import passes

Graph = tuple[fx.GraphModule, tuple[torch.Tensor, ...]]
"""A graph and what it is called with."""


# Models, each with something to do for one pass


class Layers(nn.Module):
    """Linear layers, called as layers or through functions of their parameters."""

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__()
        self.functional = functional
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.c, self.d = nn.Linear(6, 6), nn.Linear(6, 6)

    def run(self, layer, x):
        return F.linear(x, layer.weight, layer.bias) if self.functional else layer(x)


class Equal(Layers):
    """Equal operations on one tensor."""

    def forward(self, x):
        return torch.relu(x) * torch.relu(x)


class Siblings(Layers):
    """Two layers on one tensor."""

    def forward(self, x):
        return self.run(self.a, x).sin(), self.run(self.b, x).cos()


class Towers(Layers):
    """Two branches of two layers."""

    def forward(self, x):
        first, second = torch.relu(self.run(self.a, x)), torch.relu(self.run(self.b, x))
        return self.run(self.c, first).sin(), self.run(self.d, second).cos()


class Repeated(Layers):
    """One layer on many tensors of one shape."""

    def forward(self, x):
        return sum(self.run(self.a, x * scale).sin() for scale in range(1, 9))


class Many(Layers):
    """Many small layers on one tensor, which are not trained."""

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__(functional=functional)
        self.layers = nn.ModuleList(nn.Linear(6, 2) for _ in range(16)).requires_grad_(False)

    def forward(self, x):
        return sum(self.run(layer, x).sin() for layer in self.layers)


class Joined(Many):
    """Many small layers, whose outputs are joined."""

    def forward(self, x):
        return torch.cat([self.run(layer, x) for layer in self.layers], -1) * 2


class Activated(Many):
    """The same, with an activation of each before."""

    def forward(self, x):
        return torch.cat([torch.sin(self.run(layer, x)) for layer in self.layers], -1) * 2


class Experts(Many):
    """Many small layers, and another behind each."""

    def __init__(self, *, functional: bool = False) -> None:
        super().__init__(functional=functional)
        self.behind = nn.ModuleList(nn.Linear(2, 2) for _ in self.layers).requires_grad_(False)

    def forward(self, x):
        both = zip(self.layers, self.behind, strict=True)
        return sum(self.run(last, self.run(first, x)).sin() for first, last in both)


class Sliced(Layers):
    """Products with slices of one weight, as the views of a wide layer compute."""

    def forward(self, x):
        w = self.a.weight
        return F.linear(x, w.narrow(0, 0, 2)).sin(), F.linear(x, w.narrow(0, 2, 4)).cos()


# Dialects


def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 6, dtype=torch.float64)


def model_of(cls: type[Layers], **options: bool) -> Layers:
    torch.manual_seed(0)
    return cls(**options).double()


def called(cls: type[Layers]) -> Graph:
    return fx.symbolic_trace(model_of(cls)), (x(),)


def functional(cls: type[Layers]) -> Graph:
    return fx.symbolic_trace(model_of(cls, functional=True)), (x(),)


def compiled(cls: type[Layers]) -> Graph:
    found: list[Graph] = []

    def keep(graph_module, inputs):
        found.append((graph_module, tuple(t.detach() for t in inputs)))
        return graph_module.forward

    torch._dynamo.reset()
    torch.compile(model_of(cls), backend=keep)(x())
    return found[0]


def exported(cls: type[Layers]) -> Graph:
    program = torch.export.export(model_of(cls), (x(),))
    return program.module(check_guards=False), (x(),)


def decomposed(cls: type[Layers]) -> Graph:
    return make_fx(model_of(cls))(x()), (x(),)


DIALECTS: Mapping[str, Callable[[type[Layers]], Graph]] = {
    "calls of layers (`symbolic_trace`)": called,
    "functions with `get_attr`": functional,
    "Dynamo (`torch.compile`)": compiled,
    "ATen of `torch.export`": exported,
    "ATen of `make_fx`": decomposed,
}


@dataclass(frozen=True)
class Case:
    """A pass, a model in which it has something to do, and the passes that go before it."""

    model: type[Layers]
    run: PassBase
    before: tuple[PassBase, ...] = ()


CASES: Mapping[str, Case] = {
    "Lift": Case(Siblings, passes.Lift()),
    "Share": Case(Equal, passes.Share()),
    "Batch": Case(Repeated, passes.Batch()),
    "Widen": Case(Siblings, passes.Widen()),
    "Sink": Case(Activated, passes.Sink(), (passes.Widen(), passes.Join())),
    "Towers": Case(Towers, passes.Towers(), (passes.Widen(), passes.Sink())),
    "Cancel": Case(Joined, passes.Cancel(), (passes.Widen(), passes.Join())),
    "Separate": Case(Siblings, passes.Separate(), (passes.Widen(),)),
    "Rejoin": Case(Sliced, passes.Rejoin()),
    "Join": Case(Many, passes.Join()),
    "Stack": Case(Experts, passes.Stack(), (passes.Join(),)),
}


class Outcome(Enum):
    """What a pass does in a dialect."""

    WORKS = "yes"
    PARTLY = "where it pays"
    LIFTED = "after `Lift`"
    NOT = "no"


@dataclass(frozen=True)
class Cell:
    """What a pass does in a dialect, and why it does nothing, or less, where that is so."""

    outcome: Outcome
    why: str = ""


WORKS, LIFTED = Cell(Outcome.WORKS), Cell(Outcome.LIFTED)
CALLED = Cell(Outcome.NOT, "layers are called as layers already")
INPUTS = Cell(
    Outcome.NOT,
    "weights are inputs of the graph and belong to no layer: `conjoin.optimize` the model before "
    "`torch.compile`, and `Rejoin` makes its products wide there; for others, `Join` and `Stack` "
    "join weights at each call, where that pays",
)
TO_JOINTS = Cell(
    Outcome.PARTLY,
    "a split moves to a joint that `Cancel` takes out with it; elsewhere a compiler gains nothing "
    "by it, since it launches nothing for what acts on elements",
)
CONSTANTS = Cell(
    Outcome.NOT,
    "weights are constants of the graph and belong to no layer: `conjoin.optimize` the model "
    "before `make_fx`",
)
JOINED = Cell(Outcome.NOT, "what is joined once costs nothing at each call: `Widen` does that")
STACKED = Cell(Outcome.NOT, "what is stacked once costs nothing at each call: `Towers` does that")

CELLS: Mapping[str, tuple[Cell, ...]] = {
    "Lift": (CALLED, WORKS, INPUTS, WORKS, WORKS),
    "Share": (WORKS, WORKS, WORKS, WORKS, WORKS),
    "Batch": (WORKS, LIFTED, INPUTS, LIFTED, CONSTANTS),
    "Widen": (WORKS, WORKS, INPUTS, LIFTED, LIFTED),
    "Sink": (WORKS, WORKS, TO_JOINTS, LIFTED, LIFTED),
    "Towers": (WORKS, LIFTED, INPUTS, LIFTED, CONSTANTS),
    "Cancel": (WORKS, WORKS, WORKS, LIFTED, LIFTED),
    "Separate": (WORKS, WORKS, INPUTS, LIFTED, LIFTED),
    "Rejoin": (WORKS, WORKS, WORKS, LIFTED, LIFTED),
    "Join": (JOINED, JOINED, WORKS, JOINED, JOINED),
    "Stack": (STACKED, STACKED, WORKS, STACKED, STACKED),
}
"""For each pass the cells, in the order of `DIALECTS`."""


def table() -> str:
    """The table in Markdown, with the reasons below it."""
    cells = (cell for row in CELLS.values() for cell in row)
    reasons = [*dict.fromkeys(cell.why for cell in cells if cell.why)]

    def text(cell: Cell) -> str:
        return cell.outcome.value + (f" ({reasons.index(cell.why) + 1})" if cell.why else "")

    rows = [
        f"| pass | {' | '.join(DIALECTS)} |",
        "|---" * (len(DIALECTS) + 1) + "|",
        *(f"| `{name}` | {' | '.join(map(text, row))} |" for name, row in CELLS.items()),
        "",
        *(f"{number}. {why[0].upper()}{why[1:]}." for number, why in enumerate(reasons, 1)),
    ]
    return "\n".join(rows)
