"""Simulated runs: their schedule is that of training, and their time is what the parts add up to."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError
from gigamil.partition.schedule import epoch_order, plan_steps
from gigamil.partition.spans import chunk_ranges
from gigamil.scaling import simulate as module
from gigamil.scaling.figure import draw_simulation
from gigamil.scaling.machine import DEFAULT_MACHINE, Largest, Machine, Validation, load_machine
from gigamil.scaling.simulate import (
    Cohort,
    find_cohort,
    parse_nodes,
    schedule_tiles,
    simulate,
    step_seconds,
)
from gigamil.testing.runs import SIZES, tiny_run

FORWARD_S, BEYOND_S = 1e-3, 2e-3  # of a tile


def machine(**changes: Any) -> Machine:
    """Nothing costs anything but the encoder."""
    data = load_machine(DEFAULT_MACHINE).model_dump()
    speed = {
        "encoder": {"name": "small_cnn"},
        "tile_px": 32,
        "precision": "float32",
        "calls": [{"tiles": 1, "forward_s": FORWARD_S, "backward_s": BEYOND_S}],
        "saved_bytes": 10**6,
        "busy_cores": 0.0,
        "source": "made up",
    }
    free = {"latency_s": 0.0, "bytes_s": 1e18}
    data |= {
        "encoders": [speed],
        "decode": {"shards_mpx_s": 1e12, "slides_mpx_s": 1e12, "source": "made up"},
        "links": data["links"] | {"inside": free, "between": free},
        "storage": {"node_bytes_s": 1e18, "total_bytes_s": None, "local_bytes_s": 1e18, "source": "made up"},
        "step": {"fixed_s": 0.0, "head_s": 0.0, "update_s_per_gb": 0.0, "source": "made up"},
        "noise": 0.0,
        "ranks_per_node": 2,
    }
    return Machine.model_validate(data | changes)


def config(science: dict[str, Any] | None = None, **execution: Any) -> RunConfig:
    parts = {"encoder": {"name": "small_cnn"}, "slides_per_step": 2} | (science or {})
    run = {"chunk": 4, "memory": "replay"} | execution
    return RunConfig.model_validate({"slides": {"tile_px": 32}, "science": parts, "execution": run})


COHORT = Cohort((40, 10, 30, 25, 7), 1000.0, "five slides")


@pytest.mark.parametrize(("num_groups", "group_size", "slides_per_step"), [(1, 4, 2), (3, 2, 2), (2, 3, 5), (4, 1, 3)])
def test_the_schedule_is_that_of_training(num_groups: int, group_size: int, slides_per_step: int) -> None:
    sizes = np.random.default_rng(0).integers(1, 500, 23).tolist()
    order = epoch_order(len(sizes), 3, 0)
    found = schedule_tiles(sizes, order, slides_per_step, num_groups, group_size)
    plans = plan_steps(order, sizes, slides_per_step, num_groups, group_size)
    counts = [[count for group in range(num_groups) for count in plan.counts(group)] for plan in plans]
    assert found.largest.tolist() == [max(count) for count in counts]
    assert found.total.tolist() == [sum(count) for count in counts]
    assert sum(found.group) in {sum(plan.group_sizes(g)) for plan in plans for g in range(num_groups)}


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize("memory", ["replay", "keep"])
def test_the_time_of_a_step_is_that_of_its_busiest_rank(nodes: int, memory: str) -> None:
    settings = config(memory=memory)
    seconds = step_seconds(settings, machine(), nodes, cohort=COHORT)
    order, ranks = epoch_order(5, 0, 0), 2 * nodes
    passes = 2 if memory == "replay" else 1
    wanted = []
    for plan in plan_steps(order, COHORT.sizes, 2, 1, ranks):
        ranges = chunk_ranges(max(plan.counts(0)), 4)
        tiles = sum(stop - start for start, stop in ranges)
        wanted.append(tiles * (passes * FORWARD_S + BEYOND_S))
    assert seconds == pytest.approx(wanted, rel=1e-6)


def test_kept_graphs_are_as_many_as_fit() -> None:
    cohort = Cohort((4000, 1000, 3000, 2500, 700), 1000.0, "five large slides")
    few, many = simulate(config(memory="auto", memory_budget=401e6), machine(), [1, 64], cohort=cohort).points
    # 1 MB a tile, 4 tiles a call: 100 calls, 400 tiles of each rank's.
    tiles = [sum(plan.sizes) / 2 for plan in plan_steps(epoch_order(5, 0, 0), cohort.sizes, 2, 1, 2)]
    assert few.kept_share == pytest.approx(sum(min(400, n) for n in tiles) / sum(tiles), abs=0.01)
    assert many.kept_share == 1
    assert 1.1 < many.efficiency < 4 / 3  # what is kept is not encoded twice


def test_a_slow_rank_holds_all_of_them_up_unless_it_gets_fewer_tiles() -> None:
    even, slow = (sum(step_seconds(config(), machine(), 2, cohort=COHORT, slow_rank=x)) for x in (1.0, 1.2))
    assert slow == pytest.approx(1.2 * even)
    shared = sum(step_seconds(config(balance="speed"), machine(), 2, cohort=COHORT, slow_rank=1.2))
    assert shared == pytest.approx(even * 4 / (3 + 1 / 1.2))


def test_noise_counts_more_on_more_ranks() -> None:
    quiet, noisy = machine(), machine(noise=0.05)
    ratios = [
        sum(step_seconds(config(), noisy, n, cohort=COHORT)) / sum(step_seconds(config(), quiet, n, cohort=COHORT))
        for n in (1, 16)
    ]
    assert 1 < ratios[0] < ratios[1] < 1.2


def test_decoding_that_is_too_slow_is_named_with_its_cure() -> None:
    per_tile = 5.5 * (2 * FORWARD_S + BEYOND_S)  # seconds that one core takes to decode a tile
    decode = {"shards_mpx_s": 32**2 / 1e6 / per_tile, "slides_mpx_s": 1e12, "source": "made up"}
    there = machine(decode=decode, host_bytes=1e15)
    (point,) = simulate(config(), there, [1], cohort=COHORT).points
    assert point.bottleneck == "decode"
    assert "execution.decode_workers 6" in point.hint
    (fed,) = simulate(config(decode_workers=6), there, [1], cohort=COHORT).points
    assert fed.bottleneck == "compute"
    few = machine(decode=decode, host_bytes=1e15, cores_per_node=4)
    for workers in (1, 16):  # threads beyond its cores do not help
        (short,) = simulate(config(decode_workers=workers), few, [1], cohort=COHORT).points
        assert "needs 6 cores to read its tiles, and has 2" in short.hint


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_tiles_are_decoded_twice_only_where_no_memory_holds_them(device: str) -> None:
    per_tile = 10 * (2 * FORWARD_S + BEYOND_S)  # decoding is all that matters
    decode = {"shards_mpx_s": 32**2 / 1e6 / per_tile, "slides_mpx_s": 1e12, "source": "made up"}
    most = 40 * 32**2 * 3  # bytes of the tiles of a rank, in the largest step, and some
    little, enough = 0.1 * most, 1.0 * most  # of which `tile_cache` may take all

    def seconds(held: float, cached: float, **execution: Any) -> float:
        there = machine(decode=decode, device=device, host_bytes=2 * held, device_bytes=cached, cores_per_node=256)
        return sum(step_seconds(config(tile_cache=1.0, **execution), there, 1, cohort=COHORT))

    ahead = seconds(100 * enough, little)
    assert seconds(little, enough) == pytest.approx(ahead, rel=0.1)  # chunk by chunk, and kept for the second time
    assert seconds(little, little) == pytest.approx(2 * ahead, rel=0.1)  # replay encodes all tiles twice
    # Without decoding threads nothing is read ahead, and room for one step is enough.
    alone = {"decode_workers": 0}
    assert seconds(enough, little, **alone) == pytest.approx(seconds(100 * enough, little, **alone))
    assert seconds(enough, little) > 1.5 * ahead


def test_ranks_that_share_cores_take_turns() -> None:
    busy = machine().encoders[0].model_copy(update={"busy_cores": 1.0})
    alone, crowded = (machine(encoders=[busy.model_dump()], cores_per_node=cores) for cores in (2, 1))
    assert sum(step_seconds(config(), crowded, 1, cohort=COHORT)) == pytest.approx(
        2 * sum(step_seconds(config(), alone, 1, cohort=COHORT)), rel=1e-3
    )


def test_shared_storage_bounds_all_nodes_together() -> None:
    storage = {"node_bytes_s": 1e18, "total_bytes_s": 1e4, "local_bytes_s": 1e18, "source": "made up"}
    points = simulate(config(), machine(storage=storage), [1, 8], cohort=COHORT).points
    assert [point.bottleneck for point in points] == ["storage"] * 2
    assert points[1].step_s == pytest.approx(points[0].step_s, rel=0.05)
    assert "execution.shard_cache" in points[1].hint
    cached = simulate(config(shard_cache="/local"), machine(storage=storage), [8], cohort=COHORT).points[0]
    assert cached.bottleneck != "storage"
    (small,) = simulate(
        config(shard_cache="/local", shard_cache_gb=1e-6), machine(storage=storage), [8], cohort=COHORT
    ).points
    assert small.bottleneck == "storage"
    assert "shard_cache_gb 1" in small.hint


def test_cores_that_are_shared_are_no_imbalance() -> None:
    busy = machine().encoders[0].model_copy(update={"busy_cores": 2.0})
    crowded = machine(encoders=[busy.model_dump()], cores_per_node=2)
    (point,) = simulate(config(), crowded, [1], cohort=Cohort((40, 40, 40, 40), 1000.0, "equal")).points
    assert point.shares["imbalance"] == pytest.approx(0, abs=1e-9)
    assert point.shares["compute"] > 0.99


def test_calls_that_are_too_small_are_named() -> None:
    calls = [{"tiles": 1, "forward_s": 1.0, "backward_s": 2.0}, {"tiles": 64, "forward_s": 1.1, "backward_s": 2.1}]
    slow = machine().encoders[0].model_dump() | {"calls": calls}
    few, many = simulate(config(), machine(encoders=[slow]), [1, 64], cohort=COHORT).points
    assert few.bottleneck == "compute"
    assert "a larger execution.chunk" in few.hint
    assert many.bottleneck == "latency"  # of a single call


def test_a_fixed_encoder_makes_one_pass(tmp_path: Path) -> None:
    encoder = {"name": "small_cnn", "freeze_blocks": 4}
    seconds = step_seconds(config({"encoder": encoder}), frozen_machine(encoder), 1, cohort=COHORT)
    tiles = [max(plan.counts(0)) for plan in plan_steps(epoch_order(5, 0, 0), COHORT.sizes, 2, 1, 2)]
    assert seconds == pytest.approx([number * FORWARD_S for number in tiles], rel=1e-6)


def frozen_machine(encoder: dict[str, Any]) -> Machine:
    """The same, for an encoder of other settings."""
    return machine(encoders=[machine().encoders[0].model_dump() | {"encoder": encoder}])


def test_no_rank_is_faster_than_the_others() -> None:
    with pytest.raises(ConfigError, match=r"--slow-rank 0.5: .* 1 or more"):
        step_seconds(config(), machine(), 1, cohort=COHORT, slow_rank=0.5)


def test_groups_of_unlike_slides_wait_for_each_other() -> None:
    (point,) = simulate(config(group_size=1), machine(), [1], cohort=COHORT).points
    assert point.shares["imbalance"] > 0.1
    (pooled,) = simulate(config(), machine(), [1], cohort=COHORT).points
    assert pooled.shares["imbalance"] < 0.05
    assert pooled.slides_s > point.slides_s


def test_prefetched_tiles_hide_a_step_that_takes_longer_to_read() -> None:
    consumed, produced = np.array([1.0, 1.0, 1.0, 1.0]), np.array([0.5, 0.5, 1.8, 0.5])
    ahead = module._pipeline(config(prefetch=2), consumed, produced, True)
    assert ahead == pytest.approx([1.5, 2.5, 3.8, 4.8])  # read at 0.5, 1.0, 2.8, 3.3
    in_turn = module._pipeline(config(prefetch=0), consumed, produced, True)
    assert in_turn[-1] == pytest.approx(consumed.sum() + produced.sum())
    by_chunks = module._pipeline(config(prefetch=2), consumed, produced, False)
    assert by_chunks[-1] == pytest.approx(np.maximum(consumed, produced).sum())


def test_a_full_queue_keeps_the_reader_waiting() -> None:
    consumed, produced = np.array([1.0, 5.0, 1.0, 1.0, 1.0]), np.full(5, 0.1)
    produced[4] = 3.0
    ends = module._pipeline(config(prefetch=1), consumed, produced, True)
    # The third step's tiles are read at once, but the fourth's wait for room until the third begins, at 6.1.
    assert ends == pytest.approx([1.1, 6.1, 7.1, 8.1, 10.1])


def test_what_is_beyond_the_measured_sizes_is_called_predicted(tmp_path: Path) -> None:
    validation = Validation(median_error=0.03, worst_error=0.12, points=9, source="a comparison")
    there = machine(measured=True, largest=Largest(nodes=1, ranks=2, tiles=100), validation=validation)
    found = simulate(config(), there, [1, 2, 64], cohort=COHORT)
    assert [point.is_predicted for point in found.points] == [False, True, True]
    rows = [line for line in found.text().splitlines() if line.strip().startswith(("1 ", "2 ", "64 "))]
    assert "within measured sizes" in rows[0]
    assert all("predicted, within 12%" in row for row in rows[1:3])
    assert "12% at worst, 3% median of 9 comparisons (a comparison)" in found.text()
    small = machine(measured=True, largest=Largest(nodes=1, ranks=2, tiles=10))
    text = simulate(config(), small, [1], cohort=COHORT).text()
    assert "predicted, not validated" in text
    draw_simulation(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_what_does_not_fit_is_said() -> None:
    (point,) = simulate(config(memory="keep"), machine(device_bytes=1e6), [1], cohort=COHORT).points
    assert not point.fits
    assert "DOES NOT FIT" in simulate(config(memory="keep"), machine(device_bytes=1e6), [1], cohort=COHORT).text()


def test_a_thousand_nodes_are_simulated_as_one_is() -> None:
    sizes = np.random.default_rng(0).integers(5_000, 100_000, 2_000).tolist()
    found = simulate(config({"slides_per_step": 4}), machine(), [1, 1024], cohort=Cohort(tuple(sizes), 1e4, ""))
    assert found.steps == 500
    assert found.points[1].slides_s > 500 * found.points[0].slides_s
    for point in found.points:
        assert sum(point.shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("text", ["", "0,1", "8,1", "1,1", "one", "1,,2"])
def test_nodes_have_to_ascend(text: str) -> None:
    with pytest.raises(ConfigError, match="numbers of nodes that ascend"):
        parse_nodes(text)


def test_nodes() -> None:
    assert parse_nodes("1,8,64,1024") == (1, 8, 64, 1024)


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="execution.group_size=3 does not divide world size 2"):
        simulate(config(group_size=3), machine(), [1], cohort=COHORT)


def test_exchanged_halos_are_refused() -> None:
    dense = {"encoder": {"name": "resnet18", "dense": "layer1"}}
    with pytest.raises(ConfigError, match="execution.halo=exchange"):
        simulate(config(dense, halo="exchange"), machine(), [1], cohort=COHORT)


def test_slides_that_are_known_are_taken(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    found = find_cohort(run)
    assert found.sizes == SIZES[:8]
    assert found.words == "8 training slides, from the shards"
    drawn = find_cohort(run, 100)
    assert len(drawn.sizes) == 100
    assert set(drawn.sizes) <= set(found.sizes)
    assert drawn == find_cohort(run, 100)


def test_else_a_mix_is_drawn_and_said(tmp_path: Path) -> None:
    settings = RunConfig.model_validate(
        {"bookkeeping": {"out": tmp_path / "none"}, "cohort": {"table": tmp_path / "no"}}
    )
    found = find_cohort(settings)
    assert found == find_cohort(settings)
    assert len(found.sizes) == 400
    assert min(found.sizes) >= 5_000
    assert max(found.sizes) <= 100_000
    assert 15_000 < float(np.median(found.sizes)) < 25_000
    assert "stated mix" in found.words
    assert "not known" in found.words
    assert len(find_cohort(settings, 7).sizes) == 7
