"""Metrics of survival: is who is called at risk earlier dead, and are the probabilities right?

Curves of survival and the log-rank test are SciPy's.

Shape letters: N slides, T times, G groups.
"""

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gigamil.metrics.bootstrap import Floats, Ints, Value


class Curve(NamedTuple):
    """Kaplan and Meier's estimate of survival: share_T[i] from time_T[i] on; 1 before the first. 95 % bounds beside it."""

    time_T: Floats
    share_T: Floats
    low_T: Floats
    high_T: Floats


def survival_values(
    time_N: Floats,
    event_N: Floats,
    risk_N: Floats,
    survival_NT: Floats | None = None,
    edges_T: Sequence[float] = (),
) -> dict[str, Value]:
    """Harrell's C, and with probabilities of survival the integrated Brier score.

    Args:
        time_N, event_N: time, and 1 if the event came then, 0 if the slide was censored.
        risk_N: more means earlier.
        survival_NT: probability of survival beyond each of `edges_T`.
    """
    values = {"c_index": c_index(time_N, event_N, risk_N) if len(time_N) else "no slide"}
    if survival_NT is not None:
        values["integrated_brier"] = integrated_brier(time_N, event_N, survival_NT, np.asarray(edges_T))
    return values


def c_index(time_N: Floats, event_N: Floats, risk_N: Floats) -> Value:
    """Share of the comparable pairs in which the one with the earlier event has the higher risk; equal risks count half.

    A pair is comparable if it is known who had the event first: the earlier time is that of an event. Of two at the same time
    the one with an event comes before a censored one; two events at the same time are not compared.

    Cost: N^2 numbers.
    Source: Harrell et al. 1982, doi:10.1001/jama.1982.03320430047030. Test: unit/metrics/test_survival.py
    """
    first_NN = (event_N[:, None] == 1) & (
        (time_N[:, None] < time_N[None, :]) | ((time_N[:, None] == time_N[None, :]) & (event_N[None, :] == 0))
    )
    np.fill_diagonal(first_NN, val=False)
    pairs = int(first_NN.sum())
    if not pairs:
        return "no pair of slides of which is known whose event came first"
    higher_NN = np.sign(risk_N[:, None] - risk_N[None, :])
    return float((first_NN * (1 + higher_NN) / 2).sum() / pairs)


def integrated_brier(time_N: Floats, event_N: Floats, survival_NT: Floats, edge_T: Floats) -> Value:
    """Mean squared distance between predicted and true survival, weighted for censoring, as a mean over time.

    At each time slides that had the event before count by 1 / G of their event's time, those that are still there by 1 / G of
    that time, with G Kaplan and Meier's share that is not censored yet; those censored before do not count. G at a time counts who
    is censored at that very time as gone, as scikit-survival does. The integral is by trapezoids between the first and the last
    edge that lies within the times of the slides.

    Args:
        survival_NT: probability of survival beyond each edge.
        edge_T: ascending.
    Source: Graf et al. 1999, doi:10.1002/(SICI)1097-0258(19990915/30)18:17/18<2529::AID-SIM274>3.0.CO;2-5.
    """
    if not len(time_N):
        return "no slide"
    within_T = (edge_T >= time_N.min()) & (edge_T < time_N.max())
    edge_T, survival_NT = edge_T[within_T], survival_NT[:, within_T]
    if not len(edge_T):
        return "no edge of a bin lies within the times of these slides"
    # Who has the event at some time is not censored then any more: events come first.
    different_T, place_N = np.unique(time_N, return_inverse=True)
    censoring = kaplan_meier(2.0 * place_N + (event_N == 0), 1 - event_N)

    def uncensored(times: Floats) -> Floats:
        return _share_at(censoring, np.searchsorted(different_T, times, side="right") * np.float64(2) - 1)

    left_N = uncensored(time_N)
    scores = []
    for column, edge in enumerate(edge_T):
        died_N = (time_N <= edge) & (event_N == 1)
        lives_N = time_N > edge
        at_edge = float(uncensored(np.array([edge]))[0])  # above 0: an edge lies before the last time
        weight_N = died_N / np.where(died_N, left_N, 1.0) + lives_N / at_edge
        scores.append(float((weight_N * np.square(lives_N - survival_NT[:, column])).mean()))
    if len(scores) == 1:
        return scores[0]
    return float(np.trapezoid(scores, edge_T) / (edge_T[-1] - edge_T[0]))


def kaplan_meier(time_N: Floats, event_N: Floats) -> Curve:
    """Share that has not had the event yet. Bounds are those of log(-log S), which stay within 0 and 1.

    Source: Kaplan and Meier 1958; Greenwood 1926 (variance).
    """
    from scipy.stats import CensoredData, ecdf

    curve = ecdf(CensoredData.right_censored(time_N, event_N == 0)).sf
    with warnings.catch_warnings():  # where nobody or everybody is left there are no bounds: NaN
        warnings.simplefilter("ignore", RuntimeWarning)
        bounds = curve.confidence_interval(0.95, method="log-log")
    low_T, high_T = (np.asarray(side.probabilities, dtype=np.float64) for side in (bounds.low, bounds.high))
    return Curve(np.asarray(curve.quantiles), np.asarray(curve.probabilities), low_T, high_T)


def log_rank(time_N: Floats, event_N: Floats, is_high_N: Ints) -> Value:
    """p of the log-rank test that two groups have the same survival.

    Source: Mantel 1966.
    """
    groups = [(time_N[is_high_N == group], event_N[is_high_N == group]) for group in (0, 1)]
    if any(not len(times) for times, _ in groups):
        return "a group without slides"
    if not event_N.any():
        return "no event in either group"
    from scipy.stats import CensoredData, logrank

    first, second = (CensoredData.right_censored(times, events == 0) for times, events in groups)
    with warnings.catch_warnings():  # 0 / 0 where at each event slides of one group only are left
        warnings.simplefilter("ignore", RuntimeWarning)
        p = float(logrank(first, second).pvalue)
    return p if np.isfinite(p) else "at no event are slides of both groups left"


def _share_at(curve: Curve, time_N: Floats) -> Floats:
    """The curve's value at some times."""
    place_N = np.searchsorted(curve.time_T, time_N, side="right")
    values: Floats = np.append(1.0, curve.share_T)[place_N]
    return values
