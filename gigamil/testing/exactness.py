"""Cases that compare the distributed, chunked step with one-process full-bag autograd; used by tests and benchmark.

The reference is written down again here from the formula, and shares with the step only the modules and the draws.
Shapes: n tiles on this rank, N tiles of all slides, S slides, D embedding, K classes.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gigamil.config.schema import Augment, RunConfig
from gigamil.data.augment import augment_tiles, to_float
from gigamil.data.images import HeldImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.models.aggregator import aggregators, build_aggregator, min_tiles
from gigamil.models.bag import Bag, LocalPool, Pooled
from gigamil.models.encoder import SmallCNN, TileEncoder
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import StepPlan, plan_steps
from gigamil.tasks.classification import Multiclass, Multilabel
from gigamil.tasks.ordinal import Ordinal
from gigamil.tasks.regression import Regression
from gigamil.tasks.several import Several
from gigamil.tasks.survival import Cox, DiscreteSurvival
from gigamil.tasks.task import Task
from gigamil.testing.compare import gradient_error, relative_error
from gigamil.train.engine import DeepSpeedEngine, deepspeed_config, import_deepspeed, make_ranks, skip_kernel_build
from gigamil.train.loss import SlideLoss, cross_entropy, slide_losses
from gigamil.train.plain import Engine, PlainEngine
from gigamil.train.step import ExactStep, Ranks

TILE_PX = 16
WIDTH = 4  # of the encoder; its embedding is four times as wide
NUM_CLASSES = 3
SEED = 5
STEP = 11
LEARNING_RATE = 0.1
AUGMENT = Augment()

# Unequal slides; slides of one tile; fewer tiles than three or four ranks; a single tile, so that groups of their own
# have no slide at all. An aggregator that needs more tiles gets at least as many.
SHAPES = ((9, 4, 2), (1, 6, 1), (2, 1), (1,))
KEEPS = ("all", "half", "none")
FLOAT32_BOUND = 1e-5
# Of the whole gradient: with a smaller one, the bound would ask of a tiny gradient less than one rounding of the whole.
FLOAT32_FLOOR = 2.0**-24 / FLOAT32_BOUND
NUM_NUDGES = 8

# Options that keep a model tiny, given to every aggregator that has one of that name.
SMALL_OPTIONS: dict[str, Any] = {"hidden": 6, "heads": 2, "k": 1, "width": 8, "landmarks": 3}
# Variants of single aggregators beyond these: another path of their code, or more tiles than the smallest slides have.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "clam_mb": ({}, {"k": 2, "subtyping": True}),
    "clam_sb": ({}, {"k": 2, "subtyping": True}),
    "dtfd": ({"groups": 2}, {"groups": 2, "distil": "maxs"}, {"groups": 3, "distil": "maxmins"}),
    "topk_mean": ({}, {"k": 3}),
    "transformer": ({}, {"heads": 4}),  # as many as ranks, or twice: heads are shared out; else rows are
}


TASKS: dict[str, Task] = {
    "multiclass": Multiclass(("a", "b", "c"), (1.0, 2.0, 0.5), 0.1, 2.0),
    "multilabel": Multilabel(("x", "y"), (2.0, 0.5)),
    "ordinal": Ordinal(("0", "1", "2", "3"), (1.0, 0.5, 2.0, 1.0)),
    "regression": Regression(("age", "size"), (10.0, 12.0), (2.0, 3.0)),
    "survival": DiscreteSurvival((1.5, 2.5)),
    "cox": Cox(),
}
TASKS["several"] = Several(
    ("first", "second", "third"), (TASKS["multiclass"], TASKS["regression"], Cox()), (1.0, 2.0, 0.5)
)


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        sizes: tiles of each slide of the step; more ranks than tiles leave ranks empty.
        group_size: ranks that pool together.
        aggregator: registered name.
        variant: which of its `OPTIONS`.
        chunk: tiles per encoder call.
        keep: "all", "none" or "half" of the busiest rank's chunks keep their graph.
        random: keyed dropout in encoder, aggregator and head, and keyed augmentation.
        zero_stage: None for torch alone in float64; else DeepSpeed in float32.
        bfloat16: through DeepSpeed's autocast.
        offload: optimiser state of ZeRO 1 or 2 in main memory.
        task: of `TASKS`, with targets of which some are not known; None: plain cross-entropy with a weight per slide.
    """

    sizes: tuple[int, ...]
    group_size: int
    aggregator: str = "gated_attention"
    variant: int = 0
    chunk: int = 3
    keep: str = "half"
    random: bool = True
    zero_stage: int | None = None
    bfloat16: bool = False
    offload: bool = False
    task: str | None = None


@dataclass
class Outcome:
    """Loss and gradients of a case, equal on all ranks.

    Attributes:
        loss: weighted mean over slides.
        gradients: of every parameter.
        tile_gradient_ND: dL/dh of every tile, slide after slide.
    """

    loss: float
    gradients: dict[str, Tensor] = field(repr=False)
    tile_gradient_ND: Tensor = field(repr=False)


class Errors(NamedTuple):
    """Relative errors of a case: of the loss, and the largest of a parameter's gradient and of the tiles' gradient."""

    loss: float
    parameters: float
    tiles: float

    def within(self, bound: float) -> bool:
        """All of them are, and none is NaN."""
        return all(error <= bound for error in self)


class World:
    """One rank of an initialised world, and the groups that it has made so far.

    Args:
        rank, num_ranks: of the world; (0, 1) needs no initialisation.
    """

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._ranks: dict[int, Ranks] = {}

    def ranks(self, group_size: int) -> Ranks:
        """Groups of that size: made once, for every group of processes keeps its connections open."""
        if group_size not in self._ranks:
            topology = Topology(self.num_ranks, self.rank, self.rank, self.num_ranks, group_size)
            self._ranks[group_size] = make_ranks(topology)
        return self._ranks[group_size]


def built_in_aggregators() -> list[str]:
    """Names of the aggregators that gigamil brings along."""
    return [name for name in aggregators.names() if aggregators[name].__module__.startswith("gigamil.models.")]


def num_variants(aggregator: str) -> int:
    """How many sets of options an aggregator is compared with."""
    return len(OPTIONS.get(aggregator, ({},)))


def case_options(case: Case) -> dict[str, Any]:
    """Options of the case's aggregator."""
    known = inspect.signature(aggregators[case.aggregator]).parameters
    options = {name: value for name, value in SMALL_OPTIONS.items() if name in known}
    if "dropout" in known and case.random:
        options["dropout"] = 0.25
    return options | OPTIONS.get(case.aggregator, ({},))[case.variant]


def cases(num_ranks: int, zero_stage: int | None = None, aggregator: str = "gated_attention") -> Iterator[Case]:
    """All shapes, group sizes, kept shares and draws of one aggregator; through DeepSpeed with draws only."""
    for variant in range(num_variants(aggregator)):
        for sizes, group_size, keep in itertools.product(SHAPES, group_sizes(num_ranks), KEEPS):
            for random in (True, False) if zero_stage is None else (True,):
                case = Case(sizes, group_size, aggregator, variant, keep=keep, random=random, zero_stage=zero_stage)
                yield large_enough(case)


def group_sizes(num_ranks: int) -> list[int]:
    """Every number of ranks that can pool together."""
    return [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]


def large_enough(case: Case) -> Case:
    """The case with slides that its aggregator takes."""
    least = min_tiles(build_aggregator(case.aggregator, 4 * WIDTH, num_outputs(case), case_options(case)))
    return replace(case, sizes=tuple(max(size, least) for size in case.sizes))


def case_loss(case: Case) -> SlideLoss:
    """The loss of the case's slides."""
    return cross_entropy if case.task is None else TASKS[case.task].losses


def class_of(case: Case) -> Callable[[Tensor], Tensor | None]:
    """Targets of the case -> classes, for aggregators that look at them."""
    return (lambda target_S: target_S) if case.task is None else TASKS[case.task].class_numbers


def num_outputs(case: Case) -> int:
    """K of the case's model."""
    return NUM_CLASSES if case.task is None else TASKS[case.task].num_outputs


def make_case_model(case: Case, dtype: torch.dtype, nudge: int = 0) -> SlideModel:
    """A small model with biases, and dropout everywhere if the case has draws; the same parameters for every shape.

    Args:
        nudge: every parameter is larger by so many parts in 2^20: the same model to all purposes, rounded otherwise.
    """
    p = 0.25 if case.random else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = TileEncoder(SmallCNN(width=WIDTH, dropout=p), (0.7, 0.5, 0.6), (0.2, 0.2, 0.2))
        aggregator = build_aggregator(case.aggregator, encoder.dim, num_outputs(case), case_options(case))
        model = SlideModel(encoder, aggregator, num_outputs(case), p if getattr(aggregator, "out_dim", None) else 0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + nudge * 2.0**-20)
    return model.to(dtype)


def make_case_tiles(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """uint8 tiles of each slide, target and weight of each slide."""
    generator = np.random.default_rng(SEED)
    images = [
        torch.from_numpy(generator.integers(0, 256, (size, TILE_PX, TILE_PX, 3), dtype=np.uint8)) for size in case.sizes
    ]
    if case.task is None:
        weight_S = torch.linspace(0.5, 2.0, len(case.sizes), dtype=torch.float64)
        return images, torch.arange(len(case.sizes)) % NUM_CLASSES, weight_S
    target_SX = case_targets(TASKS[case.task], len(case.sizes))
    return images, target_SX, TASKS[case.task].weights(target_SX)


def case_targets(task: Task, num_slides: int) -> Tensor:
    """What is known of slides, float64 (S, X): of the second of three nothing, or of several numbers half."""
    if isinstance(task, Several):
        return torch.cat([case_targets(part, num_slides) for part in task.tasks], dim=1)
    number_S1 = torch.arange(num_slides, dtype=torch.float64)[:, None]
    number_X = torch.arange(task.num_targets, dtype=torch.float64)
    if isinstance(task, Cox | DiscreteSurvival):  # two at one time, the last one censored
        target_SX = torch.cat([(number_S1 // 2 + 1), (number_S1 < max(1, num_slides - 1)).double()], dim=1)
    elif isinstance(task, Regression):
        target_SX = 10 + number_S1 * (1 + number_X)
    else:
        most = 2 if isinstance(task, Multilabel) else len(task.classes)  # type: ignore[attr-defined]
        target_SX = (number_S1 + number_X) % most
    if num_slides > 2:
        target_SX[1, : max(1, (task.num_targets + 1) // 2)] = torch.nan
    return target_SX


def make_plan(case: Case, num_groups: int) -> StepPlan:
    """One step over all slides of the case."""
    return plan_steps(range(len(case.sizes)), case.sizes, len(case.sizes), num_groups, case.group_size)[0]


def slide_names(case: Case) -> list[str]:
    """Ids of the case's slides."""
    return [f"slide-{number}" for number in range(len(case.sizes))]


def tile_positions(number_n: Tensor) -> Tensor:
    """float64 (n, 2): tiles by number on a grid three tiles wide, 100 micron apart."""
    return torch.stack([number_n % 3, number_n // 3], dim=1).double() * 100


def reference(case: Case, dtype: torch.dtype = torch.float64, factor: float = 1.0, nudge: int = 0) -> Outcome:
    """Full-bag autograd in one process and one graph: sum_s w_s l_s / sum_s w_s.

    A bfloat16 case is in float32 with the encoder under autocast, whose rounding belongs to the result.

    Args:
        factor: of the loss in backward; gradients are divided by it. If it is no power of two, they round otherwise.
        nudge: as in `make_case_model`.
    """
    model = make_case_model(case, torch.float32 if case.bfloat16 else dtype, nudge)
    _, target_S, weight_S = make_case_tiles(case)
    embedding_ND, bag = _whole_bag(case, model, training=True)
    embedding_ND.retain_grad()
    logits_SK, pooled = model.classify(bag)
    loss_S = slide_losses(case_loss(case), logits_SK, pooled, target_S)
    loss = (loss_S * weight_S).sum() / (weight_S.sum() or 1.0)
    (loss * factor).backward()
    assert embedding_ND.grad is not None
    gradients = {name: gradient / factor for name, gradient in _gradients(model).items()}
    return Outcome(float(loss.detach()), gradients, embedding_ND.grad / factor)


@torch.no_grad()
def reference_prediction(case: Case) -> tuple[Tensor, Pooled]:
    """Logits (S, K) in one process, and all that the aggregator gave; float64, without draws."""
    model = make_case_model(case, torch.float64)
    result: tuple[Tensor, Pooled] = model.classify(_whole_bag(case, model, training=False)[1])
    return result


def _whole_bag(case: Case, model: SlideModel, training: bool) -> tuple[Tensor, Bag]:
    images, target_S, _ = make_case_tiles(case)
    slide_key_S = DrawKeys(SEED, slide_names(case)).slides(STEP, range(len(case.sizes)))
    slide_index_N = torch.repeat_interleave(torch.arange(len(case.sizes)), torch.tensor(case.sizes))
    number_N = torch.cat([torch.arange(size) for size in case.sizes])
    tile_key_N = DrawKeys.tiles(slide_key_S, slide_index_N, number_N) if training else None
    image_NCHW = to_float(torch.cat(images), next(model.parameters()).dtype)
    if case.random and tile_key_N is not None:
        image_NCHW = augment_tiles(image_NCHW, tile_key_N, AUGMENT)
    with torch.autocast("cpu", torch.bfloat16) if case.bfloat16 else nullcontext():
        embedding_ND = model.encode(image_NCHW, tile_key_N)
    embedding_ND = embedding_ND.float() if case.bfloat16 else embedding_ND
    return embedding_ND, Bag(
        embedding_nD=embedding_ND,
        position_n2=tile_positions(number_N),
        sizes=case.sizes,
        pool=LocalPool(len(number_N)),
        tile_key_n=tile_key_N,
        slide_key_B=slide_key_S if training else None,
        label_B=class_of(case)(target_S) if training else None,
    )


def distributed(case: Case, world: World) -> Outcome:
    """The same step as training runs it, on this rank."""
    ranks = world.ranks(case.group_size)
    engine = plain_engine(case, ranks) if case.zero_stage is None else deepspeed_engine(case)
    images, target_S, weight_S = make_case_tiles(case)
    plan = make_plan(case, ranks.topology.num_groups)
    tiles = own_tiles(images, plan, ranks.topology)
    result = make_step(case, engine, ranks).train(
        plan, tiles, target_S, weight_S, step=STEP, learning_rates=[LEARNING_RATE]
    )
    return Outcome(result.loss, engine.gradients, all_tile_gradients(engine.bag, plan, ranks))


def predicted(case: Case, world: World) -> tuple[Tensor, Tensor]:
    """Logits (S, K), and attention (n, A) of this rank's tiles, as evaluation runs it."""
    ranks = world.ranks(case.group_size)
    plan = make_plan(case, ranks.topology.num_groups)
    tiles = own_tiles(make_case_tiles(case)[0], plan, ranks.topology)
    return make_step(case, plain_engine(case, ranks), ranks).evaluate(plan, tiles)


def make_step(case: Case, engine: Engine, ranks: Ranks) -> ExactStep:
    """The step of training, with the case's settings."""
    most = make_plan(case, ranks.topology.num_groups).max_calls(case.chunk)
    return ExactStep(
        engine,
        ranks,
        case_loss(case),
        chunk=case.chunk,
        num_keep={"all": most, "half": most // 2, "none": 0}[case.keep],
        keys=DrawKeys(SEED, slide_names(case)),
        augment=(lambda image, key: augment_tiles(image, key, AUGMENT)) if case.random else None,
        couples=case.task is not None and TASKS[case.task].couples_slides,
        class_of=class_of(case),
    )


def compare(found: Outcome, truth: Outcome, floor: float = 1e-3) -> Errors:
    """Errors of what was found; `floor` as in `gradient_error`."""
    return Errors(
        relative_error(found.loss, truth.loss),
        gradient_error(found.gradients, truth.gradients, floor),
        gradient_error({"tiles": found.tile_gradient_ND}, {"tiles": truth.tile_gradient_ND}),
    )


def float32_bound(case: Case) -> float:
    """Largest error of a float32 case: 1e-5, or four times what one float32 process has by itself where this is more.

    One process is asked at several models that differ in their last digits, because a single error is one draw of
    rounding: TransMIL's pseudo-inverse gives 2e-6 or 5e-5 by luck.
    """
    plain = _as_one_process(case)
    pairs = [(reference(plain, torch.float32, nudge=n), reference(plain, nudge=n)) for n in range(NUM_NUDGES)]
    own = [compare(narrow, wide, FLOAT32_FLOOR) for narrow, wide in pairs]
    return max(FLOAT32_BOUND, 4 * max(map(max, own)))


def within_float32(case: Case, errors: Errors) -> bool:
    """Whether errors are within `float32_bound`, which is computed only where 1e-5 is not enough."""
    return errors.within(FLOAT32_BOUND) or errors.within(float32_bound(case))


def check_cases(rank: int, num_ranks: int, wanted: Sequence[Case]) -> list[Errors]:
    """On this rank: errors of each case against `reference`.

    A rank's gradients carry the number of ranks until they are averaged, which rounds bfloat16 otherwise if it is no
    power of two: the reference carries it too.
    """
    if any(case.zero_stage is not None for case in wanted):
        skip_kernel_build()
    world = World(rank, num_ranks)
    truths: dict[Case, Outcome] = {}
    errors = []
    for case in wanted:
        found = distributed(case, world)
        key = _as_one_process(case)
        if key not in truths:
            truths[key] = reference(key, factor=num_ranks if case.bfloat16 else 1)
        is_float32 = case.zero_stage is not None and not case.bfloat16
        errors.append(compare(found, truths[key], FLOAT32_FLOOR if is_float32 else 1e-3))
    return errors


def _as_one_process(case: Case) -> Case:
    """The case without how it is run, which means nothing to the reference."""
    return replace(case, group_size=1, chunk=1, keep="all", zero_stage=None, offload=False)


def own_tiles(images: list[Tensor], plan: StepPlan, topology: Topology) -> StepTiles:
    """This rank's tiles of slides that lie in memory."""
    group = plan.groups[topology.group]
    spans = plan.spans(topology.group, topology.group_rank)
    picked = [images[plan.slides[group[span.slide]]][span.start : span.stop] for span in spans]
    number_n = torch.cat([torch.arange(0), *(torch.arange(span.start, span.stop) for span in spans)])
    side = images[0].shape[1]
    return StepTiles(
        HeldImages(torch.cat([torch.zeros((0, side, side, 3), dtype=torch.uint8), *picked])),
        torch.cat([torch.arange(0), *(torch.full((span.num_tiles,), span.slide) for span in spans)]),
        number_n,
        tile_positions(number_n),
    )


class RecordingPlainEngine(PlainEngine):
    """Keeps the reduced gradients of the step, and the bag that was pooled."""

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        """Record, then pool."""
        self.bag = bag
        return super().classify(bag)

    def step(self, learning_rates: Sequence[float]) -> float:
        """Record, then update if there is an optimiser."""
        self.gradients = _gradients(self.module)
        if self.optimizer is not None:
            return super().step(learning_rates)
        norm = float(torch.nn.utils.get_total_norm(list(self.gradients.values())))
        self.module.zero_grad()
        return norm


class RecordingDeepSpeedEngine(DeepSpeedEngine):
    """Keeps the reduced gradients of the step, and the bag that was pooled."""

    def classify(self, bag: Bag) -> tuple[Tensor, Pooled]:
        """Record, then pool."""
        self.bag = bag
        return super().classify(bag)

    def step(self, learning_rates: Sequence[float]) -> float:
        """Record (a collective), then update."""
        full = import_deepspeed().utils.safe_get_full_grad
        self.gradients = {name: full(p).detach().float().cpu() for name, p in self._trained().items()}
        return super().step(learning_rates)


def plain_engine(case: Case, ranks: Ranks) -> RecordingPlainEngine:
    """torch alone, in float64."""
    # No optimiser: only gradients are looked at, and a rank's first one loads torch's compiler for three seconds.
    return RecordingPlainEngine(make_case_model(case, torch.float64), world=ranks.world)


def deepspeed_engine(case: Case) -> RecordingDeepSpeedEngine:
    """The engine of training with SGD, because Adam hides a gradient that is wrong by a factor."""
    model = make_case_model(case, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    return RecordingDeepSpeedEngine(model, optimizer, case_settings(case), torch.device("cpu"))


def case_settings(case: Case) -> dict[str, Any]:
    """The DeepSpeed JSON of the case, as a run makes it."""
    config = RunConfig.model_validate(
        {
            "execution": {"zero_stage": case.zero_stage, "offload": case.offload, "device": "cpu"},
            "science": {
                "optim": {"clip_norm": None},
                "precision": "bfloat16" if case.bfloat16 else "float32",
            },
        }
    )
    return deepspeed_config(config)


def all_tile_gradients(bag: Bag, plan: StepPlan, ranks: Ranks) -> Tensor:
    """dL/dh of all tiles of the step, (N, D) in the order of slides, equal on all ranks."""
    topology = ranks.topology
    starts = list(itertools.accumulate(plan.sizes, initial=0))
    result_ND = bag.embedding_nD.new_zeros((starts[-1], bag.embedding_nD.shape[1]))
    row = 0
    for span in plan.spans(topology.group, topology.group_rank):
        assert bag.embedding_nD.grad is not None
        place = starts[plan.groups[topology.group][span.slide]] + span.start
        # The ranks of a group add up as many equal losses as they are, and a loss carries the number of groups: a
        # leaf's gradient is as many times dL/dh as there are ranks, and the engine's mean takes that away.
        own_nD = bag.embedding_nD.grad[row : row + span.num_tiles] / topology.world_size
        result_ND[place : place + span.num_tiles] = own_nD
        row += span.num_tiles
    return ranks.sum_world(result_ND)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise AssertionError(f"parameter '{name}' has no gradient")
        found[name] = parameter.grad.detach().clone()
    return found
