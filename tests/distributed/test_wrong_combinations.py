"""Every wrong way to sum gradients that DESIGN lists, done on purpose: silent all of them, and seen by our comparison.

Each is one step of two ranks in one group, compared with one process. "Share" is the factor by which a part of the
gradient is wrong: <found, wanted> / <wanted, wanted> over its parameters; 1 is right.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gigamil.models.bag import Bag
from gigamil.parallel import pooling
from gigamil.parallel.collectives import SumOverRanks
from gigamil.testing import exactness
from gigamil.testing.compare import gradient_error
from gigamil.testing.exactness import Case, World, distributed, make_case_model, reference
from gigamil.testing.ranks import run_on_ranks
from gigamil.train import step
from gigamil.train.engine import DeepSpeedEngine, skip_kernel_build

NUM_RANKS = 2
SIZES = (9, 2, 6)
HALF, WHOLE, TWICE = (pytest.approx(share, rel=1e-4) for share in (1 / NUM_RANKS, 1.0, NUM_RANKS))
CASE = Case(SIZES, NUM_RANKS)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return run_on_ranks(measure_plain, NUM_RANKS)[0]


@pytest.fixture(scope="module")
def deepspeed() -> dict[Any, Any]:
    return run_on_ranks(measure_deepspeed, NUM_RANKS, timeout_s=240)[0]


def test_the_comparison_finds_the_right_step_right(plain: dict[str, Any], deepspeed: dict[Any, Any]) -> None:
    assert plain["right"]["error"] <= 1e-12
    assert all(deepspeed["right", stage]["error"] <= 1e-5 for stage in range(4))


@pytest.mark.parametrize("mistake", ["identity backward", "plain all_reduce in place"])
def test_a_sum_without_a_sum_in_backward_leaves_a_share_before_it(plain: dict[str, Any], mistake: str) -> None:
    found = plain[mistake]
    assert (found["encoder"], found["aggregator"], found["head"]) == (HALF, HALF, WHOLE)
    assert found["error"] > 0.1


def test_adam_hides_what_sgd_shows(plain: dict[str, Any]) -> None:
    sgd, adam = (plain[f"update by {name}"] for name in ("SGD", "AdamW"))
    assert sgd == HALF  # of the encoder's update
    assert adam == pytest.approx(1.0, rel=1e-3)


def test_a_maximum_that_is_not_detached_is_seen(plain: dict[str, Any]) -> None:
    assert plain["maximum with a gradient"]["error"] > 1e-3


def test_groups_without_their_factor_leave_a_share_of_everything(plain: dict[str, Any]) -> None:
    found = plain["groups without their factor"]
    assert (found["encoder"], found["aggregator"], found["head"]) == (HALF, HALF, HALF)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_sequence_parallel_size_in_the_deepspeed_config_leaves_gradients_unreduced(
    deepspeed: dict[Any, Any], stage: int
) -> None:
    # The mesh has one data-parallel rank, so nothing is averaged: each rank goes on with R times its own part, which is
    # R times the whole for the head.
    found = deepspeed["sequence_parallel_size", stage]
    assert found["head"] == TWICE
    assert found["encoder"] != pytest.approx(1.0, abs=0.1)
    assert found["error"] > 0.1


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_sequence_parallel_mpu_makes_gradients_too_large(deepspeed: dict[Any, Any], stage: int) -> None:
    # Summed over all ranks and divided by those of the data-parallel group, of which there is one. ZeRO 3 of this
    # DeepSpeed divides by all ranks and is right.
    found = deepspeed["mpu", stage]
    assert (found["encoder"], found["aggregator"], found["head"]) == (TWICE, TWICE, TWICE)


@pytest.mark.parametrize("stage", [1, 2])
def test_several_backwards_without_coalescing_lose_all_but_the_last(deepspeed: dict[Any, Any], stage: int) -> None:
    found = deepspeed["not coalesced", stage]
    assert (found["aggregator"], found["head"]) == (0.0, 0.0)  # the head's backward is the first
    assert 0 < found["encoder"] < 0.9


@pytest.mark.parametrize("stage", [1, 2])
def test_a_parameter_that_is_frozen_after_the_start_moves(deepspeed: dict[Any, Any], stage: int) -> None:
    assert deepspeed["frozen too late", stage] > 1e-4


def measure_plain(rank: int) -> dict[str, Any]:
    world = World(rank, NUM_RANKS)
    truth = reference(CASE).gradients

    def wrong(target: Any, name: str, value: object, case: Case = CASE) -> dict[str, float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, value)
            found = distributed(case, world).gradients
        return shares(found, reference(case).gradients)

    def identity(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None

    def in_place(values: Tensor, group: dist.ProcessGroup) -> Tensor:
        values = values.clone()
        dist.all_reduce(values, group=group)
        return values

    def unscaled(loss_B: Tensor, weight_B: Tensor, world_weight: float, num_groups: int) -> Tensor:
        return (loss_B * weight_B).sum() / world_weight

    def not_detached(bag: Bag, values_nX: Tensor) -> Tensor:
        start_BX = values_nX.new_full((bag.num_slides, values_nX.shape[1]), -100.0)
        result_BX = start_BX.scatter_reduce(
            0, bag.slide_index_n[:, None].expand_as(values_nX), values_nX, "amax"
        ).clone()
        with torch.no_grad():
            dist.all_reduce(result_BX, op=dist.ReduceOp.MAX)
        return result_BX

    parts = replace(CASE, aggregator="multi_head")  # attention takes its maximum in blocks, without a graph
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SumOverRanks, "backward", staticmethod(identity))
        halved = distributed(CASE, world).gradients
    return {
        "right": shares(distributed(CASE, world).gradients, truth),
        "identity backward": shares(halved, truth),
        "plain all_reduce in place": wrong(pooling, "sum_over_ranks", in_place),
        "maximum with a gradient": wrong(Bag, "segment_max", not_detached, parts),
        "groups without their factor": wrong(step, "group_loss", unscaled, Case(SIZES, group_size=1)),
        "update by SGD": update_share(torch.optim.SGD, halved, truth),
        "update by AdamW": update_share(torch.optim.AdamW, halved, truth),
    }


def measure_deepspeed(rank: int) -> dict[Any, Any]:
    skip_kernel_build()
    import deepspeed
    from deepspeed.runtime.sequence_parallel import parallel_state_sp

    world = World(rank, NUM_RANKS)
    truth = reference(CASE).gradients
    right_settings, initialize = exactness.case_settings, deepspeed.initialize

    def with_mesh(case: Case) -> dict[str, Any]:
        return right_settings(case) | {"sequence_parallel_size": NUM_RANKS, "data_parallel_size": 1}

    def with_mpu(**arguments: Any) -> Any:
        return initialize(mpu=parallel_state_sp, **arguments)

    def measured(stage: int, *patched: Any) -> dict[str, float]:
        with pytest.MonkeyPatch.context() as patch:
            if patched:
                patch.setattr(*patched)
            return shares(distributed(Case(SIZES, NUM_RANKS, zero_stage=stage), world).gradients, truth)

    found: dict[Any, Any] = {("right", stage): measured(stage) for stage in range(4)}
    for stage in (1, 2):
        not_coalesced = (DeepSpeedEngine, "one_reduction", lambda engine: nullcontext())
        found["not coalesced", stage] = measured(stage, *not_coalesced)
        found["frozen too late", stage] = largest_move_of_the_frozen(stage, world)
    for stage in range(3):
        found["sequence_parallel_size", stage] = measured(stage, exactness, "case_settings", with_mesh)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    parallel_state_sp.initialize_sequence_parallel(NUM_RANKS)
    for stage in range(3):
        found["mpu", stage] = measured(stage, deepspeed, "initialize", with_mpu)
    return found


def largest_move_of_the_frozen(stage: int, world: World) -> float:
    """A step of AdamW, then the encoder's `requires_grad` is taken away, then another: how far the encoder goes on."""
    case = Case(SIZES, NUM_RANKS, zero_stage=stage)
    ranks = world.ranks(NUM_RANKS)
    model = make_case_model(case, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = DeepSpeedEngine(model, optimizer, exactness.case_settings(case), torch.device("cpu"))
    images, label_S, weight_S = exactness.make_case_tiles(case)
    plan = exactness.make_plan(case, 1)
    tiles = exactness.own_tiles(images, plan, ranks.topology)
    training = exactness.make_step(case, engine, ranks)
    training.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.01])
    before = engine.state().parameters
    model.encoder.requires_grad_(False)
    training.train(plan, tiles, label_S, weight_S, step=1, learning_rates=[0.01], train_encoder=False)
    after = engine.state().parameters
    return max(float((after[name] - before[name]).abs().max()) for name in before if name.startswith("encoder."))


def update_share(kind: type[torch.optim.Optimizer], found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """By how much the encoder's first update is wrong."""
    moves = []
    for gradients in (found, truth):
        model = make_case_model(CASE, torch.float64)
        optimizer = kind(model.parameters(), lr=1e-3)  # type: ignore[call-arg]
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
        moves.append({name: parameter.detach() - before[name] for name, parameter in model.named_parameters()})
    return shares(*moves)["encoder"]


def shares(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The share of each part of the model, and the error as the exactness tests measure it."""
    result = {"error": gradient_error(found, truth)}
    for part in ("encoder", "aggregator", "head"):
        pairs = [(found[name].double(), truth[name].double()) for name in truth if name.startswith(f"{part}.")]
        result[part] = float(sum((a * b).sum() for a, b in pairs) / sum((b * b).sum() for _, b in pairs))
    return result
