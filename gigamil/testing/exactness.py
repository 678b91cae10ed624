"""Cases that compare the distributed, chunked step with one-process full-bag autograd; used by tests and benchmark.

The reference is written down again here from the formula, and shares with the step only the modules and the draws.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gigamil.config.schema import Augment, RunConfig
from gigamil.data.augment import augment_tiles, to_float
from gigamil.data.images import HeldImages
from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.models.aggregators.attention import GatedAttention
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.encoder import SmallCNN, TileEncoder
from gigamil.models.slide_model import SlideModel
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import StepPlan, plan_steps
from gigamil.testing.compare import gradient_error, relative_error
from gigamil.train.engine import DeepSpeedEngine, deepspeed_config, make_ranks, skip_kernel_build
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks

TILE_PX = 32
NUM_CLASSES = 3
SEED = 5
STEP = 11
AUGMENT = Augment()


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        sizes: tiles of each slide of the step; more ranks than tiles leave ranks empty.
        group_size: ranks that pool together.
        chunk: tiles per encoder call.
        keep: "all", "none" or "half" of the busiest rank's chunks keep their graph.
        random: keyed dropout in encoder, aggregator and head, and keyed augmentation.
        zero_stage: None for torch alone in float64; else DeepSpeed in float32.
        bfloat16: through DeepSpeed's autocast.
    """

    sizes: tuple[int, ...]
    group_size: int
    chunk: int = 3
    keep: str = "half"
    random: bool = True
    zero_stage: int | None = None
    bfloat16: bool = False


@dataclass
class Outcome:
    """Loss and gradients of a case, equal on all ranks."""

    loss: float
    gradients: dict[str, Tensor] = field(repr=False)


def cases(num_ranks: int, zero_stage: int | None = None) -> Iterator[Case]:
    """Unequal slides, one-tile slides and empty ranks; all, half and none of the chunks kept; draws on and off."""
    group_sizes = [size for size in range(1, num_ranks + 1) if num_ranks % size == 0]
    for sizes, group_size, keep in itertools.product(((13, 1, 6), (1, 2)), group_sizes, ("all", "half", "none")):
        for random in (True, False) if zero_stage is None else (True,):
            yield Case(sizes, group_size, keep=keep, random=random, zero_stage=zero_stage)


def make_case_model(case: Case, dtype: torch.dtype) -> SlideModel:
    """A small model with biases, and dropout everywhere if the case has draws; the same parameters for every case."""
    p = 0.25 if case.random else 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = TileEncoder(SmallCNN(width=4, dropout=p), (0.7, 0.5, 0.6), (0.2, 0.2, 0.2))
        model = SlideModel(encoder, GatedAttention(encoder.dim, hidden=8, heads=2, dropout=p), NUM_CLASSES, p)
    return model.to(dtype)


def make_case_tiles(case: Case) -> tuple[list[Tensor], Tensor, Tensor]:
    """uint8 tiles of each slide, label and weight of each slide."""
    generator = np.random.default_rng(SEED)
    images = [
        torch.from_numpy(generator.integers(0, 256, (size, TILE_PX, TILE_PX, 3), dtype=np.uint8)) for size in case.sizes
    ]
    label_S = torch.arange(len(case.sizes)) % NUM_CLASSES
    weight_S = torch.linspace(0.5, 2.0, len(case.sizes), dtype=torch.float64)
    return images, label_S, weight_S


def reference(case: Case) -> Outcome:
    """Full-bag autograd in one process and one graph, float64: sum_s w_s l_s / sum_s w_s."""
    model = make_case_model(case, torch.float64)
    images, label_S, weight_S = make_case_tiles(case)
    keys = DrawKeys(SEED, slide_names(case))
    slide_key_S = keys.slides(STEP, range(len(case.sizes)))
    slide_index_N = torch.repeat_interleave(torch.arange(len(case.sizes)), torch.tensor(case.sizes))
    number_N = torch.cat([torch.arange(size) for size in case.sizes])
    tile_key_N = keys.tiles(slide_key_S, slide_index_N, number_N)
    image_NCHW = to_float(torch.cat(images), torch.float64)
    if case.random:
        image_NCHW = augment_tiles(image_NCHW, tile_key_N, AUGMENT)
    bag = Bag(
        embedding_nD=model.encode(image_NCHW, tile_key_N),
        position_n2=torch.zeros(len(number_N), 2, dtype=torch.float64),
        sizes=case.sizes,
        pool=LocalPool(len(number_N)),
        tile_key_n=tile_key_N,
        slide_key_B=slide_key_S,
    )
    logits_SK, _ = model.classify(bag)
    loss = (cross_entropy(logits_SK, label_S) * weight_S).sum() / weight_S.sum()
    loss.backward()
    return Outcome(float(loss.detach()), _gradients(model))


def distributed(case: Case, rank: int, num_ranks: int) -> Outcome:
    """The same step as training runs it, on this rank of an initialised world."""
    topology = Topology(num_ranks, rank, rank, num_ranks, case.group_size)
    ranks = make_ranks(topology)
    engine = _plain(case, ranks) if case.zero_stage is None else _deepspeed(case)
    images, label_S, weight_S = make_case_tiles(case)
    plan = plan_steps(range(len(case.sizes)), case.sizes, len(case.sizes), topology.num_groups, case.group_size)[0]
    most = plan.max_calls(case.chunk)
    step = ExactStep(
        engine,
        ranks,
        cross_entropy,
        chunk=case.chunk,
        num_keep={"all": most, "half": most // 2, "none": 0}[case.keep],
        keys=DrawKeys(SEED, slide_names(case)),
        augment=(lambda image, key: augment_tiles(image, key, AUGMENT)) if case.random else None,
    )
    tiles = own_tiles(images, plan, topology)
    result = step.train(plan, tiles, label_S, weight_S, step=STEP, learning_rates=[0.1])
    return Outcome(result.loss, engine.gradients)


def check_cases(rank: int, num_ranks: int, wanted: list[Case]) -> list[tuple[float, float]]:
    """On this rank: relative error of the loss and of the gradient of each case against `reference`."""
    if any(case.zero_stage is not None for case in wanted):
        skip_kernel_build()
    errors = []
    truths: dict[tuple[tuple[int, ...], bool], Outcome] = {}  # how a step is run means nothing to the reference
    for case in wanted:
        found, key = distributed(case, rank, num_ranks), (case.sizes, case.random)
        truth = truths[key] = truths.get(key) or reference(case)
        errors.append((relative_error(found.loss, truth.loss), gradient_error(found.gradients, truth.gradients)))
    return errors


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
        torch.zeros((len(number_n), 2), dtype=torch.float64),
    )


def slide_names(case: Case) -> list[str]:
    """Ids of the case's slides."""
    return [f"slide-{number}" for number in range(len(case.sizes))]


class RecordingPlainEngine(PlainEngine):
    """Keeps the reduced gradients of the step."""

    def step(self, learning_rates: object) -> float:
        """Record, then update if there is an optimiser."""
        self.gradients = _gradients(self.module)
        return 0.0 if self.optimizer is None else super().step(learning_rates)  # type: ignore[arg-type]


class RecordingDeepSpeedEngine(DeepSpeedEngine):
    """Keeps the reduced gradients of the step."""

    def step(self, learning_rates: object) -> float:
        """Record (a collective), then update."""
        self.gradients = self.full_gradients()
        return super().step(learning_rates)  # type: ignore[arg-type]


def _plain(case: Case, ranks: Ranks) -> RecordingPlainEngine:
    # No optimiser: only gradients are looked at, and a rank's first one loads torch's compiler for three seconds.
    return RecordingPlainEngine(make_case_model(case, torch.float64), world=ranks.world)


def _deepspeed(case: Case) -> RecordingDeepSpeedEngine:
    config = RunConfig.model_validate(
        {
            "execution": {"zero_stage": case.zero_stage},
            "science": {
                "optim": {"clip_norm": None},
                "precision": "bfloat16" if case.bfloat16 else "float32",
            },
        }
    )
    model = make_case_model(case, torch.float32)
    # SGD, because Adam hides a gradient that is wrong by a factor.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return RecordingDeepSpeedEngine(model, optimizer, deepspeed_config(config), torch.device("cpu"))


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            raise AssertionError(f"parameter '{name}' has no gradient")
        found[name] = parameter.grad.detach().clone()
    return found
