"""The command line: what it prints, what it writes, and one sentence where the input is wrong."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

import conjoin
from conjoin import cli, options

NETS = """
import os
import time
import torch

class Heads(torch.nn.Module):
    def __init__(self, width=8, *, bias=True):
        super().__init__()
        self.mean = torch.nn.Linear(width, 2, bias=bias)
        self.log_var = torch.nn.Linear(width, 2, bias=bias)

    def forward(self, x):
        return self.mean(x), self.log_var(x)

class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(3, 8)
        self.heads = Heads()

    def forward(self, tokens, *, mask=None):
        x = self.table(tokens)
        return self.heads(x if mask is None else x * mask[..., None])

class Leaving(Heads):
    def forward(self, x):
        raise SystemExit(3)

class Uncopied(Heads):
    def __deepcopy__(self, memo):
        raise LookupError("not this one")

class Lazy(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.LazyLinear(2), torch.nn.LazyLinear(2)

    def forward(self, x):
        return self.a(x) + self.b(x)

def unsound():
    traced = torch.fx.symbolic_trace(Heads())
    del traced.mean
    return traced

def elsewhere():
    os.mkdir("elsewhere")
    os.chdir("elsewhere")
    return Heads()

class Slow(torch.nn.Module):
    def __getstate__(self):
        print("saving", flush=True)
        time.sleep(60)
"""


def module_of(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in a folder, which is the current one then, of a name that no other test uses."""
    name = f"nets_{folder.name}"
    (folder / f"{name}.py").write_text(source)
    monkeypatch.chdir(folder)
    return name


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    return module_of(NETS, tmp_path, monkeypatch)


@pytest.fixture
def heads() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(conjoin.nn.Parallel(nn.Linear(8, 2), nn.Linear(8, 3)), conjoin.nn.Unite())


@pytest.fixture
def whole(tmp_path: Path, heads: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    torch.save(heads, "whole.pt")
    return "whole.pt"


@pytest.fixture
def exported(tmp_path: Path, heads: nn.Module, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(heads, (torch.randn(4, 8),)), "program.pt2")
    return "program.pt2"


Capture = pytest.CaptureFixture[str]


def succeed(capsys: Capture, *argv: str) -> str:
    status = cli.main(argv)
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


def fail(capsys: Capture, *argv: str) -> str:
    """The sentence that a wrong command line gets."""
    assert cli.main(argv) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("conjoin: error: ")
    assert printed.err.count("\n") == 1
    assert "Traceback" not in printed.err
    return printed.err


def command(*argv: str, **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "conjoin", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


# What it prints


def test_a_saved_module_is_reported(capsys: Capture, whole: str) -> None:
    out = succeed(capsys, "report", whole, "--trust-pickle", "--input", "4x8")
    assert "0.{0,1}" in out
    assert "2+3 -> 5" in out
    assert "forward" in out


def test_formats(capsys: Capture, whole: str) -> None:
    arguments = ("report", whole, "--trust-pickle", "--input", "4x8", "--format")
    report = json.loads(succeed(capsys, *arguments, "json"))
    assert report["groups"][0]["layers"] == ["0.0", "0.1"]
    assert report["launches"]["before"]["forward"] == 3
    assert "|" in succeed(capsys, *arguments, "markdown")
    assert "2+3 -> 5" in succeed(capsys, *arguments, "table")


def test_without_inputs_nothing_is_counted(capsys: Capture, whole: str) -> None:
    report = json.loads(succeed(capsys, "report", whole, "--trust-pickle", "--format", "json"))
    assert report["groups"][0]["fused"]
    assert report["launches"]["before"]["forward"] is None


def test_an_exported_program_is_reported_on_its_own_inputs(capsys: Capture, exported: str) -> None:
    report = json.loads(succeed(capsys, "report", exported, "--format", "json"))
    assert [(g["layers"], g["fused"]) for g in report["groups"]] == [(["0.0", "0.1"], True)]
    assert report["launches"]["before"]["forward"] == 3
    assert report["launches"]["after"]["forward"] == 1  # What is joined needs no joint.


def test_factories_of_the_current_folder(capsys: Capture, nets: str) -> None:
    arguments = ("--arg", "16", "--arg", "bias=False", "--input", "4x16", "--format", "json")
    report = json.loads(succeed(capsys, "report", f"{nets}:Heads", *arguments))
    assert report["groups"][0]["layers"] == ["mean", "log_var"]
    assert report["groups"][0]["fused"]


def test_inputs_by_name_and_of_integers(capsys: Capture, nets: str) -> None:
    inputs = ("--input", "4x5:int64", "--input", "mask=4x5:bool")
    report = json.loads(succeed(capsys, "report", f"{nets}:Tokens", *inputs, "--format", "json"))
    assert [group["layers"] for group in report["groups"]] == [["heads.mean", "heads.log_var"]]


def test_the_current_folder_does_not_stay_importable(capsys: Capture, nets: str) -> None:
    before = list(sys.path)
    succeed(capsys, "report", f"{nets}:Heads")
    assert sys.path == before


def test_example_inputs_leave_the_random_stream_alone(capsys: Capture, whole: str) -> None:
    torch.manual_seed(3)
    expected = torch.randn(2)
    torch.manual_seed(3)
    succeed(capsys, "report", whole, "--trust-pickle", "--input", "4x8")
    assert torch.equal(torch.randn(2), expected)


def test_version_and_help(capsys: Capture) -> None:
    for arguments, words in (
        (["--version"], f"conjoin {conjoin.__version__}\n"),
        (["--help"], "unfuse"),
        (["report", "--help"], "--trust-pickle"),
        (["optimize", "--help"], "--force"),
    ):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 0
        assert words in capsys.readouterr().out


@pytest.mark.filterwarnings("error")
def test_an_input_on_the_cpu_starts_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: pytest.fail("it is started"))
    before = torch.get_rng_state()
    options.example(*options.input_specs(["2x3"]), torch.device("cpu"))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("1x3x8x9", (1, 3, 8, 9), torch.float32),
        ("8", (8,), torch.float32),
        ("scalar", (), torch.float32),
        ("scalar:int64", (), torch.int64),
        ("2x3:bfloat16", (2, 3), torch.bfloat16),
        ("2:complex64", (2,), torch.complex64),
        ("2:uint8", (2,), torch.uint8),
        ("2:bool", (2,), torch.bool),
    ],
)
def test_example_inputs(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    made = [options.example(*options.input_specs([text]), torch.device("cpu")) for _ in range(2)]
    assert made[0].shape == shape
    assert made[0].dtype == dtype
    assert torch.equal(*made)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-3", -3),
        ("(1, 2)", (1, 2)),
        ("None", None),
        ("'a=b'", "a=b"),
        ("resnet18", "resnet18"),
        ("../data", "../data"),
        ("", ""),
    ],
)
def test_factory_arguments(text: str, value: object) -> None:
    assert options.arguments([text]).positional == (value,)
    assert options.arguments([f"name={text}"]).keywords == {"name": value}


# What it writes


def test_optimize_and_unfuse(capsys: Capture, whole: str, heads: nn.Module) -> None:
    x = torch.randn(5, 8)
    out = succeed(capsys, "optimize", whole, "-o", "fused.pt", "--trust-pickle", "--input", "4x8")
    assert "2+3 -> 5" in out
    assert out.endswith("wrote fused.pt\n")
    fused = torch.load("fused.pt", weights_only=False)
    assert [tuple(p.shape) for p in fused.parameters()] == [(5, 8), (5,)]
    torch.testing.assert_close(fused(x), heads(x))

    out = succeed(capsys, "unfuse", "fused.pt", "-o", "plain.pt", "--trust-pickle")
    assert out == "wrote plain.pt\n"
    plain = torch.load("plain.pt", weights_only=False)
    assert type(plain) is type(heads)
    assert list(plain.state_dict()) == list(heads.state_dict())
    assert all(torch.equal(plain.state_dict()[k], v) for k, v in heads.state_dict().items())
    assert sorted(os.listdir()) == ["fused.pt", "plain.pt", "whole.pt"]


VERIFIED = "equal: 1 call in training and evaluation mode"
UNVERIFIED = "not verified: there are no inputs to run the model on (give them with --input)"
OPTIMIZE = ("optimize", "whole.pt", "-o", "fused.pt", "--trust-pickle")


def forgetful(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("only leaves can be copied")


def test_what_is_written_was_verified(capsys: Capture, whole: str) -> None:
    out = succeed(capsys, *OPTIMIZE, "--input", "4x8")
    assert f").\n\n{VERIFIED}" in out
    assert "2 outputs, 5 gradients" not in out  # The branches are united.
    assert "1 output, 5 gradients" in out


def test_without_inputs_the_output_says_that_nothing_was_verified(
    capsys: Capture, whole: str
) -> None:
    assert f"\n\n{UNVERIFIED}\nwrote fused.pt\n" in succeed(capsys, *OPTIMIZE)


def test_inputs_by_name_are_enough_to_verify(capsys: Capture, nets: str) -> None:
    arguments = ("optimize", f"{nets}:Heads", "-o", "fused.pt", "--input", "x=4x8")
    assert VERIFIED in succeed(capsys, *arguments)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_verifying_a_model_of_another_dtype(
    capsys: Capture, heads: nn.Module, whole: str, dtype: str
) -> None:
    torch.save(heads.to(getattr(torch, dtype)), whole)
    assert "in float64\n" in succeed(capsys, *OPTIMIZE, "--input", f"4x8:{dtype}")


def test_another_function_is_not_written(
    capsys: Capture, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: nn.Sequential, *_: object, **__: object) -> nn.Module:
        return model.append(nn.Softplus())

    with monkeypatch.context() as patch:
        patch.setattr(conjoin, "optimize", broken)
        message = fail(capsys, *OPTIMIZE, "--input", "4x8")
        assert "another function, so nothing is written" in message
        assert "in training mode, call 1, output: differs by" in message
        assert os.listdir() == [whole]
        out = succeed(capsys, *OPTIMIZE, "--input", "4x8", "--no-verify")
    assert "not verified, as --no-verify says\nwrote fused.pt\n" in out


def test_no_verify_copies_no_model(
    capsys: Capture, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.copy, "deepcopy", forgetful)
    message = fail(capsys, *OPTIMIZE, "--input", "4x8")
    assert "cannot be copied to verify it (RuntimeError: only leaves can be copied)" in message
    assert "--no-verify" in message
    assert os.listdir() == [whole]


def test_a_factory_can_be_written(capsys: Capture, nets: str) -> None:
    succeed(capsys, "optimize", f"{nets}:Heads", "-o", "fused.pt")
    assert "mean" in succeed(capsys, "report", "fused.pt", "--trust-pickle")


def test_an_existing_file_needs_force(capsys: Capture, whole: str) -> None:
    before = Path(whole).read_bytes()
    Path("other.pt").write_text("precious")
    for name in ("optimize", "unfuse"):
        message = fail(capsys, name, whole, "-o", whole, "--trust-pickle")
        assert "is the file that is read" in message
        assert "--force" in message
        assert "exists already" in fail(capsys, name, whole, "-o", "other.pt", "--trust-pickle")
    assert Path(whole).read_bytes() == before
    assert Path("other.pt").read_text() == "precious"
    succeed(capsys, "optimize", whole, "-o", whole, "--trust-pickle", "--force")
    assert "already" not in succeed(capsys, "report", whole, "--trust-pickle")
    assert Path(whole).read_bytes() != before


def test_nothing_is_written_where_the_input_is_wrong(capsys: Capture, whole: str) -> None:
    fail(capsys, "optimize", whole, "-o", "out.pt")
    fail(capsys, "optimize", whole, "-o", "out.pt", "--trust-pickle", "--input", "4x9")
    fail(capsys, "optimize", "missing.pt", "-o", "out.pt")
    assert os.listdir() == [whole]


# Exported programs


def test_an_exported_program_goes_there_and_back(capsys: Capture, exported: str) -> None:
    before = Path(exported).read_bytes()
    out = succeed(capsys, "optimize", exported, "-o", "fused.pt2")
    assert "1 fused" in out
    assert "equal: 1 call in the mode that it was exported in, in float32" in out
    assert out.endswith("\nwrote fused.pt2\n")
    fused = torch.export.load("fused.pt2")
    assert sorted(map(str, (t.shape for t in fused.state_dict.values()))) == [
        "torch.Size([5, 8])",
        "torch.Size([5])",
    ]
    out = succeed(capsys, "unfuse", "fused.pt2", "-o", "plain.pt2")
    assert out.startswith("equal: ")
    assert out.endswith("\nwrote plain.pt2\n")
    original, plain = torch.export.load(exported), torch.export.load("plain.pt2")
    assert str(plain) == str(original)
    assert list(plain.state_dict) == list(original.state_dict)
    for name, tensor in original.state_dict.items():
        assert torch.equal(plain.state_dict[name], tensor)
    assert Path(exported).read_bytes() == before
    assert sorted(os.listdir()) == ["fused.pt2", "plain.pt2", exported]


def test_a_fused_program_reports_what_is_fused(capsys: Capture, exported: str) -> None:
    succeed(capsys, "optimize", exported, "-o", "fused.pt2")
    reports = [succeed(capsys, "report", file) for file in (exported, "fused.pt2")]
    assert reports[0] == reports[1]
    assert "1 fused" in reports[0]
    assert "3 -> 1" in reports[0]
    other = succeed(capsys, "report", exported, "--input", "4x8")
    assert other == reports[0]


def test_a_program_is_verified_unless_told_otherwise(
    capsys: Capture, exported: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimize = conjoin.optimize

    def wrong(program: torch.export.ExportedProgram, **limits: Any) -> object:
        fused = optimize(program, **limits)
        next(iter(fused.state_dict.values())).data[0] += 1
        return fused

    monkeypatch.setattr(conjoin, "optimize", wrong)
    message = fail(capsys, "optimize", exported, "-o", "fused.pt2")
    assert "another function, so nothing is written" in message
    assert os.listdir() == [exported]
    out = succeed(capsys, "optimize", exported, "-o", "fused.pt2", "--no-verify")
    assert "not verified, as --no-verify says" in out
    assert sorted(os.listdir()) == ["fused.pt2", exported]


def test_a_program_that_does_not_run_on_its_inputs(capsys: Capture, exported: str) -> None:
    message = fail(capsys, "optimize", exported, "-o", "fused.pt2", "--input", "4x9")
    assert "run on the example inputs" in message
    assert os.listdir() == [exported]


def test_a_program_and_a_module_keep_their_suffixes(
    capsys: Capture, exported: str, whole: str
) -> None:
    for name in ("optimize", "unfuse"):
        assert "ends in .pt2" in fail(capsys, name, exported, "-o", "out.pt")
        message = fail(capsys, name, whole, "-o", "out.pt2", "--trust-pickle")
        assert "ends in .pt\n" in message
    assert "exists already" in fail(capsys, "optimize", exported, "-o", whole)
    assert "is read" in fail(capsys, "optimize", exported, "-o", exported)
    assert sorted(os.listdir()) == [exported, whole]


def test_a_cut_program_is_refused(capsys: Capture, exported: str) -> None:
    Path("cut.pt2").write_bytes(Path(exported).read_bytes()[:-200])
    for name in ("optimize", "unfuse"):
        assert "damaged" in fail(capsys, name, "cut.pt2", "-o", "out.pt2")
    assert sorted(os.listdir()) == ["cut.pt2", exported]


def test_a_changed_program_is_not_unfused(capsys: Capture, exported: str) -> None:
    succeed(capsys, "optimize", exported, "-o", "fused.pt2")
    changed = torch.export.load("fused.pt2").run_decompositions()
    torch.export.save(changed, "changed.pt2")
    message = fail(capsys, "unfuse", "changed.pt2", "-o", "plain.pt2")
    assert "unfuse it before other passes" in message


# Wrong input


def test_wrong_files(capsys: Capture, whole: str, heads: nn.Module) -> None:
    torch.save(heads.state_dict(), "state.pt")
    Path("empty.pt").touch()
    Path("cut.pt").write_bytes(Path(whole).read_bytes()[:-200])
    Path("text.pt").write_text("hello")
    for name, words in {
        "missing.pt": "there is no file missing.pt",
        ".": "is a folder",
        "empty.pt": "is empty",
        "cut.pt": "damaged or was not written to the end",
        "text.pt": "is not a file of torch.save",
        "state.pt": "holds a state_dict of 4 tensors, not a model: save the model whole",
        "torch.nn:Missing": "there is no Missing",
        "no_such_package.nets:build": "there is no module no_such_package",
        "torch.nn:Linear": "TypeError",
    }.items():
        assert words in fail(capsys, "report", name)
    assert "--trust-pickle" in fail(capsys, "report", whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "4x9"], ""),
        (["--input", "4x8", "--input", "4x8"], ""),
        (["--input", "other=4x8"], ""),
        (["--input", "4X8"], "has no shape such as"),
        (["--input", "0x8"], "has no shape such as"),
        (["--input=-1x8"], "has no shape such as"),
        (["--input", "4xx8"], "has no shape such as"),
        (["--input", ""], "has no shape such as"),
        (["--input", "4x8:float"], "names no dtype out of float64, float32"),
        (["--input", "99999999x99999999"], "would take over 4 GiB"),
        (["--input", "9" * 5000], "would take over 4 GiB"),
        (["--input=--"], "--input=-- gives no value"),
        (["--arg=--"], "--arg=-- gives no value"),
        (["--inp", "4x8"], "unrecognized arguments"),
        (["--arg", "(1"], "is not a Python literal"),
        (["--arg", "a=1", "--arg", "a=2"], "--arg a=... is given twice"),
        (["--arg", "3"], "is a file"),
        (["--format", "xml"], "invalid choice"),
        (["--unknown"], "unrecognized arguments"),
    ],
)
def test_wrong_options(capsys: Capture, whole: str, arguments: list[str], words: str) -> None:
    assert words in fail(capsys, "report", whole, "--trust-pickle", *arguments)


def test_wrong_commands(capsys: Capture, whole: str) -> None:
    assert "COMMAND" in fail(capsys)
    assert "invalid choice" in fail(capsys, "fuse", whole)
    assert "-o" in fail(capsys, "optimize", whole)
    assert "SAVED" in fail(capsys, "report")


def test_outputs_that_cannot_be_written(capsys: Capture, whole: str) -> None:
    assert "there is no folder" in fail(capsys, "unfuse", whole, "-o", "missing/out.pt")
    assert "is a folder" in fail(capsys, "unfuse", whole, "-o", ".")


def test_nothing_is_trusted_or_replaced_by_half_a_word(capsys: Capture, whole: str) -> None:
    assert "unrecognized" in fail(capsys, "report", whole, "--trust")
    Path("other.pt").write_text("precious")
    assert "unrecognized" in fail(capsys, *OPTIMIZE[:2], "-o", "other.pt", "--trust-pickle", "--fo")
    assert Path("other.pt").read_text() == "precious"


def test_a_model_that_ends_the_process(capsys: Capture, nets: str) -> None:
    for inputs in ((), ("--input", "4x8")):
        message = fail(capsys, "optimize", f"{nets}:Leaving", "-o", "out.pt", *inputs)
        assert "the model's code ends the process: SystemExit: 3" in message


def test_what_to_do_about_inputs_is_said_of_the_command_line(capsys: Capture, whole: str) -> None:
    message = fail(capsys, "report", whole, "--trust-pickle", "--input", "4x9")
    assert "Give what its forward takes with --input" in message
    assert "example_inputs" not in message


def test_a_model_that_does_not_copy(capsys: Capture, nets: str) -> None:
    command = ("optimize", f"{nets}:Uncopied", "-o", "out.pt", "--input", "4x8")
    message = fail(capsys, *command)
    assert "cannot be copied to verify it (LookupError: not this one): --no-verify" in message


def test_a_graph_that_is_not_sound(capsys: Capture, nets: str) -> None:
    for command in ("optimize", "unfuse"):
        message = fail(capsys, command, f"{nets}:unsound", "-o", "out.pt")
        assert "the graph is not sound" in message


def test_lazy_layers_are_not_exported(capsys: Capture, nets: str) -> None:
    message = fail(capsys, "export", f"{nets}:Lazy", "-o", "out.pt2", "--input", "4x8")
    assert "run it once on an example input" in message


def test_a_factory_that_goes_to_another_folder(capsys: Capture, nets: str) -> None:
    succeed(capsys, "unfuse", f"{nets}:elsewhere", "-o", "out.pt")
    assert os.path.exists("out.pt")
    assert os.listdir("elsewhere") == []


@pytest.mark.skipif(os.name != "posix", reason="a folder that is in use can be removed on POSIX")
def test_a_current_folder_that_is_gone(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current folder is gone" in fail(capsys, "report", "torch.nn:ReLU")


@pytest.mark.skipif(os.name != "posix", reason="names of files that are bytes")
def test_names_that_are_not_utf_8(capsys: Capture, exported: str, whole: str) -> None:
    program, module = (os.fsdecode(b"\xff" + os.fsencode(name)) for name in (exported, whole))
    os.rename(exported, program)
    os.rename(whole, module)
    assert "1 fused" in succeed(capsys, "report", program)
    assert "1 fused" in succeed(capsys, "report", program, "--trust-pickle")
    assert "1 fused" in succeed(capsys, "report", module, "--trust-pickle")


def test_strings_with_backslashes_bring_no_remarks(capsys: Capture, nets: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert options.arguments(["'\\d'"]).positional == ("\\d",)


def test_control_characters_do_not_reach_the_terminal(capsys: Capture, tmp_path: Path) -> None:
    assert "\x1b" not in fail(capsys, "report", "\x1b[31mred\nline.pt")


@pytest.mark.parametrize("seed", range(3))
def test_mutated_files_end_in_a_sentence_or_a_report(
    seed: int, capsys: Capture, exported: str, whole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What loads is a graph of PyTorch's operators that may not run: here only loading is tested.
    monkeypatch.setattr(conjoin, "report", lambda *_, **__: "report")
    rng = random.Random(seed)
    contents = [Path(exported).read_bytes(), Path(whole).read_bytes()]
    for _ in range(60):
        content = bytearray(rng.choice(contents))
        for _ in range(rng.randint(1, 3)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        Path("mutated").write_bytes(content[: rng.choice((None, rng.randrange(len(content))))])
        status = cli.main(["report", "mutated"])
        printed = capsys.readouterr()
        assert (status, printed.out) in ((0, "report\n"), (2, ""))
        assert printed.err.count("\n") == status // 2


# The process


def test_as_a_process(whole: str) -> None:
    run = command("report", whole, "--trust-pickle", "--input", "4x8")
    out, err = run.communicate()
    assert (run.returncode, err) == (0, "")
    assert "2+3 -> 5" in out
    run = command("report", "missing.pt")
    out, err = run.communicate()
    assert out == ""
    assert err.startswith("conjoin: error: there is no file missing.pt: name a file, or")
    assert err.count("\n") == 1
    assert run.returncode == 2


def test_a_reader_that_leaves_is_no_error(whole: str) -> None:
    run = command("report", whole, "--trust-pickle")
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_error_that_nobody_can_be_told() -> None:
    argv = [sys.executable, "-m", "conjoin", "report", "missing.pt"]
    with open("/dev/full", "w") as full:
        run = subprocess.run(argv, stdout=subprocess.PIPE, stderr=full, check=False)
    assert (run.returncode, run.stdout) == (2, b"")


def test_an_error_is_never_in_the_result(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)  # As Python has it where it is closed.
    assert cli.main(["report", "missing.pt"]) == 2
    assert capsys.readouterr().out == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_an_output_that_is_full(whole: str) -> None:
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "conjoin", "report", whole, "--trust-pickle"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 2
    assert run.stderr == "conjoin: error: cannot print the result: No space left on device\n"


def test_a_narrow_terminal_encoding(whole: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = command("report", "müssing.pt", env=environment)
    assert "there is no file m\\xfcssing.pt:" in run.communicate()[1]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_an_interruption_leaves_nothing_behind(nets: str) -> None:
    Path("out.pt").write_text("precious")
    before = sorted(os.listdir())
    run = command("unfuse", f"{nets}:Slow", "-o", "out.pt", "--force")
    assert run.stderr is not None
    assert run.stderr.readline() == "saving\n"
    time.sleep(0.2)
    run.send_signal(signal.SIGINT)
    assert run.communicate()[1] == "conjoin: interrupted\n"
    assert run.returncode == 130
    assert sorted(set(os.listdir()) - {"__pycache__"}) == before
    assert Path("out.pt").read_text() == "precious"


def test_streams_that_are_no_text_files(whole: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    assert cli.main(["report", whole, "--trust-pickle"]) == 0
    assert "0.{0,1}" in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("2KiB", 2048),
        ("1.5 kB", 1500),
        ("8gib", 8 * 2**30),
        ("0.5", 0.5),
        ("1.0", 1.0),
        ("7B", 7),
        (".5", 0.5),
    ],
)
def test_sizes(text: str, size: float) -> None:
    assert options.budget(text) == size
    assert type(options.budget(text)) is type(size)


def test_policy_and_budget(tmp_path: Path, nets: str, capsys: Capture) -> None:
    command = ["report", f"{nets}:Heads", "--input", "4x8", "--format", "json"]
    assert cli.main([*command, "--policy", "always", "--memory-budget", "1.0"]) == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert group["fused"]
    assert cli.main([*command, "--memory-budget", "1kib"]) == 0
    capsys.readouterr()
    command = ["optimize", f"{nets}:Heads", "-o", str(tmp_path / "o.pt"), "--input", "4x8"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main([*command, "--memory-budget", "10"]) == 0
    assert "memory_budget of 10 bytes is not met" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "never"], "invalid choice: 'never'"),
        (["--policy", "measure"], "--policy measure needs --input"),
        (["--memory-budget", "much", "--input", "4x8"], "much is no size such as 8GiB"),
        (["--memory-budget", "8iB", "--input", "4x8"], "8iB is no size"),
        (["--memory-budget", "2.5", "--input", "4x8"], "2.5 is no size above 0, or no fraction"),
        (["--memory-budget", "0", "--input", "4x8"], "0 is no size above 0"),
        (["--memory-budget", "8GiB"], "--memory-budget needs --input"),
        (["--memory-budget", "9" * 400, "--input", "4x8"], "more memory than any device has"),
        (["--memory-budget", "9" * 400 + "TiB"], "more memory than any device has"),
        (["--input", "x=4x8", "--input", "x=2x8"], "--input x=... is given twice"),
    ],
)
def test_policies_and_budgets_that_are_none(
    options: list[str], words: str, nets: str, capsys: Capture
) -> None:
    assert cli.main(["report", f"{nets}:Heads", *options]) == 2
    assert words in capsys.readouterr().err


def test_what_a_model_prints_is_not_in_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talking.py").write_text(
        "from torch import nn\n\n\nclass Talking(nn.Linear):\n"
        "    def forward(self, x):\n        print('hello')\n        return super().forward(x)\n"
    )
    command = ["report", "talking:Talking", "--arg", "8", "--arg", "2", "--input", "4x8"]
    assert cli.main([*command, "--format", "json"]) == 0
    told = capsys.readouterr()
    assert "hello" in told.err
    assert json.loads(told.out)["groups"] == []
