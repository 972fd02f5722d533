"""Random models with branches, for the property tests.

A `Program` is the source of a module and the inputs of its calls. Its strategy, `programs()`, runs
each line as it is drawn, on a batch of two, so that what is drawn next fits what is there; a line
that raises is left out. The source comes in two ways: `straight`, which conjoin may rewrite unless
a line is in the way, and `decided`, where Python decides at the start of each forward, so that the
same siblings run in lockstep.
"""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import linecache
import sys
import types

import torch
from equivalence import set_seed
from hypothesis import strategies as st
from torch import Tensor, nn

WAYS = ("straight", "decided")
ROWS = 7
"""The number of rows of each embedding."""

PRELUDE = """\
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from branching import Pair, doubled, scaled
from conjoin.nn import Parallel
"""

DECISION = "if x0 is True:\n    return None"

Pair = collections.namedtuple("Pair", "first second")


def doubled(module, args, output):
    """A forward hook."""
    return output * 2


def scaled(y):
    """A function of the user's own."""
    return y * 0.5


@dataclasses.dataclass(frozen=True)
class Input:
    """One argument: its shape without the batch, and how it lies in memory."""

    shape: tuple[int, ...]
    integer: bool = False
    layout: str = "contiguous"

    def tensor(self, batch: int) -> Tensor:
        if self.integer:
            return torch.randint(0, ROWS, (batch, *self.shape))
        value = torch.randn(batch, *self.shape, dtype=torch.float64)
        if self.layout == "channels_last":
            return value.to(memory_format=torch.channels_last)
        if self.layout == "transposed":
            return value.mT.contiguous().mT
        return value


@dataclasses.dataclass(frozen=True)
class Class:
    """The source of a module's class, by its lines."""

    name: str
    signature: str
    init: tuple[str, ...]
    forward: tuple[str, ...]

    def source(self, way: str) -> str:
        decision = (DECISION,) if way == "decided" else ()
        init, forward = (
            "\n".join(lines).replace("\n", "\n        ")
            for lines in (("super().__init__()", *self.init), (*decision, *self.forward))
        )
        return (
            f"class {self.name}(nn.Module):\n"
            f"    def __init__(self):\n        {init}\n\n"
            f"    def forward(self, {self.signature}):\n        {forward}\n"
        )


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and the inputs of its calls."""

    classes: tuple[Class, ...]
    inputs: tuple[Input, ...]
    batches: tuple[int, ...]
    keywords: tuple[tuple[str, float], ...] = ()
    """Keyword arguments of every other call."""

    def source(self, way: str = "straight") -> str:
        return "\n\n".join([PRELUDE, *(cls.source(way) for cls in self.classes)])

    def __repr__(self) -> str:
        return (
            f"\n{self.source()}\n# inputs={self.inputs}, batches={self.batches}, "
            f"keywords={self.keywords}"
        )

    def model(self, way: str = "straight") -> nn.Module:
        """The model with its first weights, the same at each call."""
        set_seed()
        return module_of(self.source(way)).Model()

    def arguments(self, call: int = 0) -> tuple[tuple[Tensor, ...], dict[str, float]]:
        """The arguments of a call; the first has no keywords and a batch above one."""
        set_seed(call)
        args = tuple(input.tensor(self.batches[call]) for input in self.inputs)
        return args, dict(self.keywords) if call % 2 else {}

    @property
    def calls(self) -> range:
        return range(len(self.batches))


def module_of(source: str) -> types.ModuleType:
    """The module of that source, which pickle, inspect and tracebacks find."""
    name = f"branching_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        module = types.ModuleType(name)
        filename = f"<{name}>"
        linecache.cache[filename] = len(source), None, source.splitlines(True), filename
        exec(compile(source, filename, "exec"), vars(module))
        sys.modules[name] = module
    return sys.modules[name]


def forget_modules() -> None:
    """Lets go of all modules that were made."""
    for name in [name for name in sys.modules if name.startswith("branching_")]:
        del sys.modules[name], linecache.cache[f"<{name}>"]


class Draft:
    """A class in the making."""

    def __init__(self, draw, tensors: tuple[Tensor, ...], names, depth: int = 0) -> None:
        self.draw = draw
        self.names = names  # Numbers for names, in common with the classes inside.
        self.depth = depth
        self.module = nn.Module()
        self.namespace: dict = {}
        exec(PRELUDE, self.namespace)
        self.namespace["self"] = self.module
        self.arguments = [f"x{number}" for number in range(len(tensors))]
        self.namespace |= zip(self.arguments, tensors, strict=True)
        self.values = list(self.arguments)
        self.init: list[str] = []
        self.forward: list[str] = []
        self.classes: list[Class] = []
        self.layers: list[str] = []
        self.calls: dict[str, str] = {}
        """The expression of each layer, and the value that it was first called with."""

    def choose(self, options):
        return self.draw(st.sampled_from(list(options)))

    def chance(self, one_in: int) -> bool:
        return self.choose(range(one_in)) == one_in - 1

    def name(self, prefix: str) -> str:
        return f"{prefix}{next(self.names)}"

    def tensor(self, value: str) -> Tensor:
        return self.namespace[value]

    def runs(self, line: str) -> bool:
        before = dict(self.namespace)
        try:
            exec(line, self.namespace)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            self.namespace |= before
            return False
        return True

    def prepare(self, line: str) -> bool:
        """Adds a line to `__init__`, if it runs."""
        if not self.runs(line):
            return False
        self.module.double()
        self.init.append(line)
        return True

    def do(self, line: str, *results: str) -> bool:
        """Adds lines to `forward`, if they run and their results are small."""
        if not self.runs(line):
            return False
        made = [self.namespace[name] for name in results]
        if not all(isinstance(value, Tensor) and 0 < value.numel() < 2000 for value in made):
            return False
        self.forward.append(line)
        self.values += [name for name in results if name not in self.values]
        return True

    def value(self) -> str:
        """Any value; the latest ones more often."""
        return self.choose([*self.values, *self.values[-3:]])

    def floats(self) -> list[str]:
        return [value for value in self.values if self.tensor(value).is_floating_point()]

    def made(self, name: str, signature: str) -> Class:
        return Class(name, signature, tuple(self.init), tuple(self.forward))


# Layers.

DEFAULTS = {
    "bias": True,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "output_padding": 0,
    "padding_mode": "zeros",
    "padding_idx": None,
    "max_norm": None,
    "sparse": False,
    "scale_grad_by_freq": False,
}

CONVOLUTIONS = {
    3: ("Conv1d", "ConvTranspose1d"),
    4: ("Conv2d", "ConvTranspose2d"),
    5: ("Conv3d", "ConvTranspose3d"),
}


def kinds(tensor: Tensor) -> list[str]:
    """The kinds of layer that read such a tensor."""
    if not tensor.is_floating_point():
        return ["Embedding"]
    if tensor.dim() < 2:
        return []
    convolutions = CONVOLUTIONS.get(tensor.dim(), ())
    return [*convolutions[:1], "Linear", *convolutions]


def usual_or(draft: Draft, usual, *others):
    """The usual setting, more often than not."""
    return draft.choose([usual, usual, usual, *others])


def settings_of(draft: Draft, kind: str, channels: int) -> dict:
    """Settings that say something; what is left out has its default."""
    if kind == "Linear":
        return {"bias": usual_or(draft, True, False)}
    if kind == "Embedding":
        return {
            "padding_idx": usual_or(draft, None, 0, ROWS - 1),
            "max_norm": usual_or(draft, None, None, None, 0.5),
            "sparse": usual_or(draft, False, False, False, True),
            "scale_grad_by_freq": usual_or(draft, False, False, False, True),
        }
    groups = [n for n in (2, 4) if channels % n == 0]
    settings = {
        "kernel_size": draft.choose([1, 3, 2, 3, 1]),
        "stride": usual_or(draft, 1, 2),
        "padding": usual_or(draft, 0, 1, 1),
        "dilation": usual_or(draft, 1, 1, 2),
        "groups": usual_or(draft, 1, 1, 1, *groups[:1]),
        "bias": usual_or(draft, True, False),
    }
    if "Transpose" in kind:
        settings["output_padding"] = usual_or(draft, 0, 0, 1)
    else:
        settings["padding_mode"] = usual_or(draft, "zeros", "reflect", "replicate", "circular")
        if settings["stride"] == 1:
            settings["padding"] = usual_or(draft, settings["padding"], "same")
    return settings


def layer_source(kind: str, reads: int, width: int, settings: dict) -> str:
    text = "".join(
        f", {key}={value!r}" for key, value in settings.items() if DEFAULTS.get(key) != value
    )
    return f"nn.{kind}({reads}, {width}{text})"


def sibling_sources(draft: Draft, kind: str, tensor: Tensor, count: int) -> list[str]:
    """Layers that read such a tensor; most of the time they could be one."""
    reads = ROWS if kind == "Embedding" else tensor.shape[-1 if kind == "Linear" else 1]
    settings = settings_of(draft, kind, reads)
    groups = settings.get("groups", 1)
    width = draft.choose([3, 4, 2]) * groups
    sources = []
    for _ in range(count):
        own = settings_of(draft, kind, reads) if draft.chance(8) else settings
        wide = draft.choose([width, width, width + groups, max(width - groups, groups)])
        wide -= wide % own.get("groups", 1)
        sources.append(layer_source(kind, reads, max(wide, own.get("groups", 1)), own))
    return sources


PLACES = ("attributes", "list", "dict", "sequentials", "parallel", "loop")


def siblings(draft: Draft) -> None:
    """Two to four layers that read one value."""
    value = draft.value()
    found = kinds(draft.tensor(value))
    if not found:
        return
    kind = draft.choose(found)
    sources = sibling_sources(draft, kind, draft.tensor(value), draft.choose([2, 2, 2, 3, 4]))
    place = draft.choose(PLACES)
    if place in ("parallel", "loop"):
        called_together(draft, place, sources, value)
        return
    for layer in placed(draft, place, sources):
        call(draft, layer, value)
        if draft.chance(6):
            draft.choose(INTERJECTIONS)(draft, value)


def placed(draft: Draft, place: str, sources: list[str]) -> list[str]:
    """Puts layers on the module; gives the expressions that call them."""
    name = draft.name("l")
    if place == "list":
        draft.prepare(f"self.{name} = nn.ModuleList([{', '.join(sources)}])")
        callers = [f"self.{name}[{i}]" for i in range(len(sources))]
        layers = callers
    elif place == "dict":
        items = ", ".join(f'"k{i}": {source}' for i, source in enumerate(sources))
        draft.prepare(f"self.{name} = nn.ModuleDict({{{items}}})")
        callers = [f'self.{name}["k{i}"]' for i in range(len(sources))]
        layers = callers
    elif place == "sequentials":
        after = draft.choose(["nn.ReLU()", "nn.ReLU(inplace=True)", "nn.Tanh()", "nn.Dropout(0.5)"])
        callers = [f"self.{name}_{i}" for i in range(len(sources))]
        for caller, source in zip(callers, sources, strict=True):
            draft.prepare(f"{caller} = nn.Sequential({source}, {after})")
        layers = [f"{caller}[0]" for caller in callers]
    else:
        callers = [f"self.{name}_{i}" for i in range(len(sources))]
        for caller, source in zip(callers, sources, strict=True):
            draft.prepare(f"{caller} = {source}")
        layers = callers
    draft.layers += [layer for layer in layers if draft.runs(layer)]
    return [caller for caller in callers if draft.runs(caller)]


def called_together(draft: Draft, place: str, sources: list[str], value: str) -> None:
    name = draft.name("l")
    container = {"parallel": "Parallel({})", "loop": "nn.ModuleList([{}])"}[place]
    if not draft.prepare(f"self.{name} = {container.format(', '.join(sources))}"):
        return
    results = [draft.name("v") for _ in sources]
    called = f"self.{name}({value})"
    if place == "loop":
        called = f"[layer({value}) for layer in self.{name}]"
    if draft.do(f"{', '.join(results)} = {called}", *results):
        draft.layers += [f"self.{name}[{i}]" for i in range(len(sources))]


CALLS = (
    "{result} = {layer}({value})",
    "{result} = {layer}({value})",
    "{result} = {layer}({value})",
    "{result} = {layer}({value})",
    "{result} = {layer}({value})",
    "{result} = {layer}({value})",
    "with torch.no_grad():\n    {result} = {layer}({value})",
    "{result} = checkpoint({layer}, {value}, use_reentrant=False)",
    "{result} = checkpoint({layer}, {value}, use_reentrant=True)",
    "{result} = {layer}(input={value})",
    "{result} = {layer}({value}.detach())",
)


def call(draft: Draft, layer: str, value: str) -> None:
    result = draft.name("v")
    line = draft.choose(CALLS).format(result=result, layer=layer, value=value)
    if draft.do(line, result):
        draft.calls.setdefault(layer, value)


def again(draft: Draft) -> None:
    """A layer that was called before, on a value that it may or may not have read."""
    if draft.calls:
        layer = draft.choose(draft.calls)
        call(draft, layer, draft.choose([draft.calls[layer], draft.value()]))


# What is done to values. In each line `v` stands for a value, `w` for another or the same, and
# `r` for the result.

CHANGES = (
    "{v}.relu_()",
    "{v}.mul_(0.5)",
    "{v}.add_({w})",
    "{v} += 1.0",
    "{v}[:, :1] = 0",
    "{v}[0] = 0.25",
    "F.relu({v}, inplace=True)",
    "F.dropout({v}, 0.5, self.training, inplace=True)",
    "torch.tanh_({v})",
    "{v}.transpose(0, 1).mul_(0.5)",
    "{v}.view(-1).mul_(0.5)",
    "{v}.view({v}.shape)[:1].zero_()",
    "{v}.detach().mul_(0.5)",
    "{v}.copy_({w})",
    "{v}.unsqueeze_(1)",
    "{v}.fill_diagonal_(0.5)",
    "{v}.masked_fill_({v} > 0, 0.1)",
    "with torch.no_grad():\n    {v}.mul_(0.5)",
    "with torch.no_grad():\n    torch.mul({v}, 0.5, out={v})",
    "{v}.data.mul_(0.5)",
    "for part in {v}.unbind(1):\n    part.detach().mul_(0.5)",
)

OPERATIONS = (
    "{r} = {v}.relu()",
    "{r} = torch.tanh({v})",
    "{r} = {v} * 2",
    "{r} = {v} + {w}",
    "{r} = {v} * {w}",
    "{r} = torch.cat([{v}, {w}], 1)",
    "{r} = torch.stack([{v}, {w}]).sum(0)",
    "{r} = scaled({v})",
    "{r} = F.dropout({v}, 0.5, self.training)",
    "{r} = F.dropout({v}, 0.25)",
    "{r} = {v} + torch.randn_like({v})",
    "{r} = {v} + torch.randn(1, dtype={v}.dtype)",
    "{r} = {v} * (2 - self.training)",
    "{r} = {v}.view({v}.shape[0], -1)",
    "{r} = {v}.view(-1)",
    "{r} = {v}.view(-1, {v}.shape[-1])",
    "{r} = {v}.view({v}.shape)",
    "{r} = {v}.view_as({w})",
    "{r} = {v}.reshape(-1)",
    "{r} = {v}.reshape({v}.size(0), -1)",
    "{r} = {v}.flatten(1)",
    "{r} = torch.flatten({v}, 0, 1)",
    "{r} = {v}.contiguous()",
    "{r} = {v}.transpose(1, -1)",
    "{r} = {v}.transpose(0, 1)",
    "{r} = {v}.mT",
    "{r} = {v}.movedim(1, -1)",
    "{r} = {v}.unsqueeze(1)",
    "{r} = {v}.squeeze()",
    "{r} = {v}.unflatten(1, (-1, 1))",
    "{r} = {v}.chunk(2, 1)[0]",
    "{r} = {v}.split(1, 1)[-1]",
    "{r} = {v}.unbind(1)[0]",
    "{r} = {v}[:, :1]",
    "{r} = {v}[..., ::2]",
    "{r} = {v}.expand(2, *{v}.shape)",
    "{r} = {v}.as_strided({v}.shape[:1], (1,))",
    "{r} = {v} * {v}.stride(0)",
    "{r} = {v} * (2 if {v}.is_contiguous() else 3)",
    "{r} = {v} if {v}.shape[0] > 1 else {v} * 2",
    "{r} = {v} if {v}.sum() > 0 else -{v}",
    "if self.training:\n    {r} = {v} * 2\nelse:\n    {r} = {v}",
    "with torch.no_grad():\n    {r} = {v} * 2",
    "{r} = {v}.detach()",
    "{r} = ({v} * 2).detach_()",
    "{r} = {v}.clone().relu_()",
    "{r} = {v}.mean(-1, keepdim=True)",
    "{r} = {v}.softmax(-1)",
    "{r} = {v}.to(memory_format=torch.channels_last)",
    "{r} = F.linear({v}, {v}.new_ones(2, {v}.shape[-1]))",
    "{r} = {v}.float().double()",
    "{r} = torch.utils.checkpoint.checkpoint(torch.tanh, {v}, use_reentrant=False)",
    "self.last = {v}.detach().clone()\n{r} = self.last * 2",
)

MODULES = (
    "nn.ReLU()",
    "nn.ReLU(inplace=True)",
    "nn.Dropout(0.5)",
    "nn.Identity()",
    "nn.Flatten()",
    "nn.BatchNorm1d({c})",
    "nn.BatchNorm2d({c})",
    "nn.BatchNorm3d({c})",
    "nn.InstanceNorm1d({c}, affine=True)",
    "nn.LayerNorm({d})",
    "nn.GroupNorm(1, {c})",
    "nn.PReLU()",
    "nn.AdaptiveAvgPool1d(2)",
    "nn.MaxPool2d(2)",
    "nn.Sequential(nn.Identity(), nn.Tanh())",
)

WEIGHTS = (
    "{r} = {layer}.weight.pow(2).sum()",
    "{r} = {layer}.weight.detach().norm()",
    "{r} = {layer}.bias * 2",
    "{r} = {layer}.weight.flatten()",
    "{r} = {v} * {layer}.weight.mean()",
    "{r} = F.linear({v}, {layer}.weight, {layer}.bias)",
    "{r} = sum(p.sum() for p in {layer}.parameters())",
    "{r} = {v} * {layer}.weight.shape[0]",
)

WEIGHT_CHANGES = (
    "with torch.no_grad():\n    {layer}.weight.mul_(0.9)",
    "{layer}.weight.data.mul_(0.9)",
    "{layer}.weight.data = {layer}.weight.data * 0.9",
    "with torch.no_grad():\n    {layer}.bias.zero_()",
)


def change(draft: Draft, value: str = "") -> None:
    """Something in place."""
    value = value or draft.choose(draft.floats() or draft.values)
    draft.do(draft.choose(CHANGES).format(v=value, w=draft.value()))


def operation(draft: Draft, value: str = "") -> None:
    """Something that gives a new value, or a view."""
    result = draft.name("v")
    line = draft.choose(OPERATIONS)
    other = draft.value()
    draft.do(line.format(v=value or draft.value(), w=other, r=result), result)


def module(draft: Draft, value: str = "") -> None:
    """A layer of another kind."""
    value = value or draft.value()
    shape = draft.tensor(value).shape
    name, result = draft.name("m"), draft.name("v")
    if len(shape) > 1:
        source = draft.choose(MODULES).format(c=shape[1], d=shape[-1])
        if draft.prepare(f"self.{name} = {source}"):
            draft.do(f"{result} = self.{name}({value})", result)


def weight(draft: Draft, value: str = "") -> None:
    """A layer's weight, read or changed in forward."""
    if not draft.layers:
        return
    layer, result = draft.choose(draft.layers), draft.name("v")
    if draft.chance(4):
        draft.do(draft.choose(WEIGHT_CHANGES).format(layer=layer))
    else:
        line = draft.choose(WEIGHTS).format(layer=layer, r=result, v=value or draft.value())
        draft.do(line, result)


COUNTERS = (
    ("self.{n} = 0", "self.{n} += 1\n{r} = {v} * self.{n}"),
    (
        'self.register_buffer("{n}", torch.zeros(()))',
        "self.{n} += 1\n{r} = {v} * self.{n}",
    ),
    (
        'self.register_buffer("{n}", torch.ones(()))',
        "self.{n} = self.{n} * 0.5\n{r} = {v} + self.{n}",
    ),
    ("self.{n} = nn.Parameter(torch.ones(()))", "{r} = {v} * self.{n}"),
    ("self.{n} = 0.5", "{r} = {v} * self.{n}"),
    ("self.{n} = []", "self.{n}.append(1)\n{r} = {v} * len(self.{n})"),
)


def counter(draft: Draft, value: str = "") -> None:
    """An attribute that forward reads and may change."""
    name, result = draft.name("n"), draft.name("v")
    prepared, line = draft.choose(COUNTERS)
    value = value or draft.value()
    if draft.prepare(prepared.format(n=name)):
        draft.do(line.format(n=name, r=result, v=value), result)


DECORATIONS = (
    "{layer}.weight = {other}.weight",
    "{layer}.bias = {other}.bias",
    "{layer}.requires_grad_(False)",
    "{layer}.weight.requires_grad_(False)",
    "{layer}.register_forward_hook(doubled)",
    "parametrizations.weight_norm({layer})",
    "parametrizations.orthogonal({layer})",
    "{layer}.bias = None",
    "{layer}.eval()",
    "{layer}.note = 'a plain attribute'",
    "{layer}.weight.note = 'an attribute of the weight'",
    "{layer}.weight.data = {layer}.weight.data.to(memory_format=torch.channels_last)",
    "{layer}.forward = {layer}.forward",
    "self.requires_grad_(False)",
)


def decoration(draft: Draft) -> None:
    """A layer is tied, frozen, hooked or parametrized."""
    if draft.layers:
        layer, other = draft.choose(draft.layers), draft.choose(draft.layers)
        draft.prepare(draft.choose(DECORATIONS).format(layer=layer, other=other))


def alias(draft: Draft) -> None:
    """A layer that stands at a second name, and may be called there."""
    if draft.layers:
        name = f"self.{draft.name('l')}"
        if draft.prepare(f"{name} = {draft.choose(draft.layers)}") and draft.chance(2):
            call(draft, name, draft.value())


BLOCK_CALLS = (
    "{results} = self.{name}({value})",
    "{results} = self.{name}({value})",
    "{results} = checkpoint(self.{name}, {value}, use_reentrant=False)",
    "with torch.no_grad():\n    {results} = self.{name}({value})",
)


def block(draft: Draft) -> None:
    """A module with branches of its own, called once or twice."""
    value = draft.value()
    if draft.depth or not kinds(draft.tensor(value)):
        return
    inner = Draft(draft.draw, (draft.tensor(value),), draft.names, draft.depth + 1)
    fill(inner, draft.choose([1, 2, 3]))
    results = inner.floats()[-3:]
    if not results:
        return
    inner.forward.append(f"return {', '.join(results)}")
    name = draft.name("Block")
    draft.namespace[name] = vars(module_of_block(inner, name))[name]
    if not draft.prepare(f"self.{name.lower()} = {name}()"):
        return
    draft.classes.append(inner.made(name, "x0"))
    for _ in range(draft.choose([1, 1, 2])):
        names = [draft.name("v") for _ in results]
        line = draft.choose(BLOCK_CALLS)
        line = line.format(results=", ".join(names), name=name.lower(), value=value)
        draft.do(line, *names)


def module_of_block(inner: Draft, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(f"{PRELUDE}\n\n{inner.made(name, 'x0').source('straight')}", vars(module))
    return module


INTERJECTIONS = (operation, change, weight, counter)
"""What may stand between the calls of two siblings, and is done to what they read."""

STEPS = (
    *(siblings, siblings, siblings, siblings, operation, operation, operation, operation),
    *(module, module, change, again, decoration, weight, counter, block, alias),
)


def fill(draft: Draft, steps: int) -> None:
    siblings(draft)
    for _ in range(steps):
        draft.choose(STEPS)(draft)


INPUTS = (
    Input((4,)),
    Input((4, 5, 5)),
    Input((3, 4)),
    Input((4, 6)),
    Input((2, 3, 3, 3)),
    Input((3,), integer=True),
    Input((4, 5, 5), layout="channels_last"),
    Input((4, 6), layout="transposed"),
)

RETURNS = ("{all}", "[{all}]", '{{"first": {first}, "others": [{all}]}}', "Pair({first}, ({all},))")


@st.composite
def programs(draw, steps: int = 6) -> Program:
    """Models with branches, of up to `steps` steps after their first siblings."""
    inputs = [draw(st.sampled_from(INPUTS))]
    if draw(st.sampled_from([False, False, False, True])):
        inputs.append(draw(st.sampled_from([inputs[0], *INPUTS])))
    with quiet():
        tensors = tuple(argument(input) for input in inputs)
        draft = Draft(draw, tensors, itertools.count())
        signature, keywords = options(draft)
        fill(draft, draw(st.integers(0, steps)))
        outputs = draft.floats() or draft.values
    form = draft.choose(RETURNS)
    draft.forward.append(f"return {form.format(all=', '.join(outputs), first=outputs[0])}")
    draft.init.append("self.double()")
    first, *others = draw(st.sampled_from([(2,), (2, 3), (2, 1), (3, 1), (4, 2, 1)]))
    return Program(
        (*draft.classes, draft.made("Model", ", ".join([*draft.arguments, *signature]))),
        tuple(inputs),
        (first, *others),
        keywords,
    )


def options(draft: Draft) -> tuple[list[str], tuple[tuple[str, float], ...]]:
    """Arguments with a default, which some calls give."""
    if not draft.chance(5):
        return [], ()
    default = draft.choose(["1.0", "None"])
    draft.namespace["scale"] = None if default == "None" else 1.0
    line = "{r} = {v} * scale" if default == "1.0" else "{r} = {v} if scale is None else {v} * 3"
    result = draft.name("v")
    draft.do(line.format(r=result, v="x0"), result)
    return [f"scale={default}"], (("scale", 0.5),)


def argument(input: Input) -> Tensor:
    """An input for the lines to run on: no leaf, as in the tests."""
    value = input.tensor(2)
    return value if input.integer else value.requires_grad_().clone()


@contextlib.contextmanager
def quiet():
    """New random numbers each time would change nothing but the tests' own stream."""
    import warnings

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
