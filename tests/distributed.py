"""Runs one function in several real processes, as torchrun would, and brings its answers back.

    def work(x):                                     # at module level: the children import it by name
        torch.distributed.init_process_group("gloo")
        ...
        return value

    values = run_ranks(work, 2, x)                   # [value of rank 0, value of rank 1]

The children get torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and
one thread each; a process group is the function's own business. No child outlives the call: one that fails, hangs or
dies ends them all, and the caller gets the tracebacks.

They are forked from a server that has imported torch, and nothing of ours, and has run nothing: importing it anew would
take each of them seconds.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import queue
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

__all__ = ["RanksFailed", "run_ranks"]

_GRACE_SECONDS = 3.0  # after a first failure the other ranks may still tell theirs
_IMPORTED = ["pytest", "pydantic", "jsonschema", "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint"]


class RanksFailed(AssertionError):
    """At least one rank raised, died or did not answer in time; the message holds what each of them said."""


def run_ranks(target: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``target(*args)`` in ``world_size`` fresh processes and return what they returned, by rank.

    Args:
        target: a module-level function, picklable by name; its result must be picklable.
        world_size: number of processes.
        args: positional arguments, the same for every rank.
        timeout: seconds until all ranks must have answered, start-up included.

    Raises:
        RanksFailed: with the traceback of every rank that raised and the fate of the others.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    work = pickle.dumps((target, args))
    answers = context.Queue()
    port = _free_port()
    children: list[BaseProcess] = [
        context.Process(
            target=_rank_main,
            args=(work, {**os.environ, **_torchrun_environment(rank, world_size, port)}, os.getcwd(), answers),
            name=f"rank {rank}",
            daemon=True,
        )
        for rank in range(world_size)
    ]
    try:
        for child in children:
            child.start()
        values, faults = _collect(children, answers, time.monotonic() + timeout)
        for child in children if not faults else []:
            child.join(_GRACE_SECONDS)
    finally:
        _end(children)
        answers.close()
        answers.join_thread()
    if faults:
        silent = {rank: "had given no answer when another failed" for rank in range(world_size) if rank not in values}
        raise RanksFailed("\n".join(f"rank {rank} of {world_size} {fate}" for rank, fate in (silent | faults).items()))
    return [pickle.loads(values[rank]) for rank in range(world_size)]


def _rank_main(work: bytes, environment: dict[str, str], folder: str, answers: Any) -> None:
    """What a child runs: environment and folder first, the function after them, its answer or its traceback last.

    The work and the answer travel as bytes. So the environment is there before the work's module is imported, and a
    tensor arrives as a copy: torch's own queues would share its memory, which goes when the child goes.
    """
    os.environ.clear()  # the server's are those of its start
    os.environ.update(environment)
    os.chdir(folder)
    rank = int(environment["RANK"])
    try:
        import torch

        torch.set_num_threads(1)  # torch was imported before the environment was set
        target, args = pickle.loads(work)
        answers.put((rank, pickle.dumps(target(*args)), None))
    except BaseException:
        answers.put((rank, None, traceback.format_exc()))
    atexit._run_exitfuncs()  # as at the end of a script, which a forked child does not come to


def _collect(children: Sequence[BaseProcess], answers: Any, deadline: float) -> tuple[dict[int, bytes], dict[int, str]]:
    """Values and faults by rank, once all have answered or a fault has had its grace."""
    values: dict[int, bytes] = {}
    faults: dict[int, str] = {}
    while len(values) + len(faults) < len(children):
        try:
            rank, value, fault = answers.get(timeout=0.1)
        except queue.Empty:
            missing = [rank for rank in range(len(children)) if rank not in values and rank not in faults]
            if time.monotonic() > deadline:
                if not faults:
                    faults = {rank: "gave no answer in time" for rank in missing}
                break
            died = [rank for rank in missing if children[rank].exitcode is not None]
            if died and not faults and answers.empty():
                faults = {rank: f"died with exit code {children[rank].exitcode} and no answer" for rank in died}
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
            continue
        if fault is None:
            values[rank] = value
        else:
            faults[rank] = f"raised\n{fault}"
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    return values, faults


def _end(children: Sequence[BaseProcess]) -> None:
    """Leave no child behind, whatever it is doing."""
    for child in children:
        if child.is_alive():
            child.kill()
    for child in children:
        if child.pid is not None:
            child.join()
            child.close()


def _torchrun_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
