"""Recommenders of `torch_rechub`: ranking, retrieval, several tasks at once; and of `torchfm`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.specimen import BATCH, Specimen, named, public, randn, specimen, tokens

MODELS_OF = "torch_rechub.models"

DIM = 8
"""The width of every embedding."""


def sparse(*names: str, **settings: Any) -> list[Any]:
    """Features that are numbers of a vocabulary."""
    feature = named("torch_rechub.basic.features:SparseFeature")
    return [feature(name, vocab_size=40, embed_dim=DIM, **settings) for name in names]


def history(name: str, shared: str, pooling: str = "concat") -> list[Any]:
    """A feature that is a sequence of items."""
    feature = named("torch_rechub.basic.features:SequenceFeature")
    return [feature(name, vocab_size=40, embed_dim=DIM, pooling=pooling, shared_with=shared)]


def dense(*names: str) -> list[Any]:
    """Features that are values."""
    return [named("torch_rechub.basic.features:DenseFeature")(name) for name in names]


def mlp(*widths: int, **settings: Any) -> dict[str, Any]:
    """The settings of a perceptron."""
    return {"dims": list(widths), "activation": "relu", "dropout": 0.1, **settings}


class Recommender(nn.Module):
    """A model that takes a dict, called with keywords."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **features: Tensor) -> Any:
        return self.model(features)


def inputs() -> dict[str, Tensor]:
    """A value for each feature that any of the models asks for."""
    numbers = {name: tokens(1).squeeze(1) for name in ("user", "item", "place")}
    return {
        **numbers,
        "seen": tokens(5),
        **{name: tokens(5) for name in ("seq", "pos", "neg")},
        "price": randn(),
        "age": randn(),
    }


def rec(path: str, settings: Any, *, fuses: bool = True) -> Specimen:
    """A model; `settings` gives what makes it, since its features are objects of the package."""

    def build() -> nn.Module:
        made = named(f"{MODELS_OF}.{path}")(**settings())
        return Recommender(made)

    return specimen(build, inputs, package="torch_rechub", fuses=fuses)


TASKS = ["classification", "regression"]

MODELS = {
    "rec_mmoe": rec(
        "multi_task:MMOE",
        lambda: {
            "features": sparse("user", "item") + dense("price"),
            "task_types": TASKS,
            "n_expert": 3,
            "expert_params": mlp(12),
            "tower_params_list": [mlp(6), mlp(6)],
        },
    ),
    "rec_ple": rec(
        "multi_task:PLE",
        lambda: {
            "features": sparse("user", "item") + dense("price"),
            "task_types": TASKS,
            "n_level": 2,
            "n_expert_specific": 2,
            "n_expert_shared": 1,
            "expert_params": mlp(12),
            "tower_params_list": [mlp(6), mlp(6)],
        },
    ),
    "rec_shared_bottom": rec(
        "multi_task:SharedBottom",
        lambda: {
            "features": sparse("user", "item"),
            "task_types": TASKS,
            "bottom_params": mlp(12),
            "tower_params_list": [mlp(6), mlp(6)],
        },
    ),
    "rec_aitm": rec(
        "multi_task:AITM",
        lambda: {
            "features": sparse("user", "item"),
            "n_task": 2,
            "bottom_params": mlp(12),
            "tower_params_list": [mlp(6), mlp(6)],
        },
    ),
    "rec_esmm": rec(
        "multi_task:ESMM",
        lambda: {
            "user_features": sparse("user"),
            "item_features": sparse("item"),
            "cvr_params": mlp(12),
            "ctr_params": mlp(12),
        },
    ),
    "rec_wide_deep": rec(
        "ranking:WideDeep",
        lambda: {
            "wide_features": sparse("user") + dense("price"),
            "deep_features": sparse("user", "item"),
            "mlp_params": mlp(12, 6),
        },
        fuses=False,
    ),
    "rec_deep_fm": rec(
        "ranking:DeepFM",
        lambda: {
            "deep_features": sparse("user", "item") + dense("price"),
            "fm_features": sparse("user", "item"),
            "mlp_params": mlp(12, 6),
        },
        fuses=False,
    ),
    "rec_cross": rec(
        "ranking:DCN",
        lambda: {
            "features": sparse("user", "item"),
            "n_cross_layers": 2,
            "mlp_params": mlp(12, 6),
        },
        fuses=False,
    ),
    "rec_cross_mixture": rec(
        "ranking:DCNv2",
        lambda: {
            "features": sparse("user", "item"),
            "n_cross_layers": 2,
            "mlp_params": mlp(12, 6),
            "low_rank": 4,
            "num_experts": 3,
        },
        fuses=False,
    ),
    "rec_cross_bridge": rec(
        "ranking:EDCN",
        lambda: {
            "features": sparse("user", "item"),
            "n_cross_layers": 2,
            "mlp_params": mlp(dropout=0.1),
        },
        fuses=False,
    ),
    "rec_auto_int": rec(
        "ranking:AutoInt",
        lambda: {
            "sparse_features": sparse("user", "item", "place"),
            "dense_features": [],
            "num_layers": 2,
            "mlp_params": mlp(12),
        },
    ),
    "rec_squeeze": rec(
        "ranking:FiBiNet",
        lambda: {"features": sparse("user", "item", "place"), "mlp_params": mlp(12)},
    ),
    "rec_factors_attended": rec(
        "ranking:AFM",
        lambda: {"fm_features": sparse("user", "item", "place"), "embed_dim": DIM, "t": 6},
        fuses=False,
    ),
    "rec_interest": rec(
        "ranking:DIN",
        lambda: {
            "features": sparse("user"),
            "history_features": history("seen", "item"),
            "target_features": sparse("item"),
            "mlp_params": {"dims": [12]},
            "attention_mlp_params": {"dims": [6]},
        },
        fuses=False,
    ),
    "rec_behaviour": rec(
        "ranking:BST",
        lambda: {
            "features": sparse("user"),
            "history_features": history("seen", "item"),
            "target_features": sparse("item"),
            "mlp_params": mlp(12),
            "nhead": 2,
        },
        fuses=False,
    ),
    "rec_two_towers": rec(
        "matching:DSSM",
        lambda: {
            "user_features": sparse("user", "place"),
            "item_features": sparse("item"),
            "user_params": mlp(12, 6),
            "item_params": mlp(12, 6),
        },
        fuses=False,
    ),
    "rec_sessions": rec(
        "matching:NARM",
        lambda: {
            "item_history_feature": history("seen", None)[0],
            "hidden_dim": 6,
            "emb_dropout_p": 0.1,
            "session_rep_dropout_p": 0.1,
        },
        fuses=False,
    ),
    "rec_memory": rec(
        "matching:STAMP",
        lambda: {
            "item_history_feature": history("seen", None)[0],
            "weight_std": 0.1,
            "emb_std": 0.1,
        },
        fuses=False,
    ),
    "rec_self_attention": rec(
        "matching:SASRec",
        lambda: {
            "features": history("seq", None) + history("pos", "seq") + history("neg", "seq"),
            "max_len": 5,
            "num_blocks": 2,
        },
        fuses=False,
    ),
    "rec_generative": public(
        f"{MODELS_OF}.generative:HSTUModel",
        lambda: {"x": tokens(6), "time_diffs": torch.arange(6).repeat(BATCH, 1)},
        vocab_size=40,
        d_model=16,
        n_heads=2,
        n_layers=2,
        dqk=4,
        dv=4,
        max_seq_len=8,
        fuses=False,
    ),
    "factors_by_field": public(
        "torchfm.model.ffm:FieldAwareFactorizationMachineModel",
        lambda: (torch.randint(9, (BATCH, 3)),),
        [9, 9, 9],
        4,
    ),
    "factors_by_field_deep": public(
        "torchfm.model.fnfm:FieldAwareNeuralFactorizationMachineModel",
        lambda: (torch.randint(9, (BATCH, 3)),),
        [9, 9, 9],
        4,
        (8, 6),
        (0.1, 0.1),
    ),
}
