"""What all ranks must have in common is compared before they train: code, versions, configuration, data, folders.

A difference would otherwise show as a hang, or not at all: ranks with other code make other sums. Each check is one
exchange of a few bytes per rank (`gigamil.parallel.meeting`); what differs is fetched only if something does.
"""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

import gigamil
from gigamil.config.schema import RunConfig
from gigamil.errors import ConfigError, EnvironmentFault, GigamilError, ShardError
from gigamil.files import SLOW_FOLDER_S, appears
from gigamil.parallel.meeting import Meeting
from gigamil.parallel.topology import Topology
from gigamil.train.records import flat, versions


def common_facts(config: RunConfig, device: torch.device, topology: Topology) -> dict[str, str]:
    """What has to be equal on all ranks, as words: versions, digest of the code, world, device, every key."""
    facts = {f"version of {name}": version for name, version in versions().items()}
    facts["code of gigamil"] = code_digest()[:12]
    facts["kind of device"] = device.type
    facts["world size"] = str(topology.world_size)
    facts["group size"] = str(topology.group_size)
    return facts | {key: json.dumps(value) for key, value in flat(config.model_dump(mode="json")).items()}


def refuse_unlike_ranks(meeting: Meeting, facts: Mapping[str, str] | None, error: Exception | None = None) -> None:
    """Compare facts over all ranks.

    Args:
        facts: of this rank (`common_facts`); None if it could not even find them.
        error: what this rank met so far, for example a GPU that is not there. It is told to all.
    Raises:
        GigamilError: a rank met an error; of its kind, equal on all ranks, names the rank and its host.
        EnvironmentFault: versions, code or machines differ; names what, values and hosts.
        ConfigError: keys of the configuration differ.
    """
    _raise_same(meeting, error)
    facts = dict(facts or {})
    # Counted, not asked of the launcher: what a hostfile or a job says may differ from what was started.
    facts["ranks per machine"] = str(meeting.hosts.count(meeting.host))
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(meeting.exchange("digests", digest))) == 1:
        return
    everyone = meeting.exchange("facts", facts)
    unlike = _unlike(everyone, meeting.hosts)
    names = [name for name, _ in unlike]
    shown = "; ".join(words for _, words in unlike[:5]) + (f"; and {len(unlike) - 5} more" if len(unlike) > 5 else "")
    if all("." in name and " " not in name for name in names):
        raise _agreed(
            ConfigError(f"the ranks have different configurations: {shown}. Start all with the same YAML and words.")
        )
    cure = "Install the same versions and the same gigamil on all machines"
    if names == ["ranks per machine"]:
        cure = "Give every machine the same number of ranks (slots in the hostfile, tasks or GPUs per node)"
    raise _agreed(EnvironmentFault(f"the ranks are not alike: {shown}. {cure}."))


def refuse_unlike_data(meeting: Meeting, digest: str) -> None:
    """Every rank read the same splits and shards.

    Args:
        digest: of this rank's (`run_identity`).
    Raises:
        ShardError: they differ; names hosts.
    """
    everyone = [{"splits and shards": text[:12]} for text in meeting.exchange("data", digest)]
    for _, words in _unlike(everyone, meeting.hosts):
        raise _agreed(
            ShardError(
                f"the ranks read different data: {words}. Is the folder of shards, or splits.json, a copy that is older on "
                "one of the hosts? Put them on storage that all share, or copy them anew."
            )
        )


def refuse_own_folders(meeting: Meeting, out: Path) -> None:
    """The run folder is one folder, that all hosts see: rank 0 writes a file and all look for it.

    Raises:
        EnvironmentFault: some do not see it, or rank 0 cannot write; names hosts.
    """
    name, error = "", None
    if meeting.is_first:
        name = f".shared-{uuid.uuid4().hex}"
        try:
            (out / name).touch()
        except OSError as raised:
            error = EnvironmentFault(f"the run folder '{out}' cannot be written: {raised}")
    try:
        _raise_same(meeting, error)
        name = meeting.exchange("shared folder", name)[0]
        sees = meeting.exchange("what is seen", appears(out / name))
    finally:
        if meeting.is_first:
            (out / name).unlink(missing_ok=True)
    blind = sorted({meeting.hosts[rank] for rank, seen in enumerate(sees) if not seen})
    if blind:
        raise _agreed(
            EnvironmentFault(
                f"the run folder '{out}' is not shared: rank 0 on host '{meeting.hosts[0]}' wrote a file there that host"
                f"{'s' * (len(blind) > 1)} {', '.join(map(repr, blind[:8]))} did not see within {SLOW_FOLDER_S:g} s. Set bookkeeping.out to a "
                "folder on storage that all hosts share, under the same path."
            )
        )


@contextmanager
def told_to_all(meeting: Meeting) -> Iterator[None]:
    """What a rank does by itself before there are process groups: if it fails on one, all raise the same.

    Raises:
        GigamilError: of the lowest rank that failed, names it and its host.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # noqa: BLE001 - told to all, and raised, in the last line
        error = raised
    _raise_same(meeting, error)


def code_digest() -> str:
    """SHA-256 over the source files of gigamil, their names included."""
    root = Path(gigamil.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _raise_same(meeting: Meeting, error: Exception | None) -> None:
    own = None
    if error is not None:
        code = getattr(error, "exit_code", EnvironmentFault.exit_code)
        words = str(error) if isinstance(error, GigamilError) else f"{type(error).__name__}: {error}"
        own = [words, code]
    try:
        told = meeting.exchange("errors", own)
    except GigamilError:
        if error is None:
            raise
        raise error from None  # what this rank met comes first
    first = next((rank for rank, what in enumerate(told) if what is not None), None)
    if first is None:
        return
    is_usage = isinstance(error, GigamilError) and error.exit_code == ConfigError.exit_code
    if error is not None and (len(told) == 1 or (is_usage and all(what == told[first] for what in told))):
        if isinstance(error, GigamilError):
            error.is_agreed = True
        raise error  # every rank met the same in the configuration; with what is in machines the host is told
    message, code = told[first]
    refusal = EnvironmentFault(f"{meeting.name(first)}: {message}")
    refusal.exit_code, refusal.is_agreed = code, True
    raise refusal from error


def _agreed(error: GigamilError) -> GigamilError:
    error.is_agreed = True
    return error


def _unlike(everyone: list[dict[str, str]], hosts: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, words) of each fact that differs: what rank 0 has, and the first rank that has another."""
    found = []
    for name in sorted({name for facts in everyone for name in facts}):
        values = [facts.get(name, "nothing") for facts in everyone]
        if len(set(values)) == 1:
            continue
        other = next(rank for rank, value in enumerate(values) if value != values[0])
        first, second = f"host '{hosts[0]}' (rank 0)", f"host '{hosts[other]}' (rank {other})"
        found.append((name, f"{name} is {values[0]} on {first} and {values[other]} on {second}"))
    return found
