"""What the README shows is what happens.

Python blocks run one after another in one namespace; the text block that follows one holds what
it prints. Console blocks hold commands and what they print. The list of reasons is made from the
enum, the tables of hazards (in tests/HAZARDS.md) and dialects from those that `test_hazards.py` and
`test_dialects.py` run, and those of speed from the result of the benchmark that is kept.
`CONJOIN_REGENERATE=1 pytest tests/test_readme.py` writes what happens into the pages.
"""

import contextlib
import functools
import io
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import dialects
import pytest
import torch
from awkward import EXACT, HAZARDS, LIFE
from benchmarks import tables

from conjoin import cli
from conjoin.legality import Reason

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "tests" / "HAZARDS.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([\w./]*)#?([\w-]*)\)")
SECTION = re.compile(r"(<!-- (\w+) -->).*?(<!-- /\2 -->)", re.DOTALL)


def anchors(page: Path) -> list[str]:
    """The names by which a page's sections are linked to, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]


def printed(run) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        run()
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def console(block: str) -> str:
    """The commands of a block, each followed by what it prints."""
    commands = [line for line in block.splitlines() if line.startswith("$ ")]
    return "".join(
        f"{command}\n\n{printed(functools.partial(succeed, command))}" for command in commands
    )


def succeed(command: str) -> None:
    assert cli.main(shlex.split(command)[2:]) == 0, command


def reasons() -> str:
    return "\n".join(f"- `{r.name}`: {r.value}" for r in Reason)


def hazards() -> str:
    head = "| hazard | plain tracing or naive fusion | conjoin |\n|---|---|---|"
    rows = (
        f"| {' '.join(hazard.subject.__doc__.split())} | {hazard.naive} | "
        f"{'exact' if hazard.outcome is EXACT else f'`{hazard.outcome.name}`'} |"
        for hazard in (*HAZARDS, *LIFE)
    )
    return "\n".join((head, *rows))


def speed() -> str:
    return tables.markdown(tables.load())


def gain() -> str:
    return tables.gain(tables.load())


MADE = {
    "gain": gain,
    "reasons": reasons,
    "hazards": hazards,
    "speed": speed,
    "dialects": dialects.table,
}
"""The sections between comments, and what makes them."""


def as_it_happens(text: str) -> str:
    """A page with every output replaced by what really comes out."""
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

    def section(match: re.Match[str]) -> str:
        opening, name, closing = match.groups()
        return f"{opening}\n\n{MADE[name]()}\n\n{closing}"

    return SECTION.sub(section, BLOCK.sub(block, text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_is_what_happens(page):
    expected = as_it_happens(page.read_text())
    if os.environ.get("CONJOIN_REGENERATE"):
        page.write_text(expected)
    text = page.read_text()
    assert text == expected
    assert text.count("```text\n```") == 0


def test_each_section_that_is_made_is_on_one_page():
    found = [name for page in PAGES for _, name, _ in SECTION.findall(page.read_text())]
    assert sorted(found) == sorted(MADE)


def test_links_between_pages_and_sections_lead_somewhere():
    for page in PAGES:
        for path, section in LINK.findall(page.read_text()):
            target = page.parent / path if path else page
            assert target.is_file(), path
            assert not section or section in anchors(target), section


def test_an_import_brings_the_names_that_are_called():
    named = {*re.findall(r"`conjoin\.([\w.]+)\(", README.read_text())}
    assert "checkpoints.separate" in named
    command = "\n".join(["import conjoin", *(f"conjoin.{name}" for name in sorted(named))])
    subprocess.run([sys.executable, "-c", command], check=True)
