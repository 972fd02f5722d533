"""The examples run to their end, which they reach only where all their checks hold."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Where pickle looks for the classes of the example.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_vae_digits(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    example("vae_digits").main(epochs=1)
    out = capfd.readouterr().out
    assert "$ conjoin report vae.pt --trust-pickle --input 64x1x28x28" in out
    assert "encoder.6.{0,1}" in out
    assert "64+64 -> 128" in out
    assert out.endswith("All outputs agree.\n")
