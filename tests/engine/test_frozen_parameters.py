"""Encoders of which a part is fixed, at every ZeRO stage: that part keeps every bit, the rest learns as in one process.

DeepSpeed's own access to parameters knows nothing of those that no optimiser has; here they are saved and loaded too.
One start of two ranks measures stages 1 and 3, which load what they saved at 2 and 0 too; another, slow, measures these.
Bounds: sums of float32 in another order, after four steps of Adam.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from gigamil.config.schema import RunConfig
from gigamil.data.augment import augment_tiles
from gigamil.data.pipeline import DrawKeys
from gigamil.models.blocks import parameters_by_rate
from gigamil.models.slide_model import SlideModel, build_model
from gigamil.parallel.topology import Topology
from gigamil.partition.schedule import plan_steps
from gigamil.testing.exactness import AUGMENT, SEED, Case, make_case_tiles, own_tiles, slide_names
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.engine import (
    DeepSpeedEngine,
    TrainingState,
    deepspeed_config,
    make_optimizer,
    make_ranks,
    skip_kernel_build,
)
from gigamil.train.loss import cross_entropy
from gigamil.train.plain import PlainEngine
from gigamil.train.schedule import learning_rates
from gigamil.train.step import ExactStep, Ranks

QUICK_STAGES, SLOW_STAGES, NUM_STAGES = (1, 3), (0, 2), 4
CLIP_NORM = 0.05  # less than the norm of any of these gradients: all of them are clipped
CASE = Case((5, 1, 4), 2)
NUM_CLASSES = 3
STATE_BOUND, NORM_BOUND = 5e-6, 1e-5
ENCODERS: dict[str, dict[str, Any]] = {
    "freeze": {"name": "small_cnn", "options": {"width": 4, "dropout": 0.25}, "freeze_blocks": 1},
    "all": {"name": "small_cnn", "options": {"width": 4}, "freeze_blocks": 4},
    "lora": {"name": "timm/test_vit", "options": {"img_size": 16, "depth": 1}, "lora_rank": 2, "freeze_blocks": 1},
}


@cache
def measured(stages: tuple[int, ...]) -> list[dict[str, dict[int, dict[str, Any]]]]:
    """What each of two ranks found, by encoder and stage."""
    pytest.importorskip("timm")
    return run_on_ranks(measure, 2, 2, stages, timeout_s=240)


@pytest.fixture(
    params=[*QUICK_STAGES, *(pytest.param(stage, marks=pytest.mark.slow) for stage in SLOW_STAGES)],
    ids="zero-{}".format,
)
def stage(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=ENCODERS)
def found(request: pytest.FixtureRequest, stage: int) -> list[dict[str, Any]]:
    """Of each rank, for an encoder and a stage."""
    return [ranks[request.param][stage] for ranks in measured(SLOW_STAGES if stage in SLOW_STAGES else QUICK_STAGES)]


def test_what_is_fixed_keeps_every_bit_and_the_rest_moves(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["fixed"]
        assert rank["unmoved"] == rank["fixed"]


def test_the_rest_learns_as_in_one_process(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["norms"] == pytest.approx(rank["plain norms"], rel=NORM_BOUND)  # Adam would hide a factor
        assert min(rank["norms"]) > 2 * CLIP_NORM
        assert rank["against plain"] <= STATE_BOUND


def test_the_state_has_every_parameter_and_moments_of_what_is_trained(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["names"] == rank["plain names"]
        assert rank["moments"] == sorted(
            f"{name}/{moment}"
            for name in rank["names"]
            if name not in rank["fixed"] and name not in rank["buffers"]
            for moment in ("exp_avg", "exp_avg_sq")
        )


def test_a_state_is_loaded_bit_for_bit_at_its_stage_and_at_another(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["differs before"]  # so that loading has something to do, for fixed parameters too
        assert rank["loaded"] == {"same": True, "other": True}
        assert rank["continued"]["same"] == 0.0
        assert rank["continued"]["other"] <= STATE_BOUND


class Training:
    """Steps over a fixed set of slides, through DeepSpeed on all ranks, or (stage None) in this process alone."""

    def __init__(self, encoder: str, stage: int | None, rank: int, num_ranks: int, seed: int = SEED) -> None:
        science = {
            "seed": seed,
            "encoder": ENCODERS[encoder],
            "optim": {
                "clip_norm": CLIP_NORM,
                "layer_decay": 0.5,
                "lr_encoder": 1e-3,
                "lr_head": 2e-3,
                "warmup_steps": 0,
            },
        }
        self.config = RunConfig.model_validate(
            {"science": science, "execution": {"zero_stage": stage or 0, "device": "cpu"}}
        )
        model = build_model(self.config.science, NUM_CLASSES).train()
        self.fixed = sorted(name for name, p in model.named_parameters() if not p.requires_grad)
        self.buffers = [name for name, _ in model.named_buffers()]
        _set_updates(model)
        self._shares = tuple(parameters_by_rate(model.encoder.backbone, 0.5))
        optimizer = make_optimizer(model, self.config)
        ranks = Ranks(Topology(1, 0, 0, 1, 1))
        if stage is None:
            self.engine: Any = PlainEngine(model, optimizer, CLIP_NORM)
        else:
            self.engine = DeepSpeedEngine(model, optimizer, deepspeed_config(self.config), torch.device("cpu"))
            ranks = make_ranks(Topology(num_ranks, rank, rank, num_ranks, num_ranks))
        self._topology = ranks.topology
        self._step = ExactStep(
            self.engine,
            ranks,
            cross_entropy,
            chunk=3,
            num_keep=1,
            keys=DrawKeys(SEED, slide_names(CASE)),
            augment=lambda image, key: augment_tiles(image, key, AUGMENT),
        )

    def run(self, start: int, stop: int) -> list[float]:
        """Steps start..stop-1; their draws depend on their number. Returns the gradient norms before clipping."""
        images, label_S, weight_S = make_case_tiles(CASE)
        plan = plan_steps(range(len(CASE.sizes)), CASE.sizes, len(CASE.sizes), 1, self._topology.group_size)[0]
        tiles = own_tiles(images, plan, self._topology)
        norms = []
        for number in range(start, stop):
            rates = learning_rates(self.config.science.optim, number, 4, True, self._shares)
            result = self._step.train(
                plan,
                tiles,
                label_S,
                weight_S,
                step=number,
                learning_rates=rates,
                train_encoder=bool(self._shares),
            )
            norms.append(result.grad_norm)
        return norms


def _set_updates(model: SlideModel) -> None:
    """LoRA's B is zero at the start, and A's gradient with it."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(number))


def measure(rank: int, num_ranks: int, stages: tuple[int, ...]) -> dict[str, dict[int, dict[str, Any]]]:
    skip_kernel_build()
    return {encoder: measure_encoder(encoder, stages, rank, num_ranks) for encoder in ENCODERS}


def measure_encoder(encoder: str, stages: tuple[int, ...], rank: int, num_ranks: int) -> dict[int, dict[str, Any]]:
    plain = Training(encoder, None, rank, num_ranks)
    plain_norms = plain.run(0, 4)
    plain_values = {name: value.detach().clone() for name, value in plain.engine.module.state_dict().items()}
    found = {}
    for stage in stages:
        training = Training(encoder, stage, rank, num_ranks)
        start = training.engine.state()
        norms = training.run(0, 2)
        middle = training.engine.state()
        norms += training.run(2, 4)
        final = training.engine.state()
        trained = [name for name in start.parameters if name not in training.buffers]
        found[stage] = {
            "fixed": training.fixed,
            "buffers": training.buffers,
            "unmoved": sorted(n for n in trained if torch.equal(start.parameters[n], final.parameters[n])),
            "norms": norms,
            "plain norms": plain_norms,
            "against plain": largest_difference(final.parameters, plain_values),
            "names": sorted(final.parameters),
            "plain names": sorted(plain_values),
            "moments": sorted(final.moments),
            "loaded": {},
            "continued": {},
        }
        for title, other in (("same", stage), ("other", (stage + 1) % NUM_STAGES)):
            again = Training(encoder, other, rank, num_ranks, seed=SEED + 1)
            before = again.engine.state().parameters
            found[stage]["differs before"] = any(
                not torch.equal(before[name], middle.parameters[name]) for name in training.fixed
            )
            again.engine.load_state(middle)
            found[stage]["loaded"][title] = is_equal(again.engine.state(), middle)
            again.run(2, 4)
            found[stage]["continued"][title] = largest_difference(again.engine.state().parameters, final.parameters)
    return found


def is_equal(found: TrainingState, wanted: TrainingState) -> bool:
    a, b = found.parameters | found.moments, wanted.parameters | wanted.moments
    same = a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
    return same and found.optimizer_steps == wanted.optimizer_steps


def largest_difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest ||d|| / ||parameter|| over parameters."""
    return max(float((found[name] - value).norm() / value.norm()) for name, value in wanted.items())
