"""Loading refuses what is no model or not trusted; writing is all or nothing."""

import errno
import io
import json
import os
import pickle
import random
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import nn

import conjoin
from conjoin import saved
from conjoin.saved import Arguments, Kind, SavedError

Change = Callable[[dict[str, bytes]], None]


class Net(nn.Module):
    """A model with a parameter, a buffer, a keyword and a size that is not known."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"a b": nn.Linear(4, width)})
        self.register_buffer("count", torch.zeros(3))

    def forward(self, x: torch.Tensor, *, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.layers["a b"](x).repeat(2, 1)[1:] * scale
        self.count.add_(1)
        return {"flat": x.reshape(-1), "sum": x.sum(0)}


class Evil:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def refusal(source: object, *, trust: bool = False, **options: object) -> str:
    with pytest.raises(SavedError) as caught:
        saved.load(str(source), trust_pickle=trust, **options)
    return str(caught.value)


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    torch.save(Net(), tmp_path / "whole.pt")
    return tmp_path / "whole.pt"


@pytest.fixture(scope="module")
def exported_bytes() -> bytes:
    kwargs = {"scale": torch.ones(4)}
    batch = torch.export.Dim("batch", min=4, max=100)
    program = torch.export.export(
        Net(), (torch.randn(8, 4),), kwargs, dynamic_shapes={"x": {0: batch}, "scale": None}
    )
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


@pytest.fixture
def exported(tmp_path: Path, exported_bytes: bytes) -> Path:
    path = tmp_path / "program.pt2"
    path.write_bytes(exported_bytes)
    return path


def rewrite(path: Path, change: Change) -> Path:
    """The archive with its members changed, and every size and checksum right."""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        root = names[0].split("/")[0] + "/"
        members = {name.removeprefix(root): archive.read(name) for name in names}
    change(members)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(root + name, content)
    return path


def change_program(path: Path, old: str, new: str) -> Path:
    def change(members: dict[str, bytes]) -> None:
        text = members["models/model.json"].decode()
        assert old in text
        members["models/model.json"] = text.replace(old, new).encode()

    return rewrite(path, change)


# What is a model


def test_a_whole_module_is_loaded_only_when_trusted(whole: Path) -> None:
    assert isinstance(saved.load(str(whole), trust_pickle=True).model, Net)
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
    assert saved.kind_of(str(path)) is Kind.PICKLE
    assert isinstance(saved.load(str(path), trust_pickle=True).model, Net)


def test_an_exported_program_brings_its_inputs(exported: Path) -> None:
    program = saved.load(str(exported)).model
    assert isinstance(program, torch.export.ExportedProgram)
    args, kwargs = program.example_inputs
    output = program.module()(*args, **kwargs)
    assert output["flat"].shape == (60,)
    assert [*program.state_dict] == ["layers.a b.weight", "layers.a b.bias", "count"]


def test_a_suffix_says_nothing(exported: Path, whole: Path) -> None:
    assert saved.kind_of(str(exported.rename(exported.with_suffix(".pt")))) is Kind.EXPORTED
    assert saved.kind_of(str(whole.rename(whole.with_suffix(".pt2")))) is Kind.PICKLE


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
    refusal(tmp_path / "it.pkl", trust=True)


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
    built = saved.load(f"{nets}:build", arguments=arguments).model
    assert isinstance(built, nn.Linear)
    assert built.in_features == 5
    assert built.bias is None
    assert isinstance(saved.load(f"{nets}:model").model, nn.Linear)
    assert isinstance(saved.load(f"{nets}:Nets.small").model, nn.ReLU)
    assert isinstance(saved.load("torch.nn:ReLU").model, nn.ReLU)


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


# Archives that are damaged or meant to harm


def test_truncated_files(whole: Path, exported: Path) -> None:
    for path in (whole, exported):
        content = path.read_bytes()
        for length in (3, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            refusal(path, trust=True)


def test_changed_weights_are_noticed(whole: Path) -> None:
    content = whole.read_bytes()
    weight = saved.load(str(whole), trust_pickle=True).model.state_dict()["layers.a b.weight"]
    place = content.index(weight.numpy().tobytes())
    whole.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    assert "checksum" in refusal(whole, trust=True)


@pytest.mark.parametrize(
    "name", ["../out", "/etc/out", "a/../../out", "..\\out", "C:\\out", "a\nb"]
)
def test_members_that_leave_the_archive(whole: Path, name: str) -> None:
    with zipfile.ZipFile(whole, "a") as archive:
        archive.writestr(name, "x")
    assert "out of the archive" in refusal(whole, trust=True)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name(whole: Path) -> None:
    with zipfile.ZipFile(whole, "a") as archive:
        archive.writestr("whole/data.pkl", "x")
    assert "two members of one name" in refusal(whole, trust=True)


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(saved.HARMLESS_BYTES + 1))
    assert "over 20 times its size" in refusal(path, trust=True)


def test_a_tensor_without_content_is_not_made(exported: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        config = json.loads(members["data/weights/model_weights_config.json"])
        for payload in config["config"].values():
            payload["tensor_meta"]["sizes"] = [{"as_int": 2**40}]
            members[f"data/weights/{payload['path_name']}"] = b""
        members["data/weights/model_weights_config.json"] = json.dumps(config).encode()

    assert "has no content" in refusal(rewrite(exported, change))


SIZE = "Symbol('s77', positive=True, integer=True)"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"name": "linear"', '"name": "x=open(1)"'),
        ('"as_tensor": {"name": "x"}', '"as_tensor": {"name": "x=open(1)"}'),
        ("torch.ops.aten.linear.default", "torch.os.system"),
        ("torch.ops.aten.linear.default", "#registered.elsewhere"),
        ('"forward_arg_names": ["x"', '"forward_arg_names": ["x=open(1)"'),
        (SIZE, "open(1)"),
        (SIZE, "Symbol('s77').__class__.mro()"),
        (SIZE, "sympify('open(1)')"),
        (SIZE, "FloorDiv('open(1)', 2)"),
        (SIZE, "[x for x in (1,)]"),
        (r"[\\\"scale\\\"]", r"[\\\"scale':open(1),'\\\"]"),
        (r"[\\\"scale\\\"]", r"{\\\"default_factory_module\\\": \\\"this\\\"}"),
        ("layers.a b.weight", r"layers.a\").mro(), (\"b.weight"),
    ],
)
def test_an_exported_program_holds_names_and_no_code(exported: Path, old: str, new: str) -> None:
    message = refusal(change_program(exported, old, new))
    assert "--trust-pickle" in message
    assert "unusual text" in message


def test_guards_of_an_exported_program_do_not_run(exported: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        program = json.loads(members["models/model.json"])
        program["guards_code"] = [f"__import__('os').mkdir({str(tmp_path / 'evil')!r})"]
        members["models/model.json"] = json.dumps(program).encode()

    loaded = saved.load(str(rewrite(exported, change)))
    assert conjoin.report(loaded.model).launches.before.forward
    assert conjoin.verify(loaded.model, conjoin.optimize(loaded.model))
    out = tmp_path / "out.pt2"
    saved.write(conjoin.optimize(loaded.model), str(out))
    torch.export.load(out).module()(torch.ones(5, 4), scale=torch.ones(4))
    assert not (tmp_path / "evil").exists()


def test_pickles_inside_an_exported_program_do_not_run(exported: Path, tmp_path: Path) -> None:
    original = exported.read_bytes()
    buffer = io.BytesIO()
    torch.save(Evil(tmp_path / "evil"), buffer)

    def as_inputs(members: dict[str, bytes]) -> None:
        members["data/sample_inputs/model.pt"] = buffer.getvalue()

    def as_legacy_weights(members: dict[str, bytes]) -> None:
        members["data/weights/model.pt"] = buffer.getvalue()

    def as_weight(members: dict[str, bytes]) -> None:
        config = json.loads(members["data/weights/model_weights_config.json"])
        payload = next(iter(config["config"].values()))
        payload["use_pickle"] = True
        members[f"data/weights/{payload['path_name']}"] = buffer.getvalue()
        members["data/weights/model_weights_config.json"] = json.dumps(config).encode()

    def as_constant(members: dict[str, bytes]) -> None:
        config = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": False}
        members["data/constants/model_constants_config.json"] = json.dumps(
            {"config": {"k": {**config, "tensor_meta": None}}}
        ).encode()
        members["data/constants/opaque_obj_0"] = pickle.dumps(Evil(tmp_path / "evil"))

    for change in (as_inputs, as_legacy_weights, as_weight, as_constant):
        exported.write_bytes(original)
        assert "--trust-pickle" in refusal(rewrite(exported, change)), change.__name__
        assert not (tmp_path / "evil").exists()


def test_compiled_code_is_refused(exported: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        members["data/aotinductor/model/code.so"] = b"\x7fELF"

    assert "AOTInductor" in refusal(rewrite(exported, change))


def test_old_exported_programs_need_trust(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr("version", "8.1")
        archive.writestr("serialized_exported_program.json", "{}")
    assert "export it again" in refusal(tmp_path / "old.pt2")
    refusal(tmp_path / "old.pt2", trust=True)


def mutate(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) + 1), rng.randint(1, 8)
        other = rng.randrange(len(changed) + 1)
        printable = bytes(rng.randrange(32, 127) for _ in range(length))
        changed[at : at + rng.choice((0, length))] = rng.choice(
            (b"", printable, rng.randbytes(length), changed[other : other + length])
        )
    return bytes(changed[: rng.choice((len(changed), len(changed), rng.randrange(1, 2000)))])


@pytest.mark.parametrize("seed", range(6))
def test_mutated_files_give_one_sentence_or_a_model(
    seed: int, tmp_path: Path, exported_bytes: bytes
) -> None:
    rng = random.Random(seed)
    path = tmp_path / "mutated"
    contents = [exported_bytes]
    for content in (Net(), Net().state_dict()):
        for archive in (True, False):
            buffer = io.BytesIO()
            torch.save(content, buffer, _use_new_zipfile_serialization=archive)
            contents.append(buffer.getvalue())
    for _ in range(100):
        path.write_bytes(content := rng.choice(contents))
        if content.startswith(b"PK") and rng.random() < 0.7:
            rewrite(path, lambda members: members.update(mutated_member(members, rng)))
        else:
            path.write_bytes(mutate(content, rng) or b"x")
        with suppress(SavedError):
            model = saved.load(str(path)).model
            assert isinstance(model, nn.Module | torch.export.ExportedProgram)


def mutated_member(members: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    name = rng.choice([name for name in members if "." in name])
    return {name: mutate(members[name], rng)}


# Writing


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_written_and_read_back(tmp_path: Path) -> None:
    model = Net()
    saved.write(model, str(tmp_path / "out.pt"))
    assert leftovers(tmp_path) == ["out.pt"]
    loaded = saved.load(str(tmp_path / "out.pt"), trust_pickle=True).model
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


@pytest.mark.skipif(os.name != "posix", reason="file modes of POSIX")
def test_modes_and_links_are_kept(tmp_path: Path) -> None:
    out, link = tmp_path / "out.pt", tmp_path / "link.pt"
    saved.write(nn.ReLU(), str(out))
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    out.chmod(0o640)
    link.symlink_to(out)
    saved.write(Net(), str(link), force=True)
    assert link.is_symlink()
    assert stat.S_IMODE(out.stat().st_mode) == 0o640
    assert isinstance(saved.load(str(out), trust_pickle=True).model, Net)


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
        saved.write(model, str(tmp_path / "out.pt"), force=True)
    assert leftovers(tmp_path) == ["out.pt"]
    assert (tmp_path / "out.pt").read_text() == "precious"


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs limits on file sizes")
@pytest.mark.parametrize("limit", [0, 1000, 50_000, 4_001_000])
def test_a_write_that_is_cut_short(tmp_path: Path, limit: int) -> None:
    script = f"""
import resource, signal, torch
import conjoin
from conjoin import saved
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    saved.write(torch.nn.Linear(1000, 1000), "out.pt")
except saved.SavedError as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert run.stdout.endswith("out.pt: file too large\n")
    assert leftovers(tmp_path) == []


def test_outputs_that_are_refused(tmp_path: Path, whole: Path) -> None:
    def out_refusal(out: object, **options: object) -> str:
        settings = {"source": str(whole), "force": False, **options}
        with pytest.raises(SavedError) as caught:
            saved.check_out(str(out), **settings)
        return str(caught.value)

    (tmp_path / "there.pt").touch()
    assert "is a folder" in out_refusal(tmp_path)
    assert "there is no folder" in out_refusal(tmp_path / "missing" / "out.pt")
    assert "exists already" in out_refusal(tmp_path / "there.pt")
    assert "is the file that is read" in out_refusal(whole)
    if os.path.exists(os.devnull) and os.name == "posix":
        assert "not a regular file" in out_refusal(os.devnull, force=True)
    saved.check_out(str(whole), source=str(whole), force=True)
    saved.check_out(str(tmp_path / "new.pt"), source="module:factory", force=False)


def test_a_file_that_came_to_exist_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out.pt").write_text("precious")
    with pytest.raises(SavedError, match="come to exist"):
        saved.write(nn.ReLU(), str(tmp_path / "out.pt"))
    assert leftovers(tmp_path) == ["out.pt"]
    assert (tmp_path / "out.pt").read_text() == "precious"
