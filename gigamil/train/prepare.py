"""What a configuration does to a model between its making and the engine: checks, and how the encoder is computed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

from gigamil.data.blocks import SlideGrid
from gigamil.errors import ConfigError
from gigamil.models.aggregator import min_tiles
from gigamil.models.compiled import compile_encoder
from gigamil.models.encoder import DenseEncoder, GivenFeatures
from gigamil.models.fold import fold_batchnorm
from gigamil.models.probe import refuse_tile_mixing
from gigamil.models.slide_model import SlideModel, refuse_small_bags
from gigamil.parallel.halo import ShardedNetwork
from gigamil.parallel.topology import Topology
from gigamil.train.activation_checkpointing import checkpoint_encoder
from gigamil.train.checkpoint import CheckpointStore
from gigamil.train.cohort import SlideSet
from gigamil.train.dense import dense_geometry
from gigamil.train.plan import refuse_unfit

if TYPE_CHECKING:
    from gigamil.config.schema import Execution, RunConfig


def prepare_model(
    model: SlideModel,
    config: "RunConfig",
    train: SlideSet,
    val: SlideSet,
    topology: Topology,
    device: torch.device,
    grids: Sequence[SlideGrid] = (),
) -> None:
    """Refuse what cannot be trained exactly or does not fit, then make the encoder run as `execution` says.

    Names of parameters and buffers do not change. No collective in here.

    Args:
        model: on the CPU, in training mode, before an engine takes it.
        config: resolved configuration.
        train, val: slides, for their sizes.
        topology: of the ranks.
        device: where it will be trained.
        grids: of a dense encoder's largest slides, as many as a step has.
    Raises:
        ConfigError: the encoder mixes tiles, the aggregator needs larger bags, `memory: keep` does not fit, or the
            encoder has no blocks to recompute.
        EnvironmentFault: `execution.compile` without a compiler.
    """
    refuse_small_bags(model, (*train.slide_ids, *val.slide_ids), (*train.sizes, *val.sizes))
    regime = config.science.regime
    if regime.name in ("sampled", "select") and regime.tiles < min_tiles(model.aggregator):
        raise ConfigError(
            f"science.regime.tiles={regime.tiles}: {config.science.aggregator.name} takes {min_tiles(model.aggregator)} tiles of a slide at "
            "least. Take more, or another aggregator."
        )
    if isinstance(model.encoder, GivenFeatures):
        return
    dense_geometry(model.encoder, config.slides)
    if isinstance(model.encoder, DenseEncoder) and config.science.regime.name in ("sampled", "select"):
        raise ConfigError(
            f"science.regime.name={config.science.regime.name}: a dense encoder computes what is around a tile too, so some tiles of a "
            "slide save little. Set science.encoder.dense to null, or take another regime."
        )
    refuse_unstreamable(model.encoder, config.execution)
    refuse_tile_mixing(model.encoder, config.slides.tile_px)
    set_batchnorm(model.encoder, config.execution)
    refuse_unfit(config, model, train.sizes, topology.world_size, device, topology.local_size, grids)
    backbone = model.encoder.backbone
    checkpoint_encoder(backbone, config.execution.activation_checkpointing)
    if config.execution.compile:
        compile_encoder(backbone)


def refuse_unstreamable(encoder: nn.Module, execution: "Execution") -> None:
    """Refuse keys of `execution` that do not go with the encoder.

    Raises:
        ConfigError: names the key, or the layer that ranks cannot compute together.
    """
    if isinstance(encoder, DenseEncoder) and execution.compile:
        raise ConfigError(
            "execution.compile makes a program for one size of image, and the blocks of a dense encoder have many. Set it to "
            "false."
        )
    if execution.halo == "read":
        return
    if not isinstance(encoder, DenseEncoder):
        raise ConfigError(
            "execution.halo=exchange is for dense encoders, and this one sees each tile alone. Set science.encoder.dense, "
            "or execution.halo=read."
        )
    ShardedNetwork(encoder.network, None)  # looks at every layer


def set_batchnorm(encoder: nn.Module, execution: "Execution") -> None:
    """Fold BatchNorm where `execution` asks for it; the compiler does better without, and rows are exchanged between layers."""
    if execution.fold_batchnorm and not execution.compile and execution.halo == "read":
        fold_batchnorm(encoder)


def warm_start(model: SlideModel, run: Path) -> None:
    """Start from the best weights of another run.

    From a run on features its head is taken, and the encoder of the run that it was started from itself, whose features they were;
    without such a run the encoder stays what `science.encoder` says. Only the head goes to a model on features.

    Raises:
        CheckpointError: the run has no checkpoint.
        ConfigError: its model is another one.
    """
    found, wanted = CheckpointStore(run / "checkpoints").load_parameters("best"), model.state_dict()
    both_have_encoders = all(any(map(_is_encoder, names)) for names in (found, wanted))
    if not any(map(_is_encoder, found)) and any(map(_is_encoder, wanted)):
        origin = _start_of(run)
        if origin is not None:
            warm_start(model, origin)
    if not both_have_encoders:
        found, wanted = ({k: v for k, v in state.items() if not _is_encoder(k)} for state in (found, wanted))
    names = found.keys() | wanted.keys()
    odd = [k for k in names if k not in found or k not in wanted or found[k].shape != wanted[k].shape]
    if odd:
        raise ConfigError(f"science.warm_start: the model in '{run}' is another one (for example {sorted(odd)[:3]})")
    model.load_state_dict(found, strict=both_have_encoders)


def _start_of(run: Path) -> Path | None:
    """The run that a run was started from."""
    path = run / "config.resolved.yaml"
    if not path.is_file():
        return None
    start = yaml.safe_load(path.read_text(encoding="utf-8"))["science"].get("warm_start")
    return None if start is None else Path(start)


def _is_encoder(name: str) -> bool:
    return name.startswith("encoder.")
