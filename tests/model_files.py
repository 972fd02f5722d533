"""Files of models, and what changes them: for the tests that read files."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from conjoin.files.loading import load
from conjoin.foreign import SavedError

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
        load(str(source), trust_pickle=trust, **options)
    return str(caught.value)


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
