"""The slides of a training run: sizes, labels and weights of each split, in one list that plans index."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gigamil.config.schema import RunConfig
from gigamil.data.cohort import CohortTable, load_cohort
from gigamil.data.split import Splits, load_splits
from gigamil.errors import CohortError
from gigamil.shards.read import ShardSet


@dataclass(frozen=True)
class SlideSet:
    """Slides of one split.

    Attributes:
        slide_ids: their ids.
        sizes: their numbers of tiles.
        label_S: int64 classes.
    """

    slide_ids: tuple[str, ...]
    sizes: tuple[int, ...]
    label_S: Tensor

    def __len__(self) -> int:
        return len(self.slide_ids)


@dataclass(frozen=True)
class TrainingData:
    """Everything a run reads: table, splits, shards."""

    table: CohortTable
    splits: Splits
    shards: ShardSet

    def slides(self, split: str) -> SlideSet:
        """The slides of a split, in the order of the table."""
        slide_ids = self.splits.of(split)
        labels = [self.table.class_number(slide_id) for slide_id in slide_ids]
        sizes = tuple(self.shards.manifest(slide_id).num_tiles for slide_id in slide_ids)
        return SlideSet(slide_ids, sizes, torch.tensor(labels, dtype=torch.int64))


def load_training_data(config: RunConfig) -> TrainingData:
    """Read and check the table, `<out>/splits.json` and the shards.

    Raises:
        CohortError: a problem in the table or a leak in the splits.
        ShardError: a slide of the splits has no shards, or was tiled otherwise than configured.
    """
    table = load_cohort(config.cohort, need_files=False)
    splits = load_splits(config.bookkeeping.out / "splits.json", table)
    if not splits.train:
        raise CohortError(f"'{config.bookkeeping.out / 'splits.json'}' has no slide to train on. Run `gigamil split`.")
    shards = ShardSet(config.bookkeeping.shard_root)
    shards.check_tiles(splits.split_of(), config.slides.tile_px, config.slides.tile_mpp)
    return TrainingData(table, splits, shards)
