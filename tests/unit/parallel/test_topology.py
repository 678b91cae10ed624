"""The shape of the world is read from whichever launcher set it, and a world that cannot be is refused."""

import pytest

from gigamil.errors import ConfigError, EnvironmentFault
from gigamil.parallel.topology import Topology, detect_topology, export_topology, launcher_job, told_rank

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
DEEPSPEED = {
    "RANK": "9",
    "WORLD_SIZE": "32",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "8",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "4",
}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}


def test_without_a_launcher_there_is_one_process() -> None:
    assert detect_topology(env={}) == Topology(1, 0, 0, 1, 1)
    assert detect_topology(env={"RANK": "3"}) == Topology()  # half of the pair is not a launcher


def test_deepspeed_tells_the_ranks_of_a_machine_in_a_word_of_its_own() -> None:
    assert detect_topology(env=DEEPSPEED) == Topology(32, 9, 1, 8, 32)
    assert detect_topology(env=DEEPSPEED | {"LOCAL_WORLD_SIZE": "4"}).local_size == 4


def test_torchrun() -> None:
    assert detect_topology(env=TORCHRUN) == Topology(8, 5, 1, 4, 8)
    assert detect_topology(2, TORCHRUN) == Topology(8, 5, 1, 4, 2)


def test_srun_and_who_wins() -> None:
    assert detect_topology(env=SRUN) == Topology(4, 3, 1, 2, 4)
    assert detect_topology(env=SRUN | TORCHRUN).world_size == 8  # torchrun inside of a job step


def test_a_launcher_that_says_little() -> None:
    assert detect_topology(env={"RANK": "0", "WORLD_SIZE": "2"}) == Topology(2, 0, 0, 2, 2)


def test_a_rank_is_told_before_it_is_understood() -> None:
    assert [told_rank(env) for env in ({}, SRUN, SRUN | TORCHRUN, {"RANK": "two"})] == ["0", "3", "5", "two"]


@pytest.mark.parametrize("value", ["", "two", "1.5"])
def test_a_variable_that_is_no_number_is_named(value: str) -> None:
    with pytest.raises(EnvironmentFault, match=f"WORLD_SIZE='{value}' must be an integer"):
        detect_topology(env=TORCHRUN | {"WORLD_SIZE": value})


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    with pytest.raises(EnvironmentFault, match=f"rank {rank} does not exist in a world of 4"):
        Topology(4, rank)


@pytest.mark.parametrize("group_size", [3, 16, -2])
def test_a_group_size_has_to_divide_the_world(group_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"group_size={group_size} does not divide world size 8; .*\[1, 2, 4, 8\]"):
        detect_topology(group_size, TORCHRUN)


def test_groups_are_neighbours_and_share_out_the_world() -> None:
    worlds = [Topology(6, rank, group_size=2) for rank in range(6)]
    assert [(t.group, t.group_rank) for t in worlds] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert [worlds[0].group_ranks(group) for group in range(worlds[0].num_groups)] == [[0, 1], [2, 3], [4, 5]]


def test_export_gives_deepspeed_what_it_reads() -> None:
    env: dict[str, str] = {}
    export_topology(Topology(), env)
    assert env == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    several = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
    export_topology(detect_topology(env=SRUN), several)
    assert (several["RANK"], several["WORLD_SIZE"], several["MASTER_ADDR"]) == ("3", "4", "node-1")


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_several_ranks_need_a_meeting_point(missing: str) -> None:
    env = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
    del env[missing]
    with pytest.raises(EnvironmentFault, match=f"{missing} is not set for a world of 4"):
        export_topology(Topology(4, 0), env)


def test_a_job_keeps_its_name_when_it_is_started_again() -> None:
    assert launcher_job({}) is None
    assert launcher_job({"TORCHELASTIC_RUN_ID": "none"}) is None
    assert launcher_job({"TORCHELASTIC_RUN_ID": "fold-1", "TORCHELASTIC_RESTART_COUNT": "1"}) == "fold-1"
    assert launcher_job({"SLURM_JOB_ID": "17", "SLURM_RESTART_COUNT": "2"}) == "17"
