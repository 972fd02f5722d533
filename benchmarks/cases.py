"""What is measured: models, from small ones that wait for launches to large ones that compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.control import ActorCritic, TwinCritics, WideActorCritic, WideTwinCritics
from benchmarks.models.diffusion import TimeProjections, UNet, WideTimeProjections, WideUNet
from benchmarks.models.language import Attention, Gated, WideAttention, WideGated
from benchmarks.models.parts import (
    Grouped,
    Heads,
    Joined,
    Norms,
    Shared,
    Towers,
    WideGrouped,
    WideHeads,
    WideJoined,
    WideNorms,
    WideShared,
    WideTowers,
)
from benchmarks.models.recommenders import (
    DLRM,
    MMoE,
    MultiTask,
    NeuMF,
    WideDLRM,
    WideMMoE,
    WideMultiTask,
    WideNeuMF,
)
from benchmarks.models.vision import (
    VAE,
    Detector,
    GoogLeNet,
    Inception,
    WideDetector,
    WideGoogLeNet,
    WideInception,
    WideVAE,
)

SEED = 0


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and the same model written wide by hand.

    Attributes:
        name: what it is called by.
        about: what it is, in a few words.
        make: makes the model.
        by_hand: makes the wide form of a model, with the same weights.
        draw: draws the inputs.
        branches: the name of the equal modules whose outputs are all that the model gives.
        compiled: whether compilers, which take long, are measured on it unless asked for.
    """

    name: str
    about: str
    make: Callable[[], nn.Module]
    by_hand: Callable[[Any], nn.Module]
    draw: Callable[[], tuple[Tensor, ...]]
    branches: str | None = None
    compiled: bool = False

    def model(self) -> nn.Module:
        """The model, the same at each call."""
        torch.manual_seed(SEED)
        return self.make()

    def inputs(self) -> tuple[Tensor, ...]:
        """The inputs, the same at each call."""
        torch.manual_seed(SEED + 1)
        return self.draw()


Outputs = Tensor | list[Tensor] | tuple[Tensor, ...]
"""What a model gives: one tensor or several."""


def listed(outputs: Outputs) -> list[Tensor]:
    """The tensors."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def loss_of(outputs: Outputs) -> Tensor:
    """The sum over the outputs of the mean of their squares: a loss for each, as tasks have."""
    return torch.stack([output.square().mean() for output in listed(outputs)]).sum()


def _randn(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def _users_and_items() -> tuple[Tensor, ...]:
    return torch.randint(5000, (256,)), torch.randint(2000, (256,))


def _dense_and_index() -> tuple[Tensor, ...]:
    return torch.randn(256, 13), torch.randint(1000, (256, 16))


def _language() -> list[Case]:
    return [
        Case(
            f"{name}_{step}",
            f"{about}, {tokens} token{'s' * (tokens > 1)}, batch {batch}",
            make,
            by_hand,
            _randn((batch, tokens, 512)),
            compiled=compiled and step == "decode",
        )
        for name, about, make, by_hand, compiled in (
            ("qkv", "attention, q/k/v 512", Attention, WideAttention, True),
            (
                "gqa",
                "grouped-query attention, q 512, k/v 128",
                functools.partial(Attention, groups=2),
                WideAttention,
                False,
            ),
            ("gated", "gated feed-forward, 2 x 1376", Gated, WideGated, False),
        )
        for step, batch, tokens in (("decode", 1, 1), ("train", 4, 128))
    ]


def _control() -> list[Case]:
    critics = [
        Case(
            f"twin_critics_{batch}",
            f"two critics 24-256-256-1, batch {batch}",
            TwinCritics,
            WideTwinCritics,
            _randn((batch, 24)),
            branches="critics",
            compiled=batch == 256,
        )
        for batch in (1, 256, 4096)
    ]
    return critics + [
        Case(
            f"actor_critic_{batch}",
            f"actor and critic 8-64-64, batch {batch}",
            ActorCritic,
            WideActorCritic,
            _randn((batch, 8)),
        )
        for batch in (1, 256, 4096)
    ]


MODELS = (
    Case("vae", "two heads of a VAE, batch 64", VAE, WideVAE, _randn((64, 1, 28, 28))),
    Case(
        "inception",
        "Inception block, 192 channels of 28x28, batch 4",
        functools.partial(Inception, 192, (64, 96, 128, 16, 32, 32)),
        WideInception,
        _randn((4, 192, 28, 28)),
    ),
    Case(
        "googlenet",
        "stem and three Inception blocks, 64x64, batch 2",
        GoogLeNet,
        WideGoogLeNet,
        _randn((2, 3, 64, 64)),
    ),
    Case(
        "detector",
        "heads of a detector, two towers on three levels, batch 1",
        Detector,
        WideDetector,
        _randn(*((1, 64, size, size) for size in (32, 16, 8))),
    ),
    *_language(),
    *(
        Case(
            f"mmoe_{count}",
            f"mixture of {count} experts 64-32-16, 2 tasks, batch 256",
            functools.partial(MMoE, count),
            WideMMoE,
            _randn((256, 64)),
            compiled=count == 8,
        )
        for count in (8, 32)
    ),
    Case(
        "multitask",
        "eight towers 256-64-1, batch 256",
        MultiTask,
        WideMultiTask,
        _randn((256, 128)),
    ),
    *_control(),
    Case(
        "time_projections",
        "22 projections 1280-320 of a time embedding, batch 2",
        functools.partial(TimeProjections, 22, 1280, 320),
        WideTimeProjections,
        _randn((2, 1280)),
        branches="projections",
    ),
    Case(
        "unet",
        "U-Net of ten blocks, 16x16, batch 2",
        UNet,
        WideUNet,
        _randn((2, 3, 16, 16), (2, 128)),
    ),
    Case(
        "neumf",
        "two embeddings each of users and items, batch 256",
        NeuMF,
        WideNeuMF,
        _users_and_items,
    ),
    Case("dlrm", "16 tables, each with its own index, batch 256", DLRM, WideDLRM, _dense_and_index),
)
"""Models as they are in use."""

PASSES = (
    Case(
        "widen_8",
        "8 heads 64-16, batch 32",
        functools.partial(Heads, 8, 64, 16),
        WideHeads,
        _randn((32, 64)),
        branches="heads",
        compiled=True,
    ),
    Case(
        "widen_32",
        "32 heads 64-16, batch 32",
        functools.partial(Heads, 32, 64, 16),
        WideHeads,
        _randn((32, 64)),
        branches="heads",
    ),
    Case(
        "widen_large",
        "2 heads 1024-1024, batch 256",
        functools.partial(Heads, 2, 1024, 1024),
        WideHeads,
        _randn((256, 1024)),
        branches="heads",
    ),
    Case(
        "share_small",
        "8 heads 64-16, each behind a SiLU of its own, batch 32",
        functools.partial(TimeProjections, 8, 64, 16),
        WideTimeProjections,
        _randn((32, 64)),
        branches="projections",
    ),
    Case(
        "share_large",
        "2 heads 1024-1024, each behind a SiLU of its own, batch 256",
        functools.partial(TimeProjections, 2, 1024, 1024),
        WideTimeProjections,
        _randn((256, 1024)),
        branches="projections",
    ),
    Case(
        "sink_small",
        "8 convolutions 1x1 16-8 with BatchNorm, ReLU and pooling, 8x8, batch 2",
        functools.partial(Norms, 8, 16, 8),
        WideNorms,
        _randn((2, 16, 8, 8)),
    ),
    Case(
        "sink_large",
        "2 convolutions 1x1 64-64 with BatchNorm, ReLU and pooling, 56x56, batch 4",
        functools.partial(Norms, 2, 64, 64),
        WideNorms,
        _randn((4, 64, 56, 56)),
    ),
    Case(
        "grouped_small",
        "4 branches of two depthwise 3x3 with BatchNorm and ReLU, 16 channels of 16x16, batch 2",
        functools.partial(Grouped, 4, 16, 16),
        WideGrouped,
        _randn((2, 16, 16, 16)),
    ),
    Case(
        "grouped_large",
        "2 branches of two 3x3 in 4 groups with BatchNorm and ReLU, 32 channels of 28x28, batch 8",
        functools.partial(Grouped, 2, 32, 4),
        WideGrouped,
        _randn((8, 32, 28, 28)),
    ),
    Case(
        "towers_small",
        "8 towers 64-16-16, batch 32",
        functools.partial(Towers, 8, 64, 16),
        WideTowers,
        _randn((32, 64)),
        branches="towers",
    ),
    Case(
        "towers_large",
        "2 towers 512-512-512, batch 512",
        functools.partial(Towers, 2, 512, 512),
        WideTowers,
        _randn((512, 512)),
        branches="towers",
    ),
    Case(
        "batch_small",
        "an encoder 64-64-64 that is called with 4 tensors, batch 8",
        functools.partial(Shared, 64),
        WideShared,
        _randn(*[(8, 64)] * 4),
    ),
    Case(
        "batch_large",
        "an encoder 512-512-512 that is called with 4 tensors, batch 256",
        functools.partial(Shared, 512),
        WideShared,
        _randn(*[(256, 512)] * 4),
    ),
    Case(
        "cancel_small",
        "8 heads 64-16, joined again, batch 32",
        functools.partial(Joined, 8, 64, 16),
        WideJoined,
        _randn((32, 64)),
    ),
    Case(
        "cancel_large",
        "2 heads 1024-1024, joined again, batch 256",
        functools.partial(Joined, 2, 1024, 1024),
        WideJoined,
        _randn((256, 1024)),
    ),
)
"""For each pass a model on which it makes the difference: small, and large."""

CASES = {case.name: case for case in (*MODELS, *PASSES)}
"""All of them, by name."""
