"""Writes a file whole or not at all, and replaces nothing unasked."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from conjoin.foreign import SavedError, foreign, quiet, quote


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
