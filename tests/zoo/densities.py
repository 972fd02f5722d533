"""Normalizing flows of several packages."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.specimen import Specimen, named, randn, specimen


class Likelihood(nn.Module):
    """The log-density of a flow of zuko at some points, in a context."""

    def __init__(self, flow: nn.Module) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        return self.flow(context).log_prob(x)


def flow(name: str, *, fuses: bool = False, **settings: Any) -> Specimen:
    """A flow of zuko. Most have masked layers of their own class, with masks that differ."""

    def build() -> nn.Module:
        return Likelihood(named(f"zuko.flows:{name}")(4, 3, hidden_features=(8, 8), **settings))

    return specimen(build, lambda: (randn(4), randn(3)), package="zuko", fuses=fuses)


def splines() -> nn.Module:
    """Coupling layers with rational splines, of normflows."""
    import normflows

    flows = []
    for _ in range(2):
        flows.append(normflows.flows.CoupledRationalQuadraticSpline(4, 1, 8, num_bins=4))
        flows.append(normflows.flows.LULinearPermute(4))
    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(4), flows)


class Coupled(nn.Module):
    """A variational flow of normflows: affine couplings of maps that read the same half."""

    def __init__(self) -> None:
        super().__init__()
        import normflows

        maps = [normflows.nets.MLP([4, 8, 4]) for _ in range(4)]
        masks = [torch.tensor([1.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])]
        self.flows = nn.ModuleList(
            normflows.flows.MaskedAffineFlow(mask, *pair)
            for mask, pair in zip(masks, (maps[:2], maps[2:]), strict=True)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for one in self.flows:
            x, log_det = one(x)
            total = total + log_det
        return x, total


def perceptron(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))


def framed(block: str) -> Any:
    """Blocks of FrEIA in a row; build function."""

    def build() -> nn.Module:
        sequence = named("FrEIA.framework:SequenceINN")(4)
        for _ in range(2):
            sequence.append(named(f"FrEIA.modules:{block}"), subnet_constructor=perceptron)
        return sequence

    return build


MODELS = {
    "flow_spline": flow("NSF", transforms=2, bins=4),
    "flow_autoregressive": flow("MAF", transforms=2),
    "flow_coupling": flow("NICE", transforms=2),
    "flow_gaussian": flow("GF", transforms=2, components=3),
    "flow_neural": flow("NAF", transforms=1, signal=3),
    "flow_splines_coupled": specimen(
        splines, lambda: (randn(4),), package="normflows", fuses=False
    ),
    "flow_affine": specimen(Coupled, lambda: (randn(4),), package="normflows"),
    "flow_glow": specimen(
        framed("GLOWCouplingBlock"), lambda: (randn(4),), package="FrEIA", fuses=False
    ),
    "flow_gin": specimen(
        framed("GINCouplingBlock"), lambda: (randn(4),), package="FrEIA", fuses=False
    ),
    "flow_nice": specimen(
        framed("NICECouplingBlock"), lambda: (randn(4),), package="FrEIA", fuses=False
    ),
    "flow_real_nvp": specimen(framed("RNVPCouplingBlock"), lambda: (randn(4),), package="FrEIA"),
}
