"""On a GPU: what needs one, small and quick. `pytest -m gpu` runs these alone."""

import copy
import io

import pytest
import torch
from benchmarks import run
from benchmarks.memory import measure_here
from benchmarks.peers import PEERS
from equivalence import assert_close, assert_same_state, gradients
from families import wide_runs
from torch import nn

import conjoin
from conjoin.layers.view import wides
from conjoin.policy import machine
from conjoin.tracing.modes import unrounded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
]

ROWS = (4, 16)

WORKING_SPACE = 64
"""MiB that libraries may take while a product runs, which is in no prediction."""


@pytest.fixture(autouse=True)
def _unrounded():
    with unrounded():
        yield


class Towers(nn.Module):
    """Its forward is rewritten, and two levels of it are merged"""

    def __init__(self):
        super().__init__()
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)) for _ in range(3)
        )

    def forward(self, x):
        return [tower(x) for tower in self.towers]


class Heads(nn.Module):
    """Its heads run in lockstep: what it keeps tells the forward where to go on"""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 4), nn.Linear(16, 8)
        self.seen = []

    def forward(self, x):
        try:
            return [self.a(x), self.b(x)]
        finally:
            self.seen.append(1)


class Images(nn.Module):
    """Convolutions, BatchNorm, and a second level"""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
            for _ in range(2)
        )

    def forward(self, x):
        x = x.view(4, 2, 2, 4).repeat(1, 1, 2, 1)
        return [branch(x) for branch in self.branches]


class Tables(nn.Module):
    """Tables that read a column each"""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9 + number, 4) for number in range(8))

    def forward(self, x):
        x = (x * 4).long()
        return [table(x[:, number]) for number, table in enumerate(self.tables)]


MODELS = (Towers, Heads, Images, Tables)
every_model = pytest.mark.parametrize("model_class", MODELS)


def made(model_class, device="cuda"):
    """A model, the same one optimized, and something to call them with."""
    torch.manual_seed(0)
    plain, x = model_class().to(device), torch.rand(ROWS, device=device)
    return plain, conjoin.optimize(plain, (x,), policy="always"), x


def outputs(model, x):
    return {str(number): output.detach() for number, output in enumerate(model(x))}


def trained(model, x):
    """The gradients of a step, by the names of the plain model."""
    model.zero_grad()
    sum(output.float().sin().sum() for output in model(x)).backward()
    return gradients(model)


@every_model
def test_the_model_is_what_it_was(model_class):
    plain, model, x = made(model_class)
    assert conjoin.report(model, (x,)).groups[0].fused
    assert conjoin.verify(plain, model, (x,))
    assert_same_state(conjoin.unfuse(model), plain)


@every_model
def test_a_model_that_is_moved_afterwards(model_class):
    plain, model, x = made(model_class, "cpu")
    model.cuda()
    assert all(wide.weight.is_cuda for wide in wides(model))
    assert conjoin.verify(copy.deepcopy(plain).cuda(), model, (x.cuda(),))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False, map_location="cpu")
    assert conjoin.verify(plain, loaded, (x,))


@every_model
def test_no_step_waits_for_the_gpu(model_class):
    _, model, x = made(model_class)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for training in (True, False):
                model.train(training)
                with torch.set_grad_enabled(training):
                    found = model(x)
                if training:
                    sum(output.sum() for output in found).backward()
                    optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(model_class, dtype):
    plain, model, x = made(model_class)
    with torch.autocast("cuda", dtype):
        ours, theirs = outputs(model, x), outputs(plain, x)
        ours |= trained(model, x)
        theirs |= trained(plain, x)
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        torch.testing.assert_close(ours[name], expected, rtol=0.05, atol=0.05)


def test_a_gradient_scaler_and_fused_adam_train_as_they_did():
    plain, model, x = made(Towers)
    states = []
    for each in (plain, model):
        optimizer = torch.optim.Adam(each.parameters(), lr=1e-3, fused=True)
        scaler = torch.amp.GradScaler("cuda")
        for _ in range(2):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = sum(output.float().square().sum() for output in each(x))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        states.append(conjoin.checkpoints.separate(optimizer, each)["state"])
    for theirs, ours in zip(*(state.values() for state in states), strict=True):
        assert ours["step"].equal(theirs["step"])
        torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=0.05, atol=0.05)


def test_siblings_on_two_streams_run_by_themselves():
    plain, model, x = made(Heads)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with wide_runs() as runs, torch.no_grad():
        first = model.a(x)
        with torch.cuda.stream(other):
            second = model.b(x)
    torch.cuda.synchronize()
    assert len(runs) == 2
    assert_close({"a": first, "b": second}, {"a": plain.a(x), "b": plain.b(x)})


def captured(model, x):
    """A graph of the model, and what it writes to."""
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = model(x)
    return graph, found


@every_model
def test_a_graph_of_the_model(model_class):
    plain, model, x = made(model_class)
    plain.eval(), model.eval()
    graph, found = captured(model, x)
    x.copy_(torch.rand(ROWS))
    graph.replay()
    assert_close(dict(enumerate(found)), dict(enumerate(plain(x))))


def test_a_graph_of_each_sibling():
    plain, model, x = made(Heads)
    model.a(x)  # Leaves a part over.
    graphs = [captured(layer, x) for layer in (model.b, model.a)]
    x.copy_(torch.rand(ROWS))
    for (graph, found), layer in zip(graphs, (plain.b, plain.a), strict=True):
        graph.replay()
        assert_close({"output": found}, {"output": layer(x)})


@pytest.mark.parametrize("model_class", [Towers, Heads, Images])
def test_a_graph_of_a_step_of_training(model_class):
    plain, model, x = made(model_class)
    expected = trained(plain, x)
    graphed = torch.cuda.make_graphed_callables(model, (torch.rand_like(x),))
    sum(output.sin().sum() for output in graphed(x)).backward()
    assert_close(gradients(model), expected)


def test_what_is_measured_of_the_gpu():
    found = machine.measure(torch.device("cuda"), torch.float32)
    assert machine._is_possible(found)


def test_a_race_and_a_budget():
    plain, _, x = made(Towers)
    for settings in ({"policy": "measure"}, {"memory_budget": 0.9}):
        assert conjoin.verify(plain, conjoin.optimize(plain, (x,), **settings), (x,))


@pytest.mark.parametrize("form", ["plain", "optimized"])
def test_the_predicted_peak(form):
    found = measure_here("gated_train", "training", form, "cuda")
    beyond = found["measured_mib"] - found["predicted_mib"]
    assert -0.1 * found["predicted_mib"] < beyond < WORKING_SPACE


def test_what_is_compared_is_kept_off_the_gpu():
    model, x = nn.Linear(1024, 1024, device="cuda"), torch.rand(2, 1024, device="cuda")
    peaks = []
    for calls in (1, 1, 4):  # The first of all takes working space that libraries keep.
        torch.cuda.reset_peak_memory_stats()
        assert conjoin.verify(model, model, [(x,)] * calls)
        peaks.append(torch.cuda.max_memory_allocated())
    a_copy = 8 * model.weight.numel()
    assert peaks[2] < peaks[1] + a_copy


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_another_gpu_than_the_current_one():
    plain, model, x = made(Towers, "cuda:1")
    assert torch.cuda.current_device() == 0
    assert conjoin.verify(plain, model, (x,))


def test_the_benchmark_runs_every_peer_that_does_not_compile(capsys):
    names = [peer.name for peer in PEERS.values() if not peer.compiles]
    arguments = ["widen_8", "--device", "cuda", "--seconds", "0.01", "--peers", ",".join(names)]
    assert run.main(arguments) == 0
    assert "none: " not in capsys.readouterr().out
