"""The scaling benchmark: which points, what is compared with what, and two real points."""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scaling
from benchmarks.scaling import TINY, Measured, Point, Settings
from gigamil.lock import folder_lock
from gigamil.scaling.traffic import Collective
from gigamil.testing.nodes import why_no_nodes


def point(
    nodes: int, ranks_per_node: int = 1, mode: str = "strong", encoder: str = "sleep", kept: str = "auto"
) -> Point:
    return Point(mode, encoder, kept, nodes, ranks_per_node)


def measured(ranks: int, tiles_per_s: float, losses: list[float], **changes: Any) -> Measured:
    by_rank = [0.25] * ranks
    whole = Measured(
        losses=losses,
        grad_norms=[1.0] * len(losses),
        step_s=1.0,
        slides_per_s=4.0,
        tiles_per_s=tiles_per_s,
        own_s=by_rank,
        data_s=by_rank,
        wait_s=by_rank,
        together_s=by_rank,
        imbalance_tiles=0.5,
        bytes_per_step=2e4,
        bytes_formula=1.5e4,
        launcher="deepspeed",
    )
    return replace(whole, **changes)


def arguments(*words: str) -> argparse.Namespace:
    return scaling.parse(list(words))


class TestPoints:
    def test_auto_takes_thin_where_all_fit_on_the_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        found = scaling.make_points(arguments("--nodes", "1,2"), 2)
        assert found == [point(1, encoder="thin"), point(2, encoder="thin")]

    def test_auto_takes_sleep_for_all_and_thin_where_it_fits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        found = scaling.make_points(arguments("--nodes", "4,1", "--ranks-per-node", "1,2", "--kept", "auto,0"), 2)
        shapes = [(p.encoder, p.kept, p.nodes, p.ranks_per_node) for p in found]
        both = [(1, 1), (1, 2), (4, 1), (4, 2)]
        assert shapes == [("sleep", kept, *shape) for kept in ("auto", "0") for shape in both] + [
            ("thin", kept, *shape) for kept in ("auto", "0") for shape in both[:2]
        ]

    def test_in_a_slurm_job_cores_are_those_of_a_node(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", "96")
        assert scaling.cores_of_a_machine() == 96
        assert {p.encoder for p in scaling.make_points(arguments("--nodes", "1,64"), 8)} == {"thin"}

    def test_an_encoder_that_is_named_is_taken(self) -> None:
        assert scaling.make_points(arguments("--nodes", "8", "--encoder", "resnet18"), 2) == [
            point(8, encoder="resnet18")
        ]

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--steps", "7"], "--steps 7: must be even, 4 or more"),
            (["--steps", "2"], "--steps 2: must be even, 4 or more"),
            (["--nodes", "0"], "argument --nodes"),
            (["--tiles-per-slide", "9-3"], "argument --tiles-per-slide"),
            (["--kept", "half"], "--kept half: must be auto, 0, or auto,0"),
        ],
    )
    def test_what_makes_no_sense_is_refused(
        self, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            arguments(*words)
        assert said in capsys.readouterr().err

    def test_single_settings_win(self) -> None:
        assert arguments("--quick", "--tiles-per-slide", "5000-100000").sizes == replace(
            scaling.QUICK, tiles_per_slide=(5000, 100_000)
        )

    def test_several_nodes_need_something_to_make_them_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("SLURM_JOB_ID", raising=False)
        monkeypatch.setattr(scaling, "why_no_nodes", lambda: "network namespaces need root")
        assert scaling.choose_launcher([point(1, 2)]) == "torchrun"
        with pytest.raises(SystemExit, match="--nodes 2: network namespaces need root"):
            scaling.choose_launcher([point(1), point(2)])
        monkeypatch.setattr(scaling, "why_no_nodes", lambda: None)
        assert scaling.choose_launcher([point(1), point(2)]) == "deepspeed"
        assert not scaling.is_for_others(point(2))
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
        assert scaling.choose_launcher([point(2)]) == "srun"
        assert [scaling.is_for_others(point(nodes)) for nodes in (1, 2, 4)] == [False, False, True]


class TestSlides:
    def test_steps_of_the_largest_point(self) -> None:
        weak = [point(n, mode="weak") for n in (1, 2, 4)]
        assert scaling.with_slides(Settings(steps=8), weak).slides == 8 * 4 * 4
        assert scaling.with_slides(Settings(steps=8), [point(n) for n in (1, 2, 4)]).slides == 8 * 4
        assert scaling.with_slides(Settings(steps=8, slides=160), weak[:1]).slides == 160
        with pytest.raises(SystemExit, match="100 slides make no even number of steps"):
            scaling.with_slides(Settings(slides=100), weak)

    def test_sizes_are_those_of_a_cohort_and_the_first_stay_the_same(self) -> None:
        few, many = (
            scaling.draw_sizes(Settings(slides=number, tiles_per_slide=(5000, 100_000))) for number in (32, 500)
        )
        assert many[:32] == few
        assert min(many) == 5000
        assert 60_000 < max(many) <= 100_000
        assert 13_000 < sorted(many)[250] < 17_000


def test_a_step_of_srun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "scontrol"
    stand_in.write_text('#!/bin/sh\n[ "$*" = "show hostnames gpu[03-05]" ] && printf "gpu03\\ngpu04\\ngpu05\\n"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[03-05]")
    monkeypatch.setenv("SLURM_JOB_ID", "20007")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    command = " ".join(scaling.srun_command(point(2, 8)))
    assert command.startswith("srun --nodes 2 --ntasks 16 --ntasks-per-node 8 --nodelist gpu03,gpu04 ")
    assert scaling.meeting_point() == {"MASTER_ADDR": "gpu03", "MASTER_PORT": "20007"}
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert scaling.meeting_point()["MASTER_ADDR"] == "10.0.0.1"


class TestComparisons:
    def test_efficiency_is_of_the_point_with_the_fewest_ranks_of_its_kind(self) -> None:
        found = {
            point(1): measured(1, 100.0, [1.0]),
            point(4): measured(4, 380.0, [1.0]),
            point(2, encoder="thin"): measured(2, 1000.0, [1.0]),
            point(2, 2, encoder="thin"): measured(4, 1500.0, [1.0]),
        }
        base = scaling.bases(found)
        shares = [scaling.efficiency(found, p, base[p]) for p in found]
        assert shares == pytest.approx([1.0, 0.95, 1.0, 0.75])

    def test_losses_of_strong_scaling_are_equal_step_by_step(self) -> None:
        losses = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]
        drifted = [1.0, 0.9 + 9e-7, 0.8, 0.7, 0.6, 0.9]  # the sixth is not compared
        found = {point(1): measured(1, 1.0, losses), point(4): measured(4, 4.0, drifted)}
        assert scaling.loss_difference(found) == pytest.approx(1e-6)
        other = {point(1): measured(1, 1.0, losses), point(1, encoder="thin"): measured(1, 1.0, [9.0])}
        assert scaling.loss_difference(other) is None  # another encoder, another model
        kept = {point(1): measured(1, 1.0, losses), point(1, kept="0"): measured(1, 1.0, [1.1, *losses[1:]])}
        assert scaling.loss_difference(kept) == pytest.approx(0.1)

    def test_losses_of_weak_scaling_are_means_of_steps(self) -> None:
        losses = [1.0, 3.0, 2.0, 6.0]
        found = {point(1, mode="weak"): measured(1, 1.0, losses), point(2, mode="weak"): measured(2, 2.0, [2.0, 4.04])}
        assert scaling.loss_difference(found) == pytest.approx(0.01)

    def test_a_ring_by_hand(self) -> None:
        calls = [
            Collective("all_reduce", "sum", 1000, 4, "gradients"),
            Collective("all_gather_into_tensor", "", 100, 4, "parameters"),
            Collective("reduce_scatter_tensor", "sum", 400, 4, "gradients"),
        ]
        assert scaling.ring_bytes(calls) == 2 * 3 / 4 * 1000 + 3 * 100 + 3 / 4 * 400


def write_run(folder: Path) -> Any:
    """A configuration of 2 ranks and the metrics of 6 steps: 2 s for the first two, then 1 s, of 3 slides and 30 tiles."""
    settings = replace(TINY, slides_per_step=3, slides=18)
    config = scaling.write_config(folder, scaling.make_cohort(folder / "cohort", settings), point(2), settings)
    lines = []
    for step in range(1, 7):
        seconds = 2.0 if step < 3 else 1.0
        lines.append({"kind": "step", "step": step, "loss": 1 / step, "grad_norm": 0.5})
        lines[-1] |= {"slides_per_s": 3 / seconds, "tiles_per_s": 30 / seconds}
        if step % 2 == 0:
            parts = {"own_s": [0.7, 0.4], "data_s": [0.1, 0.0], "wait_s": [0.0, 0.4], "rest_s": [0.2, 0.6]}
            tiles = [15.0, 15.0] if step < 6 else [16.0, 14.0]
            lines.append({"kind": "ranks", "step": step, "steps": 2, "tiles": tiles} | parts)
    (config.bookkeeping.out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def test_a_run_is_read_without_its_first_steps(tmp_path: Path) -> None:
    found = scaling.read_metrics(write_run(tmp_path), point(2), 1234.0, "deepspeed")
    assert (found.step_s, found.slides_per_s, found.tiles_per_s) == pytest.approx((1.0, 3.0, 30.0))
    assert found.losses == [1 / step for step in range(1, 7)]
    assert (found.own_s, found.wait_s) == (pytest.approx([0.7, 0.4]), pytest.approx([0.0, 0.4]))
    assert found.together_s == pytest.approx([0.2, 0.2])
    assert found.imbalance_tiles == 1.0
    assert found.bytes_per_step == 1234.0
    assert found.bytes_formula > 4 * 2 / 2 * 48 * 16  # gradients of the encoder's linear layer, once


def test_a_point_is_followed_to_its_end(tmp_path: Path) -> None:
    config = write_run(tmp_path)
    run = config.bookkeeping.out
    counted = iter(range(0, 10_000, 100))
    script = (
        "import sys, time; from pathlib import Path\n"
        "run = Path(sys.argv[1]); lines = (run / 'metrics.jsonl').read_text().splitlines(True)\n"
        "(run / 'metrics.jsonl').write_text('')\n"
        "for line in lines:\n"
        "    (run / 'metrics.jsonl').open('a').write(line); time.sleep(0.2)\n"
        "(run / 'run.json').write_text('{\"status\": \"%s\"}' % sys.argv[2])\n"
    )

    def start(status: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(run), status])

    assert scaling.num_steps(config) == 6
    assert scaling.follow(config, [start("finished")], lambda: float(next(counted)), lambda: "") == 100.0
    with pytest.raises(SystemExit, match=r"the point ended with codes \[0\]\nits last words"):
        scaling.follow(config, [start("failed")], None, lambda: "its last words")


def test_table_figure_and_the_last_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(slides=32)
    losses = [1.0, 0.9, 0.8, 0.7, 0.6]
    points = {
        point(1): measured(1, 100.0, losses, bytes_per_step=None, bytes_formula=0.0),
        point(4): measured(4, 360.0, losses, imbalance_tiles=0.75),
        point(2, encoder="thin"): measured(2, 1000.0, losses),
    }
    for each, what in points.items():
        scaling.save_point(tmp_path, each, settings, what)
    scaling.save_point(tmp_path, point(2), replace(settings, chunk=7), measured(2, 1.0, losses))
    scaling.save_point(tmp_path, point(2, mode="weak"), settings, measured(2, 1.0, losses))
    found = scaling.read_all(tmp_path, settings, "strong")
    assert found == points  # neither other settings nor another mode
    assert scaling.read_point(tmp_path, point(4), settings) == points[point(4)]
    assert scaling.read_point(tmp_path, point(2), settings) is None
    result = scaling.report(tmp_path, found, settings, [])
    assert result["efficiency_4_nodes"] == 0.9
    assert result["imbalance_tiles"] == 0.75
    assert result["max_loss_difference"] == 0.0
    assert [line["own"] for line in result["points"]] == [0.25] * 3
    assert "|   sleep | auto |     4 |              1 |" in capsys.readouterr().out
    whole = json.loads((tmp_path / "strong.json").read_text())
    assert whole["points"][1]["point"] == asdict(point(4))
    assert whole["settings"]["slides"] == 32
    assert (tmp_path / "strong.png").read_bytes().startswith(b"\x89PNG")


def test_two_studies_do_not_make_one_cohort_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    words = ["--tiny", "--nodes", "1", "--ranks-per-node", "1", "--out", str(tmp_path)]
    with (
        folder_lock(tmp_path / "cohort", "benchmarks/scaling.py"),
        pytest.raises(SystemExit, match=r"cohort' is in use by `benchmarks/scaling\.py`.* or name another folder"),
    ):
        scaling.main(words)


def test_points_that_trained_something_else_give_no_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(scaling, "make_cohort", lambda *_: None)
    points = [point(1), point(1, 2)]
    settings = scaling.with_slides(TINY, points)
    for each, first in zip(points, (1.0, 1.0 + 2e-5), strict=True):
        scaling.save_point(tmp_path, each, settings, measured(each.ranks, 100.0, [first, 0.9, 0.8, 0.7]))
    words = ["--tiny", "--nodes", "1", "--ranks-per-node", "1,2", "--encoder", "sleep", "--out", str(tmp_path)]
    assert scaling.main(words) == 1
    out, err = capsys.readouterr()
    assert "losses of points differ by 2e-05, more than 1e-05: no figures" in err
    assert "efficiency" not in out
    assert not list(tmp_path.glob("strong.*"))


@pytest.mark.slow
def test_two_points_of_one_node(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--tiny", "--nodes", "1", "--ranks-per-node", "1,2", "--encoder", "sleep", "--out", str(tmp_path)]
    assert scaling.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [line["ranks_per_node"] for line in result["points"]] == [1, 2]
    assert result["max_loss_difference"] < 1e-6
    assert result["imbalance_tiles"] < 1
    assert result["efficiency_4_nodes"] is None
    assert (tmp_path / "mlflow-strong" / "mlflow.db").is_file()
    run_ids = [json.loads(path.read_text()) for path in tmp_path.glob("points/*/run/mlflow.json")]
    assert len(run_ids) == 2
    assert scaling.main(words) == 0
    said = capsys.readouterr().out
    assert said.count("measured before") == 2
    assert json.loads(said.splitlines()[-1]) == result


@pytest.mark.slow
def test_weak_scaling_on_two_nodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reason = why_no_nodes()
    if reason is not None:
        pytest.skip(reason)
    words = ["--tiny", "--nodes", "1,2", "--mode", "weak", "--encoder", "sleep", "--out", str(tmp_path)]
    assert scaling.main(words) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, two = result["points"]
    assert (one["bytes_formula"], one["bytes_per_step"]) == (0, None)
    assert two["bytes_per_step"] is None or two["bytes_per_step"] > two["bytes_formula"] > 0
    assert result["max_loss_difference"] < 1e-6
