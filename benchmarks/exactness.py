"""Is the distributed, chunked step the same as full-bag autograd in one process?

For each number of ranks, the step that training runs is compared with the textbook computation (one process, one graph
over all tiles): loss, the gradient of every parameter, and that of every tile's embedding. Slides are unequal or of one
tile, ranks may be empty, the chunks' graphs are kept, half kept or replayed, dropout and augmentation are drawn by key.

- float64 with torch alone: rounding only, bound 1e-12; 1e-9 for TransMIL, whose pseudo-inverse enlarges rounding.
- float32 through the real DeepSpeed launcher and engine at each ZeRO stage with SGD (Adam hides a gradient that is
  wrong by a factor), optimiser state on the device or offloaded: bound 1e-5. A case of any aggregator that is beyond it
  has failed only if it is also beyond four times the largest error that one float32 process has by itself, over eight
  models that differ in their last digits; TransMIL alone needs that, and is reported apart.
- bfloat16 autocast through the same engine, compared with one process under autocast whose loss carries the number of
  ranks, as a rank's does until gradients are averaged (times 3 rounds otherwise than times 1): bound 2^-8, the
  largest error of one rounding to 8 bits. The head is float32 in both; the encoder's gradient is rounded once per
  chunk here and once for the whole bag there, and sums of such independent roundings differ by less than one of them.

The error of a gradient is max over parameters of ||d|| / max(||g_parameter||, floor ||g_all||), on every rank. The
floor is 1e-3, and 6e-3 in float32, where 1e-5 of less than that is finer than one rounding (2^-24) of the whole
gradient.

    python benchmarks/exactness.py --ranks 1,2,3,4 --zero 0,1,2,3     one aggregator
    python benchmarks/exactness.py --all                              every aggregator, every variant of it
    python benchmarks/exactness.py --streaming                        dense encoders

With --streaming the step of a dense encoder over blocks is compared, in float64 on 1 to 4 ranks, with the network on
each whole slide in one graph, draws included; and on one rank the streamed grid and all gradients, also the image's,
with those of the image at once, of sizes that the stride does not divide, two images at once, with a mask and without.
Bounds: 1e-12 of the grid, 1e-10 of gradients. Its last line: nets, cases, the largest error of features and of a
gradient, and how many cases failed.

Without --streaming the last line is JSON of: aggregators, cases, the largest error of a gradient of each kind (float64,
the same of TransMIL, float32 through DeepSpeed, the same of TransMIL, bfloat16; null without a case), and how many
cases failed.
"""

import argparse
import json
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gigamil.testing.exactness import (
    KEEPS,
    SHAPES,
    Case,
    Errors,
    built_in_aggregators,
    cases,
    check_cases,
    group_sizes,
    num_variants,
    within_float32,
)
from gigamil.train.launch import free_port

BOUNDS = {"float64": 1e-12, "float64, pinv": 1e-9, "bfloat16": 2.0**-8}
WITH_PINV = ("transmil",)
FEATURE_BOUND, GRADIENT_BOUND = 1e-12, 1e-10  # of dense encoders: whole slides are summed in another order
TIMEOUT_S = 1200


@dataclass
class Row:
    """Worst errors over the cases of one kind in one world."""

    ranks: int
    kind: str
    zero: int | None
    cases: int
    loss: float
    gradient: float
    failed: int
    seconds: float

    def line(self) -> str:
        """For the table."""
        what = f"{self.kind}, {'torch' if self.zero is None else f'ZeRO {self.zero}'}"
        numbers = f"{self.cases:6} {self.loss:10.1e} {self.gradient:12.1e} {self.failed:7} {self.seconds:8.0f}"
        return f"{self.ranks:5}  {what:22} {numbers}"


def main(words: Sequence[str] | None = None) -> int:
    """Compare, print, return 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 3, 4], help="worlds to compare (%(default)s)")
    parser.add_argument("--zero", type=_numbers, default=[0, 1, 2, 3], help="ZeRO stages (%(default)s)")
    parser.add_argument("--all", action="store_true", help="every aggregator; bfloat16 and offload at each stage too")
    parser.add_argument("--streaming", action="store_true", help="dense encoders over blocks, against whole slides")
    parser.add_argument("--worker", nargs=2, metavar=("ZERO", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.worker:
        return _worker(*arguments.worker, arguments.all)
    if arguments.streaming:
        return _streaming(arguments.ranks)
    print("ranks  arithmetic              cases  loss error  gradient error  failed  seconds")
    rows = []
    for ranks in arguments.ranks:
        for zero in (None, *arguments.zero):
            rows += _compare(ranks, zero, arguments.all)
            print("\n".join(row.line() for row in rows if (row.ranks, row.zero) == (ranks, zero)), flush=True)
    failed = sum(row.failed for row in rows)
    summary = {
        "aggregators": len(built_in_aggregators()) if arguments.all else 1,
        "cases": sum(row.cases for row in rows),
        "worst_fp64": _worst(rows, "float64"),
        "worst_fp64_pinv": _worst(rows, "float64, pinv"),
        "worst_deepspeed": _worst(rows, "float32"),
        "worst_deepspeed_pinv": _worst(rows, "float32, pinv"),
        "worst_bf16": _worst(rows, "bfloat16"),
        "failed": failed,
    }
    print(json.dumps(summary))
    return 1 if failed else 0


def _streaming(worlds: Sequence[int]) -> int:
    """Dense encoders in float64 with torch alone: every net in each world, and its grid over single images."""
    from gigamil.testing.dense import NETS

    print("ranks  net                      cases  feature error  gradient error  failed", flush=True)
    rows: list[StreamingRow] = []
    for ranks in worlds:
        start = time.monotonic()
        for row in _stream_in_turn(list(NETS)) if ranks == 1 else _stream_together(ranks, list(NETS)):
            rows.append(row)
            print(row.line(), flush=True)
        print(f"       {time.monotonic() - start:.0f} s", flush=True)
    failed = sum(row.failed for row in rows)
    summary = {
        "nets": len(NETS),
        "cases": sum(row.cases for row in rows),
        "worst_feature": max((row.feature for row in rows), key=_nan_is_largest),
        "worst_gradient": max((row.gradient for row in rows), key=_nan_is_largest),
        "failed": failed,
    }
    print(json.dumps(summary))
    return 1 if failed else 0


@dataclass
class StreamingRow:
    """Worst errors of a network over slides in one world, or over images."""

    ranks: int
    net: str
    cases: int
    feature: float
    gradient: float
    failed: int

    def line(self) -> str:
        """For the table."""
        return (
            f"{self.ranks:5}  {self.net:23} {self.cases:6} {self.feature:14.1e} {self.gradient:15.1e} {self.failed:7}"
        )


def streaming_row(ranks: int, net: str, of_case: Sequence[Sequence[tuple[float, float]]]) -> StreamingRow:
    """Of the errors (of features, of the worst gradient) of each case on each rank; one of them bad is a failure."""
    good = [all(f <= FEATURE_BOUND and g <= GRADIENT_BOUND for f, g in by_rank) for by_rank in of_case]
    features, gradients = zip(*(errors for by_rank in of_case for errors in by_rank), strict=True)
    worst = (max(errors, key=_nan_is_largest) for errors in (features, gradients))
    return StreamingRow(ranks, net, len(good), *worst, failed=good.count(False))


def _stream_in_turn(nets: Sequence[str]) -> Iterator[StreamingRow]:
    """One rank; a network on each core."""
    from multiprocessing import get_context

    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        found = {net: pool.submit(_stream_alone, net) for net in reversed(nets)}  # the longest first
        for net in nets:
            yield from found[net].result()


def _stream_alone(net: str) -> list[StreamingRow]:
    from gigamil.testing.dense import check_dense_cases, check_image_case, dense_cases, image_cases

    slides = check_dense_cases(0, 1, list(dense_cases(1, [net])))
    images = [check_image_case(case) for case in image_cases(net)]
    return [
        streaming_row(1, net, [[errors.worst] for errors in slides]),
        streaming_row(1, f"{net}, images", [[errors] for errors in images]),
    ]


def _stream_together(ranks: int, nets: Sequence[str]) -> Iterator[StreamingRow]:
    from gigamil.testing.dense import check_dense_cases, dense_cases
    from gigamil.testing.ranks import run_on_ranks

    wanted = list(dense_cases(ranks, nets))
    by_rank = run_on_ranks(check_dense_cases, ranks, ranks, wanted, timeout_s=TIMEOUT_S)
    for net in nets:
        numbers = [number for number, case in enumerate(wanted) if case.net == net]
        yield streaming_row(ranks, net, [[errors[number].worst for errors in by_rank] for number in numbers])


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def wanted_cases(ranks: int, zero: int | None, everything: bool) -> list[Case]:
    """What is compared in one world, on torch alone (the whole matrix) or at one ZeRO stage."""
    if not everything:
        return list(cases(ranks, zero))
    if zero is None:
        return [case for name in built_in_aggregators() for case in cases(ranks, None, name)]
    return [case for name in built_in_aggregators() for case in _through_the_engine(ranks, zero, name)]


def _through_the_engine(ranks: int, zero: int, name: str) -> Iterator[Case]:
    """Few cases of each variant, because an engine takes a third of a second to make; over all, every setting."""
    every, num_groupings = list(cases(ranks, zero, name)), len(group_sizes(ranks))
    for variant in range(num_variants(name)):
        # In the order of `cases`: shapes, group sizes, kept shares.
        own = [case for case in every if case.variant == variant]
        start = zero + variant + built_in_aggregators().index(name)
        place = [(n % len(SHAPES), (n // 2) % num_groupings, n % len(KEEPS)) for n in (start, start + 2)]
        first, second = [own[(shape * num_groupings + group) * len(KEEPS) + keep] for shape, group, keep in place]
        yield from (first, second, replace(first, bfloat16=True))
        if zero in (1, 2):
            yield replace(second, offload=True, bfloat16=start % 2 == 0)


def kind_of(case: Case) -> str:
    """Arithmetic, by which errors are bounded and reported."""
    if case.bfloat16:
        return "bfloat16"
    width = "float64" if case.zero_stage is None else "float32"
    return f"{width}, pinv" if case.aggregator in WITH_PINV else width


def _within(kind: str, case: Case, errors: Errors) -> bool:
    return errors.within(BOUNDS[kind]) if kind in BOUNDS else within_float32(case, errors)


def _worst(rows: Sequence[Row], kind: str) -> float | None:
    return max((row.gradient for row in rows if row.kind == kind), key=_nan_is_largest, default=None)


def _nan_is_largest(error: float) -> float:
    return float("inf") if math.isnan(error) else error


def _compare(ranks: int, zero: int | None, everything: bool) -> list[Row]:
    """Run the cases of one world under the DeepSpeed launcher; float64 ones too, on torch's own collectives."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(ranks)]
        command += ["--hostfile", os.devnull, "--no_local_rank", "--master_port", str(free_port())]
        command += [os.path.abspath(__file__), "--worker", "-" if zero is None else str(zero), folder]
        command += ["--all"] if everything else []
        env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        code = launched(command, env, TIMEOUT_S)
        files = sorted(Path(folder).glob("*.json"))
        if code is None:
            raise SystemExit(
                f"{ranks} ranks, ZeRO {zero}: not done after {TIMEOUT_S} s, {len(files)} answered; they were ended"
            )
        if code or len(files) != ranks:
            raise SystemExit(f"{ranks} ranks, ZeRO {zero}: the launcher returned {code}, {len(files)} answered")
        by_rank = [[Errors(*errors) for errors in json.loads(path.read_text())] for path in files]
    wanted = wanted_cases(ranks, zero, everything)
    return summarised(ranks, zero, wanted, by_rank, time.monotonic() - start)


def launched(command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> int | None:
    """Return code of a launcher; None if it did not end in time. Then, as on Ctrl-C, none of its ranks lives on.

    They are in a session of their own, because a launcher that is killed leaves its ranks behind.
    """
    with subprocess.Popen(command, env=env, start_new_session=True) as launcher:
        try:
            return launcher.wait(timeout_s)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(launcher.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                return None
            raise


def summarised(
    ranks: int, zero: int | None, wanted: Sequence[Case], by_rank: Sequence[Sequence[Errors]], seconds: float
) -> list[Row]:
    """A row for each kind of arithmetic; a case has failed if it has on any rank."""
    rows = []
    for kind in dict.fromkeys(map(kind_of, wanted)):
        numbers = [number for number, case in enumerate(wanted) if kind_of(case) == kind]
        errors = [[of_rank[number] for of_rank in by_rank] for number in numbers]
        pairs = zip((wanted[number] for number in numbers), errors, strict=True)
        failed = sum(not all(_within(kind, case, error) for error in of_case) for case, of_case in pairs)
        flat = [error for of_case in errors for error in of_case]
        loss = max((error.loss for error in flat), key=_nan_is_largest)
        gradient = max((e for error in flat for e in error[1:]), key=_nan_is_largest)
        rows.append(Row(ranks, kind, zero, len(numbers), loss, gradient, failed, seconds))
    return rows


def _worker(zero: str, folder: str, everything: bool) -> int:
    """One rank: join, compare every case, leave the errors in a file."""
    import torch
    import torch.distributed as dist

    from gigamil.parallel.topology import detect_topology
    from gigamil.train.engine import start_distributed

    torch.set_num_threads(1)
    topology = detect_topology()
    start_distributed(topology, torch.device("cpu"), timeout_s=120)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns that ZeRO with SGD is untested; we test it
    wanted = wanted_cases(topology.world_size, None if zero == "-" else int(zero), everything)
    errors = check_cases(topology.rank, topology.world_size, wanted)
    (Path(folder) / f"{topology.rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    if "--worker" not in sys.argv:  # `timeout` and batch systems: to end as on Ctrl-C, with the ranks
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
