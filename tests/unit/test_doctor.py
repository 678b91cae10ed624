"""The doctor names what is wrong and what to type, and survives what it examines."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gigamil import doctor
from gigamil.doctor import GIB, Answer, Check, DoctorReport, run_doctor

Examine = Callable[..., dict[str, Check]]
HEALTHY = {
    "versions": Answer({"bad": [], "good": 21}),
    "torch": Answer({"version": "2.15.0", "cuda": None, "gloo": True, "nccl": False, "devices": []}),
    "torchvision": Answer({"version": "0.29.2"}),
    "openslide": Answer({"version": "1.4.7", "library": "4.0.1"}),
    "deepspeed": Answer({"version": "0.19.8"}),
    "mlflow": Answer({"version": "3.17.2"}),
    "memory": Answer({"available": 8 * GIB, "total": 16 * GIB}),
}


@pytest.fixture(autouse=True)
def _private_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    monkeypatch.setattr(doctor, "DISK_WARN", 0)
    monkeypatch.setattr(doctor, "DISK_FAIL", 0)


@pytest.fixture
def examine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Examine:
    """The checks of a healthy machine where some probes answer otherwise."""

    def checks(**changed: Answer) -> dict[str, Check]:
        monkeypatch.setattr(doctor, "ask_child", (HEALTHY | changed).__getitem__)
        return {check.name: check for check in run_doctor(tmp_path).checks}

    return checks


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that may not be entered; root may enter any, so during the test it is another user."""
    folder, user = tmp_path / "closed", os.geteuid()
    folder.mkdir(mode=0)
    if user == 0:
        os.seteuid(65534)
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


def test_a_healthy_machine_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ask_child", HEALTHY.__getitem__)
    report = run_doctor(tmp_path / "not" / "yet")
    assert [check for check in report.checks if check.status == "fail"] == []
    assert report.exit_code == 0
    assert not (tmp_path / "not").exists()


def test_torchvision_of_another_torch_is_a_failure_with_its_cure(examine: Examine) -> None:
    error = "RuntimeError: operator torchvision::nms does not exist"
    check = examine(torchvision=Answer(error=error))["torchvision"]
    assert (check.status, check.detail) == ("fail", error)
    assert "pip install -c constraints.txt torch torchvision" in check.cure


def test_a_library_outside_its_range_gets_its_own_line(examine: Examine) -> None:
    answer = Answer({"bad": [["deepspeed", "<0.20,>=0.19.6", "0.18.0"], ["simplejpeg", ">=1.8", None]], "good": 19})
    checks = examine(versions=answer)
    assert checks["libraries"].detail == "19 of 21 within their declared ranges"
    assert checks["deepspeed version"].detail == "0.18.0, needs <0.20,>=0.19.6"
    assert checks["simplejpeg version"].detail == "not installed, needs >=1.8"
    assert checks["simplejpeg version"].cure == "pip install 'simplejpeg>=1.8'"


def test_a_torch_that_does_not_import_is_the_first_thing_to_mend(examine: Examine) -> None:
    checks = examine(torch=Answer(error="OSError: libcudart.so.13: cannot open shared object file"))
    assert checks["torch"].status == "fail"
    assert {checks[name].cure for name in ("backends", "devices")} == {"mend torch first"}
    assert checks["devices"].detail == "not tried, because torch failed"
    assert list(checks).index("torch") < list(checks).index("backends")


@pytest.mark.parametrize(("library", "status"), [("3.4.1", "fail"), ("4.0.0", "ok"), ("4.1.0", "ok")])
def test_openslide_library_must_read_dicom(library: str, status: str) -> None:
    assert doctor.check_openslide(Answer({"version": "1.4.7", "library": library})).status == status


@pytest.mark.parametrize(("age_s", "words"), [(60.0, "has been running for 60 s"), (7200.0, "left by a killed build")])
def test_build_locks_are_found_and_aged(tmp_path: Path, age_s: float, words: str) -> None:
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (1000.0, 1000.0))
    check = doctor.check_build_locks([tmp_path, tmp_path / "absent"], now=1000.0 + age_s)
    assert check.status == "warn"
    assert words in check.detail
    assert f"rm {lock}" in check.cure


@pytest.mark.parametrize(
    ("gloo", "nccl", "devices", "status"),
    [
        (True, False, [], "ok"),
        (False, True, [], "fail"),
        (True, False, [["H200", 141 * GIB]], "warn"),
        (True, True, [["H200", 141 * GIB]], "ok"),
    ],
)
def test_backends(gloo: bool, nccl: bool, devices: list[list[object]], status: str) -> None:
    assert doctor.check_backends(Answer({"gloo": gloo, "nccl": nccl, "devices": devices})).status == status


def test_a_driver_without_a_visible_device_is_a_warning() -> None:
    assert doctor.check_devices(Answer({"devices": []}), has_driver=True).status == "warn"
    assert doctor.check_devices(Answer({"devices": []}), has_driver=False).status == "ok"
    assert doctor.check_devices(Answer({"devices": [["H200", 141 * GIB]]}), has_driver=True).detail == "H200 141 GiB"


@pytest.mark.parametrize(("omp", "status"), [(None, "ok"), ("2", "ok"), ("64", "warn"), ("many", "ok")])
def test_more_threads_than_cores(omp: str | None, status: str) -> None:
    assert doctor.check_threads(2, omp).status == status


@pytest.mark.parametrize(("free", "status"), [(GIB // 2, "fail"), (2 * GIB, "warn"), (8 * GIB, "ok")])
def test_memory(free: int, status: str) -> None:
    assert doctor.check_memory(Answer({"available": free, "total": 16 * GIB})).status == status


def test_a_folder_that_takes_no_file_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)  # root may write anywhere, so rights prove nothing
    check = doctor.check_disk(tmp_path)
    assert (check.status, check.detail) == ("fail", f"'{tmp_path}' cannot be written: Permission denied")


def test_below_a_folder_that_may_not_be_entered_the_check_fails(closed: Path) -> None:
    check = doctor.check_disk(closed / "runs" / "out")
    assert (check.status, check.detail.rpartition(" cannot be ")[2]) == ("fail", "written: Permission denied")
    check = doctor.check_build_locks([closed / "torch_extensions"], now=0.0)
    # Python 3.13 and newer: glob passes over what may not be entered.
    assert check.status == ("fail" if sys.version_info < (3, 13) else "ok")


def test_mlflow_only_warns_and_its_address_hides_credentials() -> None:
    assert doctor.check_mlflow(Answer(error="ModuleNotFoundError: no mlflow"), None).status == "warn"
    detail = doctor.check_mlflow(
        Answer({"version": "3.17.2"}), "https://user:secret@host.example:5000/x?token=t"
    ).detail
    assert "https://host.example" in detail
    assert "secret" not in detail
    assert "token" not in detail


def test_text_shows_every_line_its_cure_and_the_verdict() -> None:
    report = DoctorReport((Check("disk", "ok", "9 GiB"), Check("openslide", "fail", "not found", "pip install it")))
    assert report.exit_code == 4
    assert report.text().splitlines() == [
        "ok    disk       9 GiB",
        "fail  openslide  not found",
        "                 -> pip install it",
        "1 of 2 checks failed: follow the arrows from the top, then run it again.",
    ]


def test_a_probe_that_raises_crashes_or_hangs_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {
        "good": "print('noise'); print(json.dumps({'a': 1}))",
        "raises": "raise OSError('no such library')",
        "crashes": "import os; os.abort()",
        "hangs": "import time; time.sleep(60)",
        "babbles": "print('hello')",
    }
    monkeypatch.setattr(doctor, "PROBES", programs)
    assert doctor.ask_child("good") == Answer({"a": 1})
    assert doctor.ask_child("raises").error == "OSError: no such library"
    assert doctor.ask_child("crashes").error == "the process ended with status -6"
    assert doctor.ask_child("hangs", timeout_s=0.5).error == "no answer within 0.5 s"
    assert doctor.ask_child("babbles").error == "unexpected output: 'hello'"


@pytest.mark.slow
def test_the_real_probes_answer_here() -> None:
    assert [name for name in doctor.PROBES if doctor.ask_child(name).error] == []
