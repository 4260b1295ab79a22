"""The figures as tables: for a terminal, and as a page of the docs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["page", "text"]

Results = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class _Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str]


@dataclass(frozen=True)
class _Section:
    """Comparisons that give one figure for each subject become the rows of one table."""

    name: str
    title: str
    shown: Callable[[Figures, Figures], str]  # a subject's, and the base's
    has: str
    note: str


def _mib(size: float) -> str:
    return f"{size / 2**20:.4g}"


_SECTIONS = (
    _Section(
        "overhead", "Overhead per step (us)", lambda own, base: _overhead(own, base), "overhead_us",
        "Time per step beyond the handwritten loop, whose own time is in its column.",
    ),
    _Section(
        "throughput", "Throughput (handwritten loop = 1)", lambda own, base: f"{own['ratio']:.2f}", "ratio",
        "Higher is faster. \"By hand, again\" is the same loop: the difference is noise.",
    ),
    _Section(
        "bytes", "Sent per optimizer step, over all ranks (MiB)", lambda own, base: _mib(own["sent_bytes"]),
        "sent_bytes",
        "Computed from the collectives that ran, as rings.",
    ),
    _Section(
        "memory", "Peak memory (MiB)", lambda own, base: _mib(own["memory_bytes"]), "memory_bytes",
        "Per rank: resident memory on the CPU, memory allocated by tensors on CUDA.",
    ),
)  # fmt: skip


def _overhead(own: Figures, base: Figures) -> str:
    return f"{own['us']:.0f}" if own is base else f"{own['overhead_us']:+.0f}"


def text(results: Results) -> str:
    """For a terminal."""
    parts = [_machine(results)]
    for table in _tables(results):
        lines = [table.head, *table.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(table.head))]
        parts.append(
            "\n".join(
                [
                    table.title,
                    *("  " + "  ".join(_aligned(line, widths)).rstrip() for line in lines),
                    *(f"  {note}" for note in table.notes),
                ]
            )
        )
    return "\n\n".join(parts)


def _aligned(line: list[str], widths: list[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(line, widths)):
        yield cell.rjust(width) if column else cell.ljust(width)


def page(results: Results) -> str:
    """For the docs, in Markdown."""
    parts = [
        "# Performance",
        f"Written by `{results['command']}` on {results['date']}. {_machine(results)}",
        _METHOD,
    ]
    for table in _tables(results):
        lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
        parts += [
            f"## {table.title}",
            "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines),
            "\n".join(f"- {note}" for note in table.notes),
        ]
    return "\n\n".join(part for part in (*parts, _ONLY_ON_A_GPU) if part) + "\n"


_ONLY_ON_A_GPU = """\
## Not measured yet: GPUs

Tests check without a GPU that nothing on the hot path reads a value from the device: the CUDA branch of forward,
backward and step runs on meta tensors, where reading a value raises, and collectives run under a mode that refuses
reads. No run on a GPU has shown yet

- that no kernel or library call synchronizes by itself, under `torch.cuda.set_sync_debug_mode("error")`;
- whether pinned, non-blocking copies overlap with compute, in the loader and for norms;
- how long backward waits for the reduction at stages 0 to 2, which begins when backward ends (DDP's overlaps with
  it): on several hosts without accumulation up to the time of one all-reduce per step;
- the overlap of NCCL's and FSDP2's streams at stage 3, and FSDP2's memory meanwhile;
- CUDA's autocast, `torch.compile` with CUDA graphs, and fused kernels that skip a step by `found_inf`;
- the memory needed to undo a skipped step with optimizers that cannot skip on the device."""

_METHOD = """\
*By hand* is a plain PyTorch loop, carefully written: `AdamW(fused=True)`, foreach clipping,
`DistributedDataParallel`, `torch.autocast` for bf16. Every engine gets the same fused AdamW, weights, batches and
learning rates, and must reproduce the loop's first 12 losses (relative error 1e-6 in fp32 on a CPU, 1e-5 on CUDA,
1e-2 in bf16) before it is timed. Engines run in separate processes and take turns; each turn is compared with the
loop's turn in the same round, and the tables show medians over the rounds."""


def _machine(results: Results) -> str:
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return f"{machine['name']}, {machine['threads']} cores in use, {machine['system']}; {versions}."


def _tables(results: Results) -> Iterator[_Table]:
    for section in _SECTIONS:
        kept = [each for each in results["comparisons"] if section.name in each["measures"]]
        if not kept:
            continue
        names = list(dict.fromkeys(name for each in kept for name in each["subjects"]))
        names = [name for name in names if any(section.has in each["subjects"].get(name, {}) for each in kept)]
        rows = []
        for each in kept:
            base = next(iter(each["subjects"].values()))
            cells = [each["subjects"].get(name, {}) for name in names]
            rows.append([each["title"], *(section.shown(own, base) if section.has in own else "-" for own in cells)])
        yield _Table(section.title, ["", *names], rows, [section.note, *_left_out(kept)])
    if "start" in results:
        yield _start(results["start"])
    if any("waits" in figures for each in results["comparisons"] for figures in each["subjects"].values()):
        yield _waits(results["comparisons"])


def _start(start: dict[str, Figures]) -> _Table:
    rows = [
        [name, *(f"{figures[part]:.2f}" for part in ("import_s", "build_s", "first_s", "start_s"))]
        for name, figures in start.items()
        if "start_s" in figures
    ]
    notes = ["In a fresh process, beyond `import torch`. The first `torch.optim.AdamW()` imports torch's compiler."]
    head = ["", "import", "build", "first step", "in all"]
    return _Table("Start (s)", head, rows, [*notes, *_left_out([{"title": "start", "subjects": start}])])


def _waits(comparisons: list[Results]) -> _Table:
    """Which engines synchronize with the GPU within ten steps."""
    found: dict[str, str] = {}
    for each in comparisons:
        for name, figures in each["subjects"].items():
            if "waits" in figures:
                found[name] = found.get(name) or figures["waits"] or ""
    rows = [[name, "yes" if why else "no"] for name, why in found.items()]
    notes = [f"{name}: {why}" for name, why in found.items() if why]
    return _Table(
        "Synchronizes with the GPU within a step",
        ["", "synchronizes"],
        rows,
        ['By `torch.cuda.set_sync_debug_mode("error")` around ten steps of every model above.', *notes],
    )


def _left_out(comparisons: list[Results]) -> list[str]:
    """Which engines are missing from which rows, and why."""
    where: dict[tuple[str, str], list[str]] = {}
    for each in comparisons:
        for name, figures in each["subjects"].items():
            if "left_out" in figures:
                where.setdefault((name, figures["left_out"]), []).append(each["title"])
    return [
        f"{name} is left out{'' if len(titles) == len(comparisons) else ' of ' + '; '.join(titles)}: {why}"
        for (name, why), titles in where.items()
    ]
