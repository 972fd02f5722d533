"""Writes a file whole or not at all, and replaces nothing unasked."""

from __future__ import annotations

import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.export import ExportedProgram

from conjoin.foreign import SavedError, foreign, quiet, quote

if TYPE_CHECKING:
    from typing_extensions import Buffer

_SEPARATORS = tuple(filter(None, (os.sep, os.altsep)))
_NO_MODULES = {".onnx": "what conjoin export writes", ".safetensors": "tensors only"}


def check_out(out: str, *, source: str, force: bool) -> None:
    """Refuse an output path that cannot or must not be written, before any work is done.

    Raises:
        SavedError: `out` exists and `force` is not given, or its folder takes no file.
    """
    if not out:
        raise SavedError("the name of the file to write is empty: give one with -o")
    folder, mode = os.path.dirname(os.path.realpath(out)), _mode_at(out)
    if mode is not None and stat.S_ISDIR(mode):
        raise SavedError(f"{out} is a folder: name a file in it")
    if out.endswith(_SEPARATORS):
        raise SavedError(f"there is no folder {out}, whose name ends as one: name a file")
    if not os.path.isdir(folder):
        raise SavedError(f"there is no folder {folder} to write {os.path.basename(out)} to")
    if mode is not None and not stat.S_ISREG(mode):
        raise SavedError(f"{out} is not a regular file, and will not be replaced")
    if mode is not None and not force:
        same = os.path.exists(source) and os.path.samefile(source, out)
        what = "is the file that is read" if same else "exists already"
        raise SavedError(f"{out} {what}: give another name, or --force to replace it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SavedError(f"the folder {folder} cannot be written to: give a name in another one")


def _mode_at(out: str) -> int | None:
    """The mode of what is at `out`; None where nothing is.

    Raises:
        SavedError: nothing can be there: the name is too long, its links go round in a circle.
    """
    try:
        return os.stat(out).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SavedError(f"cannot write {out}: {quote(error)}; give another name") from error


def check_suffix(model: nn.Module | ExportedProgram, out: str) -> None:
    """Refuse a name that tells of another kind of file than what is written.

    Raises:
        SavedError: an exported program would not be written to a `.pt2` file, or a module would be
            written to a file of another kind.
    """
    suffix = Path(out).suffix
    program, named = isinstance(model, ExportedProgram), suffix == ".pt2"
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
    if suffix in _NO_MODULES:
        raise SavedError(
            f"{out} would hold a module, and {suffix} is for {_NO_MODULES[suffix]}: give it a name "
            "that ends in .pt"
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
    ):
        save(model, temporary)


def save(model: nn.Module | ExportedProgram, path: Path) -> None:
    """Write `model` to a file, of which only a part may be there where this raises."""
    with _Archive(io.FileIO(path, "wb")) as archive:
        try:
            if isinstance(model, ExportedProgram):
                torch.export.save(model, archive)
            else:
                torch.save(model, archive)
        finally:
            if archive.error is not None:
                raise archive.error


class _Archive(io.BufferedWriter):
    """A file for PyTorch's archive writer, which does not get to know that a write has failed.

    That writer ends what it has begun when it is taken apart, and the process where that fails.
    """

    error: BaseException | None = None

    def write(self, content: Buffer) -> int:
        """Writes all, or nothing where a write has failed before, or nobody waits for it."""
        try:
            if self.error is None and not self.closed:
                return super().write(content)
        except (OSError, KeyboardInterrupt) as error:
            self.error = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        """Writes what is left, likewise."""
        if self.error is None:
            super().flush()


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
