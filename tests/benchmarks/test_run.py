"""The command line of the benchmark."""

import json

import pytest
import torch
from benchmarks import run, scaling
from benchmarks.cases import CASES
from benchmarks.peers import MODES, PEERS


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["widen8"], "there is no case 'widen8'; did you mean widen_8"),
        (["zzz"], "there is no case 'zzz'; known: vae, inception"),
        (["--peers", "plain,hand"], "there is no peer 'hand'; did you mean by_hand?"),
        (["--mode", "train"], "there is no mode 'train'; did you mean training?"),
        (["--threads", "0"], "--threads is a number from 1 on, not 0."),
        (["--seconds", "0"], "--seconds is a number above 0, not 0.0."),
        (["--json", "nowhere/result.json"], "--json: there is no folder nowhere."),
        (["--json", "."], "--json . cannot be written: Is a directory."),
        (["--device", "nonsense"], "--device nonsense cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
    ],
)
def test_wrong_arguments_end_with_status_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as raised:
        run.main(arguments)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_a_run_writes_what_it_measured(tmp_path, capsys):
    path = tmp_path / "result.json"
    arguments = ["widen_8", "--peers", "conjoin,vmap", "--seconds", "0.01", "--json", str(path)]
    assert run.main(arguments) == 0
    result = json.loads(path.read_text())
    assert [(each["case"], each["mode"]) for each in result["cases"]] == [
        ("widen_8", mode) for mode in MODES
    ]
    for each in result["cases"]:
        assert list(each["peers"]) == ["plain", "conjoin", "vmap"]
        for peer in each["peers"].values():
            assert 0 < peer["seconds"]["low"] <= peer["seconds"]["median"]
            assert peer["ratio"]["low"] <= peer["ratio"]["median"] <= peer["ratio"]["high"]
    machine = result["machine"]
    assert machine["threads"] == 1
    assert machine["torch"] == torch.__version__
    assert {"cpu", "cores", "commit", "date", "python", "load"} <= machine.keys()
    assert "scaling" not in result
    assert "widen_8, training" in capsys.readouterr().out


def test_the_list_has_every_case_and_peer(capsys):
    assert run.main(["--list"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert listed == {"cases", "peers", *CASES, *PEERS}


def test_compilers_are_measured_on_some_cases_unless_asked_for(monkeypatch):
    among = {}

    def measure(case, mode, peers, device, seconds):
        among[case.name] = [peer.name for peer in peers]
        return {"case": case.name, "mode": mode, "rounds": 0, "steps": 0, "peers": {}}

    monkeypatch.setattr(run, "measure", measure)
    run.main(["widen_8", "vae"])
    assert "compile" in among["widen_8"]
    assert among["vae"] == ["plain", "by_hand", "conjoin", "vmap"]
    run.main(["vae", "--peers", "compile"])
    assert among["vae"] == ["plain", "compile"]


def test_what_optimize_takes_is_measured_in_a_process_of_its_own():
    found = scaling.measure(8, "conjoin.optimize")
    assert found["layers"] == 8
    assert found["seconds"] > 0
    assert found["extra_mib"] != 0  # None where the system does not tell.
