"""What must not stand in code that is traced, whether it runs or not."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from types import CodeType, FunctionType

from conjoin.tracing.proxies import INNARDS, UnsoundError

FORBIDDEN = frozenset(
    "DELETE_ATTR STORE_GLOBAL DELETE_GLOBAL DELETE_DEREF IMPORT_NAME IMPORT_FROM "
    "SETUP_FINALLY SETUP_ASYNC_WITH BEFORE_ASYNC_WITH CHECK_EXC_MATCH CHECK_EG_MATCH "
    "LOAD_BUILD_CLASS GET_AWAITABLE GET_AITER GET_ANEXT SEND YIELD_FROM GET_YIELD_FROM_ITER "
    "MATCH_CLASS MATCH_MAPPING MATCH_SEQUENCE MATCH_KEYS".split()
)
"""Bytecode that has a side effect, catches an error, or tells types apart.

A `with` may stand there: the sandbox hands out no contexts but those that it knows. So may what
sets an attribute of the first argument, which the sandbox notes.
"""

MARKS = frozenset({"_torchscript_modifier", "__wrapped__"})
"""Attributes of functions that mean nothing to Python."""


def check(function: FunctionType) -> bool:
    """Checks that a trace may run a function; whether the function asks if a value is None.

    Raises:
        UnsoundError: it does what a trace cannot repeat, or has a state of its own.
    """
    if vars(function).keys() - MARKS:
        raise UnsoundError("a function with attributes")
    asks_none = [_check(code) for code in _nested(function.__code__)]
    return any(asks_none)


def _nested(code: CodeType) -> Iterator[CodeType]:
    """The code of a function and of the comprehensions and functions in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _check(code: CodeType) -> bool:
    asks_none, before = False, None
    steps = list(dis.get_instructions(code))
    for step, after in zip(steps, [*steps[1:], None], strict=True):
        operation = step.opname
        if operation in FORBIDDEN:
            raise UnsoundError(operation)
        ends_with = after is not None and after.opname == "WITH_EXCEPT_START"
        if operation == "PUSH_EXC_INFO" and not ends_with:
            raise UnsoundError("it catches an error")
        if operation == "STORE_DEREF" and step.argval not in code.co_cellvars:
            raise UnsoundError("a variable of an enclosing function")
        if operation.startswith(("YIELD", "ASYNC_GEN")) and code.co_name != "<genexpr>":
            raise UnsoundError(operation)
        if operation in ("LOAD_ATTR", "LOAD_METHOD") and _is_inner(step.argval):
            raise UnsoundError(f"it reads .{step.argval}")
        if operation == "STORE_ATTR" and not _is_first(before, code):
            raise UnsoundError(operation)
        if operation == "IS_OP":
            known = before is not None and before.opname == "LOAD_CONST"
            if before is None or not known or before.argval is not None:
                raise UnsoundError("it asks whether two values are the same object")
            asks_none = True
        if operation.endswith(("_IF_NONE", "_IF_NOT_NONE")):
            asks_none = True
        before = step
    return asks_none


def _is_first(step: dis.Instruction | None, code: CodeType) -> bool:
    """Whether a step ends with loading the first argument."""
    loads = step is not None and step.opname.startswith(("LOAD_FAST", "LOAD_DEREF"))
    if step is None or not loads or not code.co_argcount:
        return False
    *_, name = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    return bool(name == code.co_varnames[0])


def _is_inner(name: str) -> bool:
    """Whether an attribute leads to what a value is made of."""
    special = name.startswith("__") and name.endswith("__") and name != "__getattr__"
    return special or name in INNARDS
