"""`train_model`: the public call behind `gigamil train`."""

from collections.abc import Sequence

from gigamil.config.load import to_yaml
from gigamil.config.schema import RunConfig
from gigamil.files import replace_file
from gigamil.registry import import_plugins
from gigamil.train.cohort import load_training_data
from gigamil.train.launch import launch_ranks
from gigamil.train.records import RunRecord


def train_model(config: RunConfig, *, plugins: Sequence[str] = ()) -> dict[str, object]:
    """Train on `execution.ranks` ranks of this machine through the DeepSpeed launcher, or continue a stopped run.

    On several machines start `python -m gigamil.train.worker` under a launcher instead: see launch/README.md.

    Args:
        config: what to train; `<out>/splits.json` and the shards must exist.
        plugins: modules that register your encoders, aggregators or losses.
    Returns:
        The facts of run.json.
    Raises:
        CohortError, ShardError: found before ranks are started.
        RanksFailed: the ranks ended with an error; its exit code tells which kind.
    """
    import_plugins(plugins)
    load_training_data(config)  # what is wrong with the data is told before ranks are started
    out = config.bookkeeping.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "logs").mkdir(exist_ok=True)
    path = out / "logs" / "launched.yaml"
    replace_file(path, to_yaml(config))
    words = [str(path)]
    for plugin in plugins:
        words += ["--plugin", plugin]
    launch_ranks(
        "gigamil.train.worker", words, config.execution, logs=out / "logs", continues="from the last checkpoint"
    )
    return RunRecord(out / "run.json").facts
