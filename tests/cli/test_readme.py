"""What the README promises is there: commands, exit codes, links, folders; and its Python example runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.demo import demo_config
from gigamil.testing.slides import make_demo_cohort

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "launch" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    local = [link for link in links if not link.startswith("https://")]
    for link in local:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        if anchor:
            titles = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in [title.lower().replace(" ", "-") for title in titles], link


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert pictures
    assert max(picture.stat().st_size for picture in pictures) < 300_000


def test_every_folder_of_the_package_has_a_line() -> None:
    tree = README.partition("## Where things are")[2].split("```")[1]
    named = re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE)
    folders = [path.name for path in (ROOT / "gigamil").iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert sorted(named) == sorted(folders)
    for name in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / name).is_dir()


@pytest.mark.slow
def test_the_python_example_runs(tmp_path: Path) -> None:
    table = make_demo_cohort(tmp_path / "cohort", num_slides=16, progress=False)
    data = demo_config(tmp_path / "run", ranks=1).model_dump(mode="json")
    data["cohort"]["table"] = str(table)
    data["bookkeeping"]["mlflow"] = False
    (tmp_path / "my.yaml").write_text(to_yaml(RunConfig.model_validate(data)))
    (tmp_path / "example.py").write_text(README.partition("```python\n")[2].partition("```")[0])
    shutil.copy2(next((tmp_path / "cohort" / "slides").glob("demo-*.tiff")), tmp_path / "new.tiff")
    command = [sys.executable, "example.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"^\{'value': [\d.]+, 'ci': \[", result.stdout, flags=re.MULTILINE)
    assert re.search(r"^new \{'prob_normal': [\d.e-]+, 'prob_tumour': [\d.e-]+\} \[", result.stdout, flags=re.MULTILINE)
