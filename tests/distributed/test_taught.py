"""Tiles taught by a bag model: the gradient of plain autograd over all tiles at once, whatever ranks and chunks; and the weights."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from gigamil.data.augment import to_float
from gigamil.data.pipeline import DrawKeys
from gigamil.models.bag import Bag, LocalPool
from gigamil.models.slide_model import SlideModel
from gigamil.partition.schedule import plan_steps
from gigamil.testing import exactness
from gigamil.testing.compare import gradient_error
from gigamil.testing.exactness import (
    Case,
    World,
    make_case_model,
    make_case_tiles,
    own_tiles,
    plain_engine,
    slide_names,
)
from gigamil.testing.ranks import run_on_ranks
from gigamil.train.taught import TaughtStep, confidence

SHAPES = ((5, 3, 4), (2,))  # with empty ranks at 3 and 4
BETA = 2.0


def _models(case: Case) -> tuple[SlideModel, SlideModel]:
    """Student and teacher, apart from each other."""
    student, teacher = (make_case_model(case, torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return student, teacher


def _attention(slide: int, size: int) -> Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(slide), dtype=torch.float64)


def _found(rank: int, num_ranks: int, name: str, trusted: bool) -> list[tuple[float, float]]:
    """Relative errors of loss and gradient of every shape, group size and chunk."""
    world, errors = World(rank, num_ranks), []
    for sizes in SHAPES:
        wanted_loss, wanted = _reference(Case(sizes, 1, name, random=False), trusted)
        for group_size in exactness.group_sizes(num_ranks):
            for chunk in (1, 3, 100):
                case = Case(sizes, group_size, name, chunk=chunk, random=False)
                ranks = world.ranks(group_size)
                engine = plain_engine(case, ranks)
                student, teacher = _models(case)
                engine.module.load_state_dict(student.state_dict())
                images, label_S, weight_S = make_case_tiles(case)
                (plan,) = plan_steps(range(len(sizes)), sizes, len(sizes), ranks.topology.num_groups, group_size)

                def trust(slide: int, number_n: Tensor, sizes: tuple[int, ...] = sizes) -> Tensor:
                    return confidence(_attention(slide, sizes[slide]), BETA)[number_n]

                step = TaughtStep(
                    engine,
                    ranks,
                    teacher,
                    chunk=chunk,
                    keys=DrawKeys(0, slide_names(case)),
                    trust=trust if trusted else None,
                )
                tiles = own_tiles(images, plan, ranks.topology)
                result = step.train(plan, tiles, label_S, weight_S, step=0, learning_rates=[0.0, 0.0])
                loss_error = abs(result.loss - wanted_loss) / abs(wanted_loss)
                errors.append((loss_error, gradient_error(engine.gradients, wanted)))
    return errors


def _reference(case: Case, trusted: bool) -> tuple[float, dict[str, Tensor]]:
    """All tiles in one call of torch's own divergence."""
    student, teacher = (model.eval() for model in _models(case))
    images, _, _ = make_case_tiles(case)
    image_nCHW = to_float(torch.cat(images), torch.float64)

    def says(model: SlideModel, embedding_nD: Tensor) -> tuple[Tensor, Tensor]:
        num = len(embedding_nD)
        bag = Bag(embedding_nD, torch.zeros((num, 2), dtype=torch.float64), (1,) * num, LocalPool(num))
        logits, pooled = model("classify", bag)
        return logits, pooled.slide_BX

    def divergence(taught: Tensor, said: Tensor) -> Tensor:
        return kl_div(said.log_softmax(1), taught.softmax(1), reduction="none").sum(1)

    with torch.no_grad():
        taught_nD = teacher("encode", image_nCHW, None)
        taught_nK, taught_nX = says(teacher, taught_nD)
    said_nK, _ = says(student, student("encode", image_nCHW, None))
    head_nK, head_nX = says(student, taught_nD)
    trust = [confidence(_attention(slide, size), BETA) for slide, size in enumerate(case.sizes)]
    trust_n = torch.cat(trust) if trusted else torch.ones(len(image_nCHW), dtype=torch.float64)
    loss_n = trust_n * divergence(taught_nK, said_nK) + 0.5 * divergence(taught_nK, head_nK)
    if student.head is not None:
        loss_n = loss_n + 0.5 * divergence(taught_nX, head_nX)
    loss_n.mean().backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}
    return loss_n.mean().item(), gradients


@pytest.mark.parametrize("name", ["gated_attention", "mean"])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_any_ranks_and_chunks_have_the_gradient_of_one_call(num_ranks: int, name: str) -> None:
    results = [_found(0, 1, name, True)] if num_ranks == 1 else run_on_ranks(_found, num_ranks, num_ranks, name, True)
    for of_rank in results:
        for loss_error, error in of_rank:
            assert loss_error <= 1e-12
            assert error <= 1e-12


def test_without_trust_all_tiles_count_alike() -> None:
    for loss_error, error in _found(0, 1, "gated_attention", False):
        assert loss_error <= 1e-12
        assert error <= 1e-12


def test_confidence_trusts_both_ends() -> None:
    attention = torch.tensor([0.1, 0.2, 0.3, 0.5], dtype=torch.float64)
    assert confidence(attention, 2.0).tolist() == pytest.approx([1.0, 0.25, 0.0, 1.0])
    assert confidence(attention, 0.0).tolist() == [1.0] * 4
    assert confidence(torch.full((3,), 0.2), 2.0).tolist() == [1.0] * 3  # all alike: nothing to tell them apart
