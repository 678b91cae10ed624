"""Cross-validation: every fold of a cohort with several seeds, one run each, on the same shards; then one report for all.

What is finished is not done again, so the same command goes on where it stopped, fold by fold.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gigamil.config.load import absolute_paths
from gigamil.config.schema import RunConfig
from gigamil.data.features import features_folder
from gigamil.data.folds import make_folds
from gigamil.data.split_import import count_folds
from gigamil.data.targets import load_target_table
from gigamil.data.tile import refuse_failures, tile_cohort
from gigamil.errors import BagError, CheckpointError, CohortError, ConfigError, ShardError, TrainingError
from gigamil.evaluate.heatmap import FOLDER as HEATMAPS
from gigamil.evaluate.pooled import STUDY_FILE, Member, is_evaluated, read_study, write_study
from gigamil.evaluate.study_report import StudyEvaluation, evaluate_study, gallery, write_study_report
from gigamil.pipeline import draw_heatmaps, refuse_other_checkpoint, run_pipeline
from gigamil.registry import import_plugins
from gigamil.train.launch import RanksFailed
from gigamil.train.tracking import one_store

_log = logging.getLogger(__name__)
_ENDS_ALL = (4, 5)  # exit codes: the machine lacks something, or a signal came


def run_study(
    config: RunConfig,
    *,
    folds: Sequence[int] | None = None,
    seeds: int = 1,
    plugins: Sequence[str] = (),
    report_only: bool = False,
) -> dict[str, Any]:
    """Train and evaluate each fold with each seed, and write the report of the study.

    The study is in `<out>/study`, its runs in `fold<k>_seed<s>` there, as launch/slurm/folds.sbatch has them; they share
    `<out>/shards` with a single run, and `<out>/features` too unless the encoder's weights are random, which differ by seed. In
    MLflow they are children of one run, in a store of the study unless MLFLOW_TRACKING_URI names another. A run that fails for its
    data or in training is named in the report, and the others go on; a signal, or a fault of the machine, ends all.

    Args:
        config: of a single run; a holdout becomes `cohort.folds` folds. Seeds count from `science.seed`.
        folds: which; None: all of them.
        seeds: runs of each fold.
        plugins: modules that register encoders, aggregators or losses.
        report_only: train nothing; write the report of what is finished.
    Returns:
        The pooled headline metric, its interval, how many runs are finished and failed, and where the report is.
    Raises:
        ConfigError: no such fold, or no such number of seeds; or the configuration fits no run.
        CohortError: there are fewer patients than folds, or the slide table cannot be used.
        TrainingError: no run could be finished.
        Interrupted: a signal; the same command goes on.
    Cost: folds x seeds runs, one after the other.
    """
    import_plugins(plugins)
    config = _with_folds(absolute_paths(config))
    numbers = _chosen_folds(config, folds)
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: it must be 1 or more")
    if not report_only:
        _prepare(config)
    out = study_folder(config)
    out.mkdir(parents=True, exist_ok=True)
    wanted = [Member(fold, seed, f"fold{fold}_seed{seed}") for seed in range(seeds) for fold in numbers]
    members = _members(out, wanted)
    write_study(out, members)
    with one_store(out, config.bookkeeping.name):
        for number, member in enumerate(members[: 0 if report_only else len(wanted)]):
            if config.bookkeeping.progress:
                print(f"\n==== run {number + 1} of {len(wanted)}: fold {member.fold}, seed {member.seed}", flush=True)
            members[number] = _run_member(config, member, plugins)
            write_study(out, members)
        return _report(config, out)


def study_folder(config: RunConfig) -> Path:
    """Where the study of a configuration is."""
    return config.bookkeeping.out / "study"


def _prepare(config: RunConfig) -> None:
    """Tile, and say what would be wrong in every run once, before the first."""
    table = load_target_table(config.cohort, config.science)
    if config.cohort.splits is None:
        make_folds(table, config.cohort)
    if config.data.source != "features" or config.data.features is None:
        refuse_failures(tile_cohort(config, progress=config.bookkeeping.progress), config.slides.max_failed)


def member_config(config: RunConfig, member: Member) -> RunConfig:
    """The configuration of one run of a study."""
    book, science = config.bookkeeping, config.science
    changes = {"out": study_folder(config) / member.folder, "shards": book.shard_root, "name": member.folder}
    return config.model_copy(
        update={
            "cohort": config.cohort.model_copy(update={"fold": member.fold}),
            "science": science.model_copy(update={"seed": science.seed + member.seed}),
            "bookkeeping": book.model_copy(update=changes),
        }
    )


def _with_folds(config: RunConfig) -> RunConfig:
    if config.cohort.split_method != "holdout" or config.cohort.splits is not None:
        return config
    cohort = config.cohort.model_copy(update={"split_method": "kfold"})
    return config.model_copy(update={"cohort": cohort})


def _chosen_folds(config: RunConfig, folds: Sequence[int] | None) -> list[int]:
    cohort = config.cohort
    known = cohort.folds if cohort.splits is None else count_folds(cohort.splits)
    if folds is None:
        return list(range(known))
    wrong = [fold for fold in folds if not 0 <= fold < known]
    if wrong or not folds:
        raise ConfigError(f"--folds {','.join(map(str, folds))}: there are {known} folds, 0 to {known - 1}, or all")
    return list(dict.fromkeys(folds))


def _members(out: Path, wanted: Sequence[Member]) -> list[Member]:
    """Those that are asked for, as far as they are known, and behind them others that are there already."""
    known = read_study(out) if (out / STUDY_FILE).is_file() else []
    before = {member.folder: member for member in known}
    return [before.pop(member.folder, member) for member in wanted] + list(before.values())


def _run_member(config: RunConfig, member: Member, plugins: Sequence[str]) -> Member:
    own = member_config(config, member)
    _share_features(config, own.bookkeeping.out)
    try:
        if is_evaluated(own.bookkeeping.out):
            refuse_other_checkpoint(own)
        else:
            run_pipeline(own, plugins=plugins)
    except (BagError, CheckpointError, CohortError, ConfigError, RanksFailed, ShardError, TrainingError) as error:
        if error.exit_code in _ENDS_ALL:
            raise
        _log.error("fold %d, seed %d failed, the others go on: %s", member.fold, member.seed, error)
        return replace(member, error=str(error))
    return replace(member, error=None)


def _share_features(config: RunConfig, run: Path) -> None:
    """Features that are the same for all seeds are made once, in `<out>/features`; each run has a link to them there."""
    science, link = config.science, run / "features"
    same = science.encoder.weights is not None or science.warm_start is not None
    if config.data.source != "features" or config.data.features is not None or not same:
        return
    shared = features_folder(config)
    shared.mkdir(parents=True, exist_ok=True)  # also where a link to it is left over
    run.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(os.path.relpath(shared, run), target_is_directory=True)


def _report(config: RunConfig, out: Path) -> dict[str, Any]:
    members = read_study(out)
    if not any(member.is_finished for member in members):
        reasons = dict.fromkeys(member.error for member in members if member.error)
        words = "\n".join(f"  {reason}" for reason in reasons) or "  none was started"
        raise TrainingError(f"no run of the study '{out}' is finished:\n{words}")
    evaluation = evaluate_study(out, num_bootstrap=config.science.bootstrap, seed=config.science.seed)
    for shown in gallery(out):
        if not (out / shown.member.folder / HEATMAPS / f"{shown.slide_id}.png").is_file():
            draw_heatmaps(member_config(config, shown.member), [shown.slide_id])
    report = write_study_report(out)
    return _result(evaluation, members, report)


def _result(evaluation: StudyEvaluation, members: Sequence[Member], report: Path) -> dict[str, Any]:
    name = evaluation["metric"]
    found = evaluation["pooled"]["metrics"][name]
    return {
        name: found["value"],
        f"{name}_ci": found["ci"],
        "slides": evaluation["pooled"]["num_slides"],
        "runs": sum(member.is_finished for member in members),
        "failed": [member.folder for member in members if member.error and not member.is_finished],
        "report": str(report),
    }
