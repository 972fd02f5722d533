"""The README's tables and the plot, of a made-up result; `test_readme.py` has the kept one."""

import json

import pytest
from benchmarks import tables

MACHINE = {
    "date": "2026-01-02T03:04:05+00:00", "commit": "abc", "threads": 1, "cores": 2, "cpu": "A CPU",
    "device": "cpu", "python": "3.11", "torch": "2.13", "changed": False, "load": [0.25, 0.5, 0.75],
}  # fmt: skip


def peer(median, launches=None):
    ratio = {"median": median, "low": median - 0.1, "high": median + 0.1}
    found = {"seconds": ratio, "ratio": ratio, "setup_seconds": 1.25}
    return found if launches is None else {**found, "launches": launches}


def case(mode, **peers):
    return {
        "case": "heads", "about": "two heads", "mode": mode, "rounds": 9, "steps": 3,
        "peers": {
            "plain": peer(1, {"forward": 2, "backward": 4}),
            "by_hand": peer(0.5, {"forward": 1, "backward": 3}),
            "conjoin": peer(0.6, {"forward": 1, "backward": 3}),
            **peers,
        },
    }  # fmt: skip


RESULT = {
    "machine": MACHINE,
    "cases": [
        case("inference", compile=peer(2.0)),
        case("training", compile={"unavailable": "no compiler"}),
    ],
    "scaling": [
        {
            "layers": 1000,
            "way": "conjoin.optimize",
            "seconds": 2.0,
            "extra_mib": 8.0,
            "model_mib": 16.0,
        }
    ],
}


def test_the_tables():
    lines = tables.markdown(RESULT).splitlines()
    assert lines[0] == (
        "Taken on 2026-01-02 at commit abc, with 1 thread of 2 cores, A CPU, Python 3.11 and "
        "PyTorch 2.13; the load average was 0.2 before."
    )
    by_hand, conjoin = "0.50 (0.40 to 0.60)", "0.60 (0.50 to 0.70)"
    row = f"| `heads`: two heads | 6 → 4 | {by_hand} | {conjoin} | {by_hand} | {conjoin} |"
    assert row in lines
    assert "| `heads` | inference | `torch.compile` | 2.00 (1.90 to 2.10) | 1.25 s |" in lines
    assert "| `heads` | training | `torch.compile` | none: no compiler | |" in lines
    assert "| 1,000 | `conjoin.optimize` | 2.0 s | 8 MiB | 16 MiB |" in lines


def test_the_cases_in_brief(monkeypatch):
    monkeypatch.setattr(tables, "SHOWN", ("heads", "not measured"))
    assert tables.gain(RESULT).splitlines() == [
        "| model | launches | inference | training |",
        "| --- | --- | --- | --- |",
        "| two heads | 6 → 4 | 0.60 | 0.60 |",
    ]


def test_what_was_not_measured_has_no_table():
    cases = [{**each, "peers": {k: v for k, v in each["peers"].items() if k != "compile"}}
             for each in RESULT["cases"]]  # fmt: skip
    made = tables.markdown({"machine": MACHINE, "cases": cases})
    assert "| model | launches |" in made
    assert "run by" not in made
    assert "| layers |" not in made


def test_the_plot(tmp_path):
    pytest.importorskip("matplotlib")
    tables.plot(RESULT, tmp_path / "first.svg")
    tables.plot(RESULT, tmp_path / "again.svg")
    drawn = (tmp_path / "first.svg").read_text()
    assert drawn == (tmp_path / "again.svg").read_text()
    assert drawn.startswith("<?xml")


def test_a_result_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as raised:
        tables.main(["nowhere.json"])
    assert raised.value.code == 2
    assert "there is no result nowhere.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["", "no JSON", "[]", "{}", json.dumps({**RESULT, "cases": RESULT["cases"][:1]})],
    ids=["empty", "no JSON", "list", "nothing", "one mode"],
)
def test_a_file_that_is_no_result(text, tmp_path, capsys):
    path = tmp_path / "result.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as raised:
        tables.main([str(path)])
    assert raised.value.code == 2
    assert f"{path} is no result of all modes" in capsys.readouterr().err


def test_writing_into_a_readme_without_the_section_writes_nothing(tmp_path, monkeypatch, capsys):
    path, readme = tmp_path / "result.json", tmp_path / "README.md"
    path.write_text(json.dumps(RESULT))
    readme.write_text("nothing\n")
    monkeypatch.setattr(tables, "README", readme)
    with pytest.raises(SystemExit) as raised:
        tables.main([str(path), "--write"])
    assert raised.value.code == 2
    assert "0 sections" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "result.json"]


def test_writing_changes_the_section_and_nothing_else(tmp_path, monkeypatch, capsys):
    path, readme = tmp_path / "result.json", tmp_path / "README.md"
    path.write_text(json.dumps(RESULT))
    brief = "<!-- gain -->\n\n{}\n\n<!-- /gain -->"
    whole = "before\n\n<!-- speed -->\n\n{}\n\n<!-- /speed -->\n\nafter\n"
    readme.write_text(f"{brief}\n{whole}".format("old", "old"))
    monkeypatch.setattr(tables, "SHOWN", ("heads",))
    monkeypatch.setattr(tables, "README", readme)
    plotted = []
    monkeypatch.setattr(tables, "plot", lambda result, to: plotted.append(to))
    assert tables.main([str(path), "--write"]) == 0
    made = tables.gain(RESULT), tables.markdown(RESULT)
    assert readme.read_text() == f"{brief}\n{whole}".format(*made)
    assert plotted == [tmp_path / "result.svg"]
