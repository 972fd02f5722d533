"""What a model is loaded from, and what is said of all else."""

import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from model_files import Evil, Net, refusal
from torch import nn

from conjoin.files.content import Content, content_of
from conjoin.files.loading import Arguments, load


def test_a_whole_module_is_loaded_only_when_trusted(whole: Path) -> None:
    assert isinstance(load(str(whole), trust_pickle=True), Net)
    message = refusal(whole)
    assert "runs code that the file names" in message
    assert "--trust-pickle" in message


def test_untrusted_pickles_do_not_run(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "more": Evil(tmp_path / "evil")}, tmp_path / "evil.pt")
    assert "--trust-pickle" in refusal(tmp_path / "evil.pt")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("archive", [True, False], ids=["zip", "legacy"])
def test_every_format_of_torch_save_is_known(tmp_path: Path, protocol: int, archive: bool) -> None:
    path = tmp_path / "whole"
    torch.save(Net(), path, pickle_protocol=protocol, _use_new_zipfile_serialization=archive)
    assert content_of(str(path)) is Content.PICKLE
    assert isinstance(load(str(path), trust_pickle=True), Net)


def test_an_exported_program_brings_its_inputs(exported: Path) -> None:
    program = load(str(exported))
    assert isinstance(program, torch.export.ExportedProgram)
    args, kwargs = program.example_inputs
    output = program.module()(*args, **kwargs)
    assert output["flat"].shape == (60,)
    assert [*program.state_dict] == ["layers.a b.weight", "layers.a b.bias", "count"]


def test_a_suffix_says_nothing(exported: Path, whole: Path) -> None:
    assert content_of(str(exported.rename(exported.with_suffix(".pt")))) is Content.EXPORTED
    assert content_of(str(whole.rename(whole.with_suffix(".pt2")))) is Content.PICKLE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (Net().state_dict(), "holds a state_dict of 3 tensors"),
        ({"epoch": 3, "model": Net().state_dict()}, "holds a checkpoint (a dict of 'epoch', 'mod"),
        ({"epoch": 3}, "holds a dict"),
        (torch.zeros(2), "holds a Tensor"),
        ([torch.zeros(2)], "holds a list"),
        (3, "holds an int"),
    ],
)
@pytest.mark.parametrize("trust", [True, False])
def test_what_is_no_model_is_named(
    tmp_path: Path, content: object, words: str, trust: bool
) -> None:
    torch.save(content, tmp_path / "it.pt")
    message = refusal(tmp_path / "it.pt", trust=trust)
    assert words in message
    assert "torch.save(model, path)" in message


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript" in refusal(tmp_path / "script.pt", trust=True)


def test_missing_folder_empty_and_unreadable(tmp_path: Path) -> None:
    (tmp_path / "empty.pt").touch()
    assert "there is no file" in refusal(tmp_path / "nothing.pt")
    assert "is a folder" in refusal(tmp_path)
    assert "is empty" in refusal(tmp_path / "empty.pt")
    assert "there is no file" in refusal("nul\0byte")
    assert "there is no file" in refusal(f"{tmp_path / 'empty.pt'}/")
    assert "name a file, or a function that builds the model" in refusal("nets")
    assert "package.module:factory" in refusal("a:b:c")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_other_formats(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    (tmp_path / "it.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    (tmp_path / "it.txt").write_text("hello")
    (tmp_path / "it.pkl").write_bytes(pickle.dumps([1]))
    with zipfile.ZipFile(tmp_path / "it.zip", "w") as archive:
        archive.writestr("one/a.txt", "a")
    assert "safetensors" in refusal(tmp_path / "it.safetensors")
    assert "not a file of torch.save" in refusal(tmp_path / "it.txt")
    assert "no model of PyTorch" in refusal(tmp_path / "it.zip")
    for trust in (False, True):
        message = refusal(tmp_path / "it.pkl", trust=trust)
        assert "is a pickle, but none of torch.save" in message
        assert "--trust-pickle" not in message


def test_a_class_that_cannot_be_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, types, torch\n"
        "class Here(torch.nn.Linear): pass\n"
        "torch.save(Here(2, 2), 'here.pt')\n"
        "Gone = type('Gone', (torch.nn.Linear,), {'__module__': 'gone.nets'})\n"
        "sys.modules['gone'] = sys.modules['gone.nets'] = types.SimpleNamespace(Gone=Gone)\n"
        "torch.save(Gone(2, 2), 'gone.pt')\n"
    )
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    assert "needs the module gone" in refusal(tmp_path / "gone.pt", trust=True)
    message = refusal(tmp_path / "here.pt", trust=True)
    assert "'Here'" in message
    assert "module that can be imported" in message


# Factories


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"nets_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "model = torch.nn.Linear(2, 3)\n"
        "def build(width, *, bias=True): return torch.nn.Linear(width, 3, bias=bias)\n"
        "def fails(): raise LookupError('no\\nsuch weights')\n"
        "def leaves(): raise SystemExit(3)\n"
        "def nothing(): return None\n"
        "class Nets:\n"
        "    small = staticmethod(lambda: torch.nn.ReLU())\n"
        "number = 3\n"
    )
    (tmp_path / f"{name}_broken.py").write_text("import does_not_exist_anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_factories_and_modules(nets: str) -> None:
    arguments = Arguments((5,), {"bias": False})
    built = load(f"{nets}:build", arguments=arguments)
    assert isinstance(built, nn.Linear)
    assert built.in_features == 5
    assert built.bias is None
    assert isinstance(load(f"{nets}:model"), nn.Linear)
    assert isinstance(load(f"{nets}:Nets.small"), nn.ReLU)
    assert isinstance(load("torch.nn:ReLU"), nn.ReLU)


@pytest.mark.parametrize(
    ("attribute", "words"),
    [
        ("missing", "there is no missing in"),
        ("Nets.large", "there is no large in"),
        ("number", "is an int: name a module"),
        ("nothing", "gave a NoneType where a torch.nn.Module is needed"),
        ("fails", "raised when it was called: LookupError: no"),
        ("leaves", "raised when it was called: SystemExit: 3"),
        ("build", "raised when it was called: TypeError: build() missing"),
    ],
)
def test_factories_that_give_no_model(nets: str, attribute: str, words: str) -> None:
    assert words in refusal(f"{nets}:{attribute}")


def test_modules_that_cannot_be_imported(nets: str) -> None:
    assert "there is no module nowhere_at_all" in refusal("nowhere_at_all.nets:build")
    assert "No module named 'does_not_exist_anywhere'" in refusal(f"{nets}_broken:build")


def test_arguments_where_they_mean_nothing(nets: str, whole: Path) -> None:
    assert "takes no --arg" in refusal(f"{nets}:model", arguments=Arguments((1,)))
    assert "is a file" in refusal(whole, arguments=Arguments((1,)))
