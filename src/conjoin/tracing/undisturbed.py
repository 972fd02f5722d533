"""Puts back what a look at a model may change, on the model and in the process.

A run or a trace of the model's code may draw random numbers, break off between entering a mode
and leaving it, and keep things: in attributes of its modules, in globals, on classes, in defaults
and closures, in caches of functions. All of that is put back. What was kept during a run on fake
tensors would be fake, and the model would find it there later.
"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from conjoin.reachable import made_once, reached_beside, reached_by_code
from conjoin.tracing.modes import unchanged_modes, unmoved_streams
from conjoin.tracing.restoring import Undo, save_module, save_tensor, savers


@contextlib.contextmanager
def undisturbed(
    model: nn.Module | None = None, given: object = (), *, reached: bool = True
) -> Iterator[None]:
    """Leaves the random streams and the modes as they were, and what the model's code keeps.

    Args:
        model: the model whose code runs, if it may keep something.
        given: what it is called with, and may change.
        reached: whether what is kept beyond the modules is put back too; without, `putting_back`
            does so, for many looks at once.
    """
    undos: list[Undo] = []
    try:
        modules = () if model is None else (*model.modules(),)
        undos += map(save_module, modules)
        if modules and reached:
            own = _own_tensors(modules)
            undos += map(save_tensor, own.values())
            undos += _reached(modules, own, given)
        # Dynamo never again compiles a function that is called within a dispatch mode.
        stance = torch.compiler.set_stance("force_eager")
        with unmoved_streams(), unchanged_modes(), stance:
            yield
    finally:
        _undo(undos)


@contextlib.contextmanager
def putting_back(model: nn.Module) -> Iterator[None]:
    """Leaves what the model's code can reach and change as it was, but for the modules."""
    undos: list[Undo] = []
    try:
        modules = (*model.modules(),)
        undos += _reached(modules, _own_tensors(modules))
        yield
    finally:
        _undo(undos)


def _undo(undos: list[Undo]) -> None:
    # What was noted twice was noted first as it was.
    for undo in reversed(undos):
        undo()


@contextlib.contextmanager
def letting_go() -> Iterator[None]:
    """Frees what the frames of failed code hold before the error goes on.

    A mode that it entered by hand and never left must be undone while those around it are on.
    """
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def _own_tensors(modules: Iterable[nn.Module]) -> dict[int, Tensor]:
    """The parameters and buffers of modules, by their ids."""
    held = (each for module in modules for each in (module._parameters, module._buffers))
    return {id(t): t for tensors in held for t in tensors.values() if t is not None}


def _reached(
    modules: Sequence[nn.Module], own: Collection[int], given: object = ()
) -> Iterator[Undo]:
    """How to put back what the code of modules can reach and change, but for them.

    Args:
        modules: the modules of a model.
        own: the ids of their tensors, which are not put back either.
        given: what the model is called with.
    """
    code, beside = reached_by_code(modules), reached_beside(modules, given)
    values = [*code.values(), *beside.values()]
    yield from (save_tensor(v) for v in values if isinstance(v, Tensor) and id(v) not in own)
    yield from (save_module(v) for v in beside.values() if isinstance(v, nn.Module))
    for save in (*made_once(savers, code), *savers(beside)):
        yield save()
