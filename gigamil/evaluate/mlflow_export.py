"""Write an exported model as an MLflow model."""

import shutil
import warnings
from pathlib import Path

import yaml

from gigamil.evaluate.exported import FACTS_FILE, WEIGHTS_FILE, load_exported
from gigamil.train.tracking import import_mlflow

_CODE = Path(__file__).with_name("mlflow_model.py")


def save_mlflow_model(exported: Path, to: Path) -> Path:
    """Write `to`, which `mlflow models predict` and `mlflow models serve` take; one that is there is replaced.

    Args:
        exported: folder of `gigamil export`.
        to: MLflow model; it has the weights in it.
    """
    mlflow = import_mlflow()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's, of its own type hints
        from mlflow.models.signature import ModelSignature
        from mlflow.types import ColSpec, Schema
    names = load_exported(exported, device="cpu").task.predicted_names
    signature = ModelSignature(
        Schema([ColSpec("string", "slide")]), Schema([ColSpec("double", name) for name in names])
    )
    staging = to.with_name(f".{to.name}.artifact")
    staging.mkdir(parents=True, exist_ok=True)
    try:
        for name in (FACTS_FILE, WEIGHTS_FILE):
            shutil.copy2(exported / name, staging / name)
        if to.exists():
            shutil.rmtree(to)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no input example is given: it would be a slide
            mlflow.pyfunc.save_model(
                str(to),
                python_model=str(_CODE),
                artifacts={"model": str(staging)},
                signature=signature,
                pip_requirements=["gigamil"],
            )
    finally:
        shutil.rmtree(staging)
    _forget_folders(to / "MLmodel")
    return to


def _forget_folders(path: Path) -> None:
    """Where the model was made is nobody's business, and would be wrong elsewhere: MLflow looks in the model itself."""
    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    flavor = described["flavors"]["python_function"]
    flavor["model_code_path"] = Path(flavor["model_code_path"]).name
    for artifact in flavor["artifacts"].values():
        artifact["uri"] = artifact["path"]
    path.write_text(yaml.safe_dump(described, sort_keys=False), encoding="utf-8")
