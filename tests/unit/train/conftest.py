"""An MLflow store for the tests of this folder: making its tables takes seconds, so they are made once."""

import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SQLite file with MLflow's tables."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run_folder(empty_store: Path, tmp_path: Path) -> Callable[..., Path]:
    """Make a folder, if wanted with a store of its own."""

    def make(name: str = "run", *, has_store: bool = True) -> Path:
        out = tmp_path / name
        out.mkdir()
        if has_store:
            shutil.copy(empty_store, out / "mlflow.db")
        return out

    return make
