"""Policies and critics of stable_baselines3 and sb3_contrib, and modules of torchrl."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from zoo.specimen import Specimen, image, named, public, randn, specimen


def box(*shape: int) -> Any:
    return named("gymnasium.spaces:Box")(-1.0, 1.0, shape)


def schedule(progress: float) -> float:
    """The learning rate; a function that can be pickled."""
    return 1e-3 * progress


def doubled(name: str) -> Any:
    """An extractor of features that gives float64; the policies make float32 of all they see."""
    extractor = named(f"stable_baselines3.common.torch_layers:{name}")

    class Doubled(extractor):
        def forward(self, observations: Any) -> Any:
            return super().forward(observations).double()

    return Doubled


def without_optimizers(model: nn.Module) -> nn.Module:
    """The model alone: what steps its parameters is made anew after optimizing."""
    for module in model.modules():
        if isinstance(getattr(module, "optimizer", None), torch.optim.Optimizer):
            del module.optimizer
    return model


def policy(
    path: str,
    *,
    fuses: bool = True,
    discrete: bool = False,
    optimizers: bool = False,
    **settings: Any,
) -> Specimen:
    """A policy of stable_baselines3 on vectors of six numbers, with or without its optimizers."""

    def build() -> nn.Module:
        actions = named("gymnasium.spaces:Discrete")(3) if discrete else box(3)
        made = named(f"stable_baselines3.{path}")(
            box(6),
            actions,
            lr_schedule=schedule,
            features_extractor_class=doubled("FlattenExtractor"),
            **settings,
        )
        return made if optimizers else without_optimizers(made)

    return specimen(build, lambda: (randn(6),), package="stable_baselines3", fuses=fuses)


def twins() -> nn.Module:
    """Three Q functions on one observation and action."""
    flatten = named("stable_baselines3.common.torch_layers:FlattenExtractor")(box(6))
    return named("stable_baselines3.common.policies:ContinuousCritic")(
        box(6), box(3), [12, 12], flatten, 6, n_critics=3
    )


def quantiles() -> nn.Module:
    """Three critics that give seven quantiles each of what an action is worth."""
    flatten = named("stable_baselines3.common.torch_layers:FlattenExtractor")(box(6))
    return named("sb3_contrib.tqc.policies:Critic")(
        box(6), box(3), [12, 12], flatten, 6, n_quantiles=7, n_critics=3
    )


def masked() -> nn.Module:
    """A policy some of whose actions may be forbidden."""
    policy_class = named("sb3_contrib.common.maskable.policies:MaskableActorCriticPolicy")
    made = policy_class(
        box(6),
        named("gymnasium.spaces:Discrete")(3),
        lr_schedule=schedule,
        net_arch={"pi": [12, 12], "vf": [12, 12]},
        features_extractor_class=doubled("FlattenExtractor"),
    )
    return without_optimizers(made)


def combined() -> nn.Module:
    """A policy that reads a picture and two vectors."""
    spaces = named("gymnasium.spaces:Dict")({"speed": box(3), "place": box(5)})
    policy_class = named("stable_baselines3.common.policies:MultiInputActorCriticPolicy")
    made = policy_class(
        spaces,
        box(3),
        lr_schedule=schedule,
        net_arch={"pi": [8], "vf": [12]},
        features_extractor_class=doubled("CombinedExtractor"),
    )
    return without_optimizers(made)


LAYERS = {"depth": 2, "num_cells": 12}
"""The settings of torchrl's perceptrons."""

MODELS = {
    "policy_actor_critic": policy("common.policies:ActorCriticPolicy", net_arch=[12, 12]),
    "policy_with_optimizer": policy(
        "common.policies:ActorCriticPolicy",
        net_arch=[12, 12],
        optimizers=True,
        fuses=False,  # The optimizer would go on with the parameters of before.
    ),
    "policy_actor_critic_discrete": policy(
        "common.policies:ActorCriticPolicy",
        discrete=True,
        net_arch={"pi": [12, 8], "vf": [16, 8]},
        use_sde=False,
    ),
    "policy_combined": specimen(
        combined,
        lambda: ({"speed": randn(3), "place": randn(5)},),
        package="stable_baselines3",
    ),
    "policy_soft": policy("sac.policies:SACPolicy", net_arch=[12, 12]),
    "policy_deterministic": policy("td3.policies:TD3Policy", net_arch=[12, 12], fuses=False),
    "policy_values": policy("dqn.policies:DQNPolicy", discrete=True, net_arch=[12], fuses=False),
    "critics": specimen(twins, lambda: (randn(6), randn(3)), package="stable_baselines3"),
    "critics_of_quantiles": specimen(
        quantiles, lambda: (randn(6), randn(3)), package="sb3_contrib"
    ),
    "policy_masked": specimen(masked, lambda: (randn(6),), package="sb3_contrib"),
    "dueling": public(
        "torchrl.modules:DuelingCnnDQNet",
        lambda: (image(16, 2),),
        out_features=3,
        cnn_kwargs={
            "in_features": 2,
            "num_cells": [4, 4],
            "kernel_sizes": 3,
            "strides": 2,
        },
        mlp_kwargs={"in_features": 36, "depth": 1, "num_cells": 8},
    ),
    "agents_mixed": public(
        "torchrl.modules:QMixer",
        lambda: (randn(3, 1), randn(5)),
        state_shape=(5,),
        mixing_embed_dim=4,
        n_agents=3,
        device="cpu",
    ),
    "agents_apart": public(
        "torchrl.modules:MultiAgentMLP",
        lambda: (randn(3, 4),),
        n_agent_inputs=4,
        n_agent_outputs=2,
        n_agents=3,
        centralised=True,
        share_params=True,
        **LAYERS,
        fuses=False,
    ),
    "world_posterior": public(
        "torchrl.modules:RSSMPosterior",
        lambda: (randn(6), randn(5)),
        hidden_dim=8,
        state_dim=3,
        rnn_hidden_dim=6,
        obs_embed_dim=5,
        fuses=False,
    ),
    "decisions": public(
        "torchrl.modules:OnlineDTActor",
        lambda: (randn(4, 5), randn(4, 2), randn(4, 1)),
        state_dim=5,
        action_dim=2,
        transformer_config={
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_inner": 16,
            "activation": "relu",
            "n_positions": 16,
            "resid_pdrop": 0.1,
            "attn_pdrop": 0.1,
        },
    ),
}
