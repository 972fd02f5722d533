"""What the layers of a group have to do, as an estimate and a race need it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from conjoin.graph.siblings import Candidate
from conjoin.graph.site import Shapes, Sightings
from conjoin.layers import Kind
from conjoin.layers.checks import tensors
from conjoin.layers.equal import common
from conjoin.layers.view import View
from conjoin.policy.cost import Setting, Work


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Layers that may be merged, and what was seen of their calls.

    Attributes:
        kind: their kind.
        names: their qualified names.
        layers: the layers.
        shapes: what each read and gave.
        contiguous: the positions of those whose output must be contiguous.
        training: whether a backward pass is to be quick too.
    """

    kind: Kind
    names: tuple[str, ...]
    layers: tuple[nn.Module, ...]
    shapes: tuple[Shapes, ...]
    contiguous: frozenset[int]
    training: bool

    @property
    def weight(self) -> Tensor:
        """The weight of one of them; it is on the device of all, and of their dtype."""
        return tensors(self.layers[0])["weight"]

    def works(self) -> list[Work]:
        """What each layer does."""
        return [self._work(position) for position in range(len(self.layers))]

    def _work(self, position: int) -> Work:
        shapes, held = self.shapes[position], tensors(self.layers[position])
        weight, size = held["weight"], held["weight"].element_size()
        outputs, width = math.prod(shapes.output), weight.shape[self.kind.weight_dim]
        looked_up = _is_index(shapes.dtype)
        input = math.prod(shapes.input) * shapes.dtype.itemsize
        return Work(
            input=input,
            output=outputs * size,
            weight=weight.numel() * size,
            read=(outputs if looked_up else weight.numel()) * size,
            operations=0 if looked_up else 2 * outputs * weight.numel() // max(width, 1),
            biased="bias" in held,
            contiguous=position in self.contiguous,
            rows=outputs // max(width, 1) if weight.dim() == 2 and not looked_up else 0,
            image=input if self.kind.convolves(self.layers[position]) else 0,
        )

    def setting(self, *, cut: bool = True, lockstep: bool = False) -> Setting:
        """What their calls have in common; `cut` and `lockstep` as in `Setting`."""
        widths = [tensors(layer)["weight"].shape[self.kind.weight_dim] for layer in self.layers]
        passed_on = any(shapes.passed_on for shapes in self.shapes)
        joined = self.kind.joins(widths)
        one_by_one = self.kind.reads_one_by_one(widths, training=self.training)
        return Setting(
            training=self.training,
            passed_on=passed_on,
            joined=joined,
            one_by_one=one_by_one,
            cut=cut,
            stacked=bool(self.kind.stacked),
            lockstep=lockstep,
            extra=self.kind.extra(self.layers),
        )

    def example(self) -> Tensor:
        """Something that the layers can be called with."""
        shapes = self.shapes[0]
        value = 0 if _is_index(shapes.dtype) else 0.5
        example = torch.full(shapes.input, value, dtype=shapes.dtype, device=self.weight.device)
        return example.requires_grad_(self.training and shapes.passed_on)

    def key(self) -> Hashable:
        """What is equal for groups that take the same time."""
        keys = [common(self.kind, layer, tensors(layer)) for layer in self.layers]
        settings = tuple(tuple(key.items()) for key in keys)
        return self.kind, settings, self.shapes, tuple(self.works()), self.training


def trains(model: nn.Module) -> bool:
    """Whether a step of training is to be quick, or forward only."""
    return model.training and torch.is_grad_enabled()


def workload_of(
    candidate: Candidate, layers: tuple[nn.Module, ...], sightings: Sightings, training: bool
) -> Workload | None:
    """A candidate's workload; None where its layers were not run, or are not real."""
    if not all(name in sightings.shapes for name in candidate.layers):
        return None
    if any(isinstance(layer, View) for layer in layers):  # Something has changed since.
        return None
    held = [tensor for layer in layers for tensor in tensors(layer).values()]
    if any(isinstance(tensor, FakeTensor) or tensor.is_meta for tensor in held):
        return None
    training = training and any(tensor.requires_grad for tensor in held)
    shapes = tuple(sightings.shapes[name] for name in candidate.layers)
    contiguous = candidate.contiguous
    return Workload(candidate.kind, candidate.layers, layers, shapes, contiguous, training)


def _is_index(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)
