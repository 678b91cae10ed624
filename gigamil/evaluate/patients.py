"""Predictions by patient: the mean over the slides of each."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gigamil.data.table import folded
from gigamil.evaluate.predictions import Predictions
from gigamil.evaluate.values import Values


def by_patient(part: Predictions | Values) -> Predictions | Values | None:
    """One row per patient, with the mean of what is predicted of its slides; None if what is known of them differs.

    Rows are of one split, and called as the patient in its first row.
    """
    rows: dict[str, list[int]] = {}
    for row, patient_id in enumerate(part.patient_ids):
        rows.setdefault(folded(patient_id), []).append(row)
    first = part.take([own[0] for own in rows.values()])
    if not _agree(part, list(rows.values())):
        return None
    value_NP = part.probs_NK if isinstance(part, Predictions) else part.value_NP
    mean_NP = np.stack([value_NP[own].mean(axis=0) for own in rows.values()])
    if isinstance(first, Predictions):
        return replace(first, slide_ids=first.patient_ids, probs_NK=mean_NP)
    return replace(first, slide_ids=first.patient_ids, value_NP=mean_NP)


def _agree(part: Predictions | Values, rows: Sequence[Sequence[int]]) -> bool:
    if isinstance(part, Predictions):
        return all(len({part.labels[row] for row in own}) == 1 for own in rows)
    return all(
        np.array_equal(part.target_NX[own[0]], part.target_NX[row], equal_nan=True) for own in rows for row in own[1:]
    )
