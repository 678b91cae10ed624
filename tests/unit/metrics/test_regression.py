"""Metrics of numbers."""

import numpy as np
import pytest

from gigamil.metrics.regression import number_values


def test_by_hand_where_targets_are_known() -> None:
    found = number_values(np.array([1.0, 2.0, np.nan, 4.0]), np.array([1.0, 3.0, 9.0, 5.0]))
    assert found["mae"] == pytest.approx(2 / 3)
    assert found["rmse"] == pytest.approx(np.sqrt(2 / 3))
    assert found["r2"] == pytest.approx(1 - 2 / (14 / 3))
    assert found["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 3, 5])[0, 1])
    assert found["spearman"] == pytest.approx(1.0)


def test_what_is_undefined_says_why() -> None:
    assert number_values(np.array([2.0, 2.0]), np.array([1.0, 3.0]))["r2"] == "all targets are equal"
    assert "equal" in str(number_values(np.array([1.0, 2.0]), np.array([3.0, 3.0]))["pearson"])
    assert set(number_values(np.array([np.nan]), np.array([1.0])).values()) == {"no slide with a known target"}
