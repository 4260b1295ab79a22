"""The worker processes of one engine, one per rank, seen from the parent."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark.task import SUBJECTS, Task

__all__ = ["WorkerError", "WorkerGroup"]

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
PATIENCE_S = 600  # for one answer: DeepSpeed compiles, and so does torch.compile

# glibc gives freed memory back to the system and fetches it again, which costs up to a tenth of a step, more or less of
# it from run to run: let it keep what it has.
_KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_MMAP_THRESHOLD_": str(1 << 25), "MALLOC_TOP_PAD_": "0"}


class WorkerError(Exception):
    """A worker failed; the message is its last line of output."""


class WorkerGroup:
    """The processes of one task, one per rank. A context manager: they are killed at the end of the block."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed in __exit__
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")  # where a range test leaves its record
        port = _free_port()
        self._workers = [
            subprocess.Popen(
                [sys.executable, str(WORKER), json.dumps(dataclasses.asdict(task))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._output,
                env=_environment(task, rank, port),
                cwd=self._folder.name,
                bufsize=0,
            )
            for rank in range(task.ranks)
        ]

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.communicate()
        self._output.close()
        self._folder.cleanup()

    def started(self) -> dict[str, float]:
        """The slowest rank's times of its start."""
        answers = self._answers()
        return {name: max(answer[name] for answer in answers) for name in answers[0]}

    def losses(self, steps: int) -> list[float]:
        """The losses of the first `steps` steps, of all ranks one after the other."""
        return [loss for losses in self._ask("losses", steps) for loss in losses]

    def seconds(self, steps: int) -> float:
        """How long `steps` steps take on the slowest rank."""
        return max(self._ask("seconds", steps))

    def memory_bytes(self) -> int:
        """The largest peak of a rank."""
        return max(self._ask("memory_bytes"))

    def sent_bytes(self) -> int:
        """What all ranks together send in one step."""
        return sum(self._ask("sent_bytes"))

    def waits(self, steps: int) -> str | None:
        """Where `steps` steps synchronize with the GPU; None if they do not."""
        return next((found for found in self._ask("waits", steps) if found), None)

    def _ask(self, name: str, *arguments: Any) -> list[Any]:
        for worker in self._workers:
            assert worker.stdin is not None
            try:
                worker.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
            except BrokenPipeError:
                raise WorkerError(self._last_line()) from None
        return self._answers()

    def _answers(self) -> list[Any]:
        """One answer of each rank."""
        values = []
        for worker in self._workers:
            assert worker.stdout is not None
            ready, *_ = select.select([worker.stdout], [], [], PATIENCE_S)
            line = worker.stdout.readline() if ready else b""
            if not line:
                raise WorkerError(self._last_line() if ready else f"no answer in {PATIENCE_S} s")
            answer = json.loads(line)
            if "error" in answer:
                raise WorkerError(" ".join(answer["error"].split()))
            values.append(answer["value"])
        return values

    def _last_line(self) -> str:
        self._output.seek(0)
        lines = self._output.read().decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else "died without output"


def _environment(task: Task, rank: int, port: int) -> dict[str, str]:
    """What torchrun would set, and what makes times comparable."""
    environment = {
        **os.environ,
        **_KEEP_MEMORY,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # DeepSpeed wants ninja
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(task.threads),
    }
    if task.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    if task.ranks > 1 or SUBJECTS[task.subject] == "deepspeed":  # which needs a process group even with one rank
        environment |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(task.ranks),
            "LOCAL_WORLD_SIZE": str(task.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "bench",
        }
    return environment


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
