"""A pyfunc as users of MLflow write it: base64 of a JPEG in a column, Pillow, torch."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from benchmarks.serving.networks import TorchNetwork, decode


class PillowTorchModel(PythonModel):
    def load_context(self, context: PythonModelContext) -> None:
        self.network = TorchNetwork(Path(context.artifacts["network"]))

    def predict(
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        return self.network(np.stack([decode(file) for file in model_input["image"]]))


set_model(PillowTorchModel())
