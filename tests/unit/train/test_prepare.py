"""What a model starts from: the weights of another run, whole, or the head alone where one of the two has no encoder."""

from pathlib import Path

import pytest
import torch

from gigamil.config.schema import Science
from gigamil.errors import ConfigError
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.engine import TrainingState
from gigamil.train.prepare import warm_start

DIM = 16  # of the encoder below


def model(seed: int, dim: int | None = None, hidden: int = 8) -> SlideModel:
    science = {"seed": seed, "encoder": {"name": "small_cnn", "options": {"width": 4}}}
    return build_model(Science.model_validate(science | {"aggregator": {"options": {"hidden": hidden}}}), 2, dim)


def trained(folder: Path, of: SlideModel) -> Path:
    state = TrainingState({name: values.clone() for name, values in of.state_dict().items()}, {}, ())
    CheckpointStore(folder / "checkpoints").commit(state, {}, step=1, best=True)
    return folder


@pytest.mark.parametrize(("before", "now"), [(None, None), (DIM, None), (None, DIM), (DIM, DIM)])
def test_the_head_goes_from_features_to_images_and_back(tmp_path: Path, before: int | None, now: int | None) -> None:
    first, second, untouched = model(0, before), model(1, now), model(1, now).state_dict()
    warm_start(second, trained(tmp_path, first))
    for name, values in second.state_dict().items():
        is_taken = not name.startswith("encoder.") or before is now is None
        assert torch.equal(values, (first.state_dict() if is_taken else untouched)[name]), name


@pytest.mark.parametrize(("before", "now"), [(None, None), (DIM, None), (None, DIM)])
def test_another_head_is_refused(tmp_path: Path, before: int | None, now: int | None) -> None:
    with pytest.raises(ConfigError, match=r"science.warm_start: the model in .* is another one \(for example \['agg"):
        warm_start(model(0, now), trained(tmp_path, model(0, before, hidden=4)))
