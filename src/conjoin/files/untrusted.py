"""Checks exported programs from unknown sources: to load one must not run code.

PyTorch's reader unpickles some members and generates source from names in the file. So the pickles
may hold tensors only, and what becomes part of source must be a plain name or number.
"""

from __future__ import annotations

import ast
import io
import json
import math
import os
import pickle
import re
from typing import Any

import torch

from conjoin.foreign import SavedError

TRUST = "give --trust-pickle if you trust where it came from"
"""What to do with a file that could run code."""

# Keys whose strings become names in generated source.
_NAMES = frozenset({"name", "as_name", "forward_arg_names"})
# Keys whose strings are only stored, compared or quoted: never part of generated source.
_TEXTS = frozenset({"metadata", "as_string", "as_strings", "torch_version"})
# Keys whose strings are JSON again (the structure of the inputs and outputs).
_NESTED = frozenset({"in_spec", "out_spec", "context"})
_OPERATORS = ("torch.ops.", "_operator.", "math.", "torch.sym_")
_WORD = re.compile(r"[\w.:#+/ -]*")
# The key whose dictionary has sizes for keys, such as `2*s77`, which are only compared.
_BY_SIZE = "range_constraints"
_SIZE = re.compile(r"[\w.,:#+*/()% -]*")
_SYMPY_CALLS = re.compile(
    "Symbol|Integer|Float|Rational|Add|Mul|Pow|Max|Min|Abs|And|Or|Not|Equality|Unequality|LessThan|"
    "GreaterThan|StrictLessThan|StrictGreaterThan|Piecewise|ExprCondPair|FloorDiv|ModularIndexing|"
    "Where|PythonMod|Mod|CleanDiv|CeilToInt|FloorToInt|CeilDiv|LShift|RShift|PowByNatural|FloatPow|"
    "FloatTrueDiv|IntTrueDiv|IsNonOverlappingAndDenseIndicator|TruncToFloat|TruncToInt|RoundToInt|"
    "RoundDecimal|ToFloat|Identity|floor|ceiling"
)
_SYMPY_NODES = (
    ast.Expression,
    ast.Call,
    ast.keyword,
    ast.Name,
    ast.Load,
    ast.Constant,
    ast.Tuple,
    ast.UnaryOp,
    ast.USub,
)
# The letters of sizes and guards, as PyTorch writes them.
_EXPRESSION = re.compile(r"[\w.,:+*/%()\[\]<>=!' -]*")
_DIGITS = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d{1,3})?")
# The calls that are given a word, and nothing else but settings.
_WORDS = {"Symbol": _WORD, "Float": _DIGITS}
_NUMBERS = ("Integer", "Rational", "Float")
_POWERS = frozenset({"Pow", "PowByNatural", "FloatPow", "LShift"})
MOST_POWER = 64
"""The largest exponent in a size: larger ones are no sizes, and may take for ever to work out."""
MOST_DIGITS = 1000
"""How many digits a number in a size is computed with at most; PyTorch writes 53 bits."""

_GUARD_NODES = (
    *(ast.Expression, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.boolop, ast.cmpop),
    *(ast.Not, ast.USub, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),
    *(ast.Subscript, ast.Attribute, ast.Call, ast.Name, ast.Constant, ast.Load),
)
# What such a comparison asks of an input, which it finds in `L` by its name, or at an attribute.
_ASKED = frozenset({"size", "stride", "storage_offset"})


def device() -> str | None:
    """Where tensors are read to: a model saved on a GPU can be read on a machine without one."""
    return None if torch.accelerator.is_available() else "cpu"


def check_exported(source: str, reader: Any) -> None:
    """Refuse an exported program that could run more than PyTorch's own operators.

    The members are read with PyTorch's own reader: what is checked is what is loaded.
    """
    names = set(reader.get_all_records())
    if any(name.startswith("data/aotinductor/") for name in names):
        raise SavedError(f"{source} holds compiled code of AOTInductor, not a graph to report on")
    if "models/model.json" not in names:
        raise SavedError(f"{source} holds no program named 'model', as torch.export.save writes it")
    for name in sorted(names):
        if name.endswith("_config.json"):
            _check_payloads(source, reader, name)
        elif name.startswith("models/"):
            _check_strings(source, "", json.loads(reader.get_record(name)))
        elif name.endswith(".pt"):
            _check_plain_pickle(source, name, reader.get_record(name))


def _needs_trust(source: str, what: str) -> SavedError:
    return SavedError(f"{source} holds {what}, and loading that can run code: {TRUST}")


def _check_plain_pickle(source: str, name: str, content: bytes) -> None:
    if not content:
        return
    try:
        torch.load(io.BytesIO(content), map_location=device(), weights_only=True)
    except pickle.UnpicklingError as error:
        raise _needs_trust(source, f"pickled Python objects in {name}") from error


def _check_payloads(source: str, reader: Any, name: str) -> None:
    for key, payload in json.loads(reader.get_record(name))["config"].items():
        _check_strings(source, "", {"parameter_name": key, "path_name": payload["path_name"]})
        meta = payload["tensor_meta"]
        if payload["use_pickle"] or meta is None:
            raise _needs_trust(source, f"the pickled object {key!r}")
        content = reader.get_record(os.path.join(os.path.dirname(name), payload["path_name"]))
        elements = math.prod(length["as_int"] for length in meta["sizes"])
        if elements and not content:
            raise SavedError(f"{source} is damaged: the tensor {key!r} has no content")


def _check_strings(source: str, key: str, value: object) -> None:
    """Walk the JSON of a program: no string that reaches generated source is more than a name."""
    if isinstance(value, dict):
        names = _SIZE if key == _BY_SIZE else _WORD
        for name, part in value.items():
            _require(source, name, names.fullmatch(name) is not None)
            if name not in _TEXTS or not _is_text(part):
                _check_strings(source, name, part)
    elif isinstance(value, list):
        for part in value:
            _check_strings(source, key, part)
    elif isinstance(value, str):
        _check_string(source, key, value)


def _is_text(value: object) -> bool:
    """Whether this is text alone: a tensor may have the name of a key that texts stand at."""
    parts = [*value.values()] if isinstance(value, dict) else value
    texts = parts if isinstance(parts, list) else [parts]
    return all(isinstance(each, str) for each in texts)


def _check_string(source: str, key: str, text: str) -> None:
    if key == "expr_str":
        _require(source, text, _is_plain_expression(text))
    elif key == "guards_code":
        _require(source, text, _is_plain_guard(text))
    elif key in _NAMES:
        _require(source, text, not text or text.isidentifier())
    elif key == "target":
        _require(source, text, text.startswith(_OPERATORS) and _WORD.fullmatch(text) is not None)
    elif key in _NESTED and text[:1] in ("[", "{", '"'):
        nested = json.loads(text)
        # These make PyTorch import a module that the file names; a letter may be written as a code.
        plain = json.dumps(nested)
        _require(source, text, "default_factory_module" not in plain and "__enum__" not in plain)
        _check_strings(source, key, nested)
    else:
        _require(source, text, _WORD.fullmatch(text) is not None)


def _require(source: str, text: str, sound: bool) -> None:
    if not sound:
        raise _needs_trust(source, f"the unusual text {text[:60]!r} where a name is expected")


def _is_plain_expression(text: str) -> bool:
    """Is this what `sympy.srepr` writes for a size: constructors of numbers and symbols only?"""
    nodes = _parsed(text)
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    words = {id(word) for call in calls if _name(call) in _WORDS for word in call.args}
    return bool(nodes) and all(
        isinstance(n, _SYMPY_NODES) and _is_plain_node(n, id(n) in words) for n in nodes
    )


def _is_plain_guard(text: str) -> bool:
    """Does this only compare sizes of inputs: `L['x'].size()[0] + 1 <= 64`?

    Its text is written into a message in source as well, so that no string in it may hold a quote.
    """
    nodes = _parsed(text)
    keys = {id(node.slice) for node in nodes if isinstance(node, ast.Subscript)}
    return bool(nodes) and all(
        isinstance(n, _GUARD_NODES) and _is_plain_part(n, id(n) in keys) for n in nodes
    )


def _is_plain_part(node: ast.AST, is_key: bool) -> bool:
    if isinstance(node, ast.Constant):
        word = isinstance(node.value, str) and _WORD.fullmatch(node.value) is not None
        return isinstance(node.value, (int, float)) or (is_key and word)
    if isinstance(node, ast.Call):
        asks = isinstance(node.func, ast.Attribute) and node.func.attr in _ASKED
        return asks and not node.args and not node.keywords
    if isinstance(node, ast.Attribute):
        return not node.attr.startswith("_")
    return not isinstance(node, ast.Name) or node.id == "L"


def _parsed(text: str) -> list[ast.AST]:
    """The nodes of an expression; none where it is none, or not in the letters of one.

    PyTorch and sympy take the ends of lines out of it, which would make another text of a comment
    or of a string with a backslash in it.
    """
    if _EXPRESSION.fullmatch(text) is None:
        return []
    try:
        return list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return []


def _is_plain_node(node: ast.AST, is_word: bool) -> bool:
    if isinstance(node, ast.Call):
        return _SYMPY_CALLS.fullmatch(_name(node)) is not None and _is_quick_call(node)
    if isinstance(node, ast.Name):
        return not node.id.startswith("_")
    # Any other string sympy takes for an expression and evaluates, also one within a tuple.
    return not isinstance(node, ast.Constant) or is_word or isinstance(node.value, int)


def _name(call: ast.Call) -> str:
    """What is called; nothing where it has no plain name."""
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _is_quick_call(call: ast.Call) -> bool:
    """Does this not work out a number that takes for ever: `Pow(Integer(9), Integer(10**9))`?"""
    name = _name(call)
    constants = [each.value for each in call.args if isinstance(each, ast.Constant)]
    words = [constant for constant in constants if not isinstance(constant, int)]
    settings = [each.value.value for each in call.keywords if isinstance(each.value, ast.Constant)]
    if not all(isinstance(setting, int) and setting <= MOST_DIGITS for setting in settings):
        return False
    if name in _WORDS:
        is_word = [isinstance(w, str) and _WORDS[name].fullmatch(w) is not None for w in words]
        return len(call.args) == 1 and is_word == [True]
    if words:
        return False
    if name in _POWERS:
        return len(call.args) == 2 and _powers(call.args[0]) <= 1 and _is_small(call.args[1])
    return True


def _is_small(exponent: ast.expr) -> bool:
    """Is this a symbol or a small number, which is not worked out?"""
    if not isinstance(exponent, ast.Call) or not isinstance(exponent.func, ast.Name):
        return False
    if exponent.func.id == "Symbol":
        return True
    numbers = (node.value for node in ast.walk(exponent) if isinstance(node, ast.Constant))
    return exponent.func.id in _NUMBERS and all(_number(n) <= MOST_POWER for n in numbers)


def _number(value: object) -> float:
    """The number that this is, or whose digits; infinity where it is none."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return float(value)
    return value if isinstance(value, int) else math.inf


def _powers(expression: ast.expr) -> int:
    calls = (node.func for node in ast.walk(expression) if isinstance(node, ast.Call))
    return sum(isinstance(func, ast.Name) and func.id in _POWERS for func in calls)
