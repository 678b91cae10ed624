"""The command line: parse, load the configuration, call one function, turn errors into a message and an exit code."""

import argparse
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gigamil.errors import EnvironmentFault, GigamilError
from gigamil.registry import import_plugins

if TYPE_CHECKING:
    from gigamil.config.schema import RunConfig

# Libraries are imported inside the verbs: --help answers at once, and doctor works where one of them is broken.

_EPILOG = """\
first steps:
  gigamil demo                                            everything, on synthetic slides
  gigamil init my.yaml --slides DIR --labels labels.csv   a commented YAML for your slides
  gigamil run my.yaml                                     all of the stages; again: continue
any key of the configuration: gigamil run my.yaml --science.epochs 5 --execution.ranks 4
exit codes: 0 ok, 2 usage, 3 some slides failed, 4 environment, 5 interrupted (resumable),
6 training failed, 141 nobody reads the output (SIGPIPE)"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    parser = _parser()
    arguments, overrides = parser.parse_known_args(argv)
    if overrides and "config" not in arguments:
        parser.error(f"unknown words: {' '.join(overrides)}")
    logging.basicConfig(level=logging.INFO, format="gigamil: %(message)s", stream=sys.stderr)
    for noisy in ("alembic", "mlflow", "matplotlib", "PIL", "torch", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, to their authors
    verb: Callable[[argparse.Namespace, Sequence[str]], int] = arguments.verb
    try:
        code = verb(arguments, overrides)
        print(end="", flush=True)  # here, where a pipe that is closed is seen
        return code
    except GigamilError as error:
        print(f"gigamil: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("gigamil: interrupted; the same command continues", file=sys.stderr, flush=True)
        return 5
    except BrokenPipeError:  # `gigamil ... | head`: what was left to do is not done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a folder that is read-only, a disk that is full
        print(f"gigamil: {error}. Is the disk full, or the folder not yours?", file=sys.stderr, flush=True)
        return EnvironmentFault.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gigamil",
        description="Train multiple-instance-learning models on whole-slide images, end to end.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"gigamil {_version()}")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by `deepspeed --module gigamil doctor --dist`
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add_plugin(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--plugin", action="append", default=[], metavar="MODULE", help="module that registers your parts"
        )

    def verb(
        name: str, function: Callable[..., int], words: str, config: bool = True, file: str = "CONFIG.yaml"
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=words,
            description=words[0].upper() + words[1:] + ".",
            allow_abbrev=False,
            epilog=_verb_epilog(config),
        )
        sub.set_defaults(verb=function)
        if config:
            sub.add_argument("config", metavar=file, help="configuration of the run")
            sub.add_argument(
                "--limit", type=int, metavar="N", help="only N slides of each split and class: a smoke run"
            )
            add_plugin(sub)
            sub.add_argument("--print_config", action="store_true", help="print the resolved configuration and stop")
        return sub

    demo = verb("demo", _demo, "all of gigamil on synthetic slides, offline, in a few minutes", config=False)
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="run folder (%(default)s)")
    demo.add_argument("--ranks", type=_count, default=2, help="processes that train (%(default)s)")
    init = verb("init", _init, "scan a folder of slides and a label table, write a commented YAML", config=False)
    init.add_argument("yaml", type=Path, metavar="CONFIG.yaml", help="file to write; slides.csv goes beside it")
    init.add_argument("--slides", type=Path, required=True, metavar="DIR", help="folder of slides, searched deeply")
    init.add_argument("--labels", type=Path, required=True, metavar="CSV", help="one row per slide")
    for name in ("slide", "patient", "label"):
        init.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {name} in the label table")
    init.add_argument("--patient-is-slide", action="store_true", help="there are no patient ids")
    init.add_argument("--overwrite", action="store_true", help="replace files that are there")
    doctor = verb("doctor", _doctor, "check this machine and say how to cure what is wrong", config=False)
    doctor.add_argument("--out", type=Path, metavar="DIR", help="folder that runs will be written to")
    doctor.add_argument(
        "--dist",
        action="store_true",
        help="check all ranks of a job together: hosts, versions, clocks, network, shared folder, all-reduce; under torchrun, "
        "deepspeed or srun those that it started, else ranks of this machine",
    )
    doctor.add_argument(
        "--ranks", type=_count, metavar="N", help="with --dist, without a launcher: how many ranks (its GPUs, or 2)"
    )
    inspect = verb(
        "inspect", _inspect, "what is in slide files, or in a whole cohort, and what tiling gives", config=False
    )
    inspect.add_argument(
        "slides",
        nargs="+",
        metavar="SLIDE|FOLDER|CONFIG.yaml|TABLE.csv",
        help="slide files, or DICOM folders: a report on each; folders of slides, a configuration or a slide table: "
        "one table, with expected storage and time",
    )
    inspect.add_argument("--mpp", type=_positive, help="micron per pixel, for files that carry none")
    inspect.add_argument("--tile-px", type=_count, help="tile side in pixels (224)")
    inspect.add_argument("--tile-mpp", type=_positive, help="micron per pixel of a tile (0.5)")
    inspect.add_argument("--html", type=Path, metavar="FILE", help="write the table and histograms as a page, too")
    inspect.set_defaults(config=None)  # keys of the configuration may follow
    tile = verb("tile", _tile, "slides -> shards of tissue tiles")
    tile.add_argument("--shard", type=_part, metavar="I/N", help="only the I-th of N parts, as a job of an array")
    split = verb("split", _split, "train, validation and test slides, by patient", file="CONFIG.yaml|LABELS.csv")
    split.add_argument("--again", action="store_true", help="make a new split, if nothing was trained on the old one")
    split.add_argument("--folds", type=_count, metavar="K", help="K-fold cross-validation: cohort.folds K")
    split.add_argument("--by-site", action="store_true", help="keep sites whole: cohort.preserve_sites true")
    labels = split.add_argument_group("of a label table, without slides")
    labels.add_argument("--out", type=Path, metavar="DIR", help="folder for folds.json and folds.csv")
    for name in ("slide", "patient", "label"):
        labels.add_argument(f"--{name}-column", metavar="NAME", help=f"column of the {name}")
    labels.add_argument("--patient-is-slide", action="store_true", help="there are no patient ids")
    features = verb("features", _features, "encode all tiles once with a frozen encoder, for data.source=features")
    features.add_argument("--to", type=Path, metavar="DIR", help="folder (data.features, or <out>/features)")
    features.add_argument(
        "--kind", choices=("float32", "float16"), help="of the numbers in the files (as in those there, else float32)"
    )
    coords = verb("export-coords", _export_coords, "positions of all tiles as HDF5, for TRIDENT or CLAM")
    coords.add_argument("--layout", choices=("trident", "clam"), required=True, help="of the files")
    coords.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder; files go to DIR/patches")
    plan = verb("plan", _plan, "predict memory, communication and cost of training, without training")
    plan.add_argument("--ranks", type=_count, metavar="N", help="processes, in place of execution.ranks")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="memory of a rank: 80GB, 512MiB, bytes (what is free here)")
    plan.add_argument("--tiles", type=_count, metavar="N", help="tiles of a step over all ranks (those of the shards)")
    plan.add_argument("--json", action="store_true", help="print figures for programs")
    simulate = verb("simulate", _simulate, "predict step time and bottleneck on so many nodes, from a machine file")
    simulate.add_argument("--nodes", default="1,2,4,8", metavar="N,N,...", help="numbers of nodes (%(default)s)")
    simulate.add_argument(
        "--machine", type=Path, metavar="FILE", help="what a node can do (configs/machines/h200-8x400g.yaml)"
    )
    simulate.add_argument("--slides", type=_count, metavar="N", help="so many slides, drawn from those that are known")
    simulate.add_argument(
        "--slow-rank", type=_positive, default=1.0, metavar="X", help="one rank takes X times as long"
    )
    simulate.add_argument("--plot", type=Path, metavar="FILE", help="draw it, too: a PNG")
    simulate.add_argument("--json", action="store_true", help="print figures for programs")
    bench = verb("bench", _bench, "measure this machine: a machine file for `gigamil simulate`", config=False)
    bench.add_argument("what", choices=("calibrate",), help="encoder, decoding, step, all-reduce: some minutes")
    bench.add_argument("config", nargs="?", metavar="CONFIG.yaml", help="whose encoder and tiles (defaults)")
    bench.add_argument("--out", type=Path, required=True, metavar="FILE", help="machine file to write")
    bench.add_argument("--ranks", type=_count, metavar="N", help="ranks of a node (its GPUs, or 2)")
    bench.add_argument("--quick", action="store_true", help="fewer sizes and rounds")
    add_plugin(bench)
    bench.set_defaults(limit=None, print_config=False)
    verb("train", _train, "train on execution.ranks ranks of this machine, or continue")
    verb("evaluate", _evaluate, "predict held-out slides; metrics with intervals, figures, report")
    heatmap = verb("heatmap", _heatmap, "draw the attention of slides")
    heatmap.add_argument(
        "--slide", action="append", default=[], metavar="ID|FILE", help="slide id, or a new slide file"
    )
    heatmap.add_argument("--mpp", type=_positive, help="micron per pixel of new slide files that carry none")
    heatmap.add_argument(
        "--saliency",
        action="store_true",
        help="also draw the size of the gradient of the predicted class's logit by the pixels; dense encoders only",
    )
    run = verb("run", _run, "tile, split, train, evaluate, heatmap; what is done is skipped")
    study = run.add_argument_group("cross-validation: a run per fold and seed in <out>/study, and one report of all")
    study.add_argument("--folds", type=_folds, metavar="all|K,K,...", help="all folds of the cohort, or these, from 0")
    study.add_argument("--seeds", type=_count, metavar="N", help="so many runs of each fold (1)")
    study.add_argument("--report-only", action="store_true", help="train nothing: a report of the runs that are done")
    compare = verb("compare", _compare, "runs or studies side by side, on the slides that all predict", config=False)
    compare.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="evaluated run, or study; the first is the reference"
    )
    compare.add_argument(
        "--to", type=Path, default=Path("comparison"), metavar="DIR", help="table, figures, page (%(default)s)"
    )
    compare.add_argument("--metric", metavar="NAME", help="that is shown first (the task's)")
    compare.add_argument(
        "--bootstrap", type=_count, default=1000, metavar="N", help="resamples of patients (%(default)s)"
    )
    predict = verb("predict", _predict, "predict new slide files with a trained model", config=False)
    predict.add_argument("slides", nargs="+", type=Path, metavar="SLIDE", help="slide files, or DICOM folders")
    predict.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="trained run, or folder of `gigamil export`"
    )
    predict.add_argument(
        "--to", type=Path, metavar="DIR", help="predictions.csv, tiles, heatmaps (DIR of --run/new_slides)"
    )
    predict.add_argument("--mpp", type=_positive, help="micron per pixel, for files that carry none")
    predict.add_argument("--no-heatmaps", action="store_true", help="numbers only")
    add_plugin(predict)
    export = verb("export", _export, "the best model of a run: safetensors, JSON, and an MLflow model", config=False)
    export.add_argument("folder", type=Path, metavar="RUN", help="evaluated run")
    export.add_argument("--to", type=Path, metavar="DIR", help="folder (RUN/export)")
    add_plugin(export)
    sync = verb("sync", _sync, "send a run folder to an MLflow server: what it does not have yet", config=False)
    sync.add_argument("folder", type=Path, metavar="RUN", help="run folder (bookkeeping.out); not while it is trained")
    sync.add_argument("--to", metavar="URI", help="http://HOST:PORT, ... (MLFLOW_TRACKING_URI, else RUN/mlflow.db)")
    return parser


def _verb_epilog(config: bool) -> str:
    return "Any key of the configuration can follow: --section.key VALUE (docs/configuration.md)." if config else ""


def _load(arguments: argparse.Namespace, overrides: Sequence[str]) -> "RunConfig":
    """The resolved configuration; plugins are imported, so that names in it are known."""
    from gigamil.config.load import load_config, to_yaml

    words = list(overrides)
    if arguments.limit is not None:
        words += ["--bookkeeping.limit", str(arguments.limit)]
    config = load_config(arguments.config, words)
    import_plugins(arguments.plugin)
    if arguments.print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _demo(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    from gigamil.demo import run_demo

    print(json.dumps(run_demo(arguments.out, arguments.ranks)), flush=True)
    return 0


def _init(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    from gigamil.data.init import init_config

    report = init_config(
        arguments.slides,
        arguments.labels,
        arguments.yaml,
        slide_column=arguments.slide_column,
        patient_column=arguments.patient_column,
        label_column=arguments.label_column,
        patient_is_slide=arguments.patient_is_slide,
        overwrite=arguments.overwrite,
    )
    print(report.text())
    return 0


def _doctor(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    if arguments.dist:
        from gigamil.doctor_dist import run_doctor_dist

        return run_doctor_dist(arguments.out, arguments.ranks)
    from gigamil.doctor import run_doctor
    from gigamil.errors import ConfigError

    if arguments.ranks is not None:
        raise ConfigError("--ranks is of --dist: gigamil doctor --dist --ranks N")

    report = run_doctor(arguments.out)
    print(report.text())
    return report.exit_code


def _inspect(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.data.scan import find_slides
    from gigamil.errors import ConfigError, SlideError
    from gigamil.slides.inspect import inspect_slide

    paths = [Path(text) for text in arguments.slides]
    tables = [path for path in paths if path.suffix.lower() in (".yaml", ".yml", ".csv")]
    if tables and len(paths) > 1:
        raise ConfigError(f"'{tables[0]}' is not a slide; inspect it alone")
    if overrides and not tables:
        raise ConfigError(f"unknown words: {' '.join(overrides)}")
    # A folder that is one slide, of DICOM files, holds no other; one without any is refused by the reader.
    is_cohort = any(path.is_dir() and list(find_slides(path)) not in ([], [path]) for path in paths)
    if tables or is_cohort or arguments.html:
        return _inspect_cohort(arguments, paths, overrides)
    sizes = {name: value for name in ("tile_px", "tile_mpp") if (value := getattr(arguments, name)) is not None}
    code = 0
    for path in arguments.slides:
        try:
            print(inspect_slide(path, default_mpp=arguments.mpp, **sizes).text())
        except SlideError as error:
            print(f"gigamil: {error}", file=sys.stderr)
            code = error.exit_code
    return code


def _inspect_cohort(arguments: argparse.Namespace, paths: Sequence[Path], overrides: Sequence[str]) -> int:
    from gigamil.config.load import load_config
    from gigamil.data.cohort import load_cohort
    from gigamil.data.inspect import inspect_cohort, slides_in

    kind = paths[0].suffix.lower()
    words = list(overrides)
    for name, key in (("tile_px", "slides.tile_px"), ("tile_mpp", "slides.tile_mpp"), ("mpp", "slides.default_mpp")):
        value = getattr(arguments, name)
        words += [] if value is None else [f"--{key}", str(value)]
    if kind == ".csv":
        words = ["--cohort.table", json.dumps(str(paths[0])), "--cohort.patient_is_slide", "true", *words]
    config = load_config(paths[0] if kind in (".yaml", ".yml") else None, words)
    if kind in (".yaml", ".yml", ".csv"):
        rows = load_cohort(config.cohort, need_labels=False, need_files=False).rows
    else:
        rows = slides_in(paths)
    inspection = inspect_cohort(rows, config.slides, config.execution)
    print(inspection.text())
    if arguments.html:
        from gigamil.evaluate.cohort_page import write_cohort_page

        write_cohort_page(arguments.html, inspection)
        print(f"page: '{arguments.html}'")
    return inspection.exit_code


def _tile(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.data.tile import ArrayJob, tile_cohort

    job = None if arguments.shard is None else ArrayJob(*arguments.shard)
    config = _load(arguments, overrides)
    report = tile_cohort(config, progress=config.bookkeeping.progress, job=job)
    if not config.bookkeeping.progress:  # the result alone
        print("\n".join(found.text() for found in (report, *report.extra)))
    return report.exit_code


def _split(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.data.folds import make_folds, sides_table

    words = list(overrides)
    if arguments.folds:
        words += ["--cohort.split_method", "kfold", "--cohort.folds", str(arguments.folds)]
    if arguments.by_site:
        words += ["--cohort.preserve_sites", "true"]
    if arguments.config.lower().endswith((".csv", ".tsv")):
        return _split_labels(arguments, words)
    from gigamil.data.split import makes_folds
    from gigamil.data.targets import load_target_table
    from gigamil.pipeline import split_cohort

    _refuse_options(arguments, ("out", "slide_column", "patient_column", "label_column", "patient_is_slide"))
    config = _load(arguments, words)
    splits = split_cohort(config, again=arguments.again)
    table = load_target_table(config.cohort, config.science)
    if makes_folds(table, config.cohort):
        print(f"all slides of the table:\n{make_folds(table, config.cohort).text(table)}\nthis run:")
    print(sides_table({"-" if splits.fold is None else str(splits.fold): splits.split_of()}, table))
    print(f"{len(splits.train)} train, {len(splits.val)} validation, {len(splits.test)} test slides ({splits.method})")
    for slide_ids, why in (
        (splits.without_tiles, "have no tiles"),
        (splits.unnamed, "are not named by the split file"),
    ):
        if slide_ids:
            print(f"{len(slide_ids)} slides {why} and are in no split: {', '.join(slide_ids[:10])}")
    print(f"frozen in '{config.bookkeeping.out / 'splits.json'}'")
    return 0


def _split_labels(arguments: argparse.Namespace, words: Sequence[str]) -> int:
    from gigamil.config.load import load_config
    from gigamil.config.schema import Columns
    from gigamil.data.cohort import load_labels
    from gigamil.data.folds import freeze_folds, make_folds
    from gigamil.errors import ConfigError

    _refuse_options(arguments, ("limit", "print_config", "plugin"))
    cohort = load_config(None, words).cohort
    if cohort.splits is not None:
        raise ConfigError(
            f"cohort.splits: folds are made of '{arguments.config}', so there is no split to take over. Give a configuration: "
            "gigamil split CONFIG.yaml --cohort.splits FILE"
        )
    usual = Columns()  # load_labels finds these itself, where there is none to choose
    chosen = {name: column for name, column in cohort.columns if column != getattr(usual, name)}
    for name, column in (
        ("slide_id", arguments.slide_column),
        ("patient_id", arguments.patient_column),
        ("label", arguments.label_column),
    ):
        if column is not None:
            chosen[name] = column
    patient_is_slide = arguments.patient_is_slide or cohort.patient_is_slide
    path = Path(arguments.config)
    table = load_labels(path, chosen, patient_is_slide=patient_is_slide, classes=cohort.classes)
    folds = make_folds(table, cohort)
    print(f"{folds.text(table)}\n{folds.method}")
    if arguments.out is None:
        print("nothing is written; --out DIR writes folds.json and folds.csv")
        return 0
    freeze_folds(folds, arguments.out, table, again=arguments.again)
    print(f"frozen in '{arguments.out / 'folds.json'}'; a run takes a fold with --cohort.splits and --cohort.fold")
    return 0


def _refuse_options(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse options that mean nothing for the file that was given."""
    from gigamil.errors import ConfigError

    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    if given:
        raise ConfigError(f"{', '.join(given)}: not for a file such as '{arguments.config}'")


def _features(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.evaluate.features import cache_features

    report = cache_features(_load(arguments, overrides), arguments.to, kind=arguments.kind, plugins=arguments.plugin)
    print(report.text())
    return 0


def _export_coords(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.data.coords import export_coords
    from gigamil.shards.read import ShardSet

    config = _load(arguments, overrides)
    files = export_coords(ShardSet(config.bookkeeping.shard_root), arguments.to, arguments.layout)
    print(f"coordinates of {len(files)} slides in '{arguments.to / 'patches'}'")
    return 0


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from dataclasses import asdict

    from gigamil.train.plan import parse_bytes, plan_run

    config = _load(arguments, overrides)
    memory = None if arguments.gpu_memory is None else parse_bytes(arguments.gpu_memory)
    plan = plan_run(config, ranks=arguments.ranks, device_memory=memory, tiles=arguments.tiles)
    print(json.dumps(asdict(plan) | {"fits": plan.fits}) if arguments.json else plan.text())
    return 0


def _simulate(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from dataclasses import asdict

    from gigamil.scaling.machine import DEFAULT_MACHINE, load_machine
    from gigamil.scaling.simulate import find_cohort, parse_nodes, simulate

    config, nodes = _load(arguments, overrides), parse_nodes(arguments.nodes)
    machine = load_machine(arguments.machine or DEFAULT_MACHINE)
    cohort = find_cohort(config, arguments.slides)
    found = simulate(config, machine, nodes, cohort=cohort, slow_rank=arguments.slow_rank)
    print(json.dumps(asdict(found)) if arguments.json else found.text())
    if arguments.plot is not None:
        from gigamil.scaling.figure import draw_simulation

        draw_simulation(found, arguments.plot)
        if not arguments.json:
            print(f"plot: '{arguments.plot}'")
    return 0


def _bench(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.scaling.calibrate import calibrate
    from gigamil.scaling.machine import save_machine

    config = _load(arguments, overrides)
    machine = calibrate(config, ranks=arguments.ranks, quick=arguments.quick, plugins=arguments.plugin)
    save_machine(machine, arguments.out)
    print(f"'{arguments.out}': {machine.name}; gigamil simulate CONFIG.yaml --machine {arguments.out}")
    return 0


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.pipeline import train_model

    facts = train_model(_load(arguments, overrides), plugins=arguments.plugin)
    best: Any = facts["best_val"]
    print(f"{facts['status']}: {facts['steps']} steps, best validation {best['metric']} {best['value']}")
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.pipeline import evaluate_model

    config = _load(arguments, overrides)
    evaluation = evaluate_model(config)
    for name, found in evaluation["splits"].items():
        for key, estimate in found["metrics"].items():
            print(f"{name:6} {key:18} {_number(estimate['value'])}  95 % {_interval(estimate['ci'])}")
    print(f"report: '{config.bookkeeping.out / 'report.html'}'")
    return 0


def _heatmap(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.pipeline import draw_heatmaps

    config = _load(arguments, overrides)
    for path in draw_heatmaps(config, arguments.slide, mpp=arguments.mpp, saliency=arguments.saliency):
        print(path)
    return 0


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.errors import ConfigError, TrainingError
    from gigamil.pipeline import run_pipeline

    config = _load(arguments, overrides)
    if arguments.folds is None:
        if arguments.seeds is not None or arguments.report_only:
            raise ConfigError("--seeds and --report-only are of a study: add --folds all")
        result = run_pipeline(config, plugins=arguments.plugin)
        print(json.dumps(result), flush=True)
        return 0
    from gigamil.study import run_study

    result = run_study(
        config,
        folds=arguments.folds or None,
        seeds=arguments.seeds or 1,
        plugins=arguments.plugin,
        report_only=arguments.report_only,
    )
    print(json.dumps(result), flush=True)
    return TrainingError.exit_code if result["failed"] else 0


def _compare(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    from gigamil.evaluate.comparison import COMPARISON_PAGE, compare_runs, comparison_text

    found = compare_runs(arguments.runs, arguments.to, metric=arguments.metric, num_bootstrap=arguments.bootstrap)
    print(comparison_text(found))
    print(arguments.to / COMPARISON_PAGE)
    return 0


def _predict(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    from gigamil.predict import predict_files, predictions_text

    found = predict_files(
        arguments.slides,
        arguments.run,
        arguments.to,
        mpp=arguments.mpp,
        heatmaps=not arguments.no_heatmaps,
        plugins=arguments.plugin,
    )
    print(predictions_text(found))
    return 0


def _export(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    from gigamil.evaluate.exported import export_run
    from gigamil.evaluate.mlflow_export import save_mlflow_model

    folder = export_run(arguments.folder, arguments.to or arguments.folder / "export", plugins=arguments.plugin)
    model = save_mlflow_model(folder, folder / "mlflow")
    print(folder)
    print(f"mlflow models predict --env-manager local -m {model} -t csv -i slides.csv   # a column 'slide' of paths")
    return 0


def _sync(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    from gigamil.train.sync import sync_run

    print(sync_run(arguments.folder, arguments.to, progress=True).text())
    return 0


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _folds(text: str) -> list[int]:
    if text == "all":
        return []
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither all nor numbers with commas, as 0,2") from None


def _part(text: str) -> tuple[int, int]:
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 1 to N, for example 1/4")
    return int(i), int(n)


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be greater than 0")
    return value


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return "undefined" if bounds is None else f"[{bounds[0]:.4f}, {bounds[1]:.4f}]"


def _version() -> str:
    from gigamil import __version__

    return __version__
