"""The sweep of faults runs, hits another place in each round, and does not call a broken promise a recovery."""

import json
from pathlib import Path

import pytest

from benchmarks import faults
from gigamil.testing.faults import KINDS, PROMISE_S, Fault, Found
from gigamil.testing.nodes import why_no_nodes

KILL = Fault("kill", 3, 5)
SAID = (("rank 3 on host 'node1' is gone",), ())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if why_no_nodes() is not None:
        pytest.skip(str(why_no_nodes()))
    code = faults.main(["--faults", "kill", "--rounds", "1", "--folder", str(tmp_path)])
    captured = capsys.readouterr()
    assert code == 0, captured
    result = json.loads(captured.out.splitlines()[-1])
    assert (result["faults"], result["recovered"], result["hangs"]) == (1, 1, 0)
    assert 0 < result["worst_exit_s"] <= PROMISE_S
    assert {"command", "commit", "machine"} <= result.keys()


def test_rounds_hit_other_places_and_are_the_same_each_time() -> None:
    first = list(faults.planned(KINDS, 6))
    assert first == list(faults.planned(KINDS, 6))
    assert first[: len(KINDS)] == list(faults.planned(KINDS, 1))
    assert {fault.kind for fault in first} == set(KINDS)
    assert {fault.node for fault in first} == {0, 1}
    assert len({fault.step for fault in first}) > 3


def test_what_is_counted() -> None:
    good = Found(KILL, 4.04, SAID, 0, True, "")
    late = Found(KILL, 31.0, SAID, 0, True, "")
    hang = Found(KILL, None, ((), ()), 2, True, "")
    lost = Found(KILL, 5.0, SAID, 0, False, "")
    assert faults.summary([good]) == {"faults": 1, "recovered": 1, "hangs": 0, "worst_exit_s": 4.0}
    assert faults.summary([good, late, hang, lost]) == {"faults": 4, "recovered": 1, "hangs": 1, "worst_exit_s": 31.0}
    assert faults.summary([hang])["worst_exit_s"] is None
    assert "as promised" in faults.row(good)
    assert "2 orphans" in faults.row(hang)
    assert "did not end as the run that was left alone" in faults.row(lost)


def test_a_fault_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        faults.main(["--faults", "kill,flood"])
    assert "no such fault: flood; there are kill, freeze" in capsys.readouterr().err


def test_without_permission_it_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(faults, "why_no_nodes", lambda: "network namespaces need root")
    assert faults.main([]) == 4
    assert "network namespaces need root" in capsys.readouterr().err


def test_no_rounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        faults.main(["--rounds", "0"])
    assert "--rounds 0 would try nothing" in capsys.readouterr().err
