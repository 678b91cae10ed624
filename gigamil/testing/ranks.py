"""Run a function on several ranks of this machine: gloo, a file store, a time limit, tracebacks.

A hang is a failure: after the limit every rank is killed and the call raises.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


def run_on_ranks(function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `function(rank, *args)` in `num_ranks` fresh processes that share an initialised process group.

    Args:
        function: importable from the top of a module.
        args: picklable.
        timeout_s: for everything, start included.
    Returns:
        What each rank returned.
    Raises:
        RuntimeError: a rank raised (its traceback is in the message), died, or the time ran out.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(num_ranks):
            receiver, sender = context.Pipe()
            target = (function, rank, num_ranks, str(Path(folder) / "store"), sender, args, timeout_s)
            process = context.Process(target=_run_rank, args=target, daemon=True)
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, time.monotonic() + timeout_s)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    while len(results) + len(errors) < len(pipes) and not errors:
        waiting = [rank for rank in range(len(pipes)) if rank not in results]
        ready = wait([pipes[rank] for rank in waiting], timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {waiting} did not finish in time")
        for rank in [rank for rank in waiting if pipes[rank] in ready]:
            try:
                good, value = pipes[rank].recv()
                if good:
                    pipes[rank].send("received")
            except EOFError:
                good, value = False, "the process ended without a word"
            (results if good else errors)[rank] = value
    if errors:
        rank = min(errors)
        raise RuntimeError(f"rank {rank} failed:\n{errors[rank]}")
    return [results[rank] for rank in range(len(pipes))]


def _run_rank(
    function: Callable[..., Any], rank: int, num_ranks: int, store: str, pipe: Connection, args: Any, timeout_s: float
) -> None:
    names = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "DS_ACCELERATOR": "cpu"})
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, num_ranks),
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        pipe.send((True, function(rank, *args)))
        pipe.recv()  # tensors travel as handles that are valid while this process lives
        dist.barrier()  # nobody closes its connections while another still needs them
    except BaseException:  # noqa: BLE001 - the parent raises it; nothing is swallowed
        pipe.send((False, traceback.format_exc()))
    finally:
        dist.destroy_process_group()
