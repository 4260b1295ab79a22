"""One rank of one engine: builds it, then answers requests on standard input, a line each.

    python worker.py TASK         answers in JSON, a line each, on what was standard output

The first answer comes unasked: how long it took to import, to build and to make the first step, each beyond
`import torch`. What libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmark.subjects import BUILDERS
from benchmark.task import SUBJECTS, Task
from benchmark.workloads import WORKLOADS

_BYTES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2, "unsigned char": 1}


class Worker:
    """A subject, built and past its first step."""

    def __init__(self, task: Task) -> None:
        self.task = task
        rank = int(os.environ.get("RANK", "0"))
        if task.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        torch.set_num_threads(task.threads)
        workload = WORKLOADS[task.workload]
        model = workload.model().to(task.device)
        batches = itertools.cycle(workload.batches(rank, task.device))
        self.parameters = sum(parameter.numel() for parameter in model.parameters())

        times = [self._now()]
        importlib.import_module(SUBJECTS[task.subject])
        times.append(self._now())
        self._step = BUILDERS[task.subject](task, model, workload.loss, batches)
        times.append(self._now())
        self._losses = [self._step().detach()]
        times.append(self._now())
        self._start_s = dict(zip(("import_s", "build_s", "first_s"), (b - a for a, b in itertools.pairwise(times))))

    def started(self) -> dict[str, Any]:
        """How long the start took, and the number of parameters."""
        return {**self._start_s, "parameters": self.parameters}

    def losses(self, steps: int) -> list[float]:
        """The losses of so many steps from the first on."""
        while len(self._losses) < steps:
            self._losses.append(self._step().detach())
        return [float(loss) for loss in self._losses]

    def seconds(self, steps: int) -> float:
        """How long so many steps take."""
        start = self._now()
        for _ in range(steps):
            self._step()
        return self._now() - start

    def memory_bytes(self) -> int:
        """Peak memory: allocated by tensors on CUDA, else resident."""
        if self.task.device == "cuda":
            return torch.cuda.max_memory_allocated()
        # Not getrusage, which begins with what the parent used.
        status = Path("/proc/self/status")
        if status.exists():
            return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def sent_bytes(self) -> int:
        """What this rank sends in one step, from the collectives that the backend ran."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            self._step()
            self._now()
        return round(
            sum(
                _sent(event.name.partition(":")[2], event.input_shapes, event.input_dtypes, self.task.ranks)
                for event in profiled.events()
                if event.name.startswith(("gloo:", "nccl:"))
            )
        )

    def waits(self, steps: int) -> str | None:
        """What made so many steps wait for the GPU, as torch says; None where nothing did."""
        self._now()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(steps):
                self._step()
        except RuntimeError as error:
            return f"{error} ({_place(error)})"
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return None

    def _now(self) -> float:
        if self.task.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _sent(operation: str, shapes: list[Any], types: list[str], ranks: int) -> float:
    """Bytes that each rank sends in a collective, in a ring.

    An all-reduce of S bytes is a reduce-scatter and an all-gather, each of which sends S (n - 1) / n.
    """
    if not shapes:  # a barrier
        return 0.0
    size = sum(_product(shape) * _BYTES[kind] for shape, kind in zip(shapes, types) if kind in _BYTES)
    fraction = (ranks - 1) / ranks
    if "all_reduce" in operation or "allreduce" in operation:
        return 2 * fraction * size
    if "gather" in operation and "reduce" not in operation:
        return (ranks - 1) * size  # of this rank's part
    return fraction * size  # reduce-scatter, broadcast, reduce, scatter: the full tensor is given


def _product(shape: list[int]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


def _place(error: BaseException) -> str:
    """Where it was raised."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} {frame.line}"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(make: Callable[[], Any]) -> bool:
        try:
            reply, fine = {"value": make()}, True
        except Exception as error:
            traceback.print_exc()
            reply, fine = {"error": f"{type(error).__name__}: {error}"}, False
        print(json.dumps(reply), file=answers, flush=True)
        return fine

    worker: list[Worker] = []

    def start() -> dict[str, Any]:
        worker.append(Worker(Task(**json.loads(sys.argv[1]))))
        return worker[0].started()

    if answer(start):
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            answer(lambda: getattr(worker[0], name)(*arguments))  # noqa: B023  called at once
    sys.stderr.flush()
    os._exit(0)  # no farewells: libraries write files and wait for each other there


if __name__ == "__main__":
    main()
