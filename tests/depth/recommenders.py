"""Recommenders for several tasks, and for clicks, as public implementations write them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depth.model import Deep, between, randn

VOCABULARY = 9


class EmbeddingLayer(nn.Module):
    """All fields in one table, each behind the one before it."""

    def __init__(self, field_dims: list[int], embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(sum(field_dims), embed_dim)
        self.offsets = numpy.array((0, *numpy.cumsum(field_dims)[:-1]), dtype=numpy.int64)

    def forward(self, x: Tensor) -> Tensor:
        x = x + x.new_tensor(self.offsets).unsqueeze(0)
        return self.embedding(x)


class MultiLayerPerceptron(nn.Module):
    """Linear, BatchNorm, ReLU and Dropout for each width, and perhaps an output."""

    def __init__(self, input_dim: int, dims: tuple[int, ...], dropout: float, output_layer=True):
        super().__init__()
        layers: list[nn.Module] = []
        for embed_dim in dims:
            layers.append(nn.Linear(input_dim, embed_dim))
            layers.append(nn.BatchNorm1d(embed_dim))
            layers.append(nn.ReLU())
            layers.append(nn.Dropout(p=dropout))
            input_dim = embed_dim
        if output_layer:
            layers.append(nn.Linear(input_dim, 1))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class LibraryMMoE(nn.Module):
    """Experts, gates and towers in lists; the experts are mixed by torch.bmm."""

    def __init__(
        self,
        task_num: int = 2,
        expert_num: int = 8,
        bottom: tuple[int, ...] = (8, 6),
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        self.embedding = EmbeddingLayer([VOCABULARY] * 3, 4)
        self.numerical_layer = nn.Linear(2, 4)
        self.embed_output_dim = (3 + 1) * 4
        self.task_num = task_num
        self.expert_num = expert_num
        self.expert = nn.ModuleList(
            MultiLayerPerceptron(self.embed_output_dim, bottom, dropout, output_layer=False)
            for _ in range(expert_num)
        )
        self.tower = nn.ModuleList(
            MultiLayerPerceptron(bottom[-1], (5,), dropout) for _ in range(task_num)
        )
        self.gate = nn.ModuleList(
            nn.Sequential(nn.Linear(self.embed_output_dim, expert_num), nn.Softmax(dim=1))
            for _ in range(task_num)
        )

    def forward(self, categorical_x: Tensor, numerical_x: Tensor) -> list[Tensor]:
        categorical_emb = self.embedding(categorical_x)
        numerical_emb = self.numerical_layer(numerical_x).unsqueeze(1)
        emb = torch.cat([categorical_emb, numerical_emb], 1).view(-1, self.embed_output_dim)
        gate_value = [self.gate[i](emb).unsqueeze(1) for i in range(self.task_num)]
        fea = torch.cat([self.expert[i](emb).unsqueeze(1) for i in range(self.expert_num)], dim=1)
        task_fea = [torch.bmm(gate_value[i], fea).squeeze(1) for i in range(self.task_num)]
        return [torch.sigmoid(self.tower[i](task_fea[i]).squeeze(1)) for i in range(self.task_num)]


class DNN(nn.Module):
    """DeepCTR: layers by index, with BatchNorm or without, activations in a list."""

    def __init__(
        self,
        inputs_dim: int,
        hidden_units: tuple[int, ...],
        activation: str = "relu",
        dropout_rate: float = 0,
        use_bn: bool = False,
    ) -> None:
        super().__init__()
        self.dropout_rate = dropout_rate
        self.dropout = nn.Dropout(dropout_rate)
        self.use_bn = use_bn
        if len(hidden_units) == 0:
            raise ValueError("hidden_units is empty")
        units = [inputs_dim, *hidden_units]
        self.linears = nn.ModuleList(
            nn.Linear(units[i], units[i + 1]) for i in range(len(units) - 1)
        )
        if self.use_bn:
            self.bn = nn.ModuleList(nn.BatchNorm1d(width) for width in hidden_units)
        made = {"relu": lambda: nn.ReLU(inplace=True), "sigmoid": nn.Sigmoid}[activation]
        self.activation_layers = nn.ModuleList(made() for _ in hidden_units)

    def forward(self, inputs: Tensor) -> Tensor:
        deep_input = inputs
        for i in range(len(self.linears)):
            fc = self.linears[i](deep_input)
            if self.use_bn:
                fc = self.bn[i](fc)
            fc = self.activation_layers[i](fc)
            fc = self.dropout(fc)
            deep_input = fc
        return deep_input


class PredictionLayer(nn.Module):
    """DeepCTR: adds its bias in place."""

    def __init__(self, task: str = "binary", use_bias: bool = True) -> None:
        super().__init__()
        if task not in ["binary", "multiclass", "regression"]:
            raise ValueError("task must be binary,multiclass or regression")
        self.use_bias = use_bias
        self.task = task
        if self.use_bias:
            self.bias = nn.Parameter(torch.zeros((1,)))

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        output = X
        if self.use_bias:
            output += self.bias
        if self.task == "binary":
            output = torch.sigmoid(output)
        return output


def columns(sparse: int, dense: int) -> OrderedDict[str, tuple[int, int]]:
    """Where each feature stands in the one tensor that holds them all."""
    names = [*(f"sparse{i}" for i in range(sparse)), *(f"dense{i}" for i in range(dense))]
    return OrderedDict((name, (start, start + 1)) for start, name in enumerate(names))


class BaseModel(nn.Module):
    """DeepCTR: looks the features up by the columns of one tensor."""

    def __init__(self, sparse: int = 3, dense: int = 2, embedding_dim: int = 4) -> None:
        super().__init__()
        self.feature_index = columns(sparse, dense)
        self.sparse = tuple(name for name in self.feature_index if name.startswith("sparse"))
        self.dense = tuple(name for name in self.feature_index if name.startswith("dense"))
        self.embedding_dict = nn.ModuleDict(
            {name: nn.Embedding(VOCABULARY, embedding_dim) for name in self.sparse}
        )
        self.width = sparse * embedding_dim + dense

    def input_from_feature_columns(self, X: Tensor) -> tuple[list[Tensor], list[Tensor]]:  # noqa: N803
        embeddings = [
            self.embedding_dict[name](
                X[:, self.feature_index[name][0] : self.feature_index[name][1]].long()
            )
            for name in self.sparse
        ]
        values = [
            X[:, self.feature_index[name][0] : self.feature_index[name][1]] for name in self.dense
        ]
        return embeddings, values


def combined_dnn_input(embeddings: list[Tensor], values: list[Tensor]) -> Tensor:
    if len(embeddings) > 0 and len(values) > 0:
        sparse = torch.flatten(torch.cat(embeddings, dim=-1), start_dim=1)
        dense = torch.flatten(torch.cat(values, dim=-1), start_dim=1)
        return torch.cat([sparse, dense], dim=-1)
    if len(embeddings) > 0:
        return torch.flatten(torch.cat(embeddings, dim=-1), start_dim=1)
    return torch.flatten(torch.cat(values, dim=-1), start_dim=1)


class DeepCTRMMoE(BaseModel):
    """DeepCTR: experts by number, gates without bias, towers with an output each."""

    def __init__(
        self,
        num_experts: int = 8,
        expert_dnn_hidden_units: tuple[int, ...] = (8, 6),
        gate_dnn_hidden_units: tuple[int, ...] = (),
        tower_dnn_hidden_units: tuple[int, ...] = (4,),
        task_types: tuple[str, ...] = ("binary", "regression"),
        use_bn: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.num_tasks = len(task_types)
        self.gate_dnn_hidden_units = gate_dnn_hidden_units
        self.tower_dnn_hidden_units = tower_dnn_hidden_units
        self.expert_dnn = nn.ModuleList(
            DNN(self.width, expert_dnn_hidden_units, use_bn=use_bn) for _ in range(num_experts)
        )
        self.gate_dnn_final_layer = nn.ModuleList(
            nn.Linear(self.width, num_experts, bias=False) for _ in task_types
        )
        if len(tower_dnn_hidden_units) > 0:
            self.tower_dnn = nn.ModuleList(
                DNN(expert_dnn_hidden_units[-1], tower_dnn_hidden_units, use_bn=use_bn)
                for _ in task_types
            )
        self.tower_dnn_final_layer = nn.ModuleList(
            nn.Linear(tower_dnn_hidden_units[-1], 1, bias=False) for _ in task_types
        )
        self.out = nn.ModuleList(PredictionLayer(task) for task in task_types)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        embeddings, values = self.input_from_feature_columns(X)
        dnn_input = combined_dnn_input(embeddings, values)
        expert_outs = []
        for i in range(self.num_experts):
            expert_out = self.expert_dnn[i](dnn_input)
            expert_outs.append(expert_out)
        expert_outs = torch.stack(expert_outs, 1)
        mmoe_outs = []
        for i in range(self.num_tasks):
            if len(self.gate_dnn_hidden_units) > 0:
                gate_dnn_out = self.gate_dnn[i](dnn_input)
                gate_dnn_out = self.gate_dnn_final_layer[i](gate_dnn_out)
            else:
                gate_dnn_out = self.gate_dnn_final_layer[i](dnn_input)
            mixed = torch.matmul(gate_dnn_out.softmax(1).unsqueeze(1), expert_outs)
            mmoe_outs.append(mixed.squeeze(1))
        task_outs = []
        for i in range(self.num_tasks):
            if len(self.tower_dnn_hidden_units) > 0:
                tower_dnn_out = self.tower_dnn[i](mmoe_outs[i])
                logit = self.tower_dnn_final_layer[i](tower_dnn_out)
            else:
                logit = self.tower_dnn_final_layer[i](mmoe_outs[i])
            task_outs.append(self.out[i](logit))
        return torch.cat(task_outs, -1)


class Expert(nn.Module):
    """Two layers with a Dropout between them."""

    def __init__(self, input_size: int, output_size: int, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, hidden_size)
        self.fc2 = nn.Linear(hidden_size, output_size)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.fc1(x)
        out = self.relu(out)
        out = self.dropout(out)
        return self.fc2(out)


class Tower(Expert):
    """The same with a sigmoid."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(super().forward(x))


class ParameterMMoE(nn.Module):
    """The gates are parameters, and the experts are mixed by a product and a sum."""

    def __init__(self, input_size: int = 7, num_experts: int = 6, tasks: int = 3) -> None:
        super().__init__()
        self.experts_out = 5
        self.softmax = nn.Softmax(dim=1)
        self.experts = nn.ModuleList(Expert(input_size, 5, 8) for _ in range(num_experts))
        self.w_gates = nn.ParameterList(
            nn.Parameter(torch.randn(input_size, num_experts)) for _ in range(tasks)
        )
        self.towers = nn.ModuleList(Tower(5, 1, 4) for _ in range(tasks))

    def forward(self, x: Tensor) -> list[Tensor]:
        experts_o = [e(x) for e in self.experts]
        experts_o_tensor = torch.stack(experts_o)
        gates_o = [self.softmax(x @ g) for g in self.w_gates]
        tower_input = [
            g.t().unsqueeze(2).expand(-1, -1, self.experts_out) * experts_o_tensor for g in gates_o
        ]
        tower_input = [torch.sum(ti, dim=0) for ti in tower_input]
        return [t(ti) for t, ti in zip(self.towers, tower_input)]  # noqa: B905


class DictMMoE(nn.Module):
    """Tasks by name: gates and towers in a ModuleDict, inputs and outputs in dicts."""

    def __init__(self, tasks: tuple[str, ...] = ("click", "like", "share"), experts: int = 4):
        super().__init__()
        self.tasks = tasks
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU())
            for _ in range(experts)
        )
        self.gates = nn.ModuleDict({task: nn.Linear(7, experts) for task in tasks})
        self.towers = nn.ModuleDict(
            {task: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 1)) for task in tasks}
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        x = torch.cat([batch["user"], batch["item"]], dim=-1)
        experts = torch.stack([expert(x) for expert in self.experts], dim=1)
        outputs = {}
        for task, gate in self.gates.items():
            weights = F.softmax(gate(x), dim=-1)
            mixed = torch.einsum("be,bed->bd", weights, experts)
            outputs[f"{task}_logit"] = self.towers[task](mixed).squeeze(-1)
        return outputs


class PLE(nn.Module):
    """Progressive layered extraction: experts of the tasks and shared ones, on two levels."""

    def __init__(self, tasks: int = 2, specific: int = 2, shared: int = 2, levels: int = 2) -> None:
        super().__init__()
        self.num_tasks, self.num_levels = tasks, levels
        self.specific_expert_num, self.shared_expert_num = specific, shared
        widths = [7] + [6] * levels
        self.specific_experts = nn.ModuleList(
            nn.ModuleList(
                nn.ModuleList(self._expert(widths[level]) for _ in range(specific))
                for _ in range(tasks)
            )
            for level in range(levels)
        )
        self.shared_experts = nn.ModuleList(
            nn.ModuleList(self._expert(widths[level]) for _ in range(shared))
            for level in range(levels)
        )
        self.specific_gates = nn.ModuleList(
            nn.ModuleList(nn.Linear(widths[level], specific + shared) for _ in range(tasks))
            for level in range(levels)
        )
        self.shared_gates = nn.ModuleList(
            nn.Linear(widths[level], tasks * specific + shared) for level in range(levels - 1)
        )
        self.towers = nn.ModuleList(nn.Linear(6, 1) for _ in range(tasks))

    @staticmethod
    def _expert(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(width, 6), nn.ReLU())

    def cgc_net(self, inputs: list[Tensor], level_num: int) -> list[Tensor]:
        specific_expert_outputs = []
        for i in range(self.num_tasks):
            for j in range(self.specific_expert_num):
                output = self.specific_experts[level_num][i][j](inputs[i])
                specific_expert_outputs.append(output)
        shared_expert_outputs = []
        for k in range(self.shared_expert_num):
            shared_expert_outputs.append(self.shared_experts[level_num][k](inputs[-1]))
        cgc_outs = []
        for i in range(self.num_tasks):
            first = i * self.specific_expert_num
            current = (
                specific_expert_outputs[first : first + self.specific_expert_num]
                + shared_expert_outputs
            )
            current = torch.stack(current, 1)
            gate = self.specific_gates[level_num][i](inputs[i])
            mixed = torch.matmul(gate.softmax(1).unsqueeze(1), current)
            cgc_outs.append(mixed.squeeze(1))
        if level_num < self.num_levels - 1:
            current = torch.stack(specific_expert_outputs + shared_expert_outputs, 1)
            gate = self.shared_gates[level_num](inputs[-1])
            mixed = torch.matmul(gate.softmax(1).unsqueeze(1), current)
            cgc_outs.append(mixed.squeeze(1))
        return cgc_outs

    def forward(self, x: Tensor) -> list[Tensor]:
        ple_inputs = [x] * (self.num_tasks + 1)
        ple_outputs: list[Tensor] = []
        for i in range(self.num_levels):
            ple_outputs = self.cgc_net(inputs=ple_inputs, level_num=i)
            ple_inputs = ple_outputs
        return [self.towers[i](ple_outputs[i]) for i in range(self.num_tasks)]


class ESMM(BaseModel):
    """Clicks, and conversions among the clicks: two deep branches on one input."""

    def __init__(self) -> None:
        super().__init__()
        self.ctr_dnn = DNN(self.width, (8, 6))
        self.cvr_dnn = DNN(self.width, (8, 6))
        self.ctr_dnn_final_layer = nn.Linear(6, 1, bias=False)
        self.cvr_dnn_final_layer = nn.Linear(6, 1, bias=False)
        self.out = PredictionLayer("binary", use_bias=False)

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        dnn_input = combined_dnn_input(*self.input_from_feature_columns(X))
        ctr_output = self.ctr_dnn(dnn_input)
        cvr_output = self.cvr_dnn(dnn_input)
        ctr_logit = self.ctr_dnn_final_layer(ctr_output)
        cvr_logit = self.cvr_dnn_final_layer(cvr_output)
        ctr_pred = self.out(ctr_logit)
        cvr_pred = self.out(cvr_logit)
        ctcvr_pred = ctr_pred * cvr_pred
        return torch.cat([ctr_pred, ctcvr_pred], -1)


class ParallelCross(BaseModel):
    """Deep and cross in parallel, on one input."""

    def __init__(self, cross_num: int = 2) -> None:
        super().__init__()
        self.cross_num = cross_num
        self.cross = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(cross_num))
        self.dnn = DNN(self.width, (8, 6), use_bn=True)
        self.dnn_linear = nn.Linear(self.width + 6, 1, bias=False)

    def crossnet(self, inputs: Tensor) -> Tensor:
        x_l = inputs
        for i in range(self.cross_num):
            x_l = inputs * self.cross[i](x_l) + x_l
        return x_l

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        dnn_input = combined_dnn_input(*self.input_from_feature_columns(X))
        deep_out = self.dnn(dnn_input)
        cross_out = self.crossnet(dnn_input)
        stack_out = torch.cat((cross_out, deep_out), dim=-1)
        return torch.sigmoid(self.dnn_linear(stack_out))


class DeepFM(BaseModel):
    """A linear part, pairs of features, and a deep part; each looks the features up itself."""

    def __init__(self, use_fm: bool = True) -> None:
        super().__init__()
        self.use_fm = use_fm
        self.linear_dict = nn.ModuleDict(
            {name: nn.Embedding(VOCABULARY, 1) for name in self.sparse}
        )
        self.linear_weight = nn.Parameter(torch.randn(len(self.dense), 1))
        self.dnn = DNN(self.width, (8, 6))
        self.dnn_linear = nn.Linear(6, 1, bias=False)

    def linear_model(self, X: Tensor) -> Tensor:  # noqa: N803
        sparse = [
            self.linear_dict[name](
                X[:, self.feature_index[name][0] : self.feature_index[name][1]].long()
            )
            for name in self.sparse
        ]
        dense = [
            X[:, self.feature_index[name][0] : self.feature_index[name][1]] for name in self.dense
        ]
        logit = torch.zeros([X.shape[0], 1], dtype=X.dtype, device=X.device)
        if len(sparse) > 0:
            sparse_feat_logit = torch.sum(torch.cat(sparse, dim=-1), dim=-1, keepdim=False)
            logit += sparse_feat_logit
        if len(dense) > 0:
            dense_value_logit = torch.cat(dense, dim=-1).matmul(self.linear_weight)
            logit += dense_value_logit
        return logit

    def forward(self, X: Tensor) -> Tensor:  # noqa: N803
        embeddings, values = self.input_from_feature_columns(X)
        logit = self.linear_model(X)
        if self.use_fm and len(embeddings) > 0:
            fm_input = torch.cat(embeddings, dim=1)
            square_of_sum = torch.pow(torch.sum(fm_input, dim=1, keepdim=True), 2)
            sum_of_square = torch.sum(fm_input * fm_input, dim=1, keepdim=True)
            logit += (0.5 * torch.sum(square_of_sum - sum_of_square, dim=2)).view(-1, 1)
        logit += self.dnn_linear(self.dnn(combined_dnn_input(embeddings, values)))
        return torch.sigmoid(logit)


def table(batch: int) -> tuple[Tensor]:
    """Three columns of numbers of a vocabulary, and two of values."""
    sparse = torch.randint(VOCABULARY, (batch, 3)).double()
    return (torch.cat([sparse, randn(batch, 2)], dim=1),)


def fields(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(VOCABULARY, (batch, 3)), randn(batch, 2)


def users_and_items(batch: int) -> tuple[dict[str, Tensor]]:
    return ({"user": randn(batch, 4), "item": randn(batch, 3)},)


def values(width: int) -> Callable[[int], tuple[Tensor]]:
    return lambda batch: (randn(batch, width),)


MODELS = {
    # The numerical layer; eight experts of two layers; two gates; two mixtures; two towers of two
    # layers. Experts and gates read one tensor, so that their first layers are one product, and
    # the second ones are one; the towers are one for each layer, and the mixtures stay.
    # In training each expert draws twice, and one expert after the other. So what is behind the
    # first Dropout of one expert must run before the next expert draws, and stays as it is.
    "mmoe_library": Deep(
        LibraryMMoE,
        fields,
        {
            "products": (1 + 16 + 2 + 2 + 4, 1 + 1 + 1 + 2 + 2),
            "norms": (16 + 2, 2 + 1),
            "activations": (16 + 2 + 2, between(2 + 1 + 1, 2 + 1 + 2)),
            "softmaxes": (2, between(1, 2)),
            "dropouts": (0, 0),
        },
        {
            "products": (25, 1 + 1 + 8 + 2 + 2),
            "norms": (18, 1 + 8 + 1),
            "activations": (20, between(1 + 8 + 1 + 1, 1 + 8 + 1 + 2)),
            "dropouts": (18, 18),
        },
    ),
    # With one Dropout in each expert the order is the same, layer by layer.
    "mmoe_library_shallow": Deep(
        lambda: LibraryMMoE(expert_num=4, bottom=(6,)),
        fields,
        {
            "products": (1 + 4 + 2 + 2 + 4, 1 + 1 + 2 + 2),
            "norms": (4 + 2, 1 + 1),
            "activations": (4 + 2 + 2, between(1 + 1 + 1, 1 + 1 + 2)),
        },
        {"dropouts": (4 + 2, 4 + 2)},
    ),
    # Eight experts of two layers, two gates without bias, two mixtures, two towers of two layers.
    # One sigmoid: the other task is a regression. Dropout(0) does nothing.
    "mmoe_deepctr": Deep(
        DeepCTRMMoE,
        table,
        {
            "products": (16 + 2 + 2 + 4, 2 + 2 + 2),
            "activations": (16 + 2 + 1, 2 + 1 + 1),
            "embeddings": (3, 3),
        },
    ),
    "mmoe_deepctr_norm": Deep(
        lambda: DeepCTRMMoE(use_bn=True),
        table,
        {
            "products": (16 + 2 + 2 + 4, 2 + 2 + 2),
            "norms": (16 + 2, 2 + 1),
            "activations": (16 + 2 + 1, 2 + 1 + 1),
        },
    ),
    # Six experts of two layers and three towers of two; the gates are no layers, and stay three
    # products, unless somebody thinks of them too. One Dropout in each branch.
    "mmoe_parameters": Deep(
        ParameterMMoE,
        values(7),
        {
            "products": (12 + 3 + 6, between(2 + 1 + 2, 2 + 3 + 2)),
            "activations": (6 + 3 + 3, between(1 + 1 + 1, 1 + 1 + 3)),
        },
        {"dropouts": (6 + 3, 6 + 3)},
    ),
    # Four experts of two layers, of which the first go with the three gates; three mixtures; three
    # towers of two layers.
    "mmoe_dict": Deep(
        DictMMoE,
        users_and_items,
        {
            "products": (8 + 3 + 3 + 6, 2 + 0 + 3 + 2),
            "activations": (8 + 3, 2 + 1),
        },
    ),
    # On the first level six experts and three gates on one tensor, and three mixtures. On the
    # second, two experts and a gate for each task, two shared experts: one product for each of
    # three inputs, or fewer; two mixtures; the towers.
    "ple": Deep(
        PLE,
        values(7),
        {
            "products": (6 + 3 + 3 + 6 + 2 + 2 + 2, between(1 + 3 + 1 + 2 + 1, 1 + 3 + 3 + 2 + 1)),
            "activations": (12, between(2, 4)),
        },
    ),
    # Two branches of three layers.
    "esmm": Deep(
        ESMM,
        table,
        {"products": (6, 3), "activations": (4 + 2, between(2 + 1, 2 + 2))},
    ),
    # Only the first layers of cross and deep part read one tensor.
    "parallel_cross": Deep(
        ParallelCross, table, {"products": (2 + 2 + 1, 4), "norms": (2, 2), "embeddings": (3, 3)}
    ),
    # Three features, each looked up in two tables: one wide table each, and one cast.
    "deepfm": Deep(
        DeepFM, table, {"products": (4, 4), "embeddings": (6, 3), "copies": (6, between(3, 6))}
    ),
}
