"""Writing is all or nothing."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_files import Net
from torch import nn

from conjoin.files import writing
from conjoin.files.loading import load
from conjoin.foreign import SavedError


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_written_and_read_back(tmp_path: Path) -> None:
    model = Net()
    writing.write(model, str(tmp_path / "out.pt"))
    assert leftovers(tmp_path) == ["out.pt"]
    loaded = load(str(tmp_path / "out.pt"), trust_pickle=True)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_modes_and_links_are_kept(tmp_path: Path) -> None:
    out, link = tmp_path / "out.pt", tmp_path / "link.pt"
    writing.write(nn.ReLU(), str(out))
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    out.chmod(0o640)
    link.symlink_to(out)
    writing.write(Net(), str(link), force=True)
    assert link.is_symlink()
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert isinstance(load(str(out), trust_pickle=True), Net)


class Unpicklable(nn.Module):
    def __getstate__(self) -> dict[str, object]:
        raise LookupError("not this one")


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("model", "function", "raised", "error"),
    [
        (Unpicklable(), None, None, SavedError),
        (nn.Sequential(type("Local", (nn.ReLU,), {})()), None, None, SavedError),
        (nn.ReLU(), "fsync", full_disk, SavedError),
        (nn.ReLU(), "replace", full_disk, SavedError),
        (nn.ReLU(), "fsync", interrupt, KeyboardInterrupt),
        (nn.ReLU(), "replace", interrupt, KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: nn.Module,
    function: str | None,
    raised: Callable[..., None],
    error: type[BaseException],
) -> None:
    (tmp_path / "out.pt").write_text("precious")
    if function:
        monkeypatch.setattr(os, function, raised)
    with pytest.raises(error):
        writing.write(model, str(tmp_path / "out.pt"), force=True)
    assert leftovers(tmp_path) == ["out.pt"]
    assert (tmp_path / "out.pt").read_text() == "precious"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on file sizes")
@pytest.mark.parametrize(
    ("what", "limit"),
    [
        ("a module", 0),
        ("a module", 50_000),
        ("a module", 4_001_000),
        ("a program", 1000),
        ("an export", 0),
    ],
)
def test_a_write_that_is_cut_short(tmp_path: Path, limit: int, what: str) -> None:
    script = f"""
import resource, signal, torch
import conjoin
from conjoin.files import exporting, writing
from conjoin.foreign import SavedError
model, call = torch.nn.Linear(1000, 1000), ((torch.ones(2, 1000),), {{}})
program = torch.export.export(model, *call)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    if {what!r} == "an export":
        exporting.export(program, "out.pt2", call)
    else:
        writing.write(model if {what!r} == "a module" else program, "out.pt2")
except SavedError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.endswith("out.pt2: file too large\n")
    assert run.stderr == ""
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("at_the_end", [False, True])
def test_an_interrupted_write_of_a_program_leaves_everything_as_it_was(
    tmp_path: Path, at_the_end: bool
) -> None:
    script = f"""
import io, torch
from torch.export.pt2_archive import _package
from conjoin.files import writing
model = torch.export.export(torch.nn.Linear(1000, 1000), (torch.ones(2, 1000),))
writes, write = [], io.BufferedWriter.write
class Interrupted(io.BufferedWriter):
    def write(self, content):
        writes.append(content)
        if len(writes) == 3:
            raise KeyboardInterrupt
        return write(self, content)
def interrupt(*_):
    raise KeyboardInterrupt
if {at_the_end}:
    _package.PT2ArchiveWriter.__exit__ = interrupt
else:
    writing._Archive.__bases__ = (Interrupted,)
try:
    writing.write(model, "out.pt2")
except KeyboardInterrupt:
    print("interrupted")
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (run.stdout, run.stderr) == ("interrupted\n", "")
    assert leftovers(tmp_path) == []


def test_outputs_that_are_refused(tmp_path: Path, whole: Path) -> None:
    def out_refusal(out: object, **options: object) -> str:
        settings = {"source": str(whole), "force": False, **options}
        with pytest.raises(SavedError) as caught:
            writing.check_out(str(out), **settings)
        return str(caught.value)

    (tmp_path / "there.pt").touch()
    assert "is a folder" in out_refusal(tmp_path)
    assert "there is no folder" in out_refusal(tmp_path / "missing" / "out.pt")
    assert "exists already" in out_refusal(tmp_path / "there.pt")
    assert "is the file that is read" in out_refusal(whole)
    assert "the name of the file to write is empty" in out_refusal("")
    assert "name a file" in out_refusal(f"{tmp_path}/new.pt/")
    assert "not a directory; give another name" in out_refusal(tmp_path / "there.pt" / "out.pt")
    assert "too long; give another name" in out_refusal(tmp_path / ("x" * 300 + ".pt"))
    (tmp_path / "round").symlink_to("round")
    assert "symbolic links; give another name" in out_refusal(tmp_path / "round", force=True)
    if os.path.exists(os.devnull) and os.name == "posix":
        assert "not a regular file" in out_refusal(os.devnull, force=True)
    writing.check_out(str(whole), source=str(whole), force=True)
    writing.check_out(str(tmp_path / "new.pt"), source="module:factory", force=False)


def test_a_file_that_came_to_exist_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out.pt").write_text("precious")
    with pytest.raises(SavedError, match="come to exist"):
        writing.write(nn.ReLU(), str(tmp_path / "out.pt"))
    assert leftovers(tmp_path) == ["out.pt"]
    assert (tmp_path / "out.pt").read_text() == "precious"


@pytest.mark.parametrize("suffix", [".onnx", ".safetensors", ".pt2"])
def test_a_module_is_not_written_to_a_file_that_is_named_as_another_kind(suffix: str) -> None:
    with pytest.raises(SavedError, match=r"give it a name that ends in \.pt"):
        writing.check_suffix(nn.ReLU(), f"out{suffix}")
