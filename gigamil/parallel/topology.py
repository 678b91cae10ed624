"""The shape of the world: groups of ranks that pool one set of slides together. The only reader of rank variables."""

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from gigamil.errors import ConfigError, EnvironmentFault

# What each launcher calls (rank, world size, local rank, ranks of this machine): torchrun, deepspeed, then srun.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",)),
)


@dataclass(frozen=True)
class Topology:
    """world = groups x ranks that pool together; group g holds the ranks [g R, (g + 1) R).

    Attributes:
        world_size, rank: of the whole run.
        local_rank, local_size: of this machine.
        group_size: R, ranks that pool one set of slides.
    """

    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_size: int = 1
    group_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise EnvironmentFault(f"rank {self.rank} does not exist in a world of {self.world_size}")
        if self.group_size < 1 or self.world_size % self.group_size:
            fits = [size for size in range(1, self.world_size + 1) if self.world_size % size == 0]
            raise ConfigError(
                f"execution.group_size={self.group_size} does not divide world size {self.world_size}; use one of {fits}"
            )

    @property
    def num_groups(self) -> int:
        """Groups in the world."""
        return self.world_size // self.group_size

    @property
    def group(self) -> int:
        """Number of this rank's group."""
        return self.rank // self.group_size

    @property
    def group_rank(self) -> int:
        """Position of this rank inside its group."""
        return self.rank % self.group_size

    def group_ranks(self, group: int) -> list[int]:
        """World ranks of a group."""
        return list(range(group * self.group_size, (group + 1) * self.group_size))


def detect_topology(group_size: int | None = None, env: Mapping[str, str] = os.environ) -> Topology:
    """Read the launcher's variables (deepspeed, torchrun, or srun); without any, one process.

    Args:
        group_size: ranks that pool together; None takes the whole world.
    Raises:
        EnvironmentFault: a variable is missing or is not a number.
        ConfigError: group_size does not divide the world size.
    """
    for rank_name, world_name, local_name, local_size_names in _LAUNCHERS:
        if rank_name in env and world_name in env:
            world = _integer(env, world_name)
            local_size = next((_integer(env, name) for name in local_size_names if name in env), world)
            return Topology(
                world, _integer(env, rank_name), _integer(env, local_name, "0"), local_size, group_size or world
            )
    return Topology(group_size=group_size or 1)


def told_rank(env: Mapping[str, str] = os.environ) -> str:
    """This rank in the launcher's own word, for messages: also where `detect_topology` refuses what it says."""
    return next((env[name] for name, *_ in _LAUNCHERS if name in env), "0")


def has_launcher(env: Mapping[str, str] = os.environ) -> bool:
    """A launcher started this process and told it its rank."""
    return any(rank_name in env and world_name in env for rank_name, world_name, *_ in _LAUNCHERS)


def export_topology(topology: Topology, env: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables that torch.distributed and DeepSpeed read, for launchers that do not (srun, no launcher).

    DeepSpeed tries mpi4py when they are missing. MASTER_ADDR and MASTER_PORT have defaults only in one process.
    """
    env["RANK"], env["WORLD_SIZE"] = str(topology.rank), str(topology.world_size)
    env["LOCAL_RANK"], env["LOCAL_WORLD_SIZE"] = str(topology.local_rank), str(topology.local_size)
    for name, default in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        if name not in env:
            if topology.world_size > 1:
                raise EnvironmentFault(
                    f"{name} is not set for a world of {topology.world_size}. Start with one of the scripts in launch/, "
                    "or export MASTER_ADDR (the first host) and MASTER_PORT (a free port) on every rank."
                )
            env[name] = default


@dataclass(frozen=True)
class MeetingPoint:
    """Where the store is through which ranks meet.

    Attributes:
        address, port: of the store.
        is_kept_by_launcher: torchrun's agent keeps the store; else rank 0 does.
        name: of the job, so that two that meet at one store do not take each other's words.
    """

    address: str
    port: int
    is_kept_by_launcher: bool
    name: str


def meeting_point(env: Mapping[str, str] = os.environ) -> MeetingPoint:
    """Read where ranks meet; after `export_topology`."""
    is_kept = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    name = f"gigamil/{launcher_job(env) or 'run'}"
    return MeetingPoint(env["MASTER_ADDR"], _integer(env, "MASTER_PORT"), is_kept, name)


def launcher_job(env: Mapping[str, str] = os.environ) -> str | None:
    """Name of the job, which stays when Slurm or torchrun starts it again; None under launchers that have none."""
    run = env.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's own word for no --rdzv-id
    return env.get("SLURM_JOB_ID") or (run if run != "none" else None)


def _integer(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default)
    try:
        return int(text)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise EnvironmentFault(
            f"{name}={text!r} must be an integer; start with one of the scripts in launch/"
        ) from None
