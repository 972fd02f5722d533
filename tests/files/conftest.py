"""A model in a file, as a module and as a program."""

import io
from pathlib import Path

import pytest
import torch
from model_files import Net


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
