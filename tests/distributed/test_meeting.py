"""Ranks meet, tell each other what they have, and find out which of them is lost: real processes, a real store."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gigamil.errors import ConfigError, EnvironmentFault, GigamilError, Interrupted
from gigamil.parallel import meeting
from gigamil.train.launch import free_port

PATIENCE_S, BEAT_S = 3.0, 0.25


@contextmanager
def _started(function: Callable[..., None], num_ranks: int, *args: Any, missing: int = 0) -> Iterator[Any]:
    """Processes and pipes of ranks that call `function(rank, num_ranks, pipe, *args)`; killed at the end."""
    context = multiprocessing.get_context("spawn")
    port, processes, pipes = free_port(), [], []
    for rank in range(num_ranks - missing):
        here, there = context.Pipe()
        process = context.Process(target=_run, args=(function, rank, num_ranks, port, there, args), daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    try:
        yield processes, pipes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _run(
    function: Callable[..., None], rank: int, num_ranks: int, port: int, pipe: Connection, args: tuple[Any, ...]
) -> None:
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"})
    socket.gethostname = lambda: f"host{rank // 2}"
    function(rank, num_ranks, pipe, *args)


def _meet(rank: int, num_ranks: int, timeout_s: float = 30.0) -> Any:
    from gigamil.parallel.meeting import meet
    from gigamil.parallel.topology import Topology

    return meet(Topology(num_ranks, rank, rank % 2, 2, num_ranks), timeout_s)


def _received(pipe: Connection, within_s: float = 60.0) -> Any:
    assert pipe.poll(within_s), "nothing was said in time"
    return pipe.recv()


def _exchanging(rank: int, num_ranks: int, pipe: Connection) -> None:
    meeting = _meet(rank, num_ranks)
    meeting.watch(lambda *_: None, beat_s=BEAT_S)
    first = meeting.exchange("squares", rank * rank)
    second = meeting.exchange("names", {"of": rank})
    meeting.leave()
    pipe.send((meeting.hosts, meeting.host, first, second))


def test_every_rank_hears_what_each_says() -> None:
    with _started(_exchanging, 3) as (_, pipes):
        hosts = ("host0", "host0", "host1")
        for rank, pipe in enumerate(pipes):
            assert _received(pipe) == (hosts, hosts[rank], [0, 1, 4], [{"of": 0}, {"of": 1}, {"of": 2}])


def _refused(pipe: Connection, work: Callable[[], Any]) -> None:
    try:
        work()
    except GigamilError as error:
        pipe.send((type(error).__name__, str(error), error.exit_code, error.is_agreed))


def _waiting(rank: int, num_ranks: int, pipe: Connection) -> None:
    _refused(pipe, lambda: _meet(rank, num_ranks, 2.0))


def test_a_rank_that_does_not_come_is_named_to_all_that_came() -> None:
    with _started(_waiting, 3, missing=1) as (_, pipes):
        told = [_received(pipe) for pipe in pipes]
    assert told[0] == told[1]
    name, message, code, is_agreed = told[0]
    assert (name, code, is_agreed) == ("EnvironmentFault", 4, True)
    assert "2 of 3 ranks came within 2 s (hosts 'host0'), without rank 2. Was the job started on every" in message


def test_a_port_in_use_is_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(EnvironmentFault, match=r"could not listen for the others at 127.0.0.1:\d+.*MASTER_PORT"):
            _meet(0, 2, 2.0)


def test_a_port_at_which_another_program_listens_is_no_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gigamil.parallel.meeting._ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # takes connections, and says nothing
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(EnvironmentFault, match=r"could not reach the others.*not rank 0's store.*MASTER_PORT"):
            _meet(1, 2, 60.0)


def _twice(rank: int, num_ranks: int, pipe: Connection) -> None:
    def meet_twice() -> None:
        _meet(rank, num_ranks)
        _meet(1, num_ranks)

    if rank:
        _refused(pipe, meet_twice)
    else:
        _meet(rank, num_ranks).exchange("end", None)


def test_two_jobs_at_one_port_are_refused() -> None:
    with _started(_twice, 2) as (_, pipes):
        name, message, code, _ = _received(pipes[1])
    assert (name, code) == ("EnvironmentFault", 4)
    assert "rank 1 on host 'host0' met another rank 1 at 127.0.0.1:" in message
    assert "Choose another MASTER_PORT for one of them" in message


def test_a_signal_ends_the_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from gigamil.parallel.meeting import meet
    from gigamil.parallel.topology import Topology

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    with pytest.raises(Interrupted, match="the same command continues"):
        meet(Topology(2, 0, 0, 1, 2), 60.0, lambda: True)


def test_a_rank_waits_for_the_answer_from_when_rank_0_has_come() -> None:
    store, longest_s = dist.HashStore(), 1.0

    def rank_0() -> None:
        time.sleep(0.7 * longest_s)
        store.set("key/0", "null")
        time.sleep(0.7 * longest_s)  # rank 0 waits for others, as long as this one may
        store.set("key/all", '{"values": [null, null]}')

    thread = threading.Thread(target=rank_0)
    thread.start()
    assert meeting._await(store, "key", longest_s, lambda: False) == {"values": [None, None]}
    thread.join()
    with pytest.raises(EnvironmentFault, match=r"rank 0 said nothing within 0\.2 s"):
        meeting._await(store, "other", 0.2, lambda: False)


def _meeting_again(rank: int, num_ranks: int, pipe: Connection, port: int, late_s: float) -> None:
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if rank == 0:
        time.sleep(late_s)  # the others find the name of the start before
    meeting = _meet(rank, num_ranks)
    meeting.watch(lambda *what: pipe.send(what), beat_s=BEAT_S)
    pipe.send(meeting.exchange("processes", os.getpid()))
    meeting.leave()


def test_torchruns_store_serves_every_start() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for late_s, num_ranks in ((0.0, 2), (1.0, 2), (0.5, 3)):
        with _started(_meeting_again, num_ranks, store.port, late_s) as (processes, pipes):
            pids = [process.pid for process in processes]
            assert [_received(pipe) for pipe in pipes] == [pids] * num_ranks


def _comparing(rank: int, num_ranks: int, pipe: Connection, facts: list[dict[str, str]]) -> None:
    from gigamil.train.handshake import refuse_unlike_ranks

    meeting = _meet(rank, num_ranks)
    _refused(pipe, lambda: refuse_unlike_ranks(meeting, facts[rank]))
    pipe.send("done")
    meeting.exchange("end", None)


@pytest.mark.parametrize(
    ("other", "kind", "words"),
    [
        (
            {"version of torch": "2.13.0"},
            "EnvironmentFault",
            "version of torch is 2.15.0 on host 'host0' (rank 0) and 2.13.0 on host 'host1' (rank 2)",
        ),
        (
            {"science.seed": "1"},
            "ConfigError",
            "science.seed is 0 on host 'host0' (rank 0) and 1 on host 'host1' (rank 2)",
        ),
    ],
)
def test_ranks_that_are_not_alike_are_refused_within_five_seconds(other: dict[str, str], kind: str, words: str) -> None:
    same = {"version of torch": "2.15.0", "science.seed": "0"}
    with _started(_comparing, 4, [same, same, same | other, same]) as (_, pipes):
        start = time.monotonic()
        told = [_received(pipe) for pipe in pipes]
        assert time.monotonic() - start < 30  # of which the start of the processes is nearly all
    assert len(set(told)) == 1
    assert told[0][0] == kind
    assert words in told[0][1]


def _failing(rank: int, num_ranks: int, pipe: Connection) -> None:
    from gigamil.train.handshake import told_to_all

    def work() -> None:
        with told_to_all(meeting):
            if rank == 1:
                raise ConfigError("no such key")

    meeting = _meet(rank, num_ranks)
    _refused(pipe, work)
    meeting.exchange("end", None)


def test_what_one_rank_meets_alone_is_told_to_all() -> None:
    with _started(_failing, 3) as (_, pipes):
        told = [_received(pipe) for pipe in pipes]
    assert set(told) == {("EnvironmentFault", "rank 1 on host 'host0': no such key", 2, True)}


def _telling(rank: int, num_ranks: int, pipe: Connection) -> None:
    from gigamil.parallel.topology import Topology
    from gigamil.train.handshake import told_to_all
    from gigamil.train.worker import _tell_others

    if rank == 0:
        try:
            _tell_others(Topology(num_ranks, 0, 0, 2, num_ranks), ConfigError("no such key"))
        finally:
            os._exit(2)  # at once, with the store

    def find_nothing_wrong() -> None:
        with told_to_all(meeting):
            time.sleep(1.0)  # rank 0 looks seldom by now, and so do the others when it has seen them

    meeting = _meet(rank, num_ranks)
    _refused(pipe, find_nothing_wrong)


@pytest.mark.slow
def test_rank_0_leaves_when_the_others_have_heard_what_is_wrong() -> None:
    with _started(_telling, 3) as (_, pipes):
        told = [_received(pipe) for pipe in pipes[1:]]
    assert set(told) == {("EnvironmentFault", "rank 0 on host 'host0': no such key", 2, True)}


def _looking(rank: int, num_ranks: int, pipe: Connection, folders: list[Path], digests: list[str]) -> None:
    from gigamil.train.handshake import refuse_own_folders, refuse_unlike_data

    meeting = _meet(rank, num_ranks)
    _refused(pipe, lambda: refuse_own_folders(meeting, folders[rank]))
    _refused(pipe, lambda: refuse_unlike_data(meeting, digests[rank]))
    pipe.send("done")
    meeting.exchange("end", None)


def test_a_folder_that_is_not_shared_and_other_data_are_named(tmp_path: Path) -> None:
    folders = [tmp_path / "node0", tmp_path / "node0", tmp_path / "node1"]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    with _started(_looking, 3, folders, ["aaa", "aaa", "bbb"]) as (_, pipes):
        told = [(_received(pipe), _received(pipe), _received(pipe)) for pipe in pipes]
    folder, data, end = told[0]
    # Each rank names its own path, which is the same one where the folder is mounted alike.
    assert all(
        "is not shared: rank 0 on host 'host0' wrote a file there that host 'host1' did" in t[0][1] for t in told
    )
    assert folder[2] == 4
    assert "splits and shards is aaa on host 'host0' (rank 0) and bbb on host 'host1' (rank 2)" in data[1]
    assert (data[2], end) == (3, "done")
    assert not list(tmp_path.rglob(".shared-*"))


def _watching(rank: int, num_ranks: int, pipe: Connection, leaving: str | None = None) -> None:
    meeting = _meet(rank, num_ranks)
    meeting.watch(lambda *what: pipe.send(what), patience_s=PATIENCE_S, beat_s=BEAT_S)
    meeting.exchange("all are here", None)
    pipe.send(os.getpid())
    if rank == 1 and leaving is not None:
        meeting.leave(leaving)
        return
    pipe.recv()  # until the test ends this process
    meeting.leave()
    pipe.send("left")


def _told_of(processes: list[BaseProcess], pipes: list[Connection], lost: int, by: signal.Signals) -> set[Any]:
    for pipe in pipes:
        _received(pipe)
    os.kill(processes[lost].pid or 0, by)
    return {_received(pipe, PATIENCE_S + 8) for rank, pipe in enumerate(pipes) if rank != lost}


@pytest.mark.parametrize(("lost", "is_first"), [(1, False), pytest.param(0, True, marks=pytest.mark.slow)])
def test_a_killed_rank_is_named(lost: int, is_first: bool) -> None:
    with _started(_watching, 3) as (processes, pipes):
        told = _told_of(processes, pipes, lost, signal.SIGKILL)
    assert told == {(f"rank {lost} on host 'host0' is gone (killed, or out of memory?)", is_first)}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [1, 2])
def test_a_frozen_rank_is_named_and_ended_by_those_of_its_machine(lost: int) -> None:
    with _started(_watching, 3) as (processes, pipes):
        told = _told_of(processes, pipes, lost, signal.SIGSTOP)
        processes[lost].join(1.0)
        assert processes[lost].is_alive() == (lost == 2)  # alone on its machine
    (what,) = told
    assert f"rank {lost} on host 'host{lost // 2}' has said nothing for 3 s (frozen" in what[0]
    assert not what[1]


@pytest.mark.slow
def test_a_rank_that_leaves_with_an_error_is_quoted() -> None:
    with _started(_watching, 3, "ValueError: a tile of no size") as (_, pipes):
        told = [_received(pipe) for pipe in pipes] and [_received(pipes[rank], PATIENCE_S + 8) for rank in (0, 2)]
    assert set(told) == {("rank 1 on host 'host0' ended: ValueError: a tile of no size", False)}


def _ending(rank: int, num_ranks: int, pipe: Connection) -> None:
    meeting = _meet(rank, num_ranks)
    meeting.watch(lambda *what: pipe.send(what), patience_s=PATIENCE_S, beat_s=BEAT_S)
    meeting.exchange("all are here", None)
    meeting.settle()
    if rank == 0:
        time.sleep(PATIENCE_S + 5)  # MLflow is slow
    meeting.leave("stopped by a signal")
    pipe.send("left")


@pytest.mark.slow
def test_what_all_end_with_may_take_one_of_them_longer() -> None:
    with _started(_ending, 3) as (_, pipes):
        assert [_received(pipe) for pipe in pipes] == ["left"] * 3


@pytest.mark.slow
def test_rank_0_may_be_done_before_the_others_are() -> None:
    with _started(_watching, 3) as (_, pipes):
        for pipe in pipes:
            _received(pipe)
        for rank in range(3):
            pipes[rank].send("go")
            assert _received(pipes[rank]) == "left"
            time.sleep(5.0)  # longer than rank 0 keeps the store for


@pytest.mark.slow
def test_ranks_that_are_done_and_a_pause_of_all_are_no_loss() -> None:
    with _started(_watching, 3) as (processes, pipes):
        for pipe in pipes:
            _received(pipe)
        for word in (signal.SIGSTOP, signal.SIGCONT):
            for process in processes:
                os.kill(process.pid or 0, word)
            time.sleep(6.0)  # longer than the patience
        for rank in (2, 1, 0):
            pipes[rank].send("go")
            assert _received(pipes[rank]) == "left"
            time.sleep(1.0)
