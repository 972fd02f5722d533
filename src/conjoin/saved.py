"""Model files: read without running what they say, write without losing what was there.

A model comes from one of three places, and `Kind` tells them apart by content, not by suffix:

- a module saved whole by `torch.save`: a pickle, which runs code that the file names, so it is
  opened only when the caller trusts it;
- an exported program of `torch.export.save`: loaded as data. PyTorch's reader unpickles some
  members and generates source from names in the file, so those are checked first and anything
  that could run is refused unless the caller trusts the file;
- `package.module:factory`: the caller's own code.

Whatever is wrong becomes a `SavedError`, whose message is one sentence that says what to do.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import math
import os
import pickle
import re
import stat
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from conjoin.foreign import SavedError, foreign, quiet, quote

# torch.save stores members uncompressed, so an honest archive unpacks to its own size.
MAX_EXPANSION = 20
# Below this size no archive is a danger to memory, however well it is packed.
HARMLESS_BYTES = 64 * 2**20

_FACTORY = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")
_WHOLE = "save the model whole with torch.save(model, path)"
_TRUST = "give --trust-pickle if you trust where it came from"


class Kind(Enum):
    """What a source holds."""

    FACTORY = "a factory in a module"
    EXPORTED = "an exported program"
    OLD_EXPORTED = "an exported program of PyTorch 2.7 or older"
    SCRIPT = "a TorchScript archive"
    PICKLE = "a pickle of torch.save"


@dataclass(frozen=True)
class Arguments:
    """What a factory is called with."""

    positional: tuple[object, ...] = ()
    keywords: Mapping[str, object] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.positional or self.keywords)


@dataclass(frozen=True)
class Saved:
    """A model, or an exported program, which has inputs of its own."""

    model: nn.Module | ExportedProgram


def kind_of(source: str) -> Kind:
    """Say what `source` holds, without loading it.

    Args:
        source: a path, or `package.module:factory` where no such path exists.

    Raises:
        SavedError: there is no such file, or it is none that PyTorch writes.
    """
    path = Path(source)
    if not os.path.lexists(path) and _FACTORY.fullmatch(source):
        return Kind.FACTORY
    _check_file(path)
    with foreign(f"{source} cannot be read"), path.open("rb") as file:
        start = file.read(16)
    if start.startswith(b"PK\x03\x04"):
        return _kind_of_archive(path, _checked_names(path))
    if start[:1] == b"\x80":
        return Kind.PICKLE
    if start[8:9] == b"{":
        raise SavedError(
            f"{source} looks like a safetensors file, tensors only, no model: {_WHOLE}"
        )
    raise SavedError(f"{source} is not a file of torch.save or torch.export.save, or is damaged")


def load(
    source: str,
    *,
    trust_pickle: bool = False,
    arguments: Arguments | None = None,
) -> Saved:
    """Give the model that `source` names.

    Args:
        source: a file of `torch.save` or `torch.export.save`, or `package.module:factory`.
        trust_pickle: unpickle what needs it. A pickle runs code that the file names.
        arguments: what a factory is called with.

    Raises:
        SavedError: no model comes of it; the message says why and what to do.
    """
    arguments = arguments or Arguments()
    kind = kind_of(source)
    if kind is Kind.FACTORY:
        return Saved(_from_factory(source, arguments))
    if arguments:
        raise SavedError(f"--arg is for package.module:factory, and {source} is a file")
    if kind is Kind.SCRIPT:
        raise SavedError(
            f"{source} is a TorchScript archive, which holds compiled code and no modules: "
            f"{_WHOLE} before scripting it, or export it with torch.export"
        )
    if kind is Kind.PICKLE:
        return Saved(_from_pickle(source, trust_pickle))
    return _from_exported(source, kind, trust_pickle)


def check_out(out: str, *, source: str, force: bool) -> None:
    """Refuse an output path that cannot or must not be written, before any work is done.

    Raises:
        SavedError: `out` exists and `force` is not given, or its folder takes no file.
    """
    target, folder = Path(out), Path(os.path.realpath(out)).parent
    if target.is_dir():
        raise SavedError(f"{out} is a folder: name a file in it")
    if not folder.is_dir():
        raise SavedError(f"there is no folder {folder} to write {target.name} to")
    if target.exists() and not target.is_file():
        raise SavedError(f"{out} is not a regular file, and will not be replaced")
    if target.exists() and not force:
        same = os.path.exists(source) and os.path.samefile(source, out)
        what = "is the file that is read" if same else "exists already"
        raise SavedError(f"{out} {what}: give another name, or --force to replace it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SavedError(f"the folder {folder} cannot be written to")


def check_suffix(model: nn.Module | ExportedProgram, out: str) -> None:
    """Refuse a name that tells of another kind of file than what is written.

    Raises:
        SavedError: an exported program would not be written to a `.pt2` file, or a module would.
    """
    program, named = isinstance(model, ExportedProgram), Path(out).suffix == ".pt2"
    if program and not named:
        raise SavedError(
            f"{out} would hold an exported program: give it a name that ends in .pt2, by which it "
            "is known"
        )
    if named and not program:
        raise SavedError(
            f"{out} would hold a module, and .pt2 is for exported programs: give it a name that "
            "ends in .pt"
        )


def write(model: nn.Module | ExportedProgram, out: str, *, force: bool = False) -> None:
    """Save `model` whole at `out`: all of it, or nothing.

    Raises:
        SavedError: the model does not pickle, the disk is full, or `out` has come to exist.
    """
    with (
        placing(out, force=force) as temporary,
        foreign(f"the model cannot be saved as {out}"),
        quiet(),
        temporary.open("wb") as file,
    ):
        try:
            if isinstance(model, ExportedProgram):
                torch.export.save(model, file)
            else:
                torch.save(model, file)
        except RuntimeError as error:
            # The archive writer covers a failed write (a full disk) with another complaint.
            cause = error.__context__
            raise cause if isinstance(cause, OSError) else error from None


@contextmanager
def placing(out: str, *, force: bool = False) -> Iterator[Path]:
    """Give a file to write that becomes `out` in the end: all of it, or nothing.

    The bytes go to a temporary file in the same folder, reach the disk, and then take the name in
    one step. Whatever happens before that step leaves `out` as it was and no file behind.

    Raises:
        SavedError: the disk is full, or `out` has come to exist.
    """
    # Through a link: the link stays, the file that it points to is replaced.
    target = Path(os.path.realpath(out))
    suffix = f".tmp{target.suffix}"
    try:
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".conjoin-", suffix=suffix)
    except OSError as error:
        raise SavedError(f"cannot write {out}: {quote(error)}") from error
    temporary = Path(name)
    try:
        yield temporary
        os.fsync(descriptor)
        temporary.chmod(_mode_of(target))
        if target.exists() and not force:
            raise SavedError(f"{out} has come to exist: give another name, or --force")
        os.replace(temporary, target)
    except OSError as error:
        raise SavedError(f"cannot write {out}: {quote(error)}") from error
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _mode_of(target: Path) -> int:
    if target.exists():
        return stat.S_IMODE(target.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _check_file(path: Path) -> None:
    if not os.path.exists(path):
        hint = "" if ":" not in str(path) else " and it is no package.module:factory"
        raise SavedError(f"there is no file {path}{hint}")
    if path.is_dir():
        raise SavedError(f"{path} is a folder: name the model file in it")
    if not path.is_file():
        raise SavedError(f"{path} is not a regular file")
    if not os.access(path, os.R_OK):
        raise SavedError(f"{path} cannot be read: permission denied")
    if path.stat().st_size == 0:
        raise SavedError(f"{path} is empty: was it written to the end?")


# Archives


def _checked_names(path: Path) -> list[str]:
    """The members of a zip archive whose names, sizes and checksums are sound."""
    damaged = f"{path} is damaged or was not written to the end"
    with foreign(damaged), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        names = [member.filename for member in members]
        for name in names:
            _check_name(path, name)
        if len(set(names)) < len(names):
            raise SavedError(f"{path} is refused: it holds two members of one name")
        unpacked = sum(member.file_size for member in members)
        if unpacked > max(HARMLESS_BYTES, MAX_EXPANSION * path.stat().st_size):
            raise SavedError(
                f"{path} is refused: it unpacks to {unpacked / 2**20:,.0f} MiB, "
                f"over {MAX_EXPANSION} times its size"
            )
        # torch.load does not look at the checksums, and would give changed weights in silence.
        if archive.testzip() is not None:
            raise SavedError(f"{damaged}: the checksum of a member is wrong")
    return names


def _check_name(path: Path, name: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or ":" in parts[0] or not name.isprintable():
        raise SavedError(f"{path} is refused: the member {name!r} points out of the archive")


def _kind_of_archive(path: Path, names: Sequence[str]) -> Kind:
    if "serialized_exported_program.json" in names:
        return Kind.OLD_EXPORTED
    root = names[0].split("/")[0] + "/"
    if not all(name.startswith(root) for name in names):
        raise SavedError(f"{path} is a zip archive, but not one that PyTorch wrote")
    inside = {name.removeprefix(root) for name in names}
    if "archive_format" in inside:
        return Kind.EXPORTED
    if "constants.pkl" in inside:
        return Kind.SCRIPT
    if "data.pkl" in inside:
        return Kind.PICKLE
    raise SavedError(f"{path} is a zip archive, but holds no model of PyTorch")


# Factories


def _from_factory(source: str, arguments: Arguments) -> nn.Module:
    module_name, attribute = source.split(":")
    found = _attribute(source, _module(source, module_name), attribute)
    if isinstance(found, nn.Module):
        if arguments:
            raise SavedError(f"{source} is a module already and takes no --arg")
        return found
    if not callable(found):
        raise SavedError(
            f"{source} is {_a(type(found).__name__)}: name a module, or a callable that gives one"
        )
    with foreign(f"{source} raised when it was called"):
        model = found(*arguments.positional, **arguments.keywords)
    if not isinstance(model, nn.Module):
        raise SavedError(
            f"{source} gave {_a(type(model).__name__)} where a torch.nn.Module is needed"
        )
    return model


def _module(source: str, name: str) -> object:
    with foreign(f"importing {name} raised"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
            raise SavedError(
                f"there is no module {error.name} for {source}: the current folder and the "
                "installed packages were searched"
            ) from error


def _attribute(source: str, module: object, dotted: str) -> Any:
    found = module
    for name in dotted.split("."):
        with foreign(f"reading {name} of {source} raised"):
            if not hasattr(found, name):
                raise SavedError(f"there is no {name} in {source}")
            found = getattr(found, name)
    return found


def _a(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


# Modules saved whole


def _from_pickle(source: str, trust_pickle: bool) -> nn.Module:
    with quiet():
        plain = _plain_content(source)
    if plain is not None:
        return _module_of(source, plain[0])
    if not trust_pickle:
        raise SavedError(
            f"{source} holds pickled Python objects, and unpickling them runs code that the file "
            f"names: {_TRUST}"
        )
    return _module_of(source, _unpickled(source))


def _plain_content(source: str) -> tuple[object] | None:
    """What a file of nothing but tensors and containers holds; None where it has other objects."""
    with foreign(f"{source} is damaged, or not a file of torch.save"):
        try:
            return (torch.load(source, map_location=_device(), weights_only=True),)
        except pickle.UnpicklingError:
            return None


def _device() -> str | None:
    # A model saved on a GPU can be read on a machine without one.
    return None if torch.accelerator.is_available() else "cpu"


def _unpickled(source: str) -> object:
    with foreign(f"{source} cannot be unpickled"):
        try:
            return torch.load(source, map_location=_device(), weights_only=False)
        except ModuleNotFoundError as error:
            raise SavedError(
                f"{source} needs the module {error.name}, which cannot be imported here: install "
                "it, or run conjoin in the folder that holds it"
            ) from error
        except AttributeError as error:
            raise SavedError(
                f"{source} needs a class that is not where it was when the model was saved "
                f"({quote(error)}): a class of a script must move to a module that can be imported"
            ) from error


def _module_of(source: str, content: object) -> nn.Module:
    if isinstance(content, nn.Module):
        return content
    raise SavedError(
        f"{source} holds {_describe(content)}, not a model: {_WHOLE}, or name a "
        "package.module:factory that builds it"
    )


def _describe(content: object) -> str:
    if not isinstance(content, dict):
        return _a(type(content).__name__)
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        return f"a state_dict of {len(content)} tensors"
    if any(isinstance(value, dict) for value in content.values()):
        return "a checkpoint (a dict of " + ", ".join(map(repr, list(content)[:4])) + ")"
    return "a dict"


# Exported programs


def _from_exported(source: str, kind: Kind, trust_pickle: bool) -> Saved:
    if kind is Kind.OLD_EXPORTED and not trust_pickle:
        raise SavedError(
            f"{source} was exported by PyTorch 2.7 or older and needs unpickling, which runs code "
            f"that the file names: export it again, or {_TRUST}"
        )
    with foreign(f"{source} is damaged, or of another version of PyTorch"), quiet():
        if not trust_pickle:
            _check_exported(source, torch._C.PyTorchFileReader(source))
        program = torch.export.load(source)
    return Saved(program)


def _check_exported(source: str, reader: Any) -> None:
    """Refuse an exported program that could run more than PyTorch's own operators.

    The members are read with PyTorch's own reader: what is checked is what is loaded.
    """
    names = set(reader.get_all_records())
    if any(name.startswith("data/aotinductor/") for name in names):
        raise SavedError(f"{source} holds compiled code of AOTInductor, not a graph to report on")
    if "models/model.json" not in names:
        raise SavedError(f"{source} holds no program named 'model', as torch.export.save writes it")
    for name in sorted(names):
        if name.endswith("_config.json"):
            _check_payloads(source, reader, name)
        elif name.startswith("models/"):
            _check_strings(source, "", json.loads(reader.get_record(name)))
        elif name.endswith(".pt"):
            _check_plain_pickle(source, name, reader.get_record(name))


def _needs_trust(source: str, what: str) -> SavedError:
    return SavedError(f"{source} holds {what}, and loading that can run code: {_TRUST}")


def _check_plain_pickle(source: str, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location=_device(), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _needs_trust(source, f"pickled Python objects in {name}") from error


def _check_payloads(source: str, reader: Any, name: str) -> None:
    for key, payload in json.loads(reader.get_record(name))["config"].items():
        _check_strings(source, "", {"parameter_name": key, "path_name": payload["path_name"]})
        meta = payload["tensor_meta"]
        if payload["use_pickle"] or meta is None:
            raise _needs_trust(source, f"the pickled object {key!r}")
        content = reader.get_record(os.path.join(os.path.dirname(name), payload["path_name"]))
        elements = math.prod(length["as_int"] for length in meta["sizes"])
        if elements and not content:
            raise SavedError(f"{source} is damaged: the tensor {key!r} has no content")


# Keys whose strings become names in generated source.
_NAMES = frozenset({"name", "as_name", "forward_arg_names"})
# Keys whose strings are only stored, compared or quoted: never part of generated source.
_TEXTS = frozenset({"metadata", "as_string", "as_strings", "guards_code", "torch_version"})
# Keys whose strings are JSON again (the structure of the inputs and outputs).
_NESTED = frozenset({"in_spec", "out_spec", "context"})
_OPERATORS = ("torch.ops.", "_operator.", "math.", "torch.sym_")
_WORD = re.compile(r"[\w.:#+/ -]*")
_SYMPY_CALLS = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|And|Or|Not|Equality|Unequality|LessThan|"
    "GreaterThan|StrictLessThan|StrictGreaterThan|Piecewise|ExprCondPair|FloorDiv|ModularIndexing|"
    "Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|"
    "FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|"
    "RoundDecimal|ToFloat|Identity|floor|ceiling"
)
_SYMPY_NODES = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.Tuple,
    ast.UnaryOp,
    ast.USub,
)


def _check_strings(source: str, key: str, value: object) -> None:
    """Walk the JSON of a program: no string that reaches generated source is more than a name."""
    if isinstance(value, dict):
        for name, part in value.items():
            _require(source, name, _WORD.fullmatch(name) is not None)
            if name not in _TEXTS:
                _check_strings(source, name, part)
    elif isinstance(value, list):
        for part in value:
            _check_strings(source, key, part)
    elif isinstance(value, str):
        _check_string(source, key, value)


def _check_string(source: str, key: str, text: str) -> None:
    if key == "expr_str":
        _require(source, text, _is_plain_expression(text))
    elif key in _NAMES:
        _require(source, text, not text or text.isidentifier())
    elif key == "target":
        _require(source, text, text.startswith(_OPERATORS) and _WORD.fullmatch(text) is not None)
    elif key in _NESTED and text[:1] in ("[", "{", '"'):
        nested = json.loads(text)
        # These make PyTorch import a module that the file names.
        _require(source, text, "default_factory_module" not in text and "__enum__" not in text)
        _check_strings(source, key, nested)
    else:
        _require(source, text, _WORD.fullmatch(text) is not None)


def _require(source: str, text: str, sound: bool) -> None:
    if not sound:
        raise _needs_trust(source, f"the unusual text {text[:60]!r} where a name is expected")


def _is_plain_expression(text: str) -> bool:
    """Is this what `sympy.srepr` writes for a size: constructors of numbers and symbols only?"""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return all(isinstance(node, _SYMPY_NODES) and _is_plain_node(node) for node in nodes)


def _is_plain_node(node: ast.AST) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and bool(_SYMPY_CALLS.fullmatch(node.func.id))
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    if isinstance(node, ast.Constant):
        return not isinstance(node.value, str) or _WORD.fullmatch(node.value) is not None
    return True
