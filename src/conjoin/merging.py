"""`Merger`: tells which layers may be merged while graphs are rewritten, and merges them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence

from torch import fx, nn

from conjoin.graph import edit, products
from conjoin.graph.overlaps import overlaps
from conjoin.graph.products import ProductCall, RawProduct
from conjoin.graph.siblings import Candidate, among, held_elsewhere
from conjoin.graph.site import Shapes, Sightings, Site
from conjoin.layers import (
    GATHERED,
    KINDS,
    NORMS,
    PRODUCTS,
    Kind,
    activation,
    kind_of,
)
from conjoin.layers.checks import TENSORS, tensors
from conjoin.layers.equal import common, may_lack_bias
from conjoin.layers.fusing import fuse
from conjoin.layers.owner import Owner, lend, reclaim
from conjoin.layers.releasing import release
from conjoin.layers.view import View, are_merged, wide_of, wides
from conjoin.layers.walking import walk
from conjoin.layers.wide import Wide
from conjoin.legality import Reason, Refusal
from conjoin.policy.cost import Layout
from conjoin.policy.levels import LevelPolicy
from conjoin.policy.workload import trains
from conjoin.reachable import functions_of, words

MERGER = "conjoin_merger"
"""The entry of a GraphModule's `meta` that holds the merger of the model behind it."""

REGION = "conjoin_region"
"""The entry that holds the module of the model whose forward a GraphModule was traced from."""

OF_SIBLINGS = frozenset(
    {
        *(Reason.DIFFERENT_SETTINGS, Reason.DIFFERENT_DTYPE, Reason.DIFFERENT_DEVICE),
        *(Reason.DIFFERENT_REQUIRES_GRAD, Reason.BIAS_ON_SOME, Reason.GROUPED),
        *(Reason.CALLED_APART, Reason.INPUT_MUTATED, Reason.DOES_NOT_PAY),
    }
)
"""The reasons that concern layers on one tensor, and not each of them by itself."""

REGISTERED = frozenset({"_parameters", "_modules"})
"""Attributes of modules in which raw Parameters that are merged are not found, but products are."""


class Merger:
    """Merges layers of one model.

    Attributes:
        kinds: the kinds of layer that siblings are looked for in.
        levels: what it has merged beyond the siblings that were found at first, such as layers on
            branches that go on alike.
        refused: what was found in graphs and stays as it is, and why: products that read one
            tensor, and layers that it does not pay to run at once.
        rewritten: what is called with each graph when all passes are through with it, if anything.
        frozen: whether it merges nothing, and only knows what is merged.
        training: whether a backward pass is to be quick too.
    """

    def __init__(
        self,
        model: nn.Module,
        kinds: tuple[Kind, ...] = KINDS,
        sightings: Sightings | None = None,
        found: Iterable[Candidate] = (),
        *,
        frozen: bool = False,
        escapes: bool = True,
        level_policy: LevelPolicy | None = None,
    ) -> None:
        """Looks at the model's parameters once.

        Args:
            model: the model.
            kinds: the kinds of layer.
            sightings: what was seen of it; what its code does with parameters keeps them apart.
            found: its siblings; those that were refused are left alone.
            frozen: merge nothing, and know what is merged.
            escapes: whether something beyond the graphs reads their outputs.
            level_policy: what decides on layers that read tensors of their own; by default one of
                this model.
        """
        self.frozen = frozen
        self._escapes = escapes
        self.kinds = kinds
        self.levels: list[Candidate] = []
        self.refused: dict[frozenset[str], Candidate] = {}
        self.rewritten: Callable[[fx.GraphModule], None] | None = None
        self._model = model
        self.training = trains(model)
        self._ordered: set[str] = set()
        self._look_up()
        self._shared = overlaps(self._modules())
        self._sightings = sightings
        self._level_policy = level_policy or LevelPolicy(model, sightings or Sightings((), {}))
        self._apart: set[str] = set()
        self._unpaired: set[str] = set()
        if sightings is not None:
            self._apart |= {*sightings.changed, *sightings.listed}
        self._leave(found)

    @functools.cached_property
    def lends(self) -> bool:
        """Whether Parameters of the model's own modules may be merged.

        Its forwards must be watched, and no code may look where the Parameters would be missed.
        """
        if self._sightings is None or self.frozen:
            return False
        codes = (function.__code__ for function in functions_of(self._model))
        return not any(REGISTERED.intersection(words(code)) for code in codes)

    def _look_up(self) -> None:
        """Notes the names of the model's modules, and their places among these."""
        self._names = {module: name for name, module in self._model.named_modules()}
        self._positions = {module: position for position, module in enumerate(self._names)}

    def _modules(self) -> dict[str, nn.Module]:
        """The model's modules by their names."""
        return {name: module for module, name in self._names.items()}

    def escapes(self, graph_module: fx.GraphModule) -> bool:
        """Whether the model's own code, beyond a graph, reads the graph's outputs."""
        return self._escapes and graph_module.meta.get(REGION) is not self._model

    def merge_products(self, found: Sequence[RawProduct], sites: Sequence[Site]) -> None:
        """Merges products with Parameters that read one tensor, and notes which stay as they are.

        Args:
            found: the products.
            sites: their calls in one graph.
        """
        assert self._sightings is not None  # `lends` was asked
        # Where a weight is in two kinds of product, the first stands for what cannot be merged.
        layers = {product.name: product.layer for product in reversed(found)}
        shared = {
            f"{product.name}.{tensor}": other
            for product in found
            for tensor, name in product.parameters.items()
            if (other := self._shared.get(product.owned(name)))
        }
        read = frozenset(product.name for product in found if product.read)
        strided = {product.name: "" for product in found if product.strided}
        seen = dataclasses.replace(self._sightings, sites=tuple(sites), read=read, strided=strided)
        by_name = {product.name: product for product in found}
        for candidate in among(layers, shared, seen, PRODUCTS):
            if candidate.refusal is not None:
                self.refused.setdefault(frozenset(candidate.layers), candidate)
                continue
            if not (self._apart | self._unpaired).isdisjoint(candidate.layers):
                continue
            for name in candidate.layers:
                product = by_name[name]
                lend(self._model.get_submodule(product.owner), product.layer, product.parameters)
            self._look_up()
            merged = [layers[name] for name in candidate.layers]
            self._merge(candidate.kind, merged, candidate.contiguous, together=True)
            self.levels.append(Candidate(candidate.kind, candidate.layers, candidate.widths))

    def raw_products(self, graph_module: fx.GraphModule) -> dict[ProductCall, RawProduct]:
        """The products of a graph with Parameters of the model that can be lent, by their calls."""
        kinds, escapes = (*self.kinds, *NORMS), self.escapes(graph_module)
        return products.raw_products(graph_module, self._model, kinds, escapes=escapes)

    def release_products(self, running: Collection[Wide]) -> None:
        """Undoes the merging of products that no rewritten forward runs."""
        owners = [module for _, module in walk(self._model) if isinstance(module, Owner)]
        for wide, members in wides(self._model).items() if owners else ():
            if wide.kind in PRODUCTS and wide not in running:
                names = tuple(name for name, _ in members)
                self.levels = [level for level in self.levels if level.layers != names]
                for _, view in members:
                    release(view)
        for owner in owners:
            reclaim(owner)

    def release_levels(self) -> None:
        """Undoes what it has merged on tensors of their own, as what is behind siblings is."""
        levels = {frozenset(level.layers): level for level in self.levels}
        for wide, members in wides(self._model).items():
            level = levels.get(frozenset(name for name, _ in members))
            if level is not None and not wide.together:
                self.levels.remove(level)
                for _, view in members:
                    release(view)

    def leave(self, found: Iterable[Candidate]) -> None:
        """Leaves layers alone that were refused, and looks up the names of the modules anew."""
        self._leave(found)
        self._look_up()

    def _leave(self, found: Iterable[Candidate]) -> None:
        for candidate in found:
            if candidate.refusal is not None:
                of_siblings = candidate.refusal.reason in OF_SIBLINGS
                (self._unpaired if of_siblings else self._apart).update(candidate.layers)

    def leaves(self, layer: nn.Module | None) -> bool:
        """Whether a layer is left alone, whatever becomes of its siblings."""
        return layer is not None and self._names.get(layer) in self._apart

    def kind_of(self, layer: nn.Module) -> Kind | None:
        """The kind of a layer or a normalization; None where it is of none."""
        return kind_of(layer, (*self.kinds, *NORMS))

    def shared(self, modules: Mapping[str, nn.Module]) -> dict[str, str]:
        """The weights and biases of some layers that share memory, by the names given here."""
        found: dict[str, str] = {}
        for name, module in modules.items():
            for key in TENSORS:
                if other := self._shared.get(f"{self._names.get(module)}.{key}".lstrip(".")):
                    found[f"{name}.{key}"] = other
        return found

    def standing(self, module: nn.Module) -> Hashable:
        """What else decides whether a module may be merged, beside the module itself."""
        name = self._names.get(module)
        shared = tuple(key for key in TENSORS if f"{name}.{key}".lstrip(".") in self._shared)
        seen = None if self._sightings is None else self._sightings.shapes.get(name or "")
        left = name in self._apart, name in self._unpaired
        return name is None, left, shared, seen and seen.input

    def shapes(self, modules: Mapping[str, nn.Module]) -> dict[str, Shapes]:
        """What some layers were seen to read and give, by the names given here."""
        seen = {} if self._sightings is None else self._sightings.shapes
        known = ((name, seen.get(self._names.get(module, ""))) for name, module in modules.items())
        return {name: shapes for name, shapes in known if shapes is not None}

    def merge_all(self, found: Iterable[Candidate]) -> bool:
        """Merges the candidates that may be merged and are not yet; whether there were any."""
        modules = self._modules()
        changed = False
        for candidate in found:
            if candidate.refusal is None:
                layers = [modules[name] for name in candidate.layers]
                if not are_merged(layers):
                    for name in candidate.activations:
                        activation.listen(modules[name])
                    wide = self._merge(candidate.kind, layers, candidate.contiguous, together=True)
                    wide.hidden = bool(candidate.activations)
                    changed = True
        return changed

    def wide(
        self,
        kind: Kind,
        layers: Sequence[nn.Module],
        *,
        together: bool,
        contiguous: frozenset[int] = frozenset(),
        layout: Layout = "beside",
    ) -> Wide | None:
        """The wide layer of these layers, merged now if they may be and are not yet.

        Args:
            kind: their kind.
            layers: the layers, in the order of the parts.
            together: whether they are called on one tensor.
            contiguous: the positions of those whose output must be contiguous.
            layout: how the tensors lie that they are called on, if not on one.

        Returns:
            The wide layer; None where they stay apart.
        """
        if (known := wide_of(layers)) is not None:
            return known
        if self.frozen or not self.may_merge(kind, layers, together=together):
            return None
        names = tuple(self._names[layer] for layer in layers)
        if not together and self._is_against(kind, layers, names, layout):
            return None
        wide = self._merge(kind, layers, contiguous, together=together)
        self.levels.append(Candidate(kind, names, tuple(kind.outputs(wide))))
        return wide

    def _is_against(
        self, kind: Kind, layers: Sequence[nn.Module], names: tuple[str, ...], layout: Layout
    ) -> bool:
        """Whether it does not pay to run layers at once that may be merged; and notes why."""
        widths = tuple(tensors(layer)["weight"].shape[kind.weight_dim] for layer in layers)
        candidate = Candidate(kind, names, widths)
        if kind in GATHERED:
            figures = self._level_policy.against_gathering(kind, layers, names)
        else:
            figures = self._level_policy.against(candidate, layout)
        if figures is not None:
            refusal = Refusal(names, Reason.DOES_NOT_PAY, str(figures))
            found = dataclasses.replace(candidate, refusal=refusal, figures=figures)
            self.refused.setdefault(frozenset(names), found)
        return figures is not None

    def reorder(self, views: Sequence[nn.Module], order: Sequence[int]) -> None:
        """Puts the parts of a wide layer in another order; the first that asks decides.

        Args:
            views: all its views, in the order of the parts.
            order: the positions of the parts, in the order that they are to have.
        """
        wide = wide_of(views)
        if self.frozen or wide is None or wide.identity in self._ordered:
            return
        self._ordered.add(wide.identity)
        if list(order) == sorted(order):
            return
        contiguous = frozenset(new for new, old in enumerate(order) if old in wide.contiguous)
        layers = [views[old] for old in order]
        made = self._merge(wide.kind, layers, contiguous, together=wide.together)
        made.hidden = wide.hidden
        self._ordered.add(made.identity)

    def may_merge(self, kind: Kind, layers: Sequence[nn.Module], *, together: bool) -> bool:
        """Whether layers may become one wide layer."""
        if len(set(layers)) < len(layers) or any(isinstance(layer, View) for layer in layers):
            return False
        if not all(self.is_free(kind, layer) for layer in layers):
            return False
        keys = [common(kind, layer, tensors(layer)) for layer in layers]
        if together and kind.bias_on_some:  # Whether that pays has been looked at.
            return may_lack_bias(keys)
        return all(key == keys[0] for key in keys)

    def is_free(self, kind: Kind, layer: nn.Module) -> bool:
        """Whether a layer that is not merged yet may be, looked at by itself.

        Why it has no siblings is nothing to a kind that is not looked for among those.
        """
        name = self._names.get(layer)
        left = name in self._apart or (kind.siblings and name in self._unpaired)
        if name is None or left or kind.check(layer) is not None:
            return False
        return held_elsewhere(name, layer, self._shared) is None

    def gathers(self, kind: Kind, layers: Sequence[nn.Module]) -> bool:
        """Whether layers on tensors of their own are merged, or launch fewer operations at once."""
        return wide_of(layers) is not None or self._level_policy.gathers(kind, len(layers))

    def _merge(
        self,
        kind: Kind,
        layers: Sequence[nn.Module],
        contiguous: frozenset[int],
        *,
        together: bool,
    ) -> Wide:
        leader = min(range(len(layers)), key=lambda i: self._positions[layers[i]])
        for layer in layers:
            if isinstance(layer, View):
                release(layer)
        enclosing = self._model.get_submodule(common_path([self._names[layer] for layer in layers]))
        wide = fuse(kind, layers, enclosing, contiguous, leader, together=together)
        seen = {} if self._sightings is None else self._sightings.shapes
        # Siblings for which it did not pay in the example have been refused.
        wide.paid = wide.varies and not wide.channels_last and self._names[layers[0]] in seen
        return wide


def merger_of(graph_module: fx.GraphModule) -> Merger:
    """The merger of the model that a graph is of; by default one of the graph's own modules."""
    found = graph_module.meta.get(MERGER)
    if isinstance(found, Merger):
        return found
    return Merger(graph_module, sightings=Sightings((), {}), escapes=False)


def wides_called(graph_module: fx.GraphModule) -> dict[str, Wide]:
    """The wide layers that a graph calls, by target."""
    called = edit.called_modules(graph_module).items()
    return {target: module for target, module in called if isinstance(module, Wide)}


def tell(graph_module: fx.GraphModule) -> None:
    """Tells whoever watches that all passes are through with a graph, which they have changed."""
    watch = merger_of(graph_module).rewritten
    if watch is not None:
        watch(graph_module)


@contextlib.contextmanager
def of_graph(graph_module: fx.GraphModule, merger: Merger | None = None) -> Iterator[None]:
    """Has all passes over a graph use one merger for a while: that one, or one of its own."""
    if isinstance(graph_module.meta.get(MERGER), Merger):
        yield
        return
    graph_module.meta |= {MERGER: merger or merger_of(graph_module), REGION: graph_module}
    try:
        yield
    finally:
        del graph_module.meta[MERGER], graph_module.meta[REGION]


def common_path(names: Sequence[str]) -> str:
    """The name of the smallest module that holds the modules of these names."""
    paths = [name.split(".")[:-1] for name in names]
    shared = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return ".".join(level[0] for level in shared)
