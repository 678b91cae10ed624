"""Intervals from a bootstrap over patients, around any measure of slides.

Slides of one patient resemble each other, so a bootstrap over slides would be too sure of itself: patients are drawn, and a
patient brings all of its slides.

Shape letters: N slides, P patients.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import NDArray

from gigamil.errors import CohortError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Value = float | str  # a number, or why there is none
Measure = Callable[[Ints], Mapping[str, Value]]  # rows, which may come several times -> values by name

INTERVAL_PERCENT = 95.0
# An interval out of fewer resamples than this share would describe the lucky resamples, not the cohort.
MIN_USABLE_RESAMPLES = 0.5


class Estimate(TypedDict):
    """A metric and its interval; `reason` says why one of them is None, or why it should be read with care.

    `num_usable` counts the resamples in which the metric is defined.
    """

    value: float | None
    ci: list[float] | None
    num_usable: int
    reason: NotRequired[str]


class Scores(TypedDict):
    """What is known of a set of slides; plain JSON."""

    num_slides: int
    num_patients: int
    num_bootstrap: int
    metrics: dict[str, Estimate]


def scores(measure: Measure, patients: Sequence[str], *, num_bootstrap: int, seed: int) -> Scores:
    """Values of a measure over slides, with 95 % percentile intervals from a bootstrap over patients.

    Resamples in which a metric is undefined are left out of its interval and not replaced; `num_usable` counts the others. The
    order of the rows does not matter if the measure does not look at it.

    Args:
        measure: rows of slides, a row as often as it was drawn -> values by name, the same names whatever the rows.
        patients: whose each slide is; slides of one patient are drawn together.
        num_bootstrap: resamples.
        seed: of the resampling.
    Returns:
        Per metric `value` and `ci` ([low, high]); None with a `reason` where undefined, never NaN.
    Cost: `num_bootstrap` calls of the measure.
    Source: Efron 1979 (bootstrap); Field and Welsh 2007 (resampling of clusters). Test: unit/metrics/test_bootstrap.py
    """
    names, patient_N = np.unique(np.asarray(patients, dtype=str), return_inverse=True)
    found = measure(np.arange(len(patients)))
    resampled: dict[str, list[float]] = {name: [] for name in found}
    if any(not isinstance(value, str) for value in found.values()):
        for row_N in resampled_rows(patient_N, num_bootstrap, seed):
            for name, value in measure(row_N).items():
                if not isinstance(value, str):
                    resampled[name].append(value)
    return Scores(
        num_slides=len(patients),
        num_patients=len(names),
        num_bootstrap=num_bootstrap,
        metrics={name: _estimate(value, np.array(resampled[name]), num_bootstrap) for name, value in found.items()},
    )


def difference(left: Measure, right: Measure, patients: Sequence[str], *, num_bootstrap: int, seed: int) -> Scores:
    """How much larger the metrics of one measure are than those of another on the same slides, patients drawn for both alike."""

    def both(row_N: Ints) -> dict[str, Value]:
        a, b = left(row_N), right(row_N)
        return {name: _minus(a[name], b[name]) for name in a if name in b}

    return scores(both, patients, num_bootstrap=num_bootstrap, seed=seed)


def _minus(a: Value, b: Value) -> Value:
    if isinstance(a, str):
        return a
    return b if isinstance(b, str) else a - b


def resampled_rows(patient_N: Ints, num_bootstrap: int, seed: int) -> list[Ints]:
    """Rows of the slides of so many patients as there are, drawn with replacement."""
    rng = np.random.default_rng(seed)
    num_patients = int(patient_N.max()) + 1
    found = []
    for _ in range(num_bootstrap):
        times_drawn_P = np.bincount(rng.integers(num_patients, size=num_patients), minlength=num_patients)
        found.append(np.repeat(np.arange(len(patient_N)), times_drawn_P[patient_N]))
    return found


def _estimate(value: Value, resampled: Floats, num_bootstrap: int) -> Estimate:
    if isinstance(value, str):
        return Estimate(value=None, ci=None, num_usable=0, reason=f"undefined: {value}")
    estimate = Estimate(value=float(value), ci=None, num_usable=len(resampled))
    if not len(resampled) or len(resampled) < MIN_USABLE_RESAMPLES * num_bootstrap:
        estimate["reason"] = (
            f"no interval: it is defined in only {len(resampled)} of {num_bootstrap} resamples of patients; more patients are needed"
        )
        return estimate
    tail = (100.0 - INTERVAL_PERCENT) / 2
    # Sums end in 0.9999999999999999 where 1 is meant.
    low, high = (round(float(edge), 15) for edge in np.percentile(resampled, [tail, 100.0 - tail]))
    estimate["ci"] = [low, high]
    if low == high:
        estimate["reason"] = (
            "an interval without width means that no resample of these patients changed the value, "
            "not that new patients would not"
        )
    return estimate


def refuse_unlike_lengths(**lengths: int) -> None:
    """Refuse arrays of slides that are not equally long.

    Raises:
        CohortError: names the lengths.
    """
    if len(set(lengths.values())) > 1:
        words = ", ".join(f"{number} {name}" for name, number in lengths.items())
        raise CohortError(f"{words}: give one of each per slide")
