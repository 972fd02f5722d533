"""Tells by a file's content, not by its suffix, what it holds, before anything is loaded.

A model comes from one of three places: a module saved whole by `torch.save`, an exported program of
`torch.export.save`, or `package.module:factory`. Archives must be sound before anybody opens them.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from conjoin.foreign import SavedError, foreign

# torch.save stores members uncompressed, so an honest archive unpacks to its own size.
MAX_EXPANSION = 20
# Below this size no archive is a danger to memory, however well it is packed.
HARMLESS_BYTES = 64 * 2**20

WHOLE = "save the model whole with torch.save(model, path)"
"""What to do with a file that holds no model."""

_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")
"""What `torch.save` pickles first where it writes no archive, as up to PyTorch 1.5."""

_FACTORY = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)")


class Content(Enum):
    """What a source holds."""

    FACTORY = "a factory in a module"
    EXPORTED = "an exported program"
    OLD_EXPORTED = "an exported program of PyTorch 2.7 or older"
    SCRIPT = "a TorchScript archive"
    PICKLE = "a pickle of torch.save"


def content_of(source: str) -> Content:
    """Say what `source` holds, without loading it.

    Args:
        source: a path, or `package.module:factory` where no such path exists.

    Raises:
        SavedError: there is no such file, or it is none that PyTorch writes.
    """
    path = Path(source)
    if not os.path.lexists(path) and _FACTORY.fullmatch(source):
        return Content.FACTORY
    _check_file(source)
    with foreign(f"{source} cannot be read"), path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"PK\x03\x04"):
        return _content_of_archive(path, _checked_names(path))
    if _MAGIC in start:
        return Content.PICKLE
    if start[:1] == b"\x80":
        raise SavedError(f"{source} is a pickle, but none of torch.save, or is damaged: {WHOLE}")
    if start[8:9] == b"{":
        raise SavedError(f"{source} looks like a safetensors file, tensors only, no model: {WHOLE}")
    raise SavedError(
        f"{source} is not a file of torch.save or torch.export.save, or is damaged: {WHOLE}, or "
        "name a package.module:factory that builds it"
    )


def _check_file(path: str) -> None:
    if not os.path.exists(path):
        hint = "" if ":" not in path else " and it is no package.module:factory"
        raise SavedError(
            f"there is no file {path}{hint}: name a file, or a function that builds the model as "
            "package.module:factory"
        )
    if os.path.isdir(path):
        raise SavedError(f"{path} is a folder: name the model file in it")
    if not os.path.isfile(path):
        raise SavedError(f"{path} is not a regular file: save the model to one")
    if not os.access(path, os.R_OK):
        raise SavedError(f"{path} cannot be read: permission denied")
    if os.path.getsize(path) == 0:
        raise SavedError(f"{path} is empty: was it written to the end?")


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


def _content_of_archive(path: Path, names: Sequence[str]) -> Content:
    if "serialized_exported_program.json" in names:
        return Content.OLD_EXPORTED
    root = names[0].split("/")[0] + "/"
    if not all(name.startswith(root) for name in names):
        raise SavedError(f"{path} is a zip archive, but not one that PyTorch wrote")
    inside = {name.removeprefix(root) for name in names}
    if "archive_format" in inside:
        return Content.EXPORTED
    if "constants.pkl" in inside:
        return Content.SCRIPT
    if "data.pkl" in inside:
        return Content.PICKLE
    raise SavedError(f"{path} is a zip archive, but holds no model of PyTorch")
