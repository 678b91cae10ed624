"""How ranks meet, tell each other what they have, and notice that one is lost: through a store, without collectives.

A collective hangs when a rank is missing, and says nothing of which one. Here every rank says once a second that it is
well; rank 0 looks at all of them, the others at rank 0. So P ranks cost P small messages a second, whatever they compute.
"""

import json
import logging
import math
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch.distributed as dist

from gigamil.errors import EnvironmentFault, GigamilError, Interrupted
from gigamil.parallel.topology import MeetingPoint, Topology, meeting_point

_log = logging.getLogger("gigamil")
BEAT_S = 1.0
# DeepSpeed's launcher kills what is left of a machine 30 s after a rank of it has ended: all have to be gone by then.
PATIENCE_S = 17.0
_HURT_PATIENCE_S = 5.0  # where a collective has failed already, somebody is lost, and it is only asked who
_ARRIVAL = "0/arrival"
_GRACE_S = 3.0  # in which others read what rank 0 has found, before the store goes with it
_ANSWER_S = 15.0  # a store that listens answers at once; another program, to which one can connect, never
_OWN_GAP_S = 5.0  # this process itself did not run for so long: what it knows of the others is old


@dataclass(frozen=True)
class Member:
    """A rank as the others know it.

    Attributes:
        host: name of its machine.
        pid, started: its process, and when that began (seconds since 1970), as numbers are given again.
    """

    host: str
    pid: int
    started: float


class Meeting:
    """All ranks of a run, once they have come.

    Args:
        topology: of this rank.
        store: that all share.
        members: by rank.
        place: where the store is; None in one process.
        timeout_s: longest wait for what another rank says.
        is_asked: whether a signal asked to stop.
    Attributes:
        store: for the process groups, too.
        hosts: name of each rank's machine, by rank.
    """

    def __init__(
        self,
        topology: Topology,
        store: dist.Store,
        members: Sequence[Member],
        place: MeetingPoint | None,
        timeout_s: float,
        is_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.store = store
        self.hosts = tuple(member.host for member in members)
        self._topology = topology
        self._members = tuple(members)
        self._place = place
        self._timeout_s = timeout_s
        self._is_asked = is_asked
        self._pulse: Pulse | None = None
        self._num_exchanges = 0

    @property
    def host(self) -> str:
        """Name of this rank's machine."""
        return self.hosts[self._topology.rank]

    @property
    def is_first(self) -> bool:
        """This is rank 0."""
        return self._topology.rank == 0

    def name(self, rank: int) -> str:
        """A rank in words: "rank 2 on host 'node-1'"."""
        return f"rank {rank} on host '{self.hosts[rank]}'"

    def exchange(self, name: str, value: Any) -> list[Any]:
        """What each rank says, by rank, equal on all. A rank that comes late is waited for.

        Args:
            name: of what is exchanged, for the message.
            value: of this rank; anything that JSON can hold.
        Raises:
            EnvironmentFault: a rank did not say anything in time; names it and its host, on all that did.
            Interrupted: a signal asked this rank to stop.
        Cost: one message from each rank, and one of P values to each.
        """
        self._num_exchanges += 1
        key = f"{self._num_exchanges}/{name}"
        return _exchange(self.store, self._topology, key, value, self._timeout_s, self._missing, self._is_asked)

    def watch(
        self, on_lost: Callable[[str, bool], None], *, patience_s: float = PATIENCE_S, beat_s: float = BEAT_S
    ) -> None:
        """From now on until `leave`: say each second that this rank is well, and call `on_lost` if another is not.

        Args:
            on_lost: is told which rank on which host and what is known, and whether that is rank 0, which then cannot
                tell it; called once, in a thread of its own.
            patience_s: a rank that says nothing for so long is lost.
            beat_s: between two words.
        """
        if self._place is None:
            return
        # A connection of its own: a wait in the other one would be a silence in this one.
        store = _connect(self._place, self._topology, self._timeout_s, is_server=False)
        self._pulse = Pulse(self._topology, self._members, store, on_lost, patience_s, beat_s)
        self._pulse.start()

    def settle(self) -> None:
        """All ranks have agreed to end: from now on nobody who leaves is lost, however long another one still takes."""
        if self._pulse is not None:
            self._pulse.settle()

    def await_verdict(self) -> None:
        """Give the watch time to find out who is lost, after a collective has failed. Returns if nobody is."""
        if self._pulse is not None:
            self._pulse.await_verdict()

    def leave(self, reason: str | None = None) -> None:
        """Say that this rank goes, so that nobody takes it for lost; rank 0 waits a moment for the others.

        Args:
            reason: error that it goes with; None if its work is done.
        """
        if self._pulse is not None:
            self._pulse.leave(reason)

    def _missing(self, ranks: Sequence[int]) -> str:
        return ", ".join(map(self.name, ranks[:8]))


def meet(topology: Topology, timeout_s: float, is_asked: Callable[[], bool] = lambda: False) -> Meeting:
    """Wait until every rank has come; rank variables are exported (`export_topology`).

    Args:
        timeout_s: longest wait for the last rank.
        is_asked: whether a signal asked to stop.
    Raises:
        EnvironmentFault: the port is taken, nobody listens there, or ranks did not come; says how many, and from where.
        Interrupted: a signal asked this rank to stop.
    """
    own = Member(socket.gethostname(), os.getpid(), psutil.Process().create_time())
    if topology.world_size == 1:
        return Meeting(topology, dist.HashStore(), [own], None, timeout_s)
    place = meeting_point()
    is_server = topology.rank == 0 and not place.is_kept_by_launcher
    store = _connect(place, topology, timeout_s, is_server=is_server)
    if place.is_kept_by_launcher:
        round_name = _find_round(store, topology, own, timeout_s, is_asked)
        place, store = replace(place, name=f"{place.name}/{round_name}"), dist.PrefixStore(round_name, store)
    elif store.add(f"arrived/{topology.rank}", 1) > 1:
        raise EnvironmentFault(
            f"rank {topology.rank} on host '{own.host}' met another rank {topology.rank} at {place.address}:{place.port}. Do two "
            "jobs use this port? Choose another MASTER_PORT for one of them."
        )
    store.set(f"pulse/{topology.rank}", "0")  # of everyone there is a word when the first begins to look
    told = _exchange(store, topology, _ARRIVAL, vars(own), timeout_s, _by_number, is_asked)
    return Meeting(topology, store, [Member(**facts) for facts in told], place, timeout_s, is_asked)


def _find_round(
    store: dist.Store, topology: Topology, own: Member, timeout_s: float, is_asked: Callable[[], bool]
) -> str:
    """Name of this start of the ranks, in a store that stays when torchrun starts them again.

    torchrun tells no number of it that all machines share (it does not count restarts because of machines that come or go).
    So rank 0 names it; another rank may find the name of the start before, and waits until it reads of itself.
    """
    if topology.rank == 0:
        round_name = uuid.uuid4().hex
        store.set("round", round_name)
        return round_name
    seen, deadline = "", time.monotonic() + timeout_s + _GRACE_S
    with _lost_with_rank_0():
        while time.monotonic() < deadline:
            _refuse_if_asked(is_asked)
            round_name = store.get("round").decode() if store.check(["round"]) else ""
            inside = dist.PrefixStore(round_name, store)
            if round_name != seen:
                inside.set(f"{_ARRIVAL}/{topology.rank}", json.dumps(vars(own)))
                seen = round_name
            if round_name and inside.check([f"{_ARRIVAL}/all"]):
                come = json.loads(inside.get(f"{_ARRIVAL}/all"))["values"]
                if come[topology.rank : topology.rank + 1] == [vars(own)]:  # there may have been fewer
                    return round_name
            time.sleep(0.1)
    raise EnvironmentFault(
        f"rank 0 did not come within {timeout_s:g} s, or not all ranks did: this is rank {topology.rank} of "
        f"{topology.world_size} on host '{own.host}'. Was the job started on every machine, with the same number of ranks?"
    )


def _refuse_if_asked(is_asked: Callable[[], bool]) -> None:
    if is_asked():
        raise Interrupted("interrupted while waiting for the other ranks; the same command continues")


def _connect(place: MeetingPoint, topology: Topology, timeout_s: float, *, is_server: bool) -> dist.Store:
    try:
        store = _open_store(place, timeout_s, is_server=is_server)
    except (RuntimeError, ValueError, OSError) as error:  # torch's own network errors are RuntimeErrors
        here = f"rank {topology.rank} of {topology.world_size} on host '{socket.gethostname()}'"
        where = f"{place.address}:{place.port}"
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        cure = (
            "Is the port in use? Choose another MASTER_PORT; MASTER_ADDR must be this host, where rank 0 is."
            if is_server
            else "Was rank 0 started, is MASTER_ADDR its host, and can this host reach it (`gigamil doctor --dist`)? If "
            "another program uses the port, choose another MASTER_PORT."
        )
        raise EnvironmentFault(
            f"{here} could not {'listen for' if is_server else 'reach'} the others at {where}: {words}. {cure}"
        ) from error
    return dist.PrefixStore(place.name, store)


def _open_store(place: MeetingPoint, timeout_s: float, *, is_server: bool) -> dist.Store:
    """The store, once it listens and answers.

    In torch the constructor waits for ever for the answer of whatever listens there; so it does that in a thread.

    Raises:
        TimeoutError: what listens there does not answer.
    """
    opened: Future[dist.Store] = Future()

    def open_it() -> None:
        try:
            timeout = timedelta(seconds=timeout_s)
            store = dist.TCPStore(place.address, place.port, None, is_server, timeout, wait_for_workers=False)
            opened.set_result(store)
        except Exception as error:  # noqa: BLE001 - raised by who waits for it
            opened.set_exception(error)

    threading.Thread(target=open_it, name="gigamil-meet", daemon=True).start()
    listens_since = math.inf
    while not wait([opened], timeout=1.0).done:
        if listens_since == math.inf and _listens(place):
            listens_since = time.monotonic()
        if time.monotonic() - listens_since > _ANSWER_S:
            raise TimeoutError(
                f"what listens there has not answered within {_ANSWER_S:g} s, so it is not rank 0's store"
            )
    return opened.result()


def _listens(place: MeetingPoint) -> bool:
    try:
        with socket.create_connection((place.address, place.port), timeout=1.0):
            return True
    except OSError:
        return False


def _exchange(
    store: dist.Store,
    topology: Topology,
    key: str,
    value: Any,
    timeout_s: float,
    describe: Callable[[Sequence[int]], str],
    is_asked: Callable[[], bool],
) -> list[Any]:
    store.set(f"{key}/{topology.rank}", json.dumps(value))
    come: list[int] = []
    if topology.rank == 0:
        come = _gather(store, topology.world_size, key, timeout_s, describe, is_asked)
    told = _await(store, key, timeout_s + _GRACE_S, is_asked)
    if "fault" in told:
        # The store goes with rank 0, so the others read first; but rank 0 has the word, and some launchers end it as soon
        # as another rank has ended.
        if topology.rank == 0:
            _await_readers(store, key, come)
        else:
            store.set(f"{key}/read/{topology.rank}", "")
            time.sleep(_GRACE_S / 2)
        fault = EnvironmentFault(told["fault"])
        fault.is_agreed = True
        raise fault
    values: list[Any] = told["values"]
    return values


def _gather(
    store: dist.Store,
    num_ranks: int,
    key: str,
    timeout_s: float,
    describe: Callable[[Sequence[int]], str],
    is_asked: Callable[[], bool],
) -> list[int]:
    """Rank 0 collects what all say and puts it where all look, or puts there who is missing; returns who has come."""
    missing, start, told_at, pause = list(range(num_ranks)), time.monotonic(), 10.0, 0.01
    while missing := [rank for rank in missing if not store.check([f"{key}/{rank}"])]:
        _refuse_if_asked(is_asked)
        waited = time.monotonic() - start
        if waited > timeout_s:
            come = [rank for rank in range(num_ranks) if rank not in missing]
            hosts = sorted({host for host in (_host_of(store, key, rank) for rank in come) if host is not None})
            from_hosts = f" (hosts {', '.join(map(repr, hosts[:8]))})" if hosts else ""
            fault = (
                f"{len(come)} of {num_ranks} ranks came within {timeout_s:g} s{from_hosts}, without {describe(missing)}. Was the "
                "job started on every machine, with the same MASTER_ADDR, MASTER_PORT and number of ranks?"
            )
            values = [json.loads(store.get(f"{key}/{rank}")) if rank in come else None for rank in range(num_ranks)]
            store.set(f"{key}/all", json.dumps({"fault": fault, "values": values}))
            return come
        if waited > told_at:
            _log.warning("waiting for %s", describe(missing))
            told_at *= 2
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
    values = [json.loads(text) for text in store.multi_get([f"{key}/{rank}" for rank in range(num_ranks)])]
    store.set(f"{key}/all", json.dumps({"values": values}))
    return list(range(num_ranks))


def _await_readers(store: dist.Store, key: str, come: Sequence[int]) -> None:
    """Rank 0 lets the others read a fault, for a moment: one that was lost meanwhile never does."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and not store.check([f"{key}/read/{rank}" for rank in come if rank]):
        time.sleep(0.05)


def _host_of(store: dist.Store, key: str, rank: int) -> str | None:
    said = json.loads(store.get(f"{key}/{rank}"))
    return said.get("host") if isinstance(said, dict) else None


def _await(store: dist.Store, key: str, longest_s: float, is_asked: Callable[[], bool]) -> dict[str, Any]:
    """Look until it is there. Not `store.wait`: no signal would be noticed in it."""
    deadline, pause, has_begun = time.monotonic() + longest_s, 0.01, False
    with _lost_with_rank_0():
        while not store.check([f"{key}/all"]):
            _refuse_if_asked(is_asked)
            if not has_begun and store.check([f"{key}/0"]):  # from now on rank 0 waits for all, as long as this one may
                deadline, has_begun = time.monotonic() + longest_s, True
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank 0 said nothing within {longest_s:g} s")
            time.sleep(pause)
            pause = min(2 * pause, 0.25)
        told: dict[str, Any] = json.loads(store.get(f"{key}/all"))
    return told


@contextmanager
def _lost_with_rank_0() -> Iterator[None]:
    """The store is gone with rank 0, or with the launcher."""
    try:
        yield
    except GigamilError:
        raise
    except (RuntimeError, OSError) as error:
        raise EnvironmentFault(
            f"rank 0 was lost while this rank waited for it: {error}. Its own message says why."
        ) from error


def _by_number(ranks: Sequence[int]) -> str:
    more = ", ..." if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


class Pulse:
    """Two threads of a rank: one talks to the store, and may hang in it for ever; one looks at the clock.

    What a rank says is a number that grows, or its last word: that it is done, that it left with an error, or, said by
    a neighbour on its machine, that its process is gone.
    """

    def __init__(
        self,
        topology: Topology,
        members: Sequence[Member],
        store: dist.Store,
        on_lost: Callable[[str, bool], None],
        patience_s: float,
        beat_s: float,
    ) -> None:
        self._rank = topology.rank
        self._members = members
        self._store = store
        self._on_lost = on_lost
        self._patience_s, self._beat_s = patience_s, beat_s
        self._neighbours = _neighbours(members, topology.rank)
        self._wake, self._said, self._decided = threading.Event(), threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._beat, name="gigamil-pulse", daemon=True),
            threading.Thread(target=self._watch, name="gigamil-watch", daemon=True),
        ]
        self._last_word: str | None = None
        self._is_leaving = self._is_hurt = False
        self._verdict: str | None = None
        self._is_first_lost = False
        self._answered = time.monotonic()  # when the store last answered; -inf: it is gone
        self._heard = [(b"", time.monotonic()) for _ in members]  # last word of each, and when it changed

    def start(self) -> None:
        """Begin; `meet` has said a first word for each rank."""
        for thread in self._threads:
            thread.start()

    def leave(self, reason: str | None) -> None:
        """Say the last word; at most a moment, also where the network is cut."""
        self._last_word = "done" if reason is None else f"left: {reason}"
        self._is_leaving = True
        self._wake.set()
        self._said.wait(_GRACE_S)
        self._decided.set()
        # A thread that lets go of the store while the interpreter ends is aborted in C++, and the process with it.
        for thread in self._threads:
            thread.join(_GRACE_S)

    def settle(self) -> None:
        """Verdicts are passed over from now on; this rank still says that it is well."""
        self._is_leaving = True

    def await_verdict(self) -> None:
        """A collective has failed here: wait until it is known who is lost; at most the patience."""
        self._is_hurt = True
        self._decided.wait(self._patience_s + 2 * self._beat_s + _GRACE_S)

    def _beat(self) -> None:
        number = 0
        while True:
            number += 1
            try:
                word = self._last_word
                self._store.set(f"pulse/{self._rank}", word or f"{number}{' hurt' * self._is_hurt}")
                if word is not None:
                    self._see_off()
                    self._said.set()
                    return
                self._report_gone()
                self._verdict = self._verdict or (self._judge() if self._rank == 0 else self._look())
                if self._answered != -math.inf:
                    self._answered = time.monotonic()
            except (RuntimeError, OSError):  # the connection is closed: the store is gone
                if self._heard[0][0] == b"done":  # rank 0 has taken it along at the end
                    self._is_leaving = True
                self._answered = -math.inf
                self._said.set()
                return
            self._wake.wait(self._beat_s)

    def _see_off(self) -> None:
        """Rank 0 takes the store with it: it lets the others say their last words, for a moment."""
        deadline = time.monotonic() + _GRACE_S - 0.5
        while self._rank == 0 and time.monotonic() < deadline:
            words = self._words()
            if all(_is_last(word) for word in words):
                return
            lost = [rank for rank, word in enumerate(words) if word.startswith((b"left", b"gone"))]
            if lost:  # the others may be in a collective with it
                self._store.set("verdict", self._describe(lost, words))
            time.sleep(0.1)

    def _report_gone(self) -> None:
        for rank, process in list(self._neighbours.items()):
            if _runs(process):
                continue
            del self._neighbours[rank]
            if not _is_last(self._store.get(f"pulse/{rank}")):
                self._store.set(f"pulse/{rank}", "gone")

    def _words(self) -> list[bytes]:
        words: list[bytes] = self._store.multi_get([f"pulse/{rank}" for rank in range(len(self._members))])
        return words

    def _judge(self) -> str | None:
        """Rank 0: who is lost. All that are silent at once, as a machine with several ranks would be."""
        words, now = self._words(), time.monotonic()
        for rank, word in enumerate(words):
            if word != self._heard[rank][0]:
                self._heard[rank] = (word, now)
        silent_s = [now - since for _, since in self._heard]
        patience_s = self._patience(any(word.endswith(b" hurt") for word in words))
        if not any(_is_lost(word, silence, patience_s) for word, silence in zip(words, silent_s, strict=True)):
            return None
        almost = patience_s - 2 * self._beat_s
        lost = [
            rank
            for rank, (word, silence) in enumerate(zip(words, silent_s, strict=True))
            if _is_lost(word, silence, patience_s) or (silence > almost and not _is_last(word))
        ]
        verdict = self._describe(lost, words)
        self._store.set("verdict", verdict)
        return verdict

    def _patience(self, is_hurt: bool) -> float:
        return min(self._patience_s, _HURT_PATIENCE_S) if is_hurt else self._patience_s

    def _look(self) -> str | None:
        """The others: what rank 0 has found, and whether it is well itself."""
        if self._store.check(["verdict"]):
            return self._store.get("verdict").decode()
        word, now = self._store.get("pulse/0"), time.monotonic()
        if word != self._heard[0][0]:
            self._heard[0] = (word, now)
        # Where the launcher keeps the store, rank 0 can go and leave it.
        silence = now - self._heard[0][1]
        late = _is_lost(word, silence, self._patience(self._is_hurt) + self._beat_s)
        self._is_first_lost = late
        return self._describe([0], [word]) if late else None

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._decided.wait(min(0.5, self._beat_s / 2)):
            now = time.monotonic()
            if now - before > _OWN_GAP_S:
                self._forget(now)
            before = now
            if self._is_leaving:
                continue
            if self._verdict is None and now - self._answered > self._patience(self._is_hurt):
                self._verdict, self._is_first_lost = self._no_answer(), True
            if self._verdict is not None:
                if self._rank == 0:
                    time.sleep(min(_GRACE_S, 2.5 * self._beat_s))  # the others read it before the store goes
                if self._is_leaving:
                    continue
                self._end_frozen()
                self._on_lost(self._verdict, self._is_first_lost)
                self._decided.set()

    def _forget(self, now: float) -> None:
        """This process was stopped for a while, perhaps with all the others: everyone gets a new start."""
        self._heard = [(word, now) for word, _ in self._heard]
        if self._answered != -math.inf:
            self._answered = now

    def _no_answer(self) -> str:
        if self._answered == -math.inf:
            return self._describe([0], [b"gone"])
        return (
            f"host '{self._members[self._rank].host}' has had no answer from host '{self._members[0].host}' (rank 0) for "
            f"{self._patience(self._is_hurt):g} s: the network between them is cut, or that host is down"
        )

    def _describe(self, lost: Sequence[int], words: Sequence[bytes]) -> str:
        found = []
        for rank in lost[:8]:
            word, host = words[rank], self._members[rank].host
            if word.startswith(b"left: "):
                found.append(f"rank {rank} on host '{host}' ended: {word.removeprefix(b'left: ').decode()}")
            elif word == b"gone":
                found.append(f"rank {rank} on host '{host}' is gone (killed, or out of memory?)")
            else:
                silent_s = time.monotonic() - self._heard[rank][1]
                cause = "frozen, or its host or network is down"
                found.append(f"rank {rank} on host '{host}' has said nothing for {silent_s:.0f} s ({cause})")
        more = f", and {len(lost) - 8} more" if len(lost) > 8 else ""
        return "; ".join(found) + more

    def _end_frozen(self) -> None:
        """A stopped process of this machine ends now: a launcher would wait for it."""
        for process in self._neighbours.values():
            try:
                if process.is_running() and process.status() == psutil.STATUS_STOPPED:
                    process.kill()
            except psutil.Error:
                continue


def _neighbours(members: Sequence[Member], rank: int) -> dict[int, psutil.Process]:
    """Other ranks of this machine whose processes this one sees (it may be in a container of its own)."""
    found = {}
    for other, member in enumerate(members):
        if other == rank or member.host != members[rank].host:
            continue
        try:
            process = psutil.Process(member.pid)
            if abs(process.create_time() - member.started) < 0.1:
                found[other] = process
        except psutil.Error:
            continue
    return found


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_lost(word: bytes, silent_s: float, patience_s: float) -> bool:
    if word.startswith(b"left"):
        return silent_s > _GRACE_S  # an error that all agreed on takes them all away within a moment
    return word == b"gone" or (silent_s > patience_s and word != b"done")


def _is_last(word: bytes) -> bool:
    return word == b"done" or word.startswith((b"left", b"gone"))


def end_process(code: int) -> NoReturn:
    """End this process with an exit code, without the end of the interpreter: all that matters is done and said.

    A thread that comes back from torch's C++ while the interpreter ends, or an object of torch that is freed then, can abort the
    process, and a rank that had finished would count as failed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads any more
            stream.flush()
    os._exit(code)
