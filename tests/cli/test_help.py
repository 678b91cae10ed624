"""The command line before any work: help that fits a screen, and mistakes that are answered with a message and code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import gigamil
from gigamil import errors
from gigamil.cli import main
from gigamil.config.load import load_config
from gigamil.config.schema import RunConfig

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
VERBS = (
    "demo",
    "init",
    "doctor",
    "inspect",
    "tile",
    "split",
    "features",
    "export-coords",
    "plan",
    "simulate",
    "bench",
    "train",
    "evaluate",
    "heatmap",
    "run",
    "compare",
    "predict",
    "export",
    "sync",
)
WITH_CONFIG = ("tile", "split", "features", "plan", "simulate", "train", "evaluate", "heatmap", "run")
# Of the classes that errors.py itself declares: gigamil's other ones carry the code of a rank's error.
DECLARED = [kind for kind in errors.GigamilError.__subclasses__() if kind.__module__ == errors.__name__]
EXIT_CODES = {"0", "141"} | {str(kind.exit_code) for kind in DECLARED}
MAX_LINES, MAX_COLUMNS, MAX_COLUMNS_OF_FIRST_PAGE = 40, 100, 120


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", str(MAX_COLUMNS))


def stopped(words: list[str]) -> int | str | None:
    """Exit code of a command that ends inside the parser."""
    with pytest.raises(SystemExit) as raised:
        main(words)
    return raised.value.code


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS)], ids=lambda words: " ".join(words) or "gigamil")
def test_help_fits_a_screen(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped([*words, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= MAX_LINES
    assert max(map(len, lines)) <= (MAX_COLUMNS if words else MAX_COLUMNS_OF_FIRST_PAGE)
    assert lines[0].startswith("usage: gigamil")


def test_help_names_every_verb_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(["--help"]) == 0
    text = capsys.readouterr().out
    assert tuple(re.findall(r"^    ([\w-]+)(?: |$)", text, flags=re.MULTILINE)) == VERBS
    assert set(re.findall(r"(\d+) \w", text.rpartition("exit codes:")[2])) == EXIT_CODES


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_help_says_that_any_key_can_follow(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped([verb, "--help"]) == 0
    assert "--section.key VALUE" in capsys.readouterr().out


def test_help_needs_no_library_that_may_be_broken() -> None:
    heavy = "torch deepspeed mlflow openslide webdataset pandas matplotlib"
    check = (
        "import sys\nfrom gigamil.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"sys.exit(' '.join(name for name in '{heavy}'.split() if name in sys.modules) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(["--version"]) == 0
    assert capsys.readouterr().out == f"gigamil {gigamil.__version__}\n"


@pytest.mark.parametrize("verb", WITH_CONFIG)
def test_a_typo_in_the_yaml_is_answered_with_the_nearest_key(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("science: {epoch: 3}\n")
    assert main([verb, "my.yaml"]) == 2
    out, err = capsys.readouterr()
    assert err == "gigamil: 'my.yaml': unknown key 'science.epoch'; did you mean 'science.epochs'?\n"
    assert out == ""


@pytest.mark.parametrize("words", [["--execution.rank", "2"], ["--execution.rank=2"], ["execution.rank=2"]])
def test_an_unknown_override_is_answered_alike(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("")
    assert main(["train", "my.yaml", *words]) == 2
    assert "unknown key 'execution.rank'; did you mean 'execution.ranks'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "no.yaml"], "no configuration file 'no.yaml'. Write one with: gigamil init no.yaml"),
        (["run", "my.yaml", "again"], "cannot read the override 'again'"),
        (["run", "my.yaml", "--science.epochs"], "cannot read the override '--science.epochs'"),
        (["run", "my.yaml", "--science.epochs", "many"], "science.epochs: "),
        (["run", "my.yaml", "--limit", "0"], "bookkeeping.limit: "),
        (["tile", "my.yaml"], "no slide table"),
        (["split", "my.yaml"], "no slide table"),
        (["train", "my.yaml"], "no slide table"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_one_message_and_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.yaml").write_text("")
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("gigamil: ")
    assert message in err
    assert "Traceback" not in err + out


@pytest.mark.parametrize("words", [[], ["fly"], ["run"], ["demo", "--epochs", "3"], ["inspect"]], ids=" ".join)
def test_words_that_no_verb_takes_show_the_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(words) == 2
    assert capsys.readouterr().err.startswith("usage: gigamil")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["demo", "--ranks", "two"], "argument --ranks: 'two' is not a whole number"),
        (["demo", "--ranks", "0"], "argument --ranks: 0 must be at least 1"),
        (["heatmap", "my.yaml", "--mpp", "half"], "argument --mpp: 'half' is not a number"),
        (["heatmap", "my.yaml", "--mpp", "0"], "argument --mpp: 0 must be greater than 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_number_is_called_one(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert stopped(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)


def test_print_config_prints_what_would_be_used_and_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    Path("my.yaml").write_text("science: {seed: 4}\nbookkeeping: {out: here}\n")
    before = sorted(Path.cwd().rglob("*"))
    assert stopped(["run", "my.yaml", "--science.epochs", "3", "--limit", "2", "--print_config"]) == 0
    printed = capsys.readouterr().out
    config = RunConfig.model_validate(yaml.safe_load(printed))
    assert config == load_config("my.yaml", ["science.epochs=3", "bookkeeping.limit=2"])
    assert (config.science.seed, config.bookkeeping.out) == (4, Path.cwd() / "here")
    assert sorted(Path.cwd().rglob("*")) == before


def test_the_readme_has_a_row_for_each_verb() -> None:
    assert tuple(re.findall(r"^\| `gigamil ([\w-]+)", README, flags=re.MULTILINE)) == VERBS


def test_the_readme_has_a_row_for_each_exit_code() -> None:
    assert set(re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)) == EXIT_CODES
