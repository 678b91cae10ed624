"""`gigamil compare`: runs or studies side by side on the slides that all of them predict, at what each of them has spent.

Shape letters: N slides, P numbers that are predicted.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import yaml

from gigamil.errors import CohortError
from gigamil.evaluate.comparison_figures import draw_curves, draw_differences
from gigamil.evaluate.history import FILE_NAME as HISTORY_FILE
from gigamil.evaluate.history import History, read_history
from gigamil.evaluate.html import Html, image, join, page, table, tag
from gigamil.evaluate.pooled import STUDY_FILE, Pooled, read_pooled, read_study
from gigamil.evaluate.predictions import FILE_NAME
from gigamil.evaluate.report import CONFIG_FILE, FACTS_FILE, metric_words
from gigamil.evaluate.summary import EVALUATION_FILE, read_evaluation
from gigamil.files import parse_object, replace_file
from gigamil.metrics.bootstrap import Estimate, Scores, difference, scores
from gigamil.metrics.compare import delong
from gigamil.metrics.task import headline
from gigamil.tasks.classification import Multiclass

COMPARISON_FILE, COMPARISON_PAGE = "comparison.json", "comparison.html"
DIFFERENCES, CURVES = "differences.png", "curves.png"
_SPENT = ("tiles_seen", "tile_forwards", "seconds", "rank_seconds")


class Compared(TypedDict):
    """One of the runs: its metrics on the common slides, how much better it is than the first, and what it has spent.

    `minus_first` and `p_delong` are None for the first; `p_delong` also where there are not two classes, several seeds, a slide in
    several draws, or AUCs without variance. `spent` is the mean of a study's runs.
    """

    name: str
    folder: str
    regime: str
    num_seeds: int
    num_runs: int
    scores: Scores
    minus_first: Scores | None
    p_delong: float | None
    spent: dict[str, float | None]


class Comparison(TypedDict):
    """What comparison.json holds; `of_validation` names runs without a test split."""

    metric: str
    num_slides: int
    num_left_out: dict[str, int]
    of_validation: list[str]
    num_bootstrap: int
    seed: int
    runs: list[Compared]


@dataclass(frozen=True)
class _Run:
    """A run or study as files say it is."""

    name: str
    folder: Path
    members: tuple[Path, ...]
    pooled: Pooled


def compare_runs(
    folders: Sequence[Path], out: Path, *, metric: str | None = None, num_bootstrap: int = 1000, seed: int = 0
) -> Comparison:
    """Compare runs, the first with each of the others; writes comparison.json, comparison.html and two figures to `out`.

    Args:
        folders: evaluated runs, or studies; two at least.
        out: made if it is not there.
        metric: that is drawn; None: the task's headline.
        num_bootstrap, seed: of the intervals; patients are drawn for all runs alike, so that differences are paired.
    Raises:
        CohortError: less than two; one that was not evaluated; no slide in common; another target of the same slide, or other
            metrics; no such metric.
    Source: DeLong et al. 1988 for `p_delong`; paired bootstrap of patients for the intervals of differences.
    """
    if len(folders) < 2:
        raise CohortError("a comparison needs two runs: gigamil compare RUN RUN [RUN ...]")
    runs = _read_all(folders)
    pooled, num_left_out = _on_common_slides(runs)
    first = pooled[0].measure()
    name, known = metric or headline(pooled[0].task), first(np.arange(len(pooled[0])))
    if name not in known:
        raise CohortError(f"--metric {name}: there are {', '.join(known)}")
    found = []
    for run, own in zip(runs, pooled, strict=True):
        settings = {"num_bootstrap": num_bootstrap, "seed": seed}
        is_first = own is pooled[0]
        found.append(
            Compared(
                name=run.name,
                folder=str(run.folder),
                regime=_regime(run.members[0]),
                num_seeds=own.num_seeds,
                num_runs=len(run.members),
                scores=scores(own.measure(), own.patients, **settings),
                minus_first=None if is_first else difference(own.measure(), first, own.patients, **settings),
                p_delong=None if is_first else _p_delong(own, pooled[0]),
                spent=_spent(run.members),
            )
        )
    comparison = Comparison(
        metric=name,
        num_slides=len(pooled[0]),
        num_left_out=num_left_out,
        of_validation=[run.name for run in runs if run.pooled.split == "val"],
        num_bootstrap=num_bootstrap,
        seed=seed,
        runs=found,
    )
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / COMPARISON_FILE, (json.dumps(comparison, indent=1, allow_nan=False) + "\n").encode())
    draw_differences(comparison, metric_words(name), out / DIFFERENCES)
    histories = {run.name: _histories(run.members) for run in runs}
    has_curves = any(histories.values())
    if has_curves:
        draw_curves(histories, out / CURVES)
    replace_file(out / COMPARISON_PAGE, _page(comparison, out, has_curves).encode())
    return comparison


def comparison_text(comparison: Comparison) -> str:
    """For people: a line per run."""
    name = comparison["metric"]
    rows = [
        [
            "run",
            "regime",
            metric_words(name),
            "95 % interval",
            "minus first",
            "95 % interval",
            "p",
            "tile forwards",
            "rank s",
        ]
    ]
    for run in comparison["runs"]:
        rows.append([run["name"], run["regime"], *_cells(run, name)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    slides = f"{comparison['num_slides']} slides that all predict"
    left = [f"{number} of {run}" for run, number in comparison["num_left_out"].items() if number]
    more = f"; left out: {', '.join(left)}" if left else ""
    return "\n".join([*lines, f"{slides}{more}; p by DeLong, slides taken for independent"])


def _cells(run: Compared, metric: str) -> list[str]:
    own, spent = run["scores"]["metrics"][metric], run["spent"]
    cells = [_number(own["value"]), _interval(own)]
    if run["minus_first"] is None:
        cells += ["", "", ""]
    else:
        gap = run["minus_first"]["metrics"][metric]
        p = run["p_delong"]
        cells += [_signed(gap["value"]), _interval(gap), "" if p is None or metric != "auc" else f"{p:.3g}"]
    return cells + [_thousands(spent["tile_forwards"]), _thousands(spent["rank_seconds"])]


def _read_all(folders: Sequence[Path]) -> list[_Run]:
    names = _names(folders)
    runs = []
    for name, folder in zip(names, folders, strict=True):
        if not (folder / FILE_NAME).is_file() and (folder / "study" / STUDY_FILE).is_file():
            folder = folder / "study"  # of `gigamil run --folds`
        members: tuple[Path, ...] = (folder,)
        if (folder / STUDY_FILE).is_file():
            members = tuple(folder / m.folder for m in read_study(folder) if m.is_finished)
        runs.append(_Run(name, folder, members, read_pooled(folder)))
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """Last parts of the paths, as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise CohortError("a run is named twice: gigamil compare RUN RUN [RUN ...] of different runs")
    depth = 1
    while len({part[-depth:] for part in parts}) < len(parts):
        depth += 1
    return ["/".join(part[-depth:]) for part in parts]


def _on_common_slides(runs: Sequence[_Run]) -> tuple[list[Pooled], dict[str, int]]:
    """The slides that all have, in the order of the first; and how many of each have none in the others."""
    for run in runs:
        if run.pooled.split == "train":
            raise CohortError(
                f"'{run.name}' predicts training slides only: runs are compared on slides that none has seen"
            )
    if len({_unit(run.members[0]) for run in runs}) > 1:
        units = ", ".join(f"'{run.name}' of {_unit(run.members[0])}s" for run in runs)
        raise CohortError(f"predictions of slides and of patients (science.bag) cannot be compared: {units}")
    places = [{slide_id: i for i, slide_id in enumerate(run.pooled.slide_ids)} for run in runs]
    common = [slide_id for slide_id in runs[0].pooled.slide_ids if all(slide_id in place for place in places)]
    if not common:
        raise CohortError(
            f"no held-out slide is in all of {', '.join(run.name for run in runs)}: runs are compared on the slides that all predict "
            "and none has seen, so they need the same split (cohort.splits, or the same split_seed and fold)"
        )
    taken = [run.pooled.take([place[slide_id] for slide_id in common]) for run, place in zip(runs, places, strict=True)]
    first = taken[0]
    for run, own in zip(runs[1:], taken[1:], strict=True):
        if own.task.predicted_names != first.task.predicted_names or own.target_NX.shape != first.target_NX.shape:
            raise CohortError(
                f"'{run.name}' predicts {', '.join(own.task.predicted_names)}, and '{runs[0].name}' predicts "
                f"{', '.join(first.task.predicted_names)}: that cannot be compared"
            )
        other = np.nonzero(~np.isclose(own.target_NX, first.target_NX, equal_nan=True).all(axis=1))[0]
        if len(other):
            raise CohortError(
                f"'{runs[0].name}' and '{run.name}' know other labels of {len(other)} slides, for example '{common[other[0]]}'"
            )
    return taken, {run.name: len(run.pooled) - len(common) for run in runs}


def _unit(run: Path) -> str:
    return read_evaluation(run)["unit"] if (run / EVALUATION_FILE).is_file() else "slide"


def _p_delong(own: Pooled, first: Pooled) -> float | None:
    if not isinstance(own.task, Multiclass) or len(own.task.classes) != 2 or own.num_seeds > 1 or first.num_seeds > 1:
        return None
    if len({slide_id.partition(" (fold ")[0] for slide_id in own.slide_ids}) < len(own):
        return None  # a slide in several draws counts once
    try:
        return delong(own.target_NX[:, 0].astype(np.int64), own.value_SNP[0, :, 1], first.value_SNP[0, :, 1]).p
    except ValueError:  # less than two slides of a class
        return None


def _regime(run: Path) -> str:
    path = run / CONFIG_FILE
    if not path.is_file():
        return "unknown"
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    regime = config.get("science", {}).get("regime", {})
    name = str(regime.get("name", "unknown"))
    if name in ("sampled", "select"):
        return f"{name} {regime.get('tiles')}"
    return f"{name} {regime.get('blocks')}" if name == "last_blocks" else name


def _spent(members: Sequence[Path]) -> dict[str, float | None]:
    """Means over runs; None where one does not say."""
    found = [_facts(member).get("spent") or {} for member in members]
    return {
        key: sum(spent[key] for spent in found) / len(found) if all(key in spent for spent in found) else None
        for key in _SPENT
    }


def _facts(run: Path) -> dict[str, Any]:
    path = run / FACTS_FILE
    if not path.is_file():
        return {}
    return parse_object(path.read_text(encoding="utf-8"), f"'{path}'", "delete it, and nothing is known of its cost")


def _histories(members: Sequence[Path]) -> list[History]:
    files = [member / HISTORY_FILE for member in members]
    return [read_history(file) for file in files if file.is_file()]


def _page(comparison: Comparison, out: Path, has_curves: bool) -> str:
    name = comparison["metric"]
    head = ["Run", "Regime", metric_words(name), "95 % interval", "Minus first", "95 % interval", "p (DeLong)"]
    rows = [("", [run["name"], run["regime"], *_cells(run, name)]) for run in comparison["runs"]]
    names = list(comparison["runs"][0]["scores"]["metrics"])
    every = [
        ("", [run["name"], *(_with_interval(run["scores"]["metrics"][metric]) for metric in names)])
        for run in comparison["runs"]
    ]
    curves = (
        _figure(out / CURVES, "Validation after each epoch, against what training had spent") if has_curves else Html()
    )
    note = (
        f"{comparison['num_slides']} slides that every run predicts and none has seen. Intervals: {comparison['num_bootstrap']} "
        f"bootstrap resamples of patients (seed {comparison['seed']}), drawn for all runs alike, so that differences are paired. "
        + (
            f"Of {', '.join(comparison['of_validation'])} these are validation slides, which chose the epoch. "
            if comparison["of_validation"]
            else ""
        )
        + "Tile forwards: passes of tiles through the encoder in training, those made again for a backward and scans included; "
        "of a study the mean of its runs. DeLong takes slides for independent."
    )
    return page(
        "Comparison - gigamil",
        tag("h1", "Comparison"),
        table([*head, "Tile forwards", "Rank seconds"], rows),
        tag("p", note, class_="note"),
        _figure(out / DIFFERENCES, f"{metric_words(name)}, and the difference from the first"),
        curves,
        tag("h2", "All metrics"),
        tag("div", table(["Run", *(metric_words(metric) for metric in names)], every), class_="scroll"),
        tag("footer", tag("p", "Written by gigamil. For research; not a medical device.", class_="note")),
    )


def _figure(path: Path, caption: str) -> Html:
    return join(tag("figure", image(path, caption), tag("figcaption", caption)))


def _with_interval(estimate: Estimate) -> str:
    return f"{_number(estimate['value'])} {_interval(estimate)}".strip()


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _signed(value: float | None) -> str:
    return "undefined" if value is None else f"{value:+.3f}"


def _interval(estimate: Estimate) -> str:
    return "" if estimate["ci"] is None else f"{estimate['ci'][0]:.3f} to {estimate['ci'][1]:.3f}"


def _thousands(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"
