"""`gigamil doctor --dist`: are these ranks fit to train together, and if not, which host is not, and what to type.

Under a launcher (torchrun, deepspeed, srun) each process is a rank; without one, gigamil starts ranks of this machine. All
that is compared is told through the store in which ranks meet, so that a rank whose collectives hang is still heard, and
all ranks come to the same report. Rank 0 prints it.
"""

import argparse
import os
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from gigamil.config.schema import Execution
from gigamil.doctor import Check, DoctorReport
from gigamil.errors import ConfigError, EnvironmentFault, GigamilError
from gigamil.files import appears
from gigamil.parallel.meeting import Meeting, end_process, meet
from gigamil.parallel.speed import AllReduceSpeed, measure_all_reduce
from gigamil.parallel.topology import Topology, detect_topology, export_topology, has_launcher, meeting_point
from gigamil.train.handshake import code_digest
from gigamil.train.launch import has_parent, launch_ranks, report_loss, report_outcome, restore_devices
from gigamil.train.records import versions

MEET_S = 25.0  # longest wait for the last rank, and for what another one says: whoever looks on has an answer in 30 s
COLLECTIVE_S = 20.0
CLOCK_WARN_S = 1.0
_CLOCK_ROUNDS = 3
_MAX_LISTED = 8
MIB = 2**20


@dataclass(frozen=True)
class RankFacts:
    """What a rank finds about itself and its machine.

    Attributes:
        local_rank: number on its machine, as the launcher says.
        gpus: names of those that this process sees.
        versions: of gigamil, Python and the libraries.
        code: digest of gigamil's source files.
        interface, address: of this host towards MASTER_ADDR, by its routes; empty if there is none.
        interfaces: that are up and have an address.
        gloo_interfaces, nccl_interfaces: GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME; empty if not set.
        host_address: what this host's own name means here, where gloo listens if it is not told an interface.
    """

    local_rank: int
    gpus: list[str]
    versions: dict[str, str]
    code: str
    interface: str
    address: str
    interfaces: list[str]
    gloo_interfaces: str
    nccl_interfaces: str
    host_address: str


def run_doctor_dist(out: Path | None = None, num_ranks: int | None = None) -> int:
    """Check the ranks of a launcher's job, if this process is one of them; else start ranks on this machine and check those.

    Args:
        out: folder that runs will be written to; it need not exist. Default: the working directory.
        num_ranks: of this machine, without a launcher; default its GPUs, or 2.
    Returns:
        Exit code of this process.
    Raises:
        ConfigError: a number of ranks under a launcher, which has started them already.
        RanksFailed: the ranks of this machine are not fit, or did not even meet.
    """
    words = [] if out is None else ["--out", str(out.absolute())]
    if has_launcher():
        if num_ranks is not None:
            raise ConfigError(
                "--ranks is for one machine without a launcher; this one has started its ranks: leave it out"
            )
        return main(words)
    execution = Execution(ranks=num_ranks or torch.cuda.device_count() or 2)
    launch_ranks("gigamil.doctor_dist", words, execution, logs=None, continues="from the start")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Check as one rank of several; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m gigamil.doctor_dist", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path.cwd(), metavar="DIR", help="folder of runs")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher; LOCAL_RANK is used
    arguments = parser.parse_args(argv)
    restore_devices()
    topology = detect_topology()
    try:
        with report_outcome(topology.rank):
            report = examine_ranks(topology, arguments.out)
            if report.exit_code and has_parent():
                raise EnvironmentFault("these ranks are not fit to train together: see the report above")
            return report.exit_code
    except GigamilError as error:
        if not has_parent() and (topology.rank == 0 or not error.is_agreed):
            _say(topology, str(error))
        return error.exit_code


def examine_ranks(topology: Topology, out: Path) -> DoctorReport:
    """Meet the other ranks and find out with them whether all can train together. All ranks call it; rank 0 prints.

    Args:
        topology: of this rank.
        out: folder that runs will be written to.
    Returns:
        The report, equal on all ranks.
    Raises:
        EnvironmentFault: no rank 0 to be found, or ranks that did not come; says which.
    Cost: some seconds; at most half a minute for each thing that does not answer. Leaves no file behind.
    """
    export_topology(topology)
    meeting = meet(topology, MEET_S)
    checks: list[Check] = []

    def end(what: str, is_first_lost: bool) -> None:
        message = f"{what}. Last of what was found before: {checks[-1].name if checks else 'all ranks came'}."
        try:
            if not has_parent() and (meeting.is_first or (is_first_lost and topology.local_rank == 0)):
                _say(topology, message)
            report_loss(topology.rank, message)
        finally:
            os._exit(EnvironmentFault.exit_code)  # the main thread may be in a collective that never ends

    meeting.watch(end)
    try:
        checks.extend(_examine(meeting, topology, out))  # one by one: `end` tells how far it came
        report = DoctorReport(tuple(checks), "these ranks can train together")
        if meeting.is_first:
            print(report.text(), flush=True)
        meeting.exchange("printed", None)  # the deepspeed launcher ends all ranks as soon as one says that it failed
    except Exception as error:
        meeting.leave(str(error) if isinstance(error, GigamilError) else f"{type(error).__name__}: {error}")
        raise
    meeting.leave()
    return report


def _examine(meeting: Meeting, topology: Topology, out: Path) -> Iterator[Check]:
    place = meeting_point() if topology.world_size > 1 else None
    master = "127.0.0.1" if place is None else place.address
    told = meeting.exchange("facts", asdict(find_facts(topology, master)))
    facts = [RankFacts(**values) for values in told]
    yield check_ranks(meeting.hosts)
    yield from check_hosts(meeting.hosts, facts)
    where = "one process needs none" if place is None else f"{place.address}:{place.port}, kept on {meeting.hosts[0]}"
    yield Check("meeting", "ok", where)
    yield from check_sameness(meeting.hosts, facts)
    device = _device(topology, facts)
    yield check_clocks(meeting.hosts, _clock_offsets(meeting, topology, _firsts(facts)))
    yield check_network(meeting.hosts, facts, device.type)
    yield _check_folder(meeting, topology, out, _firsts(facts))
    yield check_all_reduce(meeting.hosts, _sum_together(meeting, topology, device), device.type)


def find_facts(topology: Topology, master: str) -> RankFacts:
    """What this rank can say without the others.

    Args:
        topology: of this rank.
        master: address where the ranks meet.
    """
    addresses = {
        name: [item.address.partition("%")[0] for item in items if item.family in (socket.AF_INET, socket.AF_INET6)]
        for name, items in psutil.net_if_addrs().items()
    }
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    address = _address_towards(master)
    return RankFacts(
        topology.local_rank,
        [torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())],
        versions(),
        code_digest()[:12],
        next((name for name, held in addresses.items() if address in held), ""),
        address,
        sorted(name for name, held in addresses.items() if held and name in up),
        os.environ.get("GLOO_SOCKET_IFNAME", ""),
        os.environ.get("NCCL_SOCKET_IFNAME", ""),
        _address_of(socket.gethostname()),
    )


def check_ranks(hosts: Sequence[str]) -> Check:
    """As many ranks on each host: the rest of a step would wait for a machine that has more, or fewer."""
    counts = Counter(hosts)
    words = f"{len(hosts)} on {_plural(len(counts), 'host')}"
    if len(set(counts.values())) == 1:
        return Check("ranks", "ok", f"{words}, {counts[hosts[0]]} on each, all came")
    each = ", ".join(f"{host} {count}" for host, count in sorted(counts.items(), key=lambda item: -item[1]))
    cure = "start the same number on every host: slots in the hostfile, --ntasks-per-node, --nproc-per-node"
    return Check("ranks", "fail", f"{words}, not the same number on each: {each}", cure)


def check_hosts(hosts: Sequence[str], facts: Sequence[RankFacts]) -> list[Check]:
    """A line per host: its ranks, and whether each has a GPU of its own; hosts that are fine are listed up to 8."""
    most = max(len(fact.gpus) for fact in facts)
    models = Counter(name for fact in facts for name in fact.gpus)
    checks = []
    for host in dict.fromkeys(hosts):
        ranks = [rank for rank, name in enumerate(hosts) if name == host]
        checks.append(_check_host(host, ranks, [facts[rank] for rank in ranks], most, models))
    fine = [check for check in checks if check.status == "ok"][_MAX_LISTED:]
    return [check for check in checks if check not in fine]


def _check_host(host: str, ranks: Sequence[int], facts: Sequence[RankFacts], most: int, models: Counter[str]) -> Check:
    local, gpus = [fact.local_rank for fact in facts], facts[0].gpus
    name, where = f"host {host}", f"rank{'s' * (len(ranks) > 1)} {_numbers(ranks)}, local {_numbers(local)}"
    if len(set(local)) < len(local):
        cure = "two machines of one name, or a launcher that does not number its ranks: start with a script in launch/"
        return Check(name, "fail", f"{where}: local ranks occur twice", cure)
    if not gpus:
        if most == 0:
            return Check(name, "ok", f"{where}, CPU")
        cure = f"compare nvidia-smi and CUDA_VISIBLE_DEVICES on {host}, leave it out, or set execution.device to cpu"
        return Check(name, "fail", f"{where}: no GPU, where other hosts show {most}", cure)
    detail = f"{where}, {_plural(len(gpus), 'GPU')} ({', '.join(sorted(set(gpus)))})"
    if max(local) >= len(gpus):
        cure = f"start {len(gpus)} on {host}; with srun add --gpu-bind=none, so that every task sees all GPUs"
        return Check(name, "fail", f"{detail}: too few for its ranks", cure)
    if len(gpus) < most:
        cure = f"every host needs the same: compare nvidia-smi and CUDA_VISIBLE_DEVICES on {host}, or leave it out"
        return Check(name, "warn", f"{detail}, where others have {most}", cure)
    if len(models) > 1:
        return Check(name, "warn", detail, "GPUs differ between or on hosts: the slowest sets the pace of all")
    if len(gpus) > len(ranks):
        return Check(name, "warn", detail, f"{len(gpus) - len(ranks)} of {host}'s GPUs are idle: start a rank for each")
    return Check(name, "ok", detail)


def check_sameness(hosts: Sequence[str], facts: Sequence[RankFacts]) -> list[Check]:
    """Versions of libraries and gigamil's own code are equal on all ranks, as in the handshake of training."""
    wrong = []
    for library in facts[0].versions:
        other = _odd_ones(hosts, [fact.versions.get(library, "not installed") for fact in facts])
        if other:
            cure = f"install the same {library} on all hosts: pip install -c constraints.txt, or one shared environment"
            wrong.append(Check(f"{library} version", "fail", other, cure))
    checks = wrong or [Check("versions", "ok", f"{len(facts[0].versions)} equal on all ranks")]
    other = _odd_ones(hosts, [fact.code for fact in facts])
    if other:
        cure = "install the same gigamil on all hosts, or one copy on storage that they share"
        return [*checks, Check("code", "fail", other, cure)]
    return [*checks, Check("code", "ok", f"{facts[0].code} on all ranks")]


def check_clocks(hosts: Sequence[str], offsets_s: Sequence[float | None]) -> Check:
    """Clocks of hosts are close: nothing in training depends on them, but logs and file times are read together.

    Args:
        hosts: by rank.
        offsets_s: of each rank's clock to that of rank 0; None where it was not asked, because its host was.
    """
    known = {rank: offset for rank, offset in enumerate(offsets_s) if offset is not None}
    if not known:
        return Check("clocks", "ok", "one host")
    rank = max(known, key=lambda rank: abs(known[rank]))
    detail = f"at most {abs(known[rank]):.3f} s from {hosts[0]} ({hosts[rank]})"
    if abs(known[rank]) > CLOCK_WARN_S:
        return Check("clocks", "warn", detail, f"log lines would mislead: set the clock of {hosts[rank]} (chrony, ntp)")
    return Check("clocks", "ok", detail)


def check_network(hosts: Sequence[str], facts: Sequence[RankFacts], device: str) -> Check:
    """The interface that each host will use: what the environment says, else the one towards rank 0.

    Args:
        hosts, facts: by rank.
        device: kind on which ranks sum; it decides between gloo and NCCL.
    """
    variable = "NCCL_SOCKET_IFNAME" if device == "cuda" else "GLOO_SOCKET_IFNAME"
    firsts = {host: fact for host, fact in reversed(list(zip(hosts, facts, strict=True)))}
    used = []
    for host in dict.fromkeys(hosts):
        fact = firsts[host]
        wanted = fact.nccl_interfaces if device == "cuda" else fact.gloo_interfaces
        if wanted and not _is_there(wanted, fact.interfaces, device):
            cure = f"export {variable}=NAME, one of: {', '.join(fact.interfaces)}"
            return Check("network", "fail", f"{variable}={wanted} is no interface of {host} that is up", cure)
        if not fact.address:
            return Check(
                "network",
                "fail",
                f"{host} has no route to MASTER_ADDR",
                f"correct MASTER_ADDR, or /etc/hosts of {host}",
            )
        used.append(f"{host} {wanted or fact.interface or 'unknown'} {fact.address}")
    more = f", and {len(used) - _MAX_LISTED} more" if len(used) > _MAX_LISTED else ""
    detail = ", ".join(used[:_MAX_LISTED]) + more
    hidden = [
        host for host, fact in firsts.items() if fact.host_address.startswith("127.") and not fact.gloo_interfaces
    ]
    if device == "cpu" and len(firsts) > 1 and hidden:
        cure = f"export {variable}=NAME on all hosts ({firsts[hidden[0]].interface or 'see ip address'})"
        words = (
            f"{detail}; gloo would listen on {firsts[hidden[0]].host_address}, which is what {hidden[0]} calls itself"
        )
        return Check("network", "warn", words, cure)
    return Check("network", "ok", detail)


def check_folder(out: Path, hosts: Sequence[str], sees: Sequence[str], seen: Collection[int]) -> Check:
    """The run folder is one folder for all hosts.

    Args:
        out: the folder.
        hosts: by rank.
        sees: of each rank, what went wrong when it looked for rank 0's file and wrote one; empty if nothing did.
        seen: ranks whose file rank 0 sees.
    """
    wrong = [(rank, error) for rank, error in enumerate(sees) if error]
    if wrong and wrong[0][0] == 0:
        cure = "choose a folder with --out that all hosts share, or mend its rights"
        return Check("shared folder", "fail", f"'{out}' cannot be written on {hosts[0]}: {wrong[0][1]}", cure)
    cure = "set bookkeeping.out (here --out) to a folder on storage that all hosts share, under the same path"
    if wrong:
        names = ", ".join(dict.fromkeys(hosts[rank] for rank, _ in wrong[:_MAX_LISTED]))
        return Check("shared folder", "fail", f"'{out}' of {hosts[0]} is not that of {names}: {wrong[0][1]}", cure)
    hidden = [rank for rank in range(len(hosts)) if rank not in seen]
    if hidden:
        names = ", ".join(dict.fromkeys(hosts[rank] for rank in hidden[:_MAX_LISTED]))
        return Check("shared folder", "fail", f"{hosts[0]} does not see what {names} wrote to '{out}'", cure)
    return Check("shared folder", "ok", f"'{out}', seen and written by all hosts")


def check_all_reduce(hosts: Sequence[str], told: Sequence[dict[str, Any]], device: str) -> Check:
    """A sum over all ranks is exact, and how fast.

    Args:
        hosts: by rank.
        told: of each rank, the fields of `AllReduceSpeed`, or {"error": words}.
        device: kind on which they summed.
    """
    backend = "NCCL" if device == "cuda" else "gloo"
    failed = [rank for rank, values in enumerate(told) if "error" in values]
    if failed:
        names = ", ".join(dict.fromkeys(hosts[rank] for rank in failed[:_MAX_LISTED]))
        variable = "NCCL_SOCKET_IFNAME" if device == "cuda" else "GLOO_SOCKET_IFNAME"
        cure = f"open all ports between the hosts, and export {variable} if they have several networks"
        if device == "cuda":
            cure += "; NCCL_DEBUG=INFO says more"
        return Check("all-reduce", "fail", f"{backend} on {names}: {told[failed[0]]['error']}", cure)
    wrong = [rank for rank, values in enumerate(told) if values["num_wrong"]]
    if wrong:
        names = ", ".join(dict.fromkeys(hosts[rank] for rank in wrong[:_MAX_LISTED]))
        cure = "do not train: test memory and GPUs of these hosts; for NCCL try NCCL_P2P_DISABLE=1, NCCL_IB_DISABLE=1"
        return Check("all-reduce", "fail", f"{backend} gave wrong sums on {names}", cure)
    speed = AllReduceSpeed(**told[0])
    if speed.num_ranks == 1:
        return Check("all-reduce", "ok", "one rank")
    size = f"{speed.sizes[-1] / MIB:.0f} MiB" if speed.sizes[-1] >= MIB else f"{speed.sizes[-1]} bytes"
    rate = f"{speed.bytes_per_s / 1e9:.2f} GB/s" if speed.bytes_per_s >= 1e8 else f"{speed.bytes_per_s / 1e6:.1f} MB/s"
    return Check(
        "all-reduce",
        "ok",
        f"{backend}, exact; {speed.latency_s * 1e6:.0f} us for one number, {rate} for {size} ({speed.times_s[-1] * 1e3:.1f} ms)",
    )


def _device(topology: Topology, facts: Sequence[RankFacts]) -> torch.device:
    """GPUs if every rank has one of its own, else CPUs: the same on all ranks, so that they can still be compared."""
    if all(fact.local_rank < len(fact.gpus) for fact in facts):
        torch.cuda.set_device(topology.local_rank)
        return torch.device("cuda", topology.local_rank)
    return torch.device("cpu")


def _firsts(facts: Sequence[RankFacts]) -> list[int]:
    """One rank of each machine."""
    return [rank for rank, fact in enumerate(facts) if fact.local_rank == 0]


def _clock_offsets(meeting: Meeting, topology: Topology, firsts: Sequence[int]) -> list[float | None]:
    """Each machine's clock less that of rank 0, in seconds, by the round trip through the store that took least."""
    offset: float | None = None
    if topology.rank == 0:
        for rank in firsts:
            for number in range(_CLOCK_ROUNDS if rank else 0):
                _read(meeting.store, f"clock/{rank}/{number}/question")
                meeting.store.set(f"clock/{rank}/{number}/answer", repr(time.time()))
    elif topology.rank in firsts:
        offset = _own_offset(meeting.store, topology.rank)
    told: list[float | None] = meeting.exchange("clocks", offset)
    return told


def _own_offset(store: dist.Store, rank: int) -> float:
    trips = []
    for number in range(_CLOCK_ROUNDS):  # the first answer waits until rank 0 comes to this machine
        asked = time.time()
        store.set(f"clock/{rank}/{number}/question", "")
        theirs = float(_read(store, f"clock/{rank}/{number}/answer"))
        answered = time.time()
        trips.append((answered - asked, (asked + answered) / 2 - theirs))
    return min(trips)[1]


def _read(store: dist.Store, key: str) -> str:
    """Look until it is there: a wait in the store cannot be interrupted."""
    deadline, pause = time.monotonic() + MEET_S, 0.001
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"nothing was heard of '{key}' within {MEET_S:g} s")
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return store.get(key).decode()


def _check_folder(meeting: Meeting, topology: Topology, out: Path, firsts: Sequence[int]) -> Check:
    """Rank 0 makes a folder of a name that nobody has looked for before, so that no cache of a network file system lies."""
    folder = out / f".gigamil-doctor-{meeting.exchange('name', uuid.uuid4().hex)[0]}"
    made: list[Path] = []
    error = _try_to(partial(_make, folder, made)) if meeting.is_first else ""
    try:
        meeting.exchange("made", None)
        own = folder / str(topology.rank)
        if topology.rank in firsts and not error:
            error = _try_to(partial(_join, folder, own, meeting.host))
        sees = meeting.exchange("sees", error)
        written = [rank for rank in firsts if meeting.is_first and not sees[rank]]
        seen = meeting.exchange("seen", [rank for rank in written if appears(folder / str(rank))])[0]
    finally:
        if made:
            _clear(folder, made, firsts)
    others = [rank for rank in range(topology.world_size) if rank not in firsts]
    return check_folder(out, meeting.hosts, sees, {*seen, *others})


def _make(folder: Path, made: list[Path]) -> None:
    missing = [folder, *(parent for parent in folder.parents if not parent.exists())]
    for path in reversed(missing):
        path.mkdir()
        made.append(path)
    (folder / "first").write_text("gigamil doctor\n")


def _join(folder: Path, own: Path, host: str) -> None:
    appears(folder / "first")
    (folder / "first").read_text()
    own.write_text(f"{host}\n")


def _clear(folder: Path, made: Sequence[Path], ranks: Sequence[int]) -> None:
    """Take away what this check has made: its folder, and those above that were missing, unless others use them by now."""
    for name in ("first", *map(str, ranks)):
        (folder / name).unlink(missing_ok=True)
    for path in reversed(made):
        if not any(path.iterdir()):
            path.rmdir()


def _try_to(work: Callable[[], None]) -> str:
    try:
        work()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _sum_together(meeting: Meeting, topology: Topology, device: torch.device) -> list[dict[str, Any]]:
    """Sum over all ranks; what each has measured, or which error it met."""
    own: dict[str, Any]
    try:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("doctor", meeting.store),
            rank=topology.rank,
            world_size=topology.world_size,
            timeout=timedelta(seconds=COLLECTIVE_S),
        )
        own = asdict(measure_all_reduce(device))
    except (RuntimeError, ValueError) as error:  # torch's network errors are RuntimeErrors
        own = {"error": (str(error).splitlines() or [type(error).__name__])[0]}
    told: list[dict[str, Any]] = meeting.exchange("all-reduce", own)
    if dist.is_initialized():
        dist.destroy_process_group()
    return told


def _address_towards(host: str) -> str:
    """Own address of the interface whose route leads to a host; empty if there is none. Nothing is sent."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            address: str = probe.getsockname()[0]
            return address
    except OSError:
        return ""


def _address_of(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""


def _is_there(wanted: str, interfaces: Sequence[str], device: str) -> bool:
    """Whether a variable names an interface: gloo takes names, NCCL the beginnings of names, and ^ or = before them."""
    if device != "cuda":
        return all(name in interfaces for name in wanted.split(","))
    if wanted.startswith("^"):
        return True
    if wanted.startswith("="):
        return any(name in interfaces for name in wanted[1:].split(","))
    return any(name.startswith(start) for name in interfaces for start in wanted.split(","))


def _odd_ones(hosts: Sequence[str], values: Sequence[str]) -> str:
    """Words for what differs from rank 0: the values and hosts; empty if nothing does."""
    odd: dict[str, list[str]] = {}
    for host, value in zip(hosts, values, strict=True):
        if value != values[0] and host not in odd.setdefault(value, []):
            odd[value].append(host)
    words = [f"{value} on {', '.join(names[:_MAX_LISTED])}" for value, names in odd.items()]
    return f"{values[0]} on {hosts[0]}, but {'; '.join(words)}" if words else ""


def _numbers(values: Sequence[int]) -> str:
    """1, 2, 3 as 1-3 where there is no gap."""
    ordered = sorted(values)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]}-{ordered[-1]}"
    return ", ".join(map(str, ordered))


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _say(topology: Topology, message: str) -> None:
    host = socket.gethostname()
    print(f"gigamil: rank {topology.rank} on host '{host}': {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    end_process(main())
