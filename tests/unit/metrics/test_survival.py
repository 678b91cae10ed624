"""Metrics of survival: the sign of C, definitions written out, and numbers that scikit-survival 0.28 gives for the same slides."""

import numpy as np
import pytest

from gigamil.metrics.survival import c_index, integrated_brier, kaplan_meier, log_rank, survival_values

TIME = np.array([3, 5, 5, 8, 2, 9, 5, 12, 7, 8, 1, 10.0])
EVENT = np.array([1, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1.0])
RISK = np.array([2, 1, 3, 0, 2, -1, 1, 0, 2, 1, 1, -2.0])
EDGES = (4.0, 6.0, 9.0)
SURVIVAL = np.stack([np.linspace(0.5, 0.95, 12), np.linspace(0.3, 0.8, 12), np.linspace(0.1, 0.7, 12)], axis=1)


class TestC:
    def test_who_is_at_risk_has_the_event_earlier(self) -> None:
        time, event = np.array([1.0, 2.0, 3.0]), np.ones(3)
        assert c_index(time, event, -time) == 1.0
        assert c_index(time, event, time) == 0.0
        assert c_index(time, event, np.zeros(3)) == 0.5

    def test_pair_by_pair(self) -> None:
        agreed, pairs = 0.0, 0
        for i in range(12):
            for j in range(12):
                comes_first = TIME[i] < TIME[j] or (TIME[i] == TIME[j] and not EVENT[j] and i != j)
                if EVENT[i] and comes_first:
                    pairs += 1
                    agreed += 0.5 if RISK[i] == RISK[j] else float(RISK[i] > RISK[j])
        assert c_index(TIME, EVENT, RISK) == pytest.approx(agreed / pairs)
        assert c_index(TIME, EVENT, RISK) == pytest.approx(0.6632653061224489, rel=1e-12)

    def test_without_a_pair_it_says_so(self) -> None:
        assert "no pair of slides" in str(c_index(np.array([1.0, 2.0]), np.zeros(2), np.array([1.0, 2.0])))


class TestBrier:
    def test_is_that_of_scikit_survival(self) -> None:
        assert integrated_brier(TIME, EVENT, SURVIVAL, np.array(EDGES)) == pytest.approx(0.18960454545454547, rel=1e-12)

    def test_without_censoring_it_is_the_mean_squared_distance(self) -> None:
        time = np.array([1.0, 3.0, 5.0, 7.0])
        lives = time[:, None] > np.array([2.0, 4.0, 6.0])
        assert integrated_brier(time, np.ones(4), lives.astype(float), np.array([2.0, 4.0, 6.0])) == 0
        half = integrated_brier(time, np.ones(4), np.full((4, 3), 0.5), np.array([2.0, 4.0, 6.0]))
        assert half == pytest.approx(0.25)

    def test_edges_beyond_the_slides_are_left_out(self) -> None:
        wide = np.concatenate([SURVIVAL, SURVIVAL[:, :1]], axis=1)
        assert integrated_brier(TIME, EVENT, wide, np.array([*EDGES, 99.0])) == pytest.approx(0.18960454545454547)
        assert "no edge" in str(integrated_brier(TIME, EVENT, SURVIVAL[:, :1], np.array([99.0])))

    def test_both_are_given_where_there_are_probabilities(self) -> None:
        assert set(survival_values(TIME, EVENT, RISK)) == {"c_index"}
        assert set(survival_values(TIME, EVENT, RISK, SURVIVAL, EDGES)) == {"c_index", "integrated_brier"}


def test_curves_of_survival_go_down_between_their_bounds() -> None:
    curve = kaplan_meier(TIME, EVENT)
    assert curve.time_T.tolist() == [1, 2, 3, 5, 7, 8, 9, 10, 12]
    wanted = [11 / 12, 10 / 12, 9 / 12, 7 / 12, 7 / 12, 7 / 12 * 4 / 5, 7 / 12 * 4 / 5, 7 / 12 * 2 / 5, 0]
    assert curve.share_T == pytest.approx(wanted)
    inside = np.isfinite(curve.low_T)
    assert (curve.low_T[inside] <= curve.share_T[inside]).all()
    assert (curve.share_T[inside] <= curve.high_T[inside]).all()


def test_groups_are_told_apart() -> None:
    group = np.array([1, 0] * 6)
    assert log_rank(TIME, EVENT, group) == pytest.approx(0.062306320345532684, rel=1e-9)
    assert log_rank(TIME, EVENT, np.zeros(12, dtype=np.int64)) == "a group without slides"
    assert log_rank(TIME, np.zeros(12), group) == "no event in either group"
    late = np.array([0, 0, 0, 1])
    assert log_rank(np.array([3.0, 4, 5, 9]), late, late) == "at no event are slides of both groups left"
