"""Time until an event that has not come yet for everybody: the target is (time, 1 if the event came then, else 0).

A slide whose event has not come by its time is censored: of it is known only that the event comes later.

Shapes: as in task.py; X = 2, B bins of time, E events.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gigamil.errors import CohortError
from gigamil.tasks.task import Task, filled


@dataclass(frozen=True)
class DiscreteSurvival(Task):
    """Hazards in bins of time: output b is the logit of P(event in bin b | none before), of every bin but the last.

    The last bin has no end: who survives the others has its event in it. The loss of a slide is -log of the probability of what
    is known: of an event in bin b that it survived the bins before and not b, of a censored one that it survived the bins that
    had ended by then. It needs one slide, so any number of slides per step trains.

    Args:
        edges: ends of all bins but the last, which has none; ascending, above 0 (`quantile_edges`).
    Source: Gensheimer and Narasimhan 2019, arXiv:1805.00917; Zadeh and Schmid 2021, doi:10.1109/TPAMI.2020.2979450.
    """

    edges: tuple[float, ...]

    @property
    def num_outputs(self) -> int:
        """One per bin that has an end."""
        return len(self.edges)

    @property
    def num_targets(self) -> int:
        """Time and event."""
        return 2

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """Risk, and the probability of survival beyond each edge."""
        return ("risk", *(f"survival_{edge:.6g}" for edge in self.edges))

    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """-log P of what is known."""
        time_S, event_S, is_known_S = _times(target_SX)
        edge_E = time_S.new_tensor(self.edges)
        bin_S = torch.bucketize(time_S, edge_E)  # edge b - 1 < time <= edge b
        number_K = torch.arange(self.num_outputs, device=output_SK.device)
        survived_SK = number_K < bin_S[:, None]
        # A censored slide whose time is the end of its bin has survived that too.
        is_at_end_S = torch.isin(time_S, edge_E) & (event_S == 0)
        survived_SK = survived_SK | ((number_K == bin_S[:, None]) & is_at_end_S[:, None])
        dies_SK = (number_K == bin_S[:, None]) & (event_S == 1)[:, None]
        loss_SK = filled(functional.softplus(output_SK), survived_SK)  # -log(1 - hazard)
        loss_SK = loss_SK + filled(functional.softplus(-output_SK), dies_SK)  # -log hazard
        return filled(loss_SK.sum(dim=1), is_known_S)

    def weights(self, target_SX: Tensor) -> Tensor:
        """1; 0 where nothing is known."""
        return _times(target_SX)[2].double()

    def predict(self, output_SK: Tensor) -> Tensor:
        """Risk: minus the mean number of bins that are survived; then survival beyond each edge."""
        survival_SK = torch.cumprod(torch.sigmoid(-output_SK.double()), dim=1)
        return torch.cat([-survival_SK.sum(dim=1, keepdim=True), survival_SK], dim=1)


@dataclass(frozen=True)
class Cox(Task):
    """Proportional hazards: the output is the logarithm of a slide's hazard, relative to the others of its step.

    The loss is the negative partial log-likelihood with Efron's correction for events at the same time, a mean over the events
    of the step. Every slide is compared with all that were at risk when it had its event, so a step should have many slides
    (`science.slides_per_step`); a step without an event teaches nothing. The gradient is exact whatever the ranks: all outputs
    of the step are gathered, K = 1 number per slide.

    Source: Cox 1972; Efron 1977, doi:10.1080/01621459.1977.10480613.
    """

    couples_slides: ClassVar[bool] = True

    @property
    def num_outputs(self) -> int:
        """The logarithm of the relative hazard."""
        return 1

    @property
    def num_targets(self) -> int:
        """Time and event."""
        return 2

    @property
    def predicted_names(self) -> tuple[str, ...]:
        """Logarithm of the relative hazard: more means earlier."""
        return ("risk",)

    def losses(self, output_SK: Tensor, target_SX: Tensor) -> Tensor:
        """Of each slide with an event, log of the hazards at risk less its own; 0 of the others. Cost: S^2."""
        time_S, event_S, is_known_S = _times(target_SX)
        risk_S, has_event_S = output_SK[:, 0], (event_S == 1) & is_known_S
        at_risk_SS = (time_S[None, :] >= time_S[:, None]) & is_known_S[None, :]
        ties_SS = (time_S[None, :] == time_S[:, None]) & has_event_S[None, :] & has_event_S[:, None]
        nobody = torch.tensor(-torch.inf, dtype=risk_S.dtype, device=risk_S.device)
        own_SS = torch.eye(len(risk_S), dtype=torch.bool, device=risk_S.device)  # no row of a logsumexp is empty
        everyone_S = torch.logsumexp(torch.where(at_risk_SS | own_SS, risk_S[None, :], nobody), dim=1)
        tied_S = torch.logsumexp(torch.where(ties_SS | own_SS, risk_S[None, :], nobody), dim=1)
        # The l-th of d events at one time: l / d of those that have it are taken to be gone.
        before_S = (ties_SS & torch.ones_like(ties_SS).tril(-1)).sum(dim=1)
        share_S = (before_S / ties_SS.sum(dim=1).clamp(min=1)).to(risk_S)
        left_S = everyone_S + torch.log1p(-share_S * torch.exp(tied_S - everyone_S))
        return filled(left_S - risk_S, has_event_S)

    def weights(self, target_SX: Tensor) -> Tensor:
        """1 of a slide with an event, 0 of the others: the mean is over events."""
        _, event_S, is_known_S = _times(target_SX)
        return ((event_S == 1) & is_known_S).double()

    def predict(self, output_SK: Tensor) -> Tensor:
        """The risk."""
        return output_SK.double()


def quantile_edges(times: Sequence[float], events: Sequence[float], num_bins: int) -> tuple[float, ...]:
    """Ends of bins with as equally many events of the training slides each as ties allow; the last bin has no end.

    Raises:
        CohortError: there are fewer different times of events than bins, or a bin would have no event.
    """
    event_times = torch.tensor(
        [time for time, event in zip(times, events, strict=True) if event == 1], dtype=torch.float64
    )
    if len(event_times.unique()) < num_bins:
        raise CohortError(
            f"{len(event_times.unique())} different times of events among the training slides do not make {num_bins} bins. Set "
            "science.task.bins to fewer, or use more slides."
        )
    shares = torch.arange(1, num_bins, dtype=torch.float64) / num_bins
    edges = torch.quantile(event_times, shares).tolist()
    counts = torch.bincount(torch.bucketize(event_times, torch.tensor(edges, dtype=torch.float64)), minlength=num_bins)
    if not counts.all():
        raise CohortError(
            f"{num_bins} bins of the training slides' times would have {counts.tolist()} events: too many are at one time. Set "
            "science.task.bins to fewer."
        )
    return tuple(edges)


def _times(target_SX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Time and event of each slide, 0 where not known, and whether they are."""
    is_known_S = torch.isfinite(target_SX).all(dim=1)
    return filled(target_SX[:, 0], is_known_S), filled(target_SX[:, 1], is_known_S), is_known_S
