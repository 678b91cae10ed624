"""A device that runs out of memory, tiles that cannot be read, an embedding that is not finite: on one rank, or on all.

The CPU raises no `OutOfMemoryError`, so an encoder that stands for a small device does. Whatever one rank meets alone,
no rank waits for ever, all ranks do the same, and a step that is made again has the gradient of full-bag autograd.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gigamil.data.images import StoredImages
from gigamil.data.pipeline import StepTiles
from gigamil.errors import ShardError, TrainingError
from gigamil.models.encoder import SmallCNN
from gigamil.testing import exactness
from gigamil.testing.exactness import (
    KEEPS,
    LEARNING_RATE,
    STEP,
    Case,
    Errors,
    Outcome,
    World,
    all_tile_gradients,
    compare,
    deepspeed_engine,
    make_case_tiles,
    make_plan,
    make_step,
    own_tiles,
    plain_engine,
    reference,
)
from gigamil.testing.memory import NoMemoryInBackward
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.engine import skip_kernel_build
from gigamil.train.step import StepResult, fit_chunk

NUM_RANKS = 2
SIZES = (9, 1, 4)  # 7 tiles on each of two ranks: calls of 4 and 3
CHUNK = 4
STAGES = (None, 0, 1, 2, 3)  # None: torch alone in float64
BOUNDS = {None: 1e-12, 0: 1e-5, 1: 1e-5, 2: 1e-5, 3: 1e-5}
PLACES = ("first pass", "replay", "backward")
WHERE = [("one rank", keep) for keep in KEEPS] + [("all ranks", "half")]
STEPS = 3  # of a run; the device is small from its second step on
RUN_BOUND = 1e-6  # float32 sums in another order
BAD_TILE = (0, 8)  # of the first slide: row 1 of the second rank


class SmallDevice(SmallCNN):
    """An encoder on a device that has no memory for a call with more than `limit` tiles.

    Attributes:
        place: where it runs out: in the "first pass", in a "replay", or in the middle of a "backward".
        limit: tiles; None is a large device.
    """

    place = ""
    limit: int | None = None

    def forward(self, image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
        first, second = self.features[:6], self.features[6:]
        values = first(image_nCHW)
        if self.limit is not None and len(image_nCHW) > self.limit:
            if self.place == ("replay" if torch.is_grad_enabled() else "first pass"):
                raise torch.OutOfMemoryError("injected")
            if self.place == "backward" and torch.is_grad_enabled():
                values = NoMemoryInBackward.apply(values)
        return self.dropout(second(values).mean(dim=(2, 3)), tile_key_n)


@pytest.fixture(scope="module")
def world() -> list[dict[Any, Any]]:
    """What each of two ranks found."""
    return run_on_ranks(measure, NUM_RANKS, NUM_RANKS, timeout_s=280)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("where", "keep"), WHERE)
def test_a_step_with_too_little_memory_ends_with_the_exact_gradient(
    world: list[dict[Any, Any]], stage: int | None, place: str, where: str, keep: str
) -> None:
    for found in world:
        errors, restarts, weights_are_right = found["little", stage, place, where, keep]
        assert errors.within(BOUNDS[stage])
        assert weights_are_right
        # First without kept graphs, then 4 -> 2 -> 1. Only a backward that broke off costs the whole step, as a part of
        # its gradient may be there.
        assert restarts == (2 + (keep != "none") if place == "backward" else 0)


def test_smaller_chunks_stay_for_the_next_steps_and_on_the_small_device_only(world: list[dict[Any, Any]]) -> None:
    for place, large in (("first pass", CHUNK), ("replay", CHUNK), ("backward", 1)):
        assert [found["chunk", place] for found in world] == [large, 1]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("place", PLACES)
def test_a_tile_that_does_not_fit_ends_training_on_all_ranks(
    world: list[dict[Any, Any]], stage: int | None, place: str
) -> None:
    for found in world:
        error, moved = found["none", stage, place]
        assert isinstance(error, TrainingError)
        assert "no memory for a single tile" in str(error)
        assert not moved


@pytest.mark.parametrize("stage", STAGES[1:])
@pytest.mark.parametrize("place", PLACES)
def test_a_run_that_ran_out_of_memory_goes_on_as_if_it_had_not(
    world: list[dict[Any, Any]], stage: int, place: str
) -> None:
    for found in world:
        error, moved = found["run", stage, place]
        assert error <= RUN_BOUND < 1e-3 < moved


@pytest.mark.parametrize("stage", [None, 3])
def test_prediction_goes_on_with_smaller_chunks(world: list[dict[Any, Any]], stage: int | None) -> None:
    bound = 1e-12 if stage is None else 1e-6
    for found in world:
        large_SK, small_SK = found["predicted", stage, "large"], found["predicted", stage, "small"]
        assert torch.equal(large_SK.argmax(1), small_SK.argmax(1))
        torch.testing.assert_close(small_SK, large_SK, rtol=bound, atol=bound)
        assert isinstance(found["predicted", stage, "none"], TrainingError)


@pytest.mark.parametrize("stage", [None, 1, 3])
@pytest.mark.parametrize("when", ["first pass", "replay"])
@pytest.mark.parametrize("aggregator", ["gated_attention", "max"])
def test_tiles_that_cannot_be_read_skip_the_step_everywhere_and_are_told_where_they_are(
    world: list[dict[Any, Any]], stage: int | None, when: str, aggregator: str
) -> None:
    skipped, moved = [], []
    for rank, found in enumerate(world):
        result, moved_here = found["unreadable", stage, when, aggregator]
        assert (type(result.error), str(result.error)) == (
            (ShardError, "slide 'slide-2' is damaged") if rank == 1 else (type(None), "None")
        )
        assert result.bad_tile is None
        skipped.append(result.skipped)
        moved.append(moved_here)
    assert skipped[0] == skipped[1] != ()
    assert moved == [False, False]


def test_prediction_of_tiles_that_cannot_be_read_ends_on_all_ranks_with_the_readers_words(
    world: list[dict[Any, Any]],
) -> None:
    for found in world:
        error = found["unreadable prediction"]
        assert isinstance(error, TrainingError)
        assert str(error) == "rank 1: ShardError: slide 'slide-2' is damaged"
        assert error.exit_code == ShardError.exit_code


@pytest.mark.parametrize("stage", [None, 1, 3])
@pytest.mark.parametrize("aggregator", ["gated_attention", "max", "topk_mean"])
def test_an_embedding_that_is_not_finite_is_named_on_all_ranks(
    world: list[dict[Any, Any]], stage: int | None, aggregator: str
) -> None:
    for found in world:
        result, moved = found["not finite", stage, aggregator]
        assert result.bad_tile == BAD_TILE
        assert result.skipped != ()
        assert not moved


def test_prediction_names_the_embedding_too(world: list[dict[Any, Any]]) -> None:
    for found in world:
        assert "slide 'slide-0': the embedding of tile 8 is not finite" in str(found["not finite prediction"])


class Run:
    """An engine and a step of one case, on this rank."""

    def __init__(self, case: Case, world: World) -> None:
        self.case, self.rank = case, world.rank
        self.ranks = world.ranks(NUM_RANKS)
        self.engine: Any = plain_engine(case, self.ranks) if case.zero_stage is None else deepspeed_engine(case)
        self.step = make_step(case, self.engine, self.ranks)
        self.images, self.label_S, self.weight_S = make_case_tiles(case)
        self.plan = make_plan(case, 1)
        self.tiles: StepTiles = own_tiles(self.images, self.plan, self.ranks.topology)
        self.norms: list[float] = []
        step = self.engine.step
        self.engine.step = lambda rates: self.norms.append(step(rates)) or self.norms[-1]

    def train(self, step: int = STEP) -> StepResult:
        arguments = (self.plan, self.tiles, self.label_S, self.weight_S)
        return self.step.train(*arguments, step=step, learning_rates=[LEARNING_RATE])

    def predict(self) -> Tensor:
        return self.step.evaluate(self.plan, self.tiles)[0]

    def weights(self) -> dict[str, Tensor]:
        if self.case.zero_stage is not None:
            return self.engine.state().parameters
        return {name: p.detach().clone() for name, p in self.engine.module.named_parameters()}

    def damage(self, when: str) -> None:
        """The last slide cannot be read (any more); it lies on the second rank."""
        asked: set[tuple[int, int]] = set()

        def decode(slide_id: str, start: int, stop: int) -> Tensor:
            number = int(slide_id.split("-")[1])
            if number == 2 and (when == "first pass" or (start, stop) in asked):
                raise ShardError("slide 'slide-2' is damaged")
            asked.add((start, stop))
            return self.images[number][start:stop]

        spans = [(f"slide-{span.slide}", span.start, span.stop) for span in self.plan.spans(0, self.rank)]
        self.tiles = replace(self.tiles, images=StoredImages(spans, self.images[0].shape[1], decode))

    def break_embedding(self) -> None:
        """The second row of each call on the second rank is infinite."""
        encode = self.engine.encode

        def broken(image_nCHW: Tensor, tile_key_n: Tensor | None) -> Tensor:
            embedding_nD = encode(image_nCHW, tile_key_n)
            factor_n1 = torch.ones(len(embedding_nD), 1, dtype=embedding_nD.dtype)
            factor_n1[1:2] = torch.inf if self.rank == 1 else 1.0
            return embedding_nD * factor_n1

        self.engine.encode = broken


def measure(rank: int, num_ranks: int) -> dict[Any, Any]:
    skip_kernel_build()
    world = World(rank, num_ranks)
    found: dict[Any, Any] = {}
    for stage in STAGES:
        for place in PLACES:
            for where, keep in WHERE:
                little, chunk = with_little_memory(stage, place, where, keep, world)
                found["little", stage, place, where, keep] = little
                if (stage, where, keep) == (1, "one rank", "none"):
                    found["chunk", place] = chunk
            with small_device(place, 0, rank):
                run = Run(make_case(stage, keep="none"), world)
                before = run.weights()
                error = error_of(run.train)
                found["none", stage, place] = error, is_moved(before, run.weights())
            if stage is not None:
                found["run", stage, place] = run_errors(stage, place, world)
    for stage in (None, 3):
        for name, limit in (("large", None), ("small", 1), ("none", 0)):
            with small_device("first pass", limit, rank):
                run = Run(make_case(stage), world)
                found["predicted", stage, name] = error_of(run.predict) if limit == 0 else run.predict()
    found |= measure_bad_tiles(world)
    return found


def measure_bad_tiles(world: World) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for stage in (None, 1, 3):
        for aggregator in ("gated_attention", "max", "topk_mean"):
            for when in ("first pass", "replay"):
                run = Run(make_case(stage, aggregator, "none"), world)
                run.damage(when)
                found["unreadable", stage, when, aggregator] = trained(run)
            run = Run(make_case(stage, aggregator), world)
            run.break_embedding()
            found["not finite", stage, aggregator] = trained(run)
    run = Run(make_case(None, "max"), world)
    run.break_embedding()
    found["not finite prediction"] = error_of(run.predict)
    run = Run(make_case(None, "max"), world)
    run.damage("first pass")
    found["unreadable prediction"] = error_of(run.predict)
    return found


def make_case(stage: int | None, aggregator: str = "gated_attention", keep: str = "half") -> Case:
    return Case(SIZES, NUM_RANKS, aggregator, chunk=CHUNK, keep=keep, zero_stage=stage)


class small_device:
    """The model's encoder is one that has memory for `limit` tiles: on the second rank, or on all."""

    def __init__(self, place: str, limit: int | None, rank: int, where: str = "one rank") -> None:
        self.place, self.limit = place, limit if rank == 1 or where == "all ranks" else None

    def __enter__(self) -> None:
        exactness.SmallCNN = SmallDevice
        SmallDevice.place, SmallDevice.limit = self.place, self.limit

    def __exit__(self, *_: object) -> None:
        exactness.SmallCNN = SmallCNN


def with_little_memory(
    stage: int | None, place: str, where: str, keep: str, world: World
) -> tuple[tuple[Errors, int, bool], int]:
    case = make_case(stage, keep=keep)
    with small_device(place, 1, world.rank, where):
        run = Run(case, world)
        before = run.weights()
        result = run.train()
        after = run.weights()
    truth = reference(case)
    found = Outcome(result.loss, run.engine.gradients, all_tile_gradients(run.engine.bag, run.plan, run.ranks))
    rate = 0.0 if stage is None else LEARNING_RATE  # torch alone has no optimiser here
    right = all(
        torch.allclose(after[name], before[name] - rate * gradient.to(before[name]), rtol=1e-5, atol=1e-6)
        for name, gradient in truth.gradients.items()
    )
    return (compare(found, truth), len(run.norms) - 1, right), run.step.chunk


def run_errors(stage: int, place: str, world: World) -> tuple[float, float]:
    """Largest ||d|| / ||weight|| after a few steps against a large device, and how far they went."""
    final, start = {}, {}
    for limit in (None, 1):
        with small_device(place, None, world.rank):
            run = Run(make_case(stage), world)
            start = run.weights()
            run.train(0)
        with small_device(place, limit, world.rank):
            for step in range(1, STEPS):
                run.train(step)
        final[limit] = run.weights()  # a checkpoint's state, after what the device did

    def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        return max(float((a[name] - b[name]).norm() / b[name].norm()) for name in b if b[name].norm() > 0)

    return distance(final[1], final[None]), distance(final[1], start)


def trained(run: Run) -> tuple[StepResult, bool]:
    """What a step reports, and whether any weight moved."""
    before = run.weights()
    result = run.train()
    return result, is_moved(before, run.weights())


def is_moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return any(not torch.equal(after[name], before[name]) for name in before)


def error_of(function: Callable[[], object]) -> Exception | None:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - it is what is looked at
        return error
    return None


def fit_first_chunk(rank: int) -> int:
    ranks = World(rank, NUM_RANKS).ranks(NUM_RANKS)
    engine = plain_engine(Case(SIZES, NUM_RANKS), ranks)

    def check(_module: object, args: tuple[Tensor, ...]) -> None:
        if rank == 1 and len(args[0]) > 5:
            raise torch.OutOfMemoryError("injected")

    engine.module.encoder.backbone.register_forward_pre_hook(check)
    return fit_chunk(engine, ranks, 16, exactness.TILE_PX)[0]


def test_all_ranks_take_the_first_chunk_that_fits_the_smallest_device() -> None:
    assert run_on_ranks(fit_first_chunk, NUM_RANKS, timeout_s=60) == [4, 4]
