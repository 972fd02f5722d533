"""What stands for globals, modules of functions, classes and contexts in the sandbox."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from conjoin.tracing.sandbox.sandbox import Sandbox


class Globals(dict[str, Any]):
    """The globals of a function that runs in a sandbox; the dictionary itself stays empty."""

    def __init__(self, sandbox: Sandbox, namespace: dict[str, Any]) -> None:
        super().__init__()
        self.sandbox, self.namespace = sandbox, namespace

    def __getitem__(self, name: str) -> Any:
        return self.sandbox.load(self.namespace, name)


class Package:
    """A module of functions."""

    def __init__(self, sandbox: Sandbox, package: ModuleType) -> None:
        self._sandbox, self._package = sandbox, package

    def __getattr__(self, name: str) -> Any:
        return self._sandbox.member(self._package, name)


class Class:
    """A class, which is there to be asked for, and to be called where nothing comes of it."""

    def __init__(self, sandbox: Sandbox, cls: type) -> None:
        self._sandbox, self._cls = sandbox, cls

    def __getattr__(self, name: str) -> Any:
        return self._sandbox.of_class(self._cls, name)

    def __call__(self, *args: Any, **kwargs: Any) -> nn.Module:
        """A module such as `nn.Softmax(dim=-1)`, which is called in the same forward."""
        return self._sandbox.made(self._cls, args, kwargs)


class Super:
    """What `super()` gives."""

    def __init__(self, sandbox: Sandbox, cls: type, module: nn.Module) -> None:
        self._sandbox, self._cls, self._module = sandbox, cls, module

    def __getattr__(self, name: str) -> Any:
        return self._sandbox.of_super(self._cls, self._module, name)


class GradMode:
    """What `torch.no_grad()` and its like give: the graph changes the mode, and changes it back."""

    def __init__(self, sandbox: Sandbox, enabled: object) -> None:
        if type(enabled) is not bool:
            sandbox.refuse("a mode that a tensor decides")
        self._sandbox, self._enabled = sandbox, enabled
        sandbox.waiting.append(self)

    def __enter__(self) -> None:
        record = self._sandbox.record
        self._sandbox.waiting.remove(self)
        self._before = record(torch.is_grad_enabled)
        record(torch._C._set_grad_enabled, self._enabled)

    def __exit__(self, *error: object) -> None:
        self._sandbox.record(torch._C._set_grad_enabled, self._before)


GRAD_MODES: dict[Any, tuple[bool, ...]] = {
    torch.no_grad: (False,),
    torch.enable_grad: (True,),
    torch.set_grad_enabled: (),
}
"""The classes of such contexts, and the mode where it is not an argument of theirs."""


class Getter:
    """The function of a property, to be run by whoever reads it."""

    def __init__(self, function: Callable[[nn.Module], Any]) -> None:
        self.function = function
