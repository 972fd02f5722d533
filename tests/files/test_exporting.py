"""`conjoin export`: files that compute what the model does, or no files."""

import os
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from test_cli import Capture, fail, module_of, succeed
from torch import nn

import conjoin
from conjoin.files import exporting

aten = torch.ops.aten

NETS = """
import torch
from torch import nn

class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.q, self.k, self.v = (nn.Linear(8, n, bias=n == 8) for n in (8, 8, 8))
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens, *, scale=None):
        x = self.drop(self.table(tokens))
        y = (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)
        y = self.norm(x + y)
        return {"states": y if scale is None else y * scale[:, None, None], "tokens": tokens}

class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x

class Draws(Decides):
    def forward(self, x):
        return self.layer(x) + torch.randn(8).to(x)

class Counts(Decides):
    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.steps.add_(1)
        return self.layer(x) * self.steps

class Sizes(Decides):
    def __init__(self, decides):
        super().__init__()
        self.decides = decides

    def forward(self, x):
        return self.layer(x) if self.decides(x.shape[0]) else x

def above_four():
    return Sizes(lambda size: size > 4)

def even():
    return Sizes(lambda size: size % 2 == 0)

def not_seven():
    return Sizes(lambda size: size != 7)

def double():
    return Decides().double()

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.ReLU()) for _ in range(3)
        )

    def forward(self, x):
        return torch.stack([expert(x) for expert in self.experts], 1)

def experts():
    torch.manual_seed(0)
    model = Experts().double()
    for expert in model.experts:
        nn.init.normal_(expert[1].weight)
        nn.init.normal_(expert[1].bias)
    return model

def convolution():
    return nn.Conv1d(2, 3, 1).double()

class Small(Decides):
    def forward(self, x):
        return self.layer(x) if x.shape[0] < 9 else x
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return module_of(NETS, tmp_path, monkeypatch)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Conv2d(4, n, 1), nn.BatchNorm2d(n), nn.ReLU()) for n in (3, 5)]
    stem = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
    model = nn.Sequential(*stem, conjoin.nn.Parallel(*branches), conjoin.nn.Unite())
    model(torch.randn(8, 2, 6, 6))  # Running statistics that are not those of a new layer.
    return model


@pytest.fixture
def whole(tmp_path: Path, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    torch.save(model, "whole.pt")
    return "whole.pt"


def exported(capsys: Capture, whole: str, out: str, *options: str) -> str:
    return succeed(
        *(capsys, "export", whole, "-o", out, "--trust-pickle", "--input", "4x2x6x6", *options)
    )


def convolutions(program: torch.export.ExportedProgram) -> int:
    return sum(node.target is aten.conv2d.default for node in program.graph.nodes)


def onnx(path: str, *inputs: torch.Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    arrays = session.run(None, {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
    return [torch.from_numpy(array) for array in arrays]


def test_a_program_has_the_original_layers(capsys: Capture, whole: str, model: nn.Module) -> None:
    out = exported(capsys, whole, "plain.pt2")
    assert out.startswith("equal: 1 output of plain.pt2 on the inputs; largest difference 0.0e+00")
    assert out.endswith("\nwrote plain.pt2\n")
    program = torch.export.load("plain.pt2")
    assert convolutions(program) == 3
    assert {*program.state_dict} == {*model.state_dict()}
    assert all(torch.equal(t, model.state_dict()[k]) for k, t in program.state_dict.items())
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(program.module()(x), model.eval()(x), rtol=0, atol=0)
    assert sorted(os.listdir()) == ["plain.pt2", "whole.pt"]


def test_a_fused_program_has_wide_layers(capsys: Capture, whole: str, model: nn.Module) -> None:
    exported(capsys, whole, "fused.pt2", "--fused")
    program = torch.export.load("fused.pt2")
    assert convolutions(program) == 2
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(program.module()(x), model.eval()(x))


def test_an_optimized_model_has_its_layers_back(capsys: Capture, whole: str) -> None:
    succeed(*(capsys, "optimize", whole, "-o", "fused.pt", "--trust-pickle", "--input", "4x2x6x6"))
    for options, count in (((), 3), (("--fused",), 2)):
        exported(capsys, "fused.pt", "out.pt2", "--force", *options)
        assert convolutions(torch.export.load("out.pt2")) == count


def test_for_batches_of_any_size(capsys: Capture, nets: str) -> None:
    inputs = ("--input", "3x5:int64", "--input", "scale=3", "--dynamic-batch", "--fused")
    out = succeed(capsys, "export", f"{nets}:Tagger", "-o", "any.pt2", *inputs)
    assert "on the inputs and twice as large a batch" in out
    assert "\nfused: 6 tensors of layers became 2\n" in out
    program = torch.export.load("any.pt2")
    assert sum(node.target is aten.linear.default for node in program.graph.nodes) == 1
    found = program.module()(torch.ones(7, 5, dtype=torch.int64), scale=torch.ones(7))
    assert found["states"].shape == (7, 5, 8)


def test_what_has_nothing_to_merge_says_so(capsys: Capture, nets: str) -> None:
    out = succeed(capsys, "export", f"{nets}:Draws", "-o", "a.pt2", "--input", "4x8", "--fused")
    assert "\nfused: nothing could be merged\n" in out


def test_onnx(capsys: Capture, whole: str, model: nn.Module) -> None:
    exported(capsys, whole, "any.onnx", "--fused", "--dynamic-batch")
    x = torch.randn(5, 2, 6, 6)
    torch.testing.assert_close(onnx("any.onnx", x), [model.eval()(x)], rtol=1e-4, atol=1e-5)


def test_onnx_of_inputs_by_name_and_of_integers(capsys: Capture, nets: str) -> None:
    inputs = ("--input", "3x5:int64", "--input", "scale=3", "--dynamic-batch")
    out = succeed(capsys, "export", f"{nets}:Tagger", "-o", "tagger.onnx", *inputs)
    assert out.startswith("equal: 2 outputs of tagger.onnx")
    states, tokens = onnx("tagger.onnx", torch.ones(2, 5, dtype=torch.int64), torch.ones(2))
    assert states.shape == (2, 5, 8)
    assert torch.equal(tokens, torch.ones(2, 5, dtype=torch.int64))


def test_onnx_of_merged_layer_norms_of_float64(capsys: Capture, nets: str) -> None:
    options = ("--input", "3x8:float64", "--dynamic-batch", "--fused")
    out = succeed(capsys, "export", f"{nets}:experts", "-o", "experts.onnx", *options)
    assert "\nfused: 12 tensors of layers became 4\n" in out
    succeed(capsys, "export", f"{nets}:experts", "-o", "experts.pt2", *options[:-1])
    program, x = torch.export.load("experts.pt2"), torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(onnx("experts.onnx", x), [program.module()(x)])
    torch.export.save(program.run_decompositions(), "decomposed.pt2")
    out = succeed(capsys, "export", "decomposed.pt2", "-o", "again.onnx", "--fused")
    assert "\nfused: 12 tensors of layers became 4\n" in out
    torch.testing.assert_close(onnx("again.onnx", x), [program.module()(x)])


def test_what_onnx_runtime_does_not_run(capsys: Capture, nets: str) -> None:
    options = ("--input", "3x2x4:float64")
    message = fail(capsys, "export", f"{nets}:convolution", "-o", "out.onnx", *options)
    assert "Could not find an implementation for Conv" in message
    assert "export the model in that, after model.float()" in message


def test_batches_up_to_a_limit(capsys: Capture, nets: str) -> None:
    options = "-o", "out.pt2", "--dynamic-batch", "--input"
    out = succeed(capsys, "export", f"{nets}:Small", *options, "4x8")
    assert "\nfor batches of 8 at most, which the model decides\n" in out
    program = torch.export.load("out.pt2")
    assert [program.module()(torch.randn(n, 8)).shape[0] for n in (1, 8)] == [1, 8]
    message = fail(capsys, "export", f"{nets}:Small", *options, "5x8", "--force")
    assert "for batches of 8 at most" in message
    assert "give --input shapes of a batch of 4 or less" in message


@pytest.mark.parametrize("out", ["out.pt2", "out.onnx"])
@pytest.mark.parametrize("decides", ["above_four", "even", "not_seven"])
def test_batches_that_the_model_tells_apart_otherwise(
    capsys: Capture, nets: str, decides: str, out: str
) -> None:
    """A file of ONNX would compute for the others what the model computes for these."""
    options = "--input", "6x8", "--dynamic-batch"
    message = fail(capsys, "export", f"{nets}:{decides}", "-o", out, *options)
    assert "torch.export cannot export the model" in message
    assert not Path(out).exists()


def test_an_exported_program_is_exported_again(
    capsys: Capture, whole: str, model: nn.Module
) -> None:
    exported(capsys, whole, "plain.pt2")
    succeed(capsys, "export", "plain.pt2", "-o", "fused.pt2", "--fused")
    assert convolutions(torch.export.load("fused.pt2")) == 2
    succeed(capsys, "export", "fused.pt2", "-o", "again.pt2")
    assert convolutions(torch.export.load("again.pt2")) == 3
    message = fail(capsys, "export", "plain.pt2", "-o", "any.onnx", "--dynamic-batch")
    assert "has its sizes already" in message
    succeed(capsys, "export", "plain.pt2", "-o", "plain.onnx")
    x = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(onnx("plain.onnx", x), [model.eval()(x)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_another_function_is_not_written(
    capsys: Capture, whole: str, monkeypatch: pytest.MonkeyPatch, fused: bool
) -> None:
    def broken(model: nn.Sequential, **_: object) -> nn.Module:
        return model.append(nn.Softplus())

    if fused:
        other = torch.export.export(nn.Softplus(), (torch.randn(4, 2, 6, 6),))
        monkeypatch.setattr(conjoin, "optimize", lambda program: other)
    else:
        monkeypatch.setattr(conjoin, "unfuse", broken)
    Path("out.pt2").write_text("precious")
    arguments = ("-o", "out.pt2", "--force", "--trust-pickle", "--input", "4x2x6x6")
    message = fail(capsys, "export", whole, *arguments, *["--fused"] * fused)
    assert "is another function, so nothing is written: output[0] " in message
    assert "differs by" in message or fused
    assert Path("out.pt2").read_text() == "precious"
    assert sorted(os.listdir()) == ["out.pt2", "whole.pt"]


def test_what_cannot_be_exported(capsys: Capture, nets: str) -> None:
    before = sorted(os.listdir())
    for name, arguments, words in (
        ("Decides", ["--input", "4x8"], "torch.export cannot export the model: "),
        ("Draws", ["--input", "4x9"], "the model does not run on the inputs: RuntimeError"),
        ("Decides", ["--input", "1x8", "--dynamic-batch"], "a batch of 2 or more"),
        ("Decides", ["--input", "scalar", "--dynamic-batch"], "a batch of 2 or more"),
        ("Decides", [], "give them with --input"),
    ):
        assert words in fail(capsys, "export", f"{nets}:{name}", "-o", "out.pt2", *arguments)
    for out in ("out", "out.pt", "out.onnx.txt"):
        message = fail(capsys, "export", f"{nets}:Draws", "-o", out, "--input", "4x8")
        assert "let its name end in .pt2 or .onnx" in message
    assert sorted(set(os.listdir()) - {"__pycache__"}) == before


def test_what_draws_numbers_is_compared_with_the_same_ones(capsys: Capture, nets: str) -> None:
    succeed(capsys, "export", f"{nets}:Draws", "-o", "out.pt2", "--input", "4x8")
    message = fail(capsys, "export", f"{nets}:Draws", "-o", "out.onnx", "--input", "4x8")
    assert "another function" in message


@pytest.mark.parametrize("options", [[], ["--dynamic-batch"]])
def test_what_trial_runs_change_is_not_in_the_file(
    capsys: Capture, nets: str, options: list[str]
) -> None:
    succeed(capsys, "export", f"{nets}:Counts", "-o", "out.pt2", "--input", "4x8", *options)
    assert torch.export.load("out.pt2").state_dict["steps"] == 0


class WithoutGradients(nn.Module):
    """A normalization in a part of the program that runs in another mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = self.norm(x)
        y: torch.Tensor = self.layer(x)
        return y


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)), WithoutGradients()],
    ids=["plainly", "within"],
)
def test_a_program_in_training_mode_is_refused(
    capsys: Capture, nets: str, model: nn.Module
) -> None:
    torch.export.save(torch.export.export(model, (torch.randn(3, 8),)), "trained.pt2")
    message = fail(capsys, "export", "trained.pt2", "-o", "out.pt2")
    assert "was exported in training mode" in message
    assert not Path("out.pt2").exists()


def test_an_existing_file_needs_force(capsys: Capture, whole: str) -> None:
    Path("out.onnx").write_text("precious")
    message = fail(capsys, "export", whole, "-o", "out.onnx", "--trust-pickle")
    assert "exists already" in message
    assert Path("out.onnx").read_text() == "precious"


def test_onnx_without_its_packages(
    capsys: Capture, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = exporting.importlib.util.find_spec
    monkeypatch.setattr(
        exporting.importlib.util,
        "find_spec",
        lambda name: None if name in ("onnx", "onnxruntime") else known(name),
    )
    arguments = ("--trust-pickle", "--input", "4x2x6x6")
    message = fail(capsys, "export", whole, "-o", "out.onnx", *arguments)
    assert "without onnx and onnxruntime: install them with pip install 'conjoin[onnx]'" in message
    succeed(capsys, "export", whole, "-o", "out.pt2", *arguments)
