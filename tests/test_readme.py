"""What the README shows is what happens.

Python blocks run one after another in one namespace; the text block that follows one holds what
it prints. Console blocks hold commands and what they print. The list of reasons is made from the
enum. `CONJOIN_REGENERATE=1 pytest tests/test_readme.py` writes what happens into the README.
"""

import contextlib
import io
import os
import re
import shlex
from pathlib import Path

import torch

from conjoin import cli
from conjoin.legality import Reason

README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)


def printed(run) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def console(block: str) -> str:
    """The commands of a block, each followed by what it prints."""
    commands = [line for line in block.splitlines() if line.startswith("$ ")]
    return "".join(
        f"{command}\n\n{printed(lambda c=command: cli.main(shlex.split(c)[2:]))}"
        for command in commands
    )


def reasons(_: re.Match[str]) -> str:
    lines = "\n".join(f"- `{r.name}`: {r.value}" for r in Reason)
    return f"<!-- reasons -->\n\n{lines}\n\n<!-- /reasons -->"


def as_it_happens(text: str) -> str:
    """The README with every output replaced by what really comes out."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "readme"}
    output = ""

    def block(match: re.Match[str]) -> str:
        nonlocal output
        language, code = match.groups()
        if language == "python":
            output = printed(lambda: exec(compile(code, "README.md", "exec"), namespace))
        elif language == "text":
            code = output
        elif language == "console":
            code = console(code)
        return f"```{language}\n{code}```\n"

    text = BLOCK.sub(block, text)
    return re.sub(r"<!-- reasons -->.*<!-- /reasons -->", reasons, text, flags=re.DOTALL)


def test_readme():
    text = README.read_text()
    expected = as_it_happens(text)
    if os.environ.get("CONJOIN_REGENERATE"):
        README.write_text(expected)
    assert README.read_text() == expected
    assert text.count("```text\n```") == 0
