"""What a run has spent: tiles, forwards with those that are made again, scans, time of all ranks."""

from gigamil.partition.schedule import plan_steps
from gigamil.train.spent import Spent


def test_forwards_of_a_step_are_those_of_all_ranks() -> None:
    (plan,) = plan_steps([0, 1], [7, 4], 2, 1, 2)  # 11 tiles: ranks own 6 and 5
    assert sorted(plan.counts(0)) == [5, 6]

    def forwards(kept: float, train_encoder: bool = True, on_features: bool = False) -> int:
        spent = Spent().plus_step(plan, kept=kept, train_encoder=train_encoder, on_features=on_features)
        assert spent.tiles == 11
        return spent.tile_forwards

    assert forwards(kept=0) == 22  # each once more for its backward
    assert forwards(kept=6) == 11  # all graphs are kept
    assert forwards(kept=2) == 11 + 4 + 3
    assert forwards(kept=0.25) == 11 + 8
    assert forwards(kept=0, train_encoder=False) == 11
    assert forwards(kept=0, on_features=True) == 0


def test_scans_and_time_add_up() -> None:
    spent = Spent(tiles=3, tile_forwards=6).plus_forwards(100).plus_time(2.0, 4).plus_time(0.5, 4)
    assert spent == Spent(tiles=3, tile_forwards=106, seconds=2.5, rank_seconds=10.0)
