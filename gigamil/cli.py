"""The command line: parse, load the configuration, call one function, turn errors into a message and an exit code."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
6 training failed"""


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
        return verb(arguments, overrides)
    except GigamilError as error:
        print(f"gigamil: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("gigamil: interrupted; the same command continues", file=sys.stderr, flush=True)
        return 5
    except BrokenPipeError:  # `gigamil ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def verb(name: str, function: Callable[..., int], words: str, config: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=words,
            description=words[0].upper() + words[1:] + ".",
            allow_abbrev=False,
            epilog=_verb_epilog(config),
        )
        sub.set_defaults(verb=function)
        if config:
            sub.add_argument("config", metavar="CONFIG.yaml", help="configuration of the run")
            sub.add_argument(
                "--limit", type=int, metavar="N", help="only N slides of each split and class: a smoke run"
            )
            sub.add_argument(
                "--plugin", action="append", default=[], metavar="MODULE", help="module that registers your parts"
            )
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
    inspect = verb("inspect", _inspect, "format, levels, mpp, tissue and tiles of slide files", config=False)
    inspect.add_argument("slides", nargs="+", metavar="SLIDE", help="slide files, or folders of DICOM files")
    inspect.add_argument("--mpp", type=_positive, help="micron per pixel, for files that carry none")
    inspect.add_argument("--tile-px", type=_count, default=224, help="tile side in pixels (%(default)s)")
    inspect.add_argument("--tile-mpp", type=_positive, default=0.5, help="micron per pixel of a tile (%(default)s)")
    verb("tile", _tile, "slides -> shards of tissue tiles")
    split = verb("split", _split, "train, validation and test slides, by patient")
    split.add_argument("--again", action="store_true", help="make a new split, if nothing was trained on the old one")
    plan = verb("plan", _plan, "predict memory, communication and cost of training, without training")
    plan.add_argument("--ranks", type=_count, metavar="N", help="processes, in place of execution.ranks")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="memory of a rank: 80GB, 512MiB, bytes (what is free here)")
    plan.add_argument("--tiles", type=_count, metavar="N", help="tiles of a step over all ranks (those of the shards)")
    plan.add_argument("--json", action="store_true", help="print figures for programs")
    verb("train", _train, "train on execution.ranks ranks of this machine, or continue")
    verb("evaluate", _evaluate, "predict held-out slides; metrics with intervals, figures, report")
    heatmap = verb("heatmap", _heatmap, "draw the attention of slides")
    heatmap.add_argument(
        "--slide", action="append", default=[], metavar="ID|FILE", help="slide id, or a new slide file"
    )
    heatmap.add_argument("--mpp", type=_positive, help="micron per pixel of new slide files that carry none")
    verb("run", _run, "tile, split, train, evaluate, heatmap; what is done is skipped")
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
    from gigamil.doctor import run_doctor

    report = run_doctor(arguments.out)
    print(report.text())
    return report.exit_code


def _inspect(arguments: argparse.Namespace, _overrides: Sequence[str]) -> int:
    from gigamil.errors import SlideError
    from gigamil.slides.inspect import inspect_slide

    code = 0
    for path in arguments.slides:
        try:
            report = inspect_slide(path, mpp=arguments.mpp, tile_px=arguments.tile_px, tile_mpp=arguments.tile_mpp)
            print(report.text())
        except SlideError as error:
            print(f"gigamil: {error}", file=sys.stderr)
            code = error.exit_code
    return code


def _tile(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.data.tile import tile_cohort

    return tile_cohort(_load(arguments, overrides)).exit_code


def _split(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.pipeline import split_cohort

    config = _load(arguments, overrides)
    splits = split_cohort(config, again=arguments.again)
    print(f"{len(splits.train)} train, {len(splits.val)} validation, {len(splits.test)} test slides ({splits.method})")
    print(f"frozen in '{config.bookkeeping.out / 'splits.json'}'")
    return 0


def _plan(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from dataclasses import asdict

    from gigamil.train.plan import parse_bytes, plan_run

    config = _load(arguments, overrides)
    memory = None if arguments.gpu_memory is None else parse_bytes(arguments.gpu_memory)
    plan = plan_run(config, ranks=arguments.ranks, device_memory=memory, tiles=arguments.tiles)
    print(json.dumps(asdict(plan) | {"fits": plan.fits}) if arguments.json else plan.text())
    return 0


def _train(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.train.api import train_model

    facts = train_model(_load(arguments, overrides), plugins=arguments.plugin)
    print(f"{facts['status']}: {facts['steps']} steps, best validation AUC {facts['best_val_auc']}")
    return 0


def _evaluate(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.pipeline import evaluate_model

    config = _load(arguments, overrides)
    evaluation = evaluate_model(config)
    for name, metrics in evaluation["splits"].items():
        for key in ("auc", "balanced_accuracy", "f1"):
            estimate = metrics[key]
            print(f"{name:6} {key:18} {_number(estimate['value'])}  95 % {_interval(estimate['ci'])}")
    print(f"report: '{config.bookkeeping.out / 'report.html'}'")
    return 0


def _heatmap(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.pipeline import draw_heatmaps

    for path in draw_heatmaps(_load(arguments, overrides), arguments.slide, mpp=arguments.mpp):
        print(path)
    return 0


def _run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    from gigamil.pipeline import run_pipeline

    result = run_pipeline(_load(arguments, overrides), plugins=arguments.plugin)
    print(json.dumps(result), flush=True)
    return 0


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _positive(text: str) -> float:
    value = float(text)
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
