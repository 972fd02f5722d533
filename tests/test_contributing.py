"""The map in CONTRIBUTING.md is made of the first sentence of each file.

`CONJOIN_REGENERATE=1 pytest tests/test_contributing.py` writes it anew.
"""

import ast
import os
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "CONTRIBUTING.md"
MAP = re.compile(r"(?<=<!-- map -->\n\n).*?(?=\n\n<!-- /map -->)", re.DOTALL)


def first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert docstring is not None, file
    return docstring.splitlines()[0]


def folders() -> Iterator[Path]:
    yield ROOT / "src/conjoin"
    inner = (ROOT / "src/conjoin").rglob("__init__.py")
    # Where it is installed for tests, `conjoin.passes` may be a link to `passes/`.
    yield from sorted(each.parent for each in inner if each.parents[1].name != "src")
    yield ROOT / "passes"


def section(folder: Path) -> str:
    files = sorted(each for each in folder.glob("*.py") if not each.name.startswith("__"))
    lines = [(file.name, first_line(file).replace("|", "\\|")) for file in files]
    rows = [f"| `{name}` | {line} |" for name, line in lines]
    title = f"**`{folder.relative_to(ROOT)}/`** {first_line(folder / '__init__.py')}"
    return "\n".join([title, "", "| file | |", "|---|---|", *rows])


def test_the_map_tells_of_every_file():
    found = [each for each in folders() if each.name != "passes" or each.parent == ROOT]
    expected = "\n\n".join(map(section, found))
    text = GUIDE.read_text()
    if os.environ.get("CONJOIN_REGENERATE"):
        GUIDE.write_text(MAP.sub(lambda _: expected, text))
    assert MAP.search(GUIDE.read_text())[0] == expected
