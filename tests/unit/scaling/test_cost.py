"""What encoder calls and collectives cost, beside the same counted one by one."""

import numpy as np
import pytest
from scipy import integrate, stats

from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError
from gigamil.partition.spans import chunk_ranges
from gigamil.scaling.cost import (
    EncoderCost,
    Line,
    collective_seconds,
    count_flops,
    encoder_cost,
    expected_largest,
    fit_link,
    rank_seconds,
)
from gigamil.scaling.machine import DEFAULT_MACHINE, Link, Machine, load_machine
from gigamil.scaling.traffic import Collective
from gigamil.train.plan import build_planned_model

COST = EncoderCost(Line((2, 8), (0.4, 1.0)), Line((2, 8), (1.0, 1.9)), 1.0, None, "made up")


def machine(**changes: object) -> Machine:
    return load_machine(DEFAULT_MACHINE).model_copy(update=changes)


def ring(ranks_per_node: int = 4, cores: int = 8, between: Link | None = None, shared: bool = True) -> Machine:
    inside = Link(latency_s=1e-4, bytes_s=1e9)
    links = machine().links.model_copy(
        update={"algorithm": "ring", "inside": inside, "between": between, "shared": shared}
    )
    return machine(links=links, ranks_per_node=ranks_per_node, cores_per_node=cores)


def call(name: str, size: int, ranks: int) -> Collective:
    return Collective(name, "sum" if name == "all_reduce" else "", size, ranks, "gradients")


def test_a_line_goes_on_beyond_its_points() -> None:
    line = Line((2, 8), (0.4, 1.0))
    assert line.at(np.array([0, 1, 2, 5, 8, 18])) == pytest.approx([0.2, 0.3, 0.4, 0.7, 1.0, 2.0])
    bent = Line((1, 2, 4), (1.0, 1.5, 4.0))
    assert bent.at(np.array([0, 3, 6])) == pytest.approx([0.5, 2.75, 6.5])


def test_what_a_call_takes_whatever_its_size_is_where_its_line_begins() -> None:
    assert Line((2, 8), (0.4, 1.0)).launch(np.array([1, 5, 20])) == pytest.approx([0.2, 0.2, 0.2])
    # Flat, where launches take longer than the work; in proportion, where they are hidden behind it.
    assert Line((1, 10, 20), (0.5, 0.5, 1.0)).launch(np.array([1, 10, 15, 30])) == pytest.approx([0.5, 0.5, 0, 0])


def test_a_disturbed_measurement_does_not_make_large_calls_free() -> None:
    assert Line((8, 16), (0.010, 0.009)).at(np.array([64, 256])) == pytest.approx([0.009, 0.009])


def test_a_single_point_is_in_proportion_and_no_call_takes_less_than_nothing() -> None:
    assert Line((4,), (2.0,)).at(np.array([0, 1, 8])) == pytest.approx([0, 0.5, 4])
    assert Line((2, 4), (0.1, 4.1)).at(np.zeros(1)) == 0
    assert Line((2, 4), (0.1, 4.1)).launch(np.array([3])) == 0


@pytest.mark.parametrize("num_keep", [0, 1, 2, 3, 100])
@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_calls_of_a_rank_are_those_of_its_chunks(chunk: int, num_keep: int) -> None:
    tiles = np.arange(30)
    found = rank_seconds(COST, tiles, chunk, num_keep)
    for number in tiles:
        total, launch, kept = 0.0, 0.0, 0
        ranges = chunk_ranges(max(1, int(number)), chunk)  # a rank without tiles encodes a blank one
        for place, (start, stop) in enumerate(ranges):
            forwards = 1 if place < num_keep else 2
            size = np.array([stop - start])
            total += forwards * COST.forward.at(size)[0] + COST.beyond.at(size)[0]
            launch += forwards * 0.2 + 0.7  # where the lines begin
            kept += stop - start if place < num_keep else 0
        assert found.total[number] == pytest.approx(total)
        assert found.launch[number] == pytest.approx(launch)
        assert found.calls[number] == len(ranges)
        assert found.kept[number] == min(kept, number)


def test_a_compiled_encoder_fills_its_last_call_up() -> None:
    free = EncoderCost(Line((1,), (1.0,)), Line((1,), (2.0,)), 0.0, None, "")
    found = rank_seconds(free, np.array([10, 12, 1]), 4, 100, is_padded=True)
    assert found.total == pytest.approx([36, 36, 12])
    assert found.kept.tolist() == [10, 12, 1]


def test_dense_encoders_compute_more_pixels() -> None:
    free = EncoderCost(Line((1,), (1.0,)), Line((1,), (2.0,)), 0.0, None, "")
    assert rank_seconds(free, np.array([10]), 4, 100, factor=1.5).total == pytest.approx(45)


def test_a_ring_is_as_slow_as_its_slowest_link() -> None:
    one = collective_seconds(call("all_reduce", 4_000_000, 4), ring())
    assert one.latency == pytest.approx(6 * 1e-4)
    assert one.transfer == pytest.approx(6 * 1_000_000 / 1e9)
    far = collective_seconds(call("all_reduce", 8_000_000, 8), ring(between=Link(latency_s=1e-3, bytes_s=1e8)))
    assert far.latency == pytest.approx(14 * 1e-3)
    assert far.transfer == pytest.approx(14 * 1_000_000 / 1e8)


def test_ranks_that_share_cores_wait_for_each_other() -> None:
    free, crowded = (collective_seconds(call("all_reduce", 800, 8), ring(8, cores)) for cores in (8, 2))
    assert crowded.latency == pytest.approx(4 * free.latency)
    assert crowded.transfer == pytest.approx(4 * free.transfer)


def test_gathers_and_exchanges_of_a_ring() -> None:
    assert collective_seconds(call("all_gather_into_tensor", 1000, 4), ring()).transfer == pytest.approx(3 * 1000 / 1e9)
    assert collective_seconds(call("reduce_scatter_tensor", 4000, 4), ring()).transfer == pytest.approx(3 * 1000 / 1e9)
    between = Link(latency_s=1e-3, bytes_s=1e8)
    own, shared = (
        collective_seconds(call("all_to_all_single", 8000, 8), ring(between=between, shared=shared)).transfer
        for shared in (False, True)
    )
    assert shared == pytest.approx(4 * own)


def test_a_tree_moves_what_the_model_of_the_page_says() -> None:
    links, size = machine().links, 23_000_000
    assert links.between is not None
    found = collective_seconds(call("all_reduce", size, 64), machine())
    inside = 2 * 7 / 8 * size / links.inside.bytes_s
    between = 2 * 7 / 8 * size / 8 / links.between.bytes_s
    assert found.transfer == pytest.approx(inside + between)
    assert found.latency == pytest.approx(2 * 3 * (links.inside.latency_s + links.between.latency_s))
    gathered = collective_seconds(call("all_gather_into_tensor", size // 64, 64), machine())
    scattered = collective_seconds(call("reduce_scatter_tensor", size, 64), machine())
    assert gathered.transfer + scattered.transfer == pytest.approx(found.transfer, rel=1e-6)


def test_one_rank_sends_nothing_and_unknown_links_are_refused() -> None:
    assert sum(collective_seconds(call("all_reduce", 10**9, 1), machine())) == 0
    with pytest.raises(ConfigError, match=r"does not say what lies between nodes. Set links.between"):
        collective_seconds(call("all_reduce", 8, 8), ring())


@pytest.mark.parametrize(("algorithm", "ranks"), [("ring", 2), ("ring", 4), ("tree", 8)])
def test_a_link_is_found_again(algorithm: str, ranks: int) -> None:
    truth = Link(latency_s=3e-5, bytes_s=2e9)
    links = machine().links.model_copy(update={"algorithm": algorithm, "inside": truth})
    there = machine(links=links, ranks_per_node=ranks, cores_per_node=ranks)
    sizes = (8, 65536, 2**20, 2**26)
    seconds = [sum(collective_seconds(call("all_reduce", size, ranks), there)) for size in sizes]
    found = fit_link(algorithm, ranks, sizes, seconds)  # type: ignore[arg-type]
    assert found.latency_s == pytest.approx(truth.latency_s, rel=1e-3)
    assert found.bytes_s == pytest.approx(truth.bytes_s, rel=1e-3)


@pytest.mark.parametrize("count", [2, 8, 1000])
def test_the_largest_of_many(count: int) -> None:
    density = stats.norm.pdf, stats.norm.cdf
    exact = integrate.quad(lambda x: x * count * density[0](x) * density[1](x) ** (count - 1), -10, 10)[0]
    assert expected_largest(count) == pytest.approx(exact, rel=0.05)
    assert expected_largest(1) == 0


def small(**science: object) -> RunConfig:
    encoder = {"name": "small_cnn"}
    return RunConfig.model_validate({"slides": {"tile_px": 32}, "science": {"encoder": encoder} | science})


def test_a_backward_is_about_two_forwards() -> None:
    forward, backward = count_flops(build_planned_model(small()), 32)
    assert forward > 10**6
    assert 1.5 * forward < backward <= 2 * forward  # the first layer needs no gradient of its input


def test_an_encoder_that_was_not_measured_is_put_under_the_roof() -> None:
    config = small(precision="bfloat16")
    model, there = build_planned_model(config), machine()
    cost, roof = encoder_cost(config, model, there), there.roof
    assert roof is not None
    forward, backward = count_flops(model, 32)
    rate = roof.efficiency["other"] * roof.flops_s["bfloat16"]
    # Kernels are launched while earlier ones run, so what takes longer counts: launches of 100 tiles, work of a million.
    sizes = np.array([100, 10**6])
    assert cost.forward.at(sizes) == pytest.approx([roof.launch_s, 10**6 * forward / rate])
    assert cost.beyond.at(sizes) == pytest.approx([2 * roof.launch_s, 10**6 * backward / rate])
    again = config.model_copy(
        update={"execution": config.execution.model_copy(update={"activation_checkpointing": "blocks"})}
    )
    extra = encoder_cost(again, model, there).beyond.at(sizes) - cost.beyond.at(sizes)
    assert extra == pytest.approx(cost.forward.at(sizes))


def test_without_a_measurement_and_a_roof_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"has no speed for encoder .*small_cnn.* Measure it there: gigamil bench"):
        encoder_cost(small(), build_planned_model(small()), machine(roof=None))
