"""Loads models from files and factories, without running code that a file names.

- A module saved whole by `torch.save` is a pickle, which runs code that the file names, so it is
  opened only when the caller trusts it.
- An exported program of `torch.export.save` is loaded as data. PyTorch's reader unpickles some
  members and generates source from names in the file, so those are checked first and anything that
  could run is refused unless the caller trusts the file.
- `package.module:factory` is the caller's own code.

Whatever is wrong becomes a `SavedError`, whose message is one sentence that says what to do.
"""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from conjoin.files.content import WHOLE, Content, content_of
from conjoin.files.untrusted import TRUST, check_exported, device
from conjoin.foreign import SavedError, foreign, quiet, quote


@dataclass(frozen=True)
class Arguments:
    """What a factory is called with."""

    positional: tuple[object, ...] = ()
    keywords: Mapping[str, object] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.positional or self.keywords)


def load(
    source: str,
    *,
    trust_pickle: bool = False,
    arguments: Arguments | None = None,
) -> nn.Module | ExportedProgram:
    """Give the model, or the exported program, that `source` names.

    Args:
        source: a file of `torch.save` or `torch.export.save`, or `package.module:factory`.
        trust_pickle: unpickle what needs it. A pickle runs code that the file names.
        arguments: what a factory is called with.

    Raises:
        SavedError: no model comes of it; the message says why and what to do.
    """
    arguments = arguments or Arguments()
    content = content_of(source)
    if content is Content.FACTORY:
        return _from_factory(source, arguments)
    if arguments:
        raise SavedError(f"--arg is for package.module:factory, and {source} is a file")
    if content is Content.SCRIPT:
        raise SavedError(
            f"{source} is a TorchScript archive, which holds compiled code and no modules: "
            f"{WHOLE} before scripting it, or export it with torch.export"
        )
    if content is Content.PICKLE:
        return _from_pickle(source, trust_pickle)
    return _from_exported(source, content, trust_pickle)


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
            f"names: {TRUST}"
        )
    return _module_of(source, _unpickled(source))


def _plain_content(source: str) -> tuple[object] | None:
    """What a file of nothing but tensors and containers holds; None where it has other objects."""
    with foreign(f"{source} is damaged, or not a file of torch.save"):
        try:
            return (torch.load(source, map_location=device(), weights_only=True),)
        except pickle.UnpicklingError:
            return None


def _unpickled(source: str) -> object:
    with foreign(f"{source} cannot be unpickled"):
        try:
            return torch.load(source, map_location=device(), weights_only=False)
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
        f"{source} holds {_describe(content)}, not a model: {WHOLE}, or name a "
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


def _from_exported(source: str, content: Content, trust_pickle: bool) -> ExportedProgram:
    if content is Content.OLD_EXPORTED and not trust_pickle:
        raise SavedError(
            f"{source} was exported by PyTorch 2.7 or older and needs unpickling, which runs code "
            f"that the file names: export it again, or {TRUST}"
        )
    # PyTorch opens no name that is not UTF-8, and reads what is open.
    with (
        foreign(f"{source} is damaged, or of another version of PyTorch"),
        quiet(),
        open(source, "rb") as file,
    ):
        if not trust_pickle:
            check_exported(source, torch._C.PyTorchFileReader(file))
            file.seek(0)
        return torch.export.load(file)
