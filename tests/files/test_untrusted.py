"""Archives that are damaged or meant to harm are refused, and nothing in them runs."""

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from model_files import Evil, Net, change_program, refusal, rewrite
from torch import nn

import conjoin
from conjoin.files import writing
from conjoin.files.content import HARMLESS_BYTES
from conjoin.files.loading import load
from conjoin.foreign import SavedError


def test_truncated_files(whole: Path, exported: Path) -> None:
    for path in (whole, exported):
        content = path.read_bytes()
        for length in (3, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            refusal(path, trust=True)


def test_changed_weights_are_noticed(whole: Path) -> None:
    content = whole.read_bytes()
    weight = load(str(whole), trust_pickle=True).state_dict()["layers.a b.weight"]
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
        archive.writestr("bomb/data.pkl", bytes(HARMLESS_BYTES + 1))
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
        (SIZE, "Add('lambda x: x', 2)"),
        (SIZE, "'open(1)'"),
        (SIZE, "Max(('open(1)',), Integer(2))"),
        (SIZE, "Add(Integer(2), -'x')"),
        (SIZE, "Max(b'open(1)', Integer(2))"),
        (SIZE, "(None, ...)"),
        (SIZE, "Pow(Integer(9), Integer(4000000000))"),
        (SIZE, "Pow(Integer(9), exp=Integer(4000000000))"),
        (SIZE, "Pow(Integer(9), Pow(Integer(9), Integer(9)))"),
        (SIZE, "Pow(Integer(9), Mul(Integer(60), Integer(60), Integer(60), Integer(60)))"),
        (SIZE, "Pow(Pow(Pow(Integer(9), Integer(64)), Integer(64)), Integer(64))"),
        (SIZE, "floor(Float('1e999999999', precision=53))"),
        (SIZE, "Float('1.5', 999999999)"),
        (SIZE, r"Symbol('''a\\\nx22''')"),
        (SIZE, "Rational('1e999999999')"),
        (r"[\\\"scale\\\"]", r"[\\\"scale':open(1),'\\\"]"),
        (r"[\\\"scale\\\"]", r"{\\\"default_factory_module\\\": \\\"this\\\"}"),
        (r"[\\\"scale\\\"]", r"{\\\"\\\\u0064efault_factory_module\\\": \\\"this\\\"}"),
        (r"[\\\"scale\\\"]", r"[{\\\"_\\\\u005fenum__\\\": true, \\\"fqn\\\": \\\"this:a\\\"}]"),
        ("layers.a b.weight", r"layers.a\").mro(), (\"b.weight"),
    ],
)
def test_an_exported_program_holds_names_and_no_code(exported: Path, old: str, new: str) -> None:
    message = refusal(change_program(exported, old, new))
    assert "--trust-pickle" in message
    assert "unusual text" in message


def test_sizes_that_are_made_of_others_are_kept(tmp_path: Path) -> None:
    half = torch.export.Dim("half", min=2, max=64)
    x, shapes = torch.randn(2, 3, 8), ({2: 2 * half},)
    program = torch.export.export(nn.Conv1d(3, 4, 3), (x,), dynamic_shapes=shapes)
    path = tmp_path / "derived.pt2"
    torch.export.save(program, path)
    loaded = load(str(path))
    assert loaded.module()(torch.randn(2, 3, 20)).shape == (2, 4, 18)


@pytest.mark.parametrize(
    "guard",
    [
        "__import__('os').mkdir({!r})",
        "L['x'].mkdir({!r})",
        "L['x'].size.__globals__",
        "L['x'].size(print)",
        "[L['x'] for x in 'abc']",
        "math.isnan(L['x'])",
        "9**9**9 > 1",
        "not (",
        """L['x'].size()[0] != '"+str(__import__("os").mkdir("{}"))+"'""",
        "L['x'].size()[0] != 'a'",
        "'%999999999d' % 1 != 1",
        "b'a' * 99999999999 != 1",
    ],
)
def test_guards_of_an_exported_program_do_not_run(
    guard: str, exported: Path, tmp_path: Path
) -> None:
    message = refusal(rewrite(exported, guarded(guard.format(str(tmp_path / "evil")))))
    assert "unusual text" in message
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "guard", ["L['x'].size()[0] < 900", "4*L['x'].size()[0] // 2 != 7 and not 3 == -1 % 2"]
)
def test_guards_that_compare_sizes_are_kept(guard: str, exported: Path, tmp_path: Path) -> None:
    loaded = load(str(rewrite(exported, guarded(guard))))
    out = tmp_path / "out.pt2"
    writing.write(conjoin.optimize(loaded), str(out))
    assert torch.export.load(out)._guards_code == [guard]


def hidden(text: str) -> str:
    """What stands for the text in a string, once the ends of its lines are taken out."""
    return "".join(c if c.isalpha() else f"\\\nx{ord(c):02x}" for c in text)


def test_text_that_becomes_code_once_its_lines_are_joined(exported: Path, tmp_path: Path) -> None:
    """PyTorch takes the ends of lines out of a guard, and writes it into a message in source."""
    code = f'"+str(__import__("os").mkdir("{tmp_path / "evil"}"))+"'
    guard = f"1 or L['''{hidden(code)}''']"
    message = refusal(rewrite(exported, guarded(guard)))
    assert "unusual text" in message
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    "guard", ["1 #", "(1 #\n)", "(1\n)", "1 \\\n", 'L["x"] < 1', r"L['\x41'] < 1", "1\t"]
)
def test_guards_are_written_as_pytorch_writes_them(guard: str, exported: Path) -> None:
    assert "unusual text" in refusal(rewrite(exported, guarded(guard)))


@pytest.mark.parametrize("name", ["metadata", "as_string", "as_strings", "torch_version"])
def test_names_of_tensors_hide_no_sizes(name: str, exported: Path, tmp_path: Path) -> None:
    def change(members: dict[str, bytes]) -> None:
        text = members["models/model.json"].decode()
        output = json.loads(text)["graph_module"]["graph"]["outputs"][0]["as_tensor"]["name"]
        program = json.loads(text.replace(f'"{output}"', f'"{name}"'))
        code = f"__import__('os').mkdir({str(tmp_path / 'evil')!r})"
        sizes = program["graph_module"]["graph"]["tensor_values"][name]["sizes"]
        sizes[0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 4}}}
        members["models/model.json"] = json.dumps(program).encode()

    assert "unusual text" in refusal(rewrite(exported, change))
    assert not (tmp_path / "evil").exists()


def guarded(guard: str) -> Callable[[dict[str, bytes]], None]:
    """Puts a guard into a program."""

    def change(members: dict[str, bytes]) -> None:
        program = json.loads(members["models/model.json"])
        program["guards_code"] = [guard]
        members["models/model.json"] = json.dumps(program).encode()

    return change


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
            model = load(str(path))
            assert isinstance(model, nn.Module | torch.export.ExportedProgram)


def mutated_member(members: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
    name = rng.choice([name for name in members if "." in name])
    return {name: mutate(members[name], rng)}
