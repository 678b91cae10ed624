"""The slides of a training run: sizes, labels and weights of each split, in one list that plans index; and their tiles."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from gigamil.config.schema import RunConfig, Science
from gigamil.data.blocks import slide_grid
from gigamil.data.cohort import CohortTable, load_cohort
from gigamil.data.features import FeatureSet, FeatureSource, open_features
from gigamil.data.patients import Bags, BagSource, patient_bags
from gigamil.data.slide_source import SlideSource
from gigamil.data.source import ShardSource, TileSource
from gigamil.data.split import Splits, load_splits
from gigamil.data.targets import load_target_table, read_targets, stratum_numbers
from gigamil.data.threads import ReadThreads
from gigamil.errors import CohortError, ShardError
from gigamil.shards.cache import ShardCache
from gigamil.shards.read import ShardSet

TiledSlides = ShardSet | FeatureSet
_MAX_LISTED = 20
_REQUESTS = 16  # at once, of indexes on a server


@dataclass(frozen=True)
class SlideSet:
    """Slides of one split.

    Attributes:
        slide_ids: their ids; those of patients where a bag is a patient.
        sizes: their numbers of tiles.
        target_SX: what is known of each, float64 (`gigamil.data.targets.read_targets`).
        strata: by which they are drawn if all kinds are to come equally often.
    """

    slide_ids: tuple[str, ...]
    sizes: tuple[int, ...]
    target_SX: Tensor
    strata: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.slide_ids)


@dataclass(frozen=True)
class TrainingData:
    """Everything a run reads: table, splits, and what says of each slide how many tiles it has, and where."""

    table: CohortTable
    splits: Splits
    shards: TiledSlides
    science: Science

    @property
    def dim(self) -> int | None:
        """D where tiles are features already; None where they are images."""
        return feature_dim(self.shards, self.splits.split_of())

    @property
    def paths(self) -> dict[str, Path]:
        """Slide files by id."""
        return {row.slide_id: row.path for row in self.table.rows}

    def slides(self, split: str) -> SlideSet:
        """The slides of a split, in the order of the table, or its patients (`science.bag`)."""
        bags = self.bags(self.splits.of(split))
        sizes = tuple(sum(self.shards.manifest(slide_id).num_tiles for slide_id in own) for own in bags.values())
        first = [own[0] for own in bags.values()]
        targets_SX = read_targets(self.science, self.table, first)
        return SlideSet(tuple(bags), sizes, targets_SX, tuple(stratum_numbers(self.table, first)))

    def bags(self, slide_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """What these slides are to the model: bags of one, or of all slides of a patient."""
        if self.science.bag == "patient":
            return patient_bags(self.table, slide_ids)
        return {slide_id: (slide_id,) for slide_id in slide_ids}

    def digest(self, slide_id: str) -> str:
        """Digest of a slide's tiles, or of its features."""
        if isinstance(self.shards, FeatureSet):
            return self.shards.digest(slide_id)
        manifest = self.shards.manifest(slide_id)
        return manifest.index.sha256 if manifest.stored else f"{manifest.index.sha256} {manifest.source_fingerprint}"


def load_training_data(config: RunConfig) -> TrainingData:
    """Read and check the table, `<out>/splits.json`, and the shards or features.

    Raises:
        CohortError: a problem in the table or a leak in the splits.
        ShardError: a slide of the splits has no shards or features, or was tiled or encoded otherwise than configured.
    """
    table = load_target_table(config.cohort, config.science, need_files=config.data.source == "slides")
    shards = open_tiles(config, table)
    path = config.bookkeeping.out / "splits.json"
    splits = load_splits(path, table, pictured_shards(config, shards), config.cohort.near_duplicates)
    if not splits.train:
        raise CohortError(f"'{path}' has no slide to train on. Run `gigamil split`.")
    check_tiles(config, shards, splits.split_of())
    data = TrainingData(table, splits, shards, config.science)
    if config.science.bag == "patient":
        _refuse_unlike(data, config.cohort.table)
    return data


def _refuse_unlike(data: TrainingData, path: Path) -> None:
    """Refuse patients of whose slides different things are known: one bag has one target."""
    unlike = []
    for patient_id, slide_ids in data.bags(list(data.splits.split_of())).items():
        target_SX = read_targets(data.science, data.table, slide_ids)
        if not _same(target_SX):
            unlike.append(f"patient '{patient_id}': slides {', '.join(slide_ids[:4])}")
    if unlike:
        more = f"\n  and {len(unlike) - _MAX_LISTED} more" if len(unlike) > _MAX_LISTED else ""
        raise CohortError(
            f"'{path}': science.bag=patient makes one bag of a patient's slides, and those of {len(unlike)} patients do not agree in "
            "their label or target:\n  "
            + "\n  ".join(unlike[:_MAX_LISTED])
            + more
            + "\nCorrect them, or set science.bag to slide."
        )


def _same(target_SX: Tensor) -> bool:
    """Equal in all rows, what is not known included."""
    return bool(torch.isclose(target_SX, target_SX[:1], rtol=0, atol=0, equal_nan=True).all())


def open_tiles(config: RunConfig, table: CohortTable) -> TiledSlides:
    """The slides that have tiles, or features, as `data.source` says.

    Raises:
        ShardError: there are none.
    """
    if config.data.source == "features":
        return open_features(config, table)
    return ShardSet(config.bookkeeping.shard_root, ShardCache.of(config.execution))


def pictured_shards(config: RunConfig, tiles: TiledSlides) -> ShardSet | None:
    """What knows the slide files and their thumbnails, by which the sides of a split are compared.

    Features have neither: those that were made here were made of shards, which know. None for features of others, and
    where the shards have been deleted.
    """
    if isinstance(tiles, ShardSet):
        return tiles
    if config.data.features is not None:
        return None
    try:
        return ShardSet(config.bookkeeping.shard_root)
    except ShardError:
        return None


def tiled_slides(config: RunConfig, table: CohortTable) -> list[str]:
    """Ids of the slides that have tiles made as configured, or features: what may be split.

    Raises:
        ShardError: there are none at all.
    """
    shards = open_tiles(config, table)
    if isinstance(shards, FeatureSet):
        return list(shards.slide_ids)
    settings = config.slides.model_dump()
    return [slide_id for slide_id in shards.slide_ids if shards.made_with(slide_id, settings)]


def check_tiles(config: RunConfig, shards: TiledSlides, slide_ids: Iterable[str]) -> None:
    """Refuse slides without tiles or features, or with others than configured.

    Raises:
        ShardError, BagError: see `ShardSet.check_tiles` and `FeatureSet.check_tiles`.
    """
    if isinstance(shards, FeatureSet):
        shards.check_tiles(slide_ids, config.slides.tile_px, config.science.encoder.name)
    else:
        shards.check_tiles(slide_ids, config.slides.tile_px, config.slides.tile_mpp)


def check_grids(shards: TiledSlides, slide_ids: Iterable[str]) -> None:
    """Refuse slides whose tiles are no cells of a dense encoder, before the first of them is read.

    Raises:
        ShardError: tiles of a slide do not lie side by side on a grid, or its index is damaged; names the first slide.
    Cost: a read of each index; no pixel is read.
    """
    assert isinstance(shards, ShardSet), "a dense encoder has tiles"
    checks = [partial(_check_grid, shards, slide_id) for slide_id in slide_ids]
    ReadThreads(_REQUESTS if shards.is_remote else 0).run(checks)


def _check_grid(shards: ShardSet, slide_id: str) -> None:
    slide_grid(shards.manifest(slide_id), shards.index(slide_id))


def open_source(
    config: RunConfig,
    shards: TiledSlides,
    slide_ids: Sequence[str],
    device: torch.device,
    paths: Mapping[str, Path] | None = None,
    bags: Bags | None = None,
) -> TileSource:
    """What a loader reads the tiles of these slides from, as `data.source` says.

    Args:
        shards: from `open_tiles`.
        device: where a CUDA decoder works.
        paths: slide files by id, for `data.source: slides`; None takes those of the slide table.
        bags: of these slides, which are then asked for by the names of these; None: each slide is asked for itself.
    Raises:
        EnvironmentFault: `execution.decoder` is not there.
    """
    source = _slide_source(config, shards, slide_ids, device, paths)
    if bags is None or all(own == (bag,) for bag, own in bags.items()):
        return source
    return BagSource(source, bags, {slide_id: shards.manifest(slide_id).num_tiles for slide_id in slide_ids})


def _slide_source(
    config: RunConfig,
    shards: TiledSlides,
    slide_ids: Sequence[str],
    device: torch.device,
    paths: Mapping[str, Path] | None,
) -> TileSource:
    if isinstance(shards, FeatureSet):
        return FeatureSource(shards, slide_ids)
    if config.data.source == "slides":
        if paths is None:
            paths = {row.slide_id: row.path for row in load_cohort(config.cohort, need_labels=False).rows}
        return SlideSource(shards, paths, config)
    execution = config.execution
    return ShardSource(shards, config.slides.tile_px, execution.decoder, device, execution.decode_workers)


def feature_dim(shards: TiledSlides, slide_ids: Iterable[str]) -> int | None:
    """D where tiles are features already; None where they are images."""
    return shards.dim(slide_ids) if isinstance(shards, FeatureSet) else None


def unused_keys(config: RunConfig) -> list[str]:
    """What a configuration asks of an encoder, and `data.source: features` has no use for."""
    part, optim, execution = config.science.encoder, config.science.optim, config.execution
    asked = {
        "science.augment": any(config.science.augment.model_dump().values()),
        "science.encoder.lora_rank": part.lora_rank is not None,
        "science.optim.lr_encoder": optim.lr_encoder > 0,
        "science.optim.layer_decay": optim.layer_decay != 1,
        "science.optim.freeze_encoder_epochs": optim.freeze_encoder_epochs > 0,
        "execution.activation_checkpointing": execution.activation_checkpointing != "none",
        "execution.compile": execution.compile,
    }
    return [key for key, is_asked in asked.items() if is_asked]
