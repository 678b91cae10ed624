"""What `doctor --dist` makes of what the ranks found: each fault names the host and what to type."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gigamil import doctor_dist
from gigamil.cli import main
from gigamil.doctor import Check
from gigamil.doctor_dist import (
    RankFacts,
    check_all_reduce,
    check_clocks,
    check_folder,
    check_hosts,
    check_network,
    check_ranks,
    check_sameness,
)
from gigamil.parallel.meeting import Meeting, Member
from gigamil.parallel.topology import Topology

HOSTS = ("node1", "node1", "node2", "node2")
GPU = "H200"
ONE = RankFacts(
    local_rank=0,
    gpus=[],
    versions={"torch": "2.15.0", "gigamil": "0.1.0"},
    code="abc",
    interface="eth0",
    address="10.0.0.1",
    interfaces=["eth0", "ib0", "lo"],
    gloo_interfaces="",
    nccl_interfaces="",
    host_address="10.0.0.1",
)
SPEED = {"num_ranks": 4, "sizes": (8, 64 << 20), "times_s": (5e-5, 0.064), "num_rounds": (20, 3), "num_wrong": 0}


def facts(*changes: dict[str, Any], gpus: int = 0) -> list[RankFacts]:
    """Facts of the four ranks, with changes by rank."""
    changed = [*changes, *({} for _ in HOSTS[len(changes) :])]
    return [replace(ONE, **{"local_rank": i % 2, "gpus": [GPU] * gpus} | change) for i, change in enumerate(changed)]


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


class TestHosts:
    def test_on_cpus_there_is_nothing_to_compare(self) -> None:
        assert check_ranks(HOSTS) == Check("ranks", "ok", "4 on 2 hosts, 2 on each, all came")
        assert [check.status for check in check_hosts(HOSTS, facts())] == ["ok", "ok"]

    def test_unlike_numbers_of_ranks_fail(self) -> None:
        check = check_ranks(HOSTS[:3])
        assert check.status == "fail"
        assert "node1 2, node2 1" in check.detail

    def test_every_rank_has_its_gpu(self) -> None:
        checks = check_hosts(HOSTS, facts(gpus=2))
        assert [check.status for check in checks] == ["ok", "ok"]
        assert "rank 2, 3" in checks[1].detail.replace("ranks", "rank")
        assert "2 GPUs (H200)" in checks[1].detail

    def test_a_host_without_a_gpu_among_others_fails(self) -> None:
        check = by_name(check_hosts(HOSTS, facts({}, {}, {"gpus": []}, {"gpus": []}, gpus=2)))["host node2"]
        assert check.status == "fail"
        assert "no GPU, where other hosts show 2" in check.detail
        assert "node2" in check.cure

    def test_fewer_gpus_than_ranks_fail(self) -> None:
        check = by_name(check_hosts(HOSTS, facts({}, {}, {"gpus": [GPU]}, {"gpus": [GPU]}, gpus=2)))["host node2"]
        assert check.status == "fail"
        assert "start 1 on node2" in check.cure

    def test_fewer_gpus_than_others_warn(self) -> None:
        more = [GPU] * 4
        check = by_name(check_hosts(HOSTS, facts({"gpus": more}, {"gpus": more}, gpus=2)))["host node2"]
        assert check.status == "warn"
        assert "where others have 4" in check.detail

    def test_idle_and_unlike_gpus_warn(self) -> None:
        assert "2 of node1's GPUs are idle" in check_hosts(HOSTS, facts(gpus=4))[0].cure
        unlike = check_hosts(HOSTS, facts({}, {}, {"gpus": [GPU, "L4"]}, {"gpus": [GPU, "L4"]}, gpus=2))
        assert [check.status for check in unlike] == ["warn", "warn"]

    def test_two_machines_of_one_name_fail(self) -> None:
        check = check_hosts(["node"] * 4, facts())[0]
        assert check.status == "fail"
        assert "local ranks occur twice" in check.detail

    def test_of_many_hosts_those_that_are_not_fine_are_listed(self) -> None:
        hosts = [f"node{i:02}" for i in range(20)]
        told = [replace(ONE, gpus=[GPU] if i != 17 else []) for i in range(20)]
        shown = by_name(check_hosts(hosts, told))
        assert len(shown) == 9
        assert shown["host node17"].status == "fail"


class TestSameness:
    def test_equal_ranks_pass(self) -> None:
        assert [check.status for check in check_sameness(HOSTS, facts())] == ["ok", "ok"]

    def test_another_version_names_both_hosts(self) -> None:
        old = {"versions": ONE.versions | {"torch": "2.14.0"}}
        check = by_name(check_sameness(HOSTS, facts({}, {}, old, old)))["torch version"]
        assert (check.status, check.detail) == ("fail", "2.15.0 on node1, but 2.14.0 on node2")
        assert "torch" in check.cure

    def test_other_code_names_the_host(self) -> None:
        check = by_name(check_sameness(HOSTS, facts({}, {}, {}, {"code": "abd"})))["code"]
        assert (check.status, check.detail) == ("fail", "abc on node1, but abd on node2")


class TestClocks:
    def test_a_host_that_is_late_is_named(self) -> None:
        assert check_clocks(HOSTS, [None, None, 0.002, None]).status == "ok"
        check = check_clocks(HOSTS, [None, None, -63.0, None])
        assert check.status == "warn"
        assert "63.000 s from node1 (node2)" in check.detail
        assert "node2" in check.cure

    def test_one_host_has_one_clock(self) -> None:
        assert check_clocks(HOSTS[:2], [None, None]).status == "ok"


class TestNetwork:
    def test_interface_and_address_of_each_host(self) -> None:
        other = {"address": "10.0.0.2"}
        assert check_network(HOSTS, facts({}, {}, other, other), "cpu") == Check(
            "network", "ok", "node1 eth0 10.0.0.1, node2 eth0 10.0.0.2"
        )

    @pytest.mark.parametrize(
        ("device", "name", "wanted", "status"),
        [
            ("cpu", "gloo_interfaces", "ib0", "ok"),
            ("cpu", "gloo_interfaces", "ib", "fail"),
            ("cuda", "nccl_interfaces", "ib", "ok"),
            ("cuda", "nccl_interfaces", "=ib", "fail"),
            ("cuda", "nccl_interfaces", "=ib0", "ok"),
            ("cuda", "nccl_interfaces", "^docker", "ok"),
            ("cuda", "nccl_interfaces", "enp", "fail"),
        ],
    )
    def test_an_interface_that_is_not_there(self, device: str, name: str, wanted: str, status: str) -> None:
        check = check_network(HOSTS, facts({}, {}, {name: wanted}, {name: wanted}), device)
        assert check.status == status
        if status == "fail":
            assert f"_SOCKET_IFNAME={wanted} is no interface of node2" in check.detail
            assert "eth0, ib0, lo" in check.cure

    def test_no_route_to_the_first_host(self) -> None:
        check = check_network(HOSTS, facts({}, {}, {"address": "", "interface": ""}), "cpu")
        assert (check.status, check.detail) == ("fail", "node2 has no route to MASTER_ADDR")

    def test_a_name_that_means_the_machine_itself_hides_it_from_others(self) -> None:
        hidden = {"host_address": "127.0.1.1"}
        check = check_network(HOSTS, facts({}, {}, hidden, hidden), "cpu")
        assert check.status == "warn"
        assert "127.0.1.1, which is what node2 calls itself" in check.detail
        assert "GLOO_SOCKET_IFNAME" in check.cure
        assert check_network(HOSTS, facts({}, {}, hidden, hidden), "cuda").status == "ok"
        assert check_network(["node2"] * 4, facts(*[hidden] * 4), "cpu").status == "ok"


class TestFolder:
    def test_seen_by_all(self) -> None:
        assert check_folder(Path("/runs"), HOSTS, ["", "", "", ""], {0, 1, 2, 3}).status == "ok"

    @pytest.mark.parametrize(
        ("sees", "seen", "words"),
        [
            (["Permission denied", "", "", ""], {1, 3}, "'/runs' cannot be written on node1: Permission denied"),
            (
                ["", "", "No such file or directory", ""],
                {0, 1, 3},
                "'/runs' of node1 is not that of node2: No such file",
            ),
            (["", "", "", ""], {0, 1, 3}, "node1 does not see what node2 wrote to '/runs'"),
        ],
    )
    def test_a_folder_that_is_not_shared_names_the_host(self, sees: list[str], seen: set[int], words: str) -> None:
        check = check_folder(Path("/runs"), HOSTS, sees, seen)
        assert check.status == "fail"
        assert words in check.detail
        assert "--out" in check.cure


class TestAllReduce:
    def test_speed_is_told(self) -> None:
        check = check_all_reduce(HOSTS, [SPEED] * 4, "cpu")
        assert check.status == "ok"
        assert check.detail == "gloo, exact; 50 us for one number, 1.05 GB/s for 64 MiB (64.0 ms)"

    def test_a_wrong_sum_names_the_host(self) -> None:
        check = check_all_reduce(HOSTS, [SPEED, SPEED, SPEED | {"num_wrong": 3}, SPEED], "cuda")
        assert (check.status, check.detail) == ("fail", "NCCL gave wrong sums on node2")

    def test_an_error_names_host_and_interface(self) -> None:
        check = check_all_reduce(HOSTS, [SPEED, SPEED, {"error": "connect timeout"}, SPEED], "cpu")
        assert (check.status, check.detail) == ("fail", "gloo on node2: connect timeout")
        assert "GLOO_SOCKET_IFNAME" in check.cure


class TestFolderOfTheCheck:
    def test_it_is_taken_away_with_the_folders_made_for_it(self, tmp_path: Path) -> None:
        folder = tmp_path / "a" / "b" / "check"
        made: list[Path] = []
        doctor_dist._make(folder, made)
        doctor_dist._join(folder, folder / "0", "node1")
        doctor_dist._clear(folder, made, [0])
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_others_use_by_now_stays(self, tmp_path: Path) -> None:
        made: list[Path] = []
        doctor_dist._make(tmp_path / "a" / "check", made)
        (tmp_path / "a" / "0").touch()
        doctor_dist._clear(tmp_path / "a" / "check", made, [0])
        assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "0"]


def on_two_hosts(function: Callable[[Meeting, Topology], Any]) -> list[Any]:
    """What a function returns on each of two ranks, which are threads with one store."""
    store = dist.HashStore()
    members = [Member(f"node{rank}", 0, 0.0) for rank in range(2)]

    def run(rank: int) -> Any:
        topology = Topology(world_size=2, rank=rank, local_size=1)
        return function(Meeting(topology, store, members, None, 20.0), topology)

    with ThreadPoolExecutor(2, thread_name_prefix="rank") as pool:
        return [future.result(20) for future in [pool.submit(run, 0), pool.submit(run, 1)]]


class TestTwoRanks:
    def test_the_difference_of_their_clocks_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Clock:
            """Time of day, which is a hundred seconds ahead on rank 1."""

            ahead_of = threading.local()
            monotonic, sleep = staticmethod(time.monotonic), staticmethod(time.sleep)

            @classmethod
            def time(cls) -> float:
                return time.time() + cls.ahead_of.s

        def measure(meeting: Meeting, topology: Topology) -> list[float | None]:
            Clock.ahead_of.s = 100.0 * topology.rank
            return doctor_dist._clock_offsets(meeting, topology, [0, 1])

        monkeypatch.setattr(doctor_dist, "time", Clock)
        offsets, theirs = on_two_hosts(measure)
        assert offsets == theirs
        assert offsets[0] is None
        assert offsets[1] == pytest.approx(100.0, abs=0.5)

    def test_a_folder_that_both_have_is_shared(self, tmp_path: Path) -> None:
        out = tmp_path / "not" / "yet"
        checks = on_two_hosts(lambda meeting, topology: doctor_dist._check_folder(meeting, topology, out, [0, 1]))
        assert checks == [Check("shared folder", "ok", f"'{out}', seen and written by all hosts")] * 2
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_of_ones_own_is_not(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gigamil.files.SLOW_FOLDER_S", 0.0)
        outs = [tmp_path / "a", tmp_path / "b"]
        first, second = on_two_hosts(
            lambda meeting, topology: doctor_dist._check_folder(meeting, topology, outs[topology.rank], [0, 1])
        )
        assert first.status == second.status == "fail"
        assert f"'{outs[0]}' of node0 is not that of node1" in first.detail
        assert list(tmp_path.iterdir()) == []


class TestWords:
    @pytest.mark.parametrize(("gpus", "asked", "ranks"), [(0, None, 2), (1, None, 1), (8, None, 8), (8, 3, 3)])
    def test_without_a_launcher_there_is_a_rank_for_each_gpu_or_two(
        self, gpus: int, asked: int | None, ranks: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started: list[int] = []
        for name in ("RANK", "SLURM_PROCID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(doctor_dist.torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(
            doctor_dist, "launch_ranks", lambda _module, _words, execution, **_: started.append(execution.ranks)
        )
        assert doctor_dist.run_doctor_dist(None, asked) == 0
        assert started == [ranks]

    def test_ranks_are_for_dist_only(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--ranks", "2"]) == 2
        assert "gigamil doctor --dist --ranks N" in capsys.readouterr().err

    def test_a_launcher_has_started_its_ranks(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert main(["doctor", "--dist", "--ranks", "2"]) == 2
        assert "leave it out" in capsys.readouterr().err

    def test_the_word_that_deepspeed_adds_is_taken(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)  # also what the command sets itself is taken back
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        assert main(["--local_rank=0", "doctor", "--dist"]) == 4
        err = capsys.readouterr().err
        assert "rank 0 on host '" in err
        assert "MASTER_ADDR is not set for a world of 2" in err
