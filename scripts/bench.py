"""Benchmark the engine against a handwritten loop, DeepSpeed, Accelerate and Lightning Fabric.

    overhead     microseconds per step, on a model so small that the step is nearly all overhead
    throughput   digits MLP and GPT: one rank and two, accumulation 1 and 4, fp32 and bf16, on CUDA a GPT-2, too
    bytes        sent per optimizer step, on two ranks
    memory       peak of the GPT runs
    start        import, build and first step in a fresh process

Every engine must reproduce the losses of the handwritten loop before it is timed. On CUDA the report also says which
engines synchronize with the GPU. Run by scripts/bench, which installs what is needed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmark.measure import compare, measure_start
from benchmark.plan import MEASURES, Machine, comparisons, effort_of, start_subjects, start_task
from benchmark.report import page, text
from benchmark.task import SUBJECTS, is_installed
from benchmark.worker_group import WorkerError

PROBE = """
import json, torch
gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
print(json.dumps({"gpus": gpus, "gpu": torch.cuda.get_device_name() if gpus else None}))
"""
PACKAGES = ("torch", "deepspeed", "accelerate", "lightning")


def main() -> None:
    options = parse()
    probe = json.loads(subprocess.run([sys.executable, "-c", PROBE], stdout=subprocess.PIPE, check=True).stdout)
    device = options.device or ("cuda" if probe["gpus"] else "cpu")
    if device == "cuda" and not probe["gpus"]:
        sys.exit("bench: --device cuda, but torch finds no GPU here")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = options.threads or cores
    machine = Machine(device, probe["gpus"] if device == "cuda" else max(2, cores), threads)

    began = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - began:5.0f} s] {line}", file=sys.stderr, flush=True)

    for name in dict.fromkeys(SUBJECTS.values()):
        if not any(is_installed(subject) for subject, module in SUBJECTS.items() if module == name):
            say(f"{name.partition('.')[0]} is not installed and left out; scripts/bench --peers installs it")
    if device == "cuda" and machine.ranks < 2:
        say("only one GPU: two ranks are not measured")

    results: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": shlex.join(["scripts/bench", *sys.argv[1:]]),
        "machine": {"name": probe["gpu"] if device == "cuda" else cpu_name(), **asdict(machine), "system": system()},
        "versions": {"Python": platform.python_version(), **versions()},
        "comparisons": [],
    }
    try:
        for comparison in comparisons(machine, options.quick):
            kept = comparison.measures & {*options.only, "waits"}
            if kept <= {"waits"}:
                continue
            comparison = replace(comparison, measures=frozenset(kept))
            found = compare(comparison, effort_of(comparison.task, options.quick), say)
            results["comparisons"].append(
                {
                    "title": comparison.title,
                    "task": {key: value for key, value in asdict(comparison.task).items() if key != "subject"},
                    "measures": sorted(comparison.measures),
                    "tolerance": comparison.tolerance,
                    "subjects": {name: found[name] for name in SUBJECTS if name in found},
                }
            )
            write(options, results)
        if "start" in options.only:
            task = start_task(machine)
            results["start"] = measure_start(task, start_subjects(), effort_of(task, options.quick), say)
            write(options, results)
    except WorkerError as error:
        sys.exit(f"bench: the handwritten loop failed: {error}")
    print(text(results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (default: CUDA if there is a GPU)")
    parser.add_argument(
        "--only", type=measures, default=MEASURES, metavar="A,B", help=f"some of {', '.join(MEASURES)} (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    parser.add_argument("--threads", type=int, metavar="N", help="cores to use (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this file")
    return parser.parse_args()


def measures(names: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in MEASURES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(MEASURES)}")
    return chosen


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Called after every comparison, so that an interrupted run keeps its figures."""
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(page(results))


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def system() -> str:
    return f"{platform.system()} {platform.machine()}"


if __name__ == "__main__":
    main()
