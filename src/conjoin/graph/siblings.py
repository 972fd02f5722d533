"""Siblings: layers that read the same tensor, and which of them may be merged.

Layers of one kind are connected where they read the same tensor. Among connected layers those are
siblings that make exactly the same calls: the same tensors in the same state, equally often.
Siblings may be merged where the kind says that they are legal and all that must be equal is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from conjoin.graph.overlaps import overlaps
from conjoin.graph.site import Sightings, Site
from conjoin.layers import Kind, kind_of
from conjoin.layers.checks import Verdict, tensors
from conjoin.layers.equal import OF_BIAS, but_bias, common, may_lack_bias
from conjoin.layers.view import View, wides
from conjoin.layers.wide import Wide
from conjoin.legality import Reason, Refusal
from conjoin.policy.figures import Cut, Figures

DIFFERENCE = {
    "dtype": Reason.DIFFERENT_DTYPE,
    "device": Reason.DIFFERENT_DEVICE,
    "requires_grad": Reason.DIFFERENT_REQUIRES_GRAD,
    "bias": Reason.BIAS_ON_SOME,
    "attributes": Reason.CUSTOM_PARAMETER,
    "_bias": Reason.CUSTOM_PARAMETER,
}
"""The reason where siblings differ in this; any other difference is one of settings."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Layers that read the same tensor: a group that may be merged, or a refusal.

    Attributes:
        kind: the kind of all the layers.
        layers: their qualified names, in the order of their first calls.
        widths: their numbers of output channels.
        refusal: why they stay apart; None where they may be merged.
        contiguous: the positions of the layers whose output must be contiguous.
        activations: the names of the activations behind which the layers are hidden: each layer
            reads the output of its own, and they are equal.
        figures: what the layers take by themselves and merged, where that decided.
        note: what else there is to say of it.
        lockstep: what they take where no forward is rewritten to run them, if they are to stay
            apart there; None where they may be merged.
        cut: what they take where one is, and what they give is cut again at once; likewise.
    """

    kind: Kind
    layers: tuple[str, ...]
    widths: tuple[int, ...]
    refusal: Refusal | None = None
    contiguous: frozenset[int] = frozenset()
    activations: tuple[str, ...] = ()
    figures: Figures | None = None
    note: str = ""
    lockstep: Figures | None = None
    cut: Cut | None = None


def candidates(
    model: nn.Module, sightings: Sightings, kinds: tuple[Kind, ...]
) -> tuple[Candidate, ...]:
    """Every set of two or more like layers that read the same tensor, each layer once.

    Args:
        model: the model, without wide layers.
        sightings: what was seen of it.
        kinds: the kinds of layer to look for.

    Returns:
        The candidates, in the order of their first calls.
    """
    modules = dict(model.named_modules())
    found = list(among(modules, overlaps(modules), sightings, kinds))
    found += _unseen(model, {name for candidate in found for name in candidate.layers})
    return in_order(found, model, sightings)


def among(
    modules: Mapping[str, nn.Module],
    shared: Mapping[str, str],
    sightings: Sightings,
    kinds: tuple[Kind, ...],
) -> Iterator[Candidate]:
    """The candidates among the layers that were seen, without those merged earlier and not called.

    Args:
        modules: the layers, by name.
        shared: the tensors, by name, that share memory, and with which.
        sightings: what was seen of them.
        kinds: the kinds of layer to look for.
    """
    sites: dict[str, list[Site]] = {}
    for site in sightings.sites:
        sites.setdefault(site.layer, []).append(site)
    for calls in _connected(modules, sightings.sites, kinds):
        kind = kind_of(modules[next(iter(calls))], kinds)
        assert kind is not None  # _connected looked it up
        layers = {name: modules[name] for name in calls}
        for names, refusal in _resolve(kind, layers, calls, shared, sightings):
            widths = tuple(_width(kind, modules[name]) for name in names)
            strided = frozenset(i for i, name in enumerate(names) if name in sightings.strided)
            behind = activations(site for name in names for site in sites[name])
            yield Candidate(kind, names, widths, refusal, strided, behind)


def in_order(
    found: Iterable[Candidate], model: nn.Module, sightings: Sightings
) -> tuple[Candidate, ...]:
    """Candidates in the order of their first calls, and of the model where those are not known."""
    first = {site.layer: order for order, site in reversed(list(enumerate(sightings.sites)))}
    place = {name: order for order, (name, _) in enumerate(model.named_modules())}

    def key(candidate: Candidate) -> tuple[int, int]:
        calls = min(first.get(name, len(sightings.sites)) for name in candidate.layers)
        # A product that is not made a layer is where its owner is.
        at = (place.get(name, place.get(name.rpartition(".")[0], 0)) for name in candidate.layers)
        return calls, min(at)

    return tuple(sorted(found, key=key))


def activations(sites: Iterable[Site]) -> tuple[str, ...]:
    """The activations behind which siblings are hidden; none where they read the same object.

    Args:
        sites: the calls of the siblings.
    """
    read: dict[Hashable, list[Site]] = {}
    for site in sites:
        read.setdefault(site.input, []).append(site)
    return tuple(
        dict.fromkeys(
            name
            for together in read.values()
            if len({site.object for site in together}) > 1
            for site in together
            for name in site.activations
        )
    )


def _unseen(model: nn.Module, seen: set[str]) -> Iterator[Candidate]:
    """The groups that were merged earlier and are not called in what was seen of the model."""
    for candidate in merged_in(model).values():
        if not seen.intersection(candidate.layers) and len(candidate.layers) > 1:
            yield candidate


def merged_in(model: nn.Module) -> dict[Wide, Candidate]:
    """The groups that are merged in a model, by wide layer."""
    return {
        wide: Candidate(
            kind=wide.kind,
            layers=tuple(name for name, _ in members),
            widths=tuple(wide.kind.outputs(wide)),
            contiguous=wide.contiguous,
        )
        for wide, members in wides(model).items()
    }


Calls = tuple[tuple[Hashable, Hashable, Hashable], ...]
"""The input, version and modes of each call of a layer."""


def _connected(
    modules: Mapping[str, nn.Module], sites: Iterable[Site], kinds: tuple[Kind, ...]
) -> Iterator[dict[str, Calls]]:
    """Sets of two or more layers of one kind that are connected by tensors that they read."""
    calls: dict[str, list[tuple[Hashable, Hashable, Hashable]]] = {}
    for site in sites:
        calls.setdefault(site.layer, []).append((site.input, site.version, site.modes))
    readers: dict[tuple[Kind | None, Hashable], list[str]] = {}
    for name, made in calls.items():
        kind = kind_of(modules[name], kinds)
        for tensor in dict.fromkeys(input for input, _, _ in made):
            readers.setdefault((kind, tensor), []).append(name)
    leader = {name: name for name in calls}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for names in readers.values():
        for name in names[1:]:
            leader[find(name)] = find(names[0])
    sets: dict[str, list[str]] = {}
    for name in calls:
        sets.setdefault(find(name), []).append(name)
    for names in sets.values():
        if len(names) > 1:
            yield {name: tuple(calls[name]) for name in names}


def _resolve(
    kind: Kind,
    layers: dict[str, nn.Module],
    calls: dict[str, Calls],
    shared: Mapping[str, str],
    sightings: Sightings,
) -> Iterator[tuple[tuple[str, ...], Refusal | None]]:
    """Splits connected layers into groups that are or may be merged and refusals."""
    verdicts: dict[str, Verdict | None] = {
        name: None
        if isinstance(layer, View)
        else kind.check(layer)
        or held_elsewhere(name, layer, shared)
        or _touched(name, layers, sightings)
        for name, layer in layers.items()
    }
    keys = {
        name: common(kind, layers[name], _parameters(layers[name]))
        for name in layers
        if verdicts[name] is None
    }
    groups: list[list[str]] = []
    for together in _equal({name: _counted(calls[name]) for name in keys}):
        groups += _alike(kind, {name: keys[name] for name in together})
    for group in groups:
        if len(group) > 1:
            yield _paying(kind, group, layers, sightings)
    reference = max(groups, key=len, default=[""])[0]
    for group in groups:
        if len(group) == 1 and group[0] != reference:
            name = group[0]
            verdicts[name] = _apart(name, reference, calls) or _difference(name, reference, keys)
    merged = {name for group in groups if len(group) > 1 for name in group}
    yield from _refusals([name for name in layers if name not in merged], verdicts)


def _paying(
    kind: Kind, group: Sequence[str], layers: Mapping[str, nn.Module], sightings: Sightings
) -> tuple[tuple[str, ...], Refusal | None]:
    """A group, and its refusal where merging it, which was not done yet, gains nothing."""
    if any(isinstance(layers[name], View) for name in group):
        return tuple(group), None
    copies = sum(name in sightings.strided for name in group)
    read = sightings.shapes.get(group[0])
    shape = None if read is None else read.input
    why = kind.check_together([layers[name] for name in group], copies, shape)
    return tuple(group), None if why is None else Refusal(tuple(group), *why)


def _alike(kind: Kind, keys: dict[str, dict[str, object]]) -> Iterator[list[str]]:
    """The names, grouped by what must be equal.

    A bias need not be on all of them, where merging saves more than laying out the bias costs.
    """
    for names in _equal({name: but_bias(key) for name, key in keys.items()}):
        launches = 2 if kind.weight_dim == 0 else 3  # The layer, its bias laid out, weights joined.
        alike = kind.bias_on_some and may_lack_bias([keys[name] for name in names])
        if alike and len(names) > launches:
            yield names
        else:
            yield from _equal({name: tuple(keys[name].items()) for name in names})


def _parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The Parameters that hold a layer's weight and bias, its own or the wide layer's."""
    if not isinstance(layer, View):
        return tensors(layer)
    wide, index = layer.wide_layer, layer.conjoin_index
    return {name: t for name, t in tensors(wide).items() if wide.holds(name, index)}


def _refusals(
    names: Sequence[str], verdicts: dict[str, Verdict | None]
) -> Iterator[tuple[tuple[str, ...], Refusal]]:
    """One refusal for each reason; a layer that only lacks a partner goes with the first."""
    first = next((name for name in names if verdicts[name] is not None), None)
    by_reason: dict[Reason, list[str]] = {}
    for name in names:
        verdict = verdicts[name] or verdicts[first or name]
        if verdict is not None:
            by_reason.setdefault(verdict[0], []).append(name)
    for reason, refused in by_reason.items():
        details = [f"{n}: {v[1]}" for n in refused if (v := verdicts[n]) is not None]
        yield tuple(refused), Refusal(tuple(refused), reason, "; ".join(dict.fromkeys(details)))


def _equal(values: dict[str, Hashable]) -> list[list[str]]:
    """The names, grouped by equal values."""
    groups: dict[Hashable, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(value, []).append(name)
    return list(groups.values())


def _counted(calls: Iterable[Hashable]) -> Hashable:
    """The calls in any order, each as often as it is made."""
    return frozenset(Counter(calls).items())


def _apart(name: str, other: str, calls: dict[str, Calls]) -> Verdict | None:
    """Why two layers' calls do not go together; None where they do."""
    mine, theirs = calls[name], calls[other]
    if _counted(mine) == _counted(theirs):
        return None
    if _counted(call[0] for call in mine) != _counted(call[0] for call in theirs):
        counts = _inputs(mine), _inputs(theirs)
        if counts[0] == counts[1]:
            return Reason.CALLED_APART, f"it reads tensors that {other} does not"
        return Reason.CALLED_APART, f"it reads {counts[0]}, and {other} {counts[1]}"
    if _counted(call[:2] for call in mine) != _counted(call[:2] for call in theirs):
        return Reason.INPUT_MUTATED, f"what {other} reads has other values by then"
    return Reason.CALLED_APART, f"it runs with gradients or autocast set otherwise than {other}"


def _inputs(calls: Calls) -> str:
    """How many tensors are read in how many calls, in the first run that has any."""
    run = _run(calls[0][0])
    inputs = [input for input, _, _ in calls if _run(input) == run]
    count = len(set(inputs))
    tensors = "1 tensor" if count == 1 else f"{count} tensors"
    return f"{tensors} in 1 call" if len(inputs) == 1 else f"{tensors} in {len(inputs)} calls"


def _run(input: Hashable) -> Hashable:
    return input[:-1] if isinstance(input, tuple) else None


def _difference(name: str, other: str, keys: dict[str, dict[str, object]]) -> Verdict:
    """What must be equal and is not."""
    mine, theirs = keys[name], keys[other]
    differing = [key for key in mine if key in theirs and mine[key] != theirs[key]]
    # The bias last, since it is the least that keeps them apart.
    differing.sort(key=lambda key: OF_BIAS.index(key) + 1 if key in OF_BIAS else 0)
    reason = DIFFERENCE.get(differing[0], Reason.DIFFERENT_SETTINGS)
    if reason is Reason.CUSTOM_PARAMETER:
        return reason, f"its parameters carry other attributes than those of {other}"
    shown = [key for key in differing if not key.startswith("_") and key != "attributes"]
    shown = shown or differing
    return reason, ", ".join(f"{key}={mine[key]} where {other} has {theirs[key]}" for key in shown)


def _width(kind: Kind, layer: nn.Module) -> int:
    if isinstance(layer, View):
        return layer.wide_layer.widths[layer.conjoin_index]
    weight = layer._parameters.get("weight")
    if weight is None or nn.parameter.is_lazy(weight):
        return 0
    return weight.shape[kind.weight_dim]


def held_elsewhere(name: str, layer: nn.Module, shared: Mapping[str, str]) -> Verdict | None:
    """That a layer's weight or bias shares its memory; None where it does not."""
    for key in tensors(layer):
        if other := shared.get(f"{name}.{key}".lstrip(".")):
            return Reason.SHARED_PARAMETER, f"{key} shares its memory with {other}"
    return None


def _touched(name: str, siblings: Iterable[str], sightings: Sightings) -> Verdict | None:
    """Why the model's own code keeps a layer apart: it changes, reads or lists its parameters."""
    if name in sightings.changed:
        return Reason.PARAMETERS_CHANGED, "in the run on the example inputs"
    if name in sightings.read:
        return Reason.PARAMETERS_READ, "beside the product"
    for root in sightings.listed.get(name, ()):
        if any(other != name and _is_within(other, root) for other in siblings):
            return Reason.PARAMETERS_LISTED, f"those of {root or 'the model'}"
    return None


def _is_within(name: str, root: str) -> bool:
    return not root or name.startswith(f"{root}.")
