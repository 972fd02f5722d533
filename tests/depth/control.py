"""Critics, policies and their heads, as public implementations write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from depth.model import Deep, between, randn

LOG_STD_MAX = 2
LOG_STD_MIN = -20


class SoftQNetwork(nn.Module):
    """CleanRL: one critic, which joins observation and action itself."""

    def __init__(self, observations: int = 5, actions: int = 3) -> None:
        super().__init__()
        self.fc1 = nn.Linear(observations + actions, 12)
        self.fc2 = nn.Linear(12, 12)
        self.fc3 = nn.Linear(12, 1)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        x = torch.cat([x, a], 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


class CleanTwins(nn.Module):
    """CleanRL: two critics on the same observation and action, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.qf1 = SoftQNetwork()
        self.qf2 = SoftQNetwork()

    def forward(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qf1_values = self.qf1(observation, action).view(-1)
        qf2_values = self.qf2(observation, action).view(-1)
        return qf1_values, qf2_values, torch.min(qf1_values, qf2_values)


class Critic(nn.Module):
    """TD3: both critics in one module, six layers by name, and a method for the first alone."""

    def __init__(self, state_dim: int = 5, action_dim: int = 3) -> None:
        super().__init__()
        self.l1 = nn.Linear(state_dim + action_dim, 12)
        self.l2 = nn.Linear(12, 12)
        self.l3 = nn.Linear(12, 1)
        self.l4 = nn.Linear(state_dim + action_dim, 12)
        self.l5 = nn.Linear(12, 12)
        self.l6 = nn.Linear(12, 1)

    def forward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        sa = torch.cat([state, action], 1)
        q1 = F.relu(self.l1(sa))
        q1 = F.relu(self.l2(q1))
        q1 = self.l3(q1)
        q2 = F.relu(self.l4(sa))
        q2 = F.relu(self.l5(q2))
        q2 = self.l6(q2)
        return q1, q2

    def Q1(self, state: Tensor, action: Tensor) -> Tensor:  # noqa: N802 - Its public name.
        sa = torch.cat([state, action], 1)
        q1 = F.relu(self.l1(sa))
        q1 = F.relu(self.l2(q1))
        return self.l3(q1)


def mlp(
    sizes: list[int],
    activation: type[nn.Module],
    output_activation: type[nn.Module] = nn.Identity,
) -> nn.Sequential:
    """Spinning Up: a perceptron whose last activation does nothing."""
    layers: list[nn.Module] = []
    for j in range(len(sizes) - 1):
        act = activation if j < len(sizes) - 2 else output_activation
        layers += [nn.Linear(sizes[j], sizes[j + 1]), act()]
    return nn.Sequential(*layers)


class SquashedGaussianActor(nn.Module):
    """Spinning Up: mean and deviation on one trunk, a sample, and its log-probability."""

    def __init__(self, obs_dim: int, act_dim: int, act_limit: float) -> None:
        super().__init__()
        self.net = mlp([obs_dim, 10, 10], nn.ReLU, nn.ReLU)
        self.mu_layer = nn.Linear(10, act_dim)
        self.log_std_layer = nn.Linear(10, act_dim)
        self.act_limit = act_limit

    def forward(
        self, obs: Tensor, deterministic: bool = False, with_logprob: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        net_out = self.net(obs)
        mu = self.mu_layer(net_out)
        log_std = self.log_std_layer(net_out)
        log_std = torch.clamp(log_std, LOG_STD_MIN, LOG_STD_MAX)
        pi_distribution = Normal(mu, torch.exp(log_std))
        action = mu if deterministic else pi_distribution.rsample()
        if with_logprob:
            logp = pi_distribution.log_prob(action).sum(axis=-1)
            logp -= (2 * (math.log(2) - action - F.softplus(-2 * action))).sum(axis=1)
        else:
            logp = None
        return self.act_limit * torch.tanh(action), logp


class MLPQFunction(nn.Module):
    """Spinning Up: one critic."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.q = mlp([obs_dim + act_dim, *hidden_sizes, 1], nn.ReLU)

    def forward(self, obs: Tensor, act: Tensor) -> Tensor:
        q = self.q(torch.cat([obs, act], dim=-1))
        return torch.squeeze(q, -1)


class SpinningActorCritic(nn.Module):
    """Spinning Up: an action, and what both critics say of it."""

    def __init__(self, obs_dim: int = 5, act_dim: int = 3) -> None:
        super().__init__()
        self.pi = SquashedGaussianActor(obs_dim, act_dim, 2.0)
        self.q1 = MLPQFunction(obs_dim, act_dim, (12, 12))
        self.q2 = MLPQFunction(obs_dim, act_dim, (12, 12))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        pi, logp_pi = self.pi(obs)
        q1_pi = self.q1(obs, pi)
        q2_pi = self.q2(obs, pi)
        return torch.min(q1_pi, q2_pi), logp_pi


class ContinuousCritic(nn.Module):
    """Stable Baselines: the critics are in a plain list, and modules by a name each."""

    def __init__(self, n_critics: int = 2, share_features_extractor: bool = True) -> None:
        super().__init__()
        self.features_extractor = nn.Flatten()
        self.share_features_extractor = share_features_extractor
        self.n_critics = n_critics
        self.q_networks: list[nn.Module] = []
        for idx in range(n_critics):
            q_net = nn.Sequential(
                nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 1)
            )
            self.add_module(f"qf{idx}", q_net)
            self.q_networks.append(q_net)

    def extract_features(self, obs: Tensor, features_extractor: nn.Module) -> Tensor:
        return features_extractor(obs)

    def forward(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(not self.share_features_extractor):
            features = self.extract_features(obs, self.features_extractor)
        qvalue_input = torch.cat([features, actions], dim=1)
        return tuple(q_net(qvalue_input) for q_net in self.q_networks)

    def q1_forward(self, obs: Tensor, actions: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.extract_features(obs, self.features_extractor)
        return self.q_networks[0](torch.cat([features, actions], dim=1))


class Ensemble(nn.Module):
    """REDQ: many critics, of which the smallest value of some counts."""

    def __init__(self, num_Q: int = 5) -> None:  # noqa: N803
        super().__init__()
        self.num_Q = num_Q
        self.q_net_list = nn.ModuleList(mlp([8, 12, 12, 1], nn.ReLU) for _ in range(num_Q))

    def forward(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        inputs = torch.cat([obs, action], 1)
        q_prediction_list = []
        for q_i in range(self.num_Q):
            q_prediction = self.q_net_list[q_i](inputs)
            q_prediction_list.append(q_prediction)
        q_prediction_cat = torch.cat(q_prediction_list, dim=1)
        min_q, _ = torch.min(q_prediction_cat, dim=1, keepdim=True)
        return q_prediction_cat, min_q


class MlpExtractor(nn.Module):
    """Stable Baselines: a perceptron for the policy and one for the value, of equal widths."""

    def __init__(self, feature_dim: int, width: int, activation_fn: type[nn.Module]) -> None:
        super().__init__()
        towers = []
        for _ in range(2):
            layers: list[nn.Module] = []
            last = feature_dim
            for _ in range(2):
                layers.append(nn.Linear(last, width))
                layers.append(activation_fn())
                last = width
            towers.append(nn.Sequential(*layers))
        self.policy_net, self.value_net = towers

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: Tensor) -> Tensor:
        return self.policy_net(features)

    def forward_critic(self, features: Tensor) -> Tensor:
        return self.value_net(features)


class ActorCriticPolicy(nn.Module):
    """Stable Baselines: towers and heads, and a distribution on top."""

    def __init__(self) -> None:
        super().__init__()
        self.features_extractor = nn.Flatten()
        self.share_features_extractor = True
        self.mlp_extractor = MlpExtractor(6, 12, nn.Tanh)
        self.action_net = nn.Linear(12, 3)
        self.value_net = nn.Linear(12, 1)
        self.log_std = nn.Parameter(torch.zeros(3))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.features_extractor(obs)
        if self.share_features_extractor:
            latent_pi, latent_vf = self.mlp_extractor(features)
        else:
            pi_features, vf_features = features
            latent_pi = self.mlp_extractor.forward_actor(pi_features)
            latent_vf = self.mlp_extractor.forward_critic(vf_features)
        values = self.value_net(latent_vf)
        mean_actions = self.action_net(latent_pi)
        action_std = torch.ones_like(mean_actions) * self.log_std.exp()
        distribution = Normal(mean_actions, action_std)
        actions = distribution.mean
        return actions, values, distribution.log_prob(actions).sum(dim=1)


def layer_init(layer: nn.Linear, std: float = 2**0.5, bias_const: float = 0.0) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.constant_(layer.bias, bias_const)
    return layer


class Agent(nn.Module):
    """CleanRL: PPO's agent, with the methods that its loop calls."""

    def __init__(self, observations: int = 6, actions: int = 4) -> None:
        super().__init__()
        self.critic = self._network(observations, 1, 1.0)
        self.actor_mean = self._network(observations, actions, 0.01)
        self.actor_logstd = nn.Parameter(torch.zeros(1, actions))

    @staticmethod
    def _network(inputs: int, outputs: int, std: float) -> nn.Sequential:
        return nn.Sequential(
            layer_init(nn.Linear(inputs, 12)),
            nn.Tanh(),
            layer_init(nn.Linear(12, 12)),
            nn.Tanh(),
            layer_init(nn.Linear(12, outputs), std=std),
        )

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(x)

    def forward(self, x: Tensor, action: Tensor | None = None) -> tuple[Tensor, ...]:
        action_mean = self.actor_mean(x)
        action_logstd = self.actor_logstd.expand_as(action_mean)
        action_std = torch.exp(action_logstd)
        probs = Normal(action_mean, action_std)
        if action is None:
            action = probs.sample()
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), self.critic(x)


class Dueling(nn.Module):
    """A dueling network: value and advantages on the features of a picture."""

    def __init__(self, num_actions: int = 4) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.conv1 = nn.Conv2d(2, 4, kernel_size=3, stride=2)
        self.conv2 = nn.Conv2d(4, 5, kernel_size=3)
        self.fc1_adv = nn.Linear(20, 10)
        self.fc1_val = nn.Linear(20, 10)
        self.fc2_adv = nn.Linear(10, num_actions)
        self.fc2_val = nn.Linear(10, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        batch_size = x.size(0)
        x = self.relu(self.conv1(x))
        x = self.relu(self.conv2(x))
        x = x.view(x.size(0), -1)
        adv = self.relu(self.fc1_adv(x))
        val = self.relu(self.fc1_val(x))
        adv = self.fc2_adv(adv)
        val = self.fc2_val(val).expand(batch_size, self.num_actions)
        return val + adv - adv.mean(1).unsqueeze(1).expand(batch_size, self.num_actions)


def vectors(*widths: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda batch: tuple(randn(batch, width) for width in widths)


MODELS = {
    # Both critics run what one runs: three products and two ReLUs, on one cat.
    "twins_cleanrl": Deep(
        CleanTwins,
        vectors(5, 3),
        {"products": (6, 3), "activations": (4, 2), "joins": (2, 1)},
    ),
    "twins_td3": Deep(
        Critic,
        vectors(5, 3),
        {"products": (6, 3), "activations": (4, 2), "joins": (1, 1)},
    ),
    # The policy's trunk of two, its two heads, which are one, and the critics. The activations
    # are the trunk's, the critics', tanh and softplus.
    "twins_spinning_up": Deep(
        SpinningActorCritic,
        vectors(5),
        {
            "products": (2 + 2 + 6, 2 + 1 + 3),
            "activations": (2 + 4 + 2, 2 + 2 + 2),
            "joins": (2, 1),
        },
    ),
    "twins_baselines": Deep(
        ContinuousCritic,
        vectors(5, 3),
        {"products": (6, 3), "activations": (4, 2), "joins": (1, 1)},
    ),
    # The values of five critics are joined, which a batched product can do without.
    "ensemble": Deep(
        Ensemble,
        vectors(5, 3),
        {"products": (15, 3), "activations": (10, 2), "joins": (2, between(1, 2))},
    ),
    # Two hidden layers of two towers; the heads have different widths. The last Tanh of each tower
    # goes out of the module that holds them, where it might be changed in place.
    "policy_baselines": Deep(
        ActorCriticPolicy, vectors(6), {"products": (6, 4), "activations": (4, 3)}
    ),
    # Two hidden layers of two towers; the last layers have different widths. A distribution is made
    # in forward.
    "agent_cleanrl": Deep(Agent, vectors(6, 4), {"products": (6, 4), "activations": (4, 2)}),
    # Two convolutions, the hidden layers, which are one, two outputs of different widths.
    "dueling": Deep(
        Dueling,
        lambda batch: (randn(batch, 2, 9, 9),),
        {"products": (2 + 4, 2 + 1 + 2), "activations": (2 + 2, 2 + 1)},
    ),
}
