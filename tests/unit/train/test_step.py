"""One process of the exact step: what it reports, what it leaves alone, and how it predicts. (Ranks: tests/distributed.)"""

import math

import pytest
import torch
from torch import Tensor

from gigamil.data.pipeline import DrawKeys, StepTiles
from gigamil.errors import TrainingError
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import StepPlan, plan_steps
from gigamil.testing.exactness import Case, make_case_model, make_case_tiles, own_tiles, slide_names
from gigamil.testing.memory import NoMemoryInBackward
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.step import ExactStep, Ranks, fit_chunk, measure_chunk_bytes

CASE = Case((5, 1, 3), group_size=1)


def make_step(num_keep: int = 1, loss=cross_entropy, augment=None, chunk: int = 2, pad: bool = False) -> ExactStep:
    model = make_case_model(CASE, torch.float64)
    head = [p for name, p in model.named_parameters() if not name.startswith("encoder.")]
    groups = [{"params": list(model.encoder.parameters())}, {"params": head}]
    engine = PlainEngine(model, torch.optim.SGD(groups, lr=0.1))
    keys = DrawKeys(0, slide_names(CASE))
    settings = {"chunk": chunk, "num_keep": num_keep, "keys": keys, "augment": augment, "pad": pad}
    return ExactStep(engine, Ranks(Topology()), loss, **settings)


def make_input() -> tuple[StepPlan, StepTiles, Tensor, Tensor]:
    images, label_S, weight_S = make_case_tiles(CASE)
    plan = plan_steps(range(3), CASE.sizes, 3, 1, 1)[0]
    return plan, own_tiles(images, plan, Topology()), label_S, weight_S


def parameters(step: ExactStep) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in step.engine.module.named_parameters()}


def changed(step: ExactStep, before: dict[str, Tensor]) -> set[str]:
    return {name for name, p in step.engine.module.named_parameters() if not torch.equal(p, before[name])}


def test_a_step_reports_its_loss_and_moves_every_parameter() -> None:
    step, (plan, tiles, label_S, weight_S) = make_step(), make_input()
    before = parameters(step)
    result = step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.1, 0.1])
    assert result.skipped == ()
    assert result.slide_loss_S.shape == (3,)
    assert result.loss == pytest.approx(float((result.slide_loss_S * weight_S).sum() / weight_S.sum()), rel=1e-15)
    assert result.grad_norm > 0
    assert changed(step, before) == set(before)
    assert all(p.grad is None for p in step.engine.module.parameters())


def test_gradients_of_plain_sgd_and_the_reported_norm() -> None:
    step, (plan, tiles, label_S, weight_S) = make_step(), make_input()
    before = parameters(step)
    result = step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.5, 0.25])
    rates = {name: 0.5 if name.startswith("encoder.") else 0.25 for name in before}
    moved = [(before[name] - p.detach()) / rates[name] for name, p in step.engine.module.named_parameters()]
    norm = float(torch.cat([values.flatten() for values in moved]).norm())
    assert norm == pytest.approx(result.grad_norm, rel=1e-10)


def test_a_loss_that_is_not_finite_skips_the_step_and_names_the_slide() -> None:
    def broken(logits_BK: Tensor, label_B: Tensor) -> Tensor:
        return cross_entropy(logits_BK, label_B) * torch.tensor([1.0, math.nan, math.inf])

    step, (plan, tiles, label_S, weight_S) = make_step(loss=broken), make_input()
    before = parameters(step)
    result = step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.1, 0.1])
    assert (result.skipped, result.grad_norm) == ((1, 2), 0.0)
    assert not math.isfinite(result.loss)
    assert math.isfinite(result.slide_loss_S[0])
    assert changed(step, before) == set()
    step._loss = cross_entropy  # nothing of the skipped step is left for the next one
    again, fresh = (
        s.train(plan, tiles, label_S, weight_S, step=1, learning_rates=[0.1, 0.1]) for s in (step, make_step())
    )
    assert again.grad_norm == fresh.grad_norm


def test_a_frozen_encoder_is_encoded_once_and_does_not_move() -> None:
    step, (plan, tiles, label_S, weight_S) = make_step(num_keep=0), make_input()
    calls = []
    encode = step.engine.encode
    step.engine.encode = lambda image, key: calls.append(torch.is_grad_enabled()) or encode(image, key)
    before = parameters(step)
    step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.0, 0.1], train_encoder=False)
    assert calls == [False] * 5
    moved = changed(step, before)
    assert moved == {name for name in before if not name.startswith("encoder.")}


@pytest.mark.parametrize(("num_keep", "calls"), [(0, 10), (1, 9), (5, 5), (2**31 - 1, 5)])
def test_chunks_that_are_not_kept_are_encoded_twice(num_keep: int, calls: int) -> None:
    step, (plan, tiles, label_S, weight_S) = make_step(num_keep), make_input()
    seen = []
    encode = step.engine.encode
    step.engine.encode = lambda image, key: seen.append(len(image)) or encode(image, key)
    step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.1, 0.1])
    assert len(seen) == calls
    assert seen[:5] == [2, 2, 2, 2, 1]


def test_prediction_draws_nothing_and_keeps_nothing() -> None:
    def refuse(image: Tensor, key: Tensor) -> Tensor:
        raise AssertionError("prediction must not augment")

    step, (plan, tiles, _, _) = make_step(augment=refuse), make_input()
    logits_SK, attention_nA = step.evaluate(plan, tiles)
    assert (logits_SK.shape, logits_SK.dtype) == ((3, 3), torch.float64)
    assert not logits_SK.requires_grad
    sums = torch.zeros(3, 2, dtype=torch.float64).index_add(0, tiles.slide_index_n, attention_nA)
    torch.testing.assert_close(sums, torch.ones(3, 2, dtype=torch.float64), rtol=1e-14, atol=1e-14)
    again_SK, _ = step.evaluate(plan, tiles)
    assert torch.equal(again_SK, logits_SK)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_prediction_does_not_depend_on_the_chunk(chunk: int) -> None:
    plan, tiles, _, _ = make_input()
    found, wanted = (make_step(chunk=size).evaluate(plan, tiles) for size in (chunk, 2))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_slides_are_predicted_apart_as_together() -> None:
    plan, tiles, _, _ = make_input()
    together_SK, _ = make_step().evaluate(plan, tiles)
    images, _, _ = make_case_tiles(CASE)
    for slide in range(3):
        alone = plan_steps([slide], CASE.sizes, 1, 1, 1)[0]
        logits_SK, _ = make_step().evaluate(alone, own_tiles(images, alone, Topology()))
        torch.testing.assert_close(logits_SK[0], together_SK[slide], rtol=1e-12, atol=1e-14)


def test_a_chunk_of_twice_the_tiles_costs_twice_the_bytes() -> None:
    step = make_step()
    one, two = (measure_chunk_bytes(step.engine, chunk, 32) for chunk in (8, 16))
    assert one > 8 * 3 * 32 * 32 * 8  # at least the images themselves
    assert two == pytest.approx(2 * one, rel=0.02)
    assert all(p.grad is None for p in step.engine.module.parameters())


def shrink_the_device(step: ExactStep, limit: int) -> list[int]:
    """No memory for a graph of more tiles than the limit; gives the sizes of the calls with a graph, as they come."""
    sizes: list[int] = []

    def check(_module: object, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():
            sizes.append(len(args[0]))
            if len(args[0]) > limit:
                raise torch.OutOfMemoryError("injected")

    step.engine.module.encoder.backbone.register_forward_pre_hook(check)
    return sizes


def assert_trained_alike(small: ExactStep, large: ExactStep) -> None:
    """One step of each gives the same weights."""
    plan, tiles, label_S, weight_S = make_input()
    for step in (small, large):
        step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.1, 0.1])
    for name, values in parameters(small).items():
        torch.testing.assert_close(values, parameters(large)[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chunk", [1, 2, 64])
def test_kept_graphs_are_given_up_before_calls_become_smaller(chunk: int) -> None:
    small, large = make_step(9, chunk=chunk), make_step(9, chunk=chunk)
    small.engine.module.encoder.backbone.register_forward_hook(
        lambda _module, _args, output: NoMemoryInBackward.apply(output) if small.num_keep else output
    )
    assert_trained_alike(small, large)
    assert (small.num_keep, small.chunk) == (0, chunk)


def test_padded_chunks_are_halved_in_the_second_pass_too() -> None:
    small, large = make_step(0, chunk=8, pad=True), make_step(0, chunk=8, pad=True)
    sizes = shrink_the_device(small, 2)
    assert_trained_alike(small, large)
    # 9 tiles: a call of 8 in parts of 2, and one of 1, filled up to the size of the day.
    assert sizes == [8, 4, 2, 2, 4, 2, 2, 2]


@pytest.mark.parametrize("place", ["first pass", "replay"])
def test_a_last_chunk_counts_with_the_rows_that_fill_it_up(place: str) -> None:
    small, large = make_step(0, chunk=8, pad=True), make_step(0, chunk=8, pad=True)
    encoder, sizes = small.engine.module.encoder, []

    def check(_module: object, args: tuple[Tensor, ...]) -> None:
        sizes.append(len(args[0]))
        # The first call fits, as there are no embeddings, or gradients, yet.
        is_full = len(sizes) > 1 if place == "first pass" else next(encoder.parameters()).grad is not None
        if is_full and len(args[0]) > 4 and torch.is_grad_enabled() == (place == "replay"):
            raise torch.OutOfMemoryError("injected")

    encoder.backbone.register_forward_pre_hook(check)
    assert_trained_alike(small, large)
    assert small.chunk == 4
    assert sizes == ([8, 8, 4, 8, 4] if place == "first pass" else [8, 8, 8, 8, 4])


def test_a_padded_chunk_is_not_cut_further_than_its_call() -> None:
    small, large = make_step(0, chunk=64, pad=True), make_step(0, chunk=64, pad=True)
    sizes = shrink_the_device(small, 20)
    assert_trained_alike(small, large)
    assert sizes == [64, 32, 16]  # 9 tiles in each
    assert small.chunk == 16


@pytest.mark.parametrize("num_keep", [0, 9])
def test_a_padded_backward_without_memory_halves_the_call_that_was_made(num_keep: int) -> None:
    small, large = make_step(num_keep, chunk=64, pad=True), make_step(num_keep, chunk=64, pad=True)
    small.engine.module.encoder.backbone.register_forward_hook(
        lambda _module, _args, output: NoMemoryInBackward.apply(output) if len(output) > 20 else output
    )
    assert_trained_alike(small, large)
    assert small.chunk == 16


@pytest.mark.parametrize("num_keep", [0, 9])
@pytest.mark.parametrize("pad", [False, True])
def test_a_device_without_memory_for_one_tile_ends_the_step(num_keep: int, pad: bool) -> None:
    plan, tiles, label_S, weight_S = make_input()
    step = make_step(num_keep, chunk=64, pad=pad)
    step.engine.module.encoder.backbone.register_forward_hook(
        lambda _module, _args, output: NoMemoryInBackward.apply(output)
    )
    before = parameters(step)
    with pytest.raises(TrainingError, match="no memory for a single tile"):
        step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.1, 0.1])
    assert (step.chunk, step.num_keep, changed(step, before)) == (1, 0, set())


def test_a_first_chunk_that_does_not_fit_is_halved_before_training() -> None:
    step = make_step()
    wanted = measure_chunk_bytes(step.engine, 3, 32)
    sizes = shrink_the_device(step, 5)
    assert fit_chunk(step.engine, Ranks(Topology()), 13, 32) == (3, wanted)
    assert sizes == [13, 6, 3]
    shrink_the_device(step, 0)
    with pytest.raises(TrainingError, match="no memory for a single tile"):
        fit_chunk(step.engine, Ranks(Topology()), 4, 32)
