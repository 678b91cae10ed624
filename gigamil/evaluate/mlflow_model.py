"""An exported model as an MLflow pyfunc: its input is a table of slide paths, its output what is predicted.

MLflow runs this file when it loads the model ("models from code"): nothing is pickled, and gigamil has to be installed there.
"""

from pathlib import Path
from typing import Any

import mlflow
import pandas
from mlflow.pyfunc.model import PythonModel

from gigamil.evaluate.exported import load_exported

COLUMN = "slide"


class SlidePredictor(PythonModel):
    """Slide path -> one row of predicted numbers, by the names of predictions.csv."""

    def load_context(self, context: Any) -> None:
        """Load the model; MLflow calls it once."""
        self._model = load_exported(Path(context.artifacts["model"]))

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Predict each slide.

        Args:
            model_input: with a column `slide` of paths that this machine can read.
        """
        found = [self._model.predict(path) for path in model_input[COLUMN]]
        return pandas.DataFrame([one.values for one in found])


mlflow.models.set_model(SlidePredictor())
