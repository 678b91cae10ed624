"""The machine file: what one rank, one node and the links between them can do, and where each number comes from.

Written by hand from data sheets (`measured: false`), or by `gigamil bench calibrate`. docs/scaling.md has a row per key.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from gigamil.config.load import explain_problem
from gigamil.config.schema import Count, NonNegative, Positive, RunConfig, Section
from gigamil.errors import ConfigError
from gigamil.files import replace_file

DEFAULT_MACHINE = Path(__file__).parents[2] / "configs" / "machines" / "h200-8x400g.yaml"
Precision = Literal["float32", "bfloat16"]


class CallTime(Section):
    """One encoder call."""

    tiles: Count = Field(description="tiles of the call")
    forward_s: Positive = Field(description="seconds of a forward without a graph")
    backward_s: Positive = Field(description="seconds that a forward with a graph and its backward take beyond that")


class EncoderSpeed(Section):
    """An encoder that was measured."""

    encoder: dict[str, Any] = Field(description="name, options and what else of science.encoder decides its speed")
    tile_px: Count = Field(description="tile side in pixels")
    precision: Precision = Field(description="science.precision")
    calls: tuple[CallTime, ...] = Field(min_length=1, description="calls of several sizes, ascending")
    saved_bytes: Positive = Field(description="bytes that a tile's graph keeps for backward")
    busy_cores: NonNegative = Field(description="cores that a call keeps busy, on average over its time")
    source: str = Field(description="where the numbers come from")

    @model_validator(mode="after")
    def _sizes_ascend(self) -> "EncoderSpeed":
        tiles = [call.tiles for call in self.calls]
        if tiles != sorted(set(tiles)):
            raise ValueError(f"tiles of calls must ascend; they are {tiles}")
        return self


class Roof(Section):
    """What encoders that were not measured are taken to reach: operations counted, over a share of the roof."""

    flops_s: dict[Precision, Positive] = Field(description="floating-point operations per second, by precision")
    efficiency: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(
        description="share of it that an encoder reaches, by name; `other` for the rest"
    )
    launch_s: NonNegative = Field(description="seconds that the shortest forward takes; a backward twice that")
    source: str = Field(description="where the numbers come from")

    @model_validator(mode="after")
    def _others_have_one(self) -> "Roof":
        if "other" not in self.efficiency:
            raise ValueError("efficiency needs the key `other`, for encoders that it does not name")
        return self


class Decode(Section):
    """Tiles -> pixels, on one core."""

    shards_mpx_s: Positive = Field(description="megapixels per second and core out of shards")
    slides_mpx_s: Positive = Field(description="the same out of slide files (data.source: slides)")
    source: str = Field(description="where the numbers come from")


class Link(Section):
    """From one rank to another."""

    latency_s: NonNegative = Field(description="seconds before the first byte arrives")
    bytes_s: Positive = Field(description="bytes per second of a rank, in one direction")


class Links(Section):
    """How ranks talk."""

    algorithm: Literal["ring", "tree"] = Field(
        description="ring: gloo, 2 (P - 1) messages one after another; tree: NCCL, first inside the nodes, then between them"
    )
    inside: Link = Field(description="between ranks of a node")
    between: Link | None = Field(description="between ranks of two nodes; null: not known, one node only")
    shared: bool = Field(description="true: the ranks of a node share `between`; false: each has its own")
    source: str = Field(description="where the numbers come from")


class Storage(Section):
    """Where shards lie."""

    node_bytes_s: Positive = Field(description="bytes per second that one node reads")
    total_bytes_s: Positive | None = Field(
        description="all nodes together; null: as many times that as there are nodes"
    )
    local_bytes_s: Positive = Field(description="a node's own disk (execution.shard_cache), from the second epoch on")
    source: str = Field(description="where the numbers come from")


class StepCost(Section):
    """What a step costs besides encoder calls and what ranks send."""

    fixed_s: NonNegative = Field(description="seconds of a step whatever its size: Python, launches, losses")
    head_s: NonNegative = Field(description="seconds of aggregator and head per tile of a rank, forward and backward")
    update_s_per_gb: NonNegative = Field(
        description="seconds of the optimiser per GB of parameters that a rank updates"
    )
    source: str = Field(description="where the numbers come from")


class Largest(Section):
    """The largest run that the numbers were measured with."""

    nodes: Count = Field(description="nodes")
    ranks: Count = Field(description="ranks, over all nodes")
    tiles: Count = Field(description="tiles of a step on one rank")


class Validation(Section):
    """How far predictions were off where they were compared with measurements (`benchmarks/simulator.py`)."""

    median_error: NonNegative = Field(description="median of the relative errors, without their signs")
    worst_error: NonNegative = Field(description="the largest of them")
    points: Count = Field(description="how many runs were compared")
    source: str = Field(description="where, when, and up to how many ranks")


class Machine(Section):
    """A kind of node, and what connects several of them."""

    name: str = Field(description="of the machine, for tables and figures")
    measured: bool = Field(description="true: by `gigamil bench calibrate`; false: from data sheets and estimates")
    device: Literal["cpu", "cuda"] = Field(description="what the ranks compute on")
    ranks_per_node: Count = Field(description="ranks of a node: its GPUs")
    cores_per_node: Count = Field(description="CPU cores of a node")
    device_bytes: Positive = Field(
        description="memory that one rank may take for all of training: of its GPU, or its share"
    )
    host_bytes: Positive = Field(description="main memory of a node")
    encoders: tuple[EncoderSpeed, ...] = Field((), description="encoders that were measured")
    roof: Roof | None = Field(None, description="for the other encoders; null: only those that were measured")
    decode: Decode
    links: Links
    storage: Storage
    step: StepCost
    noise: NonNegative = Field(0.0, description="relative standard deviation of a rank's own time from step to step")
    largest: Largest | None = Field(None, description="what was measured; null: nothing, all is predicted")
    validation: Validation | None = Field(None, description="null: predictions were not compared with measurements")

    @property
    def cores_per_rank(self) -> float:
        """Cores that a rank has to itself; less than one if ranks share them."""
        return self.cores_per_node / self.ranks_per_node

    @property
    def stretch(self) -> float:
        """How much longer work on a core takes where the ranks of a node are more than its cores and wait in turn."""
        return max(1.0, self.ranks_per_node / self.cores_per_node)


def load_machine(path: Path | str) -> Machine:
    """Read a machine file.

    Raises:
        ConfigError: it is missing, is no YAML, or a key is missing, unknown or of the wrong kind; all problems at once.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        measure = "`gigamil bench calibrate --out mine.yaml` measures this machine"
        if path == DEFAULT_MACHINE:  # an installation has no configs/
            raise ConfigError(
                f"no machine file is named, and gigamil was not installed from a clone, which has '{path.name}' in "
                f"configs/machines/. Name one with --machine FILE; {measure}."
            ) from None
        raise ConfigError(f"no machine file '{path}'. configs/machines/ of a clone has some; {measure}.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"'{path}' cannot be read as YAML: {error}") from error
    try:
        return Machine.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(explain_problem(item, Machine, "docs/scaling.md") for item in error.errors())
        raise ConfigError(f"'{path}' is no machine file: {problems}. Its keys: docs/scaling.md.") from None


def save_machine(machine: Machine, path: Path) -> None:
    """Write a machine file, whole or not at all; `load_machine` gives an equal machine."""
    head = f"# {machine.name}. Every key: docs/scaling.md.\n"
    replace_file(path, head + yaml.safe_dump(machine.model_dump(mode="json"), sort_keys=False, width=110))


def encoder_identity(config: RunConfig) -> dict[str, Any]:
    """What of `science.encoder` decides how fast it is: not its weights, nor the colours that it expects."""
    data = config.science.encoder.model_dump(mode="json", exclude_defaults=True)
    return {"name": config.science.encoder.name} | {
        key: value for key, value in data.items() if key not in ("weights", "mean", "std")
    }


def find_speed(machine: Machine, config: RunConfig) -> EncoderSpeed | None:
    """The measured speed of a run's encoder at its tile size and precision; None if it was not measured."""
    wanted = encoder_identity(config), config.slides.tile_px, config.science.precision
    return next((s for s in machine.encoders if (s.encoder, s.tile_px, s.precision) == wanted), None)
