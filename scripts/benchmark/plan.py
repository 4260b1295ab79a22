"""What is measured, on which machine, and how thoroughly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmark.measure import Comparison, Effort
from benchmark.task import BY_HAND, Task

__all__ = ["MEASURES", "Machine", "comparisons", "effort_of", "start_subjects", "start_task"]

MEASURES = ("overhead", "throughput", "bytes", "memory", "start")

_PEERS = ("DeepSpeed", "DeepSpeed, ZeRO 1", "Accelerate", "Fabric")
_SHARED = ("Redline, ZeRO 1", "Redline, ZeRO 3", "DeepSpeed, ZeRO 1", "DeepSpeed, ZeRO 2", "DeepSpeed, ZeRO 3")


@dataclass(frozen=True)
class Machine:
    """Where it runs.

    Attributes:
        device: "cpu" or "cuda".
        ranks: how many may train together: cores, or GPUs.
        threads: cores to use in all.
    """

    device: str
    ranks: int
    threads: int


def effort_of(task: Task, quick: bool) -> Effort:
    """Many short turns for small models, few long ones for large ones."""
    if quick:
        return Effort(rounds=3, turn_s=0.01, starts=1)
    small = "MLP" in task.workload
    return Effort(rounds=60 if small else 15, turn_s=0.05 if small else 0.5, starts=7)


def start_task(machine: Machine) -> Task:
    """The task whose start is timed."""
    return Task(BY_HAND, "MLP 64-64-10", machine.device)


def start_subjects() -> tuple[str, ...]:
    """The engines whose start is timed, besides the handwritten loop."""
    return ("Redline", *_PEERS)


def comparisons(machine: Machine, quick: bool) -> Iterator[Comparison]:
    """All comparisons; on CUDA those on one rank also check whether steps synchronize with the GPU."""
    together = min(machine.ranks, 2)
    watched = frozenset({"waits"} if machine.device == "cuda" else ())

    def comparison(title: str, measures: set[str], subjects: tuple[str, ...], **task: object) -> Comparison:
        made = Task(BY_HAND, device=machine.device, **task)  # type: ignore[arg-type]
        return Comparison(title, made, subjects, frozenset(measures) | (watched if made.ranks == 1 else frozenset()))

    for clip in (1.0,) if quick else (1.0, 0.0):
        yield comparison(
            f"MLP 64-64-10, batch 8, one thread, {'clipped at 1' if clip else 'not clipped'}",
            {"overhead"},
            ("by hand, again", "Redline", "Redline, recording", "Redline, as deepspeed", *_PEERS),
            workload="MLP 64-64-10",
            clip=clip,
        )
    if quick:
        yield from _quick(comparison, together)
        return
    for ranks in range(1, together + 1):
        for accumulation in (1, 4):
            yield comparison(
                f"digits MLP, batch 64, {_said(ranks, accumulation)}",
                {"throughput", *(["bytes"] if ranks > 1 else [])},
                ("by hand, again", "Redline", *_PEERS),
                workload="digits MLP 64-256-256-10",
                ranks=ranks,
                accumulation=accumulation,
            )
        for accumulation in (1, 4):
            yield comparison(
                f"GPT 4 x 256, {_said(ranks, accumulation)}",
                {"throughput", *(["bytes"] if ranks > 1 else ["memory"] if accumulation == 1 else [])},
                ("by hand, again", "Redline", *_PEERS),
                workload="GPT 4 x 256",
                ranks=ranks,
                accumulation=accumulation,
                threads=max(1, machine.threads // ranks),
            )
    for accumulation in (1, 4) if together > 1 else ():
        yield comparison(
            f"GPT 4 x 256, ZeRO, {_said(together, accumulation)}",
            {"throughput", "bytes", *(["memory"] if accumulation == 1 else [])},
            ("by hand, again", "Redline", *_SHARED),
            workload="GPT 4 x 256",
            ranks=together,
            accumulation=accumulation,
            threads=max(1, machine.threads // together),
        )
    large = [("GPT 4 x 256", False)]
    if machine.device == "cuda":
        large += [("GPT-2 12 x 768", False), ("GPT-2 12 x 768", True)]
    for workload, compiled in large:
        yield comparison(
            f"{workload} in bf16{', compiled' if compiled else ''}, {_said(1, 1)}",
            {"throughput", "memory"},
            ("by hand, again", "by hand, fp32 master params", "Redline", *_PEERS),
            workload=workload,
            precision="bf16",
            compiled=compiled,
            threads=machine.threads,
        )


def _quick(comparison: Callable[..., Comparison], together: int) -> Iterator[Comparison]:
    """One of each kind."""
    tiny, digits = "tiny GPT 1 x 32", "digits MLP 64-256-256-10"
    subjects = ("Redline", *_PEERS)
    yield comparison(f"{tiny}, {_said(1, 2)}", {"throughput", "memory"}, subjects, workload=tiny, accumulation=2)
    if together > 1:
        task = {"workload": digits, "ranks": together, "accumulation": 2}
        yield comparison(f"digits MLP, {_said(together, 2)}", {"throughput", "bytes"}, subjects, **task)


def _said(ranks: int, accumulation: int) -> str:
    where = "1 rank" if ranks == 1 else f"{ranks} ranks"
    return f"{where}, accumulation {accumulation}"
