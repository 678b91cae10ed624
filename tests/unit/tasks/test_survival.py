"""Survival: losses against their definitions written out, ties and censoring included."""

import itertools
import math

import pytest
import torch

from gigamil.errors import CohortError
from gigamil.tasks.survival import Cox, DiscreteSurvival, quantile_edges

NAN = math.nan
BINS = DiscreteSurvival((1.0, 2.0, 4.0))


def hazards(rows: int) -> torch.Tensor:
    return torch.randn(rows, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class TestDiscrete:
    @pytest.mark.parametrize(
        ("time", "event", "survived", "dies"),
        [
            (0.5, 1, 0, True),
            (0.5, 0, 0, False),  # nothing is known of it
            (1.0, 1, 0, True),  # a bin has its end
            (1.0, 0, 1, False),  # and who is censored then has survived it
            (1.5, 1, 1, True),
            (1.5, 0, 1, False),
            (9.0, 1, 3, False),  # in the bin without an end
            (9.0, 0, 3, False),
        ],
    )
    def test_the_loss_is_minus_the_logarithm_of_what_is_known(
        self, time: float, event: int, survived: int, *, dies: bool
    ) -> None:
        output_SK = hazards(6)
        hazard_SK = output_SK.sigmoid()
        wanted_S = -(1 - hazard_SK[:, :survived]).log().sum(1) - (hazard_SK[:, survived].log() if dies else 0)
        found_S = BINS.losses(output_SK, torch.tensor([[time, event]] * 6, dtype=torch.float64))
        torch.testing.assert_close(found_S, wanted_S, rtol=1e-9, atol=1e-12)

    def test_probabilities_of_all_that_can_happen_sum_to_1(self) -> None:
        output_SK, events = hazards(5), [0.5, 1.5, 3.0, 9.0]
        targets = [torch.tensor([[time, 1.0]] * 5, dtype=torch.float64) for time in events]
        censored = torch.tensor([[1e9, 0.0]] * 5, dtype=torch.float64)
        total_S: torch.Tensor = sum(torch.exp(-BINS.losses(output_SK, target)) for target in targets)
        torch.testing.assert_close(total_S, torch.ones(5, dtype=torch.float64))
        last_S = torch.exp(-BINS.losses(output_SK, censored))
        torch.testing.assert_close(last_S, BINS.predict(output_SK)[:, 3])  # beyond the last edge

    def test_more_hazard_is_more_risk_and_less_survival(self) -> None:
        low, high = BINS.predict(torch.full((1, 3), -2.0)), BINS.predict(torch.full((1, 3), 1.0))
        assert BINS.predicted_names == ("risk", "survival_1", "survival_2", "survival_4")
        assert high[0, 0] > low[0, 0]
        assert (high[0, 1:] < low[0, 1:]).all()
        assert (low[0, 1:].diff() < 0).all()

    def test_bins_have_equally_many_events(self) -> None:
        times, events = list(range(1, 13)), [1] * 8 + [0] * 4
        edges = quantile_edges(times, events, 4)
        counts = [
            sum(low < t <= high for t, e in zip(times, events, strict=True) if e)
            for low, high in itertools.pairwise((0, *edges, 99))
        ]
        assert counts == [2] * 4

    def test_too_few_times_for_the_bins_are_refused(self) -> None:
        with pytest.raises(CohortError, match=r"1 different times of events .* do not make 4 bins"):
            quantile_edges([1.0, 2.0, 3.0, 4.0], [1, 0, 0, 0], 4)
        with pytest.raises(CohortError, match="too many are at one time"):
            quantile_edges([1.0] * 20 + [2.0, 3.0, 4.0], [1] * 23, 4)


def partial_likelihood(risks: list[float], times: list[float], events: list[int]) -> float:
    """Efron's, written as in the textbook: over times of events, the product over the tied ones."""
    total = 0.0
    for time in sorted({t for t, e in zip(times, events, strict=True) if e}):
        tied = [r for r, t, e in zip(risks, times, events, strict=True) if t == time and e]
        at_risk = sum(math.exp(r) for r, t in zip(risks, times, strict=True) if t >= time)
        for number, risk in enumerate(tied):
            total += risk - math.log(at_risk - number / len(tied) * sum(math.exp(r) for r in tied))
    return total


class TestCox:
    times = (5.0, 3.0, 3.0, 8.0, 3.0, 1.0, 5.0)
    events = (1, 1, 1, 0, 0, 1, 1)

    def target(self) -> torch.Tensor:
        return torch.tensor([*zip(self.times, self.events, strict=True)], dtype=torch.float64)

    def test_it_is_the_mean_over_events_of_efrons_likelihood(self) -> None:
        risk_S = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        task = Cox()
        weight_S = task.weights(self.target())
        assert weight_S.tolist() == [1, 1, 1, 0, 0, 1, 1]
        found = (task.losses(risk_S[:, None], self.target()) * weight_S).sum()
        wanted = -partial_likelihood(risk_S.tolist(), list(self.times), list(self.events))
        assert float(found) == pytest.approx(wanted, rel=1e-12)

    def test_the_order_of_slides_does_not_matter(self) -> None:
        risk_S, order = torch.randn(7, dtype=torch.float64), torch.tensor([6, 2, 0, 5, 1, 4, 3])
        first, second = (
            Cox().losses(risk_S[:, None], self.target()),
            Cox().losses(risk_S[order][:, None], self.target()[order]),
        )
        torch.testing.assert_close(first.sum(), second.sum(), rtol=1e-12, atol=0)

    def test_gradients_are_those_of_differences_and_far_risks_stay_finite(self) -> None:
        risk_S1 = torch.randn(7, 1, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda r: Cox().losses(r, self.target()).sum(), risk_S1)
        far_S1 = torch.tensor(
            [[900.0], [-900.0], [0.0], [5.0], [-5.0], [300.0], [0.0]], dtype=torch.float64, requires_grad=True
        )
        loss = Cox().losses(far_S1, self.target()).sum()
        loss.backward()
        assert torch.isfinite(loss)
        assert far_S1.grad is not None
        assert torch.isfinite(far_S1.grad).all()

    def test_slides_of_whom_nothing_is_known_are_in_no_risk_set(self) -> None:
        risk_S1 = torch.randn(8, 1, dtype=torch.float64)
        with_unknown = torch.cat([self.target(), torch.tensor([[NAN, NAN]], dtype=torch.float64)])
        found_S = Cox().losses(risk_S1, with_unknown)
        assert found_S[7] == 0
        torch.testing.assert_close(found_S[:7], Cox().losses(risk_S1[:7], self.target()), rtol=1e-12, atol=0)

    def test_a_step_without_events_costs_nothing(self) -> None:
        target_SX = torch.tensor([[1.0, 0.0], [2.0, 0.0]], dtype=torch.float64)
        risk_S1 = torch.randn(2, 1, dtype=torch.float64, requires_grad=True)
        Cox().losses(risk_S1, target_SX).sum().backward()
        assert risk_S1.grad is not None
        assert risk_S1.grad.tolist() == [[0.0], [0.0]]
        assert Cox().weights(target_SX).sum() == 0
