"""Is the distributed, chunked step the same as full-bag autograd in one process?

For each number of ranks, the step that training runs is compared with the textbook computation (one process, one graph
over all tiles): loss and the gradient of every parameter. Slides are unequal, ranks may be empty, the chunks' graphs are
kept, half kept or replayed, dropout and augmentation are drawn by key. Once in float64 with torch alone (the operators:
rounding only, bound 1e-12), once through the real DeepSpeed launcher and engine at each ZeRO stage with SGD in float32
(bound 1e-5; SGD, because Adam hides a gradient that is wrong by a factor).

The error of a gradient is max over parameters of ||d|| / max(||g_parameter||, 1e-3 ||g_all||), on every rank.

    python benchmarks/exactness.py --ranks 1,2,3,4 --zero 0,1,2,3

The last line is JSON: worst_fp64, worst_deepspeed (both gradients; losses are held to the same bounds), cases, failed.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gigamil.testing.exactness import cases, check_cases

BOUND_FLOAT64 = 1e-12
BOUND_DEEPSPEED = 1e-5
TIMEOUT_S = 600


@dataclass
class Row:
    """Worst errors over the cases of one world."""

    ranks: int
    zero: int | None
    cases: int
    loss: float
    gradient: float
    failed: int
    seconds: float

    def line(self) -> str:
        """For the table."""
        what = "float64, torch" if self.zero is None else f"float32, ZeRO {self.zero}"
        return f"{self.ranks:5}  {what:16} {self.cases:6} {self.loss:10.1e} {self.gradient:12.1e} {self.failed:7} {self.seconds:8.0f}"


def main(words: Sequence[str] | None = None) -> int:
    """Compare, print, return 0 if nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=_numbers, default=[1, 2, 3, 4], help="worlds to compare (%(default)s)")
    parser.add_argument("--zero", type=_numbers, default=[0, 1, 2, 3], help="ZeRO stages (%(default)s)")
    parser.add_argument("--worker", nargs=2, metavar=("ZERO", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.worker:
        return _worker(*arguments.worker)
    print("ranks  arithmetic        cases  loss error  gradient error  failed  seconds")
    rows = []
    for ranks in arguments.ranks:
        for zero in (None, *arguments.zero):
            rows.append(_compare(ranks, zero))
            print(rows[-1].line(), flush=True)
    float64 = [row.gradient for row in rows if row.zero is None]
    deepspeed = [row.gradient for row in rows if row.zero is not None]
    failed = sum(row.failed for row in rows)
    summary = {
        "worst_fp64": max(float64),
        "worst_deepspeed": max(deepspeed, default=None),
        "cases": sum(row.cases for row in rows),
        "failed": failed,
    }
    print(json.dumps(summary))
    return 1 if failed else 0


def _compare(ranks: int, zero: int | None) -> Row:
    """Run the cases of one world under the DeepSpeed launcher; float64 ones too, on torch's own collectives."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--num_gpus", str(ranks)]
        command += ["--hostfile", os.devnull, "--no_local_rank", "--master_port", str(_free_port())]
        command += [os.path.abspath(__file__), "--worker", "-" if zero is None else str(zero), folder]
        env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        result = subprocess.run(command, env=env, timeout=TIMEOUT_S, check=False)
        files = sorted(Path(folder).glob("*.json"))
        if result.returncode or len(files) != ranks:
            raise SystemExit(
                f"{ranks} ranks, ZeRO {zero}: the launcher returned {result.returncode}, {len(files)} answered"
            )
        errors = [tuple(pair) for path in files for pair in json.loads(path.read_text())]
    bound = BOUND_FLOAT64 if zero is None else BOUND_DEEPSPEED
    num_cases = len(errors) // ranks
    # A case has failed if it has on any rank; a comparison with NaN is no success.
    bad = {number % num_cases for number, pair in enumerate(errors) if not max(pair) <= bound}
    losses, gradients = zip(*errors, strict=True)
    return Row(ranks, zero, num_cases, max(losses), max(gradients), len(bad), time.monotonic() - start)


def _worker(zero: str, folder: str) -> int:
    """One rank: join, compare every case, leave the errors in a file."""
    import torch
    import torch.distributed as dist

    from gigamil.parallel.topology import detect_topology
    from gigamil.train.engine import start_distributed

    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns that ZeRO with SGD is untested; we test it
    topology = detect_topology()
    start_distributed(topology, torch.device("cpu"), timeout_s=120)
    wanted = list(cases(topology.world_size, None if zero == "-" else int(zero)))
    errors = check_cases(topology.rank, topology.world_size, wanted)
    (Path(folder) / f"{topology.rank}.json").write_text(json.dumps(errors))
    dist.barrier()
    dist.destroy_process_group()
    return 0


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
