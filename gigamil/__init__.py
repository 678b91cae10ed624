"""gigamil: multiple-instance learning on gigapixel slides, end to end, with exact gradients, on any number of ranks.

The names below are the public interface; they are loaded when first used, so that `gigamil --help` and
`gigamil doctor` work where a library is broken.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gigamil.config.load import load_config as load_config
    from gigamil.config.schema import RunConfig as RunConfig
    from gigamil.data.init import init_config as init_config
    from gigamil.data.inspect import inspect_cohort as inspect_cohort
    from gigamil.data.tile import tile_cohort as tile_cohort
    from gigamil.demo import run_demo as run_demo
    from gigamil.doctor import run_doctor as run_doctor
    from gigamil.evaluate.features import cache_features as cache_features
    from gigamil.models.aggregator import aggregators as aggregators
    from gigamil.models.bag import Bag as Bag
    from gigamil.models.bag import Pooled as Pooled
    from gigamil.models.dropout import KeyedDropout as KeyedDropout
    from gigamil.models.encoder import encoders as encoders
    from gigamil.models.networks import FrozenStatistics as FrozenStatistics
    from gigamil.models.slide_model import SlideModel as SlideModel
    from gigamil.pipeline import draw_heatmaps as draw_heatmaps
    from gigamil.pipeline import evaluate_model as evaluate_model
    from gigamil.pipeline import run_pipeline as run_pipeline
    from gigamil.pipeline import split_cohort as split_cohort
    from gigamil.pipeline import train_model as train_model
    from gigamil.predict import load_model as load_model
    from gigamil.predict import predict_files as predict_files
    from gigamil.shards.read import ShardSet as ShardSet
    from gigamil.slides.inspect import inspect_slide as inspect_slide
    from gigamil.slides.reader import open_slide as open_slide
    from gigamil.train.loop import Trainer as Trainer
    from gigamil.train.loss import losses as losses
    from gigamil.train.plan import Plan as Plan
    from gigamil.train.plan import plan_run as plan_run

__version__ = "0.1.0"

_HOMES = {
    "config.load": ("load_config",),
    "config.schema": ("RunConfig",),
    "data.init": ("init_config",),
    "data.inspect": ("inspect_cohort",),
    "data.tile": ("tile_cohort",),
    "demo": ("run_demo",),
    "doctor": ("run_doctor",),
    "evaluate.features": ("cache_features",),
    "models.aggregator": ("aggregators",),
    "models.bag": ("Bag", "Pooled"),
    "models.dropout": ("KeyedDropout",),
    "models.encoder": ("encoders",),
    "models.networks": ("FrozenStatistics",),
    "models.slide_model": ("SlideModel",),
    "predict": ("load_model", "predict_files"),
    "pipeline": ("draw_heatmaps", "evaluate_model", "run_pipeline", "split_cohort", "train_model"),
    "shards.read": ("ShardSet",),
    "slides.inspect": ("inspect_slide",),
    "slides.reader": ("open_slide",),
    "train.loop": ("Trainer",),
    "train.loss": ("losses",),
    "train.plan": ("Plan", "plan_run"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Bag",
    "FrozenStatistics",
    "KeyedDropout",
    "Plan",
    "Pooled",
    "RunConfig",
    "ShardSet",
    "SlideModel",
    "Trainer",
    "aggregators",
    "cache_features",
    "draw_heatmaps",
    "encoders",
    "evaluate_model",
    "init_config",
    "inspect_cohort",
    "inspect_slide",
    "load_config",
    "load_model",
    "losses",
    "open_slide",
    "plan_run",
    "predict_files",
    "run_demo",
    "run_doctor",
    "run_pipeline",
    "split_cohort",
    "tile_cohort",
    "train_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'gigamil' has no attribute '{name}'")
    return getattr(importlib.import_module(f"gigamil.{_HOME_OF[name]}"), name)
