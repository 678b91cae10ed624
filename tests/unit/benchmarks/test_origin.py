"""Where figures come from is written down by the scripts."""

import subprocess
import sys
from pathlib import Path

import pytest
from origin import commit, origin

from benchmarks import loading


def test_command_commit_and_machine() -> None:
    found = origin(loading.__file__, ["--out", "a b.json"], torch="2.0")
    assert list(found) == ["command", "commit", "machine"]
    assert found["command"] == "python benchmarks/loading.py --out 'a b.json'"
    machine = found["machine"]
    assert isinstance(machine, dict)
    assert list(machine) == ["cpu", "cores", "platform", "python", "torch", "date"]
    assert all(machine.values())


def test_without_words_the_command_line_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["whatever.py", "--quick"])
    assert origin(loading.__file__, None)["command"] == "python benchmarks/loading.py --quick"
    deeper = Path(loading.__file__).parent / "reproduce" / "digits.py"
    assert origin(str(deeper), None)["command"] == "python benchmarks/reproduce/digits.py --quick"


def test_commit_of_a_repository(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    wanted = subprocess.run([*git, "rev-parse", "HEAD"], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = commit(tmp_path)
    assert found
    assert wanted.startswith(found)


def test_no_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert commit(tmp_path) is None
    monkeypatch.setenv("PATH", "")
    assert commit(tmp_path) is None


def test_what_tiles_a_pyramid_does_not_load_torch() -> None:
    """Its processes import the helper, and their memory is reported."""
    program = "import sys, origin; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    folder = Path(loading.__file__).parent
    assert subprocess.run([sys.executable, "-c", program], cwd=folder, check=False).returncode == 0
