"""Turns errors of other people's code into one sentence, and holds back what it logs."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO

# A foreign exception's text is quoted up to here: enough to recognise it, one line to read. Of what
# is longer, only the first sentence.
MAX_QUOTE = 300

SENTENCE_ENDS = re.compile(r"(?<=[.!?])\s+(?=[A-Z])")

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class SavedError(ValueError):
    """A file or factory that gives no model, or a file that cannot be written."""


@contextmanager
def foreign(sentence: str) -> Iterator[None]:
    """Turn whatever comes out of code that is not ours into a `SavedError`."""
    try:
        yield
    except SavedError:
        raise
    # A factory, a trusted pickle's classes and PyTorch's readers on hostile bytes can raise
    # anything at all, and a module may call sys.exit() when it is imported.
    except (Exception, SystemExit) as error:
        raise SavedError(f"{sentence}: {quote(error)}") from error


def quote(error: BaseException) -> str:
    """What an exception says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if type(error).__module__.startswith("torch.onnx") and error.__cause__ is not None:
        return quote(error.__cause__)  # The error itself only tells which step failed.
    text = COLOURS.sub("", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines) if lines[0].endswith(":") else lines[0]  # What it is about comes next.
    said = said if len(said) <= MAX_QUOTE else SENTENCE_ENDS.split(said)[0]
    return f"{type(error).__name__}: {said[:MAX_QUOTE]}"


@contextmanager
def quiet(*, prints: bool = False) -> Iterator[None]:
    """Hold back warnings and log records: PyTorch logs tracebacks of what we report.

    Args:
        prints: hold back what is printed, too.
    """
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore")
            if prints:
                stack.enter_context(redirect_stdout(StringIO()))
                stack.enter_context(redirect_stderr(StringIO()))
            yield
    finally:
        logging.disable(before)


@contextmanager
def quieter(name: str, level: int) -> Iterator[None]:
    """Hold back what one of PyTorch's loggers tells below a level: what we raise says it."""
    log = logging.getLogger(name)
    before = log.level
    log.setLevel(level)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def unremarked() -> Iterator[None]:
    """Hold back PyTorch's remark on its own tree specifications, made when a program is copied."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
        yield
