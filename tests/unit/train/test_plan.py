"""Plans of small runs: what is counted, what changes it, and what is said where it does not fit."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from gigamil import cli
from gigamil.config.schema import RunConfig
from gigamil.data.h5 import write_features
from gigamil.errors import ConfigError, ShardError
from gigamil.memory.peak import LiveBytes
from gigamil.models.aggregator import build_aggregator
from gigamil.models.bag import Bag, LocalPool, Pooled
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.train.loss import cross_entropy, slide_losses
from gigamil.train.plan import Plan, build_planned_model, parse_bytes, plan_run, plan_worlds, pool_calls, refuse_unfit
from gigamil.units import format_bytes

GB = 10**9


def config(**execution: object) -> RunConfig:
    science = {"encoder": {"name": "small_cnn"}, "slides_per_step": 2}
    run = {"slides": {"tile_px": 32}, "science": science, "execution": {"device": "cpu", "chunk": 8} | execution}
    return RunConfig.model_validate(run)


def row(plan: Plan, name: str) -> int:
    return next(row.bytes for row in plan.rows if row.name.startswith(name))


def sent(plan: Plan, name: str) -> int:
    return next(row.bytes for row in plan.traffic if row.name.startswith(name))


def with_aggregator(aggregator: nn.Module | str) -> SlideModel:
    """Around the encoder of `config`, of two classes."""
    encoder = build_model(config().science, 2).encoder
    if isinstance(aggregator, str):
        aggregator = build_aggregator(aggregator, encoder.dim, 2, {})
    return SlideModel(encoder, aggregator, 2).train()


def live_head_bytes(model: SlideModel, sizes: tuple[int, ...]) -> int:
    """What a real forward and backward after the encoder take, besides the gradient of embeddings and parameters."""
    number = sum(sizes)
    embedding_nD = torch.randn((number, model.encoder.dim), requires_grad=True)
    label_B, position_n2 = torch.zeros(len(sizes), dtype=torch.int64), torch.rand(number, 2, dtype=torch.float64)
    keys = torch.arange(number), torch.arange(len(sizes))
    bag = Bag(embedding_nD, position_n2, sizes, LocalPool(number), *keys, label_B)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes() as live:
        logits_BK, pooled = model.classify(bag)
        slide_losses(cross_entropy, logits_BK, pooled, label_B).mean().backward()
    return live.peak - embedding_nD.nbytes


class LooksAtValues(nn.Module):
    """An aggregator that reads numbers from tensors, which those without memory do not have."""

    out_dim = 64

    def forward(self, bag: Bag) -> Pooled:
        scale = 1 + abs(float(bag.embedding_nD.detach().sum()))
        wide_nX = torch.tanh(bag.embedding_nD / scale).repeat(1, 4)
        return Pooled(bag.segment_mean(torch.tanh(wide_nX))[:, : self.out_dim])


@pytest.mark.parametrize(
    ("text", "number"), [("80GB", 80 * GB), ("512MiB", 2**29), ("1.5 GB", 1_500_000_000), ("4096", 4096)]
)
def test_sizes_of_memory(text: str, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "80 giga", "-1GB", "1.2.3GB"])
def test_other_words_are_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is no size of memory; write for example 80GB"):
        parse_bytes(text)


def test_all_fits_and_all_is_kept() -> None:
    plan = plan_run(config(), tiles=100, device_memory=8 * GB)
    assert (plan.tiles_largest, plan.tiles_rank, plan.num_chunks, plan.num_kept) == (100, 100, 13, 13)
    assert plan.kept_share == 1
    assert plan.cost == 3
    assert plan.fits
    assert not plan.remedies
    assert plan.peak == sum(row.bytes for row in plan.rows)
    assert all(row.bytes >= 0 for row in plan.rows)
    assert "f = 1.00" in plan.text()


def test_more_ranks_share_tiles_and_states() -> None:
    one = plan_run(config(memory="replay"), tiles=101, device_memory=8 * GB)
    four = plan_run(config(memory="replay"), ranks=4, tiles=101, device_memory=8 * GB)
    assert (one.tiles_rank, four.tiles_rank) == (101, 26)
    assert one.cost == four.cost == 4
    assert row(four, "moments") == row(one, "moments") // 4
    assert row(four, "parameters") == row(one, "parameters")
    assert sum(row.bytes for row in one.traffic) == 0 < sum(row.bytes for row in four.traffic)


@pytest.mark.parametrize("ranks", [2, 6])
def test_a_group_that_the_ranks_do_not_fill_is_refused(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"execution.group_size=4 does not divide world size {ranks}; use one of"):
        plan_run(config(group_size=4), ranks=ranks, tiles=100, device_memory=8 * GB)
    assert plan_run(config(group_size=4), ranks=8, tiles=100, device_memory=8 * GB).tiles_rank == 13


def test_a_plan_of_a_run_whose_ranks_a_launcher_starts_asks_for_their_number() -> None:
    with pytest.raises(ConfigError, match=r"execution.group_size=4, and a plan for 1 rank: .*`--ranks 4`"):
        plan_run(config(group_size=4), tiles=100, device_memory=8 * GB)


def test_a_processor_holds_the_encoder_as_it_was() -> None:
    plans = {device: plan_run(config(device=device), tiles=100, device_memory=8 * GB) for device in ("cpu", "auto")}
    name = "encoder as it was at the start"
    assert 0 < row(plans["cpu"], name) < row(plans["cpu"], "parameters")
    assert plans["auto"].device == "cuda"
    assert name not in [part.name for part in plans["auto"].rows]


def test_a_moving_average_is_as_large_as_what_it_follows() -> None:
    plain = config(zero_stage=3)
    optim = plain.science.optim.model_copy(update={"ema": 0.99})
    averaged = plain.model_copy(update={"science": plain.science.model_copy(update={"optim": optim})})
    one, four = (plan_run(averaged, ranks=ranks, tiles=100, device_memory=8 * GB) for ranks in (1, 4))
    assert row(four, "moving average") == row(one, "moving average") // 4 > 0
    assert "moving average" not in [part.name for part in plan_run(plain, tiles=100, device_memory=8 * GB).rows]


@pytest.mark.parametrize("regime", ["coupled", "taught"])
def test_a_teacher_is_whole_on_every_rank_and_no_graph_is_kept(regime: str) -> None:
    run = config(zero_stage=3, memory="keep").model_dump()
    run["science"]["regime"] = {"name": regime}
    one, four = (plan_run(RunConfig.model_validate(run), ranks=n, tiles=100, device_memory=8 * GB) for n in (1, 4))
    assert row(four, "teacher") == row(one, "teacher") == row(one, "parameters") // 2 > 0
    assert (row(one, "kept graphs"), one.cost) == (0, 4)  # a forward of the teacher, and three of the student
    assert "teacher" not in [part.name for part in plan_run(config(), tiles=100, device_memory=8 * GB).rows]


def test_partitioned_parameters_are_whole_within_a_step() -> None:
    two, three = (plan_run(config(zero_stage=stage), ranks=4, tiles=101, device_memory=8 * GB) for stage in (2, 3))
    whole = row(two, "parameters")
    assert row(three, "parameters") == whole + whole // 4
    (sent,) = (row.bytes for row in three.traffic if row.name == "parameters, gathered once")
    assert sent == whole * 3 // 4  # whatever the number of chunks


def test_keep_that_does_not_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, cpu = config(memory="keep"), torch.device("cpu")
    model = build_model(settings.science, 2)
    monkeypatch.setattr("gigamil.train.plan.free_device_memory", lambda device, local_ranks: 8 * GB // local_ranks)
    refuse_unfit(settings, model, [1000, 1000, 9], 1, cpu, 1)
    with pytest.raises(
        ConfigError, match=r"execution\.memory=keep: the graphs of 2000 tiles .* What fits: execution\.mem"
    ):
        refuse_unfit(settings, model, [1000, 1000, 9], 1, cpu, 80)
    refuse_unfit(config(memory="auto"), model, [1000, 1000, 9], 1, cpu, 80)  # keeps what fits


def test_what_would_make_it_fit_fits() -> None:
    plan = plan_run(config(memory="keep"), tiles=2000, device_memory=100 * 10**6)
    assert not plan.fits
    assert "IT DOES NOT FIT" in plan.text()
    words = plan.remedies[0].split(":")[0].split()
    assert words == ["execution.memory", "auto"]
    assert plan_run(config(memory="auto"), tiles=2000, device_memory=100 * 10**6).fits


def test_the_command_needs_no_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps({"science": {"encoder": {"name": "small_cnn"}}, "execution": {"device": "cpu"}}))
    assert cli.main(["plan", str(path), "--tiles", "64", "--ranks", "2", "--gpu-memory", "8GB", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["available"] == 8 * GB
    assert figures["fits"]
    assert cli.main(["plan", str(path)]) == 0
    out = capsys.readouterr().out
    assert "100 mm2 of tissue a slide assumed, --tiles N says otherwise; its tiles are not known: " in out
    assert "cohort.table" in out
    assert cli.main(["plan", str(path), "--gpu-memory", "much"]) == 2


@pytest.mark.parametrize(
    ("aggregator", "tiles"),
    [
        ("gated_attention", 10_001),  # more than a block of rows
        ("transformer", 3001),  # no matrix of tiles by tiles
        ("abmilx", 3001),
        ("transmil", 3001),  # more tokens than landmarks
        ("clam_mb", 6001),  # with its instances' loss
        ("dtfd", 6001),
        (LooksAtValues(), 20_001),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_an_aggregator_takes_what_is_predicted(aggregator: nn.Module | str, tiles: int) -> None:
    model = with_aggregator(aggregator)
    plan = plan_run(config(), tiles=tiles, device_memory=8 * GB, model=model)
    measured = live_head_bytes(model, (tiles // 2 + 1, tiles // 2))
    assert measured > 10**6
    assert row(plan, "aggregator") == pytest.approx(measured, rel=0.2)


def test_what_a_rank_cannot_share_stays_with_more_ranks() -> None:
    one, eight = (
        plan_run(config(), ranks=ranks, tiles=2000, device_memory=8 * GB, model=with_aggregator("transmil"))
        for ranks in (1, 8)
    )
    # Landmarks of a slide are on every rank that owns a part of it: of two slides, on half of the ranks.
    assert row(one, "aggregator") / 8 < row(eight, "aggregator") / 2 < row(one, "aggregator") / 2


@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("aggregator", ["attention", "transformer", "transmil"])
def test_ranks_send_what_the_page_on_aggregators_says(aggregator: str, ranks: int) -> None:
    # docs/aggregators.md, the table at its end, with its letters: one slide, whose tiles the ranks share evenly.
    B, D, N = 1, 64, 3600
    settings = config()
    science = settings.science.model_copy(update={"slides_per_step": B})
    settings = settings.model_copy(update={"science": science})
    plan = plan_run(settings, ranks=ranks, tiles=N, device_memory=8 * GB, model=with_aggregator(aggregator))
    found, n, others = sent(plan, "aggregator"), N // ranks, ranks - 1
    reduced, moved, slack = 0, 0, 0  # numbers that go through an all-reduce, and to another rank
    if aggregator == "attention":
        reduced = B + 2 * B * (D + 1)
    elif aggregator == "transformer":
        W, layers = 256, 2
        reduced = B + 2 * B * (W + 1)
        # Of all heads' rows that arrive, and leave again, one of R parts was here; else keys and values of all.
        per_layer = 4 * n * W * others // ranks if ranks == 4 else 2 * n * W * others
        moved = 2 * layers * per_layer
    else:
        W, A, G = 512, 8, 256
        reduced = 2 * (2 * 2 * G * W + G * A + 2 * G * (W + A)) + 2 * B * W
        slack = 2 * W * (2 * 2 * 16 + 2 * (2 * 3 + 2) * 60 + ranks) if others else 0  # halos, on two sides of a run
    least = 4 * (2 * reduced * others / ranks + moved)
    assert least - 20 <= found <= least + 4 * slack  # bytes of each reduction are whole
    assert slack == 0 or found > least


@pytest.mark.parametrize(("wanted", "device"), [("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")])
def test_memory_that_is_told_is_that_of_a_gpu(wanted: str, device: str) -> None:
    plan = plan_run(config(device=wanted), tiles=100, device_memory=80 * GB)
    assert plan.device == device
    assert plan.available == 80 * GB


def test_a_gpu_that_is_too_small_is_helped_by_more_of_them() -> None:
    plan = plan_run(config(device="auto", memory="keep"), ranks=2, tiles=10_000, device_memory=300 * 10**6)
    assert not plan.fits
    more = next(words for words in plan.remedies if " ranks: " in words)
    number = int(more.split()[0])
    helped = plan_run(config(device="auto", memory="auto"), ranks=number, tiles=10_000, device_memory=300 * 10**6)
    assert helped.fits
    assert f"peak {format_bytes(helped.peak)}" in more


@pytest.mark.skipif(torch.cuda.is_available(), reason="its memory can be asked for")
def test_a_gpu_that_is_not_here_must_tell_its_memory() -> None:
    with pytest.raises(ConfigError, match="--gpu-memory 80GB"):
        plan_run(config(device="cuda"), tiles=100)


@pytest.mark.parametrize(("checkpointing", "words"), [("none", "3 where all"), ("blocks", "4 where all")])
def test_the_cost_names_its_ends(checkpointing: str, words: str) -> None:
    settings = config(memory="replay", activation_checkpointing=checkpointing)
    encoder = settings.science.encoder.model_copy(update={"name": "resnet18"})
    settings = settings.model_copy(update={"science": settings.science.model_copy(update={"encoder": encoder})})
    text = plan_run(settings, tiles=100, device_memory=8 * GB).text()
    least = int(words[0])
    assert f"{least + 1:.2f} forwards ({words} graphs are kept, {least + 1} where none is)" in text


def test_features_need_no_encoder_but_room_for_their_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attrs = {"patch_size": 32, "patch_size_level0": 32}
    write_features(tmp_path / "a.h5", np.zeros((3, 512), np.float32), np.zeros((3, 2), np.int64), attrs)
    data = {"source": "features", "features": tmp_path}
    cached = RunConfig.model_validate(config().model_dump() | {"data": data})
    plan = plan_run(cached, tiles=1000, device_memory=8 * GB)
    assert (plan.cost, plan.num_kept, plan.num_chunks) == (0, 0, 1)
    assert row(plan, "tiles") == 5 * 1000 * 512 * 4  # four steps ahead, and one while it is put together
    assert row(plan, "embeddings") == 2 * 1000 * 512 * 4
    assert row(plan, "kept graphs") == 0
    head = build_model(cached.science, 2, dim=512)
    assert row(plan, "parameters") == sum(parameter.nbytes for parameter in head.parameters())
    assert "no encoder" in plan.text()
    data = SimpleNamespace(slides=lambda split: SimpleNamespace(sizes=(3,)))
    monkeypatch.setattr("gigamil.train.plan.load_training_data", lambda config: data)
    assert plan_run(cached, device_memory=8 * GB).slides == "from the features"
    assert plan_run(config(), device_memory=8 * GB).slides == "from the shards"
    small = plan_run(cached, tiles=1000, device_memory=10**6)
    assert not small.fits
    assert not any("chunk" in words or "checkpointing" in words for words in small.remedies)


def test_a_plan_on_features_that_are_not_there_says_what_to_type(tmp_path: Path) -> None:
    cached = RunConfig.model_validate(config().model_dump() | {"data": {"source": "features", "features": tmp_path}})
    with pytest.raises(ShardError, match="no features in .*gigamil features"):
        plan_run(cached, tiles=1000, device_memory=8 * GB)


@pytest.mark.parametrize("memory", ["auto", "replay"])
def test_plans_of_several_worlds_are_those_of_each(memory: str) -> None:
    settings = config(memory=memory, memory_budget=3e6)
    model = build_planned_model(settings)
    plans = plan_worlds(settings, [1, 2, 8], [300, 301], model, "cpu", 8 * GB)
    for ranks, plan in zip([1, 2, 8], plans, strict=True):
        alone = plan_run(settings, ranks=ranks, tiles=601, device_memory=8 * GB, model=model)
        assert (plan.num_kept, plan.tiles_rank, plan.traffic) == (alone.num_kept, alone.tiles_rank, alone.traffic)
        assert plan.rows == alone.rows


def test_zero_1_and_2_send_gradients_twice_and_parameters_once() -> None:
    for stage in (1, 2):
        plan = plan_run(config(zero_stage=stage), ranks=4, tiles=100, device_memory=8 * GB)
        assert sent(plan, "gradients") == pytest.approx(2 * sent(plan, "updated"), abs=2)


def test_an_aggregator_of_one_rank_calls_nobody() -> None:
    model = with_aggregator("attention")
    assert not pool_calls(model, (10, 20), 1)
    names = [(call.name, call.operation) for call in pool_calls(model, (10, 20), 3)]
    assert sorted(names) == [("all_reduce", "max"), ("all_reduce", "sum"), ("all_reduce", "sum")]
