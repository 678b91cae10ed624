"""Intervals: patients are drawn with all of their slides, and what is undefined in a resample is left out and counted."""

import json

import numpy as np
import pytest

from gigamil.metrics.bootstrap import Ints, Value, difference, scores


def mean_of(value_N: np.ndarray) -> object:
    return lambda row_N: {"mean": float(value_N[row_N].mean())}


def test_intervals_are_those_of_copied_rows() -> None:
    value_N, patients = np.array([1.0, 2.0, 5.0, 7.0, 11.0]), ["a", "a", "b", "c", "c"]
    found = scores(mean_of(value_N), patients, num_bootstrap=300, seed=5)  # type: ignore[arg-type]
    rng, resampled = np.random.default_rng(5), []
    for _ in range(300):
        drawn = [["a", "b", "c"][i] for i in rng.integers(3, size=3)]
        resampled.append(np.mean([v for name in drawn for v, p in zip(value_N, patients, strict=True) if p == name]))
    assert found["metrics"]["mean"]["ci"] == pytest.approx(np.percentile(resampled, [2.5, 97.5]))
    assert (found["num_slides"], found["num_patients"], found["metrics"]["mean"]["num_usable"]) == (5, 3, 300)


def test_copies_of_a_patients_slides_do_not_narrow_the_interval() -> None:
    value_N = np.random.default_rng(0).normal(size=20)
    patients = [f"p{number}" for number in range(20)]
    once = scores(mean_of(value_N), patients, num_bootstrap=300, seed=1)["metrics"]["mean"]  # type: ignore[arg-type]
    thrice = scores(mean_of(np.tile(value_N, 3)), patients * 3, num_bootstrap=300, seed=1)  # type: ignore[arg-type]
    assert thrice["metrics"]["mean"]["ci"] == pytest.approx(once["ci"], rel=1e-12)


def test_what_is_undefined_in_a_resample_is_left_out_and_counted() -> None:
    def measure(row_N: Ints) -> dict[str, Value]:
        has_first = bool((row_N == 0).any())
        return {
            "often": 1.0 if has_first else "no first slide",
            "never": "it is never defined",
            "always": float(len(row_N)),
        }

    found = scores(measure, ["a", "b", "c"], num_bootstrap=400, seed=0)["metrics"]
    assert 200 < found["often"]["num_usable"] < 350  # 1 - (2/3)^3 of 400 is 281
    assert found["often"]["ci"] == [1.0, 1.0]
    assert "without width" in found["often"]["reason"]
    assert found["never"] == {"value": None, "ci": None, "num_usable": 0, "reason": "undefined: it is never defined"}
    assert "reason" not in found["always"] or found["always"]["ci"] == [3.0, 3.0]
    rare = scores(
        lambda row_N: {"x": 1.0 if len(set(row_N)) == 8 else "a slide is missing"},
        list("abcdefgh"),
        num_bootstrap=400,
        seed=0,
    )
    assert rare["metrics"]["x"]["ci"] is None
    assert f"only {rare['metrics']['x']['num_usable']} of 400" in rare["metrics"]["x"]["reason"]
    assert json.loads(json.dumps(rare, allow_nan=False)) == rare


def test_the_difference_of_two_measures_is_tighter_than_their_intervals() -> None:
    rng = np.random.default_rng(3)
    hard_N = rng.normal(size=60)
    left_N, right_N = hard_N + 0.5 + 0.05 * rng.normal(size=60), hard_N
    patients = [str(i) for i in range(60)]
    found = difference(mean_of(left_N), mean_of(right_N), patients, num_bootstrap=500, seed=0)["metrics"]["mean"]  # type: ignore[arg-type]
    assert found["value"] == pytest.approx((left_N - right_N).mean())
    alone = scores(mean_of(left_N), patients, num_bootstrap=500, seed=0)["metrics"]["mean"]  # type: ignore[arg-type]
    assert found["ci"] is not None
    assert alone["ci"] is not None
    assert np.diff(found["ci"]) < 0.2 * np.diff(alone["ci"])
    undefined = difference(lambda _: {"x": "no"}, lambda _: {"x": 1.0}, patients, num_bootstrap=10, seed=0)
    assert undefined["metrics"]["x"]["reason"] == "undefined: no"
