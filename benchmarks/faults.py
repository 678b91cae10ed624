"""Does a training on several nodes survive what happens to machines, and how soon do the others leave?

Two nodes are made on this machine (network namespaces with a link each, gigamil/testing/nodes.py), each runs its part of
`deepspeed --no_ssh` or `torchrun` with two ranks, and in the middle of the steps of a small training

    kill         a rank is killed                       node         all processes of a node are killed
    freeze       a rank is stopped (SIGSTOP)            frozen-node  all processes of a node are stopped, and thaw later
    cut          a node's cable is pulled               term         all processes of a node get SIGTERM, as at a time limit

Measured: seconds until the last process of the other nodes has left, processes left behind, and whether the same command, typed
again, ends with the metrics, parameters and moments of a run that nothing happened to, bit for bit. Each round hits another
rank or node, after another step.

Expected: a rank that is gone is noticed within seconds, silence after 17 s; all have left within 30 s, with one message that
names what was lost, and every run recovers. What takes more than 60 s is a hang.

    python benchmarks/faults.py [--faults kill,freeze,cut,node,frozen-node,term] [--rounds 1] [--launcher deepspeed]

Needs root (namespaces). A minute or two for each fault on two idle cores. The last line is JSON: faults, recovered (with one
message, no orphan, within 30 s), hangs, worst_exit_s; exit code 1 if a promise was broken.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import get_args

import torch
from origin import origin

from gigamil.testing.faults import KINDS, RANKS_PER_NODE, Fault, Found, Kind, train_undisturbed, try_fault
from gigamil.testing.nodes import Launcher, Nodes, why_no_nodes

NUM_NODES = 2
STEPS = range(3, 10)  # of 16: none is the last


def planned(kinds: Sequence[Kind], rounds: int) -> Iterator[Fault]:
    """Every kind in each round; whom and when are drawn, the same for the same round."""
    for number in range(rounds):
        for kind in kinds:
            draw = random.Random(f"{kind}/{number}")
            yield Fault(kind, draw.randrange(NUM_NODES * RANKS_PER_NODE), draw.choice(STEPS))


def row(found: Found) -> str:
    """A line of the table."""
    seconds = "     hang" if found.exit_s is None else f"{found.exit_s:9.1f}"
    recovered = "yes" if found.recovered else "NO"
    return f"{found.fault!s:34} {seconds}  {recovered:>13}  {found.orphans:7}  {'; '.join(found.problems) or 'as promised'}"


def summary(everything: Sequence[Found]) -> dict[str, object]:
    """What the last line says."""
    seconds = [found.exit_s for found in everything if found.exit_s is not None]
    return {
        "faults": len(everything),
        "recovered": sum(not found.problems for found in everything),
        "hangs": sum(found.exit_s is None for found in everything),
        "worst_exit_s": round(max(seconds), 1) if seconds else None,
    }


def kinds(text: str) -> list[Kind]:
    """The words of `--faults`."""
    known = {str(kind): kind for kind in KINDS}
    unknown = [word for word in text.split(",") if word not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(unknown)}; there are {', '.join(KINDS)}")
    return [known[word] for word in text.split(",")]


def main(words: Sequence[str] | None = None) -> int:
    """Try the faults, print, return 0 if all promises were kept, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=kinds, default=list(KINDS), help=f"of {','.join(KINDS)} (all)")
    parser.add_argument("--rounds", type=int, default=1, help="(%(default)s)")
    parser.add_argument("--launcher", choices=get_args(Launcher), default="deepspeed", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, help="keeps the runs and what nodes print; default: a temporary one")
    arguments = parser.parse_args(words)
    if arguments.rounds < 1:
        parser.error(f"--rounds {arguments.rounds} would try nothing: give 1 or more")
    reason = why_no_nodes()
    if reason is not None:
        print(f"no nodes can be made on this machine: {reason}", file=sys.stderr)
        return 4
    everything: list[Found] = []
    with ExitStack() as stack:
        kept = arguments.folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="gigamil-faults-"))
        Path(kept).mkdir(parents=True, exist_ok=True)
        # Run folders of an earlier call would be continued in place of being disturbed.
        folder = Path(tempfile.mkdtemp(prefix="sweep-", dir=kept))
        nodes = stack.enter_context(Nodes(NUM_NODES, folder / "nodes"))
        print("training without a fault", flush=True)
        undisturbed = train_undisturbed(nodes, arguments.launcher, folder)
        print(f"{'fault':34} {'gone in s':>9}  {'bit for bit':>13}  orphans  promises")
        for fault in planned(arguments.faults, arguments.rounds):
            found = try_fault(nodes, arguments.launcher, folder, fault, undisturbed)
            everything.append(found)
            print(row(found), flush=True)
            if found.problems:
                print(found.words, file=sys.stderr, flush=True)
    facts = {"launcher": arguments.launcher, "ranks": NUM_NODES * RANKS_PER_NODE, "nodes": NUM_NODES}
    print(json.dumps(summary(everything) | facts | origin(__file__, words, torch=torch.__version__)))
    return int(any(found.problems for found in everything))


if __name__ == "__main__":
    sys.exit(main())
